"""Contestants of `bench.step` held against each other and timed.

On a GPU one follows the other. On a CPU each lives in a process of its own, because ours changes
how its process allocates memory, and they take turns: as many at a time as memory has room for,
each group with the first contestant among them, by way of whom two of different groups are
compared. Where not even two fit, each runs alone, after the first has run alone again.
"""

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from bench.contestants import (
    NUM_BATCHES,
    Batch,
    Build,
    Contestant,
    Prepared,
    Setup,
    known_providers,
    make_batches,
    prepare,
)  # fmt: skip
from bench.rows import StepRow
from model.flops import flops_per_token
from training import timing
from training.child import Child, ChildDied, serve
from training.machines import find_card, free_bytes
from training.plan import detect, make_plan
from training.recipes import Recipe
from training.step import start_process

CPU = torch.device("cpu")
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


def disagreement(found: Prepared, known: Prepared | None) -> str:
    """Why a contestant's speed must not be shown; empty if losses and gradient are the first's."""
    if known is None:
        return NO_REFERENCE
    for what, ours, theirs, tolerance in (
        ("first loss", found.losses[0], known.losses[0], FIRST_LOSS_TOLERANCE),
        ("warm loss", found.losses[-1], known.losses[-1], WARM_LOSS_TOLERANCE),
        ("gradient norm", found.grad_norm, known.grad_norm, GRAD_NORM_TOLERANCE * known.grad_norm),
    ):
        if not abs(ours - theirs) <= tolerance:  # NaN too
            return f"{what} {ours:.4f}, reference {theirs:.4f}, tolerance {tolerance:.2g}"
    return ""


def make_row(
    name: str, setup: Setup, found: Prepared, timed: timing.Timing, known: Prepared | None,
    card: str = "", **more: Any,
) -> StepRow:  # fmt: skip
    """A row of the step section, held against the first contestant; flops by both formulas."""
    per_s = setup.tokens / timed.median_ms * 1e3 / 1e12
    palm, llmc = (flops_per_token(setup.config, setup.shape.T, f) for f in ("palm", "llmc"))
    sheet = find_card(card)
    return StepRow(
        **setup.identity, provider=name, tokens=setup.tokens, doubt=disagreement(found, known),
        **timed.figures, losses=found.losses, grad_norm=found.grad_norm,
        first_step_s=found.first_step_s, peak_gib=found.peak_bytes / 2**30 or None,
        tflops_palm=palm * per_s, tflops_llmc=llmc * per_s, peak_tflops=sheet and sheet.tflops,
        **more,
    )  # fmt: skip


def is_rival(name: str) -> bool:
    return name in RIVALS or name.startswith("nanogpt")


def free_device(device: torch.device) -> None:
    """Give back what a contestant took, compiled code included; nobody may hold its graph."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each stream, and every TrainStep has a stream of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def event_steps(
    contestant: Contestant, batches: list[list[Batch]], seconds: float
) -> timing.Timing:
    """Device-event times between step ends, no synchronisation in between, as training runs."""
    contestant.step(batches[0])  # ours captures its graph in the fourth step
    torch.cuda.synchronize()
    probe_ms = timing.host_replay(lambda: contestant.step(batches[0]).item()).once()
    steps = int(min(200, max(8, seconds * 1e3 / probe_ms)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        contestant.step(batches[i % NUM_BATCHES])
        marks[i + 1].record()
    torch.cuda.synchronize()
    samples = tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return timing.Timing(samples, "launches")


def _time_cuda(
    build: Build, setup: Setup, device: torch.device, seconds: float
) -> tuple[Prepared, timing.Timing, dict[str, float]]:
    """A contestant alone on the card: its figures, its times, the card's state right after."""
    free_device(device)
    torch.cuda.reset_peak_memory_stats(device)
    batches = make_batches(setup, device)
    contestant, prepared = prepare(build, setup, device, batches)
    timed = event_steps(contestant, batches, seconds)
    state = timing.gpu_state()
    return replace(prepared, peak_bytes=torch.cuda.max_memory_allocated(device)), timed, state


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
    times_ms: dict[str, float] = {}
    first = None
    torch.set_float32_matmul_precision("high")
    for i, (name, build) in enumerate(builds.items()):
        found = None
        try:
            found = _time_cuda(build, setup, device, seconds)
        except Exception as error:
            timing.note_failure(failed, name, error)
        if found is None:  # outside the handler: the exception's frames hold the contestant
            yield StepRow(**setup.identity, provider=name, doubt=failed[name])
            continue
        prepared, timed, state = found
        first = first if i else prepared
        card = torch.cuda.get_device_name(device)
        row = make_row(name, setup, prepared, timed, first, card, gpu=state)
        yield row
        twin = name.replace("ours", "compile")
        if twin != name and twin in times_ms and not row.doubt:
            try:
                again_ms = _time_cuda(builds[twin], setup, device, seconds)[1].median_ms
            except Exception as error:
                timing.note_failure(failed, f"{twin} again", error)
            else:
                over = (times_ms[twin] + again_ms) / 2 / row.ms
                yield replace(row, rival_again_ms=again_ms, over={twin: over})
        if not row.doubt:
            times_ms[name] = row.ms


