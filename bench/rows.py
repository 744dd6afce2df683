"""The rows of result files, one type for each section.

A row whose figures must not be shown says why in `doubt`, and nowhere else; it keeps what was
measured. `bench.tables` shows rows, and no figure of a row in doubt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

from training.timing import Timing, ratio

NOISY_COV = 0.05  # rows whose samples spread more than this are marked


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result. `doubt` says why its figures must not be shown; empty: they may be."""

    KEY: ClassVar[tuple[str, ...]] = ()  # the fields that tell it from its neighbours
    doubt: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.KEY)

    def values(self) -> dict[str, Any]:
        """What a file holds, the key first: the fields that are not as by default."""
        default = {f.name: f.default for f in fields(self)}
        found = ((name, getattr(self, name)) for name in dict.fromkeys([*self.KEY, *default]))
        return {name: value for name, value in found if value not in (default[name], {})}


@dataclass(frozen=True, kw_only=True)
class TimedRow(Row):
    """What was timed: median, quartiles, deviation over mean, samples.

    `over` has how many times faster it is than others, by their name; `gpu` clocks, power and
    temperature right after.
    """

    provider: str
    ms: float = 0.0
    q1_ms: float = 0.0
    q3_ms: float = 0.0
    cov: float = 0.0
    rounds: int = 0
    over: dict[str, float] = field(default_factory=dict)
    gpu: dict[str, float] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        return self.cov > NOISY_COV

    @property
    def spread(self) -> str:
        return f"{100 * self.cov:.1f}%" + (" !" if self.noisy else "")


@dataclass(frozen=True, kw_only=True)
class OpRow(TimedRow):
    """One op, direction and provider; or clip and AdamW, as op "optimizer"."""

    KEY = ("op", "shape", "dtype", "mode", "provider", "sweep")
    op: str
    shape: str
    dtype: str
    mode: str
    sweep: bool = False  # part of a plot over sizes, not of a table
    timed: str = ""  # "graph", "launches" or "host", as in training/timing.py
    gbs: float = 0.0
    tflops: float | None = None  # None: bound by memory
    of_limit: float = 0.0  # the time that the measured limits allow, over the time taken
    peak_gib: float | None = None
    checked: str = ""  # label of the shape that numerics were checked on
    backend: str = ""  # of SDPA, as torch chose it


@dataclass(frozen=True, kw_only=True)
class StepRow(TimedRow):
    """One contestant's training step; also of generation."""

    KEY = ("model", "shape", "accum", "provider")
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
    rival_again_ms: float | None = None  # of the compiled twin, measured again afterwards

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.ms * 1e3


@dataclass(frozen=True, kw_only=True)
class ProfileRow(Row):
    """What one kind of work takes of a step: ms, share of its span, calls, the longest names."""

    KEY = ("model", "shape", "provider", "kind")
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

    KEY = ("text", "cache", "plan")
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
    """Evidence that the kernels are right, in doubt where it fails: which check, of what."""

    KEY = ("check", "what")
    check: str
    what: str
    found: str = ""  # in words


@dataclass(frozen=True, kw_only=True)
class TuneRow(Row):
    """What a search for launch rows found for one kernel at one shape; of results up to 2026."""

    KEY = ("kernel", "shape", "dtype")
    kernel: str
    shape: str
    dtype: str
    present: dict[str, Any]
    best: dict[str, Any]
    gain: float
    propose: bool = False
    more: dict[str, Any] = field(default_factory=dict)


SECTIONS: dict[str, type[Row]] = {
    **dict.fromkeys(("ops", "optimizer"), OpRow),
    **dict.fromkeys(("step", "ablation", "generate"), StepRow),
    "profile": ProfileRow,
    "seed": SeedRow,
    "checks": CheckRow,
    "tune": TuneRow,
}


R = TypeVar("R", bound=TimedRow)


def filled(
    row: R, timed: Mapping[str, Timing], failed: Mapping[str, str], rivals: Iterable[str]
) -> R:
    """The row of a provider with its time and its ratios to rivals, or with why it has no time."""
    row = replace(row, doubt=failed.get(row.provider, ""))
    if (found := timed.get(row.provider)) is None:
        return row
    over = {other: ratio(timed[other], found) for other in rivals if other in timed}
    over.pop(row.provider, None)
    return replace(row, over=over, **found.figures)


def merged(*groups: Iterable[Row]) -> list[Row]:
    """The rows of all groups; of those with equal keys the last, in the place of the last."""
    rows: dict[tuple[Any, ...], Row] = {}
    for row in (row for group in groups for row in group):
        rows.pop(row.key, None)
        rows[row.key] = row
    return [*rows.values()]
