"""Where curves go beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio, metrics.csv.

A run that is resumed goes on in the same place: the id that a tracker knows it by is kept in the
run folder, and a run that starts afresh draws a new one. None of them may stop a run: one that
fails is named once and left out from there on.
"""

import csv
import importlib
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

FILES = ID, TABLE = "log-id", "metrics.csv"
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "val_loss", "hellaswag")
PROJECT = "fused-gpt"
Logger = tuple[Callable[[dict[str, Any]], object], Callable[[], object]]  # log a row, close


def _tensorboard(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    # Hides what an earlier process wrote behind the evaluation that stands before the next step.
    purged = steps_done + 1 if steps_done else None
    writer = SummaryWriter(folder / "tensorboard", purge_step=purged)

    def log(row: dict[str, Any]) -> None:
        for name in row.keys() - {"step"}:
            writer.add_scalar(name, row[name], row["step"])

    return log, writer.close


def _wandb(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    wandb = importlib.import_module("wandb")
    # Without an account it would ask for one; `wandb sync` sends an offline run later.
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    where = {"project": os.environ.get("WANDB_PROJECT") or PROJECT, "dir": folder, "mode": mode}
    name, settings = folder.resolve().name, wandb.Settings(console="off")
    run = wandb.init(id=ident, resume="allow", name=name, config=config, settings=settings, **where)
    run.define_metric("*", step_metric="step")  # its own counter never goes back, as a run may
    return run.log, run.finish


def _trackio(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    trackio = importlib.import_module("trackio")
    name = f"{folder.resolve().name}-{ident}"
    run = trackio.init(project=PROJECT, name=name, resume="allow", config=config)
    return lambda row: run.log({k: row[k] for k in row if k != "step"}, row["step"]), run.finish


def _csv(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    done = folder / "metrics.jsonl"  # cut back to where the run goes on
    file = (folder / TABLE).open("w", newline="", encoding="utf-8", buffering=1)
    table: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
    table.writeheader()
    for line in done.read_bytes().splitlines() if done.is_file() else ():
        with suppress(ValueError, TypeError, RecursionError):  # a line that a crash damaged
            values = json.loads(line)
            row = {name: values[name] for name in COLUMNS if name in values}
            if len(row) > 1:
                table.writerow(row)
    return table.writerow, file.close


ADAPTERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "csv": _csv}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for a logger that is not known or not installed."""
    for name in names:
        if name not in ADAPTERS:
            raise ValueError(f"log: must be of {', '.join(ADAPTERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log: {name} is not installed; pip install {name}, or leave it out")


class Loggers:
    """The loggers of a run, of `ADAPTERS`; those that fail are left out, which `say` is told."""

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        config: dict[str, Any],
        steps_done: int,
        say: Callable[[str], None],
    ):
        self.say = say
        self._loggers: dict[str, Logger] = {}
        path, kept = folder / ID, ""
        if names and steps_done and path.is_file():
            kept = path.read_text(errors="replace")
        if names and not re.fullmatch("[0-9a-f]{8}", kept):
            path.write_text(kept := secrets.token_hex(4))
        for name in dict.fromkeys(names):
            opening = partial(ADAPTERS[name], folder, kept, config, steps_done)
            if opened := self._try(name, opening):
                self._loggers[name] = opened

    def log(self, step: int, **values: Any) -> None:
        """A row of values."""
        for name, (log, _) in [*self._loggers.items()]:
            self._try(name, partial(log, {"step": step, **values}))

    def close(self) -> None:
        """Let each write what it holds."""
        for name, (_, close) in [*self._loggers.items()]:
            self._try(name, close)

    def _try(self, name: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as error:  # whatever a library or its network comes up with
            self._loggers.pop(name, None)
            self.say(f"log: {name} failed ({error}); the run goes on without it")
            return None
