"""Result files: one small JSON per device and commit, written after every row.

    {"schema": ..., "device": {...}, "torch": ..., "commit": ..., "dirty": ..., "command": ...,
     "limits": {...}, "step": [...], "ops": [...], ...}

Each section holds rows of one type (`bench.rows`). A row that is measured again replaces the one
with the same key, so a second run refreshes the file and an interrupted one leaves what it has.
"""

import datetime
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.rows import SECTIONS, OpRow, Row, merged
from model.files import write_atomically
from training.child import ROOT
from training.machines import cpu_name, nvidia_smi

RESULTS = ROOT / "bench/results"
SCHEMA = "fused-gpt/bench/2"
Keep = Callable[[Any], bool]


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and sizes of a device, as they stand at the top of a result file."""
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": props.name,
            "sms": props.multi_processor_count,
            "memory_gib": round(props.total_memory / 2**30, 1),
            "l2_mib": round(props.L2_cache_size / 2**20, 1),
            "capability": f"sm_{props.major}{props.minor}",
            "driver": nvidia_smi("driver_version").get("driver_version", ""),
        }
    return {
        "type": "cpu",
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


def git_state() -> tuple[str, bool]:
    """Commit and whether tracked files differ from it; ("unknown", True) outside a checkout.

    Result files and the report made from them do not count: writing them is what the bench does.
    """
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown", True
    changed = _output("git", "status", "--porcelain", "--untracked-files=no").splitlines()
    ours = ("bench/results/", "bench/plots/", "README.md")
    return commit, any(not line[2:].strip().startswith(ours) for line in changed)


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Everything a reader needs to run it again; `commit` names it where git is not at hand."""
    triton_version = None
    if find_spec("triton"):
        import triton

        triton_version = triton.__version__
    found, dirty = git_state()
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit or found,
        "dirty": dirty if commit is None or found == commit else None,
        "command": command_line(),
    }


def command_line() -> str:
    """How this process was started, without the paths of the machine."""
    argv = sys.orig_argv[1:] or sys.argv
    return shlex.join(["python", *(os.path.relpath(a) if os.path.isabs(a) else a for a in argv)])


@dataclass
class Result:
    """What is known of one device at one commit.

    Args:
        about: Device, versions, commit, date, command; and what is no list of rows: limits, parts.
        sections: Rows by section.
    """

    about: dict[str, Any]
    sections: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def device(self) -> dict[str, Any]:
        return self.about["device"]

    @property
    def file_name(self) -> str:
        device = self.device
        name = device["name"] + (f" {device['cores']} cores" if device["type"] == "cpu" else "")
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        return f"{slug}-{self.about['commit'][:8]}.json"

    def rows(self, section: str) -> list[Any]:
        """Rows of a section, of the type that SECTIONS has for it."""
        return self.sections.get(section, [])

    def join(self, later: "Result") -> "Result":
        """Both as one; where both have a row, the later one's counts.

        Raises:
            ValueError: they differ in device, commit, torch or triton.
        """
        for key in ("device", "commit", "torch", "triton"):
            if self.about[key] != later.about[key]:
                raise ValueError(
                    f"bench: results of one file must agree in {key}; it is {self.about[key]} and "
                    f"{later.about[key]}; give another --out"
                )
        about = self.about | later.about
        for name in ("parts", "limits"):
            if name in about:
                about[name] = self.about.get(name, {}) | later.about.get(name, {})
        commands = [c for r in (self, later) for c in r.about["command"].split("; ")]
        about["command"] = "; ".join(dict.fromkeys(commands))
        # Rows cannot be told apart: clean where all are; None is "not known".
        dirty = (self.about["dirty"], later.about["dirty"])
        about["dirty"] = True if True in dirty else None if None in dirty else False
        names = dict.fromkeys([*self.sections, *later.sections])
        return Result(about, {n: merged(self.rows(n), later.rows(n)) for n in names})

    def write(self, path: Path) -> None:
        """JSON with one row a line."""
        parts = [f" {json.dumps(name)}: {json.dumps(rounded(v))}" for name, v in self.about.items()]
        for name, rows in self.sections.items():
            lines = ",\n  ".join(json.dumps(rounded(row.values())) for row in rows)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        write_atomically(path, "{\n" + ",\n".join(parts) + "\n}\n")


