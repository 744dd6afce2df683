"""What a plot shows, that none of it is cut off, and that the same data give the same bytes."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from training import plot

LOSSES = [(i, 5.0 - i / 100) for i in range(100)]
ROOT = Path(__file__).parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[tuple[str, float, float]]:
    """Each text of an SVG with its left and right end, from the width of DejaVu's digits."""
    found = []
    for element in ElementTree.fromstring(svg).iter(SVG + "text"):
        text, style = "".join(element.itertext()).strip(), element.get("style", "")
        x, width = float(element.get("x", 0)), 6.4 * len(text)
        left = x - width * (
            1 if "anchor: end" in style else 0.5 if "anchor: middle" in style else 0
        )
        found.append((text, left, left + width))
    return found


def words(svg: str) -> list[str]:
    return [text for text, _, _ in texts(svg)]


def test_everything_is_drawn_and_named():
    levels = {"counting": 5.0}
    full = plot.loss_curve(LOSSES, [(50, 4.6)], [(0, 10.97), (100, 0.082)], levels, "a title")
    found = words(plot.to_svg(full))
    wanted = {"a title", "step", "training", "validation", "published run", "counting 5.00"}
    assert wanted <= {*found}
    bare = plot.to_svg(plot.loss_curve(LOSSES))
    assert "training" in words(bare)
    assert "validation" not in words(bare)
    assert words(plot.to_svg(plot.step_curves({"one": LOSSES, "two": LOSSES})))[-1] == "two"


@pytest.mark.parametrize("scale", [1e-5, 24.6, 2460.7, 1.23e6])
@pytest.mark.parametrize("num_steps", [1, 313])
def test_no_label_is_cut_off_or_shortened(scale: float, num_steps: int):
    points = [(i, scale * (1 + i / 500)) for i in range(num_steps)]
    svg = plot.to_svg(plot.step_curves({"a title": points}))
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', svg)[0])
    for text, left, right in texts(svg):
        assert -1 <= left < right <= width + 1, text
        assert text in ("step", "a title") or re.fullmatch(r"[\u2212-]?\d+(\.\d+)?", text), text
    steps = words(svg)[: words(svg).index("step")]
    assert all(float(step.replace("\u2212", "-")).is_integer() for step in steps)


def test_whatever_a_person_has_set_up(monkeypatch: pytest.MonkeyPatch):
    """A notebook exports a backend that need not be there; a matplotlibrc may ask for LaTeX."""
    import matplotlib

    wanted = plot.to_svg(plot.loss_curve(LOSSES))
    with matplotlib.rc_context({"text.usetex": True, "lines.linestyle": ":"}):
        assert plot.to_svg(plot.loss_curve(LOSSES)) == wanted
    code = "from training import plot; print(plot.to_svg(plot.loss_curve([(0, 1.0)]))[:5])"
    environ = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "<?xml\n", done.stderr


def test_the_same_data_give_the_same_bytes(tmp_path: Path):
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        plot.save(plot.loss_curve(LOSSES, [(50, 4.6)]), tmp_path / "new" / name, "some rows")
    for kind in ("svg", "png"):
        one, two = (tmp_path / "new" / f"{name}.{kind}" for name in "ab")
        assert one.read_bytes() == two.read_bytes()
    text = (tmp_path / "new" / "a.svg").read_text()
    assert "some rows" in text
    assert "<dc:date>" not in text


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_leaves_a_gap(bad: float):
    for points in ([(0, bad)], [(0, 5.0), (1, bad), (2, 4.0)], []):
        for published in ((), [(0, 10.97), (100, 0.082)]):
            svg = plot.to_svg(plot.loss_curve(points, published=published))
            assert not {"nan", "inf"} & {*svg.lower().split()}


def test_many_points_stay_few_bytes_and_keep_their_extremes():
    points = [(i, 1.0 + 0.1 * math.sin(i)) for i in range(20_000)]
    points[777] = (777, 50.0)
    svg = plot.to_svg(plot.loss_curve(points))
    assert len(svg) < 150_000
    top = min(float(y) for y in re.findall(r"L [\d.]+ ([\d.]+)", svg))
    plain = plot.to_svg(plot.loss_curve(points[770:780]))
    assert top == pytest.approx(
        min(float(y) for y in re.findall(r"L [\d.]+ ([\d.]+)", plain)), abs=1
    )


def test_inline_takes_the_colour_of_its_page_and_loads_nothing():
    svg = plot.inline_svg(plot.loss_curve(LOSSES), 'the "loss"')
    assert svg.startswith(
        '<svg viewBox="0 0 432 244.8" role="img" aria-label="the &quot;loss&quot;">'
    )
    assert "currentColor" in svg
    assert plot.INK not in svg
    assert "http" not in svg
    other = plot.inline_svg(plot.step_curves({"t": LOSSES}), "another")
    ids = [re.findall(r' id="([^"]+)"', text) for text in (svg, other)]
    assert len({*ids[0], *ids[1]}) == len(ids[0]) + len(ids[1])
