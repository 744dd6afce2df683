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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.rows import SECTIONS, Row, merged
from model.files import write_atomically
from training.child import ROOT
from training.environment import git, package_version
from training.machines import cpu_name, nvidia_smi
from training.plan import Choices, detect, make_plan
from training.probe import measure_rates
from training.recipes import Recipe

RESULTS = ROOT / "bench/results"
SCHEMA = "fused-gpt/bench/2"
ONE_FILE = ("device", "commit", "torch", "triton")  # the same for all rows of a file
MADE = ("bench/results", "bench/plots", "docs/results.md", "README.md")  # by the bench itself
Keep = Callable[[Any], bool]


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


@cache
def limits(device: torch.device) -> dict[str, float]:
    """What this machine reaches, as `train.py --explain` measures it: what rows are held against.

    Returns:
        copy_gbs: GB/s of a copy larger than any cache, bytes read plus bytes written.
        matmul_tflops, matmul_k768_tflops: TFLOP/s of a large square matmul and of one with
            GPT-2's inner dimension 768; bf16 on CUDA, fp32 on the CPU.
    """
    dtype = "bf16" if device.type == "cuda" else "fp32"
    recipe, machine = Recipe(model="124m", batch_size=64, block_size=1024), detect(device.type)
    choices = Choices(dtype=dtype, micro_batch_size=64)
    rates = measure_rates(recipe, machine, make_plan(recipe, machine, choices))
    return {
        "copy_gbs": rates.copy_gbs,
        "matmul_tflops": rates.matmul_gflops[dtype] / 1e3,
        "matmul_k768_tflops": rates.shape_gflops / 1e3,
    }


def gpu_state() -> dict[str, float]:
    """Clocks in MHz, power in W and temperature now; {} where nvidia-smi does not say."""
    wanted = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    return {name: float(value) for name, value in nvidia_smi(*wanted).items()}


def git_state() -> tuple[str, bool]:
    """Commit and whether tracked files differ from it, MADE left out; ("unknown", True) if so."""
    status = ["status", "--porcelain", "--untracked-files=no", "--", "."]
    changed = git(ROOT, *status, *(f":!{path}" for path in MADE))
    return git(ROOT, "rev-parse", "HEAD") or "unknown", changed != ""


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Everything a reader needs to run it again; `commit` names it where git is not at hand."""
    found, dirty = git_state()
    argv = sys.orig_argv[1:] or sys.argv
    command = ["python", *(os.path.relpath(a) if os.path.isabs(a) else a for a in argv)]
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "commit": commit or found,
        "dirty": dirty if commit is None or found == commit else None,  # None: not known
        "command": shlex.join(command),
    }


@dataclass
class Result:
    """What is known of one device at one commit.

    Args:
        about: Device, versions, commit, date, command; and what is no list of rows: limits.
        sections: Rows by section.
    """

    about: dict[str, Any]
    sections: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def device(self) -> dict[str, Any]:
        return self.about["device"]

    def rows(self, section: str) -> list[Any]:
        """Rows of a section, of the type that SECTIONS has for it."""
        return self.sections.get(section, [])

    def join(self, later: "Result") -> None:
        """Take over what a later result has; where both have a row, the later one's counts.

        Raises:
            ValueError: they differ in device, commit, torch or triton.
        """
        ours, theirs = self.about, later.about
        for key in ONE_FILE:
            if ours[key] != theirs[key]:
                raise ValueError(
                    f"bench: results of one file must agree in {key}; it is {ours[key]} and "
                    f"{theirs[key]}; give another --out"
                )
        commands = dict.fromkeys(c for x in (ours, theirs) for c in x["command"].split("; "))
        dirty = (ours["dirty"], theirs["dirty"])  # rows cannot be told apart: clean where all are
        self.about = ours | theirs | {"command": "; ".join(commands)}
        self.about["dirty"] = True if True in dirty else None if None in dirty else False
        for name, rows in later.sections.items():
            self.sections[name] = merged(self.rows(name), rows)

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
        device: Where the rows come from.
        path: File or folder; a folder gets a file named after device and commit.
        commit: As in `environment`.

    Raises:
        ValueError: the file exists and is of another schema, device or commit.
    """

    def __init__(self, device: torch.device, path: Path = RESULTS, commit: str | None = None):
        super().__init__(environment(device, commit))
        cores = f" {self.device['cores']} cores" if self.device["type"] == "cpu" else ""
        slug = re.sub(r"[^a-z0-9]+", "-", (self.device["name"] + cores).lower()).strip("-")
        name = f"{slug}-{self.about['commit'][:8]}.json"
        self.path = path if path.suffix == ".json" else path / name
        self.path.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        if self.path.exists():
            before = load(self.path)
            before.join(self)
            self.about, self.sections = before.about, before.sections

    def add(self, section: str, *rows: Row) -> None:
        """Insert or replace rows and write the file."""
        self.sections[section] = merged(self.rows(section), rows)
        self.write(self.path)


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
    """Read a result file; ValueError if it is none."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"bench: {path.name} is not JSON ({error})") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"bench: {path.name} must have schema {SCHEMA!r}, has {schema!r}")
    try:
        sections = {name: [kind(**values) for values in data.pop(name)]
                    for name, kind in SECTIONS.items() if name in data}  # fmt: skip
    except TypeError as error:
        raise ValueError(f"bench: a row of {path.name} cannot be read: {error}") from None
    return Result(data, sections)


def load_all(folder: Path = RESULTS) -> list[Result]:
    """The results of a folder, newest last; those of one device, commit and versions as one."""
    found: dict[str, Result] = {}
    loaded = map(load, sorted(folder.glob("*.json")))
    for result in sorted(loaded, key=lambda result: result.about["date"]):
        key = json.dumps([result.about[name] for name in ONE_FILE])
        if earlier := found.pop(key, None):
            earlier.join(result)
        found[key] = earlier or result
    return [*found.values()]


def with_values(**want: Any) -> Keep:
    """A predicate: the row has these values."""
    return lambda row: all(getattr(row, name) == value for name, value in want.items())


def newest(
    results: Sequence[Result], device_type: str, section: str, keep: Keep = lambda row: True
) -> tuple[Result | None, list[Any]]:
    """The latest result of that kind of device with rows in `section` that `keep` takes, and them.

    Without one, None and no rows.
    """
    for result in reversed(results):
        rows = [row for row in result.rows(section) if keep(row)]
        if rows and result.device["type"] == device_type:
            return result, rows
    return None, []