class Results(Result):
    """The open result file of this device and commit.

    Args:
        path: File or folder; a folder gets the file's usual name.
        device: Where the rows come from.
        commit: As in `environment`.

    Raises:
        ValueError: the file exists and is of another schema, device or commit.
    """

    def __init__(self, device: torch.device, path: Path = RESULTS, commit: str | None = None):
        super().__init__(environment(device, commit))
        self.path = path if path.suffix == ".json" else path / self.file_name
        self.path.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        if self.path.exists():
            self._become(load(self.path).join(self))

    def add(self, section: str, *rows: Row) -> None:
        """Insert or replace rows and write the file."""
        assert all(isinstance(row, SECTIONS[section]) for row in rows)
        self.sections[section] = merged(self.rows(section), rows)
        self.write(self.path)

    def put(self, name: str, value: Any) -> None:
        """Set what is not a list of rows, such as limits, and write the file."""
        self.about[name] = value
        self.write(self.path)

    def absorb(self, later: Result) -> None:
        """Take over what another result holds, and write the file."""
        self._become(self.join(later))
        self.write(self.path)

    def _become(self, other: Result) -> None:
        self.about, self.sections = other.about, other.sections


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to `digits` significant digits, in place of 17: the rest is noise and diff."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return value


def load(path: Path) -> Result:
    """Read a result file, ours or one of pytest-benchmark that `bench.ops` has written.

    Raises:
        ValueError: it is neither.
    """
    if path.exists() and not path.is_file():  # a device or a pipe would be read for ever
        raise ValueError(f"bench: {path} is no regular file")
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"bench: {path.name} is not JSON ({error})") from None
    data = data if isinstance(data, dict) else {}
    about = data.get("about", data)  # what bench/conftest.py adds to pytest-benchmark's own
    schema = about.get("schema") if isinstance(about, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"bench: {path.name} must have schema {SCHEMA!r}, has {schema!r}")
    try:
        if about is not data:
            ops = [_op_row(entry) for entry in data["benchmarks"]]
            return Result(about, {"ops": [*ops, *(OpRow(**v) for v in data["not_timed"])]})
        sections = {name: [kind(**values) for values in data.pop(name)]
                    for name, kind in SECTIONS.items() if name in data}  # fmt: skip
        return Result(data, sections)
    except (KeyError, TypeError) as error:
        raise ValueError(f"bench: a row of {path.name} cannot be read: {error}") from None


def _op_row(entry: dict[str, Any]) -> OpRow:
    """A benchmark of pytest-benchmark: its statistics, in seconds, and what is said of the op."""
    stats = entry["stats"]
    ms = {f"{q}ms": 1e3 * stats[name] for q, name in
          (("", "median"), ("q1_", "q1"), ("q3_", "q3"))}  # fmt: skip
    spread = {"cov": stats["stddev"] / stats["mean"], "rounds": stats["rounds"]}
    return OpRow(**entry["extra_info"], **ms, **spread)


def load_all(paths: Path | Sequence[Path] = RESULTS) -> list[Result]:
    """The results of a folder or of files, newest last; those of one device and commit as one."""
    if isinstance(paths, Path):
        paths = sorted(paths.glob("*.json"))
    found: dict[str, Result] = {}
    for result in sorted(map(load, paths), key=lambda result: result.about["date"]):
        key = json.dumps([result.about[k] for k in ("device", "commit", "torch", "triton")])
        found[key] = found.pop(key).join(result) if key in found else result
    return [*found.values()]


def merge(paths: Sequence[Path], into: Path) -> Path:
    """Make one result file of several, and of the one that stands there; the later row wins.

    Raises:
        ValueError: they differ in device, commit, torch or triton.
    """
    whole = load(paths[0])
    target = into if into.suffix == ".json" else into / whole.file_name
    named = {path.resolve() for path in (*paths, *([target] if target.exists() else []))}
    for result in load_all([*named]):
        whole = whole.join(result)
    target.parent.mkdir(parents=True, exist_ok=True)
    whole.write(target)
    return target


def with_values(**want: Any) -> Keep:
    """A predicate: the row has these values."""
    return lambda row: all(getattr(row, name) == value for name, value in want.items())


def newest(
    results: Sequence[Result], device_type: str, section: str, keep: Keep = bool
) -> Result | None:
    """The latest result of that kind of device that has such rows (by default any) in `section`."""
    return next(
        (r for r in reversed(results)
         if r.device["type"] == device_type and any(map(keep, r.rows(section)))),
        None,
    )  # fmt: skip
