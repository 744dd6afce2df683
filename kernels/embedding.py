"""Token plus position embedding and the first LayerNorm, in one pass.

Forward, for token idx[b, t]; `layer_norm.py` has the norm and its gradient:

    h = wte[idx[b, t]] + wpe[t]          y = LayerNorm(h; weight, bias)

Backward, with dh the gradient of h, through y and through the residual stream, and dtied the
gradient of the table from its use in the head:

    dwpe[t] = sum_b dh[b, t]          dwte[v] = dtied[v] + sum(dh[b, t] where idx[b, t] = v)

The table is also an output, which the head uses. So autograd delivers dtied here, and the rows of
dh are added into a copy of it, which saves adding two gradients of the table. Adding in place would
save the copy, but autograd does not say who else holds that gradient.

Rows of a token are adjacent once tokens are sorted. A program owns ROWS sorted rows, sums those of
each token and writes the sum to the table. If the token begins in an earlier block, the sum is
carried as a separate row, and the same kernel sums the carried rows. So one frequent token takes no
longer than many rare ones.

Memory-bound. Bytes at M = 65536 tokens, C = 768, Vp = 50304, stream fp32, y bf16, 15,000 distinct
tokens: forward 0.35 GB (46 MB of wte read, h and y written); backward 1.53 GB (LayerNorm 0.70, dh
read twice more, 0.31 for the copy, 0.12 for rows of the table and carried ones). Separate ops move
0.95 and 2.18 GB. Counted by hand, without the bytes of sorting.

Deterministic: the sort is stable, sums have a fixed order. No atomics; reruns are bitwise equal.

Source: Radford et al. 2019 for the op.
"""

# static_range is a loop, which the triton stubs do not know.
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._launch import Key, arch, cdiv, launch_for
from ._op import FLOATS, check_device, check_tensor, refuse_double_backward, register
from .layer_norm import MAX_C, _normalise, _tile, layer_norm_bwd, row_launch
from .reference import check_ids


def launch_key(kernel: str, C: int, dtype: torch.dtype, arch: int) -> Key:
    """The key of a launch on rows of `dtype`; `kernel` is "fwd" or "sums"."""
    math = "fp32" if dtype == torch.float32 else "16-bit"
    return Key(f"embedding.{kernel}", math, f"C={C}", arch)


@jit
def _embedding_fwd_kernel(
    idx_ptr,  # (M,) int64
    wte_ptr,  # (Vp, C)
    wpe_ptr,  # (T, C), dtype of wte
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (M, C) out
    h_ptr,  # (M, C) out
    stats_ptr,  # (2, M) out, fp32: mean, rstd
    M,
    T,
    Vp,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    position = (rows % T).to(tl.int64)
    rows = rows.to(tl.int64)  # M * C may pass 2^31
    token = tl.load(idx_ptr + rows, mask=rows < M, other=0)
    known = (token >= 0) & (token < Vp)  # no address comes from other ids; their rows are NaN
    h = ()
    for i in tl.static_range(CHUNKS):
        at, mask = _tile(rows, M, i, C, BLOCK_C)
        cols = at - rows * C
        wte = tl.load(wte_ptr + token * C + cols, mask=mask & known, other=0.0).to(tl.float32)
        wpe = tl.load(wpe_ptr + position * C + cols, mask=mask, other=0.0).to(tl.float32)
        stored = tl.where(known, wte + wpe, float("nan")).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, stored, mask=mask)
        h += (stored.to(tl.float32),)  # normalise what the backward will read
    _normalise(h, rows, weight_ptr, bias_ptr, y_ptr, stats_ptr, M, eps, C, ROWS, BLOCK_C, CHUNKS)


