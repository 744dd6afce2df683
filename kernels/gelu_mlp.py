"""GPT-2's MLP: linear, tanh GELU, linear. Two fused Triton GEMMs; the plain GEMMs are cuBLAS.

Forward, with F = 4C:

    h = x @ w_fc^T + b_fc          g = gelu(h) = h * s,  s = sigmoid(2u)
    y = g @ w_proj^T + b_proj      u = sqrt(2 / pi) * (h + 0.044715 * h^3)

0.5 * (1 + tanh(u)) is sigmoid(2u), so tanh costs one exponential and one reciprocal root. Backward:

    gelu'(h) = s + h * s * (1 - s) * 2u'         2u' = sqrt(8 / pi) * (1 + 3 * 0.044715 * h^2)
    dh = (dy @ w_proj) * gelu'(h)
    db_fc = sum_rows(dh)     dw_fc = dh^T @ x     dx = dh @ w_fc
    db_proj = sum_rows(dy)   dw_proj = dy^T @ g

Fused here: h with bias and GELU, and dh with the column sums that become db_fc. `h` is never
stored. The forward keeps g, which dw_proj needs anyway, and d = gelu'(h), together 2 * M * F
elements (805 MB at M = 65536, C = 768, bf16). So the backward's epilogue is one load and one
multiply, at eager's accuracy: the rms error of dh in bf16 is 1.7e-3, eager's 1.6e-3 (4M draws of h,
dg ~ N(0, 1)). With h alone kept, it would have to write g again.

Bound by the tensor cores from M of a few thousand on. Per call at M = 65536, C = 768, bf16:

    up   (x, w_fc -> g, d)        309 GFLOP    911 MB (508 MB without d, under no_grad)
    down (dy, w_proj, d -> dh)    309 GFLOP    911 MB, and 6 MB of fp32 partials

Each operand tile is read once per tile of the other operand, mostly from L2: programs walk GROUP_M
rows of tiles column by column, which keeps the weight and these rows there. Sums are fp32. db_fc is
summed in a fixed order from one partial row per row of tiles, so reruns are bitwise equal.
`sum_rows(dy)` is torch's.

Source: Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415 (the tanh form of GELU).
"""

from math import e, log2, pi
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import WIDTH
from ._jit import jit
from ._launch import Key, arch, cdiv, launch_for, math_of, num_sms, precision_of
from ._op import check_device, check_tensor, needs_grad, refuse_double_backward, register
from .reference import autocast_dtype

# exp(-2u) = 2^(h * (EXP_H + EXP_H3 * h^2)) and 2u' = DU_0 + DU_2 * h^2.
EXP_H = tl.constexpr(-((8 / pi) ** 0.5) * log2(e))
EXP_H3 = tl.constexpr(-((8 / pi) ** 0.5) * log2(e) * 0.044715)
DU_0 = tl.constexpr((8 / pi) ** 0.5)
DU_2 = tl.constexpr((8 / pi) ** 0.5 * 3 * 0.044715)
# Applies below h = -9.4, where gelu and gelu' are under 1e-32. It keeps exp(-2u) finite, so that
# 1 - s = exp(-2u) * s has no inf * 0.
EXP_MAX = tl.constexpr(115.0)
# Columns of a tile stored at a time: all of g and d would not fit in registers beside h.
PART_N = tl.constexpr(64)


