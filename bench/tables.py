"""Markdown tables of rows: the one place that shows figures, and none of a row in doubt."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from bench.cases import CASES
from bench.record import Result
from bench.rows import OpRow, Row, StepRow, TimedRow

R = TypeVar("R", bound=Row)
Columns = Sequence[tuple[str, Callable[[R], str]]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, the rest to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) for c, w in zip(cells, widths, strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def shown(rows: Iterable[R]) -> list[R]:
    """The rows whose figures may be shown."""
    return [row for row in rows if not row.doubt]


def cell(text: object) -> str:
    """Text of others (errors, last lines) as it may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:200]


def rows_table(rows: Sequence[R], names: Columns[R], figures: Columns[R]) -> str:
    """A line per row: what it is, and its figures, or why they are not shown.

    A column of figures that is empty in all rows is left out.
    """
    lines = []
    for row in rows:
        found = [get(row) for _, get in names]
        rest = [f"not shown: {cell(row.doubt)}", *[""] * (len(figures) - 1)]
        lines.append(found + (rest if row.doubt else [get(row) for _, get in figures]))
    header = [title for title, _ in (*names, *figures)]
    keep = [i for i in range(len(header)) if i <= len(names) or any(line[i] for line in lines)]
    return table([header[i] for i in keep], [[line[i] for i in keep] for line in lines])


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def over(name: str) -> Callable[[TimedRow], str]:
    return lambda row: number(row.over.get(name), ".2f")


def ops_table(rows: Sequence[OpRow]) -> str:
    """A line per provider; rates are GB/s for ops bound by memory, TFLOP/s for the rest."""
    return rows_table(
        sorted(rows, key=lambda row: [*CASES].index(row.op)),
        [
            ("op", lambda r: r.op),
            ("mode", lambda r: r.mode),
            ("who", lambda r: r.provider + (f" ({r.backend.lower()})" if r.backend else "")),
        ],
        [
            ("ms", lambda r: f"{r.ms:.3g}"),
            ("spread", lambda r: r.spread),
            ("rate", op_rate),
            ("of limit", lambda r: f"{r.of_limit:.0%}"),
            ("x eager", over("eager")),
            ("x compile", over("compile")),
            ("extra GiB", lambda r: number(r.peak_gib, ".2f")),
        ],
    )


def op_rate(row: OpRow) -> str:
    return f"{row.gbs:,.3g} GB/s" if row.tflops is None else f"{row.tflops:,.3g} TFLOP/s"


def step_table(rows: Sequence[StepRow]) -> str:
    """A line per contestant: tokens/s is what a user sees; and what it is times which rival."""
    on_gpu = any(row.peak_tflops for row in rows)
    rivals = ["compile bf16" if on_gpu else "eager fp32"]
    rivals += [row.provider for row in rows if row.provider.startswith("nanogpt")]

    def mfu(row: StepRow) -> str:
        if row.peak_tflops is None:
            return ""
        return " / ".join(f"{x / row.peak_tflops:.1%}" for x in (row.tflops_palm, row.tflops_llmc))

    return rows_table(
        rows,
        [("what runs", lambda r: r.provider)],
        [
            ("tokens/s", lambda r: f"{r.tokens_per_s:,.0f}"),
            ("ms/step", lambda r: f"{r.ms:,.1f}"),
            ("spread", lambda r: r.spread),
            *((f"x {name}", over(name)) for name in rivals),
            ("MFU palm / llmc", mfu),
            ("peak GiB", lambda r: number(r.peak_gib, ".1f")),
            ("TFLOP/s", lambda r: "" if on_gpu else f"{r.tflops_palm:.3f}"),
            ("first step s", lambda r: f"{r.first_step_s:.1f}"),
        ],
    )


def device_line(result: Result) -> str:
    device = result.device
    if device["type"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, {device['isa']}"
    return device["name"]


def source_line(result: Result) -> str:
    """Where a table comes from, in one sentence."""
    about, name = result.about, device_line(result)
    if result.device["type"] == "cuda":
        name += f", driver {result.device['driver']}"
    dirty = ", uncommitted changes" if about["dirty"] else ""
    return (
        f"{name}; torch {about['torch']}, triton {about['triton']}; commit "
        f"{about['commit'][:8]}{dirty}; {about['date'][:10]}; `{about['command']}`"
    )
