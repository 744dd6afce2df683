"""Each op alone: ours beside plain PyTorch, torch.compile, Liger-Kernel and the SDPA backends.

    python -m bench.ops                       # every op on this machine's shapes
    python -m bench.ops --op layer_norm --shape b8t1024 --provider eager --provider ours
    python -m bench.ops --sweep               # many sizes, for the plots
    python -m bench.ops --benchmark-compare   # beside the run before this one

It runs under pytest-benchmark (`test_op` below), which keeps each run under .benchmarks/ and whose
other options can be given too. All providers of an op are sampled in turn by the bench's own timer
the first time one of them is asked for; pytest-benchmark reads the samples through a clock that
moves by what was measured, so its statistics are of device time on CUDA. The op's numerics are
compared with float64 first; where they fail, the row is in doubt and no speed is printed. Percent
of limit is the time the copy and matmul rates of the same run allow (bytes and flops of
`bench.cases`) over the measured time.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baseline, cli, record
from bench.cases import (
    CASES,
    CPU_SHAPES,
    GPU_SHAPES,
    MODES,
    Case,
    Inputs,
    Shape,
    check_room,
    make_inputs,
)  # fmt: skip
from bench.rows import OpRow, filled
from bench.tables import ops_table
from kernels import SDPA, parse_ops
from tests import numerics
from training import timing
from training.machines import free_bytes

Fn = Callable[..., Any]

# Who does which ops.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "eager": (*CASES,),
    "compile": (*CASES,),
    "ours": (*CASES,),
    "liger": ("layer_norm", "linear_cross_entropy"),
    **dict.fromkeys(SDPA, ("causal_attention",)),
    "linear-ce": ("linear_cross_entropy",),
}
# F.linear_cross_entropy takes 20 times the time of the rest on a CPU: only when asked for.
CPU_PROVIDERS = ("eager", "compile", "ours")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Unavailable(Exception):
    """Why a provider cannot run here."""


def _liger(op: str) -> Fn:
    try:
        from liger_kernel.transformers import functional
    except ImportError:
        raise Unavailable("liger_kernel is not installed") from None
    if op == "linear_cross_entropy":
        return _flat(functional.liger_fused_linear_cross_entropy)
    return lambda x, weight, bias, eps=1e-5: functional.liger_layer_norm(
        x, weight.to(x.dtype), bias.to(x.dtype), eps
    )


def _linear_ce() -> Fn:
    call: Any = getattr(F, "linear_cross_entropy", None)
    if call is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return _flat(partial(call, options=options))


def _flat(call: Fn) -> Fn:
    """Our signature of a loss that knows no padding."""
    return lambda x, weight, targets, vocab_size: call(
        x.flatten(0, -2), weight[:vocab_size], targets.flatten()
    )


def find_provider(name: str, op: str, device: torch.device) -> Fn:
    """The callable of a provider that does this op; Unavailable if it cannot run here."""
    cuda = device.type == "cuda"
    plain = baseline.OPS[op]
    if name == "eager":
        return plain
    if name == "compile":
        return torch.compile(plain, fullgraph=True, dynamic=False)
    if name == "ours":
        return getattr(parse_ops("triton" if cuda else "eager"), op)
    if name == "linear-ce":
        return _linear_ce()
    if not cuda:
        raise Unavailable(f"{name} needs a GPU")
    if name == "liger":
        return _liger(op)
    return getattr(parse_ops(f"eager,{op}={name}"), op)


def make_call(fn: Fn, case: Case, mode: str, inputs: Inputs) -> timing.Call:
    """One call of `fn` on these inputs in this mode; "bwd" runs its forward here, once."""
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        out = fn(**inputs)
        return out if isinstance(out, tuple) else (out,)

    if mode == "fwd":
        if "bwd" in case.modes:
            return forward  # with what it saves for the backward
        return torch.no_grad()(forward)
    outs = forward()
    douts = [torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in outs]
    if mode == "both":  # a graph of its own for each, so this one is let go
        return lambda: torch.autograd.grad(forward(), leaves, douts)
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)


def doubt_of(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Why no speed of ours may be shown; empty where its numerics hold."""
    try:
        ours = find_provider("ours", op, device)
        found = numerics.check_op(ours, op, shape, dtype, device)
    except Exception as error:
        if timing.is_fatal(error):
            raise
        return f"not checked: {timing.reason_of(error)}"
    return "; ".join(str(c) for c in found if not c.holds)


