"""What a run is made of, into a checkpoint and back, so that N + M steps equal N, a kill, M.

The state at the top of a step is complete: weights, optimizer moments, generators, guard window,
the number of rows drawn, and how much of metrics.jsonl belongs to the steps done. Everything else
(order of the samples, schedule) is a function of those and of the recipe.
"""

import copy
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from model import GPT, export, hf
from training import checkpoint, schema
from training.checkpoint import Checkpoint, CheckpointError
from training.environment import package_version
from training.guard import Counts, Guard
from training.optim import AdamW, is_hidden_matrix
from training.plan import Plan
from training.recipes import Recipe
from training.schema import COUNT, MOST, Mismatch, Must
from training.sharding import Replicas
from training.step import GROWTH_STEPS

MOST_SKIPS = 1000  # a guard leaves out some rows per rollback and allows a few rollbacks


def _are_skips(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > MOST_SKIPS:
        return False
    with suppress(TypeError, ValueError):
        ranges = all(COUNT.holds(a) and COUNT.holds(b) and a < b for a, b in value)
        return ranges and len({first for first, _ in value}) == len(value)
    return False


def _is_scale(value: Any) -> bool:
    """As training/step.py leaves it: halved or doubled, and never halved below 1."""
    with suppress(TypeError, ValueError, OverflowError):
        scale, steps = value
        mantissa, exponent = math.frexp(scale)
        return mantissa == 0.5 and 0 <= exponent <= 128 and 0 <= steps < GROWTH_STEPS
    return False


_SKIPS = Must(f"at most {MOST_SKIPS} different ranges [first, last) with first < last", _are_skips)
_SCALE = Must(
    f"a scale, a power of two from 0.5 to 2^127, and a count below {GROWTH_STEPS}", _is_scale
)


@dataclass
class Progress:
    """Host-side state that moves with the steps; all JSON."""

    step: int = 0  # steps done
    position: int = 0  # rows drawn, see training/data.py
    # Row ranges [first, last) that a rollback told the loader to leave out.
    skips: Annotated[list[tuple[int, int]], _SKIPS] = field(default_factory=list)
    metrics_bytes: int = 0  # length of metrics.jsonl after the steps done
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)

    @property
    def best(self) -> int | None:
        """Step of the lowest validation loss so far."""
        return min(self.evaluations, key=lambda e: e[1], default=(None,))[0]

    @property
    def stale(self) -> int:
        """Evaluations since the best."""
        return sum(step > self.best for step, _ in self.evaluations if self.best is not None)


class State(TypedDict):
    """state.json of a checkpoint; its recipe and plan may be those of another version."""

    progress: Progress
    recipe: dict[str, float | str | bool | None]
    plan: dict[str, float | str | bool | list | None]
    made_on: NotRequired[dict[str, str | None]]
    loss_scale: NotRequired[Annotated[list[float], _SCALE]]
    guard: NotRequired[Counts]


STATE = schema.of(State)


def saved_recipe(saved: Checkpoint) -> dict[str, Any]:
    """The recipe of a checkpoint; Muon once was part of the plan."""
    return {"muon": saved.state["plan"].get("optimizer") == "muon", **saved.state["recipe"]}


def made_on(card: str) -> dict[str, str | None]:
    """What a choice by time holds for."""
    return {"card": card, "torch": torch.__version__, "triton": package_version("triton")}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name; {} before the first step.

    Of a sharded optimizer on rank 0 alone, and all ranks must call it.
    """
    shard, named = getattr(optimizer, "shard", Replicas()), {}
    for name, parameter in model.named_parameters() if optimizer.state else ():
        state = shard.to_first(parameter, optimizer.state.get(parameter, {}))
        named |= {f"{name}.{key}": value for key, value in state.items()}
    return named


def _generators() -> dict[str, Tensor]:
    """States of the process's random number generators: CPU, and every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda{i}": s for i, s in enumerate(cuda)}}


def _can_be_set(state: Tensor) -> bool:
    """Whether a generator takes it; those of devices that are not here are not tried."""
    on_cuda = len(state) == len(_CUDA_STATE)
    with suppress(RuntimeError):
        if not on_cuda or torch.cuda.is_available():
            torch.Generator("cuda" if on_cuda else "cpu").set_state(state)
        return True
    return False


_CUDA_STATE = torch.empty(16, dtype=torch.uint8)
_GENERATORS = dict.fromkeys(
    (f"cuda{i}?" for i in range(256)), schema.tensor(_CUDA_STATE, 0, 255, also=_can_be_set)
) | {"cpu": schema.tensor(torch.get_rng_state(), 0, 255, also=_can_be_set)}


