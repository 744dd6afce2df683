"""One training step, whole: forward, backward, clip, AdamW; ours beside plain PyTorch.

    python -m bench.step                              # the table for this machine
    python -m bench.step --shape b64t1024 --ablation
    python -m bench.step --against nanogpt ~/nanoGPT/model.py
    python -m bench.step --batch-sweep 4,8,16,32,64 --length-sweep 256,512,1024,2048

Every contestant starts from the same weights and sees the same tokens. Its loss on the first step
and after the warm-up, and its first gradient norm, must agree with the first contestant's before
its speed is printed (the file has it as unverified_tokens_per_s). Ours runs the step train.py runs
(training/step.py) by the plan train.py would make for this machine. On a CPU each contestant lives
in a process of its own, because ours changes how its process allocates memory, and they take turns.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench import baseline, record, timing
from bench.cases import Shape, find_shape
from bench.report import table
from kernels import Ops
from model import GPT, MODELS, GPTConfig
from model.flops import flops_per_token
from training.machines import find_card
from training.metrics import seconds_since_start
from training.optim import configure_adamw
from training.plan import Choices, detect, make_plan
from training.recipes import Recipe
from training.step import TrainStep, start_process

WARMUP_STEPS = 3
NUM_BATCHES = 8
# On the loss, about 10.9 at the start: bf16 moves it by 1e-3, the padded softmax by 1e-3, and three
# AdamW steps at full rate multiply such differences.
FIRST_LOSS_TOLERANCE = 0.01
# Relative, on the first step's gradient norm: at the start any weights give ln(V) as loss, so the
# loss alone would pass a wrong backward.
GRAD_NORM_TOLERANCE = 0.05
WARM_LOSS_TOLERANCE = 0.1
FIRST_STEP_TIMEOUT_S = 180.0
RATIO_TO = ("eager fp32", "compile fp32", "compile bf16")
ANSWER = "bench.step worker: "  # before each line a child means for its parent

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setup:
    """What every contestant trains: model, physical batch, micro-batches a step."""

    model: str
    shape: Shape
    accum: int = 1

    @property
    def config(self) -> GPTConfig:
        config = MODELS[self.model]
        if config.block_size >= self.shape.T:
            return config
        values = {f.name: getattr(config, f.name) for f in fields(config)}
        return GPTConfig(**values | {"block_size": self.shape.T})

    @property
    def tokens(self) -> int:
        return self.shape.M * self.accum

    @property
    def flags(self) -> list[str]:
        """Command-line flags that give this setup."""
        shape = f"b{self.shape.B}t{self.shape.T}"
        return ["--model", self.model, "--shape", shape, "--accum", str(self.accum)]


class Contestant(Protocol):
    """Something that trains.

    Attributes:
        grad_norm: (), of the last step, before clipping; None before the first.
    """

    grad_norm: Tensor | None

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Train on micro-batches; their mean loss, ()."""
        ...


@dataclass
class PlainLoop:
    """Plain PyTorch: a model, its optimizer, and the loop everyone writes.

    Args:
        loss_of: (idx, targets) -> scalar loss.
        parameters: What is clipped.
        autocast: Context of the forward.
        grad_norm: Of the last step, before clipping.
    """

    loss_of: Callable[[Tensor, Tensor], Tensor]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    autocast: Callable[[], AbstractContextManager[Any]]
    grad_norm: Tensor | None = None

    def step(self, batches: Sequence[Batch]) -> Tensor:
        loss = torch.zeros((), device=batches[0][0].device)
        for idx, targets in batches:
            with self.autocast():
                micro = self.loss_of(idx, targets) / len(batches)
            micro.backward()
            loss += micro.detach()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, baseline.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


Build = Callable[[Setup, torch.device], Contestant]


