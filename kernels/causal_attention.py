"""Causal self-attention on packed qkv, forward and backward: nothing is split, copied or joined.

qkv (B, T, 3C) as one projection writes it: q, k, v of head h stand at columns h*D, C + h*D and
2C + h*D, C = H*D. Forward, for each head, with scale = 1 / sqrt(D):

    S = scale * q k^T, for keys <= query          lse_i = log2(sum_j 2^(S_ij * log2(e)))
    P_ij = 2^(S_ij * log2(e) - lse_i)             y = P v

Backward, with dO the gradient of y:

    delta_i = sum_d dO_id y_id        dP = dO v^T         dS = P * (dP - delta)
    dq = scale * dS k                 dk = scale * dS^T q               dv = P^T dO

S never leaves the chip: the forward walks the keys once with an online softmax (running row
maximum and sum) and saves lse alone, in fp32 and base 2; the backward recomputes P from it. Every
loop kernel takes its masked blocks first, then the blocks that need no mask.

Bound: matrix units from T of a few hundred on, bytes below. Flops, halved for causality: forward
2 B H T^2 D; backward 5 B H T^2 D useful, 7 executed, as S and dP are computed by both launches.
Bytes per token and C, in elements: forward reads 3 and writes 1; dq reads 5 (q, k, v, y, dO) and
writes 1; dk/dv reads 4 and writes 2; k and v (q and dO there) are re-read from L2 by each block.

Backward launches: dq by query blocks, which computes delta on the way, then dk/dv by key blocks.
The second works on S^T = k q^T, so P^T and dS^T leave the dot in the orientation the next one
reads and no tile is transposed in registers (wrong results on Hopper before Triton 3.7.1, fla-org
issue 826). Nothing is summed across programs: no atomics, no fp32 dq buffer, bitwise equal reruns.
Up to SHORT_T (128 in 16 bits at D = 64) a head is one tile: no loop, one launch a direction. At
T = 64 a warp then runs 756 + 1,231 instructions, forward + backward, where the loops over 64x64
tiles run at least 880 + 1,773, and the backward moves 8 instead of 12 elements per token and C
(bf16, compiled for sm_90 with triton 3.7.1).

Source: Dao 2023, https://arxiv.org/abs/2307.08691; delta inside dq saves its separate pass there.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import HEAD_DIMS, unfit
from ._aot import AotCase, aot_case
from ._jit import jit
from ._launch import Key, arch, candidates_for, cdiv, launch_for, math_of, next_pow2, precision_of
from ._op import check_device, needs_grad, refuse_double_backward, register
from .reference import autocast_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two


@jit
def _qkv_base(qkv_ptr, head, T, H, D: tl.constexpr):
    """Where q of one head starts in packed (B, T, 3C), head = b * H + h."""
    return qkv_ptr + (head // H).to(tl.int64) * T * (3 * H * D) + (head % H) * D


@jit
def _y_base(y_ptr, head, T, H, D: tl.constexpr):
    """Where one head starts in (B, T, C)."""
    return y_ptr + (head // H).to(tl.int64) * T * (H * D) + (head % H) * D


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
def _load_tile(ptrs, rows, T, MASKED: tl.constexpr):
    """A (rows, D) tile; with MASKED, rows from T on read as zeros."""
    if MASKED:
        return tl.load(ptrs, mask=(rows < T)[:, None], other=0.0)
    return tl.load(ptrs)


@jit
def _attend(
    q,  # (BLOCK_M, D)
    k_ptrs,  # (BLOCK_N, D) pointers
    v_ptrs,  # (BLOCK_N, D) pointers
    acc,  # (BLOCK_M, D), y before the division
    row_max,  # (BLOCK_M,), of S * log2(e)
    row_sum,  # (BLOCK_M,)
    rows,  # (BLOCK_M,)
    cols,  # (BLOCK_N,)
    T,
    qk_scale,
    DIAGONAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One step of the online softmax; off the diagonal every key is real and visible."""
    k = _load_tile(k_ptrs, cols, T, DIAGONAL)
    s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    if DIAGONAL:
        s = tl.where(rows[:, None] >= cols[None, :], s, float("-inf"))
    # Never -inf - -inf: the block that comes first holds a key that every row sees.
    new_max = tl.maximum(row_max, tl.max(s, axis=1) * qk_scale)
    p = tl.exp2(s * qk_scale - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    row_sum = row_sum * alpha + tl.sum(p, axis=1)
    v = _load_tile(v_ptrs, cols, T, DIAGONAL)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=INPUT_PRECISION)
    return acc, new_max, row_sum


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
    STORE_LSE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)  # the unmasked blocks end where the diagonal begins
    # Late queries see the most keys: starting them first keeps the last wave short.
    head, first = _place(T, BLOCK_M, True)
    stride = 3 * H * D
    rows = first + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    # Block starts are 64-bit scalars: with the offsets inside a block no address overflows.
    tile_m, tile_n = _tile(stride, BLOCK_M, D), _tile(stride, BLOCK_N, D)
    q_ptr = _qkv_base(qkv_ptr, head, T, H, D)
    kv_ptr = q_ptr + H * D  # k of the block at hand, v is H * D further

    q_ptr += first.to(tl.int64) * stride
    q = tl.load(q_ptr + tile_m, mask=(rows < T)[:, None], other=0.0)
    qk_scale = scale * LOG2_E
    acc = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # The diagonal comes first. Every row sees key `first`, so its maximum is finite from there on;
    # and with the diagonal last, ptxas serialises the WGMMA of a third stage (C7515, compiled for
    # sm_90 with triton 3.6.0 and 3.7.1).
    diagonal_ptr = kv_ptr + first.to(tl.int64) * stride
    for start in range(first, tl.minimum(first + BLOCK_M, T), BLOCK_N):
        acc, row_max, row_sum = _attend(
            q, diagonal_ptr + tile_n, diagonal_ptr + H * D + tile_n, acc, row_max, row_sum, rows,
            start + cols, T, qk_scale, True, INPUT_PRECISION,
        )  # fmt: skip
        diagonal_ptr += BLOCK_N * stride
    for _ in range(0, first, BLOCK_N):
        acc, row_max, row_sum = _attend(
            q, kv_ptr + tile_n, kv_ptr + H * D + tile_n, acc, row_max, row_sum, rows, cols, T,
            qk_scale, False, INPUT_PRECISION,
        )  # fmt: skip
        kv_ptr += BLOCK_N * stride

    y = acc / row_sum[:, None]
    y_ptr = _y_base(y_ptr, head, T, H, D) + first.to(tl.int64) * (H * D)
    tile_y = _tile(H * D, BLOCK_M, D)
    tl.store(y_ptr + tile_y, y.to(y_ptr.dtype.element_ty), mask=(rows < T)[:, None])
    if STORE_LSE:
        lse = row_max + tl.log2(row_sum)
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < T)


