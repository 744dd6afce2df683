"""How a launch function becomes a torch op, and what ops refuse. Only this uses torch.library.

Every op is opaque: `define` + `impl` per device + `register_fake`, with autograd in a thin
`torch.autograd.Function` beside the launch. `triton_op` would expose the kernel to the compiler,
from which an already fused op gains nothing. With it host TMA descriptors vanish from the captured
graph without an error, loops of launches are unrolled into it, and nothing traces under the
interpreter. `register_autograd` costs more per call and hides what is saved.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ._launch import arch

P = ParamSpec("P")
R = TypeVar("R")

_LIB = torch.library.Library("fgpt", "DEF")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
# Inductor may pad or permute the inputs of an op without this tag; the kernels here compute
# addresses from shapes and would misread them.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
LAUNCHES: dict[str, Callable[..., Any]] = {}  # by name; bench.builds records what they launch
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MIN_ARCH = 80  # Ampere: bf16 and cp.async; nothing is built for or tested on older chips


def register(
    *, fake: Callable[P, R], writes: Sequence[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Define an op with the name and types of the decorated launch.

    Args:
        fake: Returns the shapes and dtypes of the results when the op is traced.
        writes: Arguments that the launch writes to.
    """

    def decorate(launch: Callable[P, R]) -> Callable[P, R]:
        name = launch.__name__
        LAUNCHES[name] = launch
        _LIB.define(name + torch.library.infer_schema(launch, mutates_args=writes), tags=_TAGS)
        for device in _DEVICES:
            _LIB.impl(name, launch, device)
        torch.library.register_fake(f"fgpt::{name}", fake, lib=_LIB)
        overload: Any = getattr(torch.ops.fgpt, name).default
        return overload

    return decorate


@torch.compiler.assume_constant_result
def _arch(device: torch.device) -> int:
    """`arch` for traced code: the answer is a constant of the graph."""
    return arch(device)


def check_device(op: str, x: Tensor) -> None:
    """Refuse a tensor that the kernels cannot run on. Each public function calls it first.

    Raises:
        ValueError: `x` is not on CUDA (or on the CPU under TRITON_INTERPRET=1), not on the current
            device, or its GPU is older than sm_80.
    """
    if x.device.type == "cpu" and INTERPRETED:
        return
    if x.device.type != "cuda":
        raise ValueError(
            f"{op}: triton needs a CUDA tensor, got one on {x.device}; use the eager backend, or "
            "set TRITON_INTERPRET=1 before starting Python to run the kernels on the CPU, slowly"
        )
    if _arch(x.device) < MIN_ARCH:
        raise ValueError(
            f"{op}: triton needs sm_{MIN_ARCH} or newer, got sm_{_arch(x.device)}; "
            "use the eager backend"
        )
    # Triton launches on the current device. A compiled graph sets it by itself.
    if not torch.compiler.is_compiling() and x.device.index != torch.cuda.current_device():
        raise ValueError(
            f"{op}: x must be on the current device cuda:{torch.cuda.current_device()}, got "
            f"{x.device}; call torch.cuda.set_device first"
        )


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Refuse a tensor that a kernel, which computes addresses from shapes, would misread.

    Raises:
        ValueError: another shape, dtype or device, or strides with gaps; all are named.
    """
    at, dense = tensor.device, tensor.layout == torch.strided
    if (*tensor.shape,) != (*shape,) or tensor.dtype not in dtypes or at != device:
        names = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{op}: {name} must be {(*shape,)}, {' or '.join(dict.fromkeys(names))}, on {device}; "
            f"got {(*tensor.shape,)}, {tensor.dtype}, on {at}"
        )
    if not dense or not tensor.is_contiguous():
        got = f"strides {tensor.stride()}" if dense else tensor.layout
        raise ValueError(
            f"{op}: {name} must be contiguous, got {got} for shape {(*shape,)}; "
            f"call .{'contiguous' if dense else 'to_dense'}() first"
        )


def needs_grad(*tensors: Tensor) -> bool:
    """Whether a backward may follow. Ask in the public function.

    Inside `Function.forward` grad mode is always off, and `ctx.needs_input_grad` stays True under
    `torch.no_grad`.
    """
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def refuse_double_backward(op: str) -> None:
    """First line of every backward.

    Autograd cannot see into an opaque op: `create_graph=True` would give silently wrong second
    derivatives, `once_differentiable` or not.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: double backward is not supported; use the eager backend")
