"""LayerNorm over the last axis, alone or fused with the residual add before it.

Forward, for each row h of length C, h = x or h = residual + x rounded to the residual's dtype:

    mean = sum(h) / C          var = sum((h - mean)^2) / C          rstd = 1 / sqrt(var + eps)
    x_hat = (h - mean) * rstd                                       y = x_hat * weight + bias

Backward, with g = dy * weight and dh_out the gradient of the residual stream that went on:

    dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dh_out          dx = dresidual = dh
    dweight = sum_rows(dy * x_hat)          dbias = sum_rows(dy)

The mean is kept as two floats. At a mean of 1e3 one float is wrong by up to 3e-5, and a row whose
values differ by 1e-2 cannot afford that. So the first mean is subtracted, and what is left is
averaged again.

Memory bound; every tensor is read or written once. Bytes per element with x and y in bf16:

    layer_norm, bf16          forward  4 (x, y)                 backward  6 (dy, x, dx)
    add_layer_norm, fp32 h    forward 12 (x, residual, y, h)    backward 16 (dy, dh_out, h, dh, dx)
    add_layer_norm, bf16 h    forward  8                        backward  8 (dh is shared)

An H200 at 4.3 TB/s would take 141 us and 187 us for the fp32 pair at M = 65536, C = 768 (604 MB,
805 MB): estimates, arithmetic only. Statistics add 12 bytes a row, partial sums 4 MB a call.

Deterministic: dweight and dbias go through one fp32 row of partial sums per program and a second
kernel that adds those rows in a fixed order. No atomics; reruns are bitwise equal on one device.

Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
"""

# static_range is a loop, which the triton stubs do not know.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._aot import AotCase, aot_case
from ._jit import jit
from ._launch import (
    Key,
    Launch,
    arch,
    cdiv,
    family,
    launch_for,
    next_pow2,
    num_sms,
)
from ._op import check_device, needs_grad, refuse_double_backward, register
from .reference import autocast_dtype

MAX_C = 8192  # a program holds a whole row in registers
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# How many elements of a row one warp may hold. The backward keeps six values of each element in
# registers: 168 per thread at 768 elements. At 1024 of fp32 it would be 221, and only 8 warps would
# fit on an SM (from compiling; not measured).
WARP_C = {"fwd": 1024, "bwd": 768}
MAX_WARPS_PER_ROW = 8  # with 16 a thread has at most 128 registers, too few for the backward
# Warps of the backward that fit on an SM at C = 768, by its registers per thread: 168 on these
# chips, 190 on sm_120 (from compiling).
BWD_WARPS_PER_SM = {80: 12, 90: 12, 100: 12}
OTHER_BWD_WARPS_PER_SM = 8


def launch_key(kernel: str, M: int, C: int, dtype: torch.dtype, arch: int) -> Key:
    """The key of a launch on M rows of h in `dtype`; `kernel` is "fwd" or "bwd"."""
    # Launch-bound and L2-resident up to 4096 rows, bandwidth-bound above.
    size = f"C={C} {'small' if M <= 4096 else 'large'}"
    return Key(f"layer_norm.{kernel}", "fp32" if dtype == torch.float32 else "16-bit", size, arch)


