"""GPT-2's MLP: linear, tanh GELU, linear. Two fused Triton GEMMs; the plain GEMMs are cuBLAS.

Forward, with F = 4C:

    h = x @ w_fc^T + b_fc          g = gelu(h) = h * s,  s = sigmoid(2u)
    y = g @ w_proj^T + b_proj      u = sqrt(2 / pi) * (h + 0.044715 * h^3)

0.5 * (1 + tanh(u)) is sigmoid(2u), so tanh costs one exponential and one division. Backward:

    gelu'(h) = s + h * s * (1 - s) * 2u'         2u' = sqrt(8 / pi) * (1 + 3 * 0.044715 * h^2)
    dh = (dy @ w_proj) * gelu'(h)
    db_fc = sum_rows(dh)     dw_fc = dh^T @ x     dx = dh @ w_fc
    db_proj = sum_rows(dy)   dw_proj = dy^T @ g

Fused here: h with bias and GELU, and dh with the column sums that become db_fc. `h` is never
stored. The forward keeps g, which dw_proj needs anyway, and d = gelu'(h), so that the backward
epilogue is one load and one multiply. Keeping g and h is as many bytes (2 * M * F elements) and
recomputes gelu' there. Error of dh in bf16 (rms against fp64, 4M draws of h, dg ~ N(0, 1)): from
stored d 1.7e-3, from stored h 1.2e-3, eager 1.6e-3. So d is chosen for the shorter epilogue, at
eager's accuracy; which one is faster on a GPU has not been measured. Storing h alone would halve
what a layer keeps (402 MB for 805 MB at M = 65536, C = 768, bf16) and make the backward write g
again: 402 MB more traffic.

Bound by the tensor cores from M of a few thousand on. Per call at M = 65536, C = 768, bf16:

    up   (x, w_fc -> g, d)        309 GFLOP    911 MB (508 MB without d, under no_grad)
    down (dy, w_proj, d -> dh)    309 GFLOP    911 MB, and 6 MB of fp32 partials

Each operand tile is read once per tile of the other operand, mostly from L2: tiles go GROUP_M
rows of tiles at a time, which keeps the weight and the rows in use there. Accumulation is fp32;
db_fc goes through one fp32 partial row per row of tiles and a fixed-order sum, so reruns are
bitwise equal. `sum_rows(dy)` is torch's.

Source: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415 (the tanh form of GELU).
"""

from collections.abc import Iterator
from itertools import product
from math import log2, pi
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._aot import AotCase, aot_case
from ._gemm import dot_tile, halves, tile_at
from ._jit import jit
from ._launch import (
    Key,
    Launch,
    arch,
    cdiv,
    launch_for,
    math_of,
    num_sms,
    precision_of,
)
from ._op import autocast_dtype, check_device, needs_grad, refuse_double_backward, register

_E = 2.718281828459045
# exp(-2u) = 2^(h * (EXP_H + EXP_H3 * h^2)) and 2u' = DU_0 + DU_2 * h^2.
EXP_H = tl.constexpr(-((8 / pi) ** 0.5) * log2(_E))
EXP_H3 = tl.constexpr(-((8 / pi) ** 0.5) * log2(_E) * 0.044715)
DU_0 = tl.constexpr((8 / pi) ** 0.5)
DU_2 = tl.constexpr((8 / pi) ** 0.5 * 3 * 0.044715)
# Below h = -9.4, where gelu and gelu' are under 1e-32: keeps exp(-2u) finite, so that
# 1 - s = exp(-2u) * s has no inf * 0.
EXP_MAX = tl.constexpr(115.0)


@jit
def _gelu(h):
    """gelu(h) and gelu'(h), fp32."""
    h2 = h * h
    e = tl.exp2(tl.minimum(h * (EXP_H + EXP_H3 * h2), EXP_MAX))
    s = 1.0 / (1.0 + e)
    g = h * s
    return g, s + g * (e * s) * (DU_0 + DU_2 * h2)


