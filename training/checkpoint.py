"""Checkpoints that a crash cannot corrupt and a stranger cannot abuse.

A checkpoint is a folder of safetensors and JSON; nothing is pickled, so reading one runs no code:

    checkpoints/step-00000400/
        <name>.safetensors    one file per group of tensors ("model", "optimizer", "rng", ...)
        config.json           shape of the model: with it the folder is one that model/hf.py reads
        state.json            everything else that is not a tensor
        manifest.json         size and SHA-256 of the files above, and its own SHA-256

It is written to a hidden temporary folder. Every file is fsynced, the manifest last, then the
folder is renamed into place and its parent fsynced. So a folder with its final name is complete;
if the disk changes it later, the checksums show that.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from model.edge import naming, one_line
from training import schema
from training.schema import COUNT, MOST, OBJECT, TEXT, Every, Mismatch, Must

FORMAT = "fused-gpt-checkpoint"
VERSION = 2
MANIFEST = {
    "format": Must(repr(FORMAT), lambda v: v == FORMAT),
    "version": Must(f"{VERSION} (--resume never starts afresh)", lambda v: v == VERSION),
    "step": schema.count(10**8 - 1),
    "files": Every({"bytes": COUNT, "sha256": TEXT}, r"[a-z]{1,32}\.(json|safetensors)"),
    "sha256": TEXT,
}
MAX_JSON_BYTES = 16 << 20
MAX_HEADER_BYTES = 16 << 20  # in a safetensors file, the bytes before its tensors
_NAME = re.compile(r"step-\d{8}")
_TEMPORARY = ".writing-"
_REPLACED = f"{_TEMPORARY}replaced-"
_FINITE = {"model", "optimizer"}  # groups in which an infinity or NaN would ruin the run
# The errors that file systems return for a call that they do not support.
_LACKING = ("EINVAL", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EBADF", "EPERM", "EACCES", "EXDEV")
# Takes a checkpoint without its tensors and returns the schema of the tensors.
Expected = Callable[["Checkpoint"], dict[str, dict[str, Must]]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the path and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """What is saved of a run. `best` and `path` are not written."""

    step: int  # optimizer steps done
    tensors: dict[str, dict[str, Tensor]]  # named, on the CPU; one safetensors file per group
    state: dict[str, Any]  # JSON values: loader position, recipe, plan, counters
    config: dict[str, Any] = field(default_factory=dict)  # config.json of a model folder
    best: int | None = None  # step of the best evaluation, whose checkpoint is never deleted
    path: Path | None = None  # where it was read from


def _canonical(value: Any) -> bytes:
    """JSON in the one spelling that is accepted, so that no byte can change unnoticed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@contextlib.contextmanager
def _as_far_as_possible(say: Callable[[str], None], call: str, lost: str) -> Iterator[None]:
    """Say what is lost if the file system does not support the call made inside."""
    try:
        yield
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in _LACKING:
            raise
        say(f"checkpoint: this file system does not {call} ({error.strerror}): {lost}")


def _write_file(path: Path, data: bytes, say: Callable[[str], None]) -> None:
    with naming(path):
        path.write_bytes(data)
        _fsync(path, say)


def _fsync(path: Path, say: Callable[[str], None]) -> None:
    lost = "a power cut may lose or damage the newest checkpoint; a resume then uses the one before"
    with _as_far_as_possible(say, "fsync", lost):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _move(folder: Path, target: Path, say: Callable[[str], None]) -> None:
    """Rename a folder. If that is not possible, copy it, the manifest last."""
    lost = "a write that is cut short leaves a folder without manifest, which is skipped"
    with _as_far_as_possible(say, "rename folders", lost):
        folder.rename(target)
        return
    target.mkdir()
    for file in sorted(folder.iterdir(), key=lambda f: f.name == "manifest.json"):
        shutil.copyfile(file, target / file.name)
    shutil.rmtree(folder)


def write(folder: Path, checkpoint: Checkpoint, say: Callable[[str], None] = print) -> Path:
    """Write `checkpoint` below `folder`: all of it, or nothing.

    `say` receives a line about each call that the file system does not support.

    Returns:
        The final path, `folder/step-%08d`.

    Raises:
        ValueError: a weight or a moment is not finite, so no run could resume from it.
        OSError: no space, no permission.
    """
    for group in _FINITE & checkpoint.tensors.keys():
        for name, value in checkpoint.tensors[group].items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{name} of the {group} is not finite")
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    aside = folder / f"{_REPLACED}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    files: dict[str, dict[str, Any]] = {}

    def put(name: str, data: bytes) -> None:
        _write_file(temporary / name, data, say)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    try:
        temporary.mkdir(parents=True)
        for group, named in checkpoint.tensors.items():
            put(f"{group}.safetensors", save_tensors(named, metadata={"format": "pt"}))
        put("config.json", _canonical(checkpoint.config))
        put("state.json", _canonical(checkpoint.state))
        manifest = {"format": FORMAT, "version": VERSION, "step": checkpoint.step, "files": files}
        manifest["sha256"] = hashlib.sha256(_canonical(manifest)).hexdigest()
        _write_file(temporary / "manifest.json", _canonical(manifest), say)
        _fsync(temporary, say)
        if final.exists():  # after a rollback; the older one stays until this is in place
            _move(final, aside, say)
        _move(temporary, final, say)
        shutil.rmtree(aside, ignore_errors=True)
        _fsync(folder, say)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _read_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; follow no link, wait for no pipe."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                raise OSError(f"it must be a regular file of at most {limit:,} bytes")
            return file.read(status.st_size + 1)
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror or error
        raise Mismatch(f"{path.name}: {reason}") from None


