"""The contestants of `bench.step`: ours, plain PyTorch and nanoGPT, all from the same weights.

Ours takes train.py's own step, with the plan that train.py would make for this machine.
"""

import itertools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench import baseline
from bench.cases import Shape, check_room
from bench.record import StepRow
from kernels import Ops
from model import GPT, MODELS, GPTConfig
from training import machines, memory, optim
from training.plan import Choices, Plan, detect, make_plan
from training.recipes import Recipe
from training.step import Outcome, TrainStep

NUM_BATCHES = 8
WARMUP_STEPS = 3
PROCESS_BYTES = 700 << 20  # torch and the compiler in a process, not counting the step

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setup:
    """What every contestant trains: the model, rows of a micro-batch, micro-batches per step."""

    model: str
    shape: Shape
    accum: int = 1
    nanogpt: Path | None = None  # its model.py, if it takes part

    @property
    def config(self) -> GPTConfig:
        config = MODELS[self.model]
        return replace(config, block_size=max(config.block_size, self.shape.T))

    @property
    def tokens(self) -> int:
        return self.shape.M * self.accum

    def row(self, provider: str, **values: Any) -> StepRow:
        """The row of a contestant, without a time."""
        whose = {"model": self.model, "shape": self.shape.label, "accum": self.accum}
        return StepRow(provider=provider, **whose, **values)

    @property
    def need_bytes(self) -> int:
        """Memory of a process that takes plain PyTorch's step, by training/memory.py."""
        plain = Plan("cpu", "", 1, "eager", "fp32", True, self.shape.B, self.accum, 0)
        return PROCESS_BYTES + memory.estimate(self.config, self.shape.T, plain).total

    def check_memory(self, device: torch.device) -> None:
        """Raise ValueError for what cannot be trained here, not even in bf16."""
        cuda = device.type == "cuda"
        room = 2 * torch.cuda.mem_get_info(device)[1] if cuda else machines.free_bytes()
        check_room(f"GPT-2 {self.model} at {self.shape.label}", self.need_bytes, room)


class Plain:
    """Plain PyTorch in the usual loop: `bench.baseline`, or the nanoGPT at a path.

    The model returns its loss, or a tuple that ends with it.
    """

    def __init__(
        self, setup: Setup, device: torch.device, bf16: bool, compiled: bool, nanogpt: bool = False
    ):
        config, found = setup.config, dict(weights(setup.config))
        if not nanogpt:
            self.model: nn.Module = baseline.BaselineGPT(config)
        else:
            module = load_nanogpt(setup.nanogpt)
            sizes = {k: getattr(config, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}
            more = {"vocab_size": config.padded_vocab_size, "dropout": 0.0, "bias": True}
            self.model = module.GPT(module.GPTConfig(**sizes, **more))
            found["lm_head.weight"] = found["transformer.wte.weight"]
        self.model.load_state_dict(found, strict=not nanogpt)
        self.model.to(device)
        self.call = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optimizer = baseline.make_optimizer(self.model)
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Train on micro-batches; their mean loss, ()."""
        loss = torch.zeros((), device=batches[0][0].device)
        for idx, targets in batches:
            with self.autocast():
                out = self.call(idx, targets)
                micro = (out[-1] if isinstance(out, tuple) else out) / len(batches)
            micro.backward()
            loss += micro.detach()
        parameters = self.model.parameters()
        self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, baseline.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


class Ours:
    """The trainer's own step, with its own plan except for `choices`."""

    def __init__(self, setup: Setup, device: torch.device, choices: Choices):
        B, T, lr = setup.shape.B, setup.shape.T, baseline.LEARNING_RATE
        model = f"{setup.model},block_size={setup.config.block_size}"
        recipe = Recipe(model=model, batch_size=B, block_size=T, grad_accum_steps=setup.accum)
        recipe = replace(recipe, max_lr=lr, min_lr=lr, weight_decay=baseline.WEIGHT_DECAY)
        recipe = replace(recipe, beta1=baseline.BETAS[0], beta2=baseline.BETAS[1])
        if device.type == "cuda":  # a CPU's plan merges micro-batches, as in training
            choices = replace(choices, micro_batch_size=B)
        plan = make_plan(recipe, detect(device.type), choices)
        gpt = GPT(setup.config, plan.op_set)
        gpt.load_state_dict(weights(setup.config))
        self.optimizer = optim.configure_adamw(gpt.to(device), recipe, plan.optimizer)
        self.take_step = TrainStep(gpt, self.optimizer, recipe, plan)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        idx, targets = zip(*batches, strict=True)
        batch = torch.cat(idx), torch.cat(targets)
        outcome = self.take_step.run(self._once, batch, baseline.LEARNING_RATE)
        self.grad_norm = outcome.grad_norm
        return outcome.loss.clone()  # the graph's buffers are written again by the next step

    def _once(self) -> Outcome:
        loss = self.take_step.accumulate()
        grad_norm = self.optimizer.clip(baseline.CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Outcome(loss, grad_norm)


Build = Callable[[Setup, torch.device], Plain | Ours]
TakeStep = Callable[[], Tensor]


@lru_cache(maxsize=1)  # drawing those of the 124M model takes 1.3 s, twice for every contestant
def weights(config: GPTConfig) -> dict[str, Tensor]:
    """The initial weights of all contestants, drawn on the CPU so that no device's RNG matters."""
    torch.manual_seed(1337)
    return GPT(config).state_dict()


def load_nanogpt(path: Path | None) -> Any:
    """Import a nanoGPT model.py by path.

    Raises:
        ValueError: the file is missing, is not Python or does not define GPT and GPTConfig.
    """
    assert path is not None
    path = path / "model.py" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"bench: --against nanogpt needs the path of its model.py, got {path} (no such file); "
            "get one with: git clone https://github.com/karpathy/nanoGPT"
        )
    module = ModuleType("nanogpt_model")
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"bench: {path} cannot be imported: {error}") from error
    missing = [name for name in ("GPT", "GPTConfig") if not hasattr(module, name)]
    if missing:
        raise ValueError(f"bench: {path} does not define {' and '.join(missing)}")
    return module


