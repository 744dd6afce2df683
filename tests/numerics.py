"""Error of our ops and of plain PyTorch against float64, per dtype, output and gradient.

    python -m tests.numerics
    python -m tests.numerics --op gelu_mlp --dtype bf16
    python -m tests.numerics --dtype tf32      # fp32 tensors, products in TF32: on a GPU only

Runs on the GPU if there is one and in the interpreter if not. On a GPU each op is run again 50
times as well, and must give the same bits. The exit status is 1 if a result breaks the rule of
`compare`, which the tests and the bench apply too.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import cli
from bench.cases import CASES, Shape, find_case, make_inputs, smaller

Values = dict[str, Tensor]


def values_and_grads(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    args: Mapping[str, Tensor],
    dout: Tensor | tuple[Tensor, ...] | None = None,
    frozen: tuple[str, ...] = (),
) -> Values:
    """Call `fn(**args)` on fresh leaves and differentiate it.

    Args:
        fn: returns one tensor or a tuple of tensors.
        args: tensors by parameter name; floating ones take part in the gradient.
        dout: gradient of each output; by default seeded noise (1.5 for a scalar), so that two
            functions with equal output shapes and dtypes are differentiated alike.
        frozen: names that do not require a gradient.

    Returns:
        "loss" for a scalar, else "y", or "y0", "y1", ... for a tuple; and "d" + name for each
        gradient that is not None.
    """
    leaves = {
        name: t.detach().clone().requires_grad_(t.is_floating_point() and name not in frozen)
        for name, t in args.items()
    }
    result = fn(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    if isinstance(result, tuple):
        values = {f"y{i}": y for i, y in enumerate(result)}
    else:
        values = {"loss" if result.dim() == 0 else "y": result}
    douts = default_douts(outputs) if dout is None else dout if isinstance(dout, tuple) else (dout,)
    wanted = {f"d{name}": t for name, t in leaves.items() if t.requires_grad}
    if wanted:
        grads = torch.autograd.grad(outputs, tuple(wanted.values()), douts, allow_unused=True)
        values |= {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}
    return {name: t.detach() for name, t in values.items()}


def default_douts(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Seeded noise like each output; 1.5 for a scalar, so that a forgotten factor shows."""
    generator = torch.Generator().manual_seed(1234)
    return tuple(
        torch.full_like(y, 1.5) if y.dim() == 0 else torch.randn(y.shape, generator=generator).to(y)
        for y in outputs
    )


@dataclass(frozen=True)
class Comparison:
    """Largest errors of one output or gradient against the float64 value."""

    name: str
    dtype: torch.dtype
    ours: float
    eager: float
    budget: float

    @property
    def holds(self) -> bool:
        return self.ours <= self.budget  # False for a NaN

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.ours:.2e} over budget {self.budget:.2e} "
            f"(eager {self.eager:.2e}, {self.dtype})"
        )


def largest_error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact|; 0 for no elements; a NaN or infinity must stand where `exact` has it."""
    got = got.to(exact.dtype)
    same = (got == exact) | (got.isnan() & exact.isnan())
    error = torch.where(same, 0.0, (got - exact).abs())
    return error.max().item() if error.numel() else 0.0


def compare(
    ours: Values,
    eager: Values,
    exact: Values,
    *,
    reduced: tuple[str, ...] = (),
    rows: int = 1,
    atol: float | None = None,
) -> list[Comparison]:
    """Hold each result to twice the error that eager makes in the same dtype.

    The budget is 2 max|eager - exact| + eps max|exact|, with the eps of the result's dtype: a
    correctly rounded result passes even where eager happens to be exact. Sums over `rows` rows,
    named in `reduced`, may be sqrt(rows) times further off by that second part.

    Args:
        ours, eager, exact: results of `values_and_grads`; `exact` in float64.
        reduced: names that are sums over rows, e.g. "dweight".
        rows: M.
        atol: absolute allowance instead of eps max|exact|.
    """
    comparisons = []
    for name, want in exact.items():
        got, low = ours[name], eager[name]
        info = torch.finfo(got.dtype)
        if atol is None:
            finite = want[want.isfinite()].abs()
            scale = finite.max().item() if finite.numel() else 0.0
            allowance = info.eps * (scale + info.tiny)
        else:
            allowance = atol
        if name in reduced:
            allowance *= rows**0.5
        eager_error = largest_error(low, want)
        comparisons.append(
            Comparison(
                name, got.dtype, largest_error(got, want), eager_error, 2 * eager_error + allowance
            )
        )
    return comparisons


# "tf32" is fp32 tensors where `precision` lets products be TF32; the rest is what it says.
DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16
}  # fmt: skip
# Gradients that are sums over rows.
REDUCED = ("dweight", "dbias", "dw_fc", "db_fc", "dw_proj", "db_proj")


@contextlib.contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype of a name of DTYPES, with fp32 products as that name has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    # The fused attention kernels of torch multiply fp32 in three TF32 products whatever is set:
    # plain PyTorch in TF32 is the one that goes through matmul.
    plain = sdpa_kernel(SDPBackend.MATH) if name == "tf32" else contextlib.nullcontext()
    try:
        with plain:
            yield DTYPES[name]
    finally:
        torch.set_float32_matmul_precision(before)


def compare_runs(
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Mapping[str, Any],
    rows: int,
) -> list[Comparison]:
    """Comparisons of an op, all three run on the same inputs and the same output gradients.

    Args:
        ours, eager: On `inputs` as given.
        exact: On `inputs` and output gradients widened to float64.
        inputs: Keyword arguments; tensors that are floating take part in the gradient.
        rows: M.
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
    )


