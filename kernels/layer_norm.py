"""LayerNorm over the last axis, alone or fused with the residual add before it.

Forward, for each row h of length C, h = x or h = residual + x rounded to the residual's dtype:

    mean = sum(h) / C          var = sum((h - mean)^2) / C          rstd = 1 / sqrt(var + eps)
    x_hat = (h - mean) * rstd                                       y = x_hat * weight + bias

Backward, with g = dy * weight and dh_out the gradient of the residual stream that continues:

    dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) + dh_out          dx = dresidual = dh
    dweight = sum_rows(dy * x_hat)          dbias = sum_rows(dy)

The mean is taken twice: a single fp32 mean of values near 1e3 is off by up to 1e-4, too much for a
row whose values differ by 1e-2. The backward reads the sum of both as one float.

Memory-bound; every tensor is read or written once. Bytes per element with x and y in bf16:

    layer_norm, bf16          forward  4 (x, y)                 backward  6 (dy, x, dx)
    add_layer_norm, fp32 h    forward 12 (x, residual, y, h)    backward 16 (dy, dh_out, h, dh, dx)
    add_layer_norm, bf16 h    forward  8                        backward  8 (dh is shared)

Deterministic: each program writes one fp32 row of partial sums for dweight and dbias, and a second
kernel adds those rows in a fixed order. No atomics; reruns are bitwise equal on one device.

Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
"""

# static_range is a loop, which the triton stubs do not know.
# pyright: reportGeneralTypeIssues=false

from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._launch import Key, Launch, arch, cdiv, launch_for, next_pow2, num_sms
from ._op import check_device, check_tensor, refuse_double_backward, register
from .reference import autocast_dtype

MAX_C = 8192  # a program holds a whole row in registers
# The elements of a row that one warp may hold. The backward keeps six values of each in registers,
# which at 768 elements takes 168 registers per thread. At 1024 in fp32 it would take 221, and only
# 8 warps would fit on an SM. Both figures are from compiled code.
WARP_C = {"fwd": 1024, "bwd": 768}
MAX_WARPS_PER_ROW = 8  # with 16 a thread has at most 128 registers, too few for the backward
BWD_WARPS_PER_SM = 12  # at 768 elements per warp


def launch_key(kernel: str, M: int, C: int, dtype: torch.dtype, arch: int) -> Key:
    """The key of a launch on M rows of h in `dtype`; `kernel` is "fwd" or "bwd"."""
    # Launch-bound and L2-resident up to 4096 rows, bandwidth-bound above.
    size = f"C={C} {'small' if M <= 4096 else 'large'}"
    return Key(f"layer_norm.{kernel}", "fp32" if dtype == torch.float32 else "16-bit", size, arch)


