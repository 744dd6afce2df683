"""The figures of docs/kernels.md: `python -m docs.figures` draws them again.

Each shows what one program does. A kernel runs as a grid of programs, which share no registers.
"""

from collections.abc import Callable, Iterable
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


def canvas(height: float) -> Axes:
    """Axes in units of 1 / SCALE inch, with the meaning of the colours along the top."""
    figure = Figure(figsize=(WIDTH / SCALE, height / SCALE))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.set_axis_off()
    for i, (name, colour) in enumerate(COLOURS.items()):
        box(axes, 1 + 18.5 * i, height - 3, 2.4, 1.6, colour)
        write(axes, 4 + 18.5 * i, height - 2.2, name)
    return axes


def write(axes: Axes, x: float, y: float, *texts: str, centre: bool = False, **more) -> None:
    """Lines of text, the first at y."""
    for i, text in enumerate(texts):
        axes.text(x, y - LINE * i, text, ha="center" if centre else "left", va="center",
                  fontsize=9, color=plot.INK, **more)  # fmt: skip


def title(axes: Axes, x: float, y: float, text: str) -> None:
    write(axes, x, y, text, weight="bold")


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: Colour, text: str = "",
    filled: bool = True,
) -> None:  # fmt: skip
    face, edge = colour
    axes.add_patch(Rectangle((x, y), width, height, fc=face if filled else "white", ec=edge,
                             lw=0.8, clip_on=False))  # fmt: skip
    if text:
        write(axes, x + width / 2, y + height / 2, text, centre=True)


def frame(
    axes: Axes, x: float, y: float, width: float, height: float, *texts: str, top: float = 0
) -> None:
    """A box of the chip with lines of text in it, from `top` below its upper edge."""
    box(axes, x, y, width, height, CHIP, filled=False)
    write(axes, x + 1, y + height - 1.9 - top, *texts)


def arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float) -> None:
    axes.annotate("", (to_x, to_y), (x, y), arrowprops={"arrowstyle": "->", "color": plot.INK})


def tensor(
    axes: Axes, x: float, y: float, width: float, height: float, colour: Colour, name: str,
    rows: Shares = (), cols: Shares = (),
) -> None:  # fmt: skip
    """A matrix in memory, its name above; `rows` and `cols` are the shares that are touched."""
    box(axes, x, y, width, height, colour, filled=False)
    for start, end in rows:
        box(axes, x, y + height * (1 - end), width, height * (end - start), colour)
    for start, end in cols:
        box(axes, x + width * start, y, width * (end - start), height, colour)
    write(axes, x, y + height + 1.1, name)


def layer_norm() -> Axes:
    axes = canvas(50)
    title(axes, 1, 44.5, "forward: a warp per row, every tensor once")
    one = [(0.35, 0.6)]
    for y, read, written in ((35.5, "x (M, C)", "y (M, C)"),
                             (27, "residual (M, C)", "residual_out = h")):  # fmt: skip
        tensor(axes, 1, y, 15, 5, READ, read, one)
        tensor(axes, 72, y, 15, 5, WRITE, written, one)
        arrow(axes, 16.3, y + 2.5, 20.7, y + 2.5)
        arrow(axes, 67.3, y + 2.5, 71.7, y + 2.5)
    frame(
        axes, 21, 25.5, 46, 17,
        "a row of 768 stays in the registers of 32 lanes",
        "h = residual + x, rounded to the dtype of the stream",
        "mean = sum(h) / C, then the mean of what is left",
        "rstd = 1 / sqrt(variance + eps)",
        "y = (h - mean) * rstd * weight + bias", top=4.3,
    )  # fmt: skip
    for i in range(6):
        box(axes, 22 + 7.3 * i, 38.5, 7, 2.6, CHIP, "128")
    write(axes, 72, 24.3, "mean, rstd: 8 bytes per row")

    title(axes, 1, 20.5, "backward: few programs, each walks many rows")
    some = [(0.15, 0.25), (0.45, 0.55), (0.75, 0.85)]
    for i, name in enumerate(("dy", "h", "dh_out")):
        tensor(axes, 1 + 6.3 * i, 5.5, 5, 11, READ, name, some)
    frame(
        axes, 24, 1, 43, 17.5, "",
        "dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat))",
        "plus dh_out, where g = dy * weight",
        "dweight += dy * x_hat and dbias += dy, over all",
        "rows of the program, without leaving registers",
        "P programs, 3 per SM, all at once", top=1.2,
    )  # fmt: skip
    box(axes, 24.7, 15, 41.6, 2.8, AGAIN, "x_hat = (h - mean) * rstd")
    tensor(axes, 72, 8.5, 5, 8, WRITE, "dx, dh", some)
    tensor(axes, 81, 11, 10, 5.5, WRITE, "sums (P, C)", [(0.4, 0.6)])
    arrow(axes, 20, 11, 23.7, 11)
    arrow(axes, 67.3, 12.5, 71.7, 12.5)
    arrow(axes, 86, 10.7, 86, 6.2)
    write(axes, 69.5, 4.8, "a second kernel adds the P rows", "in a fixed order")
    return axes


