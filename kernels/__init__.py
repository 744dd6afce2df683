"""The op set a model is built from, in interchangeable backends.

`EAGER` needs torch alone. `TRITON` is made on first use, so importing this package needs neither
triton nor a GPU. "compiled" is each op of `EAGER` under torch.compile. Attention has two more
backends: the kernels among which PyTorch chooses by itself.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import reference

__all__ = ["EAGER", "TRITON", "Ops", "parse_ops", "read_ops", "spell_ops", "unfit"]

WIDTH = 64  # gelu_mlp's C must be a multiple of it; every GPT-2's is
HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class Ops:
    """One callable per op. Pass it to the model; never look it up from a global.

    Each backend has the signature of `reference.py`. Under autocast every op returns activations in
    the autocast dtype and keeps the residual stream and the loss in fp32, which is what plain
    PyTorch does for this model.
    """

    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    embedding: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gelu_mlp: Callable[..., Tensor]
    causal_attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]


OPS = tuple(f.name for f in fields(Ops))
EAGER = Ops(**{name: getattr(reference, name) for name in OPS})


@cache
def _triton_ops() -> Ops:
    files = {name: name for name in OPS} | {"add_layer_norm": "layer_norm"}
    modules = {name: import_module(f".{file}", __name__) for name, file in files.items()}
    return Ops(**{name: getattr(module, name) for name, module in modules.items()})


TRITON: Any  # an Ops, made when it is first asked for


def __getattr__(name: str) -> Any:
    if name == "TRITON":
        return _triton_ops()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _compiled(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The op under torch.compile, but eager if no gradient is recorded.

    Shapes change in evaluation and sampling, and each new one would be compiled.
    """
    graph = torch.compile(eager, fullgraph=True, dynamic=False)

    @wraps(eager)
    def op(*args: Any, **kwargs: Any) -> Any:
        return (graph if torch.is_grad_enabled() else eager)(*args, **kwargs)

    return op


def _by_sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention by one kernel, but by any where no gradient is recorded.

    Evaluation has shapes, and sampling a dtype, that this one may not take.
    """

    @wraps(reference.causal_attention)
    def causal_attention(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(backend) if torch.is_grad_enabled() else nullcontext():
            return reference.sdpa(*args, **kwargs)

    return causal_attention


BACKENDS: dict[str, Callable[[], Ops]] = {
    "eager": lambda: EAGER,
    "triton": _triton_ops,
    "compiled": cache(lambda: Ops(**{name: _compiled(getattr(EAGER, name)) for name in OPS})),
}
SDPA = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}


def read_ops(spec: str) -> dict[str, str]:
    """The backend that a string gives each op; imports none of them.

    Args:
        spec: A backend, or one with exceptions: `"triton,layer_norm=eager"`. Attention has two
            more backends, as in `"triton,causal_attention=sdpa-flash"`.

    Raises:
        ValueError: an unknown backend or op; the message lists the known ones.
    """
    base, *exceptions = (part.strip() for part in spec.split(","))
    if base not in BACKENDS:
        raise ValueError(f"ops: unknown backend {base!r}; the backends are {', '.join(BACKENDS)}")
    chosen = dict.fromkeys(OPS, base)
    for item in exceptions:
        op, _, backend = item.partition("=")
        known = [*BACKENDS, *(SDPA if op == "causal_attention" else ())]
        if op not in chosen or backend not in known:
            raise ValueError(
                f"ops: cannot read {item!r}; the ops are {', '.join(OPS)}, the backends "
                f"{', '.join(known)}"
            )
        chosen[op] = backend
    return chosen


def parse_ops(spec: str) -> Ops:
    """The ops that a string asks for, as `read_ops` reads it."""
    chosen: dict[str, Any] = {
        op: _by_sdpa(SDPA[backend]) if backend in SDPA else getattr(BACKENDS[backend](), op)
        for op, backend in read_ops(spec).items()
    }
    return Ops(**chosen)


def spell_ops(backends: dict[str, str]) -> str:
    """The shortest string that `read_ops` reads as these backends."""
    counts = [backend for backend in backends.values() if backend in BACKENDS]
    base = max(dict.fromkeys(counts), key=counts.count)
    return ",".join([base, *(f"{op}={b}" for op, b in backends.items() if b != base)])


def unfit(n_embd: int, n_head: int, dropout: float) -> dict[str, str]:
    """Ops whose kernels reject a model of this shape, and what they need; imports no triton."""
    attention = []
    if (D := n_embd // n_head) not in HEAD_DIMS:
        attention.append(f"a head dim of {' or '.join(map(str, HEAD_DIMS))}, got {D}")
    if dropout != 0:
        attention.append(f"dropout 0, got {dropout}")
    wanted = {"causal_attention": " and ".join(attention)}
    if n_embd % WIDTH:
        wanted["gelu_mlp"] = f"n_embd a multiple of {WIDTH}, got {n_embd}"
    return {op: what for op, what in wanted.items() if what}