# Tiles filled, nothing a multiple of anything, and one token.
SHAPES = (Shape(2, 64, 64, 2, 256), Shape(3, 17, 96, 3, 97), Shape(1, 1, 32, 1, 64))
# What is most likely to fail on hardware first: the recipe's short rows and narrow heads, then
# rows cut by a tile, one token, the large launch rows, several chunks of the loss, wide heads.
GPU_SHAPES = (
    Shape(16, 64), Shape(2, 64, C=384), Shape(3, 17), Shape(1, 1), Shape(64, 1024),
    Shape(2, 200, H=6),
)  # fmt: skip
RERUN_SHAPE = Shape(4, 1024)
NUM_RERUNS = 50
# Tokens numerics are checked on. On CUDA enough for the launch rows of large M (from 4,096 rows on)
# and for two chunks of the loss at GPT-2's vocabulary; the interpreter takes minutes there.
CHECK_TOKENS = {"causal_attention": 4096, "linear_cross_entropy": 16384}
DEFAULT_CHECK_TOKENS = 5120
CHECK_LENGTH = 1023  # of attention's rows: long, and no multiple of a tile
CPU_CHECK_TOKENS = {"linear_cross_entropy": 96}  # float64 logits of 50,304 columns: 39 MB
DEFAULT_CPU_CHECK_TOKENS = 512


def check_shape(op: str, shape: Shape, device: torch.device) -> Shape:
    """The cut of a shape that an op is checked on."""
    if device.type != "cuda":
        return smaller(shape, CPU_CHECK_TOKENS.get(op, DEFAULT_CPU_CHECK_TOKENS))
    if op == "causal_attention":
        shape = replace(shape, T=min(shape.T, CHECK_LENGTH))
    return smaller(shape, CHECK_TOKENS.get(op, DEFAULT_CHECK_TOKENS))


def check_op(
    ours: Callable[..., Any], op: str, shape: Shape, dtype: torch.dtype, device: torch.device
) -> list[Comparison]:
    """Ours beside EAGER, on inputs of `bench.cases` cut by `check_shape`.

    What both are held against is `bench.baseline`, which has none of our code, in float64.
    """
    from bench import baseline
    from kernels import EAGER

    cut = check_shape(op, shape, device)
    inputs = make_inputs(find_case(op), cut, dtype, device, seed=1)
    return compare_runs(ours, getattr(EAGER, op), baseline.OPS[op], inputs, cut.M)


def reruns_that_differ(
    ours: Callable[..., Any], op: str, dtype: torch.dtype, device: torch.device
) -> int:
    """How many of some reruns give another bit; a race shows here before it shows in an error."""
    inputs = make_inputs(find_case(op), RERUN_SHAPE, dtype, device)
    tensors = {name: v for name, v in inputs.items() if isinstance(v, Tensor)}
    rest = {name: v for name, v in inputs.items() if name not in tensors}
    first = values_and_grads(partial(ours, **rest), tensors)
    again = (values_and_grads(partial(ours, **rest), tensors) for _ in range(NUM_RERUNS))
    return sum(any(not torch.equal(first[k], found[k]) for k in first) for found in again)


def check_rows(op: str, dtype: str, device: torch.device) -> Iterator[tuple[str, str, str, str]]:
    """(check, what, figures, why it does not hold) of each result of an op in a dtype."""
    from bench import timing
    from kernels import TRITON

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
    parser.add_argument("--commit", help="what is checked, where git is not at hand")
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
    from bench import record, rows

    results = record.Results(device, args.out, args.commit) if args.out else None
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
                    results.add("checks", rows.CheckRow(check=check, what=what, doubt=why))
    where = "the interpreter" if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"numerics: {total} results in {where}, {failed} do not hold")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