def embedding() -> Axes:
    axes = canvas(49)
    title(axes, 1, 43.5, "forward: a warp per token")
    tensor(axes, 1, 26, 5, 14, READ, "wte", [(0.3, 0.36)])
    tensor(axes, 9, 33, 5, 7, READ, "wpe", [(0.5, 0.6)])
    frame(
        axes, 21, 28, 46, 12,
        "h = wte[idx] + wpe[t], in the registers of 32 lanes", "rounded to the dtype of the stream",
        "mean, rstd", "y = (h - mean) * rstd * weight + bias",
    )  # fmt: skip
    arrow(axes, 14.3, 36.5, 20.7, 36.5)
    arrow(axes, 6.3, 30.8, 20.7, 30.8)
    for y, name in ((36, "y (M, C)"), (28, "residual = h")):
        tensor(axes, 72, y, 15, 4, WRITE, name, [(0.35, 0.6)])
        arrow(axes, 67.3, y + 2, 71.7, y + 2)

    title(axes, 1, 22, "backward: a program per block of sorted tokens")
    write(axes, 1, 19, "tokens, sorted")
    write(axes, 1, 14.5, "their rows of dh, read", "wherever they stand")
    write(axes, 1, 6.5, "sums")
    for i, token in enumerate((11, 11, 262, 262, 262, 262, 262, 262, 262, 262, 318, 464)):
        x = 21 + 4.2 * i + 1.6 * (i // 4)
        box(axes, x, 17.5, 4, 3, READ, str(token))
        box(axes, x, 11, 4, 5, READ)
    for x, width, text in ((21, 8, "11"), (29.6, 8, "262"), (39.6, 16.6, "262: carried"),
                           (58, 8, "carried"), (66.4, 4, "318"), (70.6, 4, "464")):  # fmt: skip
        box(axes, x, 5, width, 3, WRITE, text)
        arrow(axes, x + width / 2, 10.8, x + width / 2, 8.2)
    write(axes, 1, 2.3, "Sums go into dwte, which begins as the head's gradient. "
                        "What is carried is a row for a second launch.")  # fmt: skip
    return axes


def product(axes: Axes, x: float, y: float, a: str, b: str, c: str) -> None:
    """A matrix product: A on the left, B above, and the tile that one program owns."""
    tensor(axes, x, y, 7, 13, READ, a, [(0.4, 0.6)])
    tensor(axes, x + 9, y + 15.5, 23, 5, READ, b, cols=[(0.5, 0.66)])
    box(axes, x + 9, y, 23, 13, NEVER, filled=False)
    box(axes, x + 20.5, y + 5.2, 3.7, 2.6, CHIP)
    write(axes, x + 9.5, y + 1.2, c)
    arrow(axes, x + 22.3, y + 5, x + 22.3, y - 3.6)


def gelu_mlp() -> Axes:
    axes = canvas(63)
    for x, name, names, epilogue, outs in (
        (1, "forward, up", ("x (M, C)", "w_fc^T (C, 4C)", "h, not stored"),
         ("the tile, fp32, in registers:", "h += b_fc", "s = sigmoid(2u)", "g = h * s",
          "d = gelu'(h)"),
         (("g (M, 4C)", "for dw_proj"), ("d (M, 4C)", "for the backward"))),
        (47, "backward, down", ("dy (M, C)", "w_proj (C, 4C)", "dg, not stored"),
         ("the tile, fp32, in registers:", "dh = dg * d", "sums of its columns"),
         (("dh (M, 4C)", "for dx and dw_fc"), ("sums (M/128, 4C)", "for db_fc"))),
    ):  # fmt: skip
        title(axes, x, 57.5, name)
        product(axes, x, 33, *names)
        frame(axes, x, 17, 26, 12, *epilogue)
        for j, (out, use) in enumerate(outs):
            box(axes, x + 30, 25.5 - 6.5 * j, 14, 3, WRITE, out)
            write(axes, x + 30.3, 24.2 - 6.5 * j, use)
            arrow(axes, x + 26.3, 23, x + 29.7, 27 - 6.5 * j)
    box(axes, 48, 18, 14, 3, READ, "d (M, 4C)")
    for tile in range(24):
        group, at = divmod(tile, 12)
        row, col = 2 * group + at % 2, at // 2
        box(axes, 1 + 4.4 * col, 9.6 - 2.6 * row, 4.4, 2.6, CHIP, str(tile), filled=row < 2)
    write(
        axes, 31, 10.9, "The order of the tiles: GROUP_M rows of tiles (2 here, 8 in the kernel)",
        "are walked column by column. Programs that run at the same time then", "share rows of x "
        "and columns of w_fc, and find them in the L2 cache.",
    )  # fmt: skip
    return axes


def scores(axes: Axes, x: float, y: float, visits: dict[tuple[int, int], int], colour: Colour):
    """S of one head as 8 x 8 tiles; `visits` numbers the tiles (row, column) of one program."""
    size = 3.6
    top, end = y + 8 * size, x + 8 * size
    stairs = [(x + size * (i + 1), top - size * (i + down)) for i in range(8) for down in (0, 1)]
    axes.add_patch(Polygon([*stairs, (end, top)], fc=NEVER[0], lw=0, clip_on=False))
    for i in range(9):
        axes.plot([x, end], [y + size * i] * 2, [x + size * i] * 2, [y, top], color=NEVER[1],
                  lw=0.6, clip_on=False)  # fmt: skip
    for (row, col), number in visits.items():
        box(axes, x + size * col, top - size * (row + 1), size, size, colour, str(number))
        if row == col:
            across = [x + size * col, x + size * (col + 1)]
            axes.plot(across, [top - size * row, top - size * (row + 1)], color=colour[1], lw=0.8)
    write(axes, x, top + 1.2, "keys ->")
    write(axes, x - 1.3, y + 4 * size, "queries ->", centre=True, rotation=-90)


# Rows 4 and 5 of tiles belong to one program: 128 queries. It takes the diagonal first.
BY_QUERIES = {(row, col): (col + 3 if col < 4 else col - 3) for row in (4, 5) for col in range(6)}
BY_KEYS = {(row, 2): row - 1 for row in range(2, 8)}


def attention_forward() -> Axes:
    axes = canvas(45)
    title(axes, 1, 39.5, "S = q k^T of one head, in tiles of 64 x 64")
    scores(axes, 4, 7, BY_QUERIES, CHIP)
    write(axes, 3, 4.6, "One program owns 128 queries and walks the keys.",
          "The two steps on the diagonal come first; only they are masked.")  # fmt: skip
    title(axes, 44, 39.5, "the program")
    box(axes, 44, 33, 14, 3, READ, "q, once")
    box(axes, 44, 23.5, 14, 3, READ, "k, v per step")
    frame(
        axes, 62, 11, 29, 27,
        "kept through the loop, in fp32:", "acc (128, 64), row_max, row_sum", "",
        "a step, for 64 keys:", "s = q k^T", "new_max = max(row_max, max(s))",
        "p = exp2(s - new_max)", "alpha = exp2(row_max - new_max)",
        "row_sum = row_sum * alpha + sum(p)", "acc = acc * alpha + p v", "",
        "s and p live for one step",
    )  # fmt: skip
    arrow(axes, 58.3, 34.5, 61.7, 34.5)
    arrow(axes, 58.3, 25, 61.7, 25)
    write(axes, 44, 17.5, "All of S at B=64,", "T=1024, 12 heads", "would be 1.6 GB", "in bf16.")
    for x, out in ((62, "y = acc / row_sum"), (77, "lse per query")):
        arrow(axes, x + 7, 10.7, x + 7, 7.5)
        box(axes, x, 4.2, 14, 3, WRITE, out)
    return axes


def attention_backward() -> Axes:
    axes = canvas(61)
    for x, name, visits, reads, again, chip, written in (
        (1, "launch 1: dq, a program per 128 queries", BY_QUERIES,
         "q, dO, y, lse once; k, v per step", "S = q k^T,  P = exp2(S - lse)",
         ("delta = sum over D of dO * y, once", "dP = dO v^T", "dS = P * (dP - delta)",
          "dq += dS k"), "dq, delta"),
        (48, "launch 2: dk and dv, a program per 64 keys", BY_KEYS,
         "k, v once; q, dO, lse, delta per step", "S^T = k q^T,  P^T;  dP^T = v dO^T",
         ("dv += P^T dO", "dS^T = P^T * (dP^T - delta)", "dk += dS^T q"), "dk, dv"),
    ):  # fmt: skip
        title(axes, x, 55.5, name)
        scores(axes, x + 3, 22, visits, AGAIN)
        box(axes, x, 16.5, 42, 3, READ, reads)
        box(axes, x, 13.2, 42, 3, AGAIN, again)
        frame(axes, x, 4.2, 42, 8.7, *chip, top=-0.6)
        box(axes, x, 0.9, 42, 3, WRITE, written)
    return axes


def linear_cross_entropy() -> Axes:
    axes = canvas(47)
    title(axes, 1, 41.5, "logits z (65536, 50304)")
    for i, state in enumerate(("done, overwritten", "in memory now", "not yet", "not yet")):
        box(axes, 1, 32.5 - 7.6 * i, 26, 7, WRITE if i == 1 else NEVER,
            f"chunk {i + 1}: {state}", filled=i < 2)  # fmt: skip
    write(axes, 1, 7.4, "One buffer of 1.65 GB holds", "each chunk in turn. All of z",
          "would take 6.6 GB, dz as much.")  # fmt: skip
    arrow(axes, 27.3, 28.5, 33.5, 28.5)
    y = 41.5
    for name, read, written in (
        ("1  cuBLAS: the logits", "x of the chunk, weight", "z"),
        ("2  row kernel: a program per row", "z, and again from a cache", "dz in place of z, loss"),
        ("3  cuBLAS", "dz, weight", "dx of the chunk"),
        ("4  cuBLAS", "dz, x of the chunk", "dweight += dz^T x, fp32"),
    ):
        title(axes, 35, y, name)
        if "row" in name:
            box(axes, 35, y - 4.2, 56, 3, CHIP, "pass 1: maximum and sum of exponentials per lane")
            box(
                axes, 35, y - 7.5, 56, 3, AGAIN, "pass 2: exp(z - max) / sum, minus 1 at the target"
            )
            y -= 6.6
        box(axes, 35, y - 4.2, 27, 3, READ, read)
        arrow(axes, 62.3, y - 2.7, 64.7, y - 2.7)
        box(axes, 65, y - 4.2, 26, 3, WRITE, written)
        y -= 7.2
    write(axes, 35, 4.2, "The backward multiplies dx and dweight by dloss / N.")
    return axes


def adamw() -> Axes:
    axes = canvas(41)
    title(axes, 1, 35.5, "table: a row per tensor")
    for i, name in enumerate(("wte: addresses, lr, ...", "wpe: addresses, lr, ...",
                              "ln_1.weight: ...", "...")):  # fmt: skip
        box(axes, 1, 30.5 - 3 * i, 20, 3, READ, name)
    title(axes, 1, 17.5, "chunks: a line per program")
    for i, name in enumerate(("wte, first 8192", "wte, next 8192", "...", "wpe, first 8192")):
        box(axes, 1, 12.5 - 3 * i, 20, 3, READ, name)
    title(axes, 27, 35.5, "step: the second program")
    for i, (read, written) in enumerate((("p", "p"), ("m", "m"), ("v", "v"),
                                         ("grad", "bf16 copy of p"))):  # fmt: skip
        y = 30.5 - 4.5 * i
        box(axes, 27, y, 12, 3, READ, read)
        arrow(axes, 39.3, y + 1.5, 42.7, y + 1.5)
        arrow(axes, 71.3, y + 1.5, 74.7, y + 1.5)
        box(axes, 75, y, 16, 3, WRITE, written)
    frame(
        axes, 43, 16.5, 28, 17.5,
        "1024 elements at a time:", "g = grad * clip", "m += (1 - beta1) * (g - m)",
        "v = beta2 * v + (1 - beta2) * g * g", "p = p * decay - step_size * m /",
        "(sqrt(v) * correction + eps)", "nothing at all if found_inf",
    )  # fmt: skip
    arrow(axes, 21.3, 27.5, 26.5, 27.5)
    arrow(axes, 21.3, 11, 26.5, 18)
    title(axes, 27, 12.3, "before it: norm and clip")
    box(axes, 27, 7, 18, 3, READ, "gradients, by chunks")
    arrow(axes, 45.3, 8.5, 48.7, 8.5)
    box(axes, 49, 7, 18, 3, WRITE, "a sum per chunk")
    arrow(axes, 67.3, 8.5, 70.7, 8.5)
    box(axes, 71, 7, 20, 3, WRITE, "norm, clip")
    write(axes, 27, 4.5, "One program adds the sums in a fixed order. The host reads nothing back.")
    return axes


FIGURES: tuple[Callable[[], Axes], ...] = (
    layer_norm, embedding, gelu_mlp, attention_forward, attention_backward, linear_cross_entropy,
    adamw,
)  # fmt: skip


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for draw in FIGURES:
        figure = draw().figure
        assert isinstance(figure, Figure)
        plot.save(figure, FOLDER / f"{draw.__name__}.svg")


if __name__ == "__main__":
    main()
