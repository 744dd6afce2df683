"""A run's state, to a checkpoint and back, so that N steps, a kill and M steps equal N + M.

At the top of a step a run's state is its weights, optimizer moments, random generators, the guard's
window, the number of rows drawn, and how much of metrics.jsonl belongs to the steps done.
Everything else (order of the samples, schedule) follows from these and from the recipe.
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
from training import schema
from training.checkpoint import Checkpoint, CheckpointError
from training.environment import package_version
from training.guard import Counts, Guard
from training.optim import AdamW, is_hidden_matrix
from training.plan import Plan
from training.recipes import Recipe
from training.schema import COUNT, MOST, Mismatch, Must
from training.step import GROWTH_STEPS

MOST_SKIPS = 1000  # a guard leaves out some rows per rollback and allows a few rollbacks


def _are_skips(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        firsts = {a for a, b in value if COUNT.holds(a) and COUNT.holds(b) and a < b}
        return isinstance(value, list) and len(firsts) == len(value) <= MOST_SKIPS
    return False


def _is_scale(value: Any) -> bool:
    """What training/step.py can leave: it halves and doubles the scale, not below 0.5."""
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
    """The host's state that changes with the steps, all of it JSON."""

    step: int = 0  # steps done
    position: int = 0  # rows drawn, see training/data.py
    # Ranges [first, last) of rows that the loader leaves out since a rollback.
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
    """state.json of a checkpoint; recipe and plan may be those of another version."""

    progress: Progress
    recipe: dict[str, float | str | bool | None]
    plan: dict[str, float | str | bool | list | None]
    made_on: NotRequired[dict[str, str | None]]
    loss_scale: NotRequired[Annotated[list[float], _SCALE]]
    guard: NotRequired[Counts]


STATE = schema.of(State)


def saved_recipe(saved: Checkpoint) -> dict[str, Any]:
    """The recipe of a checkpoint; in older ones Muon is part of the plan."""
    return {"muon": saved.state["plan"].get("optimizer") == "muon", **saved.state["recipe"]}


def made_on(card: str) -> dict[str, str | None]:
    """What measured times depend on, and so the choices made from them."""
    return {"card": card, "torch": torch.__version__, "triton": package_version("triton")}


