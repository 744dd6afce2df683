"""Plots of the result files: the same SVG for the same rows. `bench.report` has them drawn."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.cases import CASES
from bench.record import OpRow, Result, Row, SeedRow, StepRow, newest, with_values
from bench.tables import device_line, shown
from training import plot
from training.recipes import PRESETS, PUBLISHED_LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGE = {"model": "124m", "shape": "B=64 T=1024", "accum": 1}  # the size of the goals
MAX_BAR = 3.0  # of eager's time; a slower one is cut off there and keeps its number
COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#4a7fb5",
    "ours": "#d9602b",
    "liger": "#7b5ea7",
    "sdpa-flash": "#3f9b6e",
    "sdpa-cudnn": "#a8a03a",
    "linear-ce": "#b5507c",
}

Found = tuple[Result | None, list[Any]]  # a result, and its rows that are shown


def colour(provider: str) -> str:
    return COLOURS.get(provider.split(" ")[0], "#8f8f8f")


def step_rows(device: str, results: Sequence[Result]) -> Found:
    """Of one size; on a GPU that of the goals, whatever was measured last."""
    result, rows = newest(results, device, "step")
    rows = shown(rows)
    first = next(filter(with_values(**LARGE), rows), rows[0] if rows else None)
    return result, [row for row in rows if all(getattr(row, k) == getattr(first, k) for k in LARGE)]


def draw_step(result: Result, rows: list[StepRow]) -> "Axes":
    title = f"Training step, GPT-2 {rows[0].model}, {rows[0].shape}\n{device_line(result)}"
    axes = plot.new_axes(title, "tokens/s")
    for i, row in enumerate(rows):
        low, high = (row.tokens / ms * 1e3 for ms in (row.q3_ms, row.q1_ms))
        rate = row.tokens_per_s
        bars = [[rate - low], [high - rate]]
        axes.bar(i, rate, 0.6, color=colour(row.provider), yerr=bars, ecolor="#333333", capsize=3)
        text = f"{rate:,.0f}" + " !" * row.noisy
        axes.text(i, rate / 2, text, ha="center", va="center", color="white", fontsize=9)
    axes.set_xticks(range(len(rows)), ["\n".join(r.provider.rsplit(" ", 1)) for r in rows])
    if any(row.noisy for row in rows):
        axes.set_xlabel("bars: quartiles; ! : samples spread over 5%", fontsize=8)
    return axes


def op_sizes(rows: Iterable[OpRow]) -> list[str]:
    """Labels in the order of the rows, that of the goals first."""
    labels = dict.fromkeys(row.shape for row in rows)
    return sorted(labels, key=lambda label: label != LARGE["shape"])


def op_rows(device: str, results: Sequence[Result]) -> Found:
    """Of one size, those that have a time of eager's to be held against."""
    result, rows = newest(results, device, "ops", with_values(mode="both"))
    rows = [row for row in shown(rows) if row.provider == "eager" or "eager" in row.over]
    return result, [row for row in rows if row.shape == op_sizes(rows)[0]]


def draw_ops(result: Result, rows: list[OpRow]) -> "Axes":
    ops = sorted({row.op for row in rows}, key=[*CASES].index)
    who = list(dict.fromkeys(row.provider for row in rows))
    title = f"Each op, forward and backward, {rows[0].shape}\n{device_line(result)}"
    axes = plot.new_axes(title, "time, eager = 1 (lower is faster)")
    ordered = sorted(rows, key=lambda row: who.index(row.provider))
    groups = [[row for row in ordered if row.op == op] for op in ops]
    width = 0.8 / max(map(len, groups))
    bars = {}
    for i, group in enumerate(groups):
        for j, row in enumerate(group):
            share = 1 / row.over.get("eager", 1.0)
            x, height = i + (j - (len(group) - 1) / 2) * width, min(share, MAX_BAR)
            bars[row.provider] = axes.bar(x, height, width * 0.92, color=colour(row.provider))
            text = f"{share:.2f}" if share < 10 else f"{share:.0f}"
            behind = {"facecolor": "white", "linewidth": 0, "pad": 0.2}  # hides the line at 1
            axes.text(x, height + 0.02, text, ha="center", fontsize=6, bbox=behind)
    axes.set_xticks(range(len(ops)), [op.replace("_", "\n") for op in ops], fontsize=8)
    axes.axhline(1, color="#777777", linewidth=0.8)
    handles = [bars[name] for name in who]
    axes.legend(handles, who, ncols=len(who), fontsize=8, frameon=False, loc="upper right")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.15)  # room for the legend
    return axes


def warmest(rows: Iterable[SeedRow]) -> list[SeedRow]:
    """Of seed runs the last with warm caches, which is taken to the target, or else the last."""
    return sorted(rows, key=lambda row: row.cache == "warm")[-1:]


def curve_rows(device: str, results: Sequence[Result]) -> Found:
    def keep(row: SeedRow) -> bool:
        return row.text == "tiny Shakespeare" and bool(row.curve) and not row.doubt

    result, rows = newest(results, device, "seed", keep)
    return result, warmest(rows)


def draw_curve(result: Result, rows: list[SeedRow]) -> "Axes":
    title = f"Loss of the recipe shakespeare-124m\n{device_line(result)}"
    curve = [(float(step), float(loss)) for step, loss in rows[0].curve]
    goal = {"goal": PRESETS["shakespeare-124m"].target_loss} if rows[0].reached else {}
    published = [point for point in PUBLISHED_LOSS if point[0] <= curve[-1][0]]
    return plot.loss_curve(curve, published=published, levels=goal, title=title).axes[0]


class Figure(NamedTuple):
    """One image: its title, which rows of which result it shows, and how they are drawn."""

    title: str
    find: Callable[[Sequence[Result]], Found]
    draw: Callable[[Result, list[Any]], "Axes"]


STEP, OPS = "Tokens per second of a training step on a", "Each op beside its rivals on a"
CURVE = "Loss of the recipe shakespeare-124m on a"
FIGURES = {
    "step-gpu": Figure(f"{STEP} GPU", partial(step_rows, "cuda"), draw_step),
    "step-cpu": Figure(f"{STEP} CPU", partial(step_rows, "cpu"), draw_step),
    "ops-gpu": Figure(f"{OPS} GPU", partial(op_rows, "cuda"), draw_ops),
    "ops-cpu": Figure(f"{OPS} CPU", partial(op_rows, "cpu"), draw_ops),
    "curve-gpu": Figure(f"{CURVE} GPU", partial(curve_rows, "cuda"), draw_curve),
    "curve-cpu": Figure(f"{CURVE} CPU", partial(curve_rows, "cpu"), draw_curve),
}


def to_draw(results: Sequence[Result]) -> dict[str, tuple[Result, list[Any]]]:
    """By figure what it shows; those without data are left out."""
    found = {name: figure.find(results) for name, figure in FIGURES.items()}
    return {name: (result, rows) for name, (result, rows) in found.items() if result and rows}


def mark(rows: Sequence[Row]) -> str:
    """Of the rows a figure shows; it stands in the SVG, so a stale figure is found."""
    values = json.dumps([row.values() for row in rows], sort_keys=True)
    return f"rows {hashlib.sha256(values.encode()).hexdigest()[:16]}"


def draw(name: str, result: Result, rows: list[Any], path: Path) -> None:
    drawing: Any = FIGURES[name].draw(result, rows).figure
    plot.save(drawing, path, mark(rows))
