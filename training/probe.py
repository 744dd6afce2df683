"""What this machine reaches: copies, matrix products, and a few steps of a recipe by phase.

Steps are timed twice where the plan captures a graph: as training takes them, and launch by launch
for the phases.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
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
# nvidia-smi's names of the fields of `Rates` that it fills.
SMI_FIELDS = {
    "driver_version": "driver",
    "power.limit": "power_limit_w",
    "power.max_limit": "power_max_w",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "sm_max_mhz",
}


@dataclass(frozen=True)
class Rates:
    """What this machine reaches, measured; 0 where it does not say.

    Args:
        copy_gbs: GB/s of a copy larger than the caches, bytes read plus bytes written.
        matmul_gflops: GFLOP/s of a large square product by "fp32", "tf32", "bf16" and "fp16".
        shape_gflops: The same in the plan's dtype for (tokens of a micro-batch, C, 4C).
        cores: CPU cores this process may use.
        power_limit_w, power_max_w, sm_mhz, sm_max_mhz, driver: Of the GPU; the clock right after
            the products.
    """

    copy_gbs: float
    matmul_gflops: dict[str, float]
    shape_gflops: float = 0.0
    cores: int = 1
    power_limit_w: float = 0.0
    power_max_w: float = 0.0
    sm_mhz: float = 0.0
    sm_max_mhz: float = 0.0
    driver: str = ""

    def matmul(self, dtype: str) -> float:
        """GFLOP/s of products in "fp32", "bf16" or "fp16"; fp32 is TF32 where the chip has it."""
        name = "tf32" if dtype == "fp32" and "tf32" in self.matmul_gflops else dtype
        return self.matmul_gflops[name]


@dataclass(frozen=True)
class Probe:
    """A few steps, timed.

    Args:
        steps: Measured, warm-up apart.
        phases: Median seconds of a step in each of `PHASES`, run launch by launch.
        seconds: Wall time of each step, as training takes it: replayed where the plan captures.
        tokens_per_step: Of the recipe.
        host_s: Median seconds the host needs to queue a step on CUDA; 0 on a CPU.
        peak_bytes: Largest memory of the GPU allocator; 0 on a CPU.
        note: What was done otherwise than in training; empty if nothing.
    """

    steps: int
    phases: dict[str, float]
    seconds: tuple[float, ...]
    tokens_per_step: int
    host_s: float = 0.0
    peak_bytes: int = 0
    note: str = ""

    @property
    def step_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens_per_step / self.step_s


def _median_s(call: Callable[[], object], cuda: bool, budget_s: float) -> float:
    samples, deadline = [], time.perf_counter() + budget_s
    call()
    while not samples or (len(samples) < 50 and time.perf_counter() < deadline):
        with _elapsed(cuda) as read:
            call()
        samples.append(read())
    return statistics.median(samples)


def products_s(recipe: Recipe, plan: Plan) -> float:
    """Seconds of a step's matrix products but attention's, each timed alone at its own shape."""
    config, cuda = recipe.model_config, plan.device == "cuda"
    M, C, L = plan.micro_batch_size * recipe.block_size, config.n_embd, config.n_layer
    head = min(M, CHUNK_TOKENS)
    products = [(L, M, C, 3 * C), (L, M, C, C), (L, M, C, 4 * C), (L, M, 4 * C, C),
                (M / head, head, C, config.padded_vocab_size)]  # fmt: skip
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
    smi = nvidia_smi(*SMI_FIELDS) if cuda else {}
    C = recipe.model_config.n_embd
    tokens = min(plan.micro_batch_size * recipe.block_size, 65536 if cuda else 1024)
    dtype = DTYPES[plan.dtype]
    found: dict[str, Any] = {SMI_FIELDS[field]: value for field, value in smi.items()}
    found |= {name: float(value) for name, value in found.items() if name != "driver"}
    return Rates(copy_gbs(), rates, gflops(tokens, C, 4 * C, dtype), num_cores(), **found)


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
    cuda, device, notes = plan.device == "cuda", torch.device(plan.device), []
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

    def update(loss: Tensor) -> Outcome:
        norm = optimizer.clip(recipe.grad_clip)
        bad = guard.judge(loss, norm) if guard else None
        optimizer.step(skip=take.skip(bad))
        optimizer.zero_grad()
        return Outcome(loss, norm, bad)

    def step() -> Outcome:
        return update(take.accumulate())

    B, T = recipe.rows_per_step, recipe.block_size
    loader = DataLoaderLite(tokens, B, T, recipe.order, recipe.seed, wrap_rows=recipe.batch_size)
    clock = _Clock(cuda)
    replayed: list[float] = []
    peak = 0
    with contextlib.closing(Prefetcher(loader, device)) as batches:
        if plan.compile and not cuda:
            take.run(step, batches, recipe.max_lr)
        if plan.cuda_graph:  # captured before other streams have touched the gradients
            for i in range(NUM_WARMUP + 1 + MAX_STEPS):
                with _elapsed(cuda) as read:
                    take.run(step, batches, recipe.max_lr)
                replayed += [read()] if i > NUM_WARMUP else []
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            take.graph, take.outcome = [], None  # its pool holds what a step needs once more
            gc.collect()
            torch.cuda.empty_cache()
        deadline = time.perf_counter() + limit_s  # compiling, above or in the first step, is apart
        rows = recipe.rows_per_step
        if not (cuda or plan.compile):
            _timed_step(take, update, batches, clock, 1)
            rows = min(rows, max(1, int(rows * limit_s / 2 / sum(clock.steps[0].values()))))
        if rows < recipe.rows_per_step:
            notes.append(f"{rows} of {recipe.rows_per_step} rows, their time scaled")
        while len(clock.steps) <= MAX_STEPS and (
            len(clock.steps) < (2 if cuda else 1) or time.perf_counter() + clock.last_s < deadline
        ):
            _timed_step(take, update, batches, clock, rows)
    kept = clock.steps[1:] or clock.steps  # the first warms caches up
    notes += [] if len(clock.steps) > 1 else ["no warm-up"]
    phases = {p: statistics.median(step[p] for step in kept) for p in PHASES}
    seconds = tuple(replayed or (sum(step.values()) for step in kept))
    host = statistics.median(clock.host[1:] or clock.host) if cuda else 0.0
    if cuda and not peak:
        peak = torch.cuda.max_memory_allocated()
    note = ", ".join(notes)
    return Probe(len(seconds), phases, seconds, recipe.tokens_per_step, host, peak, note)


class _Clock:
    """Adds up the time between marks by phase: events on CUDA, wall time on a CPU."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.steps: list[dict[str, float]] = []
        self.host: list[float] = []
        self.marks: list[tuple[str, Any]] = []
        self.last_s = 0.0

    def mark(self, phase: str) -> None:
        """What ran since the last mark was `phase`; "" begins a step."""
        if not self.cuda:
            self.marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((phase, event))

    def end_step(self, started: float, scale: float) -> None:
        self.host.append(time.perf_counter() - started)
        if self.cuda:
            torch.cuda.synchronize()
        self.last_s = time.perf_counter() - started
        spent = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in pairwise(self.marks):
            s = before.elapsed_time(after) / 1e3 if self.cuda else after - before
            spent[phase] += s * (scale if phase in ("forward", "backward") else 1)
        self.steps.append(spent)
        self.marks.clear()


