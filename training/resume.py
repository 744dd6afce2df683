"""The checkpoint that a run resumes from, and what has changed since it was written."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels._launch import read_rows
from model import GPT
from model.edge import one_line, quoted
from training import schema
from training.checkpoint import Checkpoint, CheckpointError, newest_good, paths, read
from training.distributed import World
from training.folder import CHECKPOINTS
from training.guard import Guard
from training.machines import Machine
from training.metrics import RunLog
from training.optim import AdamW
from training.plan import Choices, Plan
from training.recipes import Recipe
from training.run import Run
from training.state import Progress, expect, made_on, restore, saved_recipe

# Parts of a plan that depend on measured times or free memory. On the same card they stay.
_ADOPTED = ("ops", "compile", "recompute", "compile_scope", "micro_batch_size", "optimizer")
_SHAPE = ("model", "batch_size", "grad_accum_steps", "block_size")
# Fields of a recipe that only change which step is the last; epochs become max_steps.
_SAME_STEPS = {"keep", "patience", "epochs"}
_ENDS = {"max_steps", "horizon_steps"}  # fields of a recipe that a cool-down sets
_MOST_SHOWN = 40  # differences; a recipe has fewer fields, a forged checkpoint may have any number
# Fields of a plan that change no bit of a loss.
_SAME_LOSSES = {"cuda_graph", "shard", "recompute", "eval_tokens", "memory_bytes", "notes"}


def _are_rows(text: Any) -> bool:
    with suppress(ValueError, TypeError, AttributeError, RecursionError):  # may be a stranger's
        return isinstance(text, str) and any(read_rows(text))
    return False


class RunFailed(RuntimeError):
    """The run cannot continue; the message says why and what may help."""


def roll_back(
    run: Run, action: str, guard: Guard, log: RunLog, model: GPT, optimizer: AdamW
) -> Progress:
    """Return to the last good checkpoint and leave out the data of the bad steps.

    Args:
        run: No checkpoint of it is being written.
        action: "rollback" or "give_up", from the guard.
        guard, log, model, optimizer: To be set back.

    Raises:
        RunFailed: no rollbacks are left, or there is nothing to go back to.
    """
    newest = partial(newest_good, run.out / CHECKPOINTS, log.say, partial(expect, model))
    try:
        found = _agreed(f"rollback {guard.rollbacks}", newest, run.world)
    except ValueError as error:
        raise RunFailed(f"guard: {error}") from None
    if action == "give_up" or found is None:
        why = "there is no checkpoint to go back to" if found is None else "no rollbacks are left"
        raise RunFailed(
            f"guard: {guard.in_a_row} bad steps in a row up to step {log.records[-1].step} and "
            f"{why} ({guard.rollbacks} done); {run.out}/metrics.jsonl has every event. A lower "
            "--max-lr or another --seed may help"
        )
    rollbacks, skipped = guard.rollbacks + 1, guard.skipped
    ranges = [(end - run.recipe.rows_per_step, end) for end in guard.positions]
    progress = restore(found, model, optimizer, guard)
    guard.rollbacks, guard.skipped = rollbacks, skipped
    progress.skips += [r for r in ranges if r not in progress.skips]
    log.rewind(progress.step)
    log.event("rolled_back", to_step=progress.step, skips=ranges, rollbacks=rollbacks)
    rows = ", ".join(f"{first:,} to {end - 1:,}" for first, end in ranges)
    log.say(f"guard: back to step {progress.step}, leaving out the rows {rows}")
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
    """The checkpoint to resume from; rank 0 chooses it and sends it to the others.

    Args:
        choice: "auto", "never", or the path of a checkpoint or of a run folder.
        folder: The run's own folder.
        world: The ranks.
        recipe, data_sha256, override, cooldown: See `check_recipe`.

    Raises:
        CheckpointError: a path was given, but nothing usable is there.
        ValueError: `check_recipe` refuses the checkpoint.
    """
    with torch.device("meta"):
        model = GPT(recipe.model_config)
    how = recipe, data_sha256, override, cooldown
    expected = partial(expect, model, accept=lambda saved: check_recipe(saved, *how))

    def choose() -> Checkpoint | None:
        if choice == "never":
            return None
        path = folder if choice == "auto" else Path(os.path.realpath(choice))
        if choice != "auto" and not (path / CHECKPOINTS).is_dir():
            return read(path, expected)
        found = newest_good(path / CHECKPOINTS, world.say, expected)
        begun = override and paths(path / CHECKPOINTS)
        if found is None and (choice != "auto" or cooldown or begun):
            raise CheckpointError(
                f"checkpoint {path}: the folder holds none that can be used; --resume names "
                "another, --resume never starts afresh"
            )
        return found

    return _agreed("checkpoint", choose, world)


def _agreed(key: str, choose: Callable[[], Checkpoint | None], world: World) -> Checkpoint | None:
    """What rank 0 chooses, on every rank; the others need no access to its disk."""
    found = choose() if world.is_main else None
    mine = {**vars(found), "tensors": {}, "path": str(found.path)} if found else None
    if (facts := world.first(key, lambda: mine)) is None:
        return None
    tensors = world.send(f"{key} tensors", found.tensors if found else {})
    return Checkpoint(**facts | {"path": Path(facts["path"]), "tensors": tensors})


def cool_down(saved: Checkpoint, recipe: Recipe) -> Recipe:
    """`recipe` with its decay starting at `saved`; a decay that has already started continues.

    Raises:
        ValueError: the schedule is not wsd, or still in its warm-up.
    """
    if recipe.schedule != "wsd" or saved.step < recipe.warmup_steps:
        raise ValueError(
            f"cooldown: the schedule must be wsd, past its warm-up of {recipe.warmup_steps} steps, "
            f"got {recipe.schedule} at step {saved.step}; train with --schedule wsd"
        )
    known = saved.state["recipe"]
    begun = replace(recipe, **{n: known[n] for n in _ENDS if schema.COUNT.holds(known.get(n))})
    if saved.step > (begun.horizon_steps or begun.max_steps) - begun.decay_steps:
        return begun
    return recipe.cooled_down_from(saved.step)


def check_recipe(
    saved: Checkpoint, recipe: Recipe, data_sha256: str, override: bool, cooldown: bool = False
) -> list[str]:
    """Lines about what differs from the saved recipe, and about a jump of the learning rate.

    Args:
        saved: Read and checked.
        recipe, data_sha256: Of the run that resumes.
        override: Accept another recipe.
        cooldown: Begin the decay of a wsd schedule; see `cool_down`.

    Raises:
        ValueError: fields differ and `override` is off; the message names each with both values.
    """
    if cooldown:
        recipe = cool_down(saved, recipe)
    before = {**asdict(Recipe()), **saved_recipe(saved)}  # a field it lacks is the default
    now = {**asdict(recipe), "data_sha256": data_sha256}
    before.update({name: now[name] for name in _SAME_STEPS | (_ENDS if cooldown else set())})
    changed = _differences(before, now)
    if changed and not override:
        raise ValueError(
            f"resume: the checkpoint of step {saved.step} was made with another recipe or text: "
            f"{'; '.join(changed)}. --override goes on with the new one, --resume never starts "
            "afresh"
        )
    if before["muon"] != recipe.muon:
        raise ValueError(
            f"resume: neither of Muon and AdamW can go on from the other's state; "
            f"--{'' if before['muon'] else 'no-'}muon goes on, --resume never starts afresh"
        )
    lines = [f"resume: recipe overridden: {change}" for change in changed]
    step, known = saved.step, {f.name for f in fields(Recipe)}
    # It may be of another version, or a stranger's.
    with suppress(TypeError, ValueError, AttributeError):
        old = Recipe(**{k: v for k, v in saved.state["recipe"].items() if k in known})
        was, now_at = old.learning_rate(max(step - 1, 0)), recipe.learning_rate(step)
        if not math.isclose(now_at, old.learning_rate(step), rel_tol=0.01):
            lines.append(
                f"resume: the learning rate was {was:.2e} in the last step and goes on at "
                f"{now_at:.2e}; --max-lr, --min-lr and --horizon-steps decide it"
            )
    return lines


def adopt(
    saved: Checkpoint | None, asked: Choices, recipe: Recipe, machine: Machine
) -> tuple[dict[str, Any], list[str]]:
    """What a plan on a GPU keeps from a checkpoint unless a flag sets it; and a line about it."""
    if saved is None or machine.device != "cuda" or "made_on" not in saved.state:
        return {}, []
    if changed := _differences(saved.state["made_on"], made_on(machine.name)):
        return {}, [f"resume: {'; '.join(changed)}: the plan is chosen anew"]
    before, plan = saved.state["recipe"], saved.state["plan"]
    if asked.tune in ("on", "only") or any(before.get(k) != getattr(recipe, k) for k in _SHAPE):
        return {}, []
    can_be = {"launches": schema.Must("launch rows", _are_rows), **schema.of(Choices)}
    kept: dict[str, Any] = {}
    for name in (*_ADOPTED, "launches"):
        value = plan.get(name)  # may be anything, from another version or a stranger
        usable = value is not None and can_be[name].holds(value)
        if usable and getattr(asked.or_else({name: value}), name, value) == value:
            kept[name] = value
    what = ", ".join(f"{name} {one_line(value, 60)}" for name, value in kept.items())
    return kept, [f"resume: on this card as before: {what}"] * bool(kept)


def check_plan(saved: Checkpoint, plan: Plan) -> list[str]:
    """A line if parts of the plan differ that may change the last bits of a loss."""
    now = {k: v for k, v in asdict(plan).items() if k not in _SAME_LOSSES}
    then = {k: saved.state["plan"].get(k, getattr(Plan, k, None)) for k in now}
    changed = "; ".join(_differences(then, now))
    line = f"resume: another plan ({changed}): same samples, losses equal to rounding"
    return [line] if changed else []


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    shown, more = names[:_MOST_SHOWN], len(names) - _MOST_SHOWN
    lines = [
        f"{one_line(name, 80)} was {quoted(before.get(name))}, now {quoted(now.get(name))}"
        for name in shown
    ]
    return lines + [f"{more:,} more differ"] * (more > 0)
