"""What this machine reaches: copies, matrix products, and a few steps of a recipe by phase.

Where the plan captures a graph, steps are timed twice: as training replays them, and launch by
launch to tell the phases apart.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.reference import CHUNK_TOKENS
from model import GPT
from model.flops import flops_per_token
from training.data import DataLoaderLite, Prefetcher, Tokens
from training.guard import Guard
from training.machines import num_cores, nvidia_smi
from training.numerics import DTYPES, precision
from training.optim import configure_adamw
from training.plan import Machine, Plan
from training.recipes import Recipe
from training.step import NUM_WARMUP, Outcome, TrainStep

MAX_STEPS = 10
PROBE_S = 20.0  # so that --explain takes less than a minute for GPT-2 124M on two cores
# For a step; with more, compiling and ten compiled steps take over a minute on two cores.
MAX_COMPILED_FLOPS = 2e11
RATE_S = 0.8  # for each rate that is measured
COMPILE_S, MAX_COMPILE_S = 20.0, 40.0  # on two idle cores; the most it may take here
PHASES: tuple[str, ...] = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Rates:
    """What this machine reaches, measured; 0 where it does not say."""

    copy_gbs: float  # for a copy larger than the caches, bytes read plus bytes written
    matmul_gflops: dict[str, float]  # large square products in "fp32", "tf32", "bf16" and "fp16"
    shape_gflops: float = 0.0  # in the plan's dtype for (tokens of a micro-batch, C, 4C)
    cores: int = 1  # what this process may use
    power_limit_w: float = 0.0
    power_max_w: float = 0.0
    sm_mhz: float = 0.0  # right after the products
    sm_max_mhz: float = 0.0
    driver: str = ""

    def matmul(self, dtype: str) -> float:
        """GFLOP/s of products in "fp32", "bf16" or "fp16"; fp32 is TF32 where the chip has it."""
        name = "tf32" if dtype == "fp32" and "tf32" in self.matmul_gflops else dtype
        return self.matmul_gflops[name]


@dataclass(frozen=True)
class Probe:
    """A few steps, timed."""

    phases: dict[str, float]  # median seconds of a step in each of PHASES, launch by launch
    seconds: tuple[float, ...]  # for each step, taken as in training: replayed if it is captured
    tokens_per_step: int
    host_s: float = 0.0  # median time in which the host queues a step on CUDA; 0 on a CPU
    peak_bytes: int = 0  # by the GPU's allocator; 0 on a CPU
    note: str = ""  # how it differed from training

    @property
    def step_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s


def _mark(cuda: bool) -> Any:
    """Mark this moment on the device."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before: Any, after: Any) -> float:
    """Seconds from one moment to another."""
    if isinstance(before, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _median_s(call: Callable[[], object], cuda: bool, budget_s: float) -> float:
    samples, deadline = [], time.perf_counter() + budget_s
    call()
    while not samples or (len(samples) < 50 and time.perf_counter() < deadline):
        before = _mark(cuda)
        call()
        samples.append(_between(before, _mark(cuda)))
    return statistics.median(samples)


def products_s(recipe: Recipe, plan: Plan) -> float:
    """Seconds of a step's matrix products without attention's, each timed alone at its shape."""
    config, cuda = recipe.model_config, plan.device == "cuda"
    M, C, L = plan.micro_batch_size * recipe.block_size, config.n_embd, config.n_layer
    head = min(M, CHUNK_TOKENS)
    products = [(L, M, C, 3 * C), (L, M, C, C), (L, M, C, 4 * C), (L, M, 4 * C, C)]
    products += [(M / head, head, C, config.padded_vocab_size)]
    total = 0.0
    for times, m, k, n in products:
        x, weight, dy = (
            torch.randn(size, device=plan.device).to(DTYPES[plan.dtype])
            for size in ((m, k), (n, k), (m, n))
        )
        for a, b in ((x, weight.T), (dy, weight), (dy.T, x)):  # y, dx, dweight
            total += times * _median_s(partial(torch.mm, a, b), cuda, RATE_S / 4)
    return total * plan.num_micro_batches


def measure_rates(recipe: Recipe, machine: Machine, plan: Plan) -> Rates:
    """Copy and matmul rates of this machine, medians of several samples; about 4 s on a CPU."""
    cuda, device = machine.device == "cuda", torch.device(machine.device)

    def gflops(m: int, k: int, n: int, name: str) -> float:
        a, b = (torch.randn(s, device=device).to(DTYPES[name]) for s in ((m, k), (k, n)))
        out = torch.empty(m, n, device=device, dtype=DTYPES[name])
        return 2e-9 * m * k * n / _median_s(lambda: torch.mm(a, b, out=out), cuda, RATE_S)

    def copy_gbs() -> float:
        source = torch.ones((1 << 28) if cuda else (1 << 24), device=device)
        target = torch.empty_like(source)
        return 2e-9 * source.nbytes / _median_s(lambda: target.copy_(source), cuda, RATE_S)

    rates, size = {}, 8192 if cuda else 2048
    names = ["fp32", *["tf32"] * (cuda and machine.arch >= 80), *["bf16"] * machine.has_bf16]
    for name in dict.fromkeys([*names, plan.dtype]):
        with precision(name):
            rates[name] = gflops(size, size, size, name)
    C = recipe.model_config.n_embd
    tokens = min(plan.micro_batch_size * recipe.block_size, 65536 if cuda else 1024)
    fields = ("power.limit", "power.max_limit", "clocks.sm", "clocks.max.sm")
    smi = nvidia_smi("driver_version", *fields) if cuda else {}
    return Rates(
        copy_gbs(),
        rates,
        gflops(tokens, C, 4 * C, plan.dtype),
        num_cores(),
        *(float(smi.get(field, 0)) for field in fields),
        driver=smi.get("driver_version", ""),
    )


def probe_steps(recipe: Recipe, plan: Plan, tokens: Tokens, limit_s: float = PROBE_S) -> Probe:
    """Take up to ten steps as train.py does, with its numerics already set, and time their phases.

    Args:
        recipe, plan: What to run. On a CPU a large model, and any on a busy machine, is not
            compiled.
        tokens: (N,) uint16, to draw rows from.
        limit_s: No step begins that would end after so many seconds. On a CPU a step of one row is
            timed first; if a whole step would take more than half of the limit, steps have fewer
            rows and their time is scaled.

    Raises:
        ValueError: `tokens` is shorter than a batch.
    """
    cuda, device = plan.device == "cuda", torch.device(plan.device)
    notes: list[str] = []
    flops = flops_per_token(recipe.model_config, recipe.block_size) * recipe.tokens_per_step
    if plan.compile and not cuda:
        if flops > MAX_COMPILED_FLOPS:
            notes.append("not compiled")
        elif (compile_s := COMPILE_S * slowdown()) > MAX_COMPILE_S:
            notes.append(f"not compiled: this machine is busy, it would take {compile_s:.0f} s")
        plan = replace(plan, compile=not notes)
    if cuda:  # memory that `measure_rates` took does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(recipe.seed)
    dtype = torch.bfloat16 if plan.residual == "bf16" else None
    model = GPT(recipe.model_config, plan.op_set, dtype).to(device)
    optimizer = configure_adamw(model, recipe, plan.optimizer)  # pyright: ignore
    guard = Guard(device) if recipe.guard else None
    take = TrainStep(model, optimizer, recipe, plan, say=notes.append)
    steps: list[dict[str, float]] = []  # seconds of each by phase
    host: list[float] = []  # seconds until it was queued
    replayed: list[float] = []
    peak, all_rows = 0, recipe.rows_per_step

    def update(loss: Tensor) -> Outcome:
        norm = optimizer.clip(recipe.grad_clip)
        bad = guard.judge(loss, norm) if guard else None
        optimizer.step(skip=take.skip(bad))
        optimizer.zero_grad()
        return Outcome(loss, norm, bad)

    def timed(rows: int) -> float:
        """Seconds of a step of so many rows; its phases, scaled to all rows, go to `steps`."""
        forward, started, marks = take.forward, time.perf_counter(), [("", _mark(cuda))]

        def mark(phase: str) -> None:
            marks.append((phase, _mark(cuda)))

        def marked(*args: Tensor) -> Tensor:
            mark("data" if marks[-1][0] == "data" else "backward")
            loss = forward(*args)
            mark("forward")
            return loss

        def step() -> Outcome:
            loss = take.accumulate()
            mark("backward")
            outcome = update(loss)
            mark("optimizer")
            return outcome

        take.forward = marked
        idx, targets = batches.next_batch()
        mark("data")
        take.run(step, (idx[:rows], targets[:rows]), recipe.max_lr)
        take.forward = forward
        host.append(time.perf_counter() - started)
        spent = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in pairwise(marks):
            scale = all_rows / rows if phase in ("forward", "backward") else 1
            spent[phase] += scale * _between(before, after)
        steps.append(spent)
        return time.perf_counter() - started

    def step_of(rows: int) -> TrainStep:
        micro = min(rows, plan.micro_batch_size)
        sized = replace(plan, micro_batch_size=micro, num_micro_batches=rows // micro)
        return TrainStep(model, optimizer, recipe, sized, say=notes.append)

    order = recipe.order, recipe.seed, recipe.batch_size
    loader = DataLoaderLite(tokens, all_rows, recipe.block_size, *order)
    with contextlib.closing(Prefetcher(loader, device)) as batches:
        if plan.compile and not cuda:
            timed(all_rows)
            steps.clear()
        if plan.cuda_graph:  # captured before other streams have touched the gradients
            for i in range(NUM_WARMUP + 1 + MAX_STEPS):
                before = _mark(cuda)
                batch = batches.next_batch()
                take.run(lambda: update(take.accumulate()), batch, recipe.max_lr)
                seconds = _between(before, _mark(cuda))
                replayed += [seconds] if i > NUM_WARMUP else []
            peak = torch.cuda.max_memory_allocated()
            take.plan = replace(take.plan, cuda_graph=False)
            take.graph, take.outcome = [], None  # its pool holds a second copy of a step's memory
            gc.collect()
            torch.cuda.empty_cache()
        deadline = time.perf_counter() + limit_s  # the time of compiling does not count
        rows, last_s = all_rows, 0.0
        if not (cuda or plan.compile):
            take = step_of(1)
            last_s = timed(1)
            rows = min(rows, max(1, int(rows * limit_s / 2 / sum(steps[0].values()))))
            rows -= rows % min(rows, plan.micro_batch_size)
            take = step_of(rows)
        if rows < all_rows:
            notes.append(f"{rows} of {all_rows} rows, their time scaled")
        while len(steps) <= MAX_STEPS and (
            len(steps) < (2 if cuda else 1) or time.perf_counter() + last_s < deadline
        ):
            last_s = timed(rows)
    kept = steps[1:] or steps  # the first warms up caches
    notes += [] if len(steps) > 1 else ["no warm-up"]
    return Probe(
        phases={phase: statistics.median(step[phase] for step in kept) for phase in PHASES},
        seconds=tuple(replayed or (sum(step.values()) for step in kept)),
        tokens_per_step=recipe.tokens_per_step,
        host_s=statistics.median(host[1:] or host) if cuda else 0.0,
        peak_bytes=peak or (torch.cuda.max_memory_allocated() if cuda else 0),
        note=", ".join(notes),
    )


def slowdown(sample_s: float = 0.3) -> float:
    """How many times as long a thread takes now as on an idle machine."""
    started, busy = time.perf_counter(), time.thread_time()
    while (wall := time.perf_counter() - started) < sample_s:
        pass
    return wall / max(time.thread_time() - busy, 1e-3)