@jit
def _dq_step(
    q,  # (BLOCK_M, D)
    do,  # (BLOCK_M, D)
    k_ptrs,  # (BLOCK_N, D) pointers
    v_ptrs,  # (BLOCK_N, D) pointers
    lse,  # (BLOCK_M,)
    delta,  # (BLOCK_M,)
    dq,  # (BLOCK_M, D)
    rows,  # (BLOCK_M,)
    cols,  # (BLOCK_N,)
    T,
    qk_scale,
    DIAGONAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dq of one query block += dS k of one key block."""
    k = _load_tile(k_ptrs, cols, T, DIAGONAL)
    v = _load_tile(v_ptrs, cols, T, DIAGONAL)
    s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    p = tl.exp2(s * qk_scale - lse[:, None])
    if DIAGONAL:
        p = tl.where(rows[:, None] >= cols[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=INPUT_PRECISION)


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
    INPUT_PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    head, first = _place(T, BLOCK_M, True)
    stride = 3 * H * D
    rows = first + tl.arange(0, BLOCK_M)
    mask = (rows < T)[:, None]
    cols = tl.arange(0, BLOCK_N)
    tile_m, tile_n = _tile(stride, BLOCK_M, D), _tile(stride, BLOCK_N, D)
    tile_y = _tile(H * D, BLOCK_M, D)
    row_start = first.to(tl.int64)
    q_ptr = _qkv_base(qkv_ptr, head, T, H, D)
    kv_ptr = q_ptr + H * D

    y_start = row_start * (H * D)
    y = tl.load(_y_base(y_ptr, head, T, H, D) + y_start + tile_y, mask=mask, other=0.0)
    do = tl.load(_y_base(dy_ptr, head, T, H, D) + y_start + tile_y, mask=mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * y.to(tl.float32), axis=1)
    stat = head.to(tl.int64) * T + rows
    tl.store(delta_ptr + stat, delta, mask=rows < T)
    lse = tl.load(lse_ptr + stat, mask=rows < T, other=0.0)
    q = tl.load(q_ptr + row_start * stride + tile_m, mask=mask, other=0.0)
    qk_scale = scale * LOG2_E
    dq = tl.zeros((BLOCK_M, D), dtype=tl.float32)
    # The diagonal first, as in the forward. In 16 bits LLVM must not move work out of these loops
    # (disable_licm): with three stages the kernel would take 163 registers instead of 126, and one
    # program would fit on an SM instead of two (D = 64, sm_90). In exact fp32 it must: otherwise
    # 108 registers become 255, and spill. Both from compiling with triton 3.6.0.
    NARROW: tl.constexpr = qkv_ptr.dtype.element_ty != tl.float32
    diagonal_ptr = kv_ptr + row_start * stride
    last = tl.minimum(first + BLOCK_M, T)
    for start in tl.range(first, last, BLOCK_N, disable_licm=NARROW):
        dq = _dq_step(
            q, do, diagonal_ptr + tile_n, diagonal_ptr + H * D + tile_n, lse, delta, dq, rows,
            start + cols, T, qk_scale, True, INPUT_PRECISION,
        )  # fmt: skip
        diagonal_ptr += BLOCK_N * stride
    for _ in tl.range(0, first, BLOCK_N, disable_licm=NARROW):
        dq = _dq_step(
            q, do, kv_ptr + tile_n, kv_ptr + H * D + tile_n, lse, delta, dq, rows, cols, T,
            qk_scale, False, INPUT_PRECISION,
        )  # fmt: skip
        kv_ptr += BLOCK_N * stride
    dq_ptr = _qkv_base(dqkv_ptr, head, T, H, D) + row_start * stride
    tl.store(dq_ptr + tile_m, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@jit
def _dkdv_step(
    k,  # (BLOCK_N, D)
    v,  # (BLOCK_N, D)
    q_ptrs,  # (BLOCK_M, D) pointers
    do_ptrs,  # (BLOCK_M, D) pointers
    lse_ptrs,  # (BLOCK_M,) pointers
    delta_ptrs,  # (BLOCK_M,) pointers
    dk,  # (BLOCK_N, D)
    dv,  # (BLOCK_N, D)
    rows,  # (BLOCK_M,)
    cols,  # (BLOCK_N,)
    T,
    qk_scale,
    EDGE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """dk, dv of one key block += dS^T q, P^T dO of one query block."""
    # Rows past T read as zeros: P is 1 there, but dO, dP and delta are 0 and add nothing.
    q = _load_tile(q_ptrs, rows, T, EDGE)
    do = _load_tile(do_ptrs, rows, T, EDGE)
    if EDGE:
        lse = tl.load(lse_ptrs, mask=rows < T, other=0.0)
        delta = tl.load(delta_ptrs, mask=rows < T, other=0.0)
    else:
        lse = tl.load(lse_ptrs)
        delta = tl.load(delta_ptrs)
    st = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
    pt = tl.exp2(st * qk_scale - lse[None, :])
    if EDGE:
        pt = tl.where(rows[None, :] >= cols[:, None], pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=INPUT_PRECISION)
    dpt = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
    dst = pt * (dpt - delta[None, :])
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=INPUT_PRECISION)
    return dk, dv


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
    INPUT_PRECISION: tl.constexpr,
):
    tl.static_assert(BLOCK_N % BLOCK_M == 0)
    head, first = _place(T, BLOCK_N, False)  # early keys are seen by most: they go first
    stride = 3 * H * D
    rows = tl.arange(0, BLOCK_M)
    cols = first + tl.arange(0, BLOCK_N)
    mask = (cols < T)[:, None]
    tile_m, tile_n = _tile(stride, BLOCK_M, D), _tile(stride, BLOCK_N, D)
    tile_y = _tile(H * D, BLOCK_M, D)
    q_ptr = _qkv_base(qkv_ptr, head, T, H, D)
    do_ptr = _y_base(dy_ptr, head, T, H, D)
    lse_ptr += head.to(tl.int64) * T
    delta_ptr += head.to(tl.int64) * T

    kv_start = first.to(tl.int64) * stride
    k = tl.load(q_ptr + H * D + kv_start + tile_n, mask=mask, other=0.0)
    v = tl.load(q_ptr + 2 * H * D + kv_start + tile_n, mask=mask, other=0.0)
    qk_scale = scale * LOG2_E
    dk = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, D), dtype=tl.float32)
    # Masks are for the edges: the diagonal, and after it the block that T cuts, if it does.
    full = first + BLOCK_N
    cut = T // BLOCK_M * BLOCK_M
    num_diagonal = tl.cdiv(tl.minimum(full, T) - first, BLOCK_M)
    num_edges = num_diagonal + tl.where((cut >= full) & (cut < T), 1, 0)
    for i in range(num_edges):
        start = tl.where(i < num_diagonal, first + i * BLOCK_M, cut).to(tl.int64)
        dk, dv = _dkdv_step(
            k, v, q_ptr + start * stride + tile_m, do_ptr + start * (H * D) + tile_y,
            lse_ptr + start + rows, delta_ptr + start + rows, dk, dv, start.to(tl.int32) + rows,
            cols, T, qk_scale, True, INPUT_PRECISION,
        )  # fmt: skip
    q_ptr += full.to(tl.int64) * stride
    do_ptr += full.to(tl.int64) * (H * D)
    lse_ptr += full
    delta_ptr += full
    for _ in range(full, cut, BLOCK_M):
        dk, dv = _dkdv_step(
            k, v, q_ptr + tile_m, do_ptr + tile_y, lse_ptr + rows, delta_ptr + rows, dk, dv,
            rows, cols, T, qk_scale, False, INPUT_PRECISION,
        )  # fmt: skip
        q_ptr += BLOCK_M * stride
        do_ptr += BLOCK_M * H * D
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
    dk_ptr = _qkv_base(dqkv_ptr, head, T, H, D) + H * D + kv_start
    tl.store(dk_ptr + tile_n, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptr + H * D + tile_n, dv.to(dk_ptr.dtype.element_ty), mask=mask)


@jit
def _attention_short_fwd_kernel(
    qkv_ptr,  # (B, T, 3C)
    y_ptr,  # (B, T, C) out
    lse_ptr,  # (B, H, T) out, fp32
    T,
    H,
    scale,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,  # >= T
    STORE_LSE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    rows = tl.arange(0, BLOCK_T)
    mask = (rows < T)[:, None]
    dims = tl.arange(0, D)[None, :]
    q_ptrs = _qkv_base(qkv_ptr, head, T, H, D) + rows[:, None] * (3 * H * D) + dims
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    k = tl.load(q_ptrs + H * D, mask=mask, other=0.0)
    v = tl.load(q_ptrs + 2 * H * D, mask=mask, other=0.0)

    s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * (scale * LOG2_E)
    s = tl.where(rows[:, None] >= rows[None, :], s, float("-inf"))
    row_max = tl.max(s, axis=1)
    p = tl.exp2(s - row_max[:, None])
    row_sum = tl.sum(p, axis=1)
    y = tl.dot(p.to(v.dtype), v, input_precision=INPUT_PRECISION) / row_sum[:, None]
    y_ptrs = _y_base(y_ptr, head, T, H, D) + rows[:, None] * (H * D) + dims
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    if STORE_LSE:
        lse = row_max + tl.log2(row_sum)
        tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=rows < T)


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
    BLOCK_T: tl.constexpr,  # >= T
    INPUT_PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    rows = tl.arange(0, BLOCK_T)
    mask = (rows < T)[:, None]
    tile, tile_y = _tile(3 * H * D, BLOCK_T, D), _tile(H * D, BLOCK_T, D)
    q_ptrs = _qkv_base(qkv_ptr, head, T, H, D) + tile
    y = tl.load(_y_base(y_ptr, head, T, H, D) + tile_y, mask=mask, other=0.0)
    do = tl.load(_y_base(dy_ptr, head, T, H, D) + tile_y, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * T + rows, mask=rows < T, other=0.0)
    delta = tl.sum(do.to(tl.float32) * y.to(tl.float32), axis=1)
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    k = tl.load(q_ptrs + H * D, mask=mask, other=0.0)
    v = tl.load(q_ptrs + 2 * H * D, mask=mask, other=0.0)
    dq_ptrs = _qkv_base(dqkv_ptr, head, T, H, D) + tile
    qk_scale = scale * LOG2_E

    # S and dP twice, as in the long case: two small dots cost less than transposing registers.
    st = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
    pt = tl.exp2(st * qk_scale - lse[None, :])
    pt = tl.where(rows[None, :] >= rows[:, None], pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, input_precision=INPUT_PRECISION)
    tl.store(dq_ptrs + 2 * H * D, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)
    dpt = tl.dot(v, tl.trans(do), input_precision=INPUT_PRECISION)
    dst = pt * (dpt - delta[None, :])
    dk = tl.dot(dst.to(q.dtype), q, input_precision=INPUT_PRECISION) * scale
    tl.store(dq_ptrs + H * D, dk.to(dqkv_ptr.dtype.element_ty), mask=mask)

    s = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    p = tl.exp2(s * qk_scale - lse[:, None])
    p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=INPUT_PRECISION)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, input_precision=INPUT_PRECISION) * scale
    tl.store(dq_ptrs, dq.to(dqkv_ptr.dtype.element_ty), mask=mask)


# Longest sequence whose head is one tile, by direction, bytes an element and D. Beyond it the tile
# spills on some arch, and the loops take over.
SHORT_T = {
    ("fwd", 2, 16): 128, ("fwd", 2, 32): 128, ("fwd", 2, 64): 128, ("fwd", 2, 128): 64,
    ("fwd", 4, 16): 64, ("fwd", 4, 32): 64, ("fwd", 4, 64): 32, ("fwd", 4, 128): 16,
    ("bwd", 2, 16): 128, ("bwd", 2, 32): 128, ("bwd", 2, 64): 128, ("bwd", 2, 128): 64,
    ("bwd", 4, 16): 64, ("bwd", 4, 32): 32, ("bwd", 4, 64): 32, ("bwd", 4, 128): 16,
}  # fmt: skip
# Less where mma reads all its operands from registers: sm_80 to 89, and sm_120.
MMA_SYNC_SHORT_T = {("bwd", 2, 32): 64, ("bwd", 2, 64): 32, ("bwd", 2, 128): 32}


def launch_key(kernel: str, math: str, D: int, T: int, arch: int) -> Key:
    """The key of "fwd", "dq", "dkdv", or of "short": both directions of a head in one tile."""
    loop = f"D={D} {'T>=2048' if T >= 2048 else 'T<2048'}"
    size = f"T={_block_t(T)} D={D}" if kernel == "short" else loop
    return Key(f"causal_attention.{kernel}", math, size, arch)


def _block_t(T: int) -> int:
    """Rows of the tile that holds a head."""
    return max(next_pow2(T), 16)  # the least a dot takes


def short_t(direction: str, itemsize: int, D: int, arch: int) -> int:
    known = SHORT_T | MMA_SYNC_SHORT_T if arch // 10 in (8, 12) else SHORT_T
    return known[direction, itemsize, D]


def _is_short(direction: str, qkv: Tensor, n_head: int) -> bool:
    """Whether one tile holds a head."""
    D = qkv.shape[2] // (3 * n_head)
    return qkv.shape[1] <= short_t(direction, qkv.element_size(), D, arch(qkv.device))


def _own_block(kernel: str) -> str:
    """The block of the tokens that a program answers for; these are the rows of S, or of S^T."""
    return {"short": "BLOCK_T", "dkdv": "BLOCK_N"}.get(kernel, "BLOCK_M")


def _fixed(kernel: str, math: str, D: int, T: int) -> dict[str, Any]:
    """The constexprs that a launch leaves open."""
    tile = {"BLOCK_T": _block_t(T)} if kernel == "short" else {}
    return {"D": D, "INPUT_PRECISION": precision_of(math), **tile}


def _plan(kernel: str, qkv: Tensor, n_head: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and keyword arguments of one launch."""
    B, T, C3 = qkv.shape
    D, math = C3 // (3 * n_head), math_of(qkv.dtype)
    launch = launch_for(launch_key(kernel, math, D, T, arch(qkv.device)))
    kwargs = {**_fixed(kernel, math, D, T), **launch.kwargs()}
    return (cdiv(T, kwargs[_own_block(kernel)]) * B * n_head,), kwargs


def _fwd_fake(qkv: Tensor, n_head: int, save_lse: bool) -> tuple[Tensor, Tensor]:
    B, T, C3 = qkv.shape
    lse_shape = (B, n_head, T) if save_lse else (0,)
    return qkv.new_empty((B, T, C3 // 3)), qkv.new_empty(lse_shape, dtype=torch.float32)


@register(fake=_fwd_fake)
def causal_attention_fwd(qkv: Tensor, n_head: int, save_lse: bool) -> tuple[Tensor, Tensor]:
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, H, T) fp32 and base 2, (0,) unless save_lse."""
    y, lse = _fwd_fake(qkv, n_head, save_lse)
    if qkv.numel() == 0:
        return y, lse
    short = _is_short("fwd", qkv, n_head)
    kernel = _attention_short_fwd_kernel if short else _attention_fwd_kernel
    grid, constexprs = _plan("short" if short else "fwd", qkv, n_head)
    scale = constexprs["D"] ** -0.5
    kernel[grid](qkv, y, lse, qkv.shape[1], n_head, scale, STORE_LSE=save_lse, **constexprs)
    return y, lse


def _bwd_fake(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, n_head: int) -> Tensor:
    return torch.empty_like(qkv)


@register(fake=_bwd_fake)
def causal_attention_bwd(dy: Tensor, qkv: Tensor, y: Tensor, lse: Tensor, n_head: int) -> Tensor:
    """dy, y (B, T, C), qkv (B, T, 3C), lse (B, H, T) -> dqkv (B, T, 3C)."""
    dqkv = torch.empty_like(qkv)
    if qkv.numel() == 0:
        return dqkv
    T, scale = qkv.shape[1], (y.shape[2] // n_head) ** -0.5
    if _is_short("bwd", qkv, n_head):
        grid, constexprs = _plan("short", qkv, n_head)
        _attention_short_bwd_kernel[grid](
            dy, qkv, y, lse, dqkv, T, n_head, scale, **constexprs
        )  # fmt: skip
        return dqkv
    delta = torch.empty_like(lse)
    grid, constexprs = _plan("dq", qkv, n_head)
    _attention_dq_kernel[grid](dy, qkv, y, lse, dqkv, delta, T, n_head, scale, **constexprs)
    grid, constexprs = _plan("dkdv", qkv, n_head)
    _attention_dkdv_kernel[grid](dy, qkv, lse, delta, dqkv, T, n_head, scale, **constexprs)
    return dqkv


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int) -> Tensor:
        y, lse = causal_attention_fwd(qkv, n_head, True)
        ctx.save_for_backward(qkv, y, lse)
        ctx.n_head = n_head
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_double_backward("causal_attention")
        qkv, y, lse = ctx.saved_tensors
        # contiguous() copies only what is not: the expanded scalar of y.sum(), never c_proj's dx.
        return causal_attention_bwd(dy.contiguous(), qkv, y, lse, ctx.n_head), None


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """Softmax attention of each token over itself and the tokens before it.

    Args:
        qkv: (B, T, 3C), contiguous, fp32 / bf16 / fp16; q, k, v beside each other, each C wide
            and each head D = C / n_head of it. Under autocast it is cast to the autocast dtype.
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
    if not qkv.is_contiguous():
        raise ValueError(f"causal_attention: qkv must be contiguous, got strides {qkv.stride()}")
    qkv = qkv.to(autocast_dtype(qkv))
    if qkv.dtype not in DTYPES:
        raise ValueError(f"causal_attention: qkv must be one of {DTYPES}, got {qkv.dtype}")
    if needs_grad(qkv):
        return _CausalAttention.apply(qkv, n_head)
    return causal_attention_fwd(qkv, n_head, False)[0]


def aot_cases(arch: int) -> Iterator[AotCase]:
    """Builds the launches above choose on `arch`, and candidates: not all, as each takes long."""
    kernels = {
        "fwd": _attention_fwd_kernel, "dq": _attention_dq_kernel, "dkdv": _attention_dkdv_kernel,
        "short fwd": _attention_short_fwd_kernel, "short bwd": _attention_short_bwd_kernel,
    }  # fmt: skip
    builds = [("bf16", 2, "16-bit", D) for D in HEAD_DIMS]
    builds += [("fp32", 4, "tf32", 64), ("fp32", 4, "ieee", 64)]
    if arch not in (80, 90, 100):  # which have rows of their own
        builds = builds[2:4]
    for name, (dtype, itemsize, math, D) in product(kernels, builds):
        which, _, direction = name.partition(" ")
        longest = short_t(direction, itemsize, D, arch) if direction else 1024
        for T in sorted({min(64, longest), longest}) if direction else (longest,):
            key = launch_key(which, math, D, T, arch)
            for launch in (launch_for(key), *candidates_for(key)):
                fixed = _fixed(which, math, D, T)
                sizes = (fixed | dict(launch.blocks)).items()
                blocks = " ".join(f"{k[6:]}{size}" for k, size in sizes if k[:6] == "BLOCK_")
                yield aot_case(
                    "causal_attention", kernels[name],
                    f"{name} D={D} {'tf32' if math == 'tf32' else dtype} {blocks}", launch, dtype,
                    {**fixed, "STORE_LSE": True}, mma="" if math == "ieee" else _own_block(which),
                    unaligned=("T", "H"),
                )  # fmt: skip
