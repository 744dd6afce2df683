"""What a run is made of, into a checkpoint and back, so that N + M steps equal N, a kill, M.

The state at the top of a step is complete: weights, optimizer moments, generators, guard window,
the number of rows drawn, and how much of metrics.jsonl belongs to the steps done. Everything else
(order of the samples, schedule) is a function of those and of the recipe.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT, hf
from training import checkpoint
from training.checkpoint import Checkpoint, CheckpointError
from training.distributed import World, refuse_mismatch
from training.guard import Guard
from training.metrics import RunLog
from training.optim import AdamW
from training.plan import Plan
from training.recipes import Recipe

# Fields of a plan that may change the last bits of a loss.
_NUMERICS = ("device", "device_name", "num_threads", "ops", "dtype", "compile",
             "micro_batch_size", "num_micro_batches", "compile_scope", "optimizer",
             "working_copies", "residual")  # fmt: skip


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


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name; {} before the first step."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


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
        "optimizer": _optimizer_tensors(model, optimizer),
        "rng": checkpoint.rng_state(),
    }
    state: dict[str, Any] = {
        "progress": asdict(progress),
        "recipe": {**asdict(recipe), "data_sha256": data_sha256},
        "plan": asdict(plan),
    }
    if guard is not None:
        tensors["guard"] = guard.tensors()
        state["guard"] = guard.state()
    config = hf.hf_config(model, torch.float32)
    return checkpoint.snapshot(progress.step, tensors, state, config, progress.best)


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
        CheckpointError: names or shapes are not those of this model.
    """
    own = model.state_dict() if saved.config is None else hf.file_tensors(model)
    _same_names("model", set(own), set(saved.tensors["model"]))
    for name, value in saved.tensors["model"].items():
        if own[name].shape != value.shape:
            raise CheckpointError(
                f"checkpoint: {name} has shape {tuple(value.shape)}, this model needs "
                f"{tuple(own[name].shape)}"
            )
        own[name].copy_(value)
    moments = saved.tensors["optimizer"]
    for name, parameter in model.named_parameters():
        keys = [k for k in moments if k.rpartition(".")[0] == name]
        state = optimizer.state[parameter]
        for key in keys:
            kind = key.rpartition(".")[2]
            if kind in state:
                state[kind].copy_(moments[key])
            else:
                # A step count stays where fused AdamW keeps it: beside the parameter.
                state[kind] = moments[key].to(parameter.device, copy=True)
    if isinstance(optimizer, AdamW):
        optimizer.refresh_working()
    if guard is not None and "guard" in saved.tensors:
        guard.load(saved.tensors["guard"], saved.state["guard"])
    checkpoint.set_rng_state(saved.tensors["rng"])
    values = dict(saved.state["progress"])
    values["skips"] = [(int(a), int(b)) for a, b in values["skips"]]
    values["evaluations"] = [(int(a), float(b)) for a, b in values["evaluations"]]
    return Progress(**values)


def roll_back(
    folder: Path,
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
        action: "rollback" or "give_up", as the guard said.
        guard, log, model, optimizer: Live; taken back.
        rows_per_step: Rows a bad step drew.

    Raises:
        RunFailed: no rollbacks are left, or there is nothing to go back to.
    """
    found = checkpoint.newest_good(folder / "checkpoints", log.say)
    if action == "give_up" or found is None:
        why = "there is no checkpoint to go back to" if found is None else "no rollbacks are left"
        raise RunFailed(
            f"guard: {guard.in_a_row} bad steps in a row up to step {log.records[-1].step} and "
            f"{why} ({guard.rollbacks} done); {folder}/metrics.jsonl has every event. A lower "
            "--max-lr or another --seed may help"
        )
    rollbacks, skipped = guard.rollbacks + 1, guard.skipped
    ranges = [(end - rows_per_step, end) for end in guard.positions]
    progress = restore(found[1], model, optimizer, guard)
    guard.rollbacks, guard.skipped = rollbacks, skipped
    progress.skips += [r for r in ranges if r not in progress.skips]
    log.rewind(progress.step)
    log.event("rolled_back", to_step=progress.step, skips=ranges, rollbacks=rollbacks)
    log.say(f"guard: back to step {progress.step}, leaving out the rows {ranges}")
    return progress


def _same_names(what: str, own: set[str], saved: set[str]) -> None:
    if own != saved:
        missing, foreign = sorted(own - saved)[:3], sorted(saved - own)[:3]
        raise CheckpointError(f"checkpoint: {what} lacks {missing} and has unknown {foreign}")


def find(choice: str, folder: Path, world: World) -> tuple[Path, Checkpoint] | None:
    """The checkpoint to go on from: rank 0 decides, and all must read the same one.

    Args:
        choice: "auto", "never", or the path of a checkpoint or of a run folder.
        folder: The run's own folder.
        world: The ranks.

    Raises:
        CheckpointError: a path was given and nothing usable is there, or this rank cannot read
            what rank 0 decided on.
        ValueError: the ranks read different ones.
    """
    found = _choose(choice, folder, world.say) if world.is_main else None
    path = world.first("checkpoint", lambda: found and str(found[0]))
    if path is not None and found is None:
        try:
            found = Path(path), checkpoint.read(Path(path))
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; rank 0 goes on from there, so rank {world.rank} must see the same disk"
            ) from None
    digest = found and {"step": found[1].step, "checkpoint": found[1].sha256}
    refuse_mismatch(world, "found", digest or {})
    return found


def _choose(
    choice: str, folder: Path, say: Callable[[str], None]
) -> tuple[Path, Checkpoint] | None:
    if choice == "never":
        return None
    if choice == "auto":
        return checkpoint.newest_good(folder / "checkpoints", say)
    path = Path(choice)
    if (path / "manifest.json").exists() or not (path / "checkpoints").is_dir():
        return path, checkpoint.read(path)
    found = checkpoint.newest_good(path / "checkpoints", say)
    if found is None:
        raise CheckpointError(f"checkpoint {path}: the folder holds no good checkpoint")
    return found


def check_recipe(saved: Checkpoint, recipe: Recipe, data_sha256: str, override: bool) -> list[str]:
    """Lines about a recipe that is not the one saved.

    Raises:
        ValueError: fields differ and `override` is off; the message names each with both values.
    """
    changed = _differences(saved.state["recipe"], {**asdict(recipe), "data_sha256": data_sha256})
    if changed and not override:
        raise ValueError(
            f"resume: the checkpoint of step {saved.step} was made with another recipe: "
            f"{'; '.join(changed)}. --override goes on with the new one, --resume never starts "
            "afresh"
        )
    return [f"resume: recipe overridden: {change}" for change in changed]


def check_plan(saved: Checkpoint, plan: Plan) -> list[str]:
    """Lines about plan fields that differ: the same samples follow, the last bits may not."""
    now = asdict(plan)
    changed = _differences({k: saved.state["plan"].get(k) for k in _NUMERICS},
                           {k: now[k] for k in _NUMERICS})  # fmt: skip
    if not changed:
        return []
    return [f"resume: another plan ({'; '.join(changed)}): same samples, losses equal to rounding"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
