"""Where curves go besides metrics.jsonl: TensorBoard, Weights & Biases, Trackio, metrics.csv.

A resumed run continues the same curves: the run folder keeps its id at the tracker, and a run that
starts afresh draws a new one. No logger may stop a run: one that fails is named once and then left
out.
"""

import csv
import importlib
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FILES = ID, TABLE = "log-id", "metrics.csv"
STEP_CURVES = ("loss", "lr", "grad_norm", "tokens_per_s")
EVENT_CURVES = ("val_loss", "hellaswag")
PROJECT = "fused-gpt"
Logger = tuple[Callable[[dict[str, Any]], object], Callable[[], object]]  # log a row, close


def _row(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an object of metrics.jsonl adds to the curves; empty if it adds nothing."""
    curves = EVENT_CURVES if "event" in values else STEP_CURVES
    row = {name: values[name] for name in curves if name in values}
    return row and {"step": values["step"], **row}


def _tensorboard(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    # A purge hides what an earlier process wrote after the evaluation before the next step.
    purge_step = steps_done + 1 if steps_done else None
    writer = SummaryWriter(folder / "tensorboard", purge_step=purge_step)

    def log(row: dict[str, Any]) -> None:
        for name in row.keys() - {"step"}:
            writer.add_scalar(name, row[name], row["step"])

    return log, writer.close


def _wandb(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    wandb = importlib.import_module("wandb")
    project, name = os.environ.get("WANDB_PROJECT") or PROJECT, folder.resolve().name
    # Without an account it would ask for one; `wandb sync` sends an offline run later.
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
    how = {"dir": folder, "mode": mode, "settings": wandb.Settings(console="off")}
    run = wandb.init(project=project, name=name, id=ident, resume="allow", config=config, **how)
    run.define_metric("*", step_metric="step")  # unlike a run, wandb's own counter never goes back
    return run.log, run.finish


def _trackio(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    trackio = importlib.import_module("trackio")
    name = f"{folder.resolve().name}-{ident}"
    run = trackio.init(project=PROJECT, name=name, resume="allow", config=config)
    return lambda row: run.log({k: row[k] for k in row if k != "step"}, row["step"]), run.finish


def _csv(folder: Path, ident: str, config: dict[str, Any], steps_done: int) -> Logger:
    done = folder / "metrics.jsonl"  # truncated to where the run resumes
    file = (folder / TABLE).open("w", newline="", encoding="utf-8", buffering=1)
    table: csv.DictWriter[str] = csv.DictWriter(file, ("step", *STEP_CURVES, *EVENT_CURVES))
    table.writeheader()
    for line in done.read_bytes().splitlines() if done.is_file() else ():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # damaged by a crash
            if row := _row(json.loads(line)):
                table.writerow(row)
    return table.writerow, file.close


ADAPTERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "csv": _csv}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for a logger that is unknown or not installed."""
    for name in names:
        if name not in ADAPTERS:
            raise ValueError(f"log: must be one of {', '.join(ADAPTERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log: {name} is not installed; pip install {name}, or leave it out")


class Loggers:
    """The loggers of a run, by their names in `ADAPTERS`; `say` reports one that fails."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        config: dict[str, Any],
        steps_done: int,
        say: Callable[[str], None],
    ):
        self.say = say
        self._loggers: dict[str, Logger] = {}
        path, ident = folder / ID, ""
        if names and steps_done and path.is_file():
            ident = path.read_text(errors="replace")
        if names and not re.fullmatch("[0-9a-f]{8}", ident):
            path.write_text(ident := secrets.token_hex(4))
        for name in dict.fromkeys(names):
            if logger := self._try(name, ADAPTERS[name], folder, ident, config, steps_done):
                self._loggers[name] = logger

    def log(self, values: Mapping[str, Any]) -> None:
        """Pass on what an object of metrics.jsonl adds to the curves."""
        if row := _row(values):
            for name, (log, _) in [*self._loggers.items()]:
                self._try(name, log, {**row})

    def close(self) -> None:
        for name, (_, close) in [*self._loggers.items()]:
            self._try(name, close)

    def _try(self, name: str, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except Exception as error:  # whatever a library or its network comes up with
            self._loggers.pop(name, None)
            self.say(f"log: {name} failed ({error}); the run goes on without it")
            return None
