"""Causal self-attention on packed qkv, forward and backward, without splitting or copying it.

qkv (B, T, 3C) is as one projection writes it: q, k, v of head h begin at columns h*D, C + h*D and
2C + h*D, C = H*D. Forward, for each head, with scale = 1 / sqrt(D):

    S = scale * q k^T, for keys <= query          lse_i = log2(sum_j 2^(S_ij * log2(e)))
    P_ij = 2^(S_ij * log2(e) - lse_i)             y = P v

Backward, with dO the gradient of y:

    delta_i = sum_d dO_id y_id        dP = dO v^T         dS = P * (dP - delta)
    dq = scale * dS k                 dk = scale * dS^T q               dv = P^T dO

S never leaves the chip. The forward walks the keys once with an online softmax (running row maximum
and sum) and saves only lse, in fp32 and base 2; the backward recomputes P from it. Every loop does
its masked blocks first, then the blocks that need no mask.

Bound by the tensor cores from T of a few hundred on, below that by memory. Flops, halved for
causality: forward 2 B H T^2 D; backward 5 B H T^2 D useful, 7 executed, as both launches compute S
and dP. Elements per token and C: forward reads 3 and writes 1; dq 5 and 1; dk/dv 4 and 2. What a
block does not own, it reads again from L2.

The backward computes dq and delta by query blocks, then dk/dv by key blocks. The second launch
works on S^T = k q^T, so P^T and dS^T leave the dot in the orientation the next one reads. No tile
is transposed in registers, which Triton before 3.7.1 gets wrong on Hopper (fla-org issue 826). Up
to `short_t` one launch does it all, with a head per program. At T = 64 that takes 1,231
instructions per warp instead of at least 1,773, and 8 elements per token and C instead of 12 (bf16,
compiled for sm_90 with triton 3.7.1).

Deterministic: nothing is summed across programs. No atomics, no fp32 buffer for dq.

Source: Dao 2023, https://arxiv.org/abs/2307.08691, which computes delta in a separate pass.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import HEAD_DIMS, unfit
from ._jit import jit
from ._launch import Key, arch, cdiv, launch_for, math_of, precision_of
from ._op import check_device, check_tensor, refuse_double_backward, register
from .reference import autocast_dtype

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


@jit
def _head_ptr(ptr, head, T, H, width, D: tl.constexpr):
    """Where a head, b * H + h, starts in (B, T, width): qkv is 3C wide, y is C = H * D."""
    return ptr + (head // H).to(tl.int64) * T * width + (head % H) * D


@jit
def _place(T, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Head and first token of this program. Blocks of one head are neighbours: k, v stay in L2."""
    num_blocks = tl.cdiv(T, BLOCK)
    head = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    if LAST_FIRST:
        block = num_blocks - 1 - block
    return head, block * BLOCK


@jit
def _tile(width, BLOCK: tl.constexpr, D: tl.constexpr):
    """Offsets of a (BLOCK, D) tile in rows of `width` elements; 32-bit, to save registers."""
    return tl.arange(0, BLOCK)[:, None] * width + tl.arange(0, D)[None, :]


@jit
def _load(ptrs, rows, T, MASKED: tl.constexpr):
    """A (rows, D) tile or (rows,) statistics; with MASKED, rows from T on read as zeros."""
    if MASKED:
        return tl.load(ptrs, mask=rows < T, other=0.0)
    return tl.load(ptrs)


