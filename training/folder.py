"""The folder of a run: it is locked, no link leads out of it, and no earlier run is lost."""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch

from model import GPT, export
from training import checkpoint, loggers
from training.checkpoint import Checkpoint
from training.data import SHAKESPEARE_SHA256, Corpus
from training.recipes import Recipe

LOCK = "run.lock"
STOPPED = "stopped"  # marks that a job of several ranks was asked to stop
CHECKPOINTS = "checkpoints"
LOG = "metrics.jsonl"
FOLDERS = (CHECKPOINTS, "model", "tensorboard")
RESULTS = ("corpus.txt", "loss.png", "report.html", "samples.txt", "summary.json")
WRITTEN = (*FOLDERS, LOG, *loggers.FILES, "config.json", *RESULTS)  # what a run writes


def name(out: str | None, preset: str, corpus: Corpus) -> Path:
    """Path of the folder: `out`, or runs/NAME with a number if that holds a finished run.

    NAME is the recipe's, or the text's if a Shakespeare recipe has another text.
    """
    if out:
        return Path(out)
    name = preset
    if preset.startswith("shakespeare") and corpus.sha256 != SHAKESPEARE_SHA256:
        name = re.sub(r"[^\w-]+", "-", Path(corpus.name).stem).strip("-") or preset
    numbered = (Path("runs", name + (f"-{n}" if n > 1 else "")) for n in count(1))
    return next(p for p in numbered if not (p / "summary.json").exists())


def make(folder: Path, recipe: Recipe) -> None:
    """Make the folder and test that it can be written.

    Raises:
        ValueError: it is a file, cannot be written, or the disk is too full for the model.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; --out names a folder")
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    with torch.device("meta"):
        needed = 4 * GPT(recipe.model_config).num_parameters() + (1 << 20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
        with contextlib.suppress(OSError):  # some file systems do not count
            disk = shutil.disk_usage(folder)
            if disk.total and disk.free < needed:
                raise ValueError(f"{disk.free:,} bytes free, the model alone needs {needed:,}")
    except (OSError, ValueError) as error:
        for path in filter(Path.exists, missing):
            path.rmdir()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"out: cannot write to {folder}: {reason}; choose another --out") from None


@contextlib.contextmanager
def opened(
    folder: Path, saved: Checkpoint | None, say: Callable[[str], None], restarted: bool = False
) -> Iterator[bool]:
    """Lock the folder and prepare it to resume from `saved`, or to start afresh.

    Yields whether to leave at once because torchrun has restarted a job that was asked to stop.

    Raises:
        ValueError: another process has the lock, a link leads out of the folder, or it holds files
            that no run wrote.
    """
    _refuse_links(folder, LOCK)
    with _lock(folder / LOCK, say):
        for written in (*WRITTEN, STOPPED):
            _refuse_links(folder, written)
        stopped = restarted and (folder / STOPPED).exists()
        if not stopped:
            (folder / STOPPED).unlink(missing_ok=True)
            checkpoint.clean(folder / CHECKPOINTS)
            _set_aside(folder, saved, say)
            export.check_folder(folder / "model")  # now, not after the last step
        yield stopped


def _refuse_links(folder: Path, written: str) -> None:
    """Refuse a stranger's folder in which a link would redirect what a run writes."""
    path, kinds = folder / written, {stat.S_IFDIR if written in FOLDERS else stat.S_IFREG}
    entries = {path: kinds} if os.path.lexists(path) else {}
    if written in FOLDERS and path.is_dir() and not path.is_symlink():
        entries |= {entry: {stat.S_IFREG, stat.S_IFDIR} for entry in path.iterdir()}
    for entry, allowed in entries.items():
        if stat.S_IFMT(entry.lstat().st_mode) not in allowed:
            raise ValueError(
                f"run: {entry} is a link, a pipe or of another kind than a run makes it; a run "
                "writes to its own files only: remove it, or choose another --out (which may be a "
                "link itself)"
            )


def _set_aside(folder: Path, saved: Checkpoint | None, say: Callable[[str], None]) -> None:
    """Move away what an earlier run left and this one would delete, overwrite or roll back to."""
    here = folder / CHECKPOINTS
    if saved and saved.path and here.is_dir() and saved.path.parent.samefile(here):
        moved = [p for p in checkpoint.paths(here) if checkpoint.step_of(p) > saved.step]
    else:
        moved = [folder / written for written in WRITTEN if (folder / written).exists()]
        if moved and not (here in moved or folder / LOG in moved):
            raise ValueError(
                f"out: {folder} holds {', '.join(p.name for p in moved)}, which no run wrote; "
                "choose another --out"
            )
    if not moved:
        return
    aside = next(p for n in count(1) if not os.path.lexists(p := folder / f"earlier-{n}"))
    for path in moved:
        target = aside / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    say(f"run: {', '.join(p.name for p in moved)} of an earlier run moved to {aside}")


@contextlib.contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock a file, or raise ValueError with the id of the process that has it.

    The lock ends with the process, so a killed run leaves none behind.
    """
    with open(path, "a+", encoding="utf-8") as f:
        f.seek(0)
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = f.read(32).strip()
            raise ValueError(
                f"run: {path.parent} is in use by process {holder if holder.isdecimal() else '?'}; "
                "wait for it or choose another --out"
            ) from None
        except OSError as error:
            say(
                f"run: this file system has no locks ({error.strerror}); a second process in "
                f"{path.parent} would not be noticed"
            )
        f.truncate()
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield
