"""The op set a model is built from, in interchangeable backends.

`EAGER` needs torch alone. `TRITON` is resolved on first use, so importing this package needs
neither triton nor a GPU. The rest is PyTorch's: "compiled" has each op of `EAGER` by torch.compile,
and attention alone has two more, the kernels that PyTorch would choose from by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference

__all__ = ["EAGER", "TRITON", "Ops", "parse_ops", "read_ops", "spell_ops", "unfit"]

WIDTH = 64  # what gelu_mlp's C must be a multiple of, as that of every GPT-2 is
HEAD_DIMS = (16, 32, 64, 128)


class LayerNorm(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor: ...


class AddLayerNorm(Protocol):
    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
    ) -> tuple[Tensor, Tensor]: ...


class Embedding(Protocol):
    def __call__(
        self,
        idx: Tensor,
        wte: Tensor,
        wpe: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float = 1e-5,
        residual_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


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
    embedding: Embedding
    gelu_mlp: GeluMLP
    causal_attention: CausalAttention
    linear_cross_entropy: LinearCrossEntropy


EAGER = Ops(
    layer_norm=reference.layer_norm,
    add_layer_norm=reference.add_layer_norm,
    embedding=reference.embedding,
    gelu_mlp=reference.gelu_mlp,
    causal_attention=reference.causal_attention,
    linear_cross_entropy=reference.linear_cross_entropy,
)


@cache
def _triton_ops() -> Ops:
    # Modules, not functions: `kernels.layer_norm` must stay the module.
    from . import causal_attention, embedding, gelu_mlp, layer_norm, linear_cross_entropy

    return Ops(
        layer_norm=layer_norm.layer_norm,
        add_layer_norm=layer_norm.add_layer_norm,
        embedding=embedding.embedding,
        gelu_mlp=gelu_mlp.gelu_mlp,
        causal_attention=causal_attention.causal_attention,
        linear_cross_entropy=linear_cross_entropy.linear_cross_entropy,
    )


TRITON: Any  # an Ops, made when it is first asked for


def __getattr__(name: str) -> Any:
    if name == "TRITON":
        return _triton_ops()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The op by torch.compile; eager where no gradient is recorded, as in evaluation and sampling.

    There the shapes change, and each would be compiled anew.
    """
    graph = torch.compile(eager, fullgraph=True, dynamic=False)

    @wraps(eager)
    def op(*args: Any, **kwargs: Any) -> Any:
        return (graph if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return op


def _by_sdpa(backend: SDPBackend) -> CausalAttention:
    @wraps(reference.causal_attention)
    def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        with sdpa_kernel(backend):
            return reference.causal_attention(qkv, n_head, dropout_p)

    return causal_attention


OPS = tuple(f.name for f in fields(Ops))
BACKENDS: dict[str, Callable[[], Ops]] = {
    "eager": lambda: EAGER,
    "triton": _triton_ops,
    "compiled": cache(lambda: Ops(**{name: _compiled(getattr(EAGER, name)) for name in OPS})),
}
SDPA = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def read_ops(spec: str) -> dict[str, str]:
    """The backend of each op in a string; nothing of them is imported.

    Args:
        spec: A backend, or one with exceptions: `"triton,layer_norm=eager"`. Attention has those
            of SDPA too: `"triton,causal_attention=sdpa-flash"`.

    Raises:
        ValueError: an unknown backend or op; the message lists the known ones.
    """
    base, *exceptions = (part.strip() for part in spec.split(","))
    if base not in BACKENDS:
        raise ValueError(f"ops: unknown backend {base!r}; expected one of {[*BACKENDS]}")
    chosen = dict.fromkeys(OPS, base)
    for item in exceptions:
        op, _, backend = item.partition("=")
        known = [*BACKENDS, *(SDPA if op == "causal_attention" else ())]
        if op not in chosen or backend not in known:
            raise ValueError(f"ops: cannot read {item!r}; ops are {[*OPS]}, backends {known}")
        chosen[op] = backend
    return chosen


def parse_ops(spec: str) -> Ops:
    """The op set that `read_ops` reads, and raises as it does."""
    chosen: dict[str, Any] = {
        op: _by_sdpa(SDPA[backend]) if backend in SDPA else getattr(BACKENDS[backend](), op)
        for op, backend in read_ops(spec).items()
    }
    return Ops(**chosen)


def spell_ops(backends: dict[str, str]) -> str:
    """The shortest string that `read_ops` reads as these."""
    counts = [backend for backend in backends.values() if backend in BACKENDS]
    base = max(dict.fromkeys(counts), key=counts.count)
    return ",".join([base, *(f"{op}={b}" for op, b in backends.items() if b != base)])


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