def _parse(name: str, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Mismatch(f"{name} is no JSON: {error}") from None


def read(path: Path, expected: Expected | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder.

    Args:
        path: The folder; it may come from a stranger.
        expected: Says what its tensors must be. None takes what the manifest names.

    Raises:
        CheckpointError: a file is missing, damaged, foreign, or not as expected; the message names
            it.
    """
    path = Path(path)
    try:
        return _read(path, expected)
    except Mismatch as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from None


def _read(path: Path, expected: Expected | None) -> Checkpoint:
    if path.is_symlink() or not path.is_dir():
        raise Mismatch("a link" if path.is_symlink() else "no such folder")
    raw = _read_file(path / "manifest.json", MAX_JSON_BYTES)
    manifest = _parse("manifest.json", raw)
    schema.check("manifest.json", manifest, MANIFEST)
    files, spelled = manifest["files"], _canonical(manifest)
    claimed = manifest.pop("sha256")
    # A flipped bit need not change what is parsed, so the bytes are compared too.
    if raw != spelled or claimed != hashlib.sha256(_canonical(manifest)).hexdigest():
        raise Mismatch("manifest.json does not match its own checksum")

    def verified(name: str, limit: int) -> bytes:
        data, entry = _read_file(path / name, limit), files[name]
        if len(data) != entry["bytes"]:
            raise Mismatch(f"{name} has {len(data)} bytes, the manifest says {entry['bytes']}")
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Mismatch(f"{name} does not match its checksum")
        return data

    names = [name for name in files if name.endswith(".json")]
    texts = {name: _parse(name, verified(name, MAX_JSON_BYTES)) for name in names}
    schema.check("manifest.json: files", texts, {"state.json": OBJECT, "config.json": OBJECT})
    state, config = texts["state.json"], texts["config.json"]
    saved = Checkpoint(manifest["step"], {}, state, config, path=path)
    groups = {name.removesuffix(".safetensors"): name for name in files if name not in texts}
    kinds = expected(saved) if expected else {}
    if expected:
        schema.check("manifest.json: files", groups, dict.fromkeys(kinds, TEXT))
    for group, name in groups.items():
        most = sum(kind.num_bytes for kind in kinds[group].values()) if kinds else MOST
        data = verified(name, MAX_HEADER_BYTES + most)
        try:
            saved.tensors[group] = load_tensors(data)
        except Exception as error:  # any type: another program may have written the file
            raise Mismatch(f"{name} is unreadable: {one_line(error, 160)}") from None
        if kinds:
            schema.check(group, saved.tensors[group], kinds[group])
    return saved


def paths(folder: Path) -> list[Path]:
    """Checkpoint folders below `folder`, oldest first; not verified."""
    # Not glob, which finds nothing in a folder that it may not read.
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    # A kill may leave a checkpoint that was being replaced but no successor; then it counts.
    named = {p.name.removeprefix(_REPLACED): p for p in entries}
    return [named[name] for name in sorted(named) if _NAME.fullmatch(name) and named[name].is_dir()]


def step_of(path: Path) -> int:
    return int(path.name[-8:])


def newest_good(
    folder: Path, say: Callable[[str], None], expected: Expected | None = None
) -> Checkpoint | None:
    """The newest checkpoint that can be read; `say` reports each newer one."""
    if folder.is_symlink():
        raise CheckpointError(f"checkpoint {folder}: a link; name the folder it leads to")
    for path in reversed(paths(folder)):
        try:
            return read(path, expected)
        except CheckpointError as error:
            say(f"{one_line(error)}; trying the one before")
    return None


def clean(folder: Path) -> None:
    """Clean up after a writer that was killed. Call this while holding the run's lock."""
    for path in paths(folder):
        if path.name.startswith(_REPLACED):
            path.rename(folder / path.name.removeprefix(_REPLACED))
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


class Writer(contextlib.AbstractContextManager):
    """Writes checkpoints from a background thread, one at a time, and deletes old ones.

    Args:
        folder: Where checkpoints go.
        keep_last: How many of the newest to keep.
        say: Receives a line per failure; training goes on and the old checkpoint stays.
    """

    def __init__(self, folder: Path, keep_last: int, say: Callable[[str], None]):
        self.folder, self.keep_last = folder, keep_last
        self.say = functools.cache(say)  # so that each line about the file system is printed once
        self.last_good = max(map(step_of, paths(folder)), default=None)
        self.failure = ""  # why the last write failed, or ""
        self._thread = threading.Thread()

    def __exit__(self, *_: object) -> None:
        self.wait()

    def submit(self, capture: Callable[..., Checkpoint], *state: Any) -> None:
        """Start writing `capture(*state)`, which is called after the previous write."""
        self.wait()
        checkpoint = capture(*state)
        self._thread = threading.Thread(target=self._run, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self) -> None:
        """`wait`, and raise CheckpointError if not one checkpoint could be written."""
        self.wait()
        if self.failure and self.last_good is None:
            raise CheckpointError(f"checkpoint: none could be written: {self.failure}")

    def _run(self, checkpoint: Checkpoint) -> None:
        try:
            write(self.folder, checkpoint, self.say)
        except Exception as error:  # whatever it is, training goes on
            last = "none" if self.last_good is None else f"step {self.last_good}"
            self.failure = f"step {checkpoint.step} could not be written ({error})"
            self.say(f"checkpoint: {self.failure}; training goes on, last good one: {last}")
            return
        self.last_good, self.failure = checkpoint.step, ""
        for path in paths(self.folder)[: -self.keep_last]:
            if step_of(path) != checkpoint.best:
                shutil.rmtree(path, ignore_errors=True)
