"""Propose launch-table rows: `python -m bench.tune --op gelu_mlp --shape b64t1024` on a GPU.

For each kernel of an op the launch it would take is replaced by candidates around it, one at a
time, and the op is timed in the direction that runs the kernel. A candidate whose results differ
from the present row's by more than rounding is thrown out. The winner is then timed against the
present row in turns; only a gain above MIN_GAIN is proposed. A person pastes the row, with the
result file as its source: nothing here edits a kernel.
"""

import argparse
import importlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ops, record, timing
from bench.cases import Shape, find_case, find_shape, make_inputs
from kernels._launch import Launch

MIN_GAIN = 1.02


@dataclass(frozen=True)
class Knob:
    """One kernel whose launch can be tried out.

    Args:
        op: Case that runs it.
        mode: Direction that runs it.
        module, chooser: `kernels.<module>.<chooser>(...) -> Launch` decides its launch.
        kernel: First argument of the chooser that means this kernel; None if it has but one.
        blocks: Values to try for each block size, in the order of the candidates.
        num_warps, num_stages: Values to try.
        divides: (a, b) where block size a must divide b.
    """

    op: str
    mode: str
    module: str
    chooser: str
    kernel: str | None
    blocks: Mapping[str, tuple[int, ...]]
    num_warps: tuple[int, ...]
    num_stages: tuple[int, ...]
    divides: tuple[str, str] | None = None

    @property
    def label(self) -> str:
        return f"{self.module}.{self.kernel or self.chooser}"

    def original(self) -> Callable[..., Launch]:
        module = importlib.import_module(f"kernels.{self.module}")
        return getattr(module, self.chooser)


_GEMM = {"BLOCK_M": (128, 64, 256), "BLOCK_N": (128, 256, 64), "BLOCK_K": (64, 32)}
_ATTENTION = {"BLOCK_M": (64, 128, 32), "BLOCK_N": (64, 128, 32)}

KNOBS: tuple[Knob, ...] = (
    Knob("gelu_mlp", "fwd", "gelu_mlp", "_launch", "up", _GEMM, (8, 4), (3, 4, 2)),
    Knob("gelu_mlp", "bwd", "gelu_mlp", "_launch", "down", _GEMM, (8, 4), (3, 4, 2)),
    *(
        Knob(
            "causal_attention", mode, "causal_attention", "_launch", kernel,
            _ATTENTION, (4, 8), (2, 3),
            ("BLOCK_M", "BLOCK_N") if kernel == "dkdv" else ("BLOCK_N", "BLOCK_M"),
        )
        for mode, kernel in (("fwd", "fwd"), ("bwd", "dq"), ("bwd", "dkdv"))
    ),
    Knob(
        "linear_cross_entropy", "fwd", "linear_cross_entropy", "logits_launch", None,
        _GEMM, (8, 4), (3, 4, 2),
    ),
    Knob(
        "linear_cross_entropy", "both", "linear_cross_entropy", "dlogits_launch", None,
        {"BLOCK_M": (1, 2, 4, 8), "BLOCK_V": (512, 1024, 2048)}, (4, 8), (3,),
    ),
    Knob(
        "add_layer_norm", "fwd", "layer_norm", "choose_launch", "fwd",
        {"ROWS": (1, 2, 4, 8)}, (4, 8), (1, 2),
    ),
    Knob(
        "add_layer_norm", "bwd", "layer_norm", "choose_launch", "bwd",
        {"ROWS": (1, 2, 4, 8)}, (4, 8), (1, 2, 3),
    ),
)  # fmt: skip


@contextmanager
def launched_with(knob: Knob, launch: Launch | None) -> Iterator[list[Launch]]:
    """Inside, the knob's kernel runs with `launch`, or as ever if None.

    Yields the list of what it would have run with, one entry a run.
    """
    module = importlib.import_module(f"kernels.{knob.module}")
    original = getattr(module, knob.chooser)
    seen: list[Launch] = []

    def choose(*args: Any, **kwargs: Any) -> Launch:
        found = original(*args, **kwargs)
        if knob.kernel is not None and args[0] != knob.kernel:
            return found
        seen.append(found)
        return launch or found

    setattr(module, knob.chooser, choose)
    try:
        yield seen
    finally:
        setattr(module, knob.chooser, original)


def present_launch(knob: Knob, run: Callable[[], Any]) -> Launch:
    """The launch the kernel takes now, found by running it once.

    Raises:
        ValueError: the run did not ask for the kernel's launch.
    """
    with launched_with(knob, None) as seen:
        run()
    if not seen:
        raise ValueError(f"tune: {knob.op} {knob.mode} never asked {knob.label} for a launch")
    return seen[-1]


def candidates(knob: Knob, present: Launch) -> Iterator[Launch]:
    """All combinations, nearest to the present row first, that row itself left out."""
    blocks = dict(present.blocks)
    names = [name for name in knob.blocks if name in blocks]
    space = [
        (dict(zip(names, values, strict=True)), warps, stages)
        for values in itertools.product(*(knob.blocks[name] for name in names))
        for warps in knob.num_warps
        for stages in knob.num_stages
    ]

    def distance(point: tuple[dict[str, int], int, int]) -> int:
        values, warps, stages = point
        changed = sum(blocks[name] != value for name, value in values.items())
        return changed + (warps != present.num_warps) + (stages != present.num_stages)

    for values, warps, stages in sorted(space, key=distance):
        pairs = tuple((blocks | values).items())
        if knob.divides and dict(pairs)[knob.divides[1]] % dict(pairs)[knob.divides[0]]:
            continue
        launch = Launch(pairs, warps, stages, source="candidate")
        if replace(launch, source=present.source) != present:
            yield launch


