"""What a run is made of, into a checkpoint and back, so that N + M steps equal N, a kill, M.

The state at the top of a step is complete: weights, optimizer moments, generators, guard window,
the number of rows drawn, and how much of metrics.jsonl belongs to the steps done. Everything else
(order of the samples, schedule) is a function of those and of the recipe.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels._launch import read_rows
from model import GPT, export, hf
from model.edge import one_line, quoted
from training import checkpoint, generators, schema
from training.checkpoint import Checkpoint, CheckpointError
from training.choices import Choices
from training.distributed import World
from training.environment import package_version
from training.guard import Guard, GuardConfig
from training.machines import Machine
from training.metrics import RunLog
from training.optim import AdamW, is_hidden_matrix
from training.plan import Plan
from training.recipes import Recipe
from training.schema import COUNT, MOST, NUMBER, SCALAR, Every, Must

# A guard leaves out some rows per rollback and allows a few rollbacks.
_LIMITS, MOST_SKIPS = GuardConfig(), 1000
_SKIPS = Must(
    f"at most {MOST_SKIPS} different ranges [first, last) with first < last",
    lambda v: isinstance(v, list) and len(v) <= MOST_SKIPS and all(map(_is_range, v))
    and len({first for first, _ in v}) == len(v),
)  # fmt: skip
_POSITIONS = Must(
    f"the rows of at most {_LIMITS.patience} bad steps",
    lambda v: isinstance(v, list) and len(v) <= _LIMITS.patience and all(map(COUNT.holds, v)),
)
STATE = {
    "progress": {
        "step": COUNT,
        "position": COUNT,
        "skips": _SKIPS,
        "metrics_bytes": COUNT,
        "evaluations": [(COUNT, NUMBER)],
    },
    "recipe": Every(SCALAR),
    "plan": Every(Must("a plain value", lambda v: isinstance(v, list) or SCALAR.holds(v))),
    "made_on?": Every(SCALAR),
    "loss_scale?": Must(
        "a scale above 0 and a count",
        lambda v: (
            isinstance(v, list)
            and len(v) == 2
            and all(map(NUMBER.holds, v))
            and v[0] > 0
            and v[1] >= 0
        ),
    ),
    "guard?": {
        "in_a_row": schema.count(_LIMITS.patience),
        "skipped": COUNT,
        "rollbacks": schema.count(_LIMITS.max_rollbacks),
        "positions": _POSITIONS,
    },
}

# What is chosen by time, or by the memory that was free, and goes on as it was on the same card.
ADOPTED = {
    "ops": Must("text", lambda v: isinstance(v, str)),
    "compile": Must("a flag", lambda v: isinstance(v, bool)),
    "recompute": Must("a flag", lambda v: isinstance(v, bool)),
    "compile_scope": Must("a scope", lambda v: v in ("model", "blocks")),
    "micro_batch_size": COUNT,
    "optimizer": Must("an optimizer", lambda v: v in ("torch", "triton")),
    "launches": Must("launch rows", lambda v: isinstance(v, str) and _are_rows(v)),
}
_SHAPE = ("model", "batch_size", "grad_accum_steps", "block_size")
# Fields of a recipe that change no step but the last, and of a plan that change no bit of a loss.
_SAME_STEPS = {"keep", "patience", "epochs"}  # epochs: max_steps says what they are
_ENDS = {"max_steps", "horizon_steps"}  # of a recipe, which a cool-down sets
_SAME_LOSSES = {"cuda_graph", "shard", "recompute", "eval_tokens", "memory_bytes", "notes"}


def _are_rows(text: str) -> bool:
    with suppress(ValueError, TypeError, AttributeError, RecursionError):  # it may be a stranger's
        return any(read_rows(text))
    return False


def _is_range(value: Any) -> bool:
    pair = isinstance(value, list) and [*map(COUNT.holds, value)] == [True] * 2
    return pair and value[0] < value[1]


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what may help."""