def optimizer_tensors(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Moments and step counts by parameter name; {} before the first step.

    If the optimizer is sharded, all ranks must call this, and only rank 0 gets the tensors.
    """
    named = {}
    for name, parameter in model.named_parameters() if optimizer.state else ():
        state = optimizer.shard.to_first(parameter, optimizer.state.get(parameter, {}))
        named |= {f"{name}.{key}": value for key, value in state.items()}
    return named


def _generator(device: str, num_bytes: int) -> Must:
    """The state of a random number generator; it is tried if the device is there."""

    def holds(state: Tensor) -> bool:
        if state.dtype != torch.uint8 or state.shape != (num_bytes,):
            return False
        with suppress(RuntimeError):
            if device == "cpu" or torch.cuda.is_available():
                torch.Generator(device).set_state(state)
            return True
        return False

    return Must(f"the state of a generator on {device}, {num_bytes} bytes", holds, num_bytes)


_GENERATORS = dict.fromkeys((f"cuda{i}?" for i in range(256)), _generator("cuda", 16))
_GENERATORS["cpu"] = _generator("cpu", len(torch.get_rng_state()))


@torch.no_grad()
def capture(
    progress: Progress,
    model: GPT,
    optimizer: AdamW,
    guard: Guard | None,
    recipe: Recipe,
    plan: Plan,
    data_sha256: str,
) -> Checkpoint:
    """Copy the run's state to the host, so that training can go on while the copy is written."""
    # Of the current GPU. Each rank draws alike on its own, so this state is every rank's.
    cuda = {"cuda0": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    tensors = {
        "model": hf.file_tensors(model),
        "optimizer": optimizer_tensors(model, optimizer),
        "rng": {"cpu": torch.get_rng_state(), **cuda},
    }
    state: dict[str, Any] = {
        "progress": asdict(progress),
        "recipe": {**asdict(recipe), "data_sha256": data_sha256},
        "plan": asdict(plan),
        "made_on": made_on(plan.device_name),
    }
    if optimizer.loss_scale is not None:
        state["loss_scale"] = optimizer.loss_scale.tolist()
    if guard is not None:
        tensors["guard"], state["guard"] = guard.tensors(), asdict(guard)
    copies = {
        # Into new, contiguous memory: the source may be a transposed view.
        group: {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in named.items()}
        for group, named in tensors.items()
    }
    state = json.loads(json.dumps(state, allow_nan=False))  # later steps must not change it
    config = export.hf_config(model, torch.float32)
    return Checkpoint(progress.step, copies, state, config, progress.best)


def expect(
    model: GPT, saved: Checkpoint, accept: Callable[[Checkpoint], object] = bool
) -> dict[str, dict[str, Must]]:
    """What the tensors of a checkpoint must be; its other parts are checked here.

    Args:
        model: Decides names and shapes; it may be on the device "meta".
        saved: Without its tensors.
        accept: Called with `saved` once its state is well formed; may raise to refuse it.
    """
    schema.check("state.json", saved.state, STATE)
    progress, steps = saved.state["progress"], saved.state["recipe"].get("max_steps")
    schema.check("state.json: max_steps", steps, COUNT)
    step = progress["step"]
    if step != saved.step or step > steps:
        raise Mismatch(
            f"state.json: {step} of {steps} steps are done, {saved.step} by the manifest"
        )
    late = [at for at, _ in progress["evaluations"] if at > step]
    if late:  # one could be the best, and its checkpoint would never be found
        raise Mismatch(f"state.json: evaluated at step {late[0]}, but only {step} are done")
    accept(saved)
    muon, moments = saved_recipe(saved)["muon"], {}
    for name, p in model.named_parameters() if step else ():  # none before the first step
        if muon and is_hidden_matrix(name, p):
            moments[f"{name}.momentum_buffer"] = schema.tensor(p)
        else:
            moments[f"{name}.step"] = schema.tensor(torch.empty(()), 0, step)
            moments[f"{name}.exp_avg"] = schema.tensor(p)
            moments[f"{name}.exp_avg_sq"] = schema.tensor(p, 0)
    weights = {name: schema.tensor(t) for name, t in hf.file_tensors(model).items()}
    groups = {"model": weights, "optimizer": moments, "rng": _GENERATORS}
    if "guard" in saved.state:
        live = Guard("cpu")
        groups["guard"] = {"count": schema.tensor(live.count, 0, MOST)}
        groups["guard"]["losses"] = schema.tensor(live.losses, nan=True)
    return groups


@torch.no_grad()
def restore(saved: Checkpoint, model: GPT, optimizer: AdamW, guard: Guard | None) -> Progress:
    """Copy `saved` into live tensors, whose addresses captured graphs hold.

    Raises:
        CheckpointError: it is not a checkpoint of this model; nothing has been changed.
    """
    try:
        schema.check("tensors", saved.tensors, expect(model, saved))
        contexts = hf.read_contexts(saved.config, "config.json", model.config.block_size)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {saved.path or ''}: {error}") from None
    # In a fine-tuning run these came from --init, which need not be named again.
    model.trained_context = max(model.trained_context, contexts.get("trained_context", 1))
    model.fine_tuned_context = model.fine_tuned_context or contexts.get("fine_tuned_context")
    for name, tensor in hf.file_tensors(model).items():
        tensor.copy_(saved.tensors["model"][name])
    parameters = dict(model.named_parameters())
    for key, value in saved.tensors["optimizer"].items():
        name, _, kind = key.rpartition(".")
        parameter = parameters[name]
        if (value := optimizer.shard.part(parameter, value)) is None:
            continue
        state = optimizer.state[parameter]
        if kind in state:
            state[kind].copy_(value)
        else:
            state[kind] = value.to(parameter.device, copy=True)
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
    if "cuda0" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda0"])
    progress = Progress(**copy.deepcopy(saved.state["progress"]))
    progress.skips = [(first, last) for first, last in progress.skips]
    return progress