@jit
def _up_half(
    h,  # (BLOCK_M, HALF_N) before the bias
    b_ptr,
    g_ptr,
    d_ptr,
    at,  # int64, first element of the half in (M, N)
    num_rows,
    num_cols,
    N,
    BLOCK_M: tl.constexpr,
    HALF_N: tl.constexpr,
    SAVE_D: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, HALF_N)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    offs = rows[:, None] * N + cols[None, :]
    bias = tl.load(b_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)
    g, d = _gelu(h + bias[None, :])
    tl.store(g_ptr + at + offs, g.to(g_ptr.dtype.element_ty), mask=mask)
    if SAVE_D:
        tl.store(d_ptr + at + offs, d.to(d_ptr.dtype.element_ty), mask=mask)


@jit
def _gelu_mlp_up_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    b_ptr,  # (N,) x's dtype or fp32
    g_ptr,  # (M, N) out
    d_ptr,  # (M, N) out
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides N and BLOCK_K divides K
    SAVE_D: tl.constexpr,
):
    HALF_N: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row = (pid_m * BLOCK_M).to(tl.int64)  # M * N may pass 2^31
        col = (pid_n * BLOCK_N).to(tl.int64)
        num_rows = M - pid_m * BLOCK_M
        num_cols = N - pid_n * BLOCK_N
        acc = dot_tile(
            x_ptr + row * K, w_ptr + col * K, num_rows, num_cols, K, 1, K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN, "none" if EVEN else "masked", PRECISION,
        )  # fmt: skip
        # Half a tile at a time: g and d of a whole one do not fit in registers next to h.
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        at = row * N + col
        _up_half(left, b_ptr + col, g_ptr, d_ptr, at,
                 num_rows, num_cols, N, BLOCK_M, HALF_N, SAVE_D)  # fmt: skip
        _up_half(right, b_ptr + col + HALF_N, g_ptr, d_ptr, at + HALF_N,
                 num_rows, num_cols - HALF_N, N, BLOCK_M, HALF_N, SAVE_D)  # fmt: skip


@jit
def _down_half(
    dg,  # (BLOCK_M, HALF_N)
    d_ptr,
    dh_ptr,
    sums_ptr,  # first column of the half in the tile's row of partials
    at,  # int64, first element of the half in (M, N)
    num_rows,
    num_cols,
    N,
    BLOCK_M: tl.constexpr,
    HALF_N: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, HALF_N)
    mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
    offs = rows[:, None] * N + cols[None, :]
    dh = dg * tl.load(d_ptr + at + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dh_ptr + at + offs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    # d is 0 past M, but the repeated row times 0 would be NaN for an infinite dy.
    sums = tl.sum(tl.where(rows[:, None] < num_rows, dh, 0.0), axis=0)
    tl.store(sums_ptr + cols, sums, mask=cols < num_cols)


@jit
def _gelu_mlp_down_kernel(
    dy_ptr,  # (M, K)
    w_ptr,  # (K, N)
    d_ptr,  # (M, N)
    dh_ptr,  # (M, N) out
    sums_ptr,  # (ceil(M / BLOCK_M), N) out, fp32: column sums of dh over each row of tiles
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides N and BLOCK_K divides K
):
    HALF_N: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row = (pid_m * BLOCK_M).to(tl.int64)  # M * N may pass 2^31
        col = (pid_n * BLOCK_N).to(tl.int64)
        num_rows = M - pid_m * BLOCK_M
        num_cols = N - pid_n * BLOCK_N
        acc = dot_tile(
            dy_ptr + row * K, w_ptr + col, num_rows, num_cols, K, N, 1,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN, "none" if EVEN else "masked", PRECISION,
        )  # fmt: skip
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        at = row * N + col
        sums_at = sums_ptr + pid_m.to(tl.int64) * N + col
        _down_half(left, d_ptr, dh_ptr, sums_at, at,
                   num_rows, num_cols, N, BLOCK_M, HALF_N)  # fmt: skip
        _down_half(right, d_ptr, dh_ptr, sums_at + HALF_N, at + HALF_N,
                   num_rows, num_cols - HALF_N, N, BLOCK_M, HALF_N)  # fmt: skip


LARGE_M = 4096  # from here on the 128-row tiles of a width of 768 fill the GPU more than once


def launch_key(kernel: str, M: int, C: int, math: str, arch: int) -> Key:
    """The key of "up" or "down" on M rows."""
    size = "large" if M >= LARGE_M else "small"
    width = "ragged" if C % 16 else f"even {size} {'masked' if C % 64 else 'whole'}"
    return Key(f"gelu_mlp.{kernel}", math, width, arch)


def _constexprs(launch: Launch, math: str, C: int) -> dict[str, Any]:
    blocks = dict(launch.blocks)
    even = 4 * C % blocks["BLOCK_N"] == 0 and C % blocks["BLOCK_K"] == 0
    return {"PRECISION": precision_of(math), "EVEN": even}


def _prepare(kernel: str, x: Tensor, M: int, C: int) -> tuple[int, int, dict[str, Any]]:
    """Programs, rows per tile and keyword arguments of a launch."""
    math = math_of(x.dtype)
    launch = launch_for(launch_key(kernel, M, C, math, arch(x.device)))
    kwargs = {**launch.kwargs(), **_constexprs(launch, math, C)}
    tiles = cdiv(M, kwargs["BLOCK_M"]) * cdiv(4 * C, kwargs["BLOCK_N"])
    return min(tiles, launch.programs_per_sm * num_sms(x.device)), kwargs["BLOCK_M"], kwargs


def _up_fake(x: Tensor, w_fc: Tensor, b_fc: Tensor, save_d: bool) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], w_fc.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_d else (0,))


