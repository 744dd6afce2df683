"""Each op alone: ours beside plain PyTorch, torch.compile, Liger-Kernel and the SDPA backends.

    python -m bench.ops                       # every op on this machine's shapes
    python -m bench.ops --op layer_norm --shape b8t1024 --provider eager --provider ours
    python -m bench.ops --sweep               # many sizes, for the plots

The op's numerics are compared with float64 first; where they fail, the row says so and no speed is
printed (the file has it as unverified_ms). Percent of limit is the time the copy and matmul rates
of the same run allow (bytes and flops of `bench.cases`) over the measured time.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import baseline, record, timing
from bench.cases import (
    CASES,
    CPU_SHAPES,
    GPU_SHAPES,
    MODES,
    Case,
    Inputs,
    Shape,
    find_case,
    find_shape,
    floor_ms,
    make_inputs,
    smaller,
)
from bench.report import table
from kernels import parse_ops
from tests import numerics

Fn = Callable[..., Any]

PROVIDERS = ("eager", "compile", "ours", "liger", "sdpa-flash", "sdpa-cudnn", "linear-ce")
# F.linear_cross_entropy takes 20 times the time of the rest on a CPU: only when asked for.
CPU_PROVIDERS = ("eager", "compile", "ours")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Tokens numerics are checked on. On CUDA enough for the launch rows of large M (from 4,096 rows on)
# and for two chunks of the loss at GPT-2's vocabulary; the interpreter takes minutes there.
CHECK_TOKENS = {"causal_attention": 4096, "linear_cross_entropy": 16384}
DEFAULT_CHECK_TOKENS = 5120
CHECK_LENGTH = 1023  # of attention's rows: long, and no multiple of a tile
CPU_CHECK_TOKENS = {"linear_cross_entropy": 96}  # float64 logits of 50,304 columns: 39 MB
DEFAULT_CPU_CHECK_TOKENS = 512


class Unavailable(Exception):
    """Why a provider cannot run here."""


def _liger(op: str) -> Fn:
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        raise Unavailable("liger_kernel is not installed") from None
    if op == "layer_norm":
        return lambda x, weight, bias, eps=1e-5: functional.liger_layer_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), eps
        )

    def loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        call: Any = functional.liger_fused_linear_cross_entropy
        return call(x.flatten(0, -2), weight[:vocab_size], targets.flatten())

    return loss


def _linear_ce(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    call: Any = getattr(F, "linear_cross_entropy", None)
    if call is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return call(x.flatten(0, -2), weight[:vocab_size], targets.flatten(), options=options)


def check_provider(name: str) -> None:
    """Raise ValueError for an unknown provider; the message lists the known ones."""
    if name not in PROVIDERS:
        raise ValueError(f"bench: unknown provider {name!r}; known: {', '.join(PROVIDERS)}")


def find_provider(name: str, op: str, device: torch.device) -> Fn:
    """The callable of one provider.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        Unavailable: it does not do this op, or cannot run here.
    """
    check_provider(name)
    cuda = device.type == "cuda"
    plain = baseline.OPS[op]
    if name == "eager":
        return plain
    if name == "compile":
        return torch.compile(plain, fullgraph=True, dynamic=False)
    if name == "ours":
        return getattr(parse_ops("triton" if cuda else "eager"), op)
    does = {
        "liger": ("layer_norm", "linear_cross_entropy"),
        "sdpa-flash": ("causal_attention",),
        "sdpa-cudnn": ("causal_attention",),
        "linear-ce": ("linear_cross_entropy",),
    }[name]
    if op not in does:
        raise Unavailable(f"{name} has no {op}")
    if name == "linear-ce":
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
        return _linear_ce
    if not cuda:
        raise Unavailable(f"{name} needs a GPU")
    if name == "liger":
        return _liger(op)
    backend = SDPBackend.FLASH_ATTENTION if name == "sdpa-flash" else SDPBackend.CUDNN_ATTENTION
    return partial(plain, backend=backend)


def check_shape(op: str, shape: Shape, device: torch.device) -> Shape:
    """The cut of a shape that `check_numerics` runs on; rows of results carry its label."""
    if device.type != "cuda":
        return smaller(shape, CPU_CHECK_TOKENS.get(op, DEFAULT_CPU_CHECK_TOKENS))
    if op == "causal_attention":
        shape = replace(shape, T=min(shape.T, CHECK_LENGTH))
    return smaller(shape, CHECK_TOKENS.get(op, DEFAULT_CHECK_TOKENS))


def check_numerics(
    op: str, shape: Shape, dtype: torch.dtype | str, device: torch.device, seed: int = 1
) -> list[numerics.Comparison]:
    """Ours against float64, held to twice the error of plain PyTorch, on `check_shape`.

    Args:
        dtype: As a name of `numerics.DTYPES` it brings its precision of fp32 products along
            ("tf32", "fp32"); as a dtype it takes the one that is set.
    """
    if isinstance(dtype, str):
        with numerics.precision(dtype) as known:
            return check_numerics(op, shape, known, device, seed)
    cut = check_shape(op, shape, device)
    inputs = make_inputs(find_case(op), cut, dtype, device, seed)
    plain = baseline.OPS[op]
    return numerics.compare_runs(find_provider("ours", op, device), plain, plain, inputs, cut.M)


def red_reason(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why no speed of ours may be shown; None where its numerics hold."""
    try:
        failed = [str(c) for c in check_numerics(op, shape, dtype, device) if not c.holds]
    except Exception as error:
        if timing.is_fatal(error):
            raise
        return f"not checked: {timing.reason_of(error)}"
    return "; ".join(failed) or None


