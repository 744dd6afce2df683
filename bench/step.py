"""One training step, whole: forward, backward, clip, AdamW; ours beside plain PyTorch.

    python -m bench.step                              # the table for this machine
    python -m bench.step --shape b64t1024 --shape b8t1024 --ablation
    python -m bench.step --against nanogpt ~/nanoGPT/model.py

Every contestant (`bench.contestants`) starts from the same weights and sees the same tokens. Its
loss on the first step and after the warm-up, and its first gradient norm, must agree with the first
contestant's, or its row is in doubt.

On a GPU one follows the other. On a CPU each lives in a process of its own, because ours changes
how its process allocates memory, and they take turns. If memory has no room for all, they come in
groups. The first contestant is in each group, so that the others can be compared through it. Where
not even two fit, each runs alone, and the first runs again before each.
"""

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import cli, contestants, record
from bench.cases import CPU_SHAPES, GPU_SHAPES
from bench.contestants import Build, Setup
from bench.rows import StepRow
from bench.tables import step_table
from model import MODELS
from model.flops import flops_per_token
from training import timing
from training.child import Child, ChildDied, serve
from training.machines import find_card, free_bytes
from training.plan import detect, make_plan
from training.recipes import Recipe
from training.step import start_process

# On the loss, about 10.9 at the start: bf16 moves it by 1e-3, the padded softmax by 1e-3, and three
# AdamW steps at full rate multiply such differences.
FIRST_LOSS_TOLERANCE = 0.01
# Relative, on the first step's gradient norm: at the start any weights give ln(V) as loss, so the
# loss alone would pass a wrong backward.
GRAD_NORM_TOLERANCE = 0.05
WARM_LOSS_TOLERANCE = 0.1
RIVALS = ("eager fp32", "compile fp32", "compile bf16")  # and nanoGPT: ratios are to these
ROOM = 1.15  # of what the largest contestant took so far, for the next one
NO_REFERENCE = "nothing to hold it against: the first contestant failed"


def disagreement(found: StepRow, known: StepRow | None) -> str:
    """Why a contestant's speed must not be shown; empty if losses and gradient are the first's."""
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
    """The row of a warm-up with its time, held against the first contestant's warm-up."""
    per_s = setup.tokens / timed.median_ms * 1e3 / 1e12
    palm, llmc = (flops_per_token(setup.config, setup.shape.T, f) for f in ("palm", "llmc"))
    sheet = find_card(card)
    return replace(
        row, doubt=disagreement(row, known), **timed.figures, tflops_palm=palm * per_s,
        tflops_llmc=llmc * per_s, peak_tflops=sheet and sheet.tflops,
    )  # fmt: skip


def with_ratios(rows: Mapping[str, StepRow]) -> list[StepRow]:
    """The rows, each with its ratio to every rival that has a time.

    Two that took turns have their ratio; two of different groups get it by way of the contestant
    whom both took turns with, and where there is none, it is that of their medians.
    """
    timed = [row for row in rows.values() if not row.doubt]
    rivals = [r for r in timed if r.provider in RIVALS or r.provider.startswith("nanogpt")]

    def ratio(row: StepRow, rival: StepRow) -> float:
        if row is rival:
            return 1.0
        if rival.provider in row.over:
            return row.over[rival.provider]
        if row.provider in rival.over:
            return 1 / rival.over[row.provider]
        for common in row.over.keys() & rival.over.keys():
            return row.over[common] / rival.over[common]
        return rival.ms / row.ms

    return [
        replace(row, over={} if row.doubt else {r.provider: ratio(row, r) for r in rivals})
        for row in rows.values()
    ]


def free_device(device: torch.device) -> None:
    """Give back what a contestant took, compiled code included; nobody may hold its graph."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each stream, and every TrainStep has a stream of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def measure_cuda(
    builds: Mapping[str, Build], setup: Setup, device: torch.device, seconds: float
) -> Iterator[StepRow]:
    """A row for each contestant; ours comes a second time where its compiled twin stood before it.

    The card was colder for the twin than for ours, so the twin is timed again, and the ratio is to
    the mean of both.

    Raises:
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    failed: dict[str, str] = {}
    rows: dict[str, StepRow] = {}
    first: StepRow | None = None
    torch.set_float32_matmul_precision("high")

    def alone(name: str) -> tuple[StepRow, timing.Timing] | None:
        """Warm-up and times of one, which has the card to itself; None if it failed."""
        free_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            batches = contestants.make_batches(setup, device)
            contestant, row = contestants.prepare(name, builds[name], setup, device, batches)
            timed = _event_times(lambda i: contestant.step(batches[i % len(batches)]), seconds)
        except Exception as error:  # its frames hold the contestant; they end here
            timing.note_failure(failed, name, error)
            return None
        return replace(row, peak_gib=torch.cuda.max_memory_allocated(device) / 2**30), timed

    for name in builds:
        found = alone(name)
        if found is None:
            yield setup.row(name, doubt=failed[name])
            continue
        warm, timed = found
        first = warm if name == next(iter(builds)) else first
        row = timed_row(warm, setup, timed, first, torch.cuda.get_device_name(device))
        rows[name] = row = replace(row, gpu=record.gpu_state())
        yield row
        twin = rows.get(name.replace("ours", "compile"), row)
        again = alone(twin.provider) if twin is not row and not (row.doubt or twin.doubt) else None
        if again:
            again_ms = again[1].median_ms
            over = {twin.provider: (twin.ms + again_ms) / 2 / row.ms}
            yield replace(row, rival_again_ms=again_ms, over=over)