def make_rows(
    names: Sequence[str],
    timed: Mapping[str, timing.Timing],
    failed: Mapping[str, str],
    rivals: Sequence[str],
    nbytes: int,
    floor: float,
    **whose: Any,
) -> dict[str, OpRow]:
    """A row for each name: its time, or why it has none.

    Args:
        rivals: Who is named in `over`.
        nbytes: What a call cannot do without.
        floor: The time in ms that the measured limits allow.
        whose: Op, shape, dtype and mode of the rows.
    """
    rows = {}
    for name in names:
        row = filled(OpRow(provider=name, **whose), timed, failed, rivals)
        if found := timed.get(name):
            rates = {"gbs": nbytes / row.ms / 1e6, "of_limit": floor / row.ms}
            row = replace(row, timed=found.mode, **rates)
        rows[name] = row
    return rows


def measure(
    op: str, shape: Shape, dtype: torch.dtype, mode: str, device: torch.device, *,
    providers: Sequence[str] = (*PROVIDERS,), rounds: int = 30, seconds: float = 4.0,
    checked: bool = True, sweep: bool = False,
) -> tuple[dict[str, OpRow], dict[str, timing.Timing]]:  # fmt: skip
    """Time one op in one mode, all providers that do it in turn.

    Returns:
        Rows and samples by provider. A provider that cannot run or fails has a row in doubt and no
        samples; ours, where its numerics fail, a row in doubt.

    Raises:
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a compiled backward frees its inputs, and is run again here
    torch.compiler.reset()  # or a second shape meets the first one's graph and its recompile limit
    case, cuda = CASES[op], device.type == "cuda"
    providers = [name for name in providers if op in PROVIDERS[name]]
    checked = checked and "ours" in providers
    doubt = doubt_of(op, shape, dtype, device) if checked else ""
    set_bytes = int(case.bytes(shape, dtype.itemsize, mode))
    contestants: dict[str, list[timing.Call]] = {}
    peaks: dict[str, int] = {}
    needs: dict[str, int] = {}
    failed: dict[str, str] = {}
    stream = timing.capture_stream() if cuda else None
    with torch.cuda.stream(stream):  # type: ignore[arg-type] # None: no stream to enter
        num_sets = timing.num_sets(set_bytes, device)
        sets = [make_inputs(case, shape, dtype, device, seed) for seed in range(num_sets)]
        for name in providers:
            try:
                fn = find_provider(name, op, device)
                calls = [make_call(fn, case, mode, inputs) for inputs in sets]
                peaks[name], results = _peak_bytes(calls[0], device)
                needs[name] = peaks[name] + (num_sets - 1) * results
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
    floor = case.floor_ms(shape, dtype.itemsize, mode, record.limits(device))
    flops = case.flops(shape, mode)
    state = record.gpu_state() if cuda else {}
    rows = make_rows(
        providers, timed, failed, ("eager", "compile"), set_bytes, floor, op=op, shape=shape.label,
        dtype=next(name for name in DTYPES if DTYPES[name] == dtype), mode=mode, sweep=sweep,
    )  # fmt: skip
    for name, row in rows.items():
        values: dict[str, Any] = {}
        if name in timed:
            values = {"gpu": state, "tflops": flops / row.ms / 1e9 if flops else None,
                      "peak_gib": peaks[name] / 2**30 if cuda else None}  # fmt: skip
            if cuda and op == "causal_attention" and name in ("eager", "compile"):
                values["backend"] = baseline.chosen_sdpa(sets[0]["qkv"], shape.H)
        if name == "ours" and checked:
            values["checked"] = numerics.check_shape(op, shape, device).label
            # Its numerics matter more than why it has no time.
            values["doubt"] = "; not timed: ".join(filter(None, [doubt, row.doubt]))
        rows[name] = replace(row, **values)
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


def make_parser() -> cli.Parser:
    parser = cli.Parser("bench.ops", __doc__)
    add = parser.add_argument
    add("--op", action="append", choices=[*CASES], default=[], help="repeat for several")
    add("--shape", action="append", type=cli.shape, default=[], help="b<B>t<T>")
    add("--mode", action="append", choices=MODES, default=[], help="default: all")
    add("--provider", action="append", choices=[*PROVIDERS], default=[], help="default: all")
    add("--dtype", choices=[*DTYPES], help="default: bf16 on a GPU, fp32 on a CPU")
    add("--sweep", action="store_true", help="the sizes of each op's plot")
    add("--seconds", type=cli.amount, default=4.0, help="budget of one op and mode")
    add("--minutes", type=cli.amount, default=10.0, help="nothing begins after these")
    cli.add_output(parser)
    return parser


class Job:
    """What pytest-benchmark is given to do, as a plugin of pytest.

    Args:
        options: Of `make_parser`.
        device: Where.

    Raises:
        ValueError: a shape whose tensors cannot fit; on a GPU, where each provider says itself
            that it lacks room, those of the op's interface alone.
    """

    def __init__(self, options: argparse.Namespace, device: torch.device):
        cuda = device.type == "cuda"
        self.options, self.device = options, device
        self.dtype = DTYPES[options.dtype or ("bf16" if cuda else "fp32")]
        self.providers = options.provider or CPU_PROVIDERS
        if cuda and not options.provider:
            # Compiling plain PyTorch anew for each size would take most of the time.
            self.providers = [n for n in PROVIDERS if not (options.sweep and n == "compile")]
        self.todo: list[tuple[str, Shape, str]] = []
        room = torch.cuda.mem_get_info(device)[0] if cuda else free_bytes()
        for case in (CASES[op] for op in options.op or CASES):
            usual = GPU_SHAPES if cuda else CPU_SHAPES
            for shape in case.sweep if options.sweep else options.shape or usual:
                need = case.bytes(shape, self.dtype.itemsize, "both")
                need += 16 * shape.M * shape.Vp if case.logits and not cuda else 0
                check_room(f"{case.op} at {shape.label}", 0 if options.sweep else need, room)
                modes = options.mode or (("both",) if options.sweep else case.modes)
                self.todo += [(case.op, shape, mode) for mode in case.modes if mode in modes]

    def run(self, results: record.Results, flags: Sequence[str]) -> int:
        """Measure, each row written as it comes; print the tables; the exit code.

        Args:
            results: Where the rows go.
            flags: More options of pytest-benchmark.
        """
        self.results, self.rows = results, dict[tuple[str, str], list[OpRow]]()
        self.until = time.monotonic() + 60 * self.options.minutes
        self.measured = cache(self._measure)
        quiet = [] if flags else ["--benchmark-quiet"]  # the tables below say more
        code = pytest.main([
            str(record.ROOT / "bench/ops.py"), "-q", "--no-header", "--disable-warnings",
            "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-only",
            "--benchmark-autosave", f"--benchmark-storage=file://{record.ROOT}/.benchmarks",
            "--benchmark-sort=name", "--benchmark-columns=median,iqr,rounds", *quiet, *flags,
        ], plugins=[self])  # fmt: skip
        for (label, mode), rows in self.rows.items():
            print(f"\n{label}, {rows[0].dtype}, {mode}\n\n{ops_table(rows)}")
        return {4: 2, 5: 0}.get(code, int(code))  # "wrong usage" and "nothing was selected"

    def _measure(self, op: str, shape: Shape, mode: str) -> Any:
        if time.monotonic() > self.until:
            return None
        rows, timed = measure(
            op, shape, self.dtype, mode, self.device, providers=self.providers,
            seconds=self.options.seconds, sweep=self.options.sweep,
        )  # fmt: skip
        self.rows.setdefault((shape.label, mode), []).extend(rows.values())
        self.results.about["limits"] = record.limits(self.device)
        self.results.add("ops", *rows.values())
        return rows, timed

    def pytest_generate_tests(self, metafunc: Any) -> None:
        kind = f"{self.options.dtype or ''}{'sweep' if self.options.sweep else ''}"
        who = {f"{op}-{mode}-{shape.label.replace(' ', '')}{kind}-{name}": (op, shape, mode, name)
               for op, shape, mode in self.todo for name in self.providers
               if op in PROVIDERS[name]}  # fmt: skip
        calls = [(partial(self.measured, *what), name) for *what, name in who.values()]
        metafunc.parametrize(("measured", "provider"), calls, ids=[*who])

    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """Two runs are worth comparing where this is the same; it names no host."""
        return {name: self.results.about[name] for name in ("device", "torch", "triton", "python")}


class Clock:
    """In seconds; what was measured moves it, and nothing else."""

    now = 0.0


@pytest.mark.benchmark(timer=lambda: Clock.now)
def test_op(benchmark: Any, measured: Callable[[], Any], provider: str) -> None:
    """One op, shape, mode and provider."""
    if (found := measured()) is None:
        pytest.skip("no time left")
    row, timed = (by_name.get(provider) for by_name in found)
    if row.doubt:
        (pytest.fail if provider == "ours" else pytest.skip)(f"{provider}: {row.doubt}")
    benchmark.group = f"{row.op} {row.mode} {row.shape}"
    benchmark.extra_info |= row.values()
    samples = iter(timed.samples_ms)

    def replay() -> None:
        Clock.now += next(samples) / 1e3

    benchmark.pedantic(replay, rounds=row.rounds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options, rest = cli.parse_with_benchmark(parser, argv)
    device = torch.device(cli.devices()[-1])
    job = Job(options, device)
    results = record.Results(device, options.out, options.commit)
    code = job.run(results, rest)
    print(f"\nwrote {os.path.relpath(results.path)}" if job.rows else "nothing was measured")
    return code


if __name__ == "__main__":
    cli.run(main)