def _results(call: timing.Call) -> list[Tensor]:
    return [t.detach().clone() for t in call() if isinstance(t, Tensor)]


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal up to rounding of the dtype; summation order differs between tiles."""
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().item()
        error = (a.double() - b.double()).abs().max().item()
        if not error <= 8 * torch.finfo(b.dtype).eps * max(scale, 1e-6):  # NaN too
            return False
    return True


def propose(
    knob: Knob,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float = 60.0,
    limit: int | None = None,
    rounds: int = 20,
) -> dict[str, Any]:
    """Try candidates until time or they run out; the row says what was found.

    Args:
        limit: At most so many candidates.
    """
    case = find_case(knob.op)
    fn = ops.find_provider("ours", knob.op, device)
    stream = timing.capture_stream() if device.type == "cuda" else None
    set_bytes = int(case.bytes(shape, dtype.itemsize, knob.mode))
    deadline = time.perf_counter() + seconds

    with torch.cuda.stream(stream):  # type: ignore[arg-type] # None: no stream to enter
        inputs = make_inputs(case, shape, dtype, device)
        torch.manual_seed(0)
        call = ops.make_call(fn, case, knob.mode, inputs)
        present = present_launch(knob, call)
        want = _results(call)

    def replay(launch: Launch) -> timing.Replay:
        with launched_with(knob, launch):
            if not _same(_results(call), want):
                raise RuntimeError("results differ")
            if device.type == "cuda":
                return timing.device_replay([call], set_bytes)
        return timing.host_replay(lambda: _run_with(knob, launch, call))

    now = replay(present)
    best, best_ms, best_replay = present, _quick(now), now
    tried, failed = 0, 0
    for launch in itertools.islice(candidates(knob, present), limit):
        if time.perf_counter() > deadline:
            break
        tried += 1
        try:
            found = replay(launch)
            ms = _quick(found)
        except Exception:  # out of shared memory, a compiler error, wrong numbers: not this one
            failed += 1
            continue
        if ms < best_ms:
            best, best_ms, best_replay = launch, ms, found
    timed = timing.interleave({"present": now, "best": best_replay}, rounds=rounds)
    gain = timing.ratio(timed["present"], timed["best"]) if best != present else 1.0
    return {
        "op": knob.op,
        "kernel": knob.label,
        "mode": knob.mode,
        "shape": shape.label,
        "dtype": str(dtype).removeprefix("torch."),
        "present": describe(present),
        "present_ms": timed["present"].median_ms,
        "best": describe(best),
        "best_ms": timed["best"].median_ms,
        "gain": gain,
        "propose": gain >= MIN_GAIN,
        "tried": tried,
        "failed": failed,
    }


def _run_with(knob: Knob, launch: Launch, call: timing.Call) -> None:
    with launched_with(knob, launch):
        call()


def _quick(replay: timing.Replay) -> float:
    return timing.interleave({"": replay}, rounds=5, seconds=1.0, warmup=1)[""].median_ms


def describe(launch: Launch) -> dict[str, Any]:
    return {
        "blocks": dict(launch.blocks),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def source_of(row: Mapping[str, Any], result: str) -> str:
    """The proposed row as the source line a person pastes."""
    best = row["best"]
    blocks = ", ".join(f'("{name}", {value})' for name, value in best["blocks"].items())
    why = f"{result}: {row['present_ms']:.4g} -> {row['best_ms']:.4g} ms, {row['shape']}"
    return f'Launch(({blocks},), {best["num_warps"]}, {best["num_stages"]}, source="{why}")'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = list(dict.fromkeys(knob.op for knob in KNOBS))
    parser.add_argument("--op", action="append", default=[], help=f"of {', '.join(known)}")
    parser.add_argument("--shape", action="append", default=[], help="b<B>t<T>")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget per kernel and shape")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    for op in args.op:
        if op not in known:
            raise ValueError(f"tune: unknown op {op!r}; known: {', '.join(known)}")
    if not torch.cuda.is_available():
        raise ValueError("tune: launch rows are chosen by time on a GPU; there is none here")
    device = torch.device("cuda")
    results = record.Results(device, args.out)
    shapes = [find_shape(name) for name in args.shape or ("b64t1024", "b16t64")]
    run(KNOBS if not args.op else [k for k in KNOBS if k.op in args.op], shapes, device, results,
        seconds=args.seconds)  # fmt: skip


def run(
    knobs: Sequence[Knob],
    shapes: Sequence[Shape],
    device: torch.device,
    results: record.Results,
    *,
    seconds: float,
    deadline: float = float("inf"),
) -> None:
    """Every knob at every shape, each row written as it comes."""
    for shape in shapes:
        for knob in knobs:
            if time.monotonic() > deadline:
                return
            try:
                row = propose(knob, shape, torch.bfloat16, device, seconds=seconds)
            except Exception as error:
                print(f"{knob.label} {shape.label}: {type(error).__name__}: {error}")
                continue
            results.add("tune", row)
            text = source_of(row, os.path.relpath(results.path)) if row["propose"] else "keep"
            print(f"{knob.label} {shape.label} x{row['gain']:.3f} of {row['tried']}: {text}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
