"""Markdown tables of rows: the only place that shows figures, never those of a row in doubt."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bench.cases import CASES
from bench.record import OpRow, Result, Row, StepRow, TimedRow

R = TypeVar("R", bound=Row)
Columns = Mapping[str, Callable[[Any], str]]  # heading -> the cell for a row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, the rest to the right.

    A column that is empty in all rows is left out.
    """
    columns = [c for c in zip(header, *rows, strict=True) if not rows or any(c[1:])]
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) for c, w in zip(cells, widths, strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *padded[1:]]) + " |"

    rule = "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths))
    top, *lines = zip(*columns, strict=True)
    return "\n".join([line(top), f"|{rule}|", *map(line, lines)])


def shown(rows: Iterable[R]) -> list[R]:
    """The rows whose figures may be shown."""
    return [row for row in rows if not row.doubt]


def cell(text: object) -> str:
    """Text from elsewhere (errors, last lines), made safe for a table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:200]


def rows_table(rows: Sequence[Row], names: Columns, figures: Columns) -> str:
    """A line per row with its names and figures; below, the rows in doubt and why."""
    columns = {**names, **figures}
    lines = [[get(row) for get in columns.values()] for row in shown(rows)]
    return "\n\n".join([*([table([*columns], lines)] if lines else []), *hidden(rows, names)])


def hidden(rows: Sequence[Row], names: Columns) -> list[str]:
    """The names of rows in doubt, a line for each reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.doubt:
            who = " ".join(filter(None, (get(row) for get in names.values())))
            found.setdefault(cell(row.doubt), []).append(who)
    return [f"{', '.join(who)}: not shown: {why}" for why, who in found.items()]


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def figures_3(value: float) -> str:
    """Three significant figures, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(row: TimedRow) -> str:
    return f"{100 * row.cov:.1f}%" + " !" * row.noisy


def ops_table(rows: Sequence[OpRow]) -> str:
    """A line per op: each provider's ms, and how ours compares. All rows have one size and mode."""
    who = dict.fromkeys(row.provider for row in rows)
    header = ["op", *(f"{name} ms" for name in who), "ours", "of limit", "x eager", "x compile"]
    lines = []
    for op in sorted({row.op for row in rows}, key=[*CASES].index):
        found = {row.provider: row for row in shown(rows) if row.op == op}
        times = {name: f"{row.ms:.3g}" + " !" * row.noisy for name, row in found.items()}
        cells = ["", "", "", ""]
        if ours := found.get("ours"):
            rate = f"{figures_3(ours.tflops)} TFLOP/s" if ours.tflops else ""
            ratios = [number(ours.over.get(name), ".2f") for name in ("eager", "compile")]
            cells = [rate or f"{figures_3(ours.gbs)} GB/s", f"{ours.of_limit:.0%}", *ratios]
        gib = {name: number(row.peak_gib, ".2f") for name, row in found.items()}
        memory = " / ".join(gib.get(name) or "-" for name in ("eager", "compile", "ours"))
        known = any(gib.values())
        lines.append([op, *(times.get(name, "") for name in who), *cells, memory * known])
    body = table([*header, "extra GiB: eager / compile / ours"], lines)
    taken = [f"{row.op} {row.provider} used {row.backend.lower()}." for row in rows if row.backend]
    names: Columns = {"op": lambda row: row.op, "who": lambda row: row.provider}
    return "\n\n".join(filter(None, [body, " ".join(taken), *hidden(rows, names)]))


def step_table(rows: Sequence[StepRow]) -> str:
    """A line per contestant: tokens/s, which a user sees, then the ratios to its rivals."""
    on_gpu = any(row.peak_tflops for row in rows)
    rivals = ["compile bf16" if on_gpu else "eager fp32"]
    rivals += [row.provider for row in rows if row.provider.startswith("nanogpt")]
    if all(row.provider.startswith("ours bf16") for row in rows):  # an ablation
        rivals = ["ours bf16"]

    def mfu(row: StepRow) -> str:
        rates, peak = (row.tflops_palm, row.tflops_llmc), row.peak_tflops
        return " / ".join(f"{rate / peak:.1%}" for rate in rates) if peak else ""

    def over(name: str) -> Callable[[StepRow], str]:
        return lambda row: number(row.over.get(name), ".2f")

    return rows_table(
        rows,
        {"what runs": lambda row: row.provider},
        {
            "tokens/s": lambda row: f"{row.tokens_per_s:,.0f}",
            "ms/step": lambda row: f"{row.ms:,.1f}",
            "spread": spread,
            **{f"x {name}": over(name) for name in rivals},
            "MFU palm / llmc": mfu,
            "peak GiB": lambda row: number(row.peak_gib, ".1f"),
            "TFLOP/s": lambda row: "" if on_gpu else f"{row.tflops_palm:.3f}",
            "first step s": lambda row: f"{row.first_step_s:.1f}",
        },
    )


def device_line(result: Result) -> str:
    device = result.device
    cores = f", {device['cores']} cores, {device['isa']}" if device["type"] == "cpu" else ""
    return device["name"] + cores


def where(result: Result) -> str:
    """Device and commit: where the figures of a table come from."""
    return f"{device_line(result)}, {result.commit}"


def source_line(result: Result) -> str:
    """What was run, and on what, in one sentence."""
    about, driver = result.about, result.device.get("driver")
    return (
        f"{where(result)}{', uncommitted changes' if about['dirty'] else ''}: "
        f"{f'driver {driver}, ' if driver else ''}torch {about['torch']}, triton "
        f"{about['triton']}, {about['date'][:10]}; `{about['command']}`"
    )
