"""What this machine reaches: copies, matrix products, and a few steps of a recipe by phase.

Steps are timed twice where the plan captures a graph: as training takes them, and launch by launch
for the phases.
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
from training.numerics import DTYPES
from training.optim import configure_adamw
from training.plan import Machine, Plan
from training.recipes import Recipe
from training.step import NUM_WARMUP, Outcome, TrainStep

MAX_STEPS = 10
PROBE_S = 20.0  # with the import, the rates and a step of GPT-2 124M on two cores under a minute
# Of a step; above it ten compiled steps and the compiling take more than a minute of two cores.
MAX_COMPILED_FLOPS = 2e11
RATE_S = 0.8  # for each rate that is measured
COMPILE_S, MAX_COMPILE_S = 20.0, 40.0  # what it takes two idle cores, and what it may take here
PHASES: tuple[str, ...] = ("data", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class Rates:
    """What this machine reaches, measured; 0 where it does not say."""

    copy_gbs: float  # of a copy larger than the caches, bytes read plus bytes written
    matmul_gflops: dict[str, float]  # large square products in "fp32", "tf32", "bf16" and "fp16"
    shape_gflops: float = 0.0  # in the plan's dtype for (tokens of a micro-batch, C, 4C)
    cores: int = 1  # that this process may use
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
    seconds: tuple[float, ...]  # of each step as training takes it: replayed where it captures
    tokens_per_step: int
    host_s: float = 0.0  # median, that the host needs to queue a step on CUDA; 0 on a CPU
    peak_bytes: int = 0  # of the GPU's allocator; 0 on a CPU
    note: str = ""  # what was done otherwise than in training

    @property
    def step_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s


def _mark(cuda: bool) -> Any:
    """This moment, on the device."""
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
    """Seconds of a step's matrix products but attention's, each timed alone at its own shape."""
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
    """Copy and matmul rates of this machine; about 4 s on a CPU, each the median of some."""
    cuda, device = machine.device == "cuda", torch.device(machine.device)
    median_s = partial(_median_s, cuda=cuda, budget_s=RATE_S)

    def gflops(m: int, k: int, n: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(s, device=device).to(dtype) for s in ((m, k), (k, n)))
        out = torch.empty(m, n, device=device, dtype=dtype)
        return 2e-9 * m * k * n / median_s(lambda: torch.mm(a, b, out=out))

    def copy_gbs() -> float:
        source = torch.ones((1 << 28) if cuda else (1 << 24), device=device)
        target = torch.empty_like(source)
        return 2e-9 * source.nbytes / median_s(lambda: target.copy_(source))

    size, precision = 8192 if cuda else 2048, torch.get_float32_matmul_precision()
    rates = {}
    try:
        torch.set_float32_matmul_precision("highest")
        rates["fp32"] = gflops(size, size, size, torch.float32)
        if cuda and machine.arch >= 80:
            torch.set_float32_matmul_precision("high")
            rates["tf32"] = gflops(size, size, size, torch.float32)
    finally:
        torch.set_float32_matmul_precision(precision)
    for name in {*(["bf16"] if machine.has_bf16 else []), plan.dtype} - {"fp32"}:
        rates[name] = gflops(size, size, size, DTYPES[name])
    said = ("driver_version", "power.limit", "power.max_limit", "clocks.sm", "clocks.max.sm")
    smi = nvidia_smi(*said) if cuda else {}
    C = recipe.model_config.n_embd
    tokens = min(plan.micro_batch_size * recipe.block_size, 65536 if cuda else 1024)
    shaped = gflops(tokens, C, 4 * C, DTYPES[plan.dtype])
    numbers = [float(smi.get(field, 0)) for field in said[1:]]
    driver = smi.get("driver_version", "")
    return Rates(copy_gbs(), rates, shaped, num_cores(), *numbers, driver=driver)


def probe_steps(recipe: Recipe, plan: Plan, tokens: Tokens, limit_s: float = PROBE_S) -> Probe:
    """Take up to ten steps as train.py takes them, its numerics set before, and time their phases.

    Args:
        recipe, plan: What to run. Not compiled on a CPU that is busy, or where a step takes longer.
        tokens: (N,) uint16, to draw rows from.
        limit_s: No step begins that would end after so many seconds. On a CPU a row is timed
            first; where a step would take more than half of this, it takes fewer and is scaled.

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
    if cuda:  # what `measure_rates` held is not the step's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(recipe.seed)
    dtype = torch.bfloat16 if plan.residual == "bf16" else None
    model = GPT(recipe.model_config, plan.op_set, dtype).to(device)
    optimizer = configure_adamw(model, recipe, plan.optimizer)  # pyright: ignore
    guard = Guard(device) if recipe.guard else None
    take = TrainStep(model, optimizer, recipe, plan, say=notes.append)
    steps: list[dict[str, float]] = []  # seconds of each by phase
    host: list[float] = []  # until it was queued
    last_s, replayed, peak, all_rows = 0.0, [], 0, recipe.rows_per_step

    def update(loss: Tensor) -> Outcome:
        norm = optimizer.clip(recipe.grad_clip)
        bad = guard.judge(loss, norm) if guard else None
        optimizer.step(skip=take.skip(bad))
        optimizer.zero_grad()
        return Outcome(loss, norm, bad)

    def timed(rows: int) -> None:
        """A step launch by launch, with marks in it; of fewer rows it is scaled to all."""
        nonlocal last_s
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
        last_s = time.perf_counter() - started
        steps.append(spent)

    def step_of(rows: int) -> TrainStep:
        sizes = {"micro_batch_size": rows, "num_micro_batches": 1}
        if rows > plan.micro_batch_size:
            sizes = {"num_micro_batches": rows // plan.micro_batch_size}
        return TrainStep(model, optimizer, recipe, replace(plan, **sizes), say=notes.append)

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
            take.graph, take.outcome = [], None  # its pool holds what a step needs once more
            gc.collect()
            torch.cuda.empty_cache()
        deadline = time.perf_counter() + limit_s  # compiling, above or in the first step, is apart
        rows = all_rows
        if not (cuda or plan.compile):
            take = step_of(1)
            timed(1)
            rows = min(rows, max(1, int(rows * limit_s / 2 / sum(steps[0].values()))))
            rows -= rows % min(rows, plan.micro_batch_size)
            take = step_of(rows)
        if rows < all_rows:
            notes.append(f"{rows} of {all_rows} rows, their time scaled")
        while len(steps) <= MAX_STEPS and (
            len(steps) < (2 if cuda else 1) or time.perf_counter() + last_s < deadline
        ):
            timed(rows)
    kept = steps[1:] or steps  # the first warms caches up
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
    """How many times as long as alone a thread takes now: 1 on an idle machine."""
    started, busy = time.perf_counter(), time.thread_time()
    while (wall := time.perf_counter() - started) < sample_s:
        pass
    return wall / max(time.thread_time() - busy, 1e-3)
