"""Result files: one small JSON per device and commit, rewritten after every row.

    {"schema": ..., "device": {...}, "torch": ..., "commit": ..., "dirty": ..., "command": ...,
     "limits": {...}, "step": [...], "ops": [...], ...}

A section holds rows of one type. A new row replaces the one with the same key, so measuring again
refreshes a file, and an interrupted run keeps what it has. `doubt` says why a row's figures must
not be shown; they stay in the file.
"""

import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from model.files import read_regular, write_atomically
from training.child import ROOT
from training.environment import git, package_version
from training.machines import cpu_name, nvidia_smi
from training.plan import Choices, detect, make_plan
from training.probe import measure_rates
from training.recipes import Recipe

RESULTS = ROOT / "bench/results"
SCHEMA = "fused-gpt/bench/2"
ONE_FILE = ("device", "commit", "torch", "triton")  # the same for all rows of a file
MADE = ("bench/results", "bench/plots", "docs/results.md", "README.md")  # the bench writes these
NOISY_COV = 0.05  # rows whose samples spread more than this are marked
LARGE = {"model": "124m", "shape": "B=64 T=1024", "accum": 1}  # the step of the goals


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result. Its figures may be shown if `doubt` is empty."""

    KEY: ClassVar[str] = ""  # names of the fields that identify a row in its section
    doubt: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.KEY.split())

    def has(self, **want: Any) -> bool:
        """Whether these fields have these values."""
        return all(getattr(self, name) == value for name, value in want.items())

    def values(self) -> dict[str, Any]:
        """What the file holds: the fields that differ from their defaults, the key first."""
        default = {f.name: f.default for f in fields(self)}
        names = sorted(default, key=lambda name: name not in self.KEY.split())
        found = ((name, getattr(self, name)) for name in names)
        return {name: value for name, value in found if value not in (default[name], {})}


@dataclass(frozen=True, kw_only=True)
class TimedRow(Row):
    """A measured time: median, quartiles, standard deviation over mean, number of samples."""

    provider: str
    ms: float = 0.0
    q1_ms: float = 0.0
    q3_ms: float = 0.0
    cov: float = 0.0
    rounds: int = 0
    over: dict[str, float] = field(default_factory=dict)  # times as fast as each of these
    gpu: dict[str, float] = field(default_factory=dict)  # clocks, power, temperature just after

    @property
    def noisy(self) -> bool:
        return self.cov > NOISY_COV


@dataclass(frozen=True, kw_only=True)
class OpRow(TimedRow):
    """One op in one direction, by one provider."""

    KEY = "op shape dtype mode provider"
    op: str
    shape: str
    dtype: str
    mode: str
    timed: str = ""  # "graph", "launches" or "host", as in training/timing.py
    gbs: float = 0.0
    tflops: float | None = None  # None for an op bound by memory
    of_limit: float = 0.0  # the time that the measured limits allow, over the time taken
    peak_gib: float | None = None
    backend: str = ""  # the one of SDPA that torch chose


@dataclass(frozen=True, kw_only=True)
class StepRow(TimedRow):
    """One contestant's training step, or its generation."""

    KEY = "model shape accum provider"
    model: str
    shape: str
    accum: int = 1
    tokens: int = 0
    losses: Sequence[float] = ()  # of the warm-up
    grad_norm: float | None = None  # of the first step
    first_step_s: float = 0.0
    peak_gib: float | None = None
    tflops_palm: float = 0.0
    tflops_llmc: float = 0.0
    peak_tflops: float | None = None  # the datasheet's bf16 rate

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.ms * 1e3


@dataclass(frozen=True, kw_only=True)
class ProfileRow(Row):
    """One kind of work in a step: ms, share of the step, calls, the longest kernels' names."""

    KEY = "model shape provider kind"
    model: str
    shape: str
    provider: str
    kind: str
    ms: float
    share: float
    calls: int = 0
    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class SeedRow(Row):
    """A run of the Shakespeare recipe by train.py."""

    KEY = "text cache plan"
    text: str
    cache: str
    plan: str
    result: str  # in words
    reached: bool = False  # the loss fell below the target
    steps: int = 0
    tokens_per_s: float | None = None
    first_step_s: float | None = None  # from process start
    seconds: float | None = None  # from process start to the last step's end
    curve: Sequence[Sequence[float]] = ()  # (step, loss)
    samples: Sequence[dict[str, str]] = ()  # prompt and text


@dataclass(frozen=True, kw_only=True)
class CheckRow(Row):
    """One check of the kernels on one thing; `doubt` is set if they failed it."""

    KEY = "check what"
    check: str
    what: str
    found: str = ""  # in words


SECTIONS: dict[str, type[Row]] = {
    "ops": OpRow,
    **dict.fromkeys(("step", "ablation", "generate"), StepRow),
    "profile": ProfileRow,
    "seed": SeedRow,
    "checks": CheckRow,
}


def merged(*groups: Iterable[Row]) -> list[Row]:
    """All rows. Where keys are equal, the last row counts and keeps its place."""
    rows: dict[tuple[Any, ...], Row] = {}
    for group in groups:
        for row in group:
            rows.pop(row.key, None)
            rows[row.key] = row
    return [*rows.values()]


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and sizes of a device, for the top of a result file."""
    if device.type == "cuda":
        props = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": props.name,
            "memory_gib": round(props.total_memory / 2**30, 1),
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
    """The rates this machine reaches, measured like those of `train.py --explain`.

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
    """Clocks in MHz, power in W and temperature now; {} if nvidia-smi does not report them."""
    wanted = ["clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu"]
    return {name: float(value) for name, value in nvidia_smi(*wanted).items()}


