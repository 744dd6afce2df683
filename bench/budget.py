"""What a training step should cost on a card, before anyone has timed it, beside what was timed.

    python -m bench.budget
    python -m bench.budget --card A100 --shape b16t64

Per part of a GPT-2 124M step in bf16: bytes, flops and exponentials, the floor (the longest of the
three at the card's rates) and the prediction, which adds them up as if nothing overlapped. No
figure is fitted. Registers and programs per SM are those of the compiled kernels.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from bench import cli, record, resources
from bench.cases import CASES, Shape
from bench.plan_run import PAPER
from bench.record import Result
from bench.tables import number, shown, table
from kernels._op import INTERPRETED
from model import MODELS
from model.edge import exits
from model.flops import num_parameters
from training.machines import CARDS, find_card

# What of a data sheet's rates an H100 reached in a copy and in a large product; result file
# b9feadcb. For the cards that no result file measured.
COPY_SHARE, MATMUL_SHARE = 0.89, 0.70
EXPS_PER_CLOCK = 16  # of an SM
MODEL, ITEMSIZE, TRAIN = "124m", 2, "both"
# The kernels of an op at each shape, by the beginning of a case's label; of several the first.
BUILDS = {
    "add_layer_norm": ("fwd C=768 x=bf16 h=fp32", "bwd C=768 x=bf16 h=fp32"),
    "gelu_mlp": ("up bf16 16-bit {size}", "down bf16 16-bit {size}"),
    "causal_attention": ("fwd D=64 bf16 M{block}", "dq D=64 bf16", "dkdv D=64 bf16"),
    "linear_cross_entropy": ("bf16 train",),
    "adamw": ("update",),
}
HEADER = "part calls MB GFLOP Gexp registers_x_programs floor_ms predicted_ms measured_ms off_by"
SHORT = ("fwd D=64 bf16 M64", "short D=64 bf16 M64")  # attention's, up to 64 tokens


Work = tuple[float, float, float]  # bytes, flops, exponentials: of a call, or per second


class Part(NamedTuple):
    """One kind of work, `calls` times in a step."""

    name: str
    calls: int
    work: Work


def parts(s: Shape) -> list[Part]:
    """The parts of a step: the ops as the model calls them, and what lies between."""
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
        # The two launches of the backward both make S and dP: 7 products, where 5 would do.
        of("causal_attention", L, redone=9 / 7, exps=3 * s.B * s.H * s.T**2 / 2),
        # Between the products the logits are read and dz written in their place.
        of("linear_cross_entropy", 1, more=2 * e * logits, exps=2 * logits),
        # c_attn and c_proj, forward and both gradients; their activations count under the ops.
        Part("other products", L, (0.0, 3 * 2 * 4 * elements * s.C, 0.0)),
        Part("bias gradients", L, (5 * e * elements, 0.0, 0.0)),  # of c_attn and twice c_proj
        # p, m and v read and written, the gradient read twice: fp32, or bf16 with a working copy.
        Part("adamw", 1, (32 * num_parameters(MODELS[MODEL]) - 2 * 12 * s.C**2 * L, 0.0, 0.0)),
    ]


def measured_on(name: str, section: str) -> list[Result]:
    """Result files of a card with rows in a section, newest last."""
    card = find_card(name)
    found = (result for result in record.load_all() if result.rows(section))
    return [result for result in found if card and find_card(result.device["name"]) == card]


def rates_of(card: str) -> tuple[Work, str]:
    """Per second, and where they come from: a result file, or else a share of the data sheet."""
    sheet, (_, _, sms, ghz) = CARDS[card], PAPER[card]
    exps = EXPS_PER_CLOCK * sms * ghz * 1e9
    for result in reversed(measured_on(card, "ops")):
        if limits := result.about.get("limits"):
            rates = (limits["copy_gbs"] * 1e9, limits["matmul_tflops"] * 1e12, exps)
            return rates, f"measured, {result.commit}"
    rates = (sheet.gbs * COPY_SHARE * 1e9, sheet.tflops * MATMUL_SHARE * 1e12, exps)
    return rates, f"{COPY_SHARE:.0%} and {MATMUL_SHARE:.0%} of the data sheet"


def measured_ms(card: str, s: Shape) -> dict[str, float]:
    """By part, of one call; "step" is the whole."""
    found: dict[str, float] = {}
    for section, name, want in (
        ("ops", "", {"provider": "ours", "dtype": "bf16", "mode": TRAIN}),
        ("profile", "adamw", {"provider": "ours bf16", "kind": "optimizer"}),
        ("step", "step", {"provider": "ours bf16", "model": MODEL}),
    ):
        for result in measured_on(card, section):
            rows = shown(result.rows(section, shape=s.label, **want))
            found |= {name or row.op: row.ms for row in rows}
    return found


def compiled(arch: int, s: Shape) -> dict[str, str]:
    """By op, registers and programs per SM of its kernels, forward first."""
    words = {"size": "small" if s.M < 4096 else "large", "block": 128}
    wanted = {op: [label.format(**words) for label in labels] for op, labels in BUILDS.items()}
    if s.T <= 64:
        wanted["causal_attention"] = [*SHORT]
    modules = map(importlib.import_module, resources.kernel_modules())
    cases = [case for module in modules for case in module.aot_cases(arch)]
    found: dict[str, str] = {}
    for op, labels in wanted.items():
        own = [case for case in cases if case.op == op]
        builds = [next(c for c in own if c.label.startswith(label)) for label in labels]
        rows = [resources.inspect_case(case, arch) for case in builds]
        found[op] = ", ".join(f"{row.registers} x{row.blocks_per_sm}" for row in rows)
    return found


def lines(card: str, s: Shape, builds: dict[str, str]) -> list[list[str]]:
    """The table's lines: every part, and the sum."""
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
        found.append([part.name, *cells, builds.get(part.name, ""), *figures])
    return [*found, ["step", *[""] * 5, *times("step", floor, total, ".1f")]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.budget", __doc__)
    parser.add_argument("--card", choices=[*PAPER], default="H100")
    parser.add_argument("--shape", type=cli.shape, default=Shape(64, 1024), help="such as b16t64")
    args = parser.parse_args(argv)
    (gbs, flops, exps), source = rates_of(args.card)
    # A process that interprets kernels cannot compile them.
    builds = {} if INTERPRETED else compiled(PAPER[args.card][0], args.shape)
    print(
        f"budget of GPT-2 {MODEL}, {args.shape.label}, bf16, on one {args.card}: a prediction\n"
        f"{gbs / 1e12:.2f} TB/s and {flops / 1e12:.0f} TFLOP/s ({source}), "
        f"{exps / 1e12:.1f}e12 exponentials per second"
    )
    header = [name.replace("_", " ") for name in HEADER.split()]
    print(table(header, lines(args.card, args.shape, builds)))
    return 0


if __name__ == "__main__":
    with exits():
        sys.exit(main())