class Runner(Protocol):
    """A contestant that takes a step when told to."""

    prepared: Prepared

    def step_ms(self, limit_s: float) -> float: ...

    def end(self) -> object: ...


class Worker(Child):
    """A contestant in a process of its own; ChildDied where it fails within `limit_s`."""

    def __init__(
        self, name: str, setup: Setup, device: str, nanogpt: Path | None, limit_s: float,
        env: Mapping[str, str] | None = None,
    ):  # fmt: skip
        command = [sys.executable, "-m", "bench.step", "--worker", name, *setup.flags]
        command += ["--device", device]
        command += ["--against", "nanogpt", str(nanogpt.resolve())] if nanogpt else []
        super().__init__(command, limit_s, env=env)
        self.prepared: Prepared = self.first

    def step_ms(self, limit_s: float) -> float:
        return self.ask("step", limit_s)


def work(name: str, setup: Setup, device: torch.device, nanogpt: Path | None) -> None:
    """A worker's side: the warm-up, then a step for each time it is asked."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as where the steps are timed
    elif name.startswith("ours"):
        start_process(make_plan(Recipe(model=setup.model), detect("cpu")), seed=0)
    batches = make_batches(setup, device)
    contestant, prepared = prepare(known_providers(device, nanogpt)[name], setup, device, batches)
    turns = itertools.cycle(batches)
    replay = timing.host_replay(lambda: contestant.step(next(turns)))
    serve(prepared, lambda _: replay.once())


class Turns:
    """Contestants on a CPU, taking turns.

    Args:
        setup: What they train.
        start: (name, seconds at most) -> the contestant, its warm-up done.
        seconds: Budget of each.
        deadline: Of time.monotonic(); whoever has no time before it gets a row that says so.
    """

    def __init__(
        self, setup: Setup, start: Callable[[str, float], Runner], seconds: float, deadline: float
    ):
        self.setup, self.start, self.seconds, self.deadline = setup, start, seconds, deadline
        self.alive: dict[str, Runner] = {}
        self.prepared: dict[str, Prepared] = {}  # of all so far
        self.failed: dict[str, str] = {}

    def measure(self, names: Sequence[str]) -> Iterator[StepRow]:
        """A row for each name, as its group ends."""
        first, todo = names[0], [*names]
        while todo:
            try:
                timed = self._turns(first, [name for name in todo if name != first])
            finally:
                self._end()
            for name in [name for name in todo if name in timed or name in self.failed]:
                todo.remove(name)
                if name not in timed:
                    yield StepRow(**self.setup.identity, provider=name, doubt=self.failed[name])
                    continue
                # Of those who took turns: medians of the ratios of neighbours.
                over = {other: timing.ratio(timed[other], timed[name]) for other in timed}
                known = self.prepared.get(first)
                yield make_row(name, self.setup, self.prepared[name], timed[name], known, over=over)

    def _turns(self, first: str, others: Sequence[str]) -> dict[str, timing.Timing]:
        """Time the first and those that fit beside it, or, where nobody does, one after it."""
        if first not in self.failed:
            self._begin(first)
        if first not in self.prepared:
            self.failed |= dict.fromkeys(others, NO_REFERENCE)
            return {}
        for name in others if self.alive else ():
            if not self._begin(name):
                break
        timed = self._interleave()
        if others and not (timed.keys() | self.failed.keys()) & {*others}:
            self._end()
            self._begin(others[0])
            timed |= self._interleave()
        return timed

    @property
    def need(self) -> int:
        """Bytes of one more: an estimate until one has shown it."""
        largest = max((found.peak_bytes for found in self.prepared.values()), default=0)
        return int(ROOM * largest) or self.setup.need_bytes

    def _begin(self, name: str) -> bool:
        """Start a contestant; whether there may be room for more."""
        left, free, beside = self.deadline - time.monotonic(), free_bytes(), bool(self.alive)
        if left <= 0:
            self.failed[name] = "no time left; --minutes gives more"
        elif 0 < free < self.need:
            if beside:
                return False
            need = f"needs about {self.need / 2**30:.1f} GiB of memory"
            self.failed[name] = f"{need}, {free / 2**30:.1f} are free"
        else:
            try:
                self.alive[name] = self.start(name, left / 2)  # a hang must not cost the rest
                self.prepared[name] = self.alive[name].prepared
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
            name: timing.Replay(lambda runner=runner: runner.step_ms(limit_s), "host")
            for name, runner in self.alive.items()
        }
        return timing.interleave(
            replays, rounds=20, seconds=self.seconds * len(replays), warmup=0, min_rounds=3,
            until=self.deadline, failed=self.failed,
        )  # fmt: skip

    def _end(self) -> None:
        for runner in self.alive.values():
            runner.end()
        self.alive.clear()