@register("gelu_mlp_up(Tensor x, Tensor w_fc, Tensor b_fc, bool save_d) -> (Tensor, Tensor)",
          fake=_up_fake)  # fmt: skip
def gelu_mlp_up(x: Tensor, w_fc: Tensor, b_fc: Tensor, save_d: bool) -> tuple[Tensor, Tensor]:
    """x (M, C), w_fc (4C, C), b_fc (4C,) -> g (M, 4C) and d (M, 4C), (0,) unless save_d."""
    M, C = x.shape
    g, d = _up_fake(x, w_fc, b_fc, save_d)
    if M > 0:
        programs, _, kwargs = _prepare("up", x, M, C)
        _gelu_mlp_up_kernel[(programs,)](
            x, w_fc, b_fc, g, d, M, 4 * C, C, SAVE_D=save_d, **kwargs
        )  # fmt: skip
    return g, d


def _down_fake(dy: Tensor, w_proj: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(d), d.new_empty(d.shape[1], dtype=torch.float32)


@register("gelu_mlp_down(Tensor dy, Tensor w_proj, Tensor d) -> (Tensor, Tensor)", fake=_down_fake)
def gelu_mlp_down(dy: Tensor, w_proj: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """dy (M, C), w_proj (C, 4C), d (M, 4C) -> dh (M, 4C), db_fc (4C,) fp32."""
    M, C = dy.shape
    dh = torch.empty_like(d)
    if M == 0:
        return dh, d.new_zeros(4 * C, dtype=torch.float32)
    programs, block_m, kwargs = _prepare("down", dy, M, C)
    sums = d.new_empty((cdiv(M, block_m), 4 * C), dtype=torch.float32)
    _gelu_mlp_down_kernel[(programs,)](dy, w_proj, d, dh, sums, M, 4 * C, C, **kwargs)
    return dh, sums.sum(dim=0)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor,
        save_d: bool, save_g: bool,
    ) -> Tensor:  # fmt: skip
        g, d = gelu_mlp_up(x, w_fc, b_fc, save_d)
        ctx.save_for_backward(
            x if save_d else None, w_fc, w_proj, g if save_g else None, d if save_d else None
        )
        ctx.bias_dtypes = b_fc.dtype, b_proj.dtype
        return torch.addmm(b_proj.to(x.dtype), g, w_proj.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_double_backward("gelu_mlp")
        x, w_fc, w_proj, g, d = ctx.saved_tensors
        b_fc_dtype, b_proj_dtype = ctx.bias_dtypes
        needs_dx, needs_dw_fc, needs_db_fc, needs_dw_proj, needs_db_proj, *_ = ctx.needs_input_grad
        dy = dy.contiguous()  # out.sum().backward() gives zero strides
        dx = dw_fc = db_fc = dw_proj = db_proj = None
        if needs_dx or needs_dw_fc or needs_db_fc:
            dh, sums = gelu_mlp_down(dy, w_proj, d)
            dx = dh @ w_fc if needs_dx else None
            dw_fc = dh.t() @ x if needs_dw_fc else None
            db_fc = sums.to(b_fc_dtype) if needs_db_fc else None
        if needs_dw_proj:
            dw_proj = dy.t() @ g
        if needs_db_proj:
            db_proj = dy.sum(dim=0, dtype=torch.float32).to(b_proj_dtype)
        return dx, dw_fc, db_fc, dw_proj, db_proj, None, None


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """Widen the last axis of `x` to 4C, apply tanh GELU, project back to C.

    Under autocast `x`, `w_fc` and `w_proj` are cast to the autocast dtype; the biases stay as they
    are. fp32 products are TF32 where `torch.set_float32_matmul_precision` allows it, else exact.

    Args:
        x: (..., C), contiguous, fp32 / bf16 / fp16. C a multiple of 16 is fast.
        w_fc: (4C, C), contiguous, dtype of `x` (after autocast). b_fc: (4C,), that dtype or fp32.
        w_proj: (C, 4C), contiguous, dtype of `x` (after autocast). b_proj: (C,), as `b_fc`.

    Returns:
        (..., C), dtype of `x` (after autocast). Bias gradients accumulate in fp32.

    Raises:
        ValueError: a shape, dtype, device or layout other than the above.
        RuntimeError: in the backward, when asked for second derivatives.
    """
    check_device("gelu_mlp", x)
    C = x.shape[-1]
    args = {"x": x, "w_fc": w_fc, "b_fc": b_fc, "w_proj": w_proj, "b_proj": b_proj}
    wanted = {"w_fc": (4 * C, C), "b_fc": (4 * C,), "w_proj": (C, 4 * C), "b_proj": (C,)}
    for name, shape in wanted.items():
        if args[name].shape != shape:
            raise ValueError(
                f"gelu_mlp: {name} must be {shape} to match x {tuple(x.shape)}, "
                f"got {tuple(args[name].shape)}"
            )
    for name, t in args.items():
        if not t.is_contiguous():
            raise ValueError(
                f"gelu_mlp: {name} must be contiguous, got strides {t.stride()} for shape "
                f"{tuple(t.shape)}; call .contiguous() first"
            )
        if t.device != x.device:
            raise ValueError(f"gelu_mlp: {name} must be on {x.device} like x, got {t.device}")
    dtype = autocast_dtype(x)
    if dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        x, w_fc, w_proj = x.to(dtype), w_fc.to(dtype), w_proj.to(dtype)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"gelu_mlp: x must be float32, bfloat16 or float16, got {x.dtype}")
    for name, t in (("w_fc", w_fc), ("w_proj", w_proj)):
        if t.dtype != x.dtype:
            raise ValueError(
                f"gelu_mlp: {name} must be {x.dtype} like x, got {t.dtype}; cast it or use autocast"
            )
    for name, t in (("b_fc", b_fc), ("b_proj", b_proj)):
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"gelu_mlp: {name} must be {x.dtype} or torch.float32, got {t.dtype}")
    save_d = needs_grad(x, w_fc, b_fc)
    rows = x.reshape(-1, C)
    y = _GeluMLP.apply(rows, w_fc, b_fc, w_proj, b_proj, save_d, needs_grad(w_proj))
    return y.view_as(x)


def aot_cases(arch: int) -> Iterator[AotCase]:
    """Every build a launch can choose on `arch`: GPT-2, masks in N and K, no alignment."""
    for (math, dtype, how), (C, width), (name, kernel) in product(
        (("16-bit", "bf16", "bf16"), ("tf32", "fp32", "tf32"), ("ieee", "fp32", "ieee")),
        ((768, "C=768"), (80, "C=80 masked"), (50, "C=50 unaligned")),
        (("up", _gelu_mlp_up_kernel), ("down", _gelu_mlp_down_kernel)),
    ):
        small, large = (launch_for(launch_key(name, M, C, math, arch)) for M in (1, LARGE_M))
        for launch, size in {small: "small", large: "large"}.items():  # one build if they are one
            yield aot_case(
                "gelu_mlp", kernel, f"{name} {width} {how} {size}", launch, dtype,
                {**_constexprs(launch, math, C), "SAVE_D": True},
                mma="" if math == "ieee" else "BLOCK_M",
                unaligned=kernel.arg_names if C % 16 else ("M",),
            )  # fmt: skip