def _event_times(step: Callable[[int], Any], seconds: float) -> timing.Timing:
    """Device-event times between step ends, no synchronisation in between, as training runs."""
    step(0)  # ours captures its graph in the fourth step
    torch.cuda.synchronize()
    probe_ms = timing.host_replay(lambda: step(0).item()).once()
    steps = int(min(200, max(8, seconds * 1e3 / probe_ms)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        step(i)
        marks[i + 1].record()
    torch.cuda.synchronize()
    samples = tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return timing.Timing(samples, "launches")


def work(name: str, setup: Setup, nanogpt: Path | None) -> None:
    """A process of one contestant: says its warm-up, then the ms of a step for each time asked."""
    if name.startswith("ours"):
        start_process(make_plan(Recipe(model=setup.model), detect("cpu")), seed=0)
    cpu = torch.device("cpu")
    batches = contestants.make_batches(setup, cpu)
    build = contestants.known_providers(cpu, nanogpt)[name]
    contestant, row = contestants.prepare(name, build, setup, cpu, batches)
    turns = itertools.cycle(batches)
    replay = timing.host_replay(lambda: contestant.step(next(turns)))
    serve(row, lambda _: replay.once())


def start_worker(name: str, setup: Setup, nanogpt: Path | None, limit_s: float) -> Child:
    """That process, its warm-up done; ChildDied where it fails within `limit_s`."""
    command = [sys.executable, "-m", "bench.step", "--device", "cpu", "--worker", name]
    command += ["--against", "nanogpt", str(nanogpt.resolve())] if nanogpt else []
    return Child([*command, *setup.flags], limit_s)


class Turns:
    """Contestants on a CPU, taking turns.

    Args:
        setup: What they train.
        start: (name, seconds at most) -> its process, as `start_worker` gives it.
        seconds: Budget of each.
        deadline: Of time.monotonic(); whoever has no time before it gets a row that says so.
    """

    def __init__(
        self, setup: Setup, start: Callable[[str, float], Child], seconds: float, deadline: float
    ):
        self.setup, self.start, self.seconds, self.deadline = setup, start, seconds, deadline
        self.alive: dict[str, Child] = {}
        self.warm: dict[str, StepRow] = {}  # of all so far
        self.failed: dict[str, str] = {}

    def measure(self, names: Sequence[str]) -> Iterator[StepRow]:
        """A row for each name, as its group ends."""
        first, todo = names[0], [*names]
        while todo:
            try:
                timed = self._group(first, [name for name in todo if name != first])
            finally:
                self._end()
            for name in [name for name in todo if name in timed or name in self.failed]:
                todo.remove(name)
                if name not in timed:
                    yield self.setup.row(name, doubt=self.failed[name])
                    continue
                # Of those who took turns: medians of the ratios of neighbours.
                over = {other: timing.ratio(timed[other], timed[name]) for other in timed}
                row = timed_row(self.warm[name], self.setup, timed[name], self.warm.get(first))
                yield replace(row, over=over)

    def _group(self, first: str, others: Sequence[str]) -> dict[str, timing.Timing]:
        """Time the first and those that fit beside it, or, where nobody does, one after it."""
        if first not in self.failed:
            self._begin(first)
        if first not in self.warm:
            self.failed |= dict.fromkeys(others, NO_REFERENCE)
            return {}
        if self.alive:
            all(self._begin(name) for name in others)  # until one does not fit
        timed = self._interleave()
        if others and not (timed.keys() | self.failed.keys()) & {*others}:
            self._end()
            self._begin(others[0])
            timed |= self._interleave()
        return timed

    def _begin(self, name: str) -> bool:
        """Start a contestant; whether there may be room for more."""
        left, free, beside = self.deadline - time.monotonic(), free_bytes(), bool(self.alive)
        # Of one more: an estimate until one has shown it.
        largest = max((row.peak_gib or 0.0 for row in self.warm.values()), default=0.0)
        need = int(ROOM * largest * 2**30) or self.setup.need_bytes
        if left <= 0:
            self.failed[name] = "no time left; --minutes gives more"
        elif 0 < free < need:
            if beside:
                return False
            text = f"needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
            self.failed[name] = text
        else:
            try:
                self.alive[name] = self.start(name, left / 2)  # a hang must not cost the rest
                self.warm[name] = self.alive[name].first
            except ChildDied as why:
                if beside and why.is_short:  # there will be more where fewer are alive
                    return False
                self.failed[name] = str(why)
        return True

    def _interleave(self) -> dict[str, timing.Timing]:
        """Samples of all who are alive, in turns."""
        if self.alive:
            print(f"in turns: {', '.join(self.alive)}", flush=True)
        limit_s = max(60.0, self.deadline - time.monotonic())
        replays = {
            name: timing.Replay(lambda worker=worker: worker.ask("step", limit_s), "host")
            for name, worker in self.alive.items()
        }
        return timing.interleave(
            replays, rounds=20, seconds=self.seconds * len(replays), warmup=0, min_rounds=3,
            until=self.deadline, failed=self.failed,
        )  # fmt: skip

    def _end(self) -> None:
        for worker in self.alive.values():
            worker.end()
        self.alive.clear()


def run(
    names: Sequence[str], setup: Setup, device: torch.device, results: record.Results, *,
    seconds: float, minutes: float, nanogpt: Path | None = None, section: str = "step",
) -> None:  # fmt: skip
    """Measure, write each row as it comes and all ratios at the end, print the table.

    One that fails has a row that says why.
    """
    rows: dict[str, StepRow] = {}
    print(f"\nTraining step, GPT-2 {setup.model}, {setup.shape.label}, accum {setup.accum}")
    if device.type == "cuda":
        builds = contestants.find_providers(names, device, nanogpt)
        measured = measure_cuda(builds, setup, device, seconds)
    else:
        if not detect("cpu").has_bf16:
            print("bf16 left out: this CPU multiplies faster in fp32")
        start = lambda name, limit_s: start_worker(name, setup, nanogpt, limit_s)  # noqa: E731
        until = time.monotonic() + 60 * minutes
        measured = Turns(setup, start, seconds, until).measure(names)
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
    add("--shape", action="append", type=cli.shape,
        help="b<B>t<T>, repeat for several; default b64t1024 on a GPU, b4t64 on a CPU")  # fmt: skip
    add("--accum", type=cli.count, default=1, help="micro-batches per step")
    add("--provider", action="append", help="a contestant, as in 'ours bf16'; repeat for several")
    add("--seconds", type=cli.amount, default=10.0, help="budget per contestant")
    add("--minutes", type=cli.amount, default=30.0, help="budget of a table, on a CPU")
    add("--ablation", action="store_true", help="also ours with one op or choice undone at a time")
    add("--against", nargs=2, metavar=("nanogpt", "PATH"), help="also nanoGPT, by its model.py")
    add("--worker", help=argparse.SUPPRESS)
    cli.add_output(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shapes = args.shape or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)[:1]
    setups = [Setup(args.model, shape, args.accum) for shape in dict.fromkeys(shapes)]
    nanogpt = None
    if args.against:
        kind, path = args.against
        if kind != "nanogpt":
            raise ValueError(f"bench: --against knows nanogpt, got {kind!r}")
        nanogpt = Path(path)
        contestants.load_nanogpt(nanogpt)  # fail before minutes of measuring
    if args.worker:
        work(args.worker, setups[0], nanogpt)
        return
    if args.ablation and device.type != "cuda":
        raise ValueError("bench: --ablation switches Triton ops off one by one; it needs a GPU")
    names = args.provider or contestants.default_providers(device, nanogpt is not None)
    contestants.find_providers(names, device, nanogpt)  # refuses the unknown
    for setup in setups:
        setup.check_memory(device)
    results = record.Results(device, args.out, args.commit)
    budget = {"seconds": args.seconds, "minutes": args.minutes}
    for setup in setups:
        run(names, setup, device, results, nanogpt=nanogpt, **budget)
    if args.ablation:
        known = contestants.known_providers(device)
        ours = [name for name in known if name.startswith("ours bf16")]
        run(ours, setups[0], device, results, section="ablation", **budget)
    print(f"wrote {os.path.relpath(results.path)}")


if __name__ == "__main__":
    cli.run(main)
