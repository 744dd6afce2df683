"""Checkpoints that a crash cannot corrupt and a stranger cannot abuse.

A checkpoint is a folder of safetensors and JSON; nothing is pickled, so reading one runs no code:

    checkpoints/step-00000400/
        <name>.safetensors    one file per group of tensors ("model", "optimizer", "rng", ...)
        config.json           shape of the model: with it the folder is one that model/hf.py reads
        state.json            everything else that is not a tensor
        manifest.json         bytes and sha256 of the files above, and of itself

It is written to a hidden temporary folder, every file is fsynced, the manifest last, then the
folder is renamed into place and its parent fsynced. A folder under its final name is therefore
whole, unless the disk changed it later, which the checksums show. `newest_good` names what it
skips and takes the one before.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

FORMAT = "fused-gpt-checkpoint"
VERSION = 2  # 1 had no config.json, and the weights in the layout of the module
_NAME = re.compile(r"step-(\d{8})$")
_TEMPORARY = ".writing-"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the path and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """What is saved.

    Args:
        step: Optimizer steps done.
        tensors: Groups of named CPU tensors; one safetensors file per group.
        state: JSON values (schedule, loader position, recipe, plan, counters).
        config: config.json, as a model folder has it; None in a checkpoint of version 1.
        best: Step of the best evaluation so far, whose checkpoint is never thinned out; not saved.
        sha256: Of the manifest, where it was read from a disk.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    config: dict[str, Any] | None = None
    best: int | None = None
    sha256: str = ""


@torch.no_grad()
def snapshot(
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any] | None = None,
    best: int | None = None,
) -> Checkpoint:
    """Copy live tensors to the host, so that training may go on while the copy is written.

    Args:
        step: Optimizer steps done.
        tensors: Groups of live tensors on any device.
        state: JSON values; copied through JSON so that later changes do not reach the file.
        config, best: As in Checkpoint.
    """
    copies = {
        # Into new memory of its own layout: what comes may be a transposed view.
        group: {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in named.items()}
        for group, named in tensors.items()
    }
    return Checkpoint(step, copies, json.loads(json.dumps(state)), config, best)


def _canonical(value: Any) -> bytes:
    """One byte string per JSON value, so that a flipped byte anywhere changes the meaning."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _write_file(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _fsync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; the rename is still atomic
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` below `folder` atomically.

    Returns:
        The final path, `folder/step-%08d`.

    Raises:
        OSError: no space, no permission; nothing is left under the final name and the temporary
            folder is removed.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        files: dict[str, dict[str, Any]] = {}

        def put(name: str, data: bytes) -> None:
            _write_file(temporary / name, data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        for group, named in checkpoint.tensors.items():
            put(f"{group}.safetensors", save_tensors(named, metadata={"format": "pt"}))
        if checkpoint.config is not None:
            put("config.json", _canonical(checkpoint.config))
        put("state.json", _canonical(checkpoint.state))
        manifest = {
            "format": FORMAT,
            "version": 1 if checkpoint.config is None else VERSION,
            "step": checkpoint.step,
            "files": files,
        }
        digest = hashlib.sha256(_canonical(manifest)).hexdigest()
        _write_file(temporary / "manifest.json", _canonical({**manifest, "sha256": digest}))
        _fsync_folder(temporary)
        if final.exists():  # the same step again, after a rollback: the older one steps aside
            aside = folder / f"{_TEMPORARY}replaced-{final.name}"
            final.rename(aside)
            temporary.rename(final)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.rename(final)
        _fsync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _manifest(path: Path) -> dict[str, Any]:
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path}: no manifest.json; not a checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: manifest.json is unreadable: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path}: manifest.json is not of format {FORMAT!r}")
    digest = manifest.pop("sha256", None)
    expected = hashlib.sha256(_canonical(manifest)).hexdigest()
    # Comparing the bytes too: a flip that leaves the parsed value alone is still a flip.
    if digest != expected or raw != _canonical({**manifest, "sha256": digest}):
        raise CheckpointError(f"checkpoint {path}: manifest.json does not match its own checksum")
    if manifest["version"] not in (1, VERSION):
        raise CheckpointError(
            f"checkpoint {path}: version {manifest['version']}, this program reads 1 and {VERSION}"
        )
    return manifest


def read(path: Path) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Raises:
        CheckpointError: a file is missing, truncated, changed or foreign; the message names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path}: no such folder")
    manifest = _manifest(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    texts: dict[str, Any] = {}
    for name, entry in manifest["files"].items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: {name} is missing: {error}") from None
        if len(data) != entry["bytes"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {len(data)} bytes, "
                f"the manifest says {entry['bytes']}"
            )
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {name} does not match its checksum")
        try:
            if name.endswith(".json"):
                texts[name] = json.loads(data)
            else:
                tensors[name.removesuffix(".safetensors")] = load_tensors(data)
        except (ValueError, SafetensorError) as error:  # written by another program
            raise CheckpointError(f"checkpoint {path}: {name} is unreadable: {error}") from None
    digest = hashlib.sha256(_canonical(manifest)).hexdigest()
    return Checkpoint(
        manifest["step"], tensors, texts.get("state.json", {}), texts.get("config.json"),
        sha256=digest,
    )  # fmt: skip


def paths(folder: Path) -> list[Path]:
    """Checkpoint folders below `folder`, oldest first; not verified."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.search(p.name) and p.is_dir())


