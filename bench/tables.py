"""Markdown tables of rows: the one place that shows figures, and none of a row in doubt."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bench.cases import CASES
from bench.record import OpRow, Result, Row, StepRow, TimedRow

R = TypeVar("R", bound=Row)
Columns = Mapping[str, Callable[[Any], str]]  # heading -> the cell of what a line is of


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
    """Text of others (errors, last lines) as it may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:200]


def rows_table(rows: Sequence[Row], names: Columns, figures: Columns) -> str:
    """A line per row with what it is and its figures; below, the rows in doubt and why."""
    columns = {**names, **figures}
    lines = [[get(row) for get in columns.values()] for row in shown(rows)]
    return "\n\n".join([*([table([*columns], lines)] if lines else []), *hidden(rows, names)])


def hidden(rows: Sequence[Row], names: Columns) -> list[str]:
    """Who is in doubt, a line for each reason."""
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


def over(name: str) -> Callable[[TimedRow], str]:
    return lambda row: number(row.over.get(name), ".2f")


def rate(row: OpRow) -> str:
    """GB/s of an op that is bound by memory, TFLOP/s of the rest."""
    return f"{figures_3(row.tflops or row.gbs)} {'TFLOP/s' if row.tflops else 'GB/s'}"


def ops_table(rows: Sequence[OpRow]) -> str:
    """A line per op: everyone's ms, and how ours stands; of rows of one size and mode."""
    who = dict.fromkeys(row.provider for row in rows)
    found = {(row.op, row.provider): row for row in shown(rows)}

    def of(name: str, get: Callable[[OpRow], str]) -> Callable[[str], str]:
        return lambda op: get(found[op, name]) if (op, name) in found else ""

    def memory(op: str) -> str:
        gib = {name: of(name, lambda row: number(row.peak_gib, ".2f"))(op) for name in who}
        known = any(gib.values())
        return " / ".join(gib.get(n) or "-" for n in ("eager", "compile", "ours")) * known

    columns = {
        "op": str,
        **{f"{name} ms": of(name, lambda r: f"{r.ms:.3g}" + " !" * r.noisy) for name in who},
        "ours": of("ours", rate),
        "of limit": of("ours", lambda row: f"{row.of_limit:.0%}"),
        "x eager": of("ours", over("eager")),
        "x compile": of("ours", over("compile")),
        "extra GiB: eager / compile / ours": memory,
    }
    ops = sorted({row.op for row in rows}, key=[*CASES].index)
    body = table([*columns], [[get(op) for get in columns.values()] for op in ops])
    taken = [f"{row.op} {row.provider} took {row.backend.lower()}." for row in rows if row.backend]
    names: Columns = {"op": lambda row: row.op, "who": lambda row: row.provider}
    return "\n\n".join(filter(None, [body, " ".join(taken), *hidden(rows, names)]))


def step_table(rows: Sequence[StepRow]) -> str:
    """A line per contestant: tokens/s is what a user sees; and what it is times which rival."""
    on_gpu = any(row.peak_tflops for row in rows)
    rivals = ["compile bf16" if on_gpu else "eager fp32"]
    rivals += [row.provider for row in rows if row.provider.startswith("nanogpt")]
    if all(row.provider.startswith("ours bf16") for row in rows):  # one thing switched back
        rivals = ["ours bf16"]

    def mfu(row: StepRow) -> str:
        rates, peak = (row.tflops_palm, row.tflops_llmc), row.peak_tflops
        return " / ".join(f"{rate / peak:.1%}" for rate in rates) if peak else ""

    return rows_table(
        rows,
        {"what runs": lambda row: row.provider},
        {
            "tokens/s": lambda row: f"{row.tokens_per_s:,.0f}",
            "ms/step": lambda row: f"{row.ms:,.1f}",
            "spread": lambda row: row.spread,
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
    """Device and commit: what tells apart the figures of one table."""
    return f"{device_line(result)}, {result.about['commit'][:8]}"


def source_line(result: Result) -> str:
    """What was run on what, in one sentence."""
    about, driver = result.about, result.device.get("driver")
    return (
        f"{where(result)}{', uncommitted changes' if about['dirty'] else ''}: "
        f"{f'driver {driver}, ' if driver else ''}torch {about['torch']}, triton "
        f"{about['triton']}, {about['date'][:10]}; `{about['command']}`"
    )
