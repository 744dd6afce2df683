"""Draws the figures of docs/kernels.md from docs/figures.toml: `python -m docs.figures`.

An element of a figure is the name of a method of `Drawing`, followed by its arguments.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from training import plot

FOLDER = Path(__file__).parent / "figures"
FIGURES = tomllib.loads(FOLDER.with_suffix(".toml").read_text(encoding="utf-8"))
SCALE = 10  # units of a drawing per inch
WIDTH = 92
LINE = 2  # units from one line of text to the next
TILE = 3.6  # units, of the scores of attention
COLOURS = {  # what a colour says, its face and its edge
    "read": ("read from memory", "#b6d4f2", "#2c6db0"),
    "write": ("written to memory", "#f9cfa5", "#c06a12"),
    "chip": ("stays on the chip", "#bfe3c4", "#2f7d3b"),
    "again": ("computed again", "#dcc7ee", "#7a4aa8"),
    "never": ("never there", "#e9e9e9", "#b0b0b0"),
}


class Drawing:
    """Axes in units of 1 / SCALE inch, with the meaning of the colours along the top."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDTH / SCALE, height / SCALE))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height))
        self.axes.set_axis_off()
        for i, (name, (meaning, *_)) in enumerate(COLOURS.items()):
            self.box(1 + 18.5 * i, height - 3, 2.4, 1.6, name)
            self.write(4 + 18.5 * i, height - 2.2, meaning)

    def write(self, x: float, y: float, text: str, **more) -> None:
        """Lines of text, the first at y."""
        style = {"fontsize": 9, "color": plot.INK, "va": "center", "ha": "left", **more}
        for i, line in enumerate(text.splitlines()):
            self.axes.text(x, y - LINE * i, line, **style)

    def title(self, x: float, y: float, text: str) -> None:
        self.write(x, y, text, weight="bold")

    def box(
        self, x: float, y: float, w: float, h: float, colour: str, text: str = "", fill=True
    ) -> None:
        """A rectangle with a line of text in its middle."""
        _, face, edge = COLOURS[colour]
        style = {"fc": face if fill else "white", "ec": edge, "lw": 0.8, "clip_on": False}
        self.axes.add_patch(Rectangle((x, y), w, h, **style))
        self.write(x + w / 2, y + h / 2, text, ha="center")

    def boxes(
        self, at: Sequence[float], step: Sequence[float], colour: str, texts: list[str], fill=True
    ) -> None:
        """A row or a column of boxes: x, y, w, h of the first, and dx, dy from one to the next."""
        x, y, w, h = at
        for i, text in enumerate(texts):
            self.box(x + step[0] * i, y + step[1] * i, w, h, colour, text, fill)

    def frame(self, x: float, y: float, w: float, h: float, text: str, top: float = 1.9) -> None:
        """What happens on the chip: lines of text, the first `top` below the upper edge."""
        self.box(x, y, w, h, "chip", fill=False)
        self.write(x + 1, y + h - top, text)

    def arrows(self, *ends: Sequence[float]) -> None:
        """An arrow for each x, y, to_x, to_y."""
        style = {"arrowstyle": "->", "color": plot.INK}
        for x, y, to_x, to_y in ends:
            self.axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)

    def tensor(
        self, x: float, y: float, w: float, h: float, colour: str, name: str, *rows: Sequence[float]
    ) -> None:
        """An outline with its name above; `rows`, as shares from the top, are what is touched."""
        self.box(x, y, w, h, colour, fill=False)
        for start, end in rows:
            self.box(x, y + h * (1 - end), w, h * (end - start), colour)
        self.write(x, y + h + 1.1, name)

    def scores(self, x: float, y: float, colour: str, rows: Sequence[str]) -> None:
        """S of one head as 8 x 8 tiles; a digit says when a program visits a tile."""
        axes, grey = self.axes, COLOURS["never"]
        top, end = y + 8 * TILE, x + 8 * TILE
        stairs = [(x + TILE * (i + 1), top - TILE * (i + k)) for i in range(8) for k in (0, 1)]
        axes.add_patch(Polygon([*stairs, (end, top)], fc=grey[1], lw=0, clip_on=False))
        for i in range(9):
            lines = ([x, end], [y + TILE * i] * 2, [x + TILE * i] * 2, [y, top])
            axes.plot(*lines, color=grey[2], lw=0.6, clip_on=False)
        for row, visits in enumerate(rows):
            for col, visit in enumerate(visits):
                left, upper = x + TILE * col, top - TILE * row
                if visit != " ":
                    self.box(left, upper - TILE, TILE, TILE, colour, visit)
                if visit != " " and row == col:  # masked
                    ends = [left, left + TILE], [upper, upper - TILE]
                    axes.plot(*ends, color=COLOURS[colour][2], lw=0.8)
        self.write(x, top + 1.2, "keys ->")
        self.write(x - 1.3, y + 4 * TILE, "queries ->", ha="center", rotation=-90)


def draw(name: str) -> Figure:
    drawing = Drawing(FIGURES[name]["height"])
    for method, *arguments in FIGURES[name]["elements"]:
        getattr(drawing, method)(*arguments)
    return drawing.figure


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in FIGURES:
        plot.save(draw(name), FOLDER / f"{name}.svg")


if __name__ == "__main__":
    main()
