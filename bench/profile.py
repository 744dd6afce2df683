"""Where the time of a training step goes: `make profile`, or `python -m bench.profile`.

Writes a Chrome trace (chrome://tracing or ui.perfetto.dev) and prints a table by kind. On CUDA the
times are kernels', and idle is the part of the span in which none ran; on the CPU they are the
operators' own times, and "python" is the rest. The names of a kind say who did the work, those of
attention which SDPA backend a baseline took.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench import record, step
from bench.cases import find_shape
from bench.report import table
from model import MODELS

# First match wins; names of kernels (CUDA) and operators (CPU).
KINDS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|flash|fmha|sdpa|_dq_kernel|_dkdv_kernel"),
    ("loss", r"cross_entropy|log_softmax|nll_loss|logsumexp|scatter_add"),
    ("norm", r"layer_norm|LayerNorm|GammaBeta"),
    ("optimizer", r"adam|multi_tensor|lpnorm|linalg_vector_norm|_foreach|clip"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|addmm|::mm|::bmm|linear|gelu_mlp|mkl|dnnl"),
    ("embedding", r"embedding|index_put|indexing"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy|::cat|fill|zero"),
    ("elementwise", r"elementwise|triton_|gelu|::add|::mul|::div|cpp_fused|fused|tanh"),
)
OTHER = "other"
NUM_NAMES = 4  # kept of a kind
MAX_NAME = 120


class KindRow(NamedTuple):
    """What one kind of work took.

    Args:
        kind: Of KINDS, OTHER, or what the rest of the span is called.
        ms: Of a step.
        share: Of the span, in [0, 1].
        calls: Of a step.
        names: The longest first, NUM_NAMES at most.
    """

    kind: str
    ms: float
    share: float
    calls: int
    names: tuple[str, ...] = ()


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), OTHER)


def by_kind(times_us: Sequence[tuple[str, float, int]], span_us: float, rest: str) -> list[KindRow]:
    """Rows of (name, total us, calls), longest first, the rest last."""
    kinds: dict[str, list[tuple[str, float, int]]] = {}
    for item in sorted(times_us, key=lambda item: -item[1]):
        kinds.setdefault(kind_of(item[0]), []).append(item)
    total = {kind: sum(us for _, us, _ in items) for kind, items in kinds.items()}
    rows = [
        KindRow(
            kind, total[kind] / 1e3, total[kind] / span_us, sum(count for _, _, count in items),
            tuple(name[:MAX_NAME] for name, _, _ in items[:NUM_NAMES]),
        )
        for kind, items in kinds.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: -row.ms)
    left = max(0.0, span_us - sum(total.values()))
    return [*rows, KindRow(rest, left / 1e3, left / span_us, 0)]


def trace_step(
    name: str, setup: step.Setup, device: torch.device, steps: int, trace: Path
) -> tuple[list[KindRow], list[tuple[str, float, int]]]:
    """Profile some steps after the warm-up.

    Returns:
        Rows of `by_kind` per step, and the ten longest names with ms and calls per step.
    """
    known = step.known_providers(device)
    if name not in known:
        raise ValueError(f"bench: unknown provider {name!r}; known: {', '.join(known)}")
    cuda = device.type == "cuda"
    step.free_device(device)
    batches = step.make_batches(setup, device)
    contestant = step.prepare(known[name], setup, device, batches).contestant
    assert contestant is not None
    contestant.step(batches[0])  # ours captures its graph in the fourth step
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for i in range(steps):
            contestant.step(batches[i % len(batches)])
        if cuda:
            torch.cuda.synchronize()
        span_us = (time.perf_counter() - start) * 1e6
    del contestant
    step.free_device(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    times: list[tuple[str, float, int]] = []
    for event in profiler.key_averages():
        # Such as "Optimizer.step#AdamW.step": a span over kernels, which have events of their own.
        if event.is_user_annotation or event.key.startswith("## Call CompiledFxGraph"):
            continue
        if cuda and event.device_type == DeviceType.CUDA:
            times.append((event.key, event.self_device_time_total / steps, event.count // steps))
        elif not cuda:
            times.append((event.key, event.self_cpu_time_total / steps, event.count // steps))
    rows = by_kind(times, span_us / steps, "idle" if cuda else "python")
    longest = sorted(times, key=lambda item: -item[1])[:10]
    return rows, [(key, us / 1e3, count) for key, us, count in longest]


def profile_table(rows: Sequence[KindRow]) -> str:
    lines = [[r.kind, f"{r.ms:,.3f}", f"{100 * r.share:.1f}%", f"{r.calls:,}"] for r in rows]
    return table(["kind", "ms a step", "share", "calls a step"], lines)


def save(results: record.Results, name: str, setup: step.Setup, rows: Sequence[KindRow]) -> None:
    identity = {"model": setup.model, "shape": setup.shape.label, "provider": name}
    for row in rows:
        results.add("profile", identity | row._asdict())


def main(argv: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.profile", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--provider", default="ours bf16" if cuda else "ours fp32")
    parser.add_argument("--model", default="124m" if cuda else "mini", choices=MODELS)
    parser.add_argument("--shape", default="b64t1024" if cuda else "b4t64")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trace", type=Path, default=Path("runs/profile/trace.json"))
    parser.add_argument("--out", type=Path, help="also add the table to this result file or folder")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if cuda else "cpu")
    setup = step.Setup(args.model, find_shape(args.shape))
    rows, longest = trace_step(args.provider, setup, device, args.steps, args.trace)
    print(f"{args.provider}, GPT-2 {args.model}, {setup.shape.label}, {device.type}\n")
    print(profile_table(rows))
    print(
        "\n"
        + table(
            ["longest", "ms", "calls"], [[k[:60], f"{ms:,.3f}", str(n)] for k, ms, n in longest]
        )
    )
    for row in rows:
        if row.kind == "attention":  # which backend of SDPA, where it is not ours
            print("\nattention:", *row.names, sep="\n  ")
    if args.out:
        save(record.Results(device, args.out), args.provider, setup, rows)
    print(f"\nwrote {os.path.relpath(args.trace)} (open in ui.perfetto.dev)")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