@cache
def safe_launch(kernel: str, C: int, itemsize: int, arch: int) -> Launch:
    """One warp a row as long as the row fits: no barrier, and no idle lane at 768.

    A chunk is a warp of 16-byte loads of h: 128 elements in fp32, 256 in 16 bits. At 256 an fp32 h
    and a bf16 x lie differently over the lanes and meet in shared memory, two barriers a chunk.
    Wider rows take several warps, narrow ones share one.
    """
    chunk = 512 // itemsize
    if chunk >= C:
        block_c, rows, num_warps = next_pow2(C), min(32, 1024 // next_pow2(C)), 4
    else:
        warps_per_row = min(next_pow2(cdiv(C, WARP_C[kernel])), MAX_WARPS_PER_ROW)
        block_c = chunk * warps_per_row
        num_warps = max(4, warps_per_row)
        rows = num_warps // warps_per_row
    resident = BWD_WARPS_PER_SM.get(family(arch), OTHER_BWD_WARPS_PER_SM)
    return Launch(
        (("ROWS", rows), ("BLOCK_C", block_c)),
        num_warps,
        programs_per_sm=resident // num_warps if kernel == "bwd" else 1,
        source="a formula: compiles without spills",
    )


def _launch(
    kernel: str, M: int, C: int, dtype: torch.dtype, arch: int
) -> tuple[Launch, dict[str, Any]]:
    """The launch on M rows of h, and the constexprs it leaves open."""
    safe = safe_launch(kernel, C, dtype.itemsize, arch)
    launch = launch_for(launch_key(kernel, M, C, dtype, arch), safe)
    return launch, {"C": C, "CHUNKS": cdiv(C, dict(launch.blocks)["BLOCK_C"])}


@jit
def _tile(rows, M, i, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets and mask of chunk `i` of some rows of an (M, C) tensor."""
    cols = i * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return rows * C + cols, (rows < M) & (cols < C)


@jit
def _load_rows(ptr, rows, M, C: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr):
    """Rows (ROWS, 1) of an (M, C) tensor as CHUNKS fp32 tiles (ROWS, BLOCK_C), 0 outside."""
    tiles = ()
    for i in tl.static_range(CHUNKS):
        at, mask = _tile(rows, M, i, C, BLOCK_C)
        tiles += (tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@jit
def _normalise(
    h,  # tiles of `_load_rows`, 0 outside
    rows,
    weight_ptr,
    bias_ptr,
    y_ptr,
    stats_ptr,
    M,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store y and the statistics of some rows h."""
    total = h[0]
    for i in tl.static_range(1, CHUNKS):
        total += h[i]
    # Rounded here: ptxas makes `/ C` part of the subtractions below, and these would then be of
    # another mean than the one that is stored for the backward.
    mean = tl.div_rn(tl.sum(total, axis=1, keep_dims=True), C * 1.0)

    centered = ()
    rest = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        _, mask = _tile(rows, M, i, C, BLOCK_C)
        centered += (tl.where(mask, h[i] - mean, 0.0),)  # padding must not enter the sums
        rest += centered[i]
    mean_low = tl.sum(rest, axis=1, keep_dims=True) / C

    corrected = ()
    squares = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(CHUNKS):
        _, mask = _tile(rows, M, i, C, BLOCK_C)
        corrected += (tl.where(mask, centered[i] - mean_low, 0.0),)
        squares += corrected[i] * corrected[i]
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / C + eps)

    # A (ROWS, BLOCK_C) read of one row: a 1-D load would change layout through shared memory.
    same_row = tl.zeros((ROWS, 1), dtype=tl.int64)
    weight = _load_rows(weight_ptr, same_row, 1, C, BLOCK_C, CHUNKS)
    bias = _load_rows(bias_ptr, same_row, 1, C, BLOCK_C, CHUNKS)
    for i in tl.static_range(CHUNKS):
        at, mask = _tile(rows, M, i, C, BLOCK_C)
        y = corrected[i] * rstd * weight[i] + bias[i]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(stats_ptr + rows, mean, mask=rows < M)
    tl.store(stats_ptr + M + rows, mean_low, mask=rows < M)
    tl.store(stats_ptr + 2 * M + rows, rstd, mask=rows < M)


@jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, C)
    residual_ptr,  # (M, C), or None: h = x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (M, C) out
    h_ptr,  # (M, C) out, dtype of residual; None with it
    stats_ptr,  # (3, M) out, fp32: mean, what the mean lost by rounding, rstd
    M,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # M * C may pass 2^31
    h = _load_rows(x_ptr, rows, M, C, BLOCK_C, CHUNKS)
    if residual_ptr is not None:
        residual = _load_rows(residual_ptr, rows, M, C, BLOCK_C, CHUNKS)
        rounded = ()
        for i in tl.static_range(CHUNKS):
            at, mask = _tile(rows, M, i, C, BLOCK_C)
            stored = (residual[i] + h[i]).to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + at, stored, mask=mask)
            rounded += (stored.to(tl.float32),)  # normalise what the backward will read
        h = rounded
    _normalise(h, rows, weight_ptr, bias_ptr, y_ptr, stats_ptr, M, eps, C, ROWS, BLOCK_C, CHUNKS)


@jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, C), dtype of y
    dh_out_ptr,  # (M, C), dtype of h; or None: nothing to add
    h_ptr,  # (M, C)
    weight_ptr,  # (C,)
    stats_ptr,  # (3, M) fp32
    dh_ptr,  # (M, C) out, dtype of h
    dx_ptr,  # (M, C) out, dtype of x; or None: dh serves
    partial_ptr,  # (2, programs, C) out, fp32: sums for dweight, dbias
    M,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    pid = tl.program_id(0)
    num_programs = tl.num_programs(0)
    same_row = tl.zeros((ROWS, 1), dtype=tl.int64)
    weight = _load_rows(weight_ptr, same_row, 1, C, BLOCK_C, CHUNKS)
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight += (tl.zeros((ROWS, BLOCK_C), dtype=tl.float32),)
    dbias = dweight

    for start in range(pid * ROWS, M, num_programs * ROWS):
        rows = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        h = _load_rows(h_ptr, rows, M, C, BLOCK_C, CHUNKS)
        dy = _load_rows(dy_ptr, rows, M, C, BLOCK_C, CHUNKS)
        if dh_out_ptr is not None:  # here, not where it is added: one wait for DRAM a row
            dh_out = _load_rows(dh_out_ptr, rows, M, C, BLOCK_C, CHUNKS)
        mean = tl.load(stats_ptr + rows, mask=rows < M, other=0.0)
        mean_low = tl.load(stats_ptr + M + rows, mask=rows < M, other=0.0)
        rstd = tl.load(stats_ptr + 2 * M + rows, mask=rows < M, other=0.0)

        x_hat = ()
        next_dweight = ()
        next_dbias = ()
        sum_g = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
        sum_gx = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
        for i in tl.static_range(CHUNKS):
            # No mask on x_hat: dy is 0 in the padding, and with it all that x_hat is summed into.
            x_hat += ((h[i] - mean - mean_low) * rstd,)
            sum_g += dy[i] * weight[i]
            sum_gx += dy[i] * weight[i] * x_hat[i]
            next_dweight += (dweight[i] + dy[i] * x_hat[i],)
            next_dbias += (dbias[i] + dy[i],)
        dweight = next_dweight
        dbias = next_dbias

        mean_g = tl.sum(sum_g, axis=1, keep_dims=True) / C
        mean_gx = tl.sum(sum_gx, axis=1, keep_dims=True) / C
        for i in tl.static_range(CHUNKS):
            at, mask = _tile(rows, M, i, C, BLOCK_C)
            dh = rstd * (dy[i] * weight[i] - mean_g - x_hat[i] * mean_gx)
            if dh_out_ptr is not None:
                dh += dh_out[i]
            tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None:
                tl.store(dx_ptr + at, dh.to(dx_ptr.dtype.element_ty), mask=mask)

    for i in tl.static_range(CHUNKS):
        cols = i * BLOCK_C + tl.arange(0, BLOCK_C)
        at = pid.to(tl.int64) * C + cols
        tl.store(partial_ptr + at, tl.sum(dweight[i], axis=0), mask=cols < C)
        at += num_programs.to(tl.int64) * C
        tl.store(partial_ptr + at, tl.sum(dbias[i], axis=0), mask=cols < C)