def _timed_step(
    take: TrainStep,
    update: Callable[[Tensor], Outcome],
    batches: Prefetcher,
    clock: _Clock,
    num_rows: int,
) -> None:
    """A step with marks in it; of fewer rows it is scaled to all."""
    optimizer, micro = take.optimizer, take.plan.micro_batch_size
    started = time.perf_counter()
    clock.mark("")
    idx, targets = batches.next_batch()
    clock.mark("data")
    loss = torch.zeros((), device=idx.device)
    for rows in zip(idx[:num_rows].split(micro), targets[:num_rows].split(micro), strict=True):
        with take.autocast():
            part = take.forward(*rows) / take.plan.num_micro_batches
        clock.mark("forward")
        part.backward()
        if take.plan.num_micro_batches > 1:
            optimizer.fold_working_gradients()
        clock.mark("backward")
        loss += part.detach()
    update(loss)
    clock.mark("optimizer")
    clock.end_step(started, len(idx) / num_rows)


def slowdown(sample_s: float = 0.3) -> float:
    """How many times as long as alone a thread takes now: 1 on an idle machine."""
    started, busy = time.perf_counter(), time.thread_time()
    while (wall := time.perf_counter() - started) < sample_s:
        pass
    return wall / max(time.thread_time() - busy, 1e-3)


@contextlib.contextmanager
def _elapsed(cuda: bool) -> Iterator[Callable[[], float]]:
    """Seconds of the block, by events on CUDA; read after it."""
    clock = _Clock(cuda)
    clock.mark("")
    yield lambda: clock.steps[0]["forward"]
    clock.mark("forward")
    clock.end_step(0.0, 1)