@dataclass
class Progress:
    """Host-side state that moves with the steps; all JSON.

    Args:
        step: Steps done.
        position: Rows drawn, see training/data.py.
        skips: Row ranges [first, last) that a rollback told the loader to leave out.
        metrics_bytes: Length of metrics.jsonl after the steps done.
        evaluations: (step, validation loss) so far.
    """

    step: int = 0
    position: int = 0
    skips: list[tuple[int, int]] = field(default_factory=list)
    metrics_bytes: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> int | None:
        """Step of the lowest validation loss so far."""
        return min(self.evaluations, key=lambda e: e[1], default=(None,))[0]

    @property
    def stale(self) -> int:
        """Evaluations since the best."""
        return sum(step > self.best for step, _ in self.evaluations if self.best is not None)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name; {} before the first step.

    Of a sharded optimizer on rank 0 alone, and all ranks must call it.
    """
    shard, named = getattr(optimizer, "shard", None), {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if shard and optimizer.state:
            state = shard.to_first(parameter, state)
        named |= {f"{name}.{key}": value for key, value in state.items()}
    return named


def capture(
    progress: Progress,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    guard: Guard | None,
    recipe: Recipe,
    plan: Plan,
    data_sha256: str,
) -> Checkpoint:
    """Copy the run's state to the host.

    Args:
        progress: Host state; `step` names the checkpoint.
        model, optimizer, guard: Live device state; `guard` is None where it is off.
        recipe, plan, data_sha256: Recorded to be compared on resume.
    """
    tensors: dict[str, dict[str, Tensor]] = {
        "model": hf.file_tensors(model),
        "optimizer": optimizer_tensors(model, optimizer),
        "rng": generators.states(),
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
        tensors["guard"] = guard.tensors()
        state["guard"] = guard.state()
    config = export.hf_config(model, torch.float32)
    return checkpoint.snapshot(progress.step, tensors, state, config, progress.best)


def expect(model: GPT, accept: Callable[[Checkpoint], object] = bool) -> checkpoint.Expected:
    """What `checkpoint.read` must find for a run of `model`, which may be on the device "meta".

    Args:
        model: Decides names and shapes.
        accept: Called once the state is known to be well formed; may raise to refuse it.
    """

    def tensors(saved: Checkpoint) -> dict[str, dict[str, Must]]:
        schema.check("state.json", saved.state, STATE)
        step, steps = saved.state["progress"]["step"], saved.state["recipe"].get("max_steps")
        schema.check("state.json: max_steps", steps, COUNT)
        if step != saved.step or step > steps:
            raise schema.Mismatch(
                f"state.json: {step} steps are done of {steps}, and the manifest says {saved.step}"
            )
        late = [at for at, _ in saved.state["progress"]["evaluations"] if at > step]
        if late:  # it could be called the best, and never be found
            raise schema.Mismatch(f"state.json: evaluated at step {late[0]}, and {step} are done")
        accept(saved)
        parameters = dict(model.named_parameters())
        muon = saved.state["recipe"].get("muon")
        weights = parameters if saved.config is None else hf.file_tensors(model)
        groups = {
            "model": {name: schema.tensor(t) for name, t in weights.items()},
            "optimizer": {
                f"{name}.{kind}": of
                for name, p in parameters.items()
                for kind, of in (
                    {"momentum_buffer": schema.tensor(p)}
                    if muon and is_hidden_matrix(name, p)
                    else {
                        "step": schema.tensor(torch.empty(()), 0, step),
                        "exp_avg": schema.tensor(p),
                        "exp_avg_sq": schema.tensor(p, 0),
                    }
                ).items()
                if step  # before the first step there are none
            },
            "rng": generators.EXPECTED,
        }
        if "guard" in saved.state:
            window = torch.empty(GuardConfig().window)
            count = torch.empty((), dtype=torch.int64)
            groups["guard"] = {
                "losses": schema.tensor(window, nan=True),
                "count": schema.tensor(count, 0, MOST),
            }
        return groups

    return tensors


def restore(
    saved: Checkpoint,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    guard: Guard | None,
) -> Progress:
    """Put `saved` into live objects, in place, so that captured graphs keep their addresses.

    Returns:
        The progress to go on from.

    Raises:
        CheckpointError: it is not a checkpoint of this model. Nothing has been changed then.
    """
    try:
        groups = expect(model)(saved)
        schema.check("tensors", saved.tensors, groups)
        contexts = hf.read_contexts(saved.config or {}, "config.json", model.config.block_size)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {saved.path or ''}: {error}") from None
    # The run may be a fine-tuning whose --init is no longer named.
    model.trained_context = max(model.trained_context, contexts.get("trained_context", 1))
    model.fine_tuned_context = model.fine_tuned_context or contexts.get("fine_tuned_context")
    own = model.state_dict() if saved.config is None else hf.file_tensors(model)
    for name, value in saved.tensors["model"].items():
        own[name].copy_(value)
    parameters, shard = dict(model.named_parameters()), getattr(optimizer, "shard", None)
    for key, value in saved.tensors["optimizer"].items():
        name, _, kind = key.rpartition(".")
        if shard and not shard.owns(parameters[name]):
            continue
        state = optimizer.state[parameters[name]]
        if kind in state:
            state[kind].copy_(value)
        else:
            # A step count stays where fused AdamW keeps it: beside the parameter.
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
        guard.load(saved.tensors["guard"], saved.state["guard"])
    generators.restore(saved.tensors["rng"])
    values = dict(saved.state["progress"])
    values["skips"] = [(a, b) for a, b in values["skips"]]
    values["evaluations"] = [(a, float(b)) for a, b in values["evaluations"]]
    return Progress(**values)


def roll_back(
    folder: Path,
    world: World,
    action: str,
    guard: Guard,
    log: RunLog,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    rows_per_step: int,
) -> Progress:
    """Back to the last good checkpoint, with the data of the bad steps left out from now on.

    Args:
        folder: Run folder; no checkpoint is being written.
        world: The ranks.
        action: "rollback" or "give_up", as the guard said.
        guard, log, model, optimizer: Live; taken back.
        rows_per_step: Rows a bad step drew.

    Raises:
        RunFailed: no rollbacks are left, or there is nothing to go back to.
    """
    expected = expect(model)

    def newest() -> Checkpoint | None:
        return checkpoint.newest_good(folder / "checkpoints", log.say, expected)

    try:
        found = _agreed(f"rollback {guard.rollbacks}", newest, world)
    except ValueError as error:
        raise RunFailed(f"guard: {error}") from None
    if action == "give_up" or found is None:
        why = "there is no checkpoint to go back to" if found is None else "no rollbacks are left"
        raise RunFailed(
            f"guard: {guard.in_a_row} bad steps in a row up to step {log.records[-1].step} and "
            f"{why} ({guard.rollbacks} done); {folder}/metrics.jsonl has every event. A lower "
            "--max-lr or another --seed may help"
        )
    rollbacks, skipped = guard.rollbacks + 1, guard.skipped
    ranges = [(end - rows_per_step, end) for end in guard.positions]
    progress = restore(found, model, optimizer, guard)
    guard.rollbacks, guard.skipped = rollbacks, skipped
    progress.skips += [r for r in ranges if r not in progress.skips]
    log.rewind(progress.step)
    log.event("rolled_back", to_step=progress.step, skips=ranges, rollbacks=rollbacks)
    log.say(f"guard: back to step {progress.step}, leaving out the rows {ranges}")
    return progress


def find(
    choice: str,
    folder: Path,
    world: World,
    recipe: Recipe,
    data_sha256: str,
    override: bool = False,
    cooldown: bool = False,
) -> Checkpoint | None:
    """The checkpoint to go on from: rank 0 decides, and sends it to the others.

    Args:
        choice: "auto", "never", or the path of a checkpoint or of a run folder.
        folder: The run's own folder.
        world: The ranks.
        recipe, data_sha256, override, cooldown: As `check_recipe` takes them.

    Raises:
        CheckpointError: a path was given and nothing usable is there.
        ValueError: the recipe is another one.
    """
    with torch.device("meta"):
        model = GPT(recipe.model_config)
    how = (recipe, data_sha256, override, cooldown)
    expected = expect(model, lambda saved: check_recipe(saved, *how))

    def choose() -> Checkpoint | None:
        if choice == "never":
            return None
        path = folder if choice == "auto" else Path(os.path.realpath(choice))
        if choice != "auto" and not (path / "checkpoints").is_dir():
            return checkpoint.read(path, expected)
        found = checkpoint.newest_good(path / "checkpoints", world.say, expected)
        begun = override and checkpoint.paths(path / "checkpoints")
        must = choice != "auto" or cooldown or begun
        if found is None and must:
            raise CheckpointError(
                f"checkpoint {path}: the folder holds none that can be used; --resume names "
                "another, --resume never starts afresh"
            )
        return found

    return _agreed("checkpoint", choose, world)


def _agreed(key: str, choose: Callable[[], Checkpoint | None], world: World) -> Checkpoint | None:
    """What rank 0 chooses, on every rank; the others need not see its disk."""
    found = choose() if world.is_main else None
    plain = {f.name for f in fields(Checkpoint)} - {"tensors", "path"}

    def describe() -> dict[str, Any] | None:
        return found and {name: getattr(found, name) for name in plain} | {"path": str(found.path)}

    if (facts := world.first(key, describe)) is None:
        return None
    tensors = world.send(f"{key} tensors", found.tensors if found else {})
    return Checkpoint(**{**facts, "path": Path(facts["path"]), "tensors": tensors})


def cool_down(saved: Checkpoint, recipe: Recipe) -> Recipe:
    """`recipe`, falling to its end from `saved` on; where that has begun, as it was begun.

    Raises:
        ValueError: its schedule is another, or still in the warm-up.
    """
    if recipe.schedule != "wsd" or saved.step < recipe.warmup_steps:
        raise ValueError(
            f"cooldown: the schedule must be wsd, past its warm-up of {recipe.warmup_steps} steps, "
            f"got {recipe.schedule} at step {saved.step}; train with --schedule wsd"
        )
    known = saved.state["recipe"]
    begun = replace(recipe, **{n: known[n] for n in _ENDS if COUNT.holds(known.get(n))})
    if saved.step > (begun.horizon_steps or begun.max_steps) - begun.decay_steps:
        return begun
    return recipe.cooled_down_from(saved.step)


def check_recipe(
    saved: Checkpoint, recipe: Recipe, data_sha256: str, override: bool, cooldown: bool = False
) -> list[str]:
    """Lines about a recipe that is not the one saved.

    Raises:
        ValueError: fields differ and `override` is off; the message names each with both values.
            Or `cool_down`'s, where that is asked for.
    """
    if cooldown:
        cool_down(saved, recipe)
    before = {**asdict(Recipe()), **saved.state["recipe"]}  # fields of a later version: as default
    now = {**asdict(recipe), "data_sha256": data_sha256}
    before.update({name: now[name] for name in _SAME_STEPS | (_ENDS if cooldown else set())})
    changed = _differences(before, now)
    if changed and not override:
        raise ValueError(
            f"resume: the checkpoint of step {saved.step} was made with another recipe: "
            f"{'; '.join(changed)}. --override goes on with the new one, --resume never starts "
            "afresh"
        )
    if before["muon"] != recipe.muon:
        raise ValueError(
            f"resume: neither of Muon and AdamW can go on from the other's state; "
            f"--{'' if before['muon'] else 'no-'}muon goes on, --resume never starts afresh"
        )
    return [f"resume: recipe overridden: {change}" for change in changed]


def check_rate(saved: Checkpoint, recipe: Recipe) -> list[str]:
    """A line about a learning rate that is not the one the saved recipe would go on at."""
    step, known = saved.step, {f.name for f in fields(Recipe)}
    with suppress(TypeError, ValueError):  # a recipe of another version
        before = Recipe(**{k: v for k, v in saved.state["recipe"].items() if k in known})
        was, now = before.learning_rate(max(step - 1, 0)), recipe.learning_rate(step)
        if not math.isclose(now, before.learning_rate(step), rel_tol=0.01):
            return [
                f"resume: the learning rate was {was:.2e} in the last step and goes on at "
                f"{now:.2e}; --max-lr, --min-lr and --horizon-steps decide it"
            ]
    return []


def made_on(card: str) -> dict[str, str | None]:
    """What a choice by time holds for."""
    return {"card": card, "torch": torch.__version__, "triton": package_version("triton")}


def adopt(
    saved: Checkpoint | None, asked: Choices, recipe: Recipe, machine: Machine
) -> tuple[dict[str, Any], list[str]]:
    """What a plan on a GPU takes over from a checkpoint where nothing is asked for, and a line."""
    if saved is None or machine.device != "cuda" or "made_on" not in saved.state:
        return {}, []
    if changed := _differences(saved.state["made_on"], made_on(machine.name)):
        return {}, [f"resume: {'; '.join(changed)}: the plan is chosen anew"]
    before, plan = saved.state["recipe"], saved.state["plan"]
    if asked.tune in ("on", "only") or any(before.get(k) != getattr(recipe, k) for k in _SHAPE):
        return {}, []
    kept = {name: plan[name] for name, must in ADOPTED.items() if must.holds(plan.get(name))}
    kept = {name: value for name, value in kept.items()
            if getattr(asked.or_else({name: value}), name, value) == value}  # fmt: skip
    what = ", ".join(f"{name} {one_line(value, 60)}" for name, value in kept.items())
    return kept, [f"resume: on this card as before: {what}"] * bool(kept)


def check_plan(saved: Checkpoint, plan: Plan) -> list[str]:
    """Lines about plan fields that differ: the same samples follow, the last bits may not."""
    now = {k: v for k, v in asdict(plan).items() if k not in _SAME_LOSSES}
    then = {k: saved.state["plan"].get(k, getattr(Plan, k, None)) for k in now}
    changed = _differences(then, now)
    if not changed:
        return []
    return [f"resume: another plan ({'; '.join(changed)}): same samples, losses equal to rounding"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{one_line(name)} was {quoted(before.get(name))}, now {quoted(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