def _ours(**choices: Any) -> Build:
    return partial(Ours, choices=Choices(**{"compile": True, **choices}))


def known_providers(device: torch.device, nanogpt: bool = False) -> dict[str, Build]:
    """Every contestant by name, in the order of the tables.

    On a CPU ours runs the eager ops: Triton has no CPU target.
    """
    modes = [(mode, dtype) for mode in ("eager", "compile") for dtype in ("fp32", "bf16")]
    plain: dict[str, Any] = {
        f"{mode} {dtype}": partial(Plain, bf16=dtype == "bf16", compiled=mode == "compile")
        for mode, dtype in modes
    }
    known = plain | {f"ours {dtype}": _ours(dtype=dtype) for dtype in ("fp32", "bf16")}
    if device.type == "cuda":
        changes: dict[str, dict[str, Any]] = {
            **{f"{f.name}=eager": {"ops": f"triton,{f.name}=eager"} for f in fields(Ops)},
            "no graph": {"cuda_graph": False},
            "torch AdamW": {"optimizer": "torch"},
            "no copies": {"working_copies": False},
            "whole compile": {"compile_scope": "model"},
            "no compile": {"compile": False},
        }
        known |= {f"ours bf16, {name}": _ours(dtype="bf16", **how) for name, how in changes.items()}
    theirs = {f"nanogpt {name}": partial(build, nanogpt=True) for name, build in plain.items()}
    return known | theirs if nanogpt else known


def find_provider(name: str, device: torch.device, setup: Setup) -> Build:
    known = known_providers(device, setup.nanogpt is not None)
    if name not in known:
        raise ValueError(f"bench: unknown provider {name!r}; known: {', '.join(known)}")
    return known[name]


def default_providers(device: torch.device, nanogpt: bool = False) -> list[str]:
    """The contestants of a table; on a CPU in bf16 only if the plan would choose bf16."""
    names, theirs = ["eager fp32", "compile fp32", "ours fp32"], ["eager fp32", "compile fp32"]
    if device.type == "cuda":
        names, theirs = ["eager fp32", "eager bf16", "compile bf16", "ours bf16"], ["compile bf16"]
    elif detect("cpu").has_bf16:
        names += ["eager bf16", "compile bf16", "ours bf16"]
    return [*names, *(f"nanogpt {name}" for name in theirs if nanogpt)]


def make_batches(setup: Setup, device: torch.device) -> list[list[Batch]]:
    """NUM_BATCHES steps of random tokens, because a contestant might profit from repeated text."""
    generator = torch.Generator().manual_seed(0)
    size = (setup.shape.B, setup.shape.T + 1)

    def micro() -> Batch:
        tokens = torch.randint(setup.config.vocab_size, size, generator=generator).to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return [[micro() for _ in range(setup.accum)] for _ in range(NUM_BATCHES)]


def prepare(name: str, setup: Setup, device: torch.device) -> tuple[TakeStep, StepRow]:
    """Build a contestant and warm it up.

    Returns:
        A function that trains one more step and returns the loss, (); and a row without a time.
    """
    contestant = find_provider(name, device, setup)(setup, device)
    turns = itertools.cycle(make_batches(setup, device))

    def take_step() -> Tensor:
        return contestant.step(next(turns))

    torch.get_device_module(device).synchronize()
    start = time.perf_counter()
    losses = [take_step().item()]  # reading the loss waits for the step's end
    first_step_s = time.perf_counter() - start
    grad_norm = contestant.grad_norm.item()
    losses += [take_step().item() for _ in range(1, WARMUP_STEPS)]
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = setup.row(name, tokens=setup.tokens, losses=losses, peak_gib=peak_gib)
    return take_step, replace(row, grad_norm=grad_norm, first_step_s=first_step_s)
