"""How far an op may be from float64: at most twice as far as plain PyTorch in the same dtype."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    terms: int = 1,
    products: int = 0,
    atol: float | Mapping[str, float] | None = None,
    spread: bool = False,
) -> list[Comparison]:
    """Hold each result to twice the error that eager makes in the same dtype.

    The budget is 2 max|eager - exact| + eps max|exact|, with the eps of the result's dtype: a
    correctly rounded result passes even where eager happens to be exact. Sums over `rows` rows,
    named in `reduced`, may be sqrt(rows) times further off by that second part; and so may, by
    sqrt(terms), an fp32 result: the order of adding is its only error, and cuBLAS, which adds in
    several chains, is up to three times closer than one chain is.

    With `spread` the same of root mean square errors, which tell a bias of 1% from rounding, in
    bf16 too. The second part is eps/4 rms(exact), about what rounding the exact value gives; an
    fp32 sum of `terms`, or any over `rows` rows, may be off by what fp32 loses in as many steps.
    One value is no spread: those are left out.

    Args:
        ours, eager, exact: results of `values_and_grads`; `exact` in float64.
        reduced: names that are sums over rows, e.g. "dweight".
        rows: M.
        terms: products in the longest sum of an element.
        products: TF32 products one behind the other; see `tf32_products`.
        atol: absolute allowance instead of eps max|exact|; by name, the rest has that.
        spread: of root mean square errors.
    """
    comparisons = []
    for name, want in exact.items():
        if spread and want.numel() < 2:
            continue
        got, low, info = ours[name], eager[name], torch.finfo(ours[name].dtype)
        is_sum, is_fp32 = name in reduced, got.dtype == torch.float32
        if spread:
            error, plain = (_rms(value.to(want.dtype) - want) for value in (got, low))
            scale, step = _rms(want), torch.finfo(torch.float32).eps
            allowance = info.eps / 4 + step * (rows**0.5 * is_sum + terms**0.5 * is_fp32)
            allowance *= scale
        else:
            error, plain = (largest_error(value, want) for value in (got, low))
            finite = want[want.isfinite()].abs()
            scale = finite.max().item() if finite.numel() else 0.0
            allowance = atol.get(name) if isinstance(atol, Mapping) else atol
            if allowance is None:
                allowance = info.eps * (scale + info.tiny)
            allowance *= (terms if is_fp32 else 1) ** 0.5 * (rows if is_sum else 1) ** 0.5
        budget = 2 * plain + allowance + products * TF32_LOSS * scale
        label = f"{name}, root mean square" if spread else name
        comparisons.append(Comparison(label, got.dtype, error, plain, budget))
    return comparisons


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


# Tensor cores drop the last 13 bits of a TF32 operand of ours, where cuBLAS rounds it first: up to
# 2^-10 of its value is lost, about half of that on average and always towards 0. A product loses
# what its two operands do, and a sum of products as much of itself.
TF32_LOSS = 2**-10
# Products of our kernels that a result may have lost by: h in gelu'(h), and dy w_proj; S, dP, dS k.
TF32_PRODUCTS = {"gelu_mlp": 2, "causal_attention": 3}


def tf32_products(op: str) -> int:
    """How many there are in an op as fp32 products are set up now; 0 unless they may be TF32."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return TF32_PRODUCTS.get(op, 0) if tf32 else 0


# "tf32" is fp32 tensors where `precision` lets products be TF32; the rest is what it says.
DTYPES: dict[str, torch.dtype] = dict.fromkeys(("fp32", "tf32"), torch.float32)
DTYPES |= {"fp16": torch.float16, "bf16": torch.bfloat16}
# Gradients that are sums over rows.
REDUCED = ("dweight", "dbias", "dwte", "dwpe", "dw_fc", "db_fc", "dw_proj", "db_proj")


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