def make_call(fn: Fn, case: Case, mode: str, inputs: Inputs) -> timing.Call:
    """One call of `fn` on these inputs in this mode; "bwd" runs its forward here, once."""
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        out = fn(**inputs)
        return out if isinstance(out, tuple) else (out,)

    def douts_of(outs: tuple[Tensor, ...]) -> list[Tensor]:
        return [torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in outs]

    if mode == "fwd":
        if "bwd" in case.modes:
            return forward  # with what it saves for the backward

        def loss_only() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return forward()

        return loss_only
    if mode == "bwd":
        outs = forward()
        douts = douts_of(outs)
        return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    douts = douts_of(forward())
    return lambda: torch.autograd.grad(forward(), leaves, douts)


def _allow_retained_backward() -> None:
    """Let a compiled backward run twice: it frees ("donates") its inputs by default."""
    import torch._functorch.config as config

    config.donated_buffer = False


def measure(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    *,
    providers: Sequence[str] = PROVIDERS,
    rounds: int = 30,
    seconds: float = 4.0,
    checked: bool = True,
) -> tuple[list[dict[str, Any]], dict[str, timing.Timing]]:
    """Time one op in one mode, all providers in turn.

    Returns:
        Rows for the result file, and the samples by provider. A provider that cannot run or fails
        has a row with "skip". Ours, where its numerics fail, has one with "red", its time as
        "unverified_ms" and no samples.

    Raises:
        ValueError: an unknown op, mode or provider.
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    case = find_case(op)
    if mode not in case.modes:
        raise ValueError(f"bench: {op} has modes {case.modes}, got {mode!r}")
    for name in providers:
        check_provider(name)
    _allow_retained_backward()
    torch.compiler.reset()  # or a second shape meets the first one's graph and its recompile limit
    dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
    identity = {"op": op, "shape": shape.label, "dtype": dtype_name, "mode": mode}
    ours: dict[str, Any] = {}  # what the row of ours says of its check
    if checked and "ours" in providers:
        ours = {"checked": check_shape(op, shape, device).label}
        if red := red_reason(op, shape, dtype, device):
            ours["red"] = red

    set_bytes = int(case.bytes(shape, dtype.itemsize, mode))
    contestants: dict[str, list[timing.Call]] = {}
    peaks: dict[str, int] = {}
    needs: dict[str, int] = {}
    failed: dict[str, str] = {}
    stream = timing.capture_stream() if device.type == "cuda" else None
    with torch.cuda.stream(stream):  # type: ignore[arg-type] # None: no stream to enter
        count = timing.num_sets(set_bytes, device)
        sets = [make_inputs(case, shape, dtype, device, seed) for seed in range(count)]
        for name in providers:
            try:
                fn = find_provider(name, op, device)
                calls = [make_call(fn, case, mode, inputs) for inputs in sets]
                peaks[name], results = _peak_bytes(calls[0], device)
                needs[name] = peaks[name] + (count - 1) * results
                contestants[name] = calls
            except Unavailable as why:
                failed[name] = str(why)
            except Exception as error:  # out of memory, a backend that refuses the shape, ...
                timing.note_failure(failed, name, error)
            if name in failed:
                fn = calls = None  # what it made before it failed
                _free(device)
    timed = timing.time_calls(
        contestants, device, set_bytes,
        needs=needs, failed=failed, rounds=rounds, seconds=seconds,
    )  # fmt: skip
    state = timing.gpu_state() if device.type == "cuda" else {}
    limits = timing.limits(device)
    floor = floor_ms(case, shape, dtype, mode, limits)
    flops = case.flops(shape, dtype.itemsize, mode)
    rows: list[dict[str, Any]] = []
    if "red" in ours:
        if found := timed.pop("ours", None):
            ours["unverified_ms"] = found.median_ms
        else:  # its numerics matter more than why it has no time
            ours["red"] += f"; not timed: {failed.pop('ours')}"
        rows.append({**identity, "provider": "ours", **ours})
    rows += [{**identity, "provider": name, "skip": why} for name, why in failed.items()]
    for name, found in timed.items():
        q1, q3 = found.quartiles_ms
        row: dict[str, Any] = {
            **identity,
            "provider": name,
            **(ours if name == "ours" else {}),
            "ms": found.median_ms,
            "q1_ms": q1,
            "q3_ms": q3,
            "cov": found.cov,
            "noisy": found.noisy,
            "rounds": len(found.samples_ms),
            "timed": found.mode,
            "gbs": set_bytes / found.median_ms / 1e6,
            "of_limit": floor / found.median_ms,
        }
        if flops:
            row["tflops"] = flops / found.median_ms / 1e9
        for other in ("eager", "compile"):
            if other in timed and other != name:
                row[f"over_{other}"] = timing.ratio(timed[other], found)
        if device.type == "cuda":
            row["peak_gib"] = peaks[name] / 2**30
            row["gpu"] = state
            if op == "causal_attention" and name in ("eager", "compile"):
                row["backend"] = baseline.chosen_sdpa(sets[0]["qkv"], shape.H)
        rows.append(row)
    del contestants, sets
    _free(device)
    return rows, timed


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak_bytes(call: timing.Call, device: torch.device) -> tuple[int, int]:
    """Memory a call takes above its inputs, and that of its results alone; also its warm-up."""
    call()
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    results = call()
    torch.cuda.synchronize(device)
    after = torch.cuda.memory_allocated(device)
    del results
    return torch.cuda.max_memory_allocated(device) - before, after - before


def ops_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a provider; rates are GB/s for ops bound by memory, TFLOP/s for the rest."""
    header = ["op", "mode", "who", "ms", "spread", "rate", "of limit", "x eager", "x compile"]
    if any("peak_gib" in row for row in rows):
        header.append("extra GiB")
    lines = []
    for row in rows:
        start = [row["op"], row["mode"], row["provider"]]
        if "ms" not in row:
            why = f"not shown: {row['red']}" if row.get("red") else row["skip"]
            lines.append(start + [why] + [""] * (len(header) - 4))
            continue
        rate = f"{row['tflops']:,.3g} TFLOP/s" if "tflops" in row else f"{row['gbs']:,.3g} GB/s"
        spread = f"{100 * row['cov']:.1f}%" + (" !" if row["noisy"] else "")
        who = row["provider"] + (f" ({row['backend'].lower()})" if "backend" in row else "")
        cells = [row["op"], row["mode"], who, f"{row['ms']:.3g}", spread, rate]
        cells += [f"{100 * row['of_limit']:.0f}%"]
        cells += [f"{row[k]:.2f}" if k in row else "" for k in ("over_eager", "over_compile")]
        if len(header) > len(cells):
            cells.append(f"{row['peak_gib']:.2f}")
        lines.append(cells)
    return table(header, lines)