@jit
def _attention_fwd_kernel(
    qkv_ptr,  # (B, T, 3C)
    y_ptr,  # (B, T, C) out
    lse_ptr,  # (B, H, T) out, fp32
    T,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)  # the unmasked blocks end where the diagonal begins
    # Late queries see the most keys; starting them first keeps the last wave short.
    head, first = _place(T, BLOCK_M, True)
    stride = 3 * H * D
    rows = first + tl.arange(0, BLOCK_M)
    tile_n = _tile(stride, BLOCK_N, D)
    # Block starts are 64-bit scalars: with the offsets inside a block no address overflows.
    row_start = first.to(tl.int64)
    head_ptr = _head_ptr(qkv_ptr, head, T, H, stride, D)
    q_ptrs = head_ptr + row_start * stride + _tile(stride, BLOCK_M, D)
    q = _load(q_ptrs, rows[:, None], T, True)
    qk_scale = scale * LOG2_E
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # The diagonal comes first. Every row sees key `first`, so its maximum is finite from there on;
    # and with the diagonal last, ptxas serialises the WGMMA of a third stage (C7515, compiled for
    # sm_90 with triton 3.6.0 and 3.7.1).
    for before in tl.static_range(2):
        kv_ptr = head_ptr + H * D + (0 if before else row_start * stride)
        end = first if before else tl.minimum(first + BLOCK_M, T)
        for start in range(0 if before else first, end, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            k = _load(kv_ptr + tile_n, cols[:, None], T, not before)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not before:
                s = tl.where(rows[:, None] >= cols[None, :], s, float("-inf"))
            # Never -inf - -inf: the block that comes first holds a key that every row sees.
            new_max = tl.maximum(row_max, tl.max(s, axis=1) * qk_scale)
            p = tl.exp2(s * qk_scale - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)
            row_sum = row_sum * alpha + tl.sum(p, axis=1)
            v = _load(kv_ptr + H * D + tile_n, cols[:, None], T, not before)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
            row_max = new_max
            kv_ptr += BLOCK_N * stride

    y = acc / row_sum[:, None]
    y_ptr = _head_ptr(y_ptr, head, T, H, H * D, D) + row_start * (H * D)
    tile_y = _tile(H * D, BLOCK_M, D)
    tl.store(y_ptr + tile_y, y.to(y_ptr.dtype.element_ty), mask=(rows < T)[:, None])
    lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < T)


