"""Each op alone: ours beside plain PyTorch, torch.compile, Liger-Kernel and the SDPA backends.

    python -m bench.ops                       # every op on this machine's shapes
    python -m bench.ops --op layer_norm --shape b8t1024 --provider eager --provider ours
    python -m bench.ops --sweep               # many sizes, for the plots
    python -m bench.ops --benchmark-compare   # beside the run before this one

It runs under pytest-benchmark (`bench/test_ops.py`), whose JSON is the result file and whose other
options can be given too. All providers of an op are sampled in turn by the bench's own timer. The
op's numerics are compared with float64 first; where they fail, the row is in doubt and no speed is
printed. Percent of limit is the time the copy and matmul rates of the same run allow (bytes and
flops of `bench.cases`) over the measured time.
"""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import baseline, cli, record, timing
from bench.cases import (
    CASES,
    CPU_SHAPES,
    GPU_SHAPES,
    MODES,
    Case,
    Inputs,
    Shape,
    check_room,
    find_case,
    floor_ms,
    make_inputs,
)  # fmt: skip
from bench.rows import OpRow
from bench.tables import ops_table
from kernels import parse_ops
from tests import numerics
from training.machines import free_bytes

Fn = Callable[..., Any]

# Who does which ops.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "eager": (*CASES,),
    "compile": (*CASES,),
    "ours": (*CASES,),
    "liger": ("layer_norm", "linear_cross_entropy"),
    "sdpa-flash": ("causal_attention",),
    "sdpa-cudnn": ("causal_attention",),
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
    if op == "layer_norm":
        return lambda x, weight, bias, eps=1e-5: functional.liger_layer_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), eps
        )

    def loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        call: Any = functional.liger_fused_linear_cross_entropy
        return call(x.flatten(0, -2), weight[:vocab_size], targets.flatten())

    return loss


def _linear_ce() -> Fn:
    call: Any = getattr(F, "linear_cross_entropy", None)
    if call is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")

    def loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
        return call(x.flatten(0, -2), weight[:vocab_size], targets.flatten(), options=options)

    return loss


