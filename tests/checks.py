"""What every op is held to. Each check takes the op as a callable of named tensors.

Non-tensor arguments go in by closure: `lambda qkv: TRITON.causal_attention(qkv, n_head)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from training.numerics import (
    compare,
    default_douts,
    precision,
    tf32_products,
    values_and_grads,
)

__all__ = [
    "DTYPES",
    "assert_bitwise_rerun",
    "assert_compiled_equals_eager",
    "assert_no_double_backward",
    "assert_only_launches",
    "assert_twice_eager",
    "assert_usual",
    "assert_within_tf32",
    "assert_zero_stride_grads",
    "dispatched_ops",
    "dtypes",
    "largest_allocation",
    "on_device",
    "sizes",
    "sweep",
    "values_and_grads",
]

Fn = Callable[..., Any]
Args = Mapping[str, Tensor]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in _FLOATS]


def on_device(tensor: Tensor, device: str) -> Tensor:
    """A copy with the same strides, which `.to` does not keep where they leave gaps."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
    ).copy_(tensor)


def assert_twice_eager(
    ours: Fn,
    eager: Fn,
    exact: Fn,
    args: Args,
    *,
    reduced: Sequence[str] = ("dweight", "dbias"),
    rows: int = 1,
    terms: int = 1,
    products: int = 0,
    atol: float | Mapping[str, float] | None = None,
    frozen: Sequence[str] = (),
    dout: Tensor | tuple[Tensor, ...] | None = None,
) -> None:
    """No output or gradient is further from float64 than twice what eager is in the same dtype.

    Args:
        ours, eager: the op under test and plain PyTorch, on `args` as given.
        exact: the formula itself, on `args` in float64; not code under test.
        reduced, rows, terms, products, atol: see `training.numerics.compare`.
        frozen: names that do not require a gradient.
        dout: gradient of each output; seeded noise by default.
    """
    frozen = tuple(frozen)
    if dout is None:
        with torch.no_grad():
            outputs = eager(**args)
        dout = default_douts(outputs if isinstance(outputs, tuple) else (outputs,))
    douts = dout if isinstance(dout, tuple) else (dout,)
    got = values_and_grads(ours, args, douts, frozen)
    low = values_and_grads(eager, args, douts, frozen)
    doubled = {n: t.double() if t.is_floating_point() else t for n, t in args.items()}
    want = values_and_grads(exact, doubled, tuple(d.double() for d in douts), frozen)

    assert got.keys() == low.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == low[name].dtype, name
        assert value.shape == low[name].shape == want[name].shape, name
        assert want[name].dtype == torch.float64, f"{name}: the oracle left float64"
    comparisons = compare(
        got, low, want, reduced=tuple(reduced), rows=rows, terms=terms, products=products, atol=atol
    )
    missed = [str(c) for c in comparisons if not c.holds]
    assert not missed, "\n".join(missed)


def assert_within_tf32(op: str, device: str, check: Callable[[int], None]) -> None:
    """`check(products)` holds where fp32 operands lose 13 bits; with no allowance it would not."""
    from tests.interpreter import tf32_products as truncating

    with truncating() if device == "cpu" else precision("tf32"):
        check(tf32_products(op))
        if device == "cpu":  # where eager is exact; on a GPU its own error may cover ours
            with pytest.raises(AssertionError, match="over budget"):
                check(0)


def _assert_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), f"{name}: {what}"


def assert_bitwise_rerun(fn: Fn, args: Args) -> None:
    """Values and gradients are the same to the bit when computed again."""
    poisoned = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # our own determinism, not the one torch enforces
    try:
        first, again = values_and_grads(fn, args), values_and_grads(fn, args)
    finally:
        torch.use_deterministic_algorithms(poisoned, warn_only=True)
    _assert_equal(again, first, "differs between two runs")


def assert_zero_stride_grads(fn: Fn, args: Args) -> None:
    """`out.sum().backward()` hands backward an expanded scalar; it must not be misread."""
    with torch.no_grad():
        result = fn(**args)
    outputs = result if isinstance(result, tuple) else (result,)
    dense = tuple(torch.ones_like(y) for y in outputs)
    expanded = tuple(y.new_ones(()).expand(y.shape) for y in outputs)
    _assert_equal(
        values_and_grads(fn, args, expanded),
        values_and_grads(fn, args, dense),
        "an expanded gradient gives another result than a dense one",
    )


