"""The op set a model is built from, in two interchangeable backends.

`EAGER` needs torch alone. `TRITON` is resolved on first use, so importing this package needs
neither triton nor a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from . import reference

__all__ = ["EAGER", "TRITON", "Ops", "parse_ops", "unfit"]

WIDTH = 64  # what gelu_mlp's C must be a multiple of, as that of every GPT-2 is
HEAD_DIMS = (16, 32, 64, 128)


class LayerNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor: ...


class AddLayerNorm(Protocol):
    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]: ...


class GeluMLP(Protocol):
    def __call__(
        self, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor
    ) -> Tensor: ...


class CausalAttention(Protocol):
    def __call__(self, qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor: ...


class LinearCrossEntropy(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int | None = None,
        ignore_index: int = -100,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Ops:
    """One callable per op. Pass it to the model; never look it up from a global.

    Under autocast every op returns activations in the autocast dtype and keeps the residual
    stream and the loss in fp32, which is what plain PyTorch does for this model.
    """

    layer_norm: LayerNorm
    add_layer_norm: AddLayerNorm
    gelu_mlp: GeluMLP
    causal_attention: CausalAttention
    linear_cross_entropy: LinearCrossEntropy


EAGER = Ops(
    layer_norm=reference.layer_norm,
    add_layer_norm=reference.add_layer_norm,
    gelu_mlp=reference.gelu_mlp,
    causal_attention=reference.causal_attention,
    linear_cross_entropy=reference.linear_cross_entropy,
)


@cache
def _triton_ops() -> Ops:
    # Modules, not functions: `kernels.layer_norm` must stay the module.
    from . import causal_attention, gelu_mlp, layer_norm, linear_cross_entropy

    return Ops(
        layer_norm=layer_norm.layer_norm,
        add_layer_norm=layer_norm.add_layer_norm,
        gelu_mlp=gelu_mlp.gelu_mlp,
        causal_attention=causal_attention.causal_attention,
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    )


def __getattr__(name: str) -> Any:
    if name == "TRITON":
        return _triton_ops()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_ops(spec: str) -> Ops:
    """Read an op set from a string.

    Args:
        spec: `"triton"`, `"eager"`, or a base with exceptions: `"triton,layer_norm=eager"`.

    Raises:
        ValueError: an unknown backend or op; the message lists the known ones.
    """
    backends: dict[str, Callable[[], Ops]] = {"eager": lambda: EAGER, "triton": _triton_ops}
    base, *exceptions = (part.strip() for part in spec.split(","))
    known = [f.name for f in fields(Ops)]
    if base not in backends:
        raise ValueError(f"ops: unknown backend {base!r}; expected one of {[*backends]}")
    chosen: dict[str, Callable[..., Any]] = {}
    for item in exceptions:
        op, _, backend = item.partition("=")
        if op not in known or backend not in backends:
            raise ValueError(f"ops: cannot read {item!r}; ops are {known}, backends {[*backends]}")
        chosen[op] = getattr(backends[backend](), op)
    return replace(backends[base](), **chosen)


def unfit(n_embd: int, n_head: int, dropout: float) -> dict[str, str]:
    """Ops whose kernels do not take a model of this shape, and what they want; needs no triton."""
    attention = []
    if (D := n_embd // n_head) not in HEAD_DIMS:
        attention.append(f"a head dim of {HEAD_DIMS}, got {D}")
    if dropout != 0:
        attention.append(f"dropout 0, got {dropout}")
    wanted = {"causal_attention": " and ".join(attention)}
    if n_embd % WIDTH:
        wanted["gelu_mlp"] = f"n_embd a multiple of {WIDTH}, got {n_embd}"
    return {op: what for op, what in wanted.items() if what}
