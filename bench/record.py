"""Result files: one small JSON per (device, commit), written after every row.

    {"schema": ..., "device": {...}, "torch": ..., "commit": ..., "dirty": ..., "command": ...,
     "limits": {...}, "numerics": [...], "ops": [...], "step": [...], "train": [...], ...}

A row that is measured again replaces the one with the same key, so a second run refreshes the file
and an interrupted one leaves what it has.
"""

import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.machines import cpu_name, nvidia_smi

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
SCHEMA = "fused-gpt/bench/1"

# What tells a row of a section from its neighbours.
KEYS: dict[str, tuple[str, ...]] = {
    "numerics": ("op", "shape", "dtype", "result"),
    "ops": ("op", "shape", "dtype", "mode", "provider", "sweep"),
    "step": ("model", "shape", "accum", "provider"),
    "ablation": ("model", "shape", "accum", "provider"),
    "first_step": ("model", "shape", "provider", "cache"),
    "profile": ("model", "shape", "provider", "kind"),
    "train": ("kind", "recipe", "provider", "cache"),
    "generate": ("model", "provider"),
    "sanitizer": ("tool", "op"),
    "tune": ("op", "kernel", "shape", "dtype"),
}


def _output(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
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
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
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


def file_name(env: dict[str, Any]) -> str:
    device = env["device"]
    name = device["name"] + (f" {device['cores']} cores" if device["type"] == "cpu" else "")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{slug}-{env['commit'][:8]}.json"


class Results:
    """The open result file of this device and commit.

    Args:
        path: File or folder; a folder gets the file's usual name.
        device: Where the rows come from.
        commit: As in `environment`.

    Raises:
        ValueError: the file exists and is of another schema, device or commit.
    """

    def __init__(
        self,
        device: torch.device,
        path: Path = RESULTS,
        commit: str | None = None,
    ):
        env = environment(device, commit)
        self.path = path if path.suffix == ".json" else path / file_name(env)
        self.data: dict[str, Any] = {}
        if self.path.exists():
            self.data = load(self.path)
            for key in ("commit", "device"):
                if key in self.data and self.data[key] != env[key]:
                    raise ValueError(
                        f"bench: {self.path.name} is about {key} {self.data[key]}, this run about "
                        f"{env[key]}; give another --out"
                    )
            # One dirty run taints the file: its rows cannot be told apart.
            env["dirty"] = env["dirty"] or self.data.get("dirty")
        self.data |= env

    def add(self, section: str, row: dict[str, Any]) -> None:
        """Insert or replace a row and write the file."""
        key = KEYS[section]
        rows = [
            old
            for old in self.data.get(section, [])
            if any(old.get(name) != row.get(name) for name in key)
        ]
        self.data[section] = [*rows, row]
        self.write()

    def put(self, section: str, value: dict[str, Any]) -> None:
        """Set a section that is not a list of rows, such as limits."""
        self.data[section] = value
        self.write()

    def rows(self, section: str) -> list[dict[str, Any]]:
        return self.data.get(section, [])

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(dumps(self.data))
        os.replace(part, self.path)  # a reader, or a kill, never sees half a file


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to `digits` significant digits, in place of 17: the rest is noise and diff."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v, digits) for v in value]
    return value


def dumps(data: dict[str, Any]) -> str:
    """JSON with one row a line: small, and readable in a diff."""
    parts = []
    for key, value in rounded(data).items():
        if isinstance(value, list) and value:
            lines = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(key)}: [\n  {lines}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load(path: Path) -> dict[str, Any]:
    """Read a result file; ValueError if it is not one of ours."""
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"bench: {path.name} is not JSON ({error})") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"bench: {path.name} must have schema {SCHEMA!r}, has {schema!r}")
    return data


def load_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All result files of a folder, newest last."""
    return sorted((load(path) for path in folder.glob("*.json")), key=lambda data: data["date"])


def merge(paths: Sequence[Path], into: Path) -> Path:
    """Make one result file of several calls on one machine; a row of the later file wins.

    Later is by date, then as given. A file that already stands there takes part.

    Args:
        paths: Result files.
        into: File or folder, as in `Results`.

    Returns:
        The file written.

    Raises:
        ValueError: they differ in device, commit, torch or triton.
    """
    files = {path.resolve(): load(path) for path in paths}
    first = next(iter(files.values()))
    target = into if into.suffix == ".json" else into / file_name(first)
    if target.exists():
        files = {target.resolve(): load(target)} | files
    for path, data in files.items():
        for key in ("device", "commit", "torch", "triton"):
            if data[key] != first[key]:
                raise ValueError(
                    f"bench: files to merge must agree; {key} is {first[key]} in {paths[0].name}, "
                    f"{data[key]} in {path.name}"
                )
    ordered = sorted(files.values(), key=lambda data: data["date"])
    merged: dict[str, Any] = {}
    for data in ordered:
        joined: dict[str, Any] = {"parts": merged.get("parts", {}) | data.get("parts", {})}
        for section in KEYS.keys() & data.keys():
            names = KEYS[section]
            again = {tuple(map(row.get, names)) for row in data[section]}
            kept = [r for r in merged.get(section, []) if tuple(map(r.get, names)) not in again]
            joined[section] = kept + data[section]
        merged |= data | joined
    commands = [command for data in ordered for command in data["command"].split("; ")]
    dirty = [data["dirty"] for data in ordered]
    merged["command"] = "; ".join(dict.fromkeys(commands))
    # Clean where all are; None is "not known".
    merged["dirty"] = True if True in dirty else None if None in dirty else False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(dumps(merged))
    return target
