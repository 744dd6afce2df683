"""What is timed: shapes, inputs, and the bytes and flops each op cannot do without.

Bytes count every tensor of the interface once per direction, saved statistics left out; flops
count the matrix products and, for attention, causal work alone (half of T^2). They are the floor
of an op, whatever way it is computed; `bench.ops` holds the time they allow against the measured
time. Sizes follow the rest of the project: M = B * T rows, C width, H heads, V vocabulary padded
to a multiple of 128.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
MODES = ("fwd", "bwd", "both")


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens through a model C wide with H heads and V (real) tokens."""

    B: int
    T: int
    C: int = 768
    H: int = 12
    V: int = 50257

    @property
    def M(self) -> int:
        return self.B * self.T

    @property
    def Vp(self) -> int:
        return -(-self.V // 128) * 128

    @property
    def label(self) -> str:
        width = "" if self.C == 768 else f" C={self.C}"
        return f"B={self.B} T={self.T}{width}"


# The throughput shape, 65,536 tokens; the seed recipe's micro-batch, 1,024; and one between.
GPU_SHAPES = (Shape(64, 1024), Shape(16, 64), Shape(8, 1024))
CPU_SHAPES = (Shape(4, 64),)  # what a CPU can time


@dataclass(frozen=True)
class Case:
    """One op as the bench runs it.

    Args:
        op: Name in `kernels.Ops`.
        bytes, flops: (shape, bytes per activation element, mode) -> the floor of one call.
        limit: Which measured matmul rate the flops are held against; where there are none, copies.
        logits: Columns of the fp32 matrix that plain PyTorch makes on the way, four times.
        sweep: Shapes for the plot of this op, small to large.
        modes: A subset of MODES. The loss has no "bwd": the gradients come with the forward.
    """

    op: str
    bytes: Callable[[Shape, int, str], float]
    sweep: tuple[Shape, ...]
    flops: Callable[[Shape, int, str], float] = lambda s, e, mode: 0.0
    limit: str = "copy_gbs"
    modes: tuple[str, ...] = MODES
    logits: Callable[[Shape], int] = lambda s: 0


def _split(mode: str, fwd: float, bwd: float) -> float:
    return {"fwd": fwd, "bwd": bwd, "both": fwd + bwd}[mode]


_TOKENS = tuple(Shape(B, 1024) for B in (1, 2, 4, 8, 16, 32, 64))
_LENGTHS = tuple(Shape(65536 // T, T) for T in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))

CASES: dict[str, Case] = {
    case.op: case
    for case in (
        Case(
            "layer_norm",
            # x -> y; then x, dy -> dx
            bytes=lambda s, e, mode: s.M * s.C * _split(mode, 2 * e, 3 * e),
            sweep=_TOKENS,
        ),
        Case(
            "add_layer_norm",
            # x, residual -> y, residual_out; then dy, dresidual_out, residual_out -> dx, dresidual.
            # fp32 throughout: dx and dresidual are one tensor.
            bytes=lambda s, e, mode: (
                s.M * s.C * _split(mode, 2 * e + 2 * 4, 16 if e == 4 else 2 * e + 3 * 4)
            ),
            sweep=_TOKENS,
        ),
        Case(
            "gelu_mlp",
            # Both weights and the hidden activation count: 4C wide, written and read, and once more
            # for what the backward of the GELU needs.
            bytes=lambda s, e, mode: (
                e * _split(
                    mode,
                    s.M * s.C * (2 + 12) + 8 * s.C**2,
                    s.M * s.C * (3 + 16) + 16 * s.C**2,
                )
            ),
            flops=lambda s, e, mode: 16 * s.M * s.C**2 * _split(mode, 1, 2),
            limit="matmul_k768_tflops",
            sweep=_TOKENS,
        ),
        Case(
            "causal_attention",
            # qkv -> y; then qkv, y, dy -> dqkv
            bytes=lambda s, e, mode: e * s.M * s.C * _split(mode, 4, 8),
            # Two products of T x T x D a head, half of it masked; five in the backward.
            flops=lambda s, e, mode: 2 * s.B * s.T * s.T * s.C * _split(mode, 1, 2.5),
            limit="matmul_tflops",
            sweep=_LENGTHS,
        ),
        Case(
            "linear_cross_entropy",
            # x, weight -> loss; then dx, dweight. Logits are nobody's floor: they need not exist.
            bytes=lambda s, e, mode: e * s.C * (s.M + s.Vp) * _split(mode, 1, 1),
            flops=lambda s, e, mode: 2 * s.M * s.C * s.Vp * _split(mode, 1, 2),
            limit="matmul_k768_tflops",
            sweep=_TOKENS,
            modes=("fwd", "both"),
            logits=lambda s: s.Vp,
        ),
    )
}  # fmt: skip


def find_case(op: str) -> Case:
    """The case of an op; ValueError names the known ones."""
    if op not in CASES:
        raise ValueError(f"bench: unknown op {op!r}; known: {', '.join(CASES)}")
    return CASES[op]


def find_shape(name: str) -> Shape:
    """The shape of `b<B>t<T>`, at GPT-2's width."""
    if found := re.fullmatch(r"b([1-9][0-9]{0,8})t([1-9][0-9]{0,8})", name):
        return Shape(int(found[1]), int(found[2]))
    raise ValueError(f"bench: a shape is b<B>t<T>, such as b64t1024, got {name!r}")


def make_inputs(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Inputs:
    """Fresh random keyword arguments of an op; never zeros, which run faster than data does.

    Floating tensors require a gradient; `dtype` is the activations' and, as the working copy is
    that the training step keeps, the weights' of matrix products.
    """
    generator = torch.Generator(device).manual_seed(seed)
    (B, T, C), F = (shape.B, shape.T, shape.C), 4 * shape.C

    def randn(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        x = scale * torch.randn(*size, generator=generator, device=device)
        return x.to(dtype).requires_grad_()

    def norm(*names: str) -> Inputs:  # of these the first is an activation, all else is fp32
        more = {name: randn(B, T, C, dtype=torch.float32) for name in names[1:]}
        weight, bias = (randn(C, scale=0.1, dtype=torch.float32) for _ in range(2))
        weight.detach().add_(1)
        return {names[0]: randn(B, T, C), **more, "weight": weight, "bias": bias}

    if case.op == "layer_norm":
        return norm("x")
    if case.op == "add_layer_norm":  # the residual stream stays fp32 under autocast
        return norm("x", "residual")
    if case.op == "gelu_mlp":
        return {
            "x": randn(B, T, C),
            "w_fc": randn(F, C, scale=C**-0.5), "b_fc": randn(F, scale=0.1),
            "w_proj": randn(C, F, scale=F**-0.5), "b_proj": randn(C, scale=0.1),
        }  # fmt: skip
    if case.op == "causal_attention":
        return {"qkv": randn(B, T, 3 * C), "n_head": shape.H}
    weight = randn(shape.Vp, C, scale=0.02)
    weight.detach()[shape.V :] = 0
    targets = (randn(B, T, dtype=torch.float32).detach().abs() * shape.V / 4).long()
    targets.clamp_(max=shape.V - 1)
    return {"x": randn(B, T, C), "weight": weight, "targets": targets, "vocab_size": shape.V}


def floor_ms(case: Case, shape: Shape, dtype: torch.dtype, mode: str, limits: dict[str, float]):
    """The time the measured limits allow: the longer of bytes over copy and flops over matmul."""
    bytes_ms = case.bytes(shape, dtype.itemsize, mode) / limits["copy_gbs"] / 1e6
    flops = case.flops(shape, dtype.itemsize, mode)
    if not flops:
        return bytes_ms
    return max(bytes_ms, flops / limits[case.limit] / 1e9)


def check_room(what: str, need: float, room: float) -> None:
    """Refuse what cannot fit; a `room` of 0 is not known.

    Raises:
        ValueError: with what is needed and what there is.
    """
    if need > room > 0:
        raise ValueError(
            f"bench: {what} needs about {need / 2**30:,.1f} GiB of memory, there are "
            f"{room / 2**30:,.1f}; take a smaller one"
        )


def smaller(shape: Shape, tokens: int) -> Shape:
    """A shape of the same width with at most `tokens` rows, for checks of numerics."""
    T = min(shape.T, tokens)
    return replace(shape, B=max(1, min(shape.B, tokens // T)), T=T)
