"""What is timed: shapes, inputs, and the minimum bytes and flops of each op.

Bytes count every argument and result once per direction, without saved statistics. Flops count the
matrix products, for attention only the causal half of T^2. `bench.ops` compares the measured time
with the minimum that these allow. Sizes are named as everywhere: M = B * T rows, C width, H heads,
V vocabulary, Vp the same padded to a multiple of 128.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Draw = Callable[..., Tensor]  # sizes, optionally scale and dtype -> a random leaf
PARTS = {"fwd": slice(1), "bwd": slice(1, 2), "both": slice(2)}  # of (forward, backward)
MODES = (*PARTS,)


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


# 65,536 tokens for throughput; 1,024, a micro-batch of the Shakespeare recipe; and one between.
GPU_SHAPES = (Shape(64, 1024), Shape(16, 64), Shape(8, 1024))
CPU_SHAPES = (Shape(4, 64),)  # small enough for a CPU


@dataclass(frozen=True)
class Case:
    """One op as the bench runs it."""

    draw: Callable[[Shape, Draw], Inputs]  # its keyword arguments
    # (shape, bytes per activation element) -> bytes of the forward and of the backward
    moved: Callable[[Shape, int], tuple[float, float]]
    multiplied: Callable[[Shape], tuple[float, float]] = lambda s: (0.0, 0.0)  # flops, likewise
    limit: str = "copy_gbs"  # the measured rate that bounds it
    modes: tuple[str, ...] = MODES  # the loss has no "bwd": its forward makes the gradients

    def bytes(self, shape: Shape, itemsize: int, mode: str) -> float:
        return sum(self.moved(shape, itemsize)[PARTS[mode]])

    def flops(self, shape: Shape, mode: str) -> float:
        return sum(self.multiplied(shape)[PARTS[mode]])

    def floor_ms(self, shape: Shape, itemsize: int, mode: str, limits: dict[str, float]) -> float:
        """The minimum time by the measured limits: the longer of those for bytes and flops."""
        bytes_ms = self.bytes(shape, itemsize, mode) / limits["copy_gbs"] / 1e6
        flops = self.flops(shape, mode)
        return max(bytes_ms, flops / limits[self.limit] / 1e9) if flops else bytes_ms


def _norm(s: Shape, draw: Draw, *stream: str) -> Inputs:
    """The residual stream, weight and bias stay fp32 under autocast."""
    wide = {name: draw(s.B, s.T, s.C, dtype=torch.float32) for name in stream}
    weight, bias = (draw(s.C, scale=0.1, dtype=torch.float32) for _ in range(2))
    weight.detach().add_(1)
    return {"x": draw(s.B, s.T, s.C), **wide, "weight": weight, "bias": bias}


def _ids(s: Shape, draw: Draw) -> Tensor:
    """Tokens; small ones are frequent, as in text."""
    drawn = draw(s.B, s.T, dtype=torch.float32).detach()
    return (drawn.abs() * s.V / 4).long().clamp_(max=s.V - 1)


def _tokens(s: Shape, draw: Draw) -> Inputs:
    """The tables have the activations' dtype, so that y has it without autocast."""
    ids, norm = _ids(s, draw), _norm(s, draw)
    norm.pop("x")
    tables = {"wte": draw(s.Vp, s.C, scale=0.02), "wpe": draw(s.T, s.C, scale=0.02)}
    return {"idx": ids, **tables, **norm}


def _mlp(s: Shape, draw: Draw) -> Inputs:
    C, F = s.C, 4 * s.C
    return {
        "x": draw(s.B, s.T, C),
        "w_fc": draw(F, C, scale=C**-0.5),
        "b_fc": draw(F, scale=0.1),
        "w_proj": draw(C, F, scale=F**-0.5),
        "b_proj": draw(C, scale=0.1),
    }


def _head(s: Shape, draw: Draw) -> Inputs:
    weight = draw(s.Vp, s.C, scale=0.02)
    weight.detach()[s.V :] = 0
    targets = _ids(s, draw)
    return {"x": draw(s.B, s.T, s.C), "weight": weight, "targets": targets, "vocab_size": s.V}


def _rows(s: Shape, fwd: float, bwd: float) -> tuple[float, float]:
    """Bytes or flops of forward and backward, from those per activation element."""
    return s.M * s.C * fwd, s.M * s.C * bwd


CASES: dict[str, Case] = {  # by name in `kernels.Ops`
    # x -> y; then x, dy -> dx
    "layer_norm": Case(_norm, lambda s, e: _rows(s, 2 * e, 3 * e)),
    # x, residual -> y, residual_out; then dy, dresidual_out, residual_out -> dx, dresidual.
    # fp32 throughout: dx and dresidual are one tensor.
    "add_layer_norm": Case(
        lambda s, draw: _norm(s, draw, "residual"),
        lambda s, e: _rows(s, 2 * e + 2 * 4, 16 if e == 4 else 2 * e + 3 * 4),
    ),
    # idx, rows of wte -> y, residual; then dy, dresidual, residual, dtied -> dwte.
    "embedding": Case(
        _tokens,
        lambda s, e: (
            8 * s.M + e * s.C * (2 * s.M + min(s.M, s.Vp) + s.T),
            8 * s.M + e * s.C * (3 * s.M + 2 * s.Vp + s.T),
        ),
    ),
    # Both weights and the hidden activation count: 4C wide, written and read, and once more for
    # what the backward of the GELU needs.
    "gelu_mlp": Case(
        _mlp,
        lambda s, e: (e * s.C * (14 * s.M + 8 * s.C), e * s.C * (19 * s.M + 16 * s.C)),
        lambda s: _rows(s, 16 * s.C, 32 * s.C),
        "matmul_k768_tflops",
    ),
    # qkv -> y; then qkv, y, dy -> dqkv. Two products of T x T x D per head, half of each masked;
    # five in the backward.
    "causal_attention": Case(
        lambda s, draw: {"qkv": draw(s.B, s.T, 3 * s.C), "n_head": s.H},
        lambda s, e: _rows(s, 4 * e, 8 * e),
        lambda s: _rows(s, 2 * s.T, 5 * s.T),
        "matmul_tflops",
    ),
    # x, weight -> loss; then dx, dweight. Logits do not count, as they need not exist.
    "linear_cross_entropy": Case(
        _head,
        lambda s, e: (e * s.C * (s.M + s.Vp), e * s.C * (s.M + s.Vp)),
        lambda s: _rows(s, 2 * s.Vp, 4 * s.Vp),
        "matmul_k768_tflops",
        modes=("fwd", "both"),
    ),
}


def make_inputs(
    case: Case, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Inputs:
    """Random keyword arguments of an op; not zeros, which run faster than data.

    Floating tensors require a gradient. `dtype` is that of activations and of the weights of matrix
    products, which the training step keeps as working copies.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        x = scale * torch.randn(*size, generator=generator, device=device)
        return x.to(dtype).requires_grad_()

    return case.draw(shape, draw)


def check_room(what: str, need: float, room: float) -> None:
    """Raise ValueError if memory of `need` bytes does not fit; a `room` of 0 is not known."""
    if need > room > 0:
        raise ValueError(
            f"bench: {what} needs about {need / 2**30:,.1f} GiB of memory, there are "
            f"{room / 2**30:,.1f}; take a smaller one"
        )
