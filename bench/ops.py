"""Each op alone: ours against plain PyTorch, torch.compile, Liger-Kernel and the SDPA backends.

    python -m bench.ops                       # every op on this machine's shapes
    python -m bench.ops --op layer_norm --shape b8t1024 --provider eager --provider ours
    python -m bench.ops --benchmark-compare   # compared with the previous run

It runs under pytest-benchmark, takes its options too, and stores each run under .benchmarks/. Our
own timer samples all providers of an op in turns; pytest-benchmark reads these samples from a clock
that only they advance. Ours is first compared with float64; if it fails, no speed is printed. "of
limit" is the minimum time for the bytes and flops of `bench.cases` at the measured copy and matmul
rates, divided by the time taken.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import baseline, cases, cli, record
from bench.cases import CASES, MODES, Case, Inputs, Shape
from bench.record import OpRow
from bench.tables import ops_table
from kernels import SDPA, parse_ops
from tests import numerics
from training import timing
from training.machines import free_bytes

Fn = Callable[..., Any]

PROVIDERS: dict[str, tuple[str, ...]] = {  # and the ops that each one has
    "eager": (*CASES,),
    "compile": (*CASES,),
    "ours": (*CASES,),
    "liger": ("layer_norm", "linear_cross_entropy"),
    **dict.fromkeys(SDPA, ("causal_attention",)),
    "linear-ce": ("linear_cross_entropy",),
}
RIVALS = ("eager", "compile")  # the ratios compare with these
# On a CPU F.linear_cross_entropy takes 20 times as long as the rest, so it must be asked for.
CPU_PROVIDERS = (*RIVALS, "ours")
PYTEST = (
    "-q --no-header --disable-warnings -p no:cacheprovider -p no:xdist --benchmark-only "
    "--benchmark-autosave --benchmark-sort=name --benchmark-columns=median,iqr,rounds"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def find_provider(name: str, op: str, device: torch.device) -> Fn:
    """A provider's callable for an op; raises whatever stops it from running here."""
    cuda, plain = device.type == "cuda", baseline.OPS[op]
    if name == "eager":
        return plain
    if name == "compile":
        return torch.compile(plain, fullgraph=True, dynamic=False)
    if name == "ours":
        return getattr(parse_ops("triton" if cuda else "eager"), op)
    if name == "linear-ce":  # from torch 2.13 on
        options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
        return _flat(partial(F.linear_cross_entropy, options=options))  # type: ignore[attr-defined]
    if not cuda:
        raise ValueError(f"{name} needs a GPU")
    if name != "liger":
        return getattr(parse_ops(f"eager,{op}={name}"), op)
    from liger_kernel.transformers import functional

    if op == "linear_cross_entropy":
        return _flat(functional.liger_fused_linear_cross_entropy)
    return lambda x, weight, bias, eps=1e-5: functional.liger_layer_norm(
        x, weight.to(x.dtype), bias.to(x.dtype), eps
    )


def _flat(call: Fn) -> Fn:
    """Give our signature to a loss that does not know of a padded vocabulary."""
    return lambda x, weight, targets, vocab_size: call(
        x.flatten(0, -2), weight[:vocab_size], targets.flatten()
    )


def make_call(fn: Fn, case: Case, mode: str, inputs: Inputs) -> timing.Call:
    """One call of `fn` on these inputs in this mode; "bwd" runs its forward here, once."""
    leaves = [v for v in inputs.values() if isinstance(v, Tensor) and v.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        out = fn(**inputs)
        return out if isinstance(out, tuple) else (out,)

    if mode == "fwd":
        if "bwd" in case.modes:
            return forward  # saves what the backward needs, as in training
        return torch.no_grad()(forward)
    outs = forward()
    douts = [torch.ones_like(y) if y.dim() == 0 else torch.randn_like(y) for y in outs]
    if mode == "both":  # each call makes its own graph, so `outs` can go
        return lambda: torch.autograd.grad(forward(), leaves, douts)
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)