def git_state() -> tuple[str, bool]:
    """The commit, and whether tracked files other than MADE differ from it.

    Without git it is ("unknown", True).
    """
    status = ["status", "--porcelain", "--untracked-files=no", "--", "."]
    changed = git(ROOT, *status, *(f":!{path}" for path in MADE))
    return git(ROOT, "rev-parse", "HEAD") or "unknown", changed != ""


@dataclass
class Result:
    """All results of one device at one commit."""

    about: dict[str, Any]  # device, versions, commit, date, command, limits
    sections: dict[str, list[Any]] = field(default_factory=dict)  # rows, of the types of SECTIONS
    path: Path = Path()  # what `add` writes

    @property
    def device(self) -> dict[str, Any]:
        return self.about["device"]

    @property
    def commit(self) -> str:
        """The first eight digits."""
        return self.about["commit"][:8]

    def rows(self, section: str, **want: Any) -> list[Any]:
        """The rows of a section that have these values."""
        return [row for row in self.sections.get(section, ()) if row.has(**want)]

    def join(self, later: "Result") -> None:
        """Add what a later result has; where both have a row, the later one counts.

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
        dirty = (ours["dirty"], theirs["dirty"])  # the file is clean only if both parts are
        self.about = ours | theirs | {"command": "; ".join(commands)}
        self.about["dirty"] = True if True in dirty else None if None in dirty else False
        for name, rows in later.sections.items():
            self.sections[name] = merged(self.rows(name), rows)

    def add(self, section: str, *rows: Row) -> None:
        """Insert or replace rows and write the file."""
        self.sections[section] = merged(self.rows(section), rows)
        self.write()

    def write(self) -> None:
        """JSON with one row per line."""
        parts = [f" {json.dumps(name)}: {json.dumps(rounded(v))}" for name, v in self.about.items()]
        for name, rows in self.sections.items():
            lines = ",\n  ".join(json.dumps(rounded(row.values())) for row in rows)
            parts.append(f" {json.dumps(name)}: [\n  {lines}\n ]")
        write_atomically(self.path, "{\n" + ",\n".join(parts) + "\n}\n")


def open_result(device: torch.device, path: Path = RESULTS, commit: str | None = None) -> Result:
    """The result file of this device and commit, with what it holds already.

    Args:
        path: A file; in a folder, the file is named after device and commit.
        commit: The measured commit; needed if git does not know it.

    Raises:
        ValueError: the file exists and has another schema, device or commit.
    """
    found, dirty = git_state()
    argv = sys.orig_argv[1:] or sys.argv
    command = ["python", *(os.path.relpath(a) if os.path.isabs(a) else a for a in argv)]
    about = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": describe_device(device),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "commit": commit or found,
        "dirty": dirty if commit in (None, found) else None,  # None: not known
        "command": shlex.join(command),
    }
    if path.suffix != ".json":
        cores = f" {about['device']['cores']} cores" if device.type == "cpu" else ""
        slug = re.sub(r"[^a-z0-9]+", "-", (about["device"]["name"] + cores).lower()).strip("-")
        path = path / f"{slug}-{about['commit'][:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)  # fail now, not after minutes of measuring
    if not path.exists():
        return Result(about, path=path)
    result = load(path)
    result.join(Result(about))
    return result


def rounded(value: Any) -> Any:
    """The value for JSON: floats with 5 digits, since the rest is noise, and None for NaN."""
    near = lambda text: float(f"{float(text):.5g}")  # noqa: E731
    return json.loads(json.dumps(value), parse_float=near, parse_constant=lambda _: None)


def load(path: Path) -> Result:
    """Read a result file, ignoring fields that rows no longer have.

    Raises:
        ValueError: it is not a result file.
    """
    try:
        data = json.loads(read_regular(path))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is one
        raise ValueError(f"bench: {path.name} is not JSON ({error})") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"bench: {path.name} must have schema {SCHEMA!r}, has {schema!r}")
    sections: dict[str, list[Row]] = {}
    try:
        for name, kind in SECTIONS.items():
            known = {f.name for f in fields(kind)}
            if rows := data.pop(name, []):
                sections[name] = [kind(**{k: row[k] for k in known & row.keys()}) for row in rows]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"bench: a row of {path.name} cannot be read: {error}") from None
    return Result(data, sections, path)


def load_all(folder: Path = RESULTS) -> list[Result]:
    """The results of a folder, newest last; those that agree in ONE_FILE are joined."""
    found: dict[str, Result] = {}
    loaded = map(load, sorted(folder.glob("*.json")))
    for result in sorted(loaded, key=lambda result: result.about["date"]):
        key = json.dumps([result.about[name] for name in ONE_FILE])
        if earlier := found.pop(key, None):
            earlier.join(result)
        found[key] = earlier or result
    return [*found.values()]


def newest(
    results: Sequence[Result], device_type: str, section: str, **want: Any
) -> tuple[Result | None, list[Any]]:
    """The latest result of that kind of device with such rows, and those rows."""
    for result in reversed(results):
        rows = result.rows(section, **want)
        if rows and result.device["type"] == device_type:
            return result, rows
    return None, []
