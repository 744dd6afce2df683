"""The accuracy rule: an op is at most twice as far from float64 as plain PyTorch in its dtype."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Values = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]


def values_and_grads(
    fn: Callable[..., Outputs],
    args: Mapping[str, Any],
    dout: Outputs | None = None,
    frozen: tuple[str, ...] = (),
) -> Values:
    """Call `fn(**args)` on fresh leaves and differentiate it.

    Args:
        fn: returns one tensor or a tuple of tensors.
        args: arguments by parameter name; floating tensors take part in the gradient.
        dout: gradient of each output; by default that of `default_douts`, so that two functions
            with equal output shapes and dtypes are differentiated alike.
        frozen: names that do not require a gradient.

    Returns:
        "loss" for a scalar, else "y", or "y0", "y1", ... for a tuple; and "d" + name for each
        gradient that is not None.
    """
    return gradient_call(fn, args, dout, frozen)()


def gradient_call(
    fn: Callable[..., Outputs],
    args: Mapping[str, Any],
    dout: Outputs | None = None,
    frozen: tuple[str, ...] = (),
) -> Callable[[], Values]:
    """A call that repeats `values_and_grads` with the same leaves and output gradients."""
    leaves = {
        name: v.detach().clone().requires_grad_(v.is_floating_point() and name not in frozen)
        if isinstance(v, Tensor)
        else v
        for name, v in args.items()
    }
    wanted = {f"d{name}": v for name, v in leaves.items() if getattr(v, "requires_grad", False)}

    def call() -> Values:
        nonlocal dout
        result = fn(**leaves)
        if isinstance(result, tuple):
            values = {f"y{i}": y for i, y in enumerate(result)}
        else:
            values = {"loss" if result.dim() == 0 else "y": result}
        dout = default_douts(result) if dout is None else dout
        outputs = tuple(values.values())
        if wanted:
            grads = torch.autograd.grad(outputs, tuple(wanted.values()), dout, allow_unused=True)
            values |= {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}
        return {name: t.detach() for name, t in values.items()}

    return call


def default_douts(result: Outputs) -> tuple[Tensor, ...]:
    """Seeded noise like each output; 1.5 for a scalar, so that a forgotten factor shows."""
    results = result if isinstance(result, tuple) else (result,)
    at = results[0].device  # a CPU would take half a second for 65,536 rows of 768
    how = {"device": at, "generator": torch.Generator(at).manual_seed(1234)}
    return tuple(
        torch.full_like(y, 1.5) if y.dim() == 0 else torch.randn(y.shape, **how).to(y.dtype)
        for y in results
    )


@dataclass(frozen=True)
class Comparison:
    """The error of one output or gradient against the float64 value."""

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
    terms: int = 1,
    products: int = 0,
    atol: float | Mapping[str, float] | None = None,
    spread: bool = False,
) -> list[Comparison]:
    """Compare each error with twice the one that eager makes in the same dtype.

    The budget is 2 max|eager - exact| + eps max|exact|, with the eps of the result's dtype: a
    correctly rounded result passes even where eager happens to be exact. The second part grows by
    sqrt(rows) for the sums over rows in `reduced`, and by sqrt(terms) for fp32 results. Their only
    error is the order of summation, and cuBLAS, which sums in several chains, is up to three times
    closer than one chain.

    With `spread` root mean square errors are compared as well, which distinguish a bias of 1% from
    rounding, in bf16 too. There the second part is eps/4 rms(exact), about what rounding the exact
    value costs, and what fp32 loses in a sum of `terms` or over `rows` rows.

    Args:
        ours, eager, exact: results of `values_and_grads`; `exact` in float64.
        reduced: names that are sums over rows, e.g. "dweight".
        rows: M.
        terms: products in the longest sum of an element.
        products: TF32 products in sequence; see `tf32_products`.
        atol: absolute allowance instead of eps max|exact|, for all results or by name.
    """
    largest, spreads = [], []
    for name, want in exact.items():
        got, low, dtype = ours[name], eager[name], ours[name].dtype
        info, is_sum, is_fp32 = torch.finfo(dtype), name in reduced, dtype == torch.float32
        finite = want[want.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        allowance = atol.get(name) if isinstance(atol, Mapping) else atol
        if allowance is None:
            allowance = info.eps * (scale + info.tiny)
        allowance *= (terms if is_fp32 else 1) ** 0.5 * (rows if is_sum else 1) ** 0.5
        error, plain = largest_error(got, want), largest_error(low, want)
        budget = 2 * plain + allowance + products * TF32_LOSS * scale
        largest.append(Comparison(name, dtype, error, plain, budget))
        if spread and want.numel() > 1:
            error, plain = (_rms(value.to(want.dtype) - want) for value in (got, low))
            steps = rows**0.5 * is_sum + terms**0.5 * is_fp32
            share = info.eps / 4 + torch.finfo(torch.float32).eps * steps + products * TF32_LOSS
            budget = 2 * plain + share * _rms(want)
            label = f"{name}, root mean square"
            spreads.append(Comparison(label, dtype, error, plain, budget))
    return [*largest, *spreads]


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


# Tensor cores drop the last 13 bits of our TF32 operands, where cuBLAS rounds its own first: up to
# 2^-10 of an operand is lost, half of that on average and always towards 0. A product loses as much
# as its two operands together, and a sum of products the same share of itself.
TF32_LOSS = 2**-10
# Products of our kernels in sequence: h in gelu'(h), and dy w_proj; S, dP, dS k.
TF32_PRODUCTS = {"gelu_mlp": 2, "causal_attention": 3}


def tf32_products(op: str) -> int:
    """How many TF32 products in sequence an fp32 op has; 0 if products are not TF32 now."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TF32_PRODUCTS.get(op, 0) if tf32 else 0


# "tf32" means fp32 tensors whose products `precision` allows to be TF32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32}
DTYPES |= {"fp16": torch.float16, "bf16": torch.bfloat16}
# Gradients that are sums over rows.
REDUCED = ("dweight", "dbias", "dwte", "dwpe", "dw_fc", "db_fc", "dw_proj", "db_proj")


@contextlib.contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Set the fp32 matmul precision for a name of DTYPES; yields its dtype."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    # torch's fused attention multiplies fp32 in three TF32 products whatever is set. Only the
    # plain one, which goes through matmul, uses a single one.
    plain = sdpa_kernel(SDPBackend.MATH) if name == "tf32" else contextlib.nullcontext()
    try:
        with plain:
            yield DTYPES[name]
    finally:
        torch.set_float32_matmul_precision(before)
