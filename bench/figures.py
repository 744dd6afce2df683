"""Plots of the result files, drawn by `bench.report`; the same rows give the same SVG."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.record import LARGE, Result, SeedRow, StepRow, newest
from bench.tables import device_line, shown
from training import plot
from training.recipes import PRESETS, PUBLISHED_LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"eager": "#9aa0a6", "compile": "#4a7fb5", "ours": "#d9602b"}

Found = tuple[Result | None, list[Any]]  # a result, and those of its rows that a plot shows


def step_rows(results: Sequence[Result], device: str) -> Found:
    """Rows of one size: that of the goals if it was measured, else the first."""
    result, rows = newest(results, device, "step")
    rows = shown(rows)
    first = next((row for row in rows if row.has(**LARGE)), rows[0] if rows else None)
    return result, [row for row in rows if all(getattr(row, k) == getattr(first, k) for k in LARGE)]


def draw_step(result: Result, rows: list[StepRow]) -> "Axes":
    title = f"Training step, GPT-2 {rows[0].model}, {rows[0].shape}\n{device_line(result)}"
    axes = plot.new_axes(title, "tokens/s")
    for i, row in enumerate(rows):
        low, high = (row.tokens / ms * 1e3 for ms in (row.q3_ms, row.q1_ms))
        rate, colour = row.tokens_per_s, COLOURS.get(row.provider.split(" ")[0], "#8f8f8f")
        bars = [[rate - low], [high - rate]]
        axes.bar(i, rate, 0.6, color=colour, yerr=bars, ecolor="#333333", capsize=3)
        text = f"{rate:,.0f}" + " !" * row.noisy
        axes.text(i, rate / 2, text, ha="center", va="center", color="white", fontsize=9)
    axes.set_xticks(range(len(rows)), ["\n".join(r.provider.rsplit(" ", 1)) for r in rows])
    if any(row.noisy for row in rows):
        axes.set_xlabel("bars: quartiles; ! : samples spread over 5%", fontsize=8)
    return axes


def warmest(rows: Iterable[SeedRow]) -> list[SeedRow]:
    """The last run with warm caches, which trains to the target loss; else the last run."""
    return sorted(rows, key=lambda row: row.cache == "warm")[-1:]


def curve_rows(results: Sequence[Result], device: str) -> Found:
    result, rows = newest(results, device, "seed", text="tiny Shakespeare", doubt="")
    return result, warmest(rows)


def draw_curve(result: Result, rows: list[SeedRow]) -> "Axes":
    title = f"Loss of the recipe shakespeare-124m\n{device_line(result)}"
    curve = [(float(step), float(loss)) for step, loss in rows[0].curve]
    goal = {"goal": PRESETS["shakespeare-124m"].target_loss} if rows[0].reached else {}
    published = [point for point in PUBLISHED_LOSS if point[0] <= curve[-1][0]]
    return plot.loss_curve(curve, published=published, levels=goal, title=title).axes[0]


class Plot(NamedTuple):
    """One plot: its file and title, the rows that it shows, and how they are drawn."""

    name: str
    title: str
    result: Result
    rows: list[Any]
    draw: Callable[[Result, list[Any]], "Axes"]

    @property
    def mark(self) -> str:
        """A hash of the rows; the SVG contains it, so a stale plot is found."""
        values = json.dumps([row.values() for row in self.rows], sort_keys=True)
        return f"rows {hashlib.sha256(values.encode()).hexdigest()[:16]}"

    def save(self, path: Path) -> None:
        figure: Any = self.draw(self.result, self.rows).figure
        plot.save(figure, path, self.mark)


def to_draw(results: Sequence[Result]) -> list[Plot]:
    """All plots that have data."""
    found = []
    for kind, title, find, draw in (
        ("step", "Tokens per second of a training step", step_rows, draw_step),
        ("curve", "Loss of the recipe shakespeare-124m", curve_rows, draw_curve),
    ):
        for suffix, device in (("gpu", "cuda"), ("cpu", "cpu")):
            result, rows = find(results, device)
            if result and rows:
                title_there = f"{title} on a {suffix.upper()}"
                found.append(Plot(f"{kind}-{suffix}", title_there, result, rows, draw))
    return found