@jit
def _dq_step(
    dq, q, do, k, v, lse, delta, visible, qk_scale, EDGE: tl.constexpr, PRECISION: tl.constexpr
):
    """dq of one query block += dS k of one key block; without EDGE all of it is visible."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * qk_scale - lse[:, None])
    if EDGE:
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@jit
def _dkdv_step(
    dk, dv, q, do, k, v, lse, delta, visible, qk_scale, EDGE: tl.constexpr, PRECISION: tl.constexpr
):
    """dk, dv of one key block += dS^T q, P^T dO of one query block."""
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    pt = tl.exp2(st * qk_scale - lse[None, :])
    if EDGE:
        pt = tl.where(visible, pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION)
    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    dst = pt * (dpt - delta[None, :])
    return tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION), dv


@jit
def _attention_dq_kernel(
    dy_ptr,  # (B, T, C)
    qkv_ptr,  # (B, T, 3C)
    y_ptr,  # (B, T, C)
    lse_ptr,  # (B, H, T), fp32
    dqkv_ptr,  # (B, T, 3C) out, the dq columns
    delta_ptr,  # (B, H, T) out, fp32
    T,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    head, first = _place(T, BLOCK_M, True)
    stride = 3 * H * D
    rows = first + tl.arange(0, BLOCK_M)
    tile, tile_n = _tile(stride, BLOCK_M, D), _tile(stride, BLOCK_N, D)
    row_start = first.to(tl.int64)
    y_at = row_start * (H * D) + _tile(H * D, BLOCK_M, D)
    y = _load(_head_ptr(y_ptr, head, T, H, H * D, D) + y_at, rows[:, None], T, True)
    do = _load(_head_ptr(dy_ptr, head, T, H, H * D, D) + y_at, rows[:, None], T, True)
    delta = tl.sum(do.to(tl.float32) * y.to(tl.float32), axis=1)
    stat = head.to(tl.int64) * T + rows
    tl.store(delta_ptr + stat, delta, mask=rows < T)
    lse = _load(lse_ptr + stat, rows, T, True)
    head_ptr = _head_ptr(qkv_ptr, head, T, H, stride, D)
    q = _load(head_ptr + row_start * stride + tile, rows[:, None], T, True)
    qk_scale = scale * LOG2_E
    dq = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    # The diagonal first, as in the forward. In 16 bits LLVM must not move work out of these loops
    # (disable_licm): with three stages the kernel would take 163 registers instead of 126, and one
    # program would fit on an SM instead of two (D = 64, sm_90). In exact fp32 it must: otherwise
    # 108 registers become 255, and spill. Both from compiling with triton 3.6.0.
    NARROW: tl.constexpr = qkv_ptr.dtype.element_ty != tl.float32
    for before in tl.static_range(2):
        kv_ptr = head_ptr + H * D + (0 if before else row_start * stride)
        end = first if before else tl.minimum(first + BLOCK_M, T)
        for start in tl.range(0 if before else first, end, BLOCK_N, disable_licm=NARROW):
            cols = start + tl.arange(0, BLOCK_N)
            k = _load(kv_ptr + tile_n, cols[:, None], T, not before)
            v = _load(kv_ptr + H * D + tile_n, cols[:, None], T, not before)
            visible = rows[:, None] >= cols[None, :]
            dq = _dq_step(dq, q, do, k, v, lse, delta, visible, qk_scale, not before, PRECISION)
            kv_ptr += BLOCK_N * stride
    dq_ptrs = _head_ptr(dqkv_ptr, head, T, H, stride, D) + row_start * stride + tile
    tl.store(dq_ptrs, (dq * scale).to(dqkv_ptr.dtype.element_ty), mask=(rows < T)[:, None])


@jit
def _attention_dkdv_kernel(
    dy_ptr,  # (B, T, C)
    qkv_ptr,  # (B, T, 3C)
    lse_ptr,  # (B, H, T), fp32
    delta_ptr,  # (B, H, T), fp32
    dqkv_ptr,  # (B, T, 3C) out, the dk and dv columns
    T,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a multiple of BLOCK_M
    PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    head, first = _place(T, BLOCK_N, False)  # early keys are seen by most: they go first
    stride = 3 * H * D
    cols = first + tl.arange(0, BLOCK_N)
    tile, tile_n = _tile(stride, BLOCK_M, D), _tile(stride, BLOCK_N, D)
    tile_y = _tile(H * D, BLOCK_M, D)
    head_ptr = _head_ptr(qkv_ptr, head, T, H, stride, D)
    do_ptr = _head_ptr(dy_ptr, head, T, H, H * D, D)
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T

    k_ptrs = head_ptr + H * D + first.to(tl.int64) * stride + tile_n
    k = _load(k_ptrs, cols[:, None], T, True)
    v = _load(k_ptrs + H * D, cols[:, None], T, True)
    qk_scale = scale * LOG2_E
    dk = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    # Masks are for the edges: the diagonal, and after it the block that T cuts, if it does.
    full = first + BLOCK_N
    cut = T // BLOCK_M * BLOCK_M
    num_diagonal = tl.cdiv(tl.minimum(full, T) - first, BLOCK_M)
    num_edges = num_diagonal + tl.where((cut >= full) & (cut < T), 1, 0)
    for after in tl.static_range(2):
        for i in range((cut - full) // BLOCK_M if after else num_edges):
            if after:
                start = (full + i * BLOCK_M).to(tl.int64)
            else:
                start = tl.where(i < num_diagonal, first + i * BLOCK_M, cut).to(tl.int64)
            # Rows past T read as zeros: P is 1 there, but dO, dP and delta are 0 and add nothing.
            rows = start.to(tl.int32) + tl.arange(0, BLOCK_M)
            q = _load(head_ptr + start * stride + tile, rows[:, None], T, not after)
            do = _load(do_ptr + start * (H * D) + tile_y, rows[:, None], T, not after)
            lse = _load(lse_ptr + rows, rows, T, not after)
            delta = _load(delta_ptr + rows, rows, T, not after)
            visible = rows[None, :] >= cols[:, None]
            dk, dv = _dkdv_step(
                dk, dv, q, do, k, v, lse, delta, visible, qk_scale, not after, PRECISION
            )
    mask = (cols < T)[:, None]
    dk_ptrs = _head_ptr(dqkv_ptr, head, T, H, stride, D) + H * D + first.to(tl.int64) * stride
    dk_ptrs += tile_n
    tl.store(dk_ptrs, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptrs + H * D, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)


@jit
def _attention_short_bwd_kernel(
    dy_ptr,  # (B, T, C)
    qkv_ptr,  # (B, T, 3C)
    y_ptr,  # (B, T, C)
    lse_ptr,  # (B, H, T), fp32
    dqkv_ptr,  # (B, T, 3C) out
    T,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # >= T
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    rows = tl.arange(0, BLOCK_M)
    tile, tile_y = _tile(3 * H * D, BLOCK_M, D), _tile(H * D, BLOCK_M, D)
    q_ptrs = _head_ptr(qkv_ptr, head, T, H, 3 * H * D, D) + tile
    y = _load(_head_ptr(y_ptr, head, T, H, H * D, D) + tile_y, rows[:, None], T, True)
    do = _load(_head_ptr(dy_ptr, head, T, H, H * D, D) + tile_y, rows[:, None], T, True)
    lse = _load(lse_ptr + head.to(tl.int64) * T + rows, rows, T, True)
    delta = tl.sum(do.to(tl.float32) * y.to(tl.float32), axis=1)
    q = _load(q_ptrs, rows[:, None], T, True)
    k = _load(q_ptrs + H * D, rows[:, None], T, True)
    v = _load(q_ptrs + 2 * H * D, rows[:, None], T, True)
    qk_scale = scale * LOG2_E
    zero = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    mask = (rows < T)[:, None]
    dq_ptrs = _head_ptr(dqkv_ptr, head, T, H, 3 * H * D, D) + tile

    # S and dP twice, as for long T: two small dots cost less than transposing registers.
    seen = rows[None, :] >= rows[:, None]
    dk, dv = _dkdv_step(zero, zero, q, do, k, v, lse, delta, seen, qk_scale, True, PRECISION)
    tl.store(dq_ptrs + 2 * H * D, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dq_ptrs + H * D, (dk * scale).to(dqkv_ptr.dtype.element_ty), mask=mask)
    visible = rows[:, None] >= rows[None, :]
    dq = _dq_step(zero, q, do, k, v, lse, delta, visible, qk_scale, True, PRECISION)
    tl.store(dq_ptrs, (dq * scale).to(dqkv_ptr.dtype.element_ty), mask=mask)


# Each with the block of the tokens that a program answers for: these are the rows of S, or of S^T.
KERNELS: dict[str, tuple[Any, str]] = {
    "fwd": (_attention_fwd_kernel, "BLOCK_M"),
    "dq": (_attention_dq_kernel, "BLOCK_M"),
    "dkdv": (_attention_dkdv_kernel, "BLOCK_N"),
    "short": (_attention_short_bwd_kernel, "BLOCK_M"),
}


def short_t(itemsize: int, D: int, arch: int) -> int:
    """Longest sequence that "short" takes; beyond it its tile spills on some arch."""
    if itemsize == 4:
        longest = 64, 32, 32, 16
    elif arch // 10 in (8, 12):  # where mma reads all its operands from registers
        longest = 128, 64, 32, 32
    else:
        longest = 128, 128, 128, 64
    return longest[HEAD_DIMS.index(D)]


def _block_t(T: int) -> int:
    return max(1 << (T - 1).bit_length(), 16)  # the least a dot takes


def launch_key(kernel: str, math: str, D: int, T: int, arch: int) -> Key:
    """The key of one of KERNELS; "short" is the backward of a head in one tile."""
    span = "T<=64" if T <= 64 else "T<2048" if T < 2048 else "T>=2048"
    size = f"T={_block_t(T)} D={D}" if kernel == "short" else f"D={D} {span}"
    return Key(f"causal_attention.{kernel}", math, size, arch)


def _launch(name: str, qkv: Tensor, n_head: int, *tensors: Tensor) -> None:
    """Run one of KERNELS on `tensors`, with a program per block, head and sequence."""
    if qkv.numel() == 0:
        return
    B, T, C3 = qkv.shape
    D, math = C3 // (3 * n_head), math_of(qkv.dtype)
    kernel, block = KERNELS[name]
    launch = launch_for(launch_key(name, math, D, T, arch(qkv.device)))
    tile = {"BLOCK_M": _block_t(T)} if name == "short" else {}
    kwargs = {"D": D, "PRECISION": precision_of(math), **tile, **launch.kwargs()}
    kernel[(cdiv(T, kwargs[block]) * B * n_head,)](*tensors, T, n_head, D**-0.5, **kwargs)


def _fwd_fake(qkv, n_head):
    B, T, C3 = qkv.shape
    return qkv.new_empty((B, T, C3 // 3)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


@register(fake=_fwd_fake)
def causal_attention_fwd(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, H, T) fp32 and base 2."""
    y, lse = _fwd_fake(qkv, n_head)
    _launch("fwd", qkv, n_head, qkv, y, lse)
    return y, lse