def newest_good(folder: Path, say: Callable[[str], None]) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint that verifies; each one skipped is named through `say`."""
    for path in reversed(paths(folder)):
        try:
            return path, read(path)
        except CheckpointError as error:
            say(f"{error}; trying the one before")
    return None


def clean(folder: Path) -> None:
    """Remove temporary folders that a killed writer left. Call while holding the run's lock."""
    if folder.is_dir():
        for path in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)


class Writer:
    """Writes checkpoints from a background thread, one at a time, and thins out old ones.

    Args:
        folder: Where checkpoints go.
        keep_last: Newest ones to keep.
        say: Receives one line per failure; training goes on and the old checkpoint stays.
    """

    def __init__(self, folder: Path, keep_last: int, say: Callable[[str], None]):
        self.folder = folder
        self.keep_last = keep_last
        self.say = say
        self.last_good: int | None = None
        self.write_ms = 0.0  # of the last write, on the background thread
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def submit(self, capture: Callable[..., Checkpoint], *state: Any) -> dict[str, float]:
        """Start writing `capture(*state)`; waits first for a write still in flight.

        Returns:
            What checkpoints cost, in ms: `wait_ms` and `copy_ms` held up training this time,
            `last_write_ms` is the write before, beside training.
        """
        start = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        checkpoint = capture(*state)
        copied = time.perf_counter()
        self._thread = threading.Thread(target=self._run, args=(checkpoint,), name="checkpoint")
        self._thread.start()
        return {
            "wait_ms": 1e3 * (waited - start),
            "copy_ms": 1e3 * (copied - waited),
            "last_write_ms": self.write_ms,
        }

    def wait(self) -> None:
        """Return once nothing is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, checkpoint: Checkpoint) -> None:
        start = time.perf_counter()
        try:
            write(self.folder, checkpoint)
        except OSError as error:
            last = "none" if self.last_good is None else f"step {self.last_good}"
            self.say(
                f"checkpoint: step {checkpoint.step} could not be written ({error}); training "
                f"goes on, last good one: {last}"
            )
            return
        self.last_good = checkpoint.step
        self.write_ms = 1e3 * (time.perf_counter() - start)
        for path in paths(self.folder)[: -self.keep_last or None]:
            if int(path.name[-8:]) != checkpoint.best:
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for one process.

    The operating system drops the lock with the process, so a killed run leaves none behind; the
    process id in the file is only for the message.

    Raises:
        ValueError: another process holds it; the message names that process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    with open(path, "a+", encoding="utf-8") as f:
        if not _try_lock(f.fileno()):
            f.seek(0)
            holder = f.read().strip() or "unknown"
            raise ValueError(
                f"run: {folder} is in use by process {holder}; wait for it or choose another --out"
            )
        f.seek(0)
        f.truncate()
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield


def _try_lock(fd: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # pyright: ignore
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def rng_state() -> dict[str, Tensor]:
    """Generator states of the process: CPU, and every CUDA device in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_rng_state(states: dict[str, Tensor]) -> None:
    """Restore what `rng_state` returned; CUDA states of absent devices are left out."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in states:
                torch.cuda.set_rng_state(states[f"cuda{i}"], i)