class Ours:
    """The trainer's own step, by its own plan.

    Args:
        setup: As everywhere here; the plan keeps its micro-batches.
        device: Where.
        choices: What differs from the plan train.py would make.
    """

    def __init__(self, setup: Setup, device: torch.device, choices: Choices):
        B, T = setup.shape.B, setup.shape.T
        recipe = Recipe(
            model=f"{setup.model},block_size={setup.config.block_size}", batch_size=B, block_size=T,
            grad_accum_steps=setup.accum, max_lr=baseline.LEARNING_RATE,
            min_lr=baseline.LEARNING_RATE, beta1=baseline.BETAS[0], beta2=baseline.BETAS[1],
            grad_clip=baseline.CLIP_NORM, weight_decay=baseline.WEIGHT_DECAY,
        )  # fmt: skip
        machine = detect(device.type)
        plan = make_plan(recipe, machine, replace(choices, micro_batch_size=B))
        model = GPT(setup.config, plan.op_set)
        model.load_state_dict(_weights(setup))
        optimizer = configure_adamw(model.to(device), recipe, plan.optimizer)
        self.take_step = TrainStep(model, optimizer, recipe, plan)
        self.grad_norm: Tensor | None = None

    def step(self, batches: Sequence[Batch]) -> Tensor:
        outcome = self.take_step(_Rows(batches), baseline.LEARNING_RATE)
        self.grad_norm = outcome.grad_norm
        # The graph's buffers are written again by the next step.
        return outcome.loss.clone()


@dataclass
class _Rows:
    """A step's micro-batches as the loader hands them out: one after the other."""

    batches: Sequence[Batch]

    def next_batch(self) -> Batch:
        idx, targets = zip(*self.batches, strict=True)
        return torch.cat(idx), torch.cat(targets)


def _contestant(
    model: nn.Module, device: torch.device, *, bf16: bool, compiled: bool, loss_index: int = -1
) -> Contestant:
    optimizer = baseline.make_optimizer(model)
    call: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model

    def loss_of(idx: Tensor, targets: Tensor) -> Tensor:
        out = call(idx, targets)
        return out[loss_index] if isinstance(out, tuple) else out

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    return PlainLoop(loss_of, list(model.parameters()), optimizer, autocast)


def _weights(setup: Setup) -> dict[str, Tensor]:
    """The same initial weights for all: drawn on the CPU, so that no device's RNG matters."""
    return dict(_draw_weights(setup.config))


@lru_cache(maxsize=1)  # drawing those of the 124M model takes 1.3 s, twice for every contestant
def _draw_weights(config: GPTConfig) -> dict[str, Tensor]:
    torch.manual_seed(1337)
    return GPT(config).state_dict()


def _baseline(bf16: bool, compiled: bool) -> Build:
    def build(setup: Setup, device: torch.device) -> Contestant:
        model = baseline.BaselineGPT(setup.config)
        model.load_state_dict(_weights(setup))
        return _contestant(model.to(device), device, bf16=bf16, compiled=compiled)

    return build


def _ours(**choices: Any) -> Build:
    return lambda setup, device: Ours(setup, device, Choices(compile=True, **choices))


def _nanogpt(path: Path, bf16: bool, compiled: bool) -> Build:
    def build(setup: Setup, device: torch.device) -> Contestant:
        module = load_nanogpt(path)
        config = setup.config
        model = module.GPT(
            module.GPTConfig(
                block_size=config.block_size,
                vocab_size=config.padded_vocab_size,
                n_layer=config.n_layer,
                n_head=config.n_head,
                n_embd=config.n_embd,
                dropout=0.0,
                bias=True,
            )
        )
        weights = _weights(setup)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        model.load_state_dict(weights, strict=False)
        return _contestant(model.to(device), device, bf16=bf16, compiled=compiled)

    return build


def load_nanogpt(path: Path) -> Any:
    """Import a nanoGPT model.py by path.

    Raises:
        ValueError: the file is missing or does not define GPT and GPTConfig.
    """
    if path.is_dir():
        path = path / "model.py"
    if not path.is_file():
        raise ValueError(
            f"bench: --against nanogpt needs the path of its model.py, got {path} (no such file); "
            "get one with: git clone https://github.com/karpathy/nanoGPT"
        )
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    missing = [name for name in ("GPT", "GPTConfig") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"bench: {path} must define GPT and GPTConfig, lacks {missing}")
    return module


def known_providers(device: torch.device, nanogpt: Path | None = None) -> dict[str, Build]:
    """Every contestant by the name it has in tables; the order is the table's.

    On the CPU ours runs the eager ops: Triton has no CPU target, and its interpreter is a test
    instrument.
    """
    known: dict[str, Build] = {
        "eager fp32": _baseline(bf16=False, compiled=False),
        "eager bf16": _baseline(bf16=True, compiled=False),
        "compile fp32": _baseline(bf16=False, compiled=True),
        "compile bf16": _baseline(bf16=True, compiled=True),
        "ours fp32": _ours(dtype="fp32"),
        "ours bf16": _ours(dtype="bf16"),
    }
    if device.type == "cuda":
        for op in (f.name for f in fields(Ops)):
            known[f"ours bf16, {op}=eager"] = _ours(dtype="bf16", ops=f"triton,{op}=eager")
        known |= {
            "ours bf16, no graph": _ours(dtype="bf16", cuda_graph=False),
            "ours bf16, torch AdamW": _ours(dtype="bf16", optimizer="torch"),
            "ours bf16, no copies": _ours(dtype="bf16", working_copies=False),
            "ours bf16, whole compile": _ours(dtype="bf16", compile_scope="model"),
        }
    if nanogpt is not None:
        for compiled in (False, True):
            for bf16 in (False, True):
                name = f"nanogpt {'compile' if compiled else 'eager'} {'bf16' if bf16 else 'fp32'}"
                known[name] = _nanogpt(nanogpt, bf16=bf16, compiled=compiled)
    return known


def default_providers(device: torch.device, nanogpt: bool = False) -> list[str]:
    if device.type == "cuda":
        names = ["eager fp32", "eager bf16", "compile bf16", "ours bf16"]
        return [*names, *(["nanogpt compile bf16"] if nanogpt else [])]
    names = ["eager fp32", "compile fp32", "ours fp32"]
    if timing.has_fast_bf16(device):
        names += ["eager bf16", "compile bf16", "ours bf16"]
    if nanogpt:
        names += ["nanogpt eager fp32", "nanogpt compile fp32"]
    return names


def make_batches(setup: Setup, device: torch.device) -> list[list[Batch]]:
    """NUM_BATCHES steps of random tokens; random, because no contestant may profit from text."""
    generator = torch.Generator().manual_seed(0)
    size = (setup.shape.B, setup.shape.T + 1)

    def micro() -> Batch:
        tokens = torch.randint(setup.config.vocab_size, size, generator=generator).to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return [[micro() for _ in range(setup.accum)] for _ in range(NUM_BATCHES)]


@dataclass
class Prepared:
    """A contestant after its warm-up.

    Args:
        contestant: None once only its figures are needed.
        first_step_s: Of the first step alone.
        losses: Of the warm-up's steps.
        grad_norm: Of the first step.
        process_start_s: From the start of the process, imports included, to the first step's end.
    """

    contestant: Contestant | None
    first_step_s: float
    losses: list[float]
    grad_norm: float
    process_start_s: float = 0.0

    def replay(self, batches: list[list[Batch]]) -> timing.Replay:
        turn = 0
        contestant = self.contestant
        assert contestant is not None

        def call() -> None:
            nonlocal turn
            contestant.step(batches[turn % len(batches)])
            turn += 1

        return timing.host_replay(call)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(
    build: Build, setup: Setup, device: torch.device, batches: list[list[Batch]]
) -> Prepared:
    """Build a contestant, run its warm-up, note the first step's time and the losses."""
    contestant = build(setup, device)
    _synchronize(device)
    start = time.perf_counter()
    losses = [contestant.step(batches[0])]
    _synchronize(device)
    first_step_s, process_start_s = time.perf_counter() - start, seconds_since_start()
    assert contestant.grad_norm is not None
    grad_norm = contestant.grad_norm.item()
    losses += [contestant.step(batches[i % NUM_BATCHES]) for i in range(1, WARMUP_STEPS)]
    figures = [loss.item() for loss in losses]
    return Prepared(contestant, first_step_s, figures, grad_norm, process_start_s)


