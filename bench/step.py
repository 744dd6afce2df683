"""One whole training step: forward, backward, clip, AdamW; ours against plain PyTorch.

    python -m bench.step                              # the table for this machine
    python -m bench.step --shape b64t1024 --shape b8t1024 --ablation
    python -m bench.step --against nanogpt ~/nanoGPT/model.py

A contestant whose losses or first gradient norm differ from the first one's is in doubt. On a GPU
contestants run one after the other. On a CPU each has its own process, because ours changes how its
process allocates memory, and takes turns with the first contestant. If memory has no room for two,
the first runs again before each of the others.
"""

import gc
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import cli, contestants, record
from bench.cases import CPU_SHAPES, GPU_SHAPES
from bench.contestants import Setup, TakeStep
from bench.record import StepRow
from bench.tables import step_table
from model import MODELS
from model.flops import flops_per_token
from training import machines, timing
from training.child import Child, ChildDied, serve
from training.plan import detect, make_plan
from training.recipes import Recipe
from training.step import start_process

# The loss is about 10.9 at the start. bf16 moves it by 1e-3, the padded softmax by 1e-3, and three
# AdamW steps at the full rate multiply such differences.
FIRST_LOSS_TOLERANCE = 0.01
WARM_LOSS_TOLERANCE = 0.1
# Relative. At the start any weights give a loss of ln(V), so the loss alone would pass a wrong
# backward.
GRAD_NORM_TOLERANCE = 0.05
# Ratios are to these and to nanoGPT; in an ablation to "ours bf16".
RIVALS = ("eager fp32", "compile fp32", "compile bf16", "ours bf16")
ROOM = 1.15  # times the largest contestant so far: what the next one may need
NO_REFERENCE = "nothing to compare it with: the first contestant failed"


def disagreement(found: StepRow, known: StepRow | None) -> str:
    """How a contestant's losses or gradient differ from the first one's; empty if they agree."""
    if known is None:
        return NO_REFERENCE
    norm, norm_known = found.grad_norm or 0.0, known.grad_norm or 0.0
    for what, ours, theirs, tolerance in (
        ("first loss", found.losses[0], known.losses[0], FIRST_LOSS_TOLERANCE),
        ("warm loss", found.losses[-1], known.losses[-1], WARM_LOSS_TOLERANCE),
        ("gradient norm", norm, norm_known, GRAD_NORM_TOLERANCE * norm_known),
    ):
        if not abs(ours - theirs) <= tolerance:  # NaN too
            return f"{what} {ours:.4f}, reference {theirs:.4f}, tolerance {tolerance:.2g}"
    return ""


def timed_row(
    row: StepRow, setup: Setup, timed: timing.Timing, known: StepRow | None, card: str = ""
) -> StepRow:
    """The row of a warm-up with its time, in doubt where it disagrees with the first's warm-up."""
    per_s, sheet = setup.tokens / timed.median_ms * 1e3 / 1e12, machines.find_card(card)
    palm, llmc = (flops_per_token(setup.config, setup.shape.T, f) for f in ("palm", "llmc"))
    rates = {"tflops_palm": palm * per_s, "tflops_llmc": llmc * per_s}
    peak = sheet and sheet.tflops
    return replace(row, doubt=disagreement(row, known), peak_tflops=peak, **rates, **timed.figures)


def with_ratios(rows: Mapping[str, StepRow]) -> list[StepRow]:
    """The rows, each with its ratio to every rival that has a time.

    Where both took turns with one contestant, their ratios to it count, else their medians.
    """
    timed = [row for row in rows.values() if not row.doubt]
    rivals = [r for r in timed if r.provider in RIVALS or r.provider.startswith("nanogpt")]

    def ratio(row: StepRow, rival: StepRow) -> float:
        for common in row.over.keys() & rival.over.keys():
            return row.over[common] / rival.over[common]
        return rival.ms / row.ms

    return [
        replace(row, over={} if row.doubt else {r.provider: ratio(row, r) for r in rivals})
        for row in rows.values()
    ]