def assert_compiled_equals_eager(
    fn: Fn,
    args: Args,
    *,
    also: Sequence[Args] = (),
    dynamic: bool | None = None,
    backend: Any = "aot_eager",
) -> None:
    """`torch.compile(fullgraph=True)` gives the same bits as calling `fn`.

    Args:
        also: further arguments that the same graph must take without compiling again; for
            `dynamic=True`.
    """
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend=backend)
    _assert_equal(values_and_grads(compiled, args), values_and_grads(fn, args), "compiled")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more in also:
            _assert_equal(values_and_grads(compiled, more), values_and_grads(fn, more), "compiled")


def assert_no_double_backward(fn: Fn, args: Args, match: str = "double backward") -> None:
    """A gradient penalty must raise: its gradient would be silently wrong."""
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in args.items()}
    inputs = [t for t in leaves.values() if t.requires_grad]

    def penalty() -> None:
        result = fn(**leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        squares = [y.float().square().sum() for y in outputs]
        grads = torch.autograd.grad(squares, inputs, create_graph=True)
        torch.stack([g.float().square().sum() for g in grads]).sum().backward()

    with pytest.raises(RuntimeError, match=match):
        penalty()


def assert_usual(op: str, fn: Fn, args: Args) -> None:
    """What holds of every op beside its numbers.

    Reruns have equal bits, expanded gradients are read right, without grad mode values are the same
    and nothing is kept, and a double backward is refused by the op's name.
    """
    assert_bitwise_rerun(fn, args)
    assert_zero_stride_grads(fn, args)
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in args.items()}
    with torch.no_grad():
        kept, free = (fn(**given) for given in (leaves, args))
    for result, want in ((kept, fn(**leaves)), (free, kept)):
        pairs = zip(result, want, strict=True) if isinstance(result, tuple) else [(result, want)]
        for value, other in pairs:
            assert value.grad_fn is None, "a graph without grad mode"
            assert torch.equal(value, other), "other values without grad mode"
    assert_no_double_backward(fn, args, f"{op}: double backward")


class _Recorder(TorchDispatchMode):
    """Names the operations that reach the device, those inside our own ops included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.views: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # `to` may be a view, a cast or nothing: record what it turns out to be
                return func.decompose(*args, **(kwargs or {}))
        self.names.append(name)
        if func.is_view:
            self.views.add(name)
        if func.namespace == "fgpt":
            # Straight to the launch, with this mode on, to see what the launch itself calls.
            tensors = [a for a in args if isinstance(a, Tensor)]
            key = "CUDA" if tensors[0].is_cuda else "CPU"
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with self:
                return func.redispatch(keys, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            created = result if isinstance(result, (tuple, list)) else (result,)
            sizes = [t.numel() for t in created if isinstance(t, Tensor)]
            self.largest = max([self.largest, *sizes])
        return result


def _record(fn: Fn, args: Args) -> _Recorder:
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in args.items()}
    with torch.no_grad():
        result = fn(**leaves)
    douts = default_douts(result if isinstance(result, tuple) else (result,))
    inputs = [t for t in leaves.values() if t.requires_grad]
    with _Recorder() as recorder:
        torch.autograd.grad(fn(**leaves), inputs, douts)
    return recorder


def dispatched_ops(fn: Fn, args: Args) -> list[str]:
    """Names of all operations of forward and backward, e.g. "fgpt::layer_norm_fwd"."""
    return _record(fn, args).names


def largest_allocation(fn: Fn, args: Args) -> int:
    """Elements of the largest tensor that forward and backward create."""
    return _record(fn, args).largest


def assert_only_launches(fn: Fn, args: Args, allow: Sequence[str] = ()) -> None:
    """Forward and backward are our launches, views and empty allocations, and `allow`."""
    recorder = _record(fn, args)
    stray = {
        name
        for name in recorder.names
        if not name.startswith(("fgpt::", "aten::empty", "aten::new_empty"))
        and name not in recorder.views
        and name not in allow
    }
    assert not stray, f"beside launches and empties: {sorted(stray)}"
    assert any(name.startswith("fgpt::") for name in recorder.names), "no launch at all"


def sizes(low: int, high: int, *edges: int) -> st.SearchStrategy[int]:
    """Integers from `low` to `high`, half of them from `edges`."""
    drawn = st.integers(low, high)
    return st.sampled_from(edges) | drawn if edges else drawn


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(_FLOATS)


def sweep(**strategies: st.SearchStrategy[Any]) -> Callable[[Fn], Fn]:
    """`hypothesis.given` with 12 examples, the same ones on every run."""

    def decorate(test: Fn) -> Fn:
        settings = hypothesis.settings(
            max_examples=12,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[
                hypothesis.HealthCheck.function_scoped_fixture,
                hypothesis.HealthCheck.too_slow,
            ],
        )
        return settings(hypothesis.given(**strategies)(test))

    return decorate