def plan_measurements(
    device: torch.device,
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    sweep: bool = False,
) -> Iterator[tuple[str, Shape, str]]:
    """(op, shape, mode) to measure; names are checked before the first is measured."""
    cases = [find_case(op) for op in ops] or list(CASES.values())
    names = shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    chosen = [find_shape(name) for name in names]
    for case in cases:
        for shape in case.sweep if sweep else chosen:
            for mode in case.modes:
                yield case.op, shape, mode


def default_providers(device: torch.device) -> tuple[str, ...]:
    return PROVIDERS if device.type == "cuda" else CPU_PROVIDERS


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", action="append", default=[], help=f"of {', '.join(CASES)}")
    parser.add_argument("--shape", action="append", default=[], help="b<B>t<T>")
    parser.add_argument(
        "--provider", action="append", default=[], help=f"of {', '.join(PROVIDERS)}"
    )
    parser.add_argument("--mode", action="append", default=[], help=f"of {', '.join(MODES)}")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--sweep", action="store_true", help="the sizes of each op's plot")
    parser.add_argument("--seconds", type=float, default=4.0, help="budget of one op and mode")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else default_dtype(device)
    for name in args.provider:
        check_provider(name)
    todo = list(plan_measurements(device, args.op, args.shape, args.sweep))
    results = record.Results(device, args.out)
    results.put("limits", timing.limits(device))
    rows: list[dict[str, Any]] = []
    for op, shape, mode in todo:
        if args.mode and mode not in args.mode:
            continue
        found, _ = measure(
            op, shape, dtype, mode, device,
            providers=args.provider or default_providers(device), seconds=args.seconds,
        )  # fmt: skip
        for row in found:
            results.add("ops", row | ({"sweep": True} if args.sweep else {}))
        rows += found
        print(f"{op} {mode} {shape.label}: {len(found)} rows", file=sys.stderr, flush=True)
    for label in dict.fromkeys(row["shape"] for row in rows):
        print(f"\nOps, {label}, {device.type}")
        print(ops_table([row for row in rows if row["shape"] == label and "skip" not in row]))
    print(f"wrote {os.path.relpath(results.path)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
