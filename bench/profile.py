"""Where the time of a training step goes: `make profile`, or `python -m bench.profile`.

Writes a Chrome trace (chrome://tracing or ui.perfetto.dev) and prints a table by kind of work. On
CUDA the times are those of kernels, and "idle" is the time in which none ran. On the CPU they are
the operators' own times, and "python" is the rest. The longest names of a kind show what did the
work, such as the SDPA backend that a baseline used.
"""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import cli, contestants, record, step
from bench.cases import Shape
from bench.contestants import Setup
from bench.record import ProfileRow
from bench.tables import rows_table
from model import MODELS

# First match wins; names of kernels (CUDA) and operators (CPU).
KINDS = {
    "attention": r"attention|flash|fmha|sdpa|_dq_kernel|_dkdv_kernel",
    "loss": r"cross_entropy|log_softmax|nll_loss|logsumexp|scatter_add",
    "norm": r"layer_norm|LayerNorm|GammaBeta",
    "optimizer": r"adam|multi_tensor|lpnorm|linalg_vector_norm|_foreach|clip",
    "GEMM": r"gemm|nvjet|cutlass|xmma|cublas|addmm|::mm|::bmm|linear|gelu_mlp|mkl|dnnl",
    "embedding": r"embedding|index_put|indexing",
    "copies": r"[Mm]emcpy|[Mm]emset|copy|::cat|fill|zero",
    "elementwise": r"elementwise|triton_|gelu|::add|::mul|::div|cpp_fused|fused|tanh",
    "other": "",
}
NUM_NAMES = 4  # kept of a kind
MAX_NAME = 120

Times = Sequence[tuple[str, float, int]]  # name, total ms, calls; longest first


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def by_kind(times: Times, span_ms: float, rest: str, **whose: Any) -> list[ProfileRow]:
    """A row for each kind, longest first, the rest of the span last.

    Args:
        whose: Model, shape and provider of the rows.
    """
    rows = []
    for kind in KINDS:
        items = [item for item in times if kind_of(item[0]) == kind]
        if items:
            names, ms, calls = zip(*items, strict=True)
            shares = {"ms": sum(ms), "share": sum(ms) / span_ms, "calls": sum(calls)}
            names = [name[:MAX_NAME] for name in names[:NUM_NAMES]]
            rows.append(ProfileRow(kind=kind, names=names, **shares, **whose))
    left = max(0.0, span_ms - sum(row.ms for row in rows))
    last = ProfileRow(kind=rest, ms=left, share=left / span_ms, **whose)
    return [*sorted(rows, key=lambda row: -row.ms), last]


def trace_step(
    name: str, setup: Setup, device: torch.device, steps: int, trace: Path
) -> list[ProfileRow]:
    """Profile some steps after the warm-up; rows of one step, as `by_kind` makes them."""
    cuda, synchronize = device.type == "cuda", torch.get_device_module(device).synchronize
    take_step, _ = contestants.prepare(name, setup, device)
    take_step()  # ours captures its graph in the fourth step
    synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            take_step()
        synchronize()
        span_ms = (time.perf_counter() - start) * 1e3 / steps
    del take_step
    step.free_device(device)
    profiler.export_chrome_trace(str(trace))
    times: list[tuple[str, float, int]] = []
    for event in profiler.key_averages():
        # Such as "Optimizer.step#AdamW.step": a span over kernels, which have events of their own.
        if event.is_user_annotation or event.key.startswith("## Call CompiledFxGraph"):
            continue
        if not cuda or event.device_type == DeviceType.CUDA:
            us = event.self_device_time_total if cuda else event.self_cpu_time_total
            times.append((event.key, us / 1e3 / steps, event.count // steps))
    times.sort(key=lambda item: -item[1])
    whose = {"model": setup.model, "shape": setup.shape.label, "provider": name}
    return by_kind(times, span_ms, "idle" if cuda else "python", **whose)


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = cli.Parser("bench.profile", __doc__)
    add = parser.add_argument
    add("--provider", default="ours bf16" if cuda else "ours fp32")
    add("--model", default="124m" if cuda else "mini", choices=[*MODELS])
    add("--shape", type=cli.shape, default=Shape(64, 1024) if cuda else Shape(4, 64))
    add("--steps", type=cli.count, default=3)
    add("--trace", type=cli.path, default=Path("runs/profile/trace.json"))
    cli.add_output(parser, None)
    args = parser.parse_args(argv)
    device = torch.device(cli.devices()[-1])
    setup = Setup(args.model, args.shape)
    setup.check_memory(device)
    contestants.find_provider(args.provider, device, setup)  # refuses an unknown one
    if args.trace.is_dir():
        raise ValueError(f"bench: --trace must name a file, got the folder {args.trace}")
    args.trace.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after profiling
    results = record.open_result(device, args.out, args.commit) if args.out else None
    if cuda:
        torch.set_float32_matmul_precision("high")
    rows = trace_step(args.provider, setup, device, args.steps, args.trace)
    print(f"{args.provider}, GPT-2 {args.model}, {setup.shape.label}, {device.type}\n")
    columns = {
        "ms per step": lambda row: f"{row.ms:,.3f}",
        "share": lambda row: f"{row.share:.1%}",
        "calls per step": lambda row: f"{row.calls:,}",
        "longest": lambda row: row.names[0][:60] if row.names else "",
    }
    print(rows_table(rows, {"kind": lambda row: row.kind}, columns))
    if results:
        results.add("profile", *rows)
    print(f"\nwrote {os.path.relpath(args.trace)} (open in ui.perfetto.dev)")


if __name__ == "__main__":
    cli.run(main)