@jit
def _embedding_sums_kernel(
    d_ptr,  # (N, C), in any order
    order_ptr,  # (N,) int64: the i-th row in the order of tokens is row order[i] of d; or None: i
    ids_ptr,  # int64, ascending: the token of the i-th row is at i * stride
    dwte_ptr,  # (Vp, C) fp32, in and out
    carry_ptr,  # (programs, C) out, fp32: sum of the first rows, where their token began earlier
    N,
    stride,
    Vp,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * ROWS
    at = first + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    ids = tl.load(ids_ptr + at * stride, mask=at < N, other=-1)
    row = at if order_ptr is None else tl.load(order_ptr + at, mask=at < N, other=0)
    d = tl.load(d_ptr + row * C + cols, mask=(at < N) & (cols < C), other=0.0).to(tl.float32)

    previous = tl.load(ids_ptr + (first - 1) * stride, mask=first > 0, other=-1)
    carry = tl.sum(tl.where(ids == previous, d, 0.0), axis=0, keep_dims=True)
    tl.store(carry_ptr + block * C + cols, carry, mask=cols < C)  # 0 where no token began earlier
    for i in range(first, first + ROWS):
        token = tl.load(ids_ptr + i * stride, mask=i < N, other=-1)
        if (token != previous) & (token >= 0) & (token < Vp):
            total = tl.sum(tl.where(ids == token, d, 0.0), axis=0, keep_dims=True)
            ptrs = dwte_ptr + token * C + cols
            tl.store(ptrs, tl.load(ptrs, mask=cols < C, other=0.0) + total, mask=cols < C)
        previous = token


def _fwd_fake(idx, wte, wpe, weight, bias, eps, dtype, residual_dtype):
    shape = (*idx.shape, wte.shape[1])
    y, h = (wte.new_empty(shape, dtype=d) for d in (dtype, residual_dtype))
    return y, h, wte.new_empty((2, *idx.shape), dtype=torch.float32)


@register(fake=_fwd_fake)
def embedding_fwd(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (B, T, C) in `dtype`, h (B, T, C) in `residual_dtype`, stats (2, B, T) fp32."""
    (Vp, C), T = wte.shape, len(wpe)
    check_ids("embedding: idx", idx, Vp)
    out = _fwd_fake(idx, wte, wpe, weight, bias, eps, dtype, residual_dtype)
    key = launch_key("fwd", C, residual_dtype, arch(wte.device))
    _, kwargs = row_launch(key, C, residual_dtype)
    if M := idx.numel():
        _embedding_fwd_kernel[(cdiv(M, kwargs["ROWS"]),)](
            idx, wte, wpe, weight, bias, *out, M, T, Vp, eps, **kwargs
        )
    return out


@register(fake=lambda idx, dh, dtied: (torch.empty_like(dtied), dtied.new_empty(dh.shape[1:])))
def embedding_bwd(idx: Tensor, dh: Tensor, dtied: Tensor) -> tuple[Tensor, Tensor]:
    """idx (B, T), dh (B, T, C), dtied (Vp, C) -> dwte (Vp, C), dwpe (T, C), in dtied's dtype."""
    Vp, C = dtied.shape
    dwte = dtied.to(torch.float32, copy=True)
    ids, order = torch.sort(idx.flatten(), stable=True)
    kwargs = launch_for(launch_key("sums", C, dh.dtype, arch(dh.device))).kwargs()
    d, N, stride = dh, len(ids), 1
    while N:
        programs = cdiv(N, kwargs["ROWS"])
        carry = dwte.new_empty((programs, C))
        _embedding_sums_kernel[(programs, cdiv(C, kwargs["BLOCK_C"]))](
            d, order if stride == 1 else None, ids, dwte, carry, N, stride, Vp, C=C, **kwargs
        )
        # The first block carries nothing.
        d, N, stride = carry, programs if programs > 1 else 0, stride * kwargs["ROWS"]
    return dwte.to(dtied.dtype), dh.sum(0, dtype=dtied.dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, idx, wte, wpe, weight, bias, eps, dtype, residual_dtype):
        y, h, stats = embedding_fwd(idx, wte, wpe, weight, bias, eps, dtype, residual_dtype)
        ctx.save_for_backward(idx, h, weight, stats)
        return y, h, wte.view_as(wte)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor, dtied: Tensor):
        refuse_double_backward("embedding")
        idx, h, weight, stats = ctx.saved_tensors
        dh, _, dweight, dbias = layer_norm_bwd(
            dy.contiguous(), dh.contiguous(), h, weight, stats, h.dtype
        )
        dwte, dwpe = embedding_bwd(idx, dh, dtied.contiguous())
        return None, dwte, dwpe, dweight, dbias, None, None, None


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual stream of some tokens, its LayerNorm, and the table for a head that shares it.

    Args:
        idx: (B, T), contiguous, int64, each in [0, Vp).
        wte: (Vp, C), contiguous, fp32 / fp16 / bf16, C <= MAX_C.
        wpe: (T, C), contiguous, dtype of `wte`: the rows of the tokens' positions.
        weight, bias: (C,), one dtype, any of the three.
        eps: Added to the variance.
        residual_dtype: Dtype of the stream, any of the three; None is the dtype of `wte`.

    Returns:
        y = LayerNorm(residual), (B, T, C), in the autocast dtype under autocast, else that of
        residual; residual = wte[idx] + wpe, (B, T, C); and `wte` for the head, whose gradient of it
        then arrives here and is added to. On CUDA, where a check would cost a sync, an
        id outside [0, Vp) makes its row NaN.

    Raises:
        ValueError: wrong shape, dtype, device or strides, or, on the CPU, an id outside [0, Vp).
    """
    check_device("embedding", wte)
    (Vp, C), op, at = (wte.shape if wte.dim() == 2 else (0, 0)), "embedding", wte.device
    if not 1 <= C <= MAX_C:
        raise ValueError(
            f"embedding: wte must be (Vp, C) with 1 to {MAX_C} columns, got {tuple(wte.shape)}; "
            "use the eager backend for others"
        )
    if idx.dim() != 2:
        raise ValueError(f"embedding: idx must be (B, T), got {tuple(idx.shape)}")
    check_tensor(op, "idx", idx, idx.shape, at, (torch.int64,))
    check_tensor(op, "wte", wte, (Vp, C), at)
    check_tensor(op, "wpe", wpe, (idx.shape[1], C), at, (wte.dtype,))
    check_tensor(op, "weight", weight, (C,), at)
    check_tensor(op, "bias", bias, (C,), at, (weight.dtype,))
    h_dtype = residual_dtype or wte.dtype
    if h_dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise ValueError(f"embedding: residual_dtype must be one of {known}, got {h_dtype}")
    dtype = torch.get_autocast_dtype(at.type) if torch.is_autocast_enabled(at.type) else h_dtype
    return _Embedding.apply(idx, wte, wpe, weight, bias, eps, dtype, h_dtype)