@register(fake=lambda dy, qkv, y, lse, n_head: torch.empty_like(qkv))
def causal_attention_bwd(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, n_head: int) -> Tensor:
    """dy, y (B, T, C), qkv (B, T, 3C), lse (B, H, T) -> dqkv (B, T, 3C)."""
    dqkv, D = torch.empty_like(qkv), qkv.shape[2] // (3 * n_head)
    if qkv.shape[1] <= short_t(qkv.element_size(), D, arch(qkv.device)):
        _launch("short", qkv, n_head, dy, qkv, y, lse, dqkv)
    else:
        delta = torch.empty_like(lse)
        _launch("dq", qkv, n_head, dy, qkv, y, lse, dqkv, delta)
        _launch("dkdv", qkv, n_head, dy, qkv, lse, delta, dqkv)
    return dqkv


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        y, lse = causal_attention_fwd(qkv, n_head)
        ctx.save_for_backward(qkv, y, lse)
        ctx.n_head = n_head
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_double_backward("causal_attention")
        qkv, y, lse = ctx.saved_tensors
        # contiguous() copies only the expanded scalar of y.sum(), never c_proj's dx.
        return causal_attention_bwd(dy.contiguous(), qkv, y, lse, ctx.n_head), None


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """Softmax attention of each token over itself and the tokens before it.

    Args:
        qkv: (B, T, 3C), contiguous, fp32 / bf16 / fp16; q, k, v side by side, each C wide, with
            heads of D = C / n_head. Under autocast it is cast to the autocast dtype.
        n_head: H; D must be one of HEAD_DIMS.
        dropout_p: must be 0; for dropout on the weights use the eager backend.

    Returns:
        (B, T, C), dtype of `qkv`. Scores, softmax and sums are fp32; in fp32 the products are TF32
        where `torch.set_float32_matmul_precision` allows it, else exact.

    Raises:
        ValueError: wrong shape, strides, dtype, head dim or device, or dropout_p > 0.
    """
    check_device("causal_attention", qkv)
    if qkv.dim() != 3 or n_head < 1 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            "causal_attention: qkv must be (B, T, 3C) with 3C a multiple of 3 * n_head = "
            f"{3 * n_head}, got {tuple(qkv.shape)}"
        )
    D = qkv.shape[2] // (3 * n_head)
    if what := unfit(D * n_head, n_head, dropout_p).get("causal_attention"):
        raise ValueError(
            f"causal_attention: triton's needs {what}; use --ops triton,causal_attention=eager"
        )
    qkv = qkv.to(autocast_dtype(qkv))
    check_tensor("causal_attention", "qkv", qkv, qkv.shape, qkv.device)
    return _CausalAttention.apply(qkv, n_head)