def doubt_of(op: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """Why no speed of ours may be shown; empty if its numerics hold."""
    try:
        ours = find_provider("ours", op, device)
        found = numerics.check_op(ours, op, shape, dtype, device)
    except Exception as error:
        if timing.is_fatal(error):
            raise
        return f"not checked: {timing.reason_of(error)}"
    return "; ".join(str(c) for c in found if not c.holds)


def measure(
    op: str,
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    *,
    providers: Sequence[str],
    rounds: int = 30,
    seconds: float = 4.0,
) -> tuple[dict[str, OpRow], dict[str, timing.Timing]]:
    """Rows and samples by provider of one op in one mode, all providers timed in turns.

    The row of a provider that fails is in doubt and has no samples. Ours is in doubt, too, if its
    numerics fail.

    Raises:
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    import torch._functorch.config as functorch

    functorch.donated_buffer = False  # a compiled backward frees its inputs, and is run again here
    torch.compiler.reset()  # a new shape must not count as a recompile of the last
    case, cuda = CASES[op], device.type == "cuda"
    providers = [name for name in providers if op in PROVIDERS[name]]
    doubt = doubt_of(op, shape, dtype, device) if "ours" in providers else ""
    set_bytes = int(case.bytes(shape, dtype.itemsize, mode))
    contestants: dict[str, list[timing.Call]] = {}
    peaks: dict[str, int] = {}
    needs: dict[str, int] = {}
    failed: dict[str, str] = {}
    stream = timing.capture_stream() if cuda else None
    with torch.cuda.stream(stream):  # type: ignore[arg-type] # None: no stream to enter
        num_sets = timing.num_sets(set_bytes, device)
        sets = [cases.make_inputs(case, shape, dtype, device, seed) for seed in range(num_sets)]
        for name in providers:
            try:
                fn = find_provider(name, op, device)
                calls = [make_call(fn, case, mode, inputs) for inputs in sets]
                peaks[name], results = _peak_bytes(calls[0], device)
                needs[name] = peaks[name] + (num_sets - 1) * results
                contestants[name] = calls
            except Exception as error:  # out of memory, a backend that refuses the shape, ...
                timing.note_failure(failed, name, error)
            if name in failed:
                fn = calls = None  # free what it made before it failed
                _free(device)
    how: Any = {"needs": needs, "failed": failed, "rounds": rounds, "seconds": seconds}
    timed = timing.time_calls(contestants, device, set_bytes, **how)
    floor = case.floor_ms(shape, dtype.itemsize, mode, record.limits(device))
    flops, state = case.flops(shape, mode), record.gpu_state() if cuda else {}
    kind = next(name for name in DTYPES if DTYPES[name] == dtype)
    rows: dict[str, OpRow] = {}
    for name in providers:
        why = failed.get(name, "")
        if name == "ours":  # wrong numbers come first, then why it has no time
            why = "; not timed: ".join(filter(None, [doubt, why]))
        row = OpRow(op=op, shape=shape.label, dtype=kind, mode=mode, provider=name, doubt=why)
        if found := timed.get(name):
            ms, others = found.median_ms, [n for n in RIVALS if n in timed and n != name]
            over = {other: timing.ratio(timed[other], found) for other in others}
            rates: Any = {"gbs": set_bytes / ms / 1e6, "of_limit": floor / ms}
            rates |= {"tflops": flops / ms / 1e9} if flops else {}
            row = replace(row, timed=found.mode, over=over, gpu=state, **rates, **found.figures)
            if cuda:
                row = replace(row, peak_gib=peaks[name] / 2**30)
                if op == "causal_attention" and name in RIVALS:
                    row = replace(row, backend=baseline.chosen_sdpa(sets[0]["qkv"], shape.H))
        rows[name] = row
    del contestants, sets
    _free(device)
    return rows, timed


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak_bytes(call: timing.Call, device: torch.device) -> tuple[int, int]:
    """Bytes that a call takes at most above its inputs, and bytes of its results. Also warms up."""
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


class Job:
    """What a command line asks for; pytest runs it, with this object as a plugin.

    Raises:
        ValueError: a shape whose tensors cannot fit. On a GPU only the op's arguments and results
            count, because a provider that runs out of memory there gets a row that says so.
    """

    def __init__(
        self, argv: Sequence[str] | None, module: str = "bench.ops", doc: str | None = None
    ):
        parser = cli.Parser(module, doc)
        add = parser.add_argument
        add("--op", action="append", choices=[*CASES], default=[], help="repeat for several")
        add("--shape", action="append", type=cli.shape, default=[], help="such as b64t1024")
        add("--mode", action="append", choices=MODES, help="default: all")
        add("--provider", action="append", choices=[*PROVIDERS], help="default: all")
        add("--dtype", choices=[*DTYPES], help="default: bf16 on a GPU, fp32 on a CPU")
        add("--seconds", type=cli.amount, default=3.0, help="time budget per op and mode")
        add("--minutes", type=cli.amount, default=10.0, help="start nothing after this")
        cli.add_output(parser)
        self.options, self.flags = parser.parse_known_args(argv)
        if unknown := [part for part in self.flags if not part.startswith("--benchmark-")]:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        options, device = self.options, torch.device(cli.devices()[-1])
        self.device, cuda = device, device.type == "cuda"
        self.dtype = DTYPES[options.dtype or ("bf16" if cuda else "fp32")]
        usual = PROVIDERS if cuda else CPU_PROVIDERS
        self.providers = [*dict.fromkeys(options.provider or usual)]
        self.todo: list[tuple[str, Shape, str]] = []
        room = torch.cuda.mem_get_info(device)[0] if cuda else free_bytes()
        shapes = options.shape or (cases.GPU_SHAPES if cuda else cases.CPU_SHAPES)
        for op in dict.fromkeys(options.op or CASES):
            for shape in dict.fromkeys(shapes):
                need = CASES[op].bytes(shape, self.dtype.itemsize, "both")
                if op == "linear_cross_entropy" and not cuda:  # M x Vp logits in fp32, four times
                    need += 16 * shape.M * shape.Vp
                cases.check_room(f"{op} at {shape.label}", need, room)
                modes = [mode for mode in CASES[op].modes if mode in (options.mode or MODES)]
                self.todo += [(op, shape, mode) for mode in modes]

    def run(self, results: record.Result) -> int:
        """Measure, write each row at once, print the tables; returns the exit code."""
        self.results, self.rows = results, dict[tuple[str, str], list[OpRow]]()
        self.until = time.monotonic() + 60 * self.options.minutes
        self.measured = cache(self._measure)
        quiet = [] if self.flags else ["--benchmark-quiet"]  # the tables below say more
        storage = f"--benchmark-storage=file://{record.ROOT}/.benchmarks"
        argv = [str(record.ROOT / "bench/ops.py"), "-o", "addopts=", storage, *PYTEST.split()]
        code = pytest.main([*argv, *quiet, *self.flags], plugins=[self])
        for (label, mode), rows in self.rows.items():
            print(f"\n{label}, {rows[0].dtype}, {mode}\n\n{ops_table(rows)}")
        return {4: 2, 5: 0}.get(code, int(code))  # "wrong usage" and "nothing was selected"

    def _measure(self, op: str, shape: Shape, mode: str) -> Any:
        if time.monotonic() > self.until:
            return None
        how = {"providers": self.providers, "seconds": self.options.seconds}
        rows, timed = measure(op, shape, self.dtype, mode, self.device, **how)
        self.rows.setdefault((shape.label, mode), []).extend(rows.values())
        self.results.about["limits"] = record.limits(self.device)
        self.results.add("ops", *rows.values())
        return rows, timed

    def pytest_generate_tests(self, metafunc: Any) -> None:
        dtype, calls, ids = self.options.dtype or "", [], []
        for op, shape, mode in self.todo:
            for name in self.providers:
                if op in PROVIDERS[name]:
                    calls.append((partial(self.measured, op, shape, mode), name))
                    ids.append(f"{op}-{mode}-{shape.label.replace(' ', '')}{dtype}-{name}")
        metafunc.parametrize(("measured", "provider"), calls, ids=ids)

    def pytest_benchmark_generate_machine_info(self) -> dict[str, Any]:
        """What must be equal for pytest-benchmark to compare two runs. The host is not in it."""
        return {name: self.results.about[name] for name in ("device", "torch", "triton", "python")}


class Clock:
    """The time that pytest-benchmark reads, in seconds. Each replayed sample adds to it."""

    now = 0.0


@pytest.mark.benchmark(timer=lambda: Clock.now)
def test_op(benchmark: Any, measured: Callable[[], Any], provider: str) -> None:
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
    job = Job(argv, doc=__doc__)
    results = record.open_result(job.device, job.options.out, job.options.commit)
    code = job.run(results)
    print(f"\nwrote {os.path.relpath(results.path)}" if job.rows else "nothing was measured")
    return code


if __name__ == "__main__":
    cli.run(main)