@jit
def _tile_at(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Position of a tile if GROUP_M rows of tiles are walked column by column."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % in_group % rows, tile % in_group // rows


@jit
def _halves(t, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(BLOCK_M, BLOCK_N) -> its left and its right half."""
    return tl.split(tl.permute(tl.reshape(t, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@jit
def _dot_tile(
    a_ptr,  # first element of BLOCK_M rows of (M, K)
    b_ptr,  # first element of the tile's BLOCK_N columns of B
    num_rows,  # rows of a inside M
    K,
    b_row,  # elements between rows of B
    b_col,  # elements between columns of B
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """fp32 (BLOCK_M, BLOCK_N): a @ b over all of K; rows past M repeat the last one."""
    ks = tl.arange(0, BLOCK_K)
    rows = tl.minimum(tl.arange(0, BLOCK_M), num_rows - 1)  # so that the loop needs no mask
    a_at = rows[:, None] * K + ks[None, :]
    b_at = ks[:, None] * b_row + tl.arange(0, BLOCK_N)[None, :] * b_col
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Without disable_licm, triton 3.6 serialises the WGMMA of this loop on sm_90 (ptxas C7515).
    for _ in tl.range(0, K, BLOCK_K, disable_licm=True):
        a, b = tl.load(a_ptr + a_at), tl.load(b_ptr + b_at)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * b_row
    return acc


@jit
def _gelu(h):
    """gelu(h) and gelu'(h), fp32."""
    h2 = h * h
    e = tl.exp2(tl.minimum(h * (EXP_H + EXP_H3 * h2), EXP_MAX))
    root = tl.rsqrt(1.0 + e)  # squared it is s; a division would scale its operands first
    s = root * root
    g = h * s
    return g, s + g * (e * s) * (DU_0 + DU_2 * h2)


@jit
def _store_up(h, b_ptr, g_ptr, d_ptr, num_rows, N, SAVE_D: tl.constexpr):
    """g and d of a tile of h before the bias; the pointers are at its first row and column."""
    BLOCK_M: tl.constexpr = h.shape[0]
    BLOCK_N: tl.constexpr = h.shape[1]
    if BLOCK_N > PART_N:
        HALF_N: tl.constexpr = BLOCK_N // 2
        left, right = _halves(h, BLOCK_M, BLOCK_N)
        _store_up(left, b_ptr, g_ptr, d_ptr, num_rows, N, SAVE_D)
        _store_up(right, b_ptr + HALF_N, g_ptr + HALF_N, d_ptr + HALF_N, num_rows, N, SAVE_D)
    else:
        rows = tl.arange(0, BLOCK_M)[:, None]
        cols = tl.arange(0, BLOCK_N)
        offs = rows * N + cols[None, :]
        g, d = _gelu(h + tl.load(b_ptr + cols).to(tl.float32)[None, :])
        tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask=rows < num_rows)
        if SAVE_D:
            tl.store(d_ptr + offs, d.to(d_ptr.dtype.element_ty), mask=rows < num_rows)


@jit
def _store_down(dg, d_ptr, dh_ptr, sums_ptr, num_rows, N):
    """dh and its column sums of a tile of dg; the pointers are at its first row and column."""
    BLOCK_M: tl.constexpr = dg.shape[0]
    BLOCK_N: tl.constexpr = dg.shape[1]
    if BLOCK_N > PART_N:
        HALF_N: tl.constexpr = BLOCK_N // 2
        left, right = _halves(dg, BLOCK_M, BLOCK_N)
        _store_down(left, d_ptr, dh_ptr, sums_ptr, num_rows, N)
        _store_down(right, d_ptr + HALF_N, dh_ptr + HALF_N, sums_ptr + HALF_N, num_rows, N)
    else:
        rows = tl.arange(0, BLOCK_M)[:, None]
        cols = tl.arange(0, BLOCK_N)
        offs = rows * N + cols[None, :]
        # d is 0 past M, and so is what those rows add to the sums: unless the last dy is infinite.
        dh = dg * tl.load(d_ptr + offs, mask=rows < num_rows, other=0.0).to(tl.float32)
        tl.store(dh_ptr + offs, dh.to(dh_ptr.dtype.element_ty), mask=rows < num_rows)
        tl.store(sums_ptr + cols, tl.sum(dh, axis=0))


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
    SAVE_D: tl.constexpr,
):
    # K is a multiple of 64 and N of 256: no tile of such powers of two ends past them.
    tl.static_assert(BLOCK_K <= 64 and BLOCK_N <= 256)
    tiles_m, tiles_n, programs = tl.cdiv(M, BLOCK_M), N // BLOCK_N, tl.num_programs(0)
    # disable_licm: offsets of the stores, kept through the loop over K, would be spilled.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, disable_licm=True):
        pid_m, pid_n = _tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row = (pid_m * BLOCK_M).to(tl.int64)  # M * N may pass 2^31
        col = (pid_n * BLOCK_N).to(tl.int64)
        num_rows = M - pid_m * BLOCK_M
        x_at, w_at = x_ptr + row * K, w_ptr + col * K
        h = _dot_tile(x_at, w_at, num_rows, K, 1, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        at = row * N + col
        _store_up(h, b_ptr + col, g_ptr + at, d_ptr + at, num_rows, N, SAVE_D)


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
):
    # K is a multiple of 64 and N of 256: no tile of such powers of two ends past them.
    tl.static_assert(BLOCK_K <= 64 and BLOCK_N <= 256)
    tiles_m, tiles_n, programs = tl.cdiv(M, BLOCK_M), N // BLOCK_N, tl.num_programs(0)
    # disable_licm: offsets of the stores, kept through the loop over K, would be spilled.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, programs, disable_licm=True):
        pid_m, pid_n = _tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row = (pid_m * BLOCK_M).to(tl.int64)  # M * N may pass 2^31
        col = (pid_n * BLOCK_N).to(tl.int64)
        num_rows = M - pid_m * BLOCK_M
        dy_at, w_at = dy_ptr + row * K, w_ptr + col
        dg = _dot_tile(dy_at, w_at, num_rows, K, N, 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        at, sums_at = row * N + col, sums_ptr + pid_m.to(tl.int64) * N + col
        _store_down(dg, d_ptr + at, dh_ptr + at, sums_at, num_rows, N)


LARGE_M = 4096  # from here on the 128-row tiles of a width of 768 fill the GPU more than once


def launch_key(kernel: str, M: int, math: str, arch: int) -> Key:
    """The key of "up" or "down" on M rows."""
    return Key(f"gelu_mlp.{kernel}", math, "large" if M >= LARGE_M else "small", arch)


def _prepare(kernel: str, x: Tensor, M: int, C: int) -> tuple[int, dict[str, Any]]:
    """Programs and keyword arguments of a launch."""
    math = math_of(x.dtype)
    launch = launch_for(launch_key(kernel, M, math, arch(x.device)))
    kwargs = {**launch.kwargs(), "PRECISION": precision_of(math)}
    tiles = cdiv(M, kwargs["BLOCK_M"]) * (4 * C // kwargs["BLOCK_N"])
    return min(tiles, launch.programs_per_sm * num_sms(x.device)), kwargs


def _up_fake(x, w_fc, b_fc, save_d):
    shape = (x.shape[0], w_fc.shape[0])
    return x.new_empty(shape), x.new_empty(shape if save_d else (0,))


@register(fake=_up_fake)
def gelu_mlp_up(x: Tensor, w_fc: Tensor, b_fc: Tensor, save_d: bool) -> tuple[Tensor, Tensor]:
    """x (M, C), w_fc (4C, C), b_fc (4C,) -> g (M, 4C) and d (M, 4C), (0,) unless save_d."""
    M, C = x.shape
    g, d = _up_fake(x, w_fc, b_fc, save_d)
    if M > 0:
        programs, kwargs = _prepare("up", x, M, C)
        _gelu_mlp_up_kernel[(programs,)](x, w_fc, b_fc, g, d, M, 4 * C, C, SAVE_D=save_d, **kwargs)
    return g, d


def _down_fake(dy, w_proj, d):
    return torch.empty_like(d), d.new_empty(d.shape[1], dtype=torch.float32)


@register(fake=_down_fake)
def gelu_mlp_down(dy: Tensor, w_proj: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """dy (M, C), w_proj (C, 4C), d (M, 4C) -> dh (M, 4C), db_fc (4C,) fp32."""
    M, C = dy.shape
    dh = torch.empty_like(d)
    if M == 0:
        return dh, d.new_zeros(4 * C, dtype=torch.float32)
    programs, kwargs = _prepare("down", dy, M, C)
    sums = d.new_empty((cdiv(M, kwargs["BLOCK_M"]), 4 * C), dtype=torch.float32)
    _gelu_mlp_down_kernel[(programs,)](dy, w_proj, d, dh, sums, M, 4 * C, C, **kwargs)
    return dh, sums.sum(dim=0)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_fc, b_fc, w_proj, b_proj, save_d, save_g):
        g, d = gelu_mlp_up(x, w_fc, b_fc, save_d)
        kept_x, kept_d = (x, d) if save_d else (None, None)
        ctx.save_for_backward(kept_x, w_fc, w_proj, g if save_g else None, kept_d)
        ctx.bias_dtypes = b_fc.dtype, b_proj.dtype
        return torch.addmm(b_proj.to(x.dtype), g, w_proj.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_double_backward("gelu_mlp")
        x, w_fc, w_proj, g, d = ctx.saved_tensors
        b_fc_dtype, b_proj_dtype = ctx.bias_dtypes
        needs_dx, needs_dw_fc, needs_db_fc, needs_dw_proj, needs_db_proj, *_ = ctx.needs_input_grad
        dy = dy.contiguous()  # out.sum().backward() gives zero strides
        dx = dw_fc = db_fc = None
        if needs_dx or needs_dw_fc or needs_db_fc:
            dh, sums = gelu_mlp_down(dy, w_proj, d)
            dx = dh @ w_fc if needs_dx else None
            dw_fc = dh.t() @ x if needs_dw_fc else None
            db_fc = sums.to(b_fc_dtype) if needs_db_fc else None
        dw_proj = dy.t() @ g if needs_dw_proj else None
        db_proj = dy.sum(0, dtype=torch.float32).to(b_proj_dtype) if needs_db_proj else None
        return dx, dw_fc, db_fc, dw_proj, db_proj, None, None


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """Widen the last axis of `x` to 4C, apply tanh GELU, project back to C.

    Under autocast `x`, `w_fc` and `w_proj` are cast to the autocast dtype; the biases stay as they
    are. fp32 products are TF32 where `torch.set_float32_matmul_precision` allows it, else exact.

    Args:
        x: (..., C), contiguous, fp32 / bf16 / fp16; C a multiple of WIDTH.
        w_fc: (4C, C), contiguous, dtype of `x` (after autocast). b_fc: (4C,), that dtype or fp32.
        w_proj: (C, 4C), contiguous, dtype of `x` (after autocast). b_proj: (C,), as `b_fc`.

    Returns:
        (..., C), dtype of `x` (after autocast). Bias gradients accumulate in fp32.

    Raises:
        ValueError: a shape, dtype, device or layout other than the above.
        RuntimeError: in the backward, when asked for second derivatives.
    """
    check_device("gelu_mlp", x)
    C = x.shape[-1] if x.dim() else 1
    if C % WIDTH:
        raise ValueError(
            f"gelu_mlp: C must be a multiple of {WIDTH}, got x {tuple(x.shape)}; "
            "use --ops triton,gelu_mlp=eager"
        )
    dtype = autocast_dtype(x)
    if dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        x, w_fc, w_proj = x.to(dtype), w_fc.to(dtype), w_proj.to(dtype)
    of_bias = dtype, torch.float32
    check_tensor("gelu_mlp", "x", x, x.shape, x.device)
    check_tensor("gelu_mlp", "w_fc", w_fc, (4 * C, C), x.device, (dtype,))
    check_tensor("gelu_mlp", "b_fc", b_fc, (4 * C,), x.device, of_bias)
    check_tensor("gelu_mlp", "w_proj", w_proj, (C, 4 * C), x.device, (dtype,))
    check_tensor("gelu_mlp", "b_proj", b_proj, (C,), x.device, of_bias)
    save_d = needs_grad(x, w_fc, b_fc)
    rows = x.reshape(-1, C)
    y = _GeluMLP.apply(rows, w_fc, b_fc, w_proj, b_proj, save_d, needs_grad(w_proj))
    return y.view_as(x)
