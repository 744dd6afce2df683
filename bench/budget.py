"""Predicts what a training step costs on a card, and prints it beside what was measured.

    python -m bench.budget
    python -m bench.budget --card A100 --shape b16t64

For each part of a GPT-2 124M step in bf16: bytes, flops and exponentials; the floor, which is the
longest of their three times at the card's rates; and the prediction, which is the sum of the three,
as if nothing overlapped. No figure is fitted. Registers, programs per SM and instructions (of a
warp, outside the loops with matrix products) are those of the compiled kernels.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from bench import builds, cli, record, resources
from bench.cases import CASES, Shape
from bench.plan_run import PAPER
from bench.tables import number, shown, table
from kernels._op import INTERPRETED
from model import MODELS
from model.edge import exits
from model.flops import num_parameters
from training.machines import find_card

# The shares of a data sheet's rates that an H100 reached in a copy and in a large product (result
# file b9feadcb); assumed of cards that have no result file.
COPY_SHARE, MATMUL_SHARE = 0.89, 0.70
EXPS_PER_CLOCK = 16  # of an SM
MODEL, ITEMSIZE, TRAIN = "124m", 2, "both"
HEADER = (
    "part calls MB GFLOP Gexp registers_x_programs instructions_outside_loops "
    "floor_ms predicted_ms measured_ms off_by"
)

Work = tuple[float, float, float]  # bytes, flops, exponentials: of a call, or per second


class Part(NamedTuple):
    """One kind of work, `calls` times in a step."""

    name: str
    calls: int
    work: Work


def parts(s: Shape) -> list[Part]:
    """The parts of a step: the ops as the model calls them, and the work between them."""
    L, e = MODELS[MODEL].n_layer, ITEMSIZE
    elements, logits = s.M * s.C, s.M * s.Vp

    def of(op: str, calls: int, more: float = 0.0, redone: float = 1.0, exps: float = 0.0) -> Part:
        case = CASES[op]
        moved = case.bytes(s, e, TRAIN) + more
        return Part(op, calls, (moved, redone * case.flops(s, TRAIN), exps))

    return [
        of("embedding", 1),
        of("add_layer_norm", 2 * L),
        of("gelu_mlp", L, exps=4 * elements),
        # Both launches of the backward compute S and dP: 7 products, where 5 would do.
        of("causal_attention", L, redone=9 / 7, exps=3 * s.B * s.H * s.T**2 / 2),
        # Between the products the logits are read, and dz takes their place.
        of("linear_cross_entropy", 1, more=2 * e * logits, exps=2 * logits),
        # c_attn and c_proj, forward and both gradients; their activations count under the ops.
        Part("other products", L, (0.0, 3 * 2 * 4 * elements * s.C, 0.0)),
        Part("bias gradients", L, (5 * e * elements, 0.0, 0.0)),  # of c_attn and twice c_proj
        # p, m and v read and written, the gradient read twice: fp32, or bf16 with a working copy.
        Part("adamw", 1, (32 * num_parameters(MODELS[MODEL]) - 2 * 12 * s.C**2 * L, 0.0, 0.0)),
    ]


def results_of(card: str) -> list[record.Result]:
    """The result files of a card, newest last."""
    return [r for r in record.load_all() if find_card(r.device["name"]) == PAPER[card]]


def rates_of(card: str) -> tuple[Work, str]:
    """The card's work per second, and where that is from: a result file or the data sheet."""
    sheet = PAPER[card]
    exps = EXPS_PER_CLOCK * sheet.sms * sheet.ghz * 1e9
    for result in reversed(results_of(card)):
        if result.rows("ops") and (limits := result.about.get("limits")):
            rates = (limits["copy_gbs"] * 1e9, limits["matmul_tflops"] * 1e12, exps)
            return rates, f"measured, {result.commit}"
    rates = (sheet.gbs * COPY_SHARE * 1e9, sheet.tflops * MATMUL_SHARE * 1e12, exps)
    return rates, f"{COPY_SHARE:.0%} and {MATMUL_SHARE:.0%} of the data sheet"


def measured_ms(card: str, s: Shape) -> dict[str, float]:
    """The measured ms of a call, by part; "step" is the whole step."""
    found: dict[str, float] = {}
    for section, name, want in (
        ("ops", "", {"provider": "ours", "dtype": "bf16", "mode": TRAIN}),
        ("profile", "adamw", {"provider": "ours bf16", "kind": "optimizer"}),
        ("step", "step", {"provider": "ours bf16", "model": MODEL}),
    ):
        for result in results_of(card):
            rows = shown(result.rows(section, shape=s.label, **want))
            found |= {name or row.op: row.ms for row in rows}
    return found


def builds_of(arch: int, s: Shape) -> dict[str, list[str]]:
    """Registers x programs per SM, and instructions outside loops, of the kernels of each op."""
    found: dict[str, list[str]] = {}
    for op, run in builds.step(s).items():
        rows = [resources.inspect(build) for build in builds.record(run, arch)]
        cells = dict.fromkeys((f"{r.registers} x{r.blocks_per_sm}", str(r.outside)) for r in rows)
        found[op] = [", ".join(cell) for cell in zip(*cells, strict=True)]
    return found


def lines(card: str, s: Shape, compiled: dict[str, list[str]]) -> list[list[str]]:
    """The lines of the table: every part, and their sum."""
    (rates, _), measured = rates_of(card), measured_ms(card, s)

    def times(name: str, floor: float, sum_ms: float, digits: str) -> list[str]:
        known = measured.get(name)
        off = f"{sum_ms / known - 1:+.0%}" if known else ""
        return [format(floor, digits), format(sum_ms, digits), number(known, digits), off]

    found, floor, total = [], 0.0, 0.0
    for part in parts(s):
        ms = [1e3 * work / rate for work, rate in zip(part.work, rates, strict=True)]
        floor, total = floor + part.calls * max(ms), total + part.calls * sum(ms)
        amounts = [work / unit for work, unit in zip(part.work, (1e6, 1e9, 1e9), strict=True)]
        cells = [str(part.calls), *(f"{amount:,.0f}" if amount else "" for amount in amounts)]
        figures = times(part.name, max(ms), sum(ms), ".3f")
        found.append([part.name, *cells, *compiled.get(part.name, ["", ""]), *figures])
    return [*found, ["step", *[""] * 6, *times("step", floor, total, ".1f")]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.budget", __doc__)
    parser.add_argument("--card", choices=[*PAPER], default="H100")
    parser.add_argument("--shape", type=cli.shape, default=Shape(64, 1024), help="such as b16t64")
    args = parser.parse_args(argv)
    (gbs, flops, exps), source = rates_of(args.card)
    # A process that interprets kernels cannot compile them.
    compiled = {} if INTERPRETED else builds_of(PAPER[args.card].arch, args.shape)
    print(
        f"budget of GPT-2 {MODEL}, {args.shape.label}, bf16, on one {args.card}: a prediction\n"
        f"{gbs / 1e12:.2f} TB/s and {flops / 1e12:.0f} TFLOP/s ({source}), "
        f"{exps / 1e12:.1f}e12 exponentials per second"
    )
    header = [name.replace("_", " ") for name in HEADER.split()]
    print(table(header, lines(args.card, args.shape, compiled)))
    return 0


if __name__ == "__main__":
    with exits():
        sys.exit(main())