@torch.no_grad()
def capture(
    progress: Progress,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    guard: Guard | None,
    recipe: Recipe,
    plan: Plan,
    data_sha256: str,
) -> Checkpoint:
    """Copy the run's state to the host, so that training may go on while the copy is written.

    `recipe`, `plan` and `data_sha256` are recorded to be compared on resume.
    """
    tensors = {
        "model": hf.file_tensors(model),
        "optimizer": optimizer_tensors(model, optimizer),
        "rng": _generators(),
    }
    state: dict[str, Any] = {
        "progress": asdict(progress),
        "recipe": {**asdict(recipe), "data_sha256": data_sha256},
        "plan": asdict(plan),
        "made_on": made_on(plan.device_name),
    }
    if isinstance(optimizer, AdamW) and optimizer.loss_scale is not None:
        state["loss_scale"] = optimizer.loss_scale.tolist()
    if guard is not None:
        tensors["guard"], state["guard"] = guard.tensors(), asdict(guard)
    copies = {
        # Into new memory of its own layout: what comes may be a transposed view.
        group: {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in named.items()}
        for group, named in tensors.items()
    }
    state = json.loads(json.dumps(state, allow_nan=False))  # which later changes do not reach
    config = export.hf_config(model, torch.float32)
    return Checkpoint(progress.step, copies, state, config, progress.best)


def expect(model: GPT, accept: Callable[[Checkpoint], object] = bool) -> checkpoint.Expected:
    """What `checkpoint.read` must find for a run of `model`, which may be on the device "meta".

    Args:
        model: Decides names and shapes.
        accept: Called once the state is known to be well formed; may raise to refuse it.
    """

    def tensors(saved: Checkpoint) -> dict[str, dict[str, Must]]:
        schema.check("state.json", saved.state, STATE)
        progress, steps = saved.state["progress"], saved.state["recipe"].get("max_steps")
        schema.check("state.json: max_steps", steps, COUNT)
        step = progress["step"]
        if step != saved.step or step > steps:
            raise Mismatch(
                f"state.json: {step} steps are done of {steps}, and the manifest says {saved.step}"
            )
        late = [at for at, _ in progress["evaluations"] if at > step]
        if late:  # it could be called the best, and never be found
            raise Mismatch(f"state.json: evaluated at step {late[0]}, and {step} are done")
        accept(saved)
        parameters, muon = dict(model.named_parameters()), saved_recipe(saved)["muon"]
        weights = parameters if saved.config is None else hf.file_tensors(model)
        moments: dict[str, Must] = {}
        for name, p in parameters.items() if step else ():  # before the first step there are none
            if muon and is_hidden_matrix(name, p):
                moments[f"{name}.momentum_buffer"] = schema.tensor(p)
            else:
                moments[f"{name}.step"] = schema.tensor(torch.empty(()), 0, step)
                moments[f"{name}.exp_avg"] = schema.tensor(p)
                moments[f"{name}.exp_avg_sq"] = schema.tensor(p, 0)
        model_schema = {name: schema.tensor(t) for name, t in weights.items()}
        groups = {"model": model_schema, "optimizer": moments, "rng": _GENERATORS}
        if "guard" in saved.state:
            live = Guard("cpu")
            groups["guard"] = {"count": schema.tensor(live.count, 0, MOST)}
            groups["guard"]["losses"] = schema.tensor(live.losses, nan=True)
        return groups

    return tensors


@torch.no_grad()
def restore(
    saved: Checkpoint, model: GPT, optimizer: torch.optim.Optimizer, guard: Guard | None
) -> Progress:
    """Put `saved` into live objects, in place, so that captured graphs keep their addresses.

    Raises:
        CheckpointError: it is not a checkpoint of this model. Nothing has been changed then.
    """
    try:
        schema.check("tensors", saved.tensors, expect(model)(saved))
        contexts = hf.read_contexts(saved.config or {}, "config.json", model.config.block_size)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {saved.path or ''}: {error}") from None
    # The run may be a fine-tuning whose --init is no longer named.
    model.trained_context = max(model.trained_context, contexts.get("trained_context", 1))
    model.fine_tuned_context = model.fine_tuned_context or contexts.get("fine_tuned_context")
    own = model.state_dict() if saved.config is None else hf.file_tensors(model)
    for name, value in saved.tensors["model"].items():
        own[name].copy_(value)
    parameters, shard = dict(model.named_parameters()), getattr(optimizer, "shard", Replicas())
    for key, value in saved.tensors["optimizer"].items():
        name, _, kind = key.rpartition(".")
        if (value := shard.part(parameters[name], value)) is None:
            continue
        state = optimizer.state[parameters[name]]
        if kind in state:
            state[kind].copy_(value)
        else:  # a step count stays where fused AdamW keeps it: beside the parameter
            state[kind] = value.to(parameters[name].device, copy=True)
    if isinstance(optimizer, AdamW):
        optimizer.refresh_working()
        if "loss_scale" in saved.state:
            values = torch.tensor(saved.state["loss_scale"], dtype=torch.float32)
            if optimizer.loss_scale is None:
                optimizer.loss_scale = values.to(next(model.parameters()).device)
            else:
                optimizer.loss_scale.copy_(values)
    if guard is not None and "guard" in saved.tensors:
        for name, tensor in guard.tensors().items():
            tensor.copy_(saved.tensors["guard"][name])
        vars(guard).update(saved.state["guard"])
    rng = saved.tensors["rng"]
    torch.set_rng_state(rng["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda{i}" in rng:
            torch.cuda.set_rng_state(rng[f"cuda{i}"], i)
    progress = Progress(**copy.deepcopy(saved.state["progress"]))
    progress.skips = [(first, last) for first, last in progress.skips]
    return progress