@cache
def safe_launch(kernel: str, C: int, itemsize: int) -> Launch:
    """One warp per row if the row fits: no barrier, and no idle lane at 768.

    A chunk is what a warp loads of h with 16 bytes per lane: 128 elements in fp32, 256 in 16 bits.
    With chunks of 256, adding a bf16 x to an fp32 h would go through shared memory, at two barriers
    per chunk. Wider rows take several warps; narrow ones share one.
    """
    chunk = 512 // itemsize
    if chunk >= C:
        block_c, rows, num_warps = next_pow2(C), min(32, 1024 // next_pow2(C)), 4
    else:
        warps_per_row = min(next_pow2(cdiv(C, WARP_C[kernel])), MAX_WARPS_PER_ROW)
        block_c = chunk * warps_per_row
        num_warps = max(4, warps_per_row)
        rows = num_warps // warps_per_row
    return Launch(
        (("ROWS", rows), ("BLOCK_C", block_c)),
        num_warps,
        programs_per_sm=BWD_WARPS_PER_SM // num_warps if kernel == "bwd" else 1,
        source="a formula: compiles without spills",
    )


def row_launch(key: Key, C: int, dtype: torch.dtype) -> tuple[Launch, dict[str, Any]]:
    """The launch on rows of h in `dtype`, and its keyword arguments."""
    launch = launch_for(key, safe_launch(key.kernel.partition(".")[2], C, dtype.itemsize))
    kwargs = launch.kwargs()
    return launch, {**kwargs, "C": C, "CHUNKS": cdiv(C, kwargs["BLOCK_C"])}


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
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (M, C) out
    stats_ptr,  # (2, M) out, fp32: mean, rstd
    M,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Store y and the statistics of some rows of h."""
    total = h[0]
    for i in tl.static_range(1, CHUNKS):
        total += h[i]
    # div_rn rounds the mean here. ptxas would fuse `/ C` into the subtractions below, which would
    # then use another mean than the one stored for the backward.
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
    tl.store(stats_ptr + rows, mean + mean_low, mask=rows < M)
    tl.store(stats_ptr + M + rows, rstd, mask=rows < M)


@jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, C)
    residual_ptr,  # (M, C), or None: h = x
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (M, C) out
    h_ptr,  # (M, C) out, dtype of residual; not written without one
    stats_ptr,  # (2, M) out, fp32: mean, rstd
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
    stats_ptr,  # (2, M) fp32
    dh_ptr,  # (M, C) out, dtype of h
    dx_ptr,  # (M, C) out, dtype of x; or None: it would equal dh
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
        if dh_out_ptr is not None:  # loaded with the others: one wait for DRAM per row
            dh_out = _load_rows(dh_out_ptr, rows, M, C, BLOCK_C, CHUNKS)
        mean = tl.load(stats_ptr + rows, mask=rows < M, other=0.0)
        rstd = tl.load(stats_ptr + M + rows, mask=rows < M, other=0.0)

        x_hat = ()
        next_dweight = ()
        next_dbias = ()
        sum_g = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
        sum_gx = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
        for i in tl.static_range(CHUNKS):
            # No mask on x_hat: dy is 0 in the padding, and with it all that x_hat is summed into.
            x_hat += ((h[i] - mean) * rstd,)
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


def _fwd_fake(x, residual, weight, bias, eps, dtype):
    h = x.new_empty(0) if residual is None else torch.empty_like(residual)
    return torch.empty_like(x, dtype=dtype), h, x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)


@register(fake=_fwd_fake)
def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual (..., C) -> y (..., C) in `dtype`, h (..., C), stats (2, ...) fp32.

    Without a residual h is empty, (0,), because it would be x, and an op may not return its input.
    """
    y, h, stats = _fwd_fake(x, residual, weight, bias, eps, dtype)
    M, C = stats[0].numel(), x.shape[-1]
    stream = x.dtype if residual is None else residual.dtype
    _, kwargs = row_launch(launch_key("fwd", M, C, stream, arch(x.device)), C, stream)
    if M > 0:
        _layer_norm_fwd_kernel[(cdiv(M, kwargs["ROWS"]),)](
            x, residual, weight, bias, y, h, stats, M, eps, **kwargs
        )
    return y, h, stats


def _bwd_fake(dy, dh_out, h, weight, stats, dtype):
    dx = h.new_empty(0 if dtype == h.dtype else h.shape, dtype=dtype)
    return torch.empty_like(h), dx, torch.empty_like(weight), torch.empty_like(weight)


@register(fake=_bwd_fake)
def layer_norm_bwd(
    dy: Tensor,
    dh_out: Tensor | None,
    h: Tensor,
    weight: Tensor,
    stats: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dh (..., C), dx (..., C) in `dtype`, dweight (C,), dbias (C,).

    If `dtype` is that of h, dx is empty, (0,), because an op may not return dh twice.
    """
    dh, dx, dweight, dbias = _bwd_fake(dy, dh_out, h, weight, stats, dtype)
    M, C = stats[0].numel(), h.shape[-1]
    launch, kwargs = row_launch(launch_key("bwd", M, C, h.dtype, arch(h.device)), C, h.dtype)
    programs = min(cdiv(M, kwargs["ROWS"]), launch.programs_per_sm * num_sms(h.device))  # one wave
    partial = h.new_empty((2, programs, C), dtype=torch.float32)
    if M > 0:
        outs = dh, None if dtype == h.dtype else dx, partial
        _layer_norm_bwd_kernel[(programs,)](dy, dh_out, h, weight, stats, *outs, M, **kwargs)
    kwargs = launch_for(Key("layer_norm.sum", "fp32", f"C={C}", arch(h.device))).kwargs()
    grid = cdiv(C, kwargs["BLOCK_C"]), 2
    _sum_partials_kernel[grid](partial, dweight, dbias, programs, C, **kwargs)
    return dh, dx, dweight, dbias


class _LayerNorm(torch.autograd.Function):
    """Returns y, and with a residual the sum too."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dtype):
        y, h, stats = layer_norm_fwd(x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(x if residual is None else h, weight, stats)
        ctx.x_dtype, ctx.op = x.dtype, "layer_norm" if residual is None else "add_layer_norm"
        if not torch.compiler.is_compiling():  # it cannot trace this, and passes zeros
            ctx.set_materialize_grads(False)  # no zeros for the last sum, which has none
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_out: Tensor | None = None):
        refuse_double_backward(ctx.op)
        dh_out = None if dh_out is None else dh_out.contiguous()
        if dy is None:
            assert dh_out is not None  # autograd calls with at least one gradient
            return dh_out.to(ctx.x_dtype), dh_out, None, None, None, None
        h, weight, stats = ctx.saved_tensors
        dh, dx, *rest = layer_norm_bwd(dy.contiguous(), dh_out, h, weight, stats, ctx.x_dtype)
        dx = dh if ctx.x_dtype == h.dtype else dx
        return dx, dh if ctx.op == "add_layer_norm" else None, *rest, None, None


def _norm(
    op: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Any:
    """Check the arguments, then run one of the two ops."""
    check_device(op, x)
    C = x.shape[-1] if x.dim() else 0
    if not 1 <= C <= MAX_C:
        raise ValueError(
            f"{op}: the last axis of x must have 1 to {MAX_C} elements, got x {tuple(x.shape)}; "
            "use the eager backend for others"
        )
    check_tensor(op, "x", x, x.shape, x.device)
    check_tensor(op, "weight", weight, (C,), x.device)
    check_tensor(op, "bias", bias, (C,), x.device, (weight.dtype,))
    if residual is not None:
        check_tensor(op, "residual", residual, x.shape, x.device)
    return _LayerNorm.apply(x, residual, weight, bias, eps, autocast_dtype(x))


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
    return _norm("layer_norm", x, None, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass over both.

    Args:
        x, weight, bias, eps: As for `layer_norm`.
        residual: (..., C), contiguous; any of the three dtypes, not necessarily that of `x`.

    Returns:
        y = LayerNorm(residual_out), (..., C), in the autocast dtype under autocast, else the dtype
        of `x`; residual_out = residual + x, (..., C), dtype of `residual`.

    Raises:
        ValueError: wrong shape, dtype, device or strides; the message has both values.
    """
    return _norm("add_layer_norm", x, residual, weight, bias, eps)