def event_steps(prepared: Prepared, batches: list[list[Batch]], seconds: float) -> timing.Timing:
    """Device-event times between step ends, no synchronisation in between, as training runs."""
    contestant = prepared.contestant
    assert contestant is not None
    contestant.step(batches[0])  # ours captures its graph in the fourth step
    torch.cuda.synchronize()
    probe = timing.host_replay(
        lambda: (contestant.step(batches[0]), torch.cuda.synchronize())
    ).once()
    steps = int(min(200, max(8, seconds * 1e3 / probe)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for i in range(steps):
        contestant.step(batches[i % NUM_BATCHES])
        marks[i + 1].record()
    torch.cuda.synchronize()
    samples = tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    return timing.Timing(samples, "launches")


def red_reason(found: Prepared, reference: Prepared) -> str | None:
    """Why a contestant's speed must not be printed; None if its losses and gradients are right."""
    pairs = (
        ("first loss", found.losses[0], reference.losses[0], FIRST_LOSS_TOLERANCE),
        ("warm loss", found.losses[-1], reference.losses[-1], WARM_LOSS_TOLERANCE),
        (
            "gradient norm",
            found.grad_norm,
            reference.grad_norm,
            GRAD_NORM_TOLERANCE * reference.grad_norm,
        ),
    )
    for name, ours, theirs, tolerance in pairs:
        if not abs(ours - theirs) <= tolerance:  # NaN too
            return f"{name} {ours:.4f}, reference {theirs:.4f}, tolerance {tolerance:.2g}"
    return None


def make_row(
    name: str,
    setup: Setup,
    device: torch.device,
    prepared: Prepared,
    timed: timing.Timing,
    red: str | None,
    peak_bytes: int | None,
) -> dict[str, Any]:
    """A row of the step section. MFU by both formulas, against the datasheet's bf16 peak."""
    tokens_per_s = setup.tokens / timed.median_ms * 1e3
    q1, q3 = timed.quartiles_ms
    row: dict[str, Any] = {
        "model": setup.model,
        "shape": setup.shape.label,
        "accum": setup.accum,
        "provider": name,
        "tokens": setup.tokens,
        "red": red,
        "loss": prepared.losses,
        "grad_norm": prepared.grad_norm,
        "first_step_s": prepared.first_step_s,
        "peak_gib": None if peak_bytes is None else peak_bytes / 2**30,
        "rounds": len(timed.samples_ms),
    }
    if red:
        return row | {"unverified_tokens_per_s": tokens_per_s}
    row |= {
        "tokens_per_s": tokens_per_s,
        "ms": timed.median_ms,
        "q1_ms": q1,
        "q3_ms": q3,
        "cov": timed.cov,
        "noisy": timed.noisy,
    }
    config = setup.config
    card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    for form in ("palm", "llmc"):
        tflops = flops_per_token(config, setup.shape.T, form) * tokens_per_s / 1e12
        row[f"tflops_{form}"] = tflops
        row[f"mfu_{form}"] = None if card is None else tflops / card.tflops
    return row


def measure(
    names: Sequence[str],
    setup: Setup,
    device: torch.device,
    *,
    seconds: float = 10.0,
    nanogpt: Path | None = None,
    known: dict[str, Build] | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the named contestants, each with its ratio to the first and to the compiled one.

    On CUDA one after the other, since two would share the memory; on the CPU in turns, each in its
    own process (in this one where `known` brings contestants of its own). On CUDA a contestant that
    fails yields a row that says why; one of ours comes twice where its compiled twin came before
    it: once the twin has been timed again, the second row replaces the first.

    Raises:
        ValueError: an unknown contestant; the message names the known ones.
        RuntimeError: CUDA is broken; nothing can be measured in this process any more.
    """
    builds = known or known_providers(device, nanogpt)
    for name in names:
        if name not in builds:
            raise ValueError(f"bench: unknown provider {name!r}; known: {', '.join(builds)}")
    chosen = {name: builds[name] for name in names}
    if device.type == "cuda":
        found = _measure_cuda(chosen, setup, device, seconds)
    elif known:
        batches = make_batches(setup, device)
        prepared = {name: prepare(build, setup, device, batches) for name, build in chosen.items()}
        replays = {name: p.replay(batches) for name, p in prepared.items()}
        found = _measure_in_turns(prepared, replays, setup, device, seconds)
    else:
        found = _measure_cpu(names, setup, device, seconds, nanogpt)
    rows: list[dict[str, Any]] = []
    for row in found:
        for other in RATIO_TO:
            twin = next((r for r in [*rows, row] if r["provider"] == other and "ms" in r), None)
            if twin and "ms" in row:
                row.setdefault(_over(other), twin["ms"] / row["ms"])
        rows.append(row)
        yield row


def _failed_row(name: str, setup: Setup, red: str) -> dict[str, Any]:
    identity = {"model": setup.model, "shape": setup.shape.label, "accum": setup.accum}
    return {**identity, "provider": name, "tokens": setup.tokens, "red": red}


def free_device(device: torch.device) -> None:
    """Give back what a contestant took, compiled code included; nobody may hold its graph."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each stream, and every TrainStep has a stream of its own.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _time_cuda(build, setup, device, batches, seconds):
    """A contestant alone on the card: its figures, its times, its peak bytes, the card's state."""
    free_device(device)
    torch.cuda.reset_peak_memory_stats(device)
    prepared = prepare(build, setup, device, batches)
    timed = event_steps(prepared, batches, seconds)
    state = timing.gpu_state()  # right after the work, while clocks still show it
    peak = torch.cuda.max_memory_allocated(device)
    # The model itself must go before the next is built; its figures stay.
    return replace(prepared, contestant=None), timed, peak, state


def _measure_cuda(builds, setup, device, seconds) -> Iterator[dict[str, Any]]:
    batches = make_batches(setup, device)
    reference = None
    failed: dict[str, str] = {}
    times_ms: dict[str, float] = {}
    torch.set_float32_matmul_precision("high")
    for name, build in builds.items():
        found = None
        try:
            found = _time_cuda(build, setup, device, batches, seconds)
        except Exception as error:
            timing.note_failure(failed, name, error)
        if found is None:  # outside the handler: the exception's frames hold the contestant
            yield _failed_row(name, setup, failed[name])
            continue
        prepared, timed, peak, state = found
        if reference is None and failed and name.startswith("ours"):
            red = f"nothing to hold it against: {next(iter(failed))} failed"
        else:
            reference = reference or prepared
            red = red_reason(prepared, reference)
        row = make_row(name, setup, device, prepared, timed, red, peak)
        row["gpu"] = state
        yield row
        times_ms[name] = timed.median_ms
        twin = name.replace("ours", "compile")
        if red or twin == name or twin not in times_ms:
            continue
        # The card was colder for the twin than for ours: what stood beside ours is the mean of the
        # twin before and after it.
        try:
            again_ms = _time_cuda(builds[twin], setup, device, batches, seconds)[1].median_ms
        except Exception as error:
            timing.note_failure(failed, f"{twin} again", error)
            continue
        row |= {"twin_again_ms": again_ms, "twin_drift": again_ms / times_ms[twin] - 1}
        yield row | {_over(twin): (times_ms[twin] + again_ms) / 2 / row["ms"]}


def _over(name: str) -> str:
    """Key of the ratio to a contestant."""
    return f"over_{name.replace(' ', '_')}"


def _measure_cpu(names, setup, device, seconds, nanogpt) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as held:
        # One after the other: compiling two at a time would only take turns.
        workers = {name: held.enter_context(Worker(name, setup, nanogpt)) for name in names}
        prepared = {name: worker.prepared for name, worker in workers.items()}
        replays = {name: timing.Replay(worker.step_ms, "host") for name, worker in workers.items()}
        yield from _measure_in_turns(prepared, replays, setup, device, seconds)


def _measure_in_turns(prepared, replays, setup, device, seconds) -> Iterator[dict[str, Any]]:
    timed = timing.interleave(
        replays, rounds=20, seconds=seconds * len(replays), warmup=0, min_rounds=3
    )
    reference = next(iter(prepared.values()))
    for name, p in prepared.items():
        red = red_reason(p, reference)
        row = make_row(name, setup, device, p, timed[name], red, None)
        if not red:
            # Medians of the ratios of neighbours, not ratios of medians.
            for other in timed:
                if other in RATIO_TO or other.startswith("nanogpt"):
                    row[_over(other)] = timing.ratio(timed[other], timed[name])
        yield row


class Worker:
    """A contestant in a process of its own, which takes a step when told to.

    Args:
        name: Of `known_providers`.
        setup: What it trains, on the CPU.
        nanogpt: Path of a nanoGPT model.py, for its contestants.

    Raises:
        ValueError: the process died; the message has its last line.
    """

    def __init__(self, name: str, setup: Setup, nanogpt: Path | None):
        command = [sys.executable, "-m", "bench.step", "--worker", name, *setup.flags]
        command += ["--device", "cpu"]
        if nanogpt:
            command += ["--against", "nanogpt", str(nanogpt.resolve())]
        self.name = name
        self.process = subprocess.Popen(
            command, cwd=record.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.prepared = Prepared(None, **self._answer())

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()  # the worker's loop ends with its input
        self.process.wait(60)
        self.process.stdout.close()

    def step_ms(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()["ms"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise ValueError(f"bench: the process of {self.name!r} died; its last words are above")


def serve(name: str, setup: Setup, nanogpt: Path | None) -> None:
    """A worker's side: prepare, then a step per line of input."""
    device = torch.device("cpu")
    build = known_providers(device, nanogpt)[name]
    if name.startswith("ours"):
        start_process(make_plan(Recipe(model=setup.model), detect("cpu")), seed=0)
    batches = make_batches(setup, device)
    prepared = prepare(build, setup, device, batches)
    figures = {f: getattr(prepared, f) for f in ("first_step_s", "losses", "grad_norm")}
    print(f"{ANSWER}{json.dumps(figures)}", flush=True)
    replay = prepared.replay(batches)
    for _ in sys.stdin:
        print(f"{ANSWER}{json.dumps({'ms': replay.once()})}", flush=True)


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, slowest explanation first: tokens/s is what a user buys."""
    cuda = any(row.get("mfu_palm") for row in rows)
    wanted = ["over_compile_bf16" if cuda else "over_eager_fp32"]
    wanted += [_over(r["provider"]) for r in rows if r["provider"].startswith("nanogpt")]
    keys = [key for key in wanted if any(key in row for row in rows)]
    header = ["what runs", "tokens/s", "ms/step", "spread"]
    header += [f"x {key[5:].replace('_', ' ')}" for key in keys]
    header += ["MFU palm / llmc", "peak GiB"] if cuda else ["TFLOP/s"]
    header += ["first step s"]
    lines = []
    for row in rows:
        if row.get("red"):
            lines.append([row["provider"], f"not shown: {row['red']}"] + [""] * (len(header) - 2))
            continue
        cells = [
            row["provider"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['ms']:,.1f}",
            f"{100 * row['cov']:.1f}%" + (" !" if row["noisy"] else ""),
            *(f"{row[key]:.2f}" if key in row else "" for key in keys),
        ]
        if cuda:
            cells += [f"{100 * row['mfu_palm']:.1f}% / {100 * row['mfu_llmc']:.1f}%"]
            cells += [f"{row['peak_gib']:.1f}"]
        else:
            cells += [f"{row['tflops_palm']:.3f}"]
        lines.append([*cells, f"{row['first_step_s']:.1f}"])
    return table(header, lines)


def first_step(
    name: str, setup: Setup, device: torch.device, timeout_s: float = FIRST_STEP_TIMEOUT_S
) -> Iterator[dict[str, Any]]:
    """Seconds from nothing compiled to the end of the first step: empty caches, then full ones.

    In processes of their own. first_step_s leaves imports and model building out; process_start_s
    is everything since the process began, drawing the initial weights on the CPU included.
    """
    with tempfile.TemporaryDirectory() as caches:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        command = [sys.executable, "-m", "bench.step", *setup.flags, "--device", device.type]
        command += ["--first-step-child", name]
        for cache in ("cold", "warm"):
            row: dict[str, Any] = {
                "model": setup.model, "shape": setup.shape.label, "provider": name, "cache": cache,
            }  # fmt: skip
            try:
                out = subprocess.run(
                    command, cwd=record.ROOT, env=env, capture_output=True, text=True,
                    timeout=timeout_s, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                yield row | {"red": f"no first step within {timeout_s:.0f} s"}
                return
            answers = [line for line in out.stdout.splitlines() if line.startswith(ANSWER)]
            if out.returncode or not answers:
                last = (out.stderr.strip().splitlines() or ["nothing said"])[-1]
                yield row | {"red": f"exit {out.returncode}: {last}"[:200]}
                return
            yield row | json.loads(answers[-1].removeprefix(ANSWER))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="124m", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--shape", help="b<B>t<T>; default b64t1024 on a GPU, b4t64 on a CPU")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--provider", action="append", help="repeat for several")
    parser.add_argument("--seconds", type=float, default=10.0, help="budget per contestant")
    parser.add_argument("--ablation", action="store_true", help="each op back to eager, in turn")
    parser.add_argument("--batch-sweep", help="comma-separated B at the shape's T")
    parser.add_argument("--length-sweep", help="comma-separated T at the shape's tokens")
    parser.add_argument("--against", nargs=2, metavar=("nanogpt", "PATH"))
    parser.add_argument("--first-step", action="store_true", help="cold and warm, in new processes")
    parser.add_argument("--first-step-child", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device(args.device)
    if args.model not in MODELS:
        raise ValueError(f"bench: unknown model {args.model!r}; known: {', '.join(MODELS)}")
    shape = find_shape(args.shape or ("b64t1024" if device.type == "cuda" else "b4t64"))
    setup = Setup(args.model, shape, args.accum)
    if args.first_step_child:
        build = known_providers(device)[args.first_step_child]
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as where the steps are timed
        prepared = prepare(build, setup, device, make_batches(setup, device))
        found = {key: getattr(prepared, key) for key in ("first_step_s", "process_start_s")}
        print(f"{ANSWER}{json.dumps(found)}", flush=True)
        return

    nanogpt = None
    if args.against:
        kind, path = args.against
        if kind != "nanogpt":
            raise ValueError(f"bench: --against knows nanogpt, got {kind!r}")
        nanogpt = Path(path)
        load_nanogpt(nanogpt)  # fail before minutes of measuring
    if args.worker:
        serve(args.worker, setup, nanogpt)
        return
    results = record.Results(device, args.out)
    names = args.provider or default_providers(device, nanogpt is not None)

    setups = [setup]
    if args.batch_sweep:
        setups += [Setup(args.model, Shape(int(B), shape.T)) for B in args.batch_sweep.split(",")]
    if args.length_sweep:
        lengths = [int(T) for T in args.length_sweep.split(",")]
        setups += [Setup(args.model, Shape(max(1, shape.M // T), T)) for T in lengths]
    for each in dict.fromkeys(setups):
        run(names, each, device, results, seconds=args.seconds, nanogpt=nanogpt)
    if args.ablation:
        if device.type != "cuda":
            raise ValueError("bench: --ablation switches Triton ops off one by one; it needs a GPU")
        ops = [f"ours bf16, {f.name}=eager" for f in fields(Ops)]
        run(["ours bf16", *ops], setup, device, results, section="ablation", seconds=args.seconds)
    if args.first_step:
        for name in names:
            for row in first_step(name, setup, device):
                results.add("first_step", row)
                seconds = row.get("process_start_s", row)
                print(f"first step, {row['cache']} caches, {name}: {seconds}")
    print(f"wrote {os.path.relpath(results.path)}")


def run(
    names: Sequence[str],
    setup: Setup,
    device: torch.device,
    results: record.Results,
    *,
    section: str = "step",
    seconds: float = 10.0,
    nanogpt: Path | None = None,
) -> list[dict[str, Any]]:
    """Measure, write each row as it comes, print the table."""
    rows: dict[str, dict[str, Any]] = {}
    print(f"\nTraining step, GPT-2 {setup.model}, {setup.shape.label}, accum {setup.accum}")
    if device.type == "cpu" and not timing.has_fast_bf16(device):
        share = timing.limits(device)["bf16_over_fp32"]
        print(f"bf16 left out: this CPU runs a bf16 matmul at {share:.2f}x the rate of fp32")
    for row in measure(names, setup, device, seconds=seconds, nanogpt=nanogpt):
        results.add(section, row)
        rows[row["provider"]] = row
    print(step_table([*rows.values()]))
    return [*rows.values()]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