def find_provider(name: str, op: str, device: torch.device) -> Fn:
    """The callable of a provider that does this op.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        Unavailable: it cannot run here.
    """
    if name not in PROVIDERS:
        raise ValueError(f"bench: unknown provider {name!r}; known: {', '.join(PROVIDERS)}")
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
    backend = SDPBackend.FLASH_ATTENTION if name == "sdpa-flash" else SDPBackend.CUDNN_ATTENTION
    return partial(plain, backend=backend)


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
    providers: Sequence[str] = (*PROVIDERS,),
    rounds: int = 30,
    seconds: float = 4.0,
    checked: bool = True,
    sweep: bool = False,
) -> tuple[dict[str, OpRow], dict[str, timing.Timing]]:
    """Time one op in one mode, all providers that do it in turn.

    Returns:
        Rows and samples by provider. A provider that cannot run or fails has a row in doubt and no
        samples; ours, where its numerics fail, a row in doubt.

    Raises:
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    case = find_case(op)
    providers = [name for name in providers if op in PROVIDERS.get(name, (op,))]
    _allow_retained_backward()
    torch.compiler.reset()  # or a second shape meets the first one's graph and its recompile limit
    doubt = doubt_of(op, shape, dtype, device) if checked and "ours" in providers else ""

    set_bytes = int(case.bytes(shape, dtype.itemsize, mode))
    contestants: dict[str, list[timing.Call]] = {}
    peaks: dict[str, int] = {}
    needs: dict[str, int] = {}
    failed: dict[str, str] = {}
    stream = timing.capture_stream() if device.type == "cuda" else None
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
    limits = timing.limits(device)
    floor = floor_ms(case, shape, dtype, mode, limits)
    flops = case.flops(shape, dtype.itemsize, mode)
    cuda = device.type == "cuda"
    state = timing.gpu_state() if cuda else {}
    dtype_name = next(name for name, known in DTYPES.items() if known == dtype)
    rows: dict[str, OpRow] = {}
    for name in providers:
        values: dict[str, Any] = {"doubt": failed.get(name, "")}
        if name == "ours" and checked:
            values["checked"] = numerics.check_shape(op, shape, device).label
            # Its numerics matter more than why it has no time.
            values["doubt"] = "; not timed: ".join(filter(None, [doubt, values["doubt"]]))
        if found := timed.get(name):
            trusted = (o for o in ("eager", "compile") if o in timed and o != name)
            values |= found.figures | {
                "timed": found.mode, "gpu": state,
                "gbs": set_bytes / found.median_ms / 1e6,
                "tflops": flops / found.median_ms / 1e9 if flops else None,
                "of_limit": floor / found.median_ms,
                "over": {other: timing.ratio(timed[other], found) for other in trusted},
                "peak_gib": peaks[name] / 2**30 if cuda else None,
            }  # fmt: skip
            if cuda and op == "causal_attention" and name in ("eager", "compile"):
                values["backend"] = baseline.chosen_sdpa(sets[0]["qkv"], shape.H)
        rows[name] = OpRow(
            op=op, shape=shape.label, dtype=dtype_name, mode=mode, provider=name, sweep=sweep,
            **values,
        )  # fmt: skip
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


def add_arguments(group: Any) -> None:
    """The options of `bench/test_ops.py`, for pytest's parser and for argparse's."""
    add = getattr(group, "addoption", None) or group.add_argument
    add("--op", action="append", choices=[*CASES], default=[], help="repeat for several")
    add("--shape", action="append", type=cli.shape, default=[], help="b<B>t<T>")
    add("--mode", action="append", choices=MODES, default=[], help="default: all")
    add("--provider", action="append", choices=[*PROVIDERS], default=[], help="default: all")
    add("--dtype", choices=[*DTYPES], help="default: bf16 on a GPU, fp32 on a CPU")
    add("--sweep", action="store_true", help="the sizes of each op's plot")
    add("--seconds", type=cli.amount, default=4.0, help="budget of one op and mode")
    add("--minutes", type=cli.amount, default=10.0, help="nothing begins after these")
    add("--commit", help="what is measured, where git is not at hand")
    add("--out", type=cli.path, default=record.RESULTS, help="result file or folder")


def plan_measurements(options: Any, device: torch.device) -> list[tuple[str, Shape, str]]:
    """(op, shape, mode) to measure for the options of `add_arguments`.

    Raises:
        ValueError: a shape whose tensors cannot fit; on a GPU, where each provider says itself
            that it lacks room, those of the op's interface alone.
    """
    todo = []
    cuda, itemsize = device.type == "cuda", dtype_of(options, device).itemsize
    room = torch.cuda.mem_get_info(device)[0] if cuda else free_bytes()
    for case in (CASES[op] for op in options.op or CASES):
        usual = GPU_SHAPES if cuda else CPU_SHAPES
        for shape in case.sweep if options.sweep else options.shape or usual:
            need = case.bytes(shape, itemsize, "both")
            need += 0 if cuda else 16 * shape.M * case.logits(shape)
            check_room(f"{case.op} at {shape.label}", 0 if options.sweep else need, room)
            modes = options.mode or (("both",) if options.sweep else case.modes)
            todo += [(case.op, shape, mode) for mode in case.modes if mode in modes]
    return todo


def providers_of(options: Any, device: torch.device) -> Sequence[str]:
    if options.provider or device.type == "cpu":
        return options.provider or CPU_PROVIDERS
    # Compiling plain PyTorch anew for each size would take most of the time.
    return [name for name in PROVIDERS if not (options.sweep and name == "compile")]


def dtype_of(options: Any, device: torch.device) -> torch.dtype:
    return DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]


def run(argv: Sequence[str], results: record.Results) -> int:
    """Measure in a process of its own, take the rows over, print the tables; the exit code.

    Args:
        argv: Options of `add_arguments`, checked before, and of pytest-benchmark. It keeps each
            run under .benchmarks/, for its `--benchmark-compare`.
    """
    flags = [
        "-q",
        "--no-header",
        "--disable-warnings",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    flags += ["--benchmark-only", "--benchmark-autosave", "--benchmark-sort=name"]
    flags += ["--benchmark-columns=median,iqr,rounds", f"--command={results.about['command']}"]
    if not any(part.startswith("--benchmark-") for part in argv):
        flags.append("--benchmark-quiet")  # the tables below say more
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ops.json"
        command = [sys.executable, "-m", "pytest", "bench/test_ops.py", *flags, *argv]
        command += [f"--benchmark-json={path}", f"--commit={results.about['commit']}"]
        code = subprocess.run(command, cwd=record.ROOT, env=env, check=False).returncode
        found = record.load(path) if path.exists() else record.Result(results.about)
    if found.sections:
        results.absorb(found)
    rows = found.rows("ops")
    for shape in dict.fromkeys(row.shape for row in rows):
        these = [row for row in rows if row.shape == shape]
        print(f"\n{shape}, {these[0].dtype}\n\n{ops_table(these)}")
    return {4: 2, 5: 0}.get(code, code)  # pytest's "wrong usage" and "nothing was selected"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.ops", __doc__)
    add_arguments(parser)
    given = [*(sys.argv[1:] if argv is None else argv)]
    options, rest = parser.parse_known_args(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cli.refuse(parser, [part for part in rest if not part.startswith("--benchmark-")])
    plan_measurements(options, device)  # refuses what cannot be measured
    results = record.Results(device, options.out, options.commit)
    code = run(given, results)
    print(f"\nwrote {os.path.relpath(results.path)}")
    return code


if __name__ == "__main__":
    cli.run(main)