@jit
def _sum_partials_kernel(
    partial_ptr,  # (2, P, C) fp32
    dweight_ptr,  # (C,) out
    dbias_ptr,  # (C,) out
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    which = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)[:, None]
        at = (which.to(tl.int64) * P + rows) * C + cols[None, :]
        acc += tl.load(partial_ptr + at, mask=(rows < P) & (cols < C)[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    if which == 0:
        tl.store(dweight_ptr + cols, total.to(dweight_ptr.dtype.element_ty), mask=cols < C)
    else:
        tl.store(dbias_ptr + cols, total.to(dbias_ptr.dtype.element_ty), mask=cols < C)


def _launch_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    y: Tensor, h: Tensor | None, stats: Tensor,
) -> None:  # fmt: skip
    C = x.shape[-1]
    M = x.numel() // C
    dtype = x.dtype if residual is None else residual.dtype
    launch, fixed = _launch("fwd", M, C, dtype, arch(x.device))
    grid = (cdiv(M, dict(launch.blocks)["ROWS"]),)
    if M > 0:
        _layer_norm_fwd_kernel[grid](
            x, residual, weight, bias, y, h, stats, M, eps, **fixed, **launch.kwargs()
        )


def _launch_bwd(
    dy: Tensor, dh_out: Tensor | None, h: Tensor, weight: Tensor, stats: Tensor,
    dh: Tensor, dx: Tensor | None, dweight: Tensor, dbias: Tensor,
) -> None:  # fmt: skip
    C = h.shape[-1]
    M = h.numel() // C
    launch, fixed = _launch("bwd", M, C, h.dtype, arch(h.device))
    programs = launch.programs_per_sm * num_sms(h.device)  # all resident: one wave
    programs = min(cdiv(M, dict(launch.blocks)["ROWS"]), programs)
    partial = h.new_empty((2, programs, C), dtype=torch.float32)
    if M > 0:
        _layer_norm_bwd_kernel[(programs,)](
            dy, dh_out, h, weight, stats, dh, dx, partial, M, **fixed, **launch.kwargs()
        )
    total = launch_for(Key("layer_norm.sum", "fp32", f"C={C}", arch(h.device))).kwargs()
    _sum_partials_kernel[(cdiv(C, total["BLOCK_C"]), 2)](
        partial, dweight, dbias, programs, C, **total
    )


def _fwd_fake(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    stats = x.new_empty((3, *x.shape[:-1]), dtype=torch.float32)
    return torch.empty_like(x, dtype=dtype), stats


@register(fake=_fwd_fake)
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x (..., C) -> y (..., C) in `dtype`, stats (3, ...) fp32."""
    y, stats = _fwd_fake(x, weight, bias, eps, dtype)
    _launch_fwd(x, None, weight, bias, eps, y, None, stats)
    return y, stats


def _bwd_fake(
    dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@register(fake=_bwd_fake)
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x (..., C) -> dx (..., C), dweight (C,), dbias (C,)."""
    dx, dweight, dbias = _bwd_fake(dy, x, weight, stats)
    _launch_bwd(dy, None, x, weight, stats, dx, None, dweight, dbias)
    return dx, dweight, dbias


def _add_fwd_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    y, stats = _fwd_fake(x, weight, bias, eps, dtype)
    return y, torch.empty_like(residual), stats


@register(fake=_add_fwd_fake)
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (..., C) -> y (..., C) in `dtype`, residual_out (..., C), stats (3, ...) fp32."""
    y, residual_out, stats = _add_fwd_fake(x, residual, weight, bias, eps, dtype)
    _launch_fwd(x, residual, weight, bias, eps, y, residual_out, stats)
    return y, residual_out, stats


def _add_bwd_fake(
    dy: Tensor, dresidual_out: Tensor | None, residual_out: Tensor, weight: Tensor, stats: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = (0,) if dtype == residual_out.dtype else residual_out.shape
    dx = residual_out.new_empty(shape, dtype=dtype)
    return torch.empty_like(residual_out), dx, torch.empty_like(weight), torch.empty_like(weight)


@register(fake=_add_bwd_fake)
def add_layer_norm_bwd(
    dy: Tensor, dresidual_out: Tensor | None, residual_out: Tensor, weight: Tensor, stats: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dresidual (..., C), dx (..., C) in `dtype`, dweight (C,), dbias (C,).

    dx is (0,) where `dtype` is the residual's: dresidual serves, and an op may not return it twice.
    """
    dresidual, dx, dweight, dbias = _add_bwd_fake(
        dy, dresidual_out, residual_out, weight, stats, dtype
    )
    own_dx = dx if dtype != residual_out.dtype else None
    _launch_bwd(dy, dresidual_out, residual_out, weight, stats, dresidual, own_dx, dweight, dbias)
    return dresidual, dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> Tensor:
        y, stats = layer_norm_fwd(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_double_backward("layer_norm")
        return *layer_norm_bwd(dy.contiguous(), *ctx.saved_tensors), None, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, residual_out, stats = add_layer_norm_fwd(x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(residual_out, weight, stats)
        ctx.x_dtype = x.dtype
        if not torch.compiler.is_compiling():  # which cannot trace it, and fills in zeros
            ctx.set_materialize_grads(False)  # the last residual_out of a model has no gradient
        return y, residual_out

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dresidual_out: Tensor | None):
        refuse_double_backward("add_layer_norm")
        if dresidual_out is not None:
            dresidual_out = dresidual_out.contiguous()
        if dy is None:
            assert dresidual_out is not None  # autograd calls with at least one gradient
            return dresidual_out.to(ctx.x_dtype), dresidual_out, None, None, None, None
        residual_out, weight, stats = ctx.saved_tensors
        dresidual, dx, dweight, dbias = add_layer_norm_bwd(
            dy.contiguous(), dresidual_out, residual_out, weight, stats, ctx.x_dtype
        )
        if ctx.x_dtype == residual_out.dtype:
            dx = dresidual
        return dx, dresidual, dweight, dbias, None, None


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise ValueError for what the kernels would misread."""
    check_device(op, x)
    C = x.shape[-1] if x.dim() else 0
    if not 1 <= C <= MAX_C:
        raise ValueError(
            f"{op}: the last axis of x must have 1 to {MAX_C} elements, got x {tuple(x.shape)}; "
            "use the eager backend for others"
        )
    if weight.shape != (C,) or bias.shape != (C,):
        raise ValueError(
            f"{op}: weight and bias must be ({C},) to match x {tuple(x.shape)}, "
            f"got weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        raise ValueError(
            f"{op}: x, weight and bias must be contiguous, got strides {x.stride()}, "
            f"{weight.stride()}, {bias.stride()}; call .contiguous() first"
        )
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or weight.dtype != bias.dtype:
        raise ValueError(
            f"{op}: x must be fp32, fp16 or bf16, and so weight and bias, alike; "
            f"got x {x.dtype}, weight {weight.dtype}, bias {bias.dtype}"
        )
    if not x.device == weight.device == bias.device:
        raise ValueError(
            f"{op}: x, weight and bias must be on one device, got {x.device}, {weight.device}, "
            f"{bias.device}"
        )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise the last axis of `x`, then scale and shift.

    Args:
        x: (..., C), contiguous, fp32 / fp16 / bf16, C <= MAX_C.
        weight, bias: (C,), one dtype, any of the three.
        eps: Added to the variance.

    Returns:
        (..., C) in the autocast dtype under autocast, else the dtype of `x`. Statistics and sums
        over rows are fp32; each gradient has the dtype of its tensor.

    Raises:
        ValueError: wrong shape, dtype, device or strides; the message has both values.
    """
    _check("layer_norm", x, weight, bias)
    dtype = autocast_dtype(x)
    if not needs_grad(x, weight, bias):
        return layer_norm_fwd(x, weight, bias, eps, dtype)[0]
    return _LayerNorm.apply(x, weight, bias, eps, dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass over both.

    Args:
        x: (..., C), contiguous, fp32 / fp16 / bf16, C <= MAX_C.
        residual: (..., C), contiguous; its dtype, which may differ, is that of the stream.
        weight, bias: (C,), one dtype, any of the three.
        eps: Added to the variance.

    Returns:
        y = LayerNorm(residual_out), (..., C), in the autocast dtype under autocast, else the dtype
        of `x`; residual_out = residual + x, (..., C), dtype of `residual`.

    Raises:
        ValueError: wrong shape, dtype, device or strides; the message has both values.
    """
    _check("add_layer_norm", x, weight, bias)
    if residual.shape != x.shape or residual.device != x.device:
        raise ValueError(
            f"add_layer_norm: residual must match x {tuple(x.shape)} on {x.device}, "
            f"got {tuple(residual.shape)} on {residual.device}"
        )
    if not residual.is_contiguous() or residual.dtype not in DTYPES:
        raise ValueError(
            "add_layer_norm: residual must be contiguous and fp32, fp16 or bf16, "
            f"got strides {residual.stride()}, {residual.dtype}"
        )
    dtype = autocast_dtype(x)
    if not needs_grad(x, residual, weight, bias):
        return add_layer_norm_fwd(x, residual, weight, bias, eps, dtype)[:2]
    return _AddLayerNorm.apply(x, residual, weight, bias, eps, dtype)


def aot_cases(arch: int) -> Iterator[AotCase]:
    """Each build the launches above can choose on `arch`, at the widths and dtypes that matter."""
    kernels = {"fwd": _layer_norm_fwd_kernel, "bwd": _layer_norm_bwd_kernel}
    for C, x, h in (
        (768, "bf16", "fp32"),  # GPT-2, residual stream fp32
        (768, "bf16", "bf16"),  # and bf16
        (1024, "fp32", "fp32"),  # the widest row of one warp forward, of two backward
        (6400, "bf16", "fp32"),
        (MAX_C, "bf16", "fp32"),
    ):
        of_stream = ("residual_ptr", "h_ptr", "dh_out_ptr", "dh_ptr")
        types: dict[str, str] = dict.fromkeys(of_stream, f"*{h}")
        for name, kernel in kernels.items():
            dtype = torch.float32 if h == "fp32" else torch.bfloat16
            launch, fixed = _launch(name, 65536, C, dtype, arch)
            label, fixed = f"{name} C={C} x={x} h={h}", fixed | ({"dx_ptr": None} if x == h else {})
            yield aot_case("add_layer_norm", kernel, label, launch, x, fixed, types=types)
    for name, absent in (("fwd", ("residual_ptr", "h_ptr")), ("bwd", ("dh_out_ptr", "dx_ptr"))):
        launch, fixed = _launch(name, 65536, 768, torch.bfloat16, arch)
        fixed |= dict.fromkeys(absent)
        yield aot_case("layer_norm", kernels[name], f"{name} C=768 bf16", launch, "bf16", fixed)
    launch = launch_for(Key("layer_norm.sum", "fp32", "C=768", arch))
    yield aot_case("layer_norm", _sum_partials_kernel, "sum of partials", launch, "fp32")