def free_device(device: torch.device) -> None:
    """Free what a contestant took, compiled code too. Its graph must not be referenced any more."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each stream, and every TrainStep has a stream of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def measure_cuda(
    names: Sequence[str], setup: Setup, device: torch.device, seconds: float
) -> Iterator[StepRow]:
    """A row for each contestant, which has the card to itself.

    Raises:
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    failed: dict[str, str] = {}
    known: StepRow | None = None
    torch.set_float32_matmul_precision("high")
    for name in names:
        torch.cuda.reset_peak_memory_stats(device)
        take_step = None
        try:
            take_step, warm = contestants.prepare(name, setup, device)
            timed = _event_times(take_step, seconds)
        except Exception as error:
            timing.note_failure(failed, name, error)
            row = setup.row(name, doubt=failed[name])
        else:
            known = warm if name == names[0] else known
            row = timed_row(warm, setup, timed, known, torch.cuda.get_device_name(device))
            peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
            row = replace(row, peak_gib=peak_gib, gpu=record.gpu_state())
        del take_step
        free_device(device)
        yield row


def _event_times(take_step: TakeStep, seconds: float) -> timing.Timing:
    """Times from step end to step end; as in training, the host does not wait in between."""
    take_step()  # ours captures its graph in the fourth step
    torch.cuda.synchronize()
    probe_ms = timing.host_replay(lambda: take_step().item()).once()
    steps = int(min(200, max(8, seconds * 1e3 / probe_ms)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        take_step()
        mark.record()
    torch.cuda.synchronize()
    samples = tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return timing.Timing(samples, "launches")


def work() -> None:
    """The process of one contestant. It answers the first task, name and setup, with the row of the
    warm-up, and every further one with the ms of a step."""
    replay: timing.Replay | None = None

    def answer(task: Any) -> StepRow | float:
        nonlocal replay
        if replay:
            return replay.once()
        name, setup = task
        if name.startswith("ours"):
            start_process(make_plan(Recipe(model=setup.model), detect("cpu")), seed=0)
        take_step, row = contestants.prepare(name, setup, torch.device("cpu"))
        replay = timing.host_replay(take_step)
        return row

    serve(answer)


def start_worker(name: str, setup: Setup, limit_s: float) -> tuple[Child, StepRow]:
    """That process and the row of its warm-up; ChildDied if there is none within `limit_s`."""
    worker = Child([sys.executable, "-c", "from bench import step; step.work()"])
    return worker, worker.ask((name, setup), limit_s)


def measure_cpu(
    names: Sequence[str], setup: Setup, seconds: float, deadline: float
) -> Iterator[StepRow]:
    """A row for each contestant, as it comes, after `seconds` of turns.

    A contestant that gets no time before the deadline, of time.monotonic(), has a row that says so.
    """
    first, *others = names
    alive: dict[str, Child] = {}
    warm: dict[str, StepRow] = {}
    failed: dict[str, str] = {}

    def lacks() -> str:
        """Why memory has no room for another contestant; empty if it has."""
        largest = max((row.peak_gib or 0.0 for row in warm.values()), default=0.0)
        need, free = ROOM * largest or setup.need_bytes / 2**30, machines.free_bytes() / 2**30
        text = f"needs about {need:.1f} GiB of memory, {free:.1f} are free"
        return text if 0 < free < need else ""

    def sample(*group: str) -> dict[str, timing.Timing]:
        """Times of these contestants, in turns. All others are ended first."""
        for name in alive.keys() - {*group}:
            alive.pop(name).end()
        for name in group:
            if name in alive:
                continue
            left = deadline - time.monotonic()
            failed[name] = "no time left; --minutes gives more" if left <= 0 else lacks()
            if failed[name]:
                continue
            try:
                # A hang must not cost the rest.
                alive[name], warm[name] = start_worker(name, setup, left / 2)
            except ChildDied as why:
                failed[name] = str(why)
        print(f"in turns: {', '.join(alive) or 'nobody'}", flush=True)
        limit_s = max(60.0, deadline - time.monotonic())
        replays = {
            name: timing.Replay(lambda worker=worker: worker.ask("step", limit_s), "host")
            for name, worker in alive.items()
        }
        budget: Any = {"seconds": seconds, "until": deadline, "failed": failed}
        return timing.interleave(replays, rounds=20, warmup=0, min_rounds=3, **budget)

    def row_of(name: str, timed: Mapping[str, timing.Timing]) -> StepRow:
        if name not in timed:
            return setup.row(name, doubt=failed[name])
        row = timed_row(warm[name], setup, timed[name], warm.get(first))
        over = {other: timing.ratio(timed[other], timed[name]) for other in timed}
        return replace(row, over=over)

    try:
        yield row_of(first, sample(first))
        together = True
        for name in others:
            if first not in warm:
                yield setup.row(name, doubt=NO_REFERENCE)
                continue
            together = together and not lacks()
            timed = sample(first, name) if together else sample(first) | sample(name)
            if name in alive:
                alive.pop(name).end()
            yield row_of(name, timed)
    finally:
        for worker in alive.values():
            worker.end()


def run(
    names: Sequence[str],
    setup: Setup,
    device: torch.device,
    results: record.Result,
    *,
    seconds: float,
    minutes: float,
    section: str = "step",
) -> None:
    """Measure, write each row as it comes and all ratios at the end, print the table."""
    rows: dict[str, StepRow] = {}
    print(f"\nTraining step, GPT-2 {setup.model}, {setup.shape.label}, accum {setup.accum}")
    if device.type == "cuda":
        measured = measure_cuda(names, setup, device, seconds)
    else:
        if not detect("cpu").has_bf16:
            print("bf16 left out: this CPU multiplies faster in fp32")
        measured = measure_cpu(names, setup, seconds, time.monotonic() + 60 * minutes)
    for row in measured:
        results.add(section, row)
        rows[row.provider] = row
    found = with_ratios(rows)
    results.add(section, *found)
    print(step_table(found), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.step", __doc__)
    add = parser.add_argument
    add("--device", default=cli.devices()[-1], choices=cli.devices())
    add("--model", default="124m", choices=[*MODELS])
    shape_help = "repeat for several; default b64t1024 on a GPU, b4t64 on a CPU"
    add("--shape", action="append", type=cli.shape, help=shape_help)
    add("--accum", type=cli.count, default=1, help="micro-batches per step")
    add("--provider", action="append", help="a contestant, as in 'ours bf16'; repeat for several")
    add("--seconds", type=cli.amount, default=10.0, help="budget per contestant")
    add("--minutes", type=cli.amount, default=30.0, help="budget of a table on a CPU")
    add("--ablation", action="store_true", help="also ours without one op or choice at a time")
    add("--against", nargs=2, metavar=("nanogpt", "PATH"), help="also nanoGPT, from its model.py")
    cli.add_output(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shapes = args.shape or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)[:1]
    kind, path = args.against or ("nanogpt", "")
    if kind != "nanogpt":
        raise ValueError(f"bench: --against knows nanogpt, got {kind!r}")
    nanogpt = None
    if args.against:
        contestants.load_nanogpt(Path(path))  # fail before minutes of measuring
        nanogpt = Path(path).resolve()
    setups = [Setup(args.model, shape, args.accum, nanogpt) for shape in dict.fromkeys(shapes)]
    if args.ablation and device.type != "cuda":
        raise ValueError("bench: --ablation switches Triton ops off one by one; it needs a GPU")
    names = args.provider or contestants.default_providers(device, nanogpt is not None)
    for name in names:
        contestants.find_provider(name, device, setups[0])  # refuses an unknown one
    for setup in setups:
        setup.check_memory(device)
    results = record.open_result(device, args.out, args.commit)
    budget = {"seconds": args.seconds, "minutes": args.minutes}
    for setup in setups:
        run(names, setup, device, results, **budget)
    if args.ablation:
        known = contestants.known_providers(device)
        ours = [name for name in known if name.startswith("ours bf16")]
        run(ours, setups[0], device, results, section="ablation", **budget)
    print(f"wrote {os.path.relpath(results.path)}")


if __name__ == "__main__":
    cli.run(main)
