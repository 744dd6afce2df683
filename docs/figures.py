"""The figures of docs/kernels.md: `python -m docs.figures` draws them again.

Each shows what one program does. A kernel runs as a grid of programs, which share no registers.
"""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from training import plot

FOLDER = Path(__file__).parent / "figures"
SCALE = 10  # units of a drawing per inch
WIDTH = 92
LINE = 2  # units from one line of text to the next
# What a colour says, its face and its edge. A tensor in memory is an outline, in which the part
# that the program touches is filled.
COLOURS = {
    "read from memory": ("#b6d4f2", "#2c6db0"),
    "written to memory": ("#f9cfa5", "#c06a12"),
    "stays on the chip": ("#bfe3c4", "#2f7d3b"),
    "computed again": ("#dcc7ee", "#7a4aa8"),
    "never there": ("#e9e9e9", "#b0b0b0"),
}
READ, WRITE, CHIP, AGAIN, NEVER = COLOURS.values()
Colour = tuple[str, str]
Shares = Iterable[tuple[float, float]]


class Drawing:
    """Axes in units of 1 / SCALE inch, with the meaning of the colours along the top."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDTH / SCALE, height / SCALE))
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, height))
        self.axes.set_axis_off()
        for i, (name, colour) in enumerate(COLOURS.items()):
            self.box(1 + 18.5 * i, height - 3, 2.4, 1.6, colour)
            self.write(4 + 18.5 * i, height - 2.2, name)

    def write(self, x: float, y: float, text: str, centre: bool = False, **more) -> None:
        """Lines of text, the first at y."""
        style = {"fontsize": 9, "color": plot.INK, "va": "center", **more}
        for i, line in enumerate(text.strip().splitlines()):
            align = "center" if centre else "left"
            self.axes.text(x, y - LINE * i, line.strip(), ha=align, **style)

    def title(self, x: float, y: float, text: str) -> None:
        self.write(x, y, text, weight="bold")

    def box(
        self, x: float, y: float, w: float, h: float, colour: Colour, text: str = "", fill=True
    ) -> None:
        face, edge = colour
        style = {"fc": face if fill else "white", "ec": edge, "lw": 0.8, "clip_on": False}
        self.axes.add_patch(Rectangle((x, y), w, h, **style))
        if text:
            self.write(x + w / 2, y + h / 2, text, centre=True)

    def frame(self, x: float, y: float, w: float, h: float, text: str, top: float = 1.9) -> None:
        """A box of the chip with lines of text in it, the first `top` below its upper edge."""
        self.box(x, y, w, h, CHIP, fill=False)
        self.write(x + 1, y + h - top, text)

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        style = {"arrowstyle": "->", "color": plot.INK}
        self.axes.annotate("", (to_x, to_y), (x, y), arrowprops=style)

    def tensor(
        self, at: tuple[float, ...], colour: Colour, name: str, rows: Shares = (), cols: Shares = ()
    ) -> None:
        """A matrix in memory, its name above; `rows` and `cols` are the shares that are touched."""
        x, y, w, h = at
        self.box(x, y, w, h, colour, fill=False)
        for start, end in rows:
            self.box(x, y + h * (1 - end), w, h * (end - start), colour)
        for start, end in cols:
            self.box(x + w * start, y, w * (end - start), h, colour)
        self.write(x, y + h + 1.1, name)

    def product(self, x: float, y: float, a: str, b: str, c: str) -> None:
        """A matrix product: A on the left, B above, and the tile that one program owns."""
        self.tensor((x, y, 7, 13), READ, a, [(0.4, 0.6)])
        self.tensor((x + 9, y + 15.5, 23, 5), READ, b, cols=[(0.5, 0.66)])
        self.box(x + 9, y, 23, 13, NEVER, fill=False)
        self.box(x + 20.5, y + 5.2, 3.7, 2.6, CHIP)
        self.write(x + 9.5, y + 1.2, c)
        self.arrow(x + 22.3, y + 5, x + 22.3, y - 3.6)

    def scores(self, x: float, y: float, visits: dict[tuple[int, int], int], colour: Colour):
        """S of one head as 8 x 8 tiles; `visits` numbers the tiles (row, column) of a program."""
        size, axes = 3.6, self.axes
        top, end = y + 8 * size, x + 8 * size
        stairs = [(x + size * (i + 1), top - size * (i + k)) for i in range(8) for k in (0, 1)]
        axes.add_patch(Polygon([*stairs, (end, top)], fc=NEVER[0], lw=0, clip_on=False))
        for i in range(9):
            lines = ([x, end], [y + size * i] * 2, [x + size * i] * 2, [y, top])
            axes.plot(*lines, color=NEVER[1], lw=0.6, clip_on=False)
        for (row, col), number in visits.items():
            left, upper = x + size * col, top - size * row
            self.box(left, top - size * (row + 1), size, size, colour, str(number))
            if row == col:
                ends = [left, x + size * (col + 1)], [upper, top - size * (row + 1)]
                axes.plot(*ends, color=colour[1], lw=0.8)
        self.write(x, top + 1.2, "keys ->")
        self.write(x - 1.3, y + 4 * size, "queries ->", centre=True, rotation=-90)


def layer_norm(draw: Drawing) -> None:
    draw.title(1, 44.5, "forward: a warp per row, every tensor once")
    one, some = [(0.35, 0.6)], [(0.15, 0.25), (0.45, 0.55), (0.75, 0.85)]
    names = [("x (M, C)", "y (M, C)"), ("residual (M, C)", "residual_out = h")]
    for y, (read, written) in zip((35.5, 27), names, strict=True):
        draw.tensor((1, y, 15, 5), READ, read, one)
        draw.tensor((72, y, 15, 5), WRITE, written, one)
        draw.arrow(16.3, y + 2.5, 20.7, y + 2.5)
        draw.arrow(67.3, y + 2.5, 71.7, y + 2.5)
    text = """a row of 768 stays in the registers of 32 lanes
        h = residual + x, rounded to the dtype of the stream
        mean = sum(h) / C, then the mean of what is left
        rstd = 1 / sqrt(variance + eps)
        y = (h - mean) * rstd * weight + bias"""
    draw.frame(21, 25.5, 46, 17, text, top=6.2)
    for i in range(6):
        draw.box(22 + 7.3 * i, 38.5, 7, 2.6, CHIP, "128")
    draw.write(72, 24.3, "mean, rstd: 8 bytes per row")

    draw.title(1, 20.5, "backward: few programs, each walks many rows")
    for i, name in enumerate(("dy", "h", "dh_out")):
        draw.tensor((1 + 6.3 * i, 5.5, 5, 11), READ, name, some)
    text = """dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
        plus dh_out, where g = dy * weight
        dweight += dy * x_hat and dbias += dy, over all
        rows of the program, without leaving registers
        P programs, 3 per SM, all at once"""
    draw.frame(24, 1, 43, 17.5, text, top=5.1)
    draw.box(24.7, 15, 41.6, 2.8, AGAIN, "x_hat = (h - mean) * rstd")
    draw.tensor((72, 8.5, 5, 8), WRITE, "dx, dh", some)
    draw.tensor((81, 11, 10, 5.5), WRITE, "sums (P, C)", [(0.4, 0.6)])
    draw.arrow(20, 11, 23.7, 11)
    draw.arrow(67.3, 12.5, 71.7, 12.5)
    draw.arrow(86, 10.7, 86, 6.2)
    draw.write(69.5, 4.8, "a second kernel adds the P rows\nin a fixed order")


def embedding(draw: Drawing) -> None:
    draw.title(1, 43.5, "forward: a warp per token")
    draw.tensor((1, 26, 5, 14), READ, "wte", [(0.3, 0.36)])
    draw.tensor((9, 33, 5, 7), READ, "wpe", [(0.5, 0.6)])
    text = """h = wte[idx] + wpe[t], in the registers of 32 lanes
        rounded to the dtype of the stream
        mean, rstd
        y = (h - mean) * rstd * weight + bias"""
    draw.frame(21, 28, 46, 12, text)
    draw.arrow(14.3, 36.5, 20.7, 36.5)
    draw.arrow(6.3, 30.8, 20.7, 30.8)
    for y, name in ((36, "y (M, C)"), (28, "residual = h")):
        draw.tensor((72, y, 15, 4), WRITE, name, [(0.35, 0.6)])
        draw.arrow(67.3, y + 2, 71.7, y + 2)

    draw.title(1, 22, "backward: a program per block of sorted tokens")
    draw.write(1, 19, "tokens, sorted")
    draw.write(1, 14.5, "their rows of dh, read\nwherever they stand")
    draw.write(1, 6.5, "sums")
    for i, token in enumerate((11, 11, *[262] * 8, 318, 464)):
        x = 21 + 4.2 * i + 1.6 * (i // 4)
        draw.box(x, 17.5, 4, 3, READ, str(token))
        draw.box(x, 11, 4, 5, READ)
    sums = ["11", "262", "262: carried", "carried", "318", "464"]
    places = [(21, 8), (29.6, 8), (39.6, 16.6), (58, 8), (66.4, 4), (70.6, 4)]
    for text, (x, width) in zip(sums, places, strict=True):
        draw.box(x, 5, width, 3, WRITE, text)
        draw.arrow(x + width / 2, 10.8, x + width / 2, 8.2)
    text = "Sums go into dwte, which begins as the head's gradient. "
    draw.write(1, 2.3, text + "What is carried is a row for a second launch.")


def gelu_mlp(draw: Drawing) -> None:
    tile = "the tile, fp32, in registers:"
    draw.title(1, 57.5, "forward, up")
    draw.product(1, 33, "x (M, C)", "w_fc^T (C, 4C)", "h, not stored")
    draw.frame(1, 17, 26, 12, f"{tile}\nh += b_fc\ns = sigmoid(2u)\ng = h * s\nd = gelu'(h)")
    draw.title(47, 57.5, "backward, down")
    draw.product(47, 33, "dy (M, C)", "w_proj (C, 4C)", "dg, not stored")
    draw.frame(47, 17, 26, 12, f"{tile}\ndh = dg * d\nsums of its columns")
    outs = [("g (M, 4C)", "for dw_proj"), ("d (M, 4C)", "for the backward")]
    outs += [("dh (M, 4C)", "for dx and dw_fc"), ("sums (M/128, 4C)", "for db_fc")]
    for i, (out, use) in enumerate(outs):
        x, down = 1 + 46 * (i // 2), 6.5 * (i % 2)
        draw.box(x + 30, 25.5 - down, 14, 3, WRITE, out)
        draw.write(x + 30.3, 24.2 - down, use)
        draw.arrow(x + 26.3, 23, x + 29.7, 27 - down)
    draw.box(48, 18, 14, 3, READ, "d (M, 4C)")
    for i in range(24):
        group, at = divmod(i, 12)
        row, col = 2 * group + at % 2, at // 2
        draw.box(1 + 4.4 * col, 9.6 - 2.6 * row, 4.4, 2.6, CHIP, str(i), fill=row < 2)
    text = """The order of the tiles: GROUP_M rows of tiles (2 here, 8 in the kernel)
        are walked column by column. Programs that run at the same time then
        share rows of x and columns of w_fc, and find them in the L2 cache."""
    draw.write(31, 10.9, text)


# Rows 4 and 5 of tiles belong to one program: 128 queries. It takes the diagonal first.
BY_QUERIES = {(row, col): (col + 3 if col < 4 else col - 3) for row in (4, 5) for col in range(6)}
BY_KEYS = {(row, 2): row - 1 for row in range(2, 8)}


def attention_forward(draw: Drawing) -> None:
    draw.title(1, 39.5, "S = q k^T of one head, in tiles of 64 x 64")
    draw.scores(4, 7, BY_QUERIES, CHIP)
    text = """One program owns 128 queries and walks the keys.
        The two steps on the diagonal come first; only they are masked."""
    draw.write(3, 4.6, text)
    draw.title(44, 39.5, "the program")
    draw.box(44, 33, 14, 3, READ, "q, once")
    draw.box(44, 23.5, 14, 3, READ, "k, v per step")
    text = """kept through the loop, in fp32:
        acc (128, 64), row_max, row_sum

        a step, for 64 keys:
        s = q k^T
        new_max = max(row_max, max(s))
        p = exp2(s - new_max)
        alpha = exp2(row_max - new_max)
        row_sum = row_sum * alpha + sum(p)
        acc = acc * alpha + p v

        s and p live for one step"""
    draw.frame(62, 11, 29, 27, text)
    draw.arrow(58.3, 34.5, 61.7, 34.5)
    draw.arrow(58.3, 25, 61.7, 25)
    draw.write(44, 17.5, "All of S at B=64,\nT=1024, 12 heads\nwould be 1.6 GB\nin bf16.")
    for x, out in ((62, "y = acc / row_sum"), (77, "lse per query")):
        draw.arrow(x + 7, 10.7, x + 7, 7.5)
        draw.box(x, 4.2, 14, 3, WRITE, out)


def attention_backward(draw: Drawing) -> None:
    draw.title(1, 55.5, "launch 1: dq, a program per 128 queries")
    draw.scores(4, 22, BY_QUERIES, AGAIN)
    draw.box(1, 16.5, 42, 3, READ, "q, dO, y, lse once; k, v per step")
    draw.box(1, 13.2, 42, 3, AGAIN, "S = q k^T,  P = exp2(S - lse)")
    text = """delta = sum over D of dO * y, once
        dP = dO v^T
        dS = P * (dP - delta)
        dq += dS k"""
    draw.frame(1, 4.2, 42, 8.7, text, top=1.3)
    draw.box(1, 0.9, 42, 3, WRITE, "dq, delta")
    draw.title(48, 55.5, "launch 2: dk and dv, a program per 64 keys")
    draw.scores(51, 22, BY_KEYS, AGAIN)
    draw.box(48, 16.5, 42, 3, READ, "k, v once; q, dO, lse, delta per step")
    draw.box(48, 13.2, 42, 3, AGAIN, "S^T = k q^T,  P^T;  dP^T = v dO^T")
    text = "dv += P^T dO\ndS^T = P^T * (dP^T - delta)\ndk += dS^T q"
    draw.frame(48, 4.2, 42, 8.7, text, top=1.3)
    draw.box(48, 0.9, 42, 3, WRITE, "dk, dv")


def linear_cross_entropy(draw: Drawing) -> None:
    draw.title(1, 41.5, "logits z (65536, 50304)")
    for i, state in enumerate(("done, overwritten", "in memory now", "not yet", "not yet")):
        colour, text = WRITE if i == 1 else NEVER, f"chunk {i + 1}: {state}"
        draw.box(1, 32.5 - 7.6 * i, 26, 7, colour, text, fill=i < 2)
    text = """One buffer of 1.65 GB holds
        each chunk in turn. All of z
        would take 6.6 GB, dz as much."""
    draw.write(1, 7.4, text)
    draw.arrow(27.3, 28.5, 33.5, 28.5)
    draw.box(35, 30.1, 56, 3, CHIP, "pass 1: maximum and sum of exponentials per lane")
    draw.box(35, 26.8, 56, 3, AGAIN, "pass 2: exp(z - max) / sum, minus 1 at the target")
    launches = [
        ("1  cuBLAS: the logits", "x of the chunk, weight", "z"),
        ("2  row kernel: a program per row", "z, and again from a cache", "dz in place of z, loss"),
        ("3  cuBLAS", "dz, weight", "dx of the chunk"),
        ("4  cuBLAS", "dz, x of the chunk", "dweight += dz^T x, fp32"),
    ]
    places = [(41.5, 37.3), (34.3, 23.5), (20.5, 16.3), (13.3, 9.1)]
    for (y, at), (name, read, written) in zip(places, launches, strict=True):
        draw.title(35, y, name)
        draw.box(35, at, 27, 3, READ, read)
        draw.arrow(62.3, at + 1.5, 64.7, at + 1.5)
        draw.box(65, at, 26, 3, WRITE, written)
    draw.write(35, 4.2, "The backward multiplies dx and dweight by dloss / N.")


def adamw(draw: Drawing) -> None:
    draw.title(1, 35.5, "table: a row per tensor")
    draw.title(1, 17.5, "chunks: a line per program")
    names = ["wte: addresses, lr, ...", "wpe: addresses, lr, ...", "ln_1.weight: ...", "..."]
    chunks = ["wte, first 8192", "wte, next 8192", "...", "wpe, first 8192"]
    for i, (name, chunk) in enumerate(zip(names, chunks, strict=True)):
        draw.box(1, 30.5 - 3 * i, 20, 3, READ, name)
        draw.box(1, 12.5 - 3 * i, 20, 3, READ, chunk)
    draw.title(27, 35.5, "step: the second program")
    pairs = [("p", "p"), ("m", "m"), ("v", "v"), ("grad", "bf16 copy of p")]
    for i, (read, written) in enumerate(pairs):
        y = 30.5 - 4.5 * i
        draw.box(27, y, 12, 3, READ, read)
        draw.arrow(39.3, y + 1.5, 42.7, y + 1.5)
        draw.arrow(71.3, y + 1.5, 74.7, y + 1.5)
        draw.box(75, y, 16, 3, WRITE, written)
    text = """1024 elements at a time:
        g = grad * clip
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        p = p * decay - step_size * m /
        (sqrt(v) * correction + eps)
        nothing at all if found_inf"""
    draw.frame(43, 16.5, 28, 17.5, text)
    draw.arrow(21.3, 27.5, 26.5, 27.5)
    draw.arrow(21.3, 11, 26.5, 18)
    draw.title(27, 12.3, "before it: norm and clip")
    draw.box(27, 7, 18, 3, READ, "gradients, by chunks")
    draw.arrow(45.3, 8.5, 48.7, 8.5)
    draw.box(49, 7, 18, 3, WRITE, "a sum per chunk")
    draw.arrow(67.3, 8.5, 70.7, 8.5)
    draw.box(71, 7, 20, 3, WRITE, "norm, clip")
    draw.write(27, 4.5, "One program adds the sums in a fixed order. The host reads nothing back.")


FIGURES = {  # and how high each is
    layer_norm: 50,
    embedding: 49,
    gelu_mlp: 63,
    attention_forward: 45,
    attention_backward: 61,
    linear_cross_entropy: 47,
    adamw: 41,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for figure, height in FIGURES.items():
        drawing = Drawing(height)
        figure(drawing)
        plot.save(drawing.figure, FOLDER / f"{figure.__name__}.svg")


if __name__ == "__main__":
    main()
