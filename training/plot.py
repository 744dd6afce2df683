"""Every plot of this project: loss.png of a run, the curves of its report, the bench's figures.

The same data give the same bytes: no date, no random ids. Nothing here uses pyplot, which keeps
global state and looks for a display. matplotlib is imported when something is drawn, not when a run
starts.
"""

import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.files import replacing, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
# Inches, of 72 SVG units each: at a phone's 360 pixels text of 10 units is still readable.
SIZE = (6.0, 3.4)
INK = "#24292f"  # text, axes, the published run; on a page this becomes the colour of its text
FEW_POINTS = 20  # up to here each point gets a mark: a line of one point cannot be seen
STYLE: dict[Any, Any] = {
    "font.size": 10, "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlesize": 10, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.2, "svg.fonttype": "none",
    # Where many points share a pixel column, the line keeps the extremes and drops the rest.
    "path.simplify_threshold": 0.5,
    # Write 0.00003 and 1500000 in full: readers overlook a factor in the corner.
    "axes.formatter.limits": (-6, 9), "axes.formatter.useoffset": False,
}  # fmt: skip


def _style(salt: str = "fused-gpt") -> AbstractContextManager[None]:
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may be missing here
    from matplotlib import style

    # "default" undoes a person's matplotlibrc, which may ask for LaTeX.
    return style.context(["default", {**STYLE, "svg.hashsalt": salt}])


def new_axes(
    title: str = "", ylabel: str = "", size: tuple[float, float] = SIZE, rows: int = 1
) -> "Axes":
    """The axes of a new figure; the first of `rows` axes above each other."""
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        for axes in figure.subplots(rows, sharex=True, squeeze=False).flat:
            axes.grid(axis="y", color="#888888", alpha=0.3, linewidth=0.6)
        figure.axes[0].set_title(title)
        figure.axes[0].set_ylabel(ylabel)
    return figure.axes[0]


def _plot(axes: "Axes", points: Points, style: str = "", **more: Any) -> None:
    """Plot a line; matplotlib breaks it where a value is not finite."""
    style = style or (".-" if len(points) <= FEW_POINTS else "-")
    axes.plot([x for x, _ in points], [y for _, y in points], style, **more)


def loss_curve(
    training: Points,
    validation: Points = (),
    published: Points = (),
    levels: Mapping[str, float] | None = None,
    title: str = "",
) -> "Figure":
    """The losses of a run over its steps.

    Args:
        training: (step, loss) of each step.
        validation: (step, loss) of each evaluation.
        published: (step, loss) of a run to compare with; the loss axis is then logarithmic.
        levels: Horizontal lines, name to loss.
        title: Above the plot.
    """
    axes = new_axes(title, "loss, nats per token")
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    with _style():
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
        _plot(axes, training, color="tab:blue", linewidth=0.9, label="training")
        if validation:
            _plot(axes, validation, "o-", color="tab:orange", markersize=3, label="validation")
        if published:
            _plot(axes, published, "+", color=INK, markersize=8, label="published run")
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        for (name, loss), style in zip((levels or {}).items(), ("--", ":"), strict=False):
            label = f"{name} {loss:.2f}"
            axes.axhline(loss, color="#888888", linestyle=style, linewidth=1, label=label)
        axes.legend(fontsize=9)
    return axes.figure  # type: ignore[return-value]


def step_curves(series: Mapping[str, Points]) -> "Figure":
    """Plots one above the other, over the same steps: title to (step, value)."""
    first = new_axes(size=(SIZE[0], 1.5 * len(series)), rows=len(series))
    from matplotlib.ticker import MaxNLocator

    with _style():
        for axes, (title, points) in zip(first.figure.axes, series.items(), strict=True):
            axes.set_title(title)
            _plot(axes, points, color="tab:blue", linewidth=0.9)
        first.figure.axes[-1].set_xlabel("step")
        first.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    return first.figure  # type: ignore[return-value]


def to_svg(figure: "Figure", salt: str = "fused-gpt", **metadata: str | None) -> str:
    """The figure as an SVG document, with metadata such as Description."""
    text = io.StringIO()
    with _style(salt):
        figure.savefig(text, format="svg", metadata={"Date": None, **metadata})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def inline_svg(figure: "Figure", label: str) -> str:
    """The figure as an SVG element of an HTML page: transparent, in the page's text colour.

    Args:
        figure: The figure.
        label: What it shows, for screen readers; it also keeps the ids of two figures apart.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    text = to_svg(figure, label, Creator=None, Format=None, Type=None)
    text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text[text.index("<svg") :])  # unused
    box = re.search(r'viewBox="[^"]*"', text)
    assert box
    head = f'<svg {box[0]} role="img" aria-label="{html.escape(label)}">'
    return (head + text[text.index(">") + 1 :]).replace(INK, "currentColor")


def save(figure: "Figure", path: Path, description: str | None = None) -> None:
    """Write the figure as SVG or PNG, by the suffix of `path`."""
    if path.suffix == ".svg":
        write_atomically(path, to_svg(figure, Description=description))
    else:
        with _style(), replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=150)
