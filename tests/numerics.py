"""Error of our ops and of plain PyTorch against float64, per dtype, output and gradient.

    python -m tests.numerics
    python -m tests.numerics --op gelu_mlp --dtype bf16
    python -m tests.numerics --dtype tf32      # fp32 tensors, products in TF32: on a GPU only

Runs on the GPU if there is one and in the interpreter if not. On a GPU each op is run again 50
times as well, and must give the same bits. The exit status is 1 if a result breaks the rule of
`training.numerics.compare`, which the tests and the bench apply too.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cli
from bench.cases import CASES, Shape, make_inputs
from training.numerics import (
    DTYPES,
    REDUCED,
    Comparison,
    compare,
    default_douts,
    precision,
    tf32_products,
    values_and_grads,
)


def compare_runs(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Mapping[str, Any],
    rows: int,
    terms: int = 1,
    products: int = 0,
) -> list[Comparison]:
    """Comparisons of an op, all three run on the same inputs and the same output gradients.

    Args:
        ours, eager: On `inputs` as given.
        exact: On `inputs` and output gradients widened to float64.
        inputs: Keyword arguments; tensors that are floating take part in the gradient.
        rows: M.
        terms: Products in the longest sum of an element.
        products: See `training.numerics.compare`.
    """
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
    rest = {name: v for name, v in inputs.items() if name not in tensors}
    with torch.no_grad():
        outputs = eager(**inputs)
    # Rounded to the dtypes of the outputs, then widened: all three see the same numbers.
    douts = default_douts(outputs if isinstance(outputs, tuple) else (outputs,))
    double = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    return compare(
        values_and_grads(partial(ours, **rest), tensors, douts),
        values_and_grads(partial(eager, **rest), tensors, douts),
        values_and_grads(partial(exact, **rest), double, tuple(d.double() for d in douts)),
        reduced=REDUCED,
        rows=rows,
        terms=terms,
        products=products,
    )


# Tiles filled, nothing a multiple of anything, and one token.
SHAPES = (Shape(2, 64, 64, 2, 256), Shape(3, 17, 192, 6, 97), Shape(1, 1, 64, 2, 64))
# What is most likely to fail on hardware first: the recipe's short rows and narrow heads, then
# rows cut by a tile, one token, the large launch rows, several chunks of the loss, wide heads.
GPU_SHAPES = (
    Shape(16, 64), Shape(2, 64, C=384), Shape(3, 17), Shape(1, 1), Shape(64, 1024),
    Shape(2, 200, H=6),
)  # fmt: skip
RERUN_SHAPE = Shape(4, 1024)
NUM_RERUNS = 50
# Tokens numerics are checked on. On CUDA enough for the launch rows of large M (from 4,096 rows on)
# and for two fp32 chunks of the loss at GPT-2's vocabulary; the interpreter takes minutes there.
CHECK_TOKENS = {"causal_attention": 4096, "linear_cross_entropy": 16384}
DEFAULT_CHECK_TOKENS = 5120
CHECK_LENGTH = 1023  # of attention's rows: long, and no multiple of a tile
CPU_CHECK_TOKENS = {"linear_cross_entropy": 96}  # float64 logits of 50,304 columns: 39 MB
DEFAULT_CPU_CHECK_TOKENS = 512


def check_shape(op: str, shape: Shape, device: torch.device) -> Shape:
    """The cut of a shape that an op is checked on: as wide, with fewer rows."""
    tokens = CPU_CHECK_TOKENS.get(op, DEFAULT_CPU_CHECK_TOKENS)
    if device.type == "cuda":
        tokens = CHECK_TOKENS.get(op, DEFAULT_CHECK_TOKENS)
        if op == "causal_attention":
            shape = replace(shape, T=min(shape.T, CHECK_LENGTH))
    T = min(shape.T, tokens)
    return replace(shape, B=max(1, min(shape.B, tokens // T)), T=T)


def check_op(
    ours: Callable[..., Any], op: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> list[Comparison]:
    """Ours beside EAGER, on inputs of `bench.cases` cut by `check_shape`.

    What both are held against is `bench.baseline`, which has none of our code, in float64.
    """
    from bench import baseline
    from kernels import EAGER

    cut = check_shape(op, shape, device)
    inputs = make_inputs(CASES[op], cut, dtype, device, seed=1)
    longest = {"gelu_mlp": 4 * cut.C, "causal_attention": cut.T, "linear_cross_entropy": cut.V}
    terms = longest.get(op, cut.C)
    exact, products = baseline.OPS[op], tf32_products(op) if dtype == torch.float32 else 0
    return compare_runs(ours, getattr(EAGER, op), exact, inputs, cut.M, terms, products)


def reruns_that_differ(
    ours: Callable[..., Any], op: str, dtype: torch.dtype, device: torch.device
) -> int:
    """How many of some reruns give another bit; a race shows here before it shows in an error."""
    inputs = make_inputs(CASES[op], RERUN_SHAPE, dtype, device)
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
    rest = {name: v for name, v in inputs.items() if name not in tensors}
    first = values_and_grads(partial(ours, **rest), tensors)
    again = (values_and_grads(partial(ours, **rest), tensors) for _ in range(NUM_RERUNS))
    return sum(any(not torch.equal(first[k], found[k]) for k in first) for found in again)


def check_rows(op: str, dtype: str, device: torch.device) -> Iterator[tuple[str, str, str, str]]:
    """(check, what, figures, why it does not hold) of each result of an op in a dtype."""
    from kernels import TRITON
    from training import timing

    ours, cuda = getattr(TRITON, op), device.type == "cuda"
    with precision(dtype) as known:
        for shape in GPU_SHAPES if cuda else SHAPES:
            cut = check_shape(op, shape, device)
            what = f"{op} {cut.label}" + ("" if cut.H == 12 else f" H={cut.H}")
            try:
                found = check_op(ours, op, shape, known, device)
            except Exception as error:
                yield f"numerics {dtype}", what, "", timing.reason_of(error)
                if timing.is_fatal(error):
                    raise
                continue
            for c in found:
                figures = f"{c.ours:>10.2e}{c.eager:>10.2e}{c.budget:>10.2e}"
                why = "" if c.holds else f"error {c.ours:.2e}, allowed {c.budget:.2e}"
                yield f"numerics {dtype}", f"{what} {c.name}", figures, why
        if cuda:
            differing = reruns_that_differ(ours, op, known, device)
            why = f"{differing} of {NUM_RERUNS} reruns differ" if differing else ""
            yield f"same bits {dtype}", f"{op} {RERUN_SHAPE.label}", "", why


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("tests.numerics", __doc__)
    parser.add_argument("--op", action="append", choices=[*CASES], help="default: all")
    parser.add_argument("--dtype", action="append", choices=[*DTYPES], help="default: all")
    parser.add_argument("--out", type=cli.path, help="also add the rows to this result file")
    parser.add_argument("--commit", help="the commit that is checked, where git cannot tell")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = args.dtype or [*DTYPES]
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, below
        from tests import interpreter

        interpreter.install()
        if "tf32" in dtypes:
            print("tf32 left out: only a GPU multiplies in it")
            dtypes = [name for name in dtypes if name != "tf32"]
    from bench import record

    results = record.open_result(device, args.out, args.commit) if args.out else None
    print(f"{'check':<15}{'of':<50}{'ours':>10}{'eager':>10}{'budget':>10}")
    failed = total = 0
    for op in args.op or CASES:
        for dtype in dtypes:
            for check, what, figures, why in check_rows(op, dtype, device):
                print(
                    f"{check:<15}{what:<50}{figures}{f'  OVER: {why}' if why else ''}", flush=True
                )
                total, failed = total + 1, failed + bool(why)
                if results:
                    results.add("checks", record.CheckRow(check=check, what=what, doubt=why))
    where = "the interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"numerics: {total} results in {where}, {failed} do not hold")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
