"""LM head and cross-entropy in one op; the logits never all exist at once.

Forward, over the N rows whose target t is not `ignore_index`, with V of the weight's Vp rows real:

    z = x @ weight[:V]^T        lse = log(sum_v exp(z_v))        loss = sum_rows(lse - z_t) / N

Backward, computed in the forward while the logits of a chunk exist:

    dz = (exp(z - lse) - onehot(t)) * dloss / N        dx = dz @ weight        dweight = dz^T @ x

Per chunk of rows: (1) cuBLAS computes z in x's dtype; (2) a program per row reads it with an online
maximum and sum of exponentials and, for gradients, reads it again and overwrites it with dz; (3)
two cuBLAS GEMMs compute dx and dweight, which accumulates in fp32 over the chunks. Chunks
of the vocabulary instead of tokens would need z a second time, which is a fourth GEMM.

Loss and gradients are those of z as stored, so exp(z - lse) sums to one over what is read. dz, dx
and dweight lack the factor dloss / N until the backward multiplies dx and dweight by it in fp32:
dloss is not yet known, and dz / N would underflow in fp16.

Bound by the tensor cores. At M = 65536, C = 768, Vp = 50304, bf16: three GEMMs of 5.06 TFLOP; z is
written, read, overwritten and read twice, 6.6 GB each time, in chunks of at most CHUNK_BYTES; the
weight (0.08 GB) is read and dweight (0.15 GB, fp32) read and written once per chunk. The row kernel
is memory-bound, 13.2 GB. What it reads again, 0.1 MB per row, is still in a cache, and its 16
instructions per element (sm_90, compile-only), two of them exponentials, take some 60% of the
time of its bytes. No atomics: reruns are bitwise equal. No host sync: a CUDA graph can hold the op.

Source: chunks of tokens with gradients in the forward: Liger-Kernel, https://arxiv.org/abs/2410.10989
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._launch import Key, arch, cdiv, launch_for
from ._op import check_device, check_tensor, needs_grad, refuse_double_backward, register
from .reference import autocast_dtype, check_ids

LOG2E = tl.constexpr(1.4426950408889634)
# Bytes of logits at a time. At GPT-2's shape in bf16 this gives 4 chunks of 16384 rows, whose
# dx, 384 tiles of 128 x 256, fills 132 SMs three times. Two chunks would save 0.6 GB of the 40 that
# a call moves, but take 1.6 GB more memory. It is a constant, because the order in which dweight is
# summed must not depend on a card's memory.
CHUNK_BYTES = 1 << 31


@jit
def _load_lanes(z_ptrs, cols, inside, V, stride, CUT: tl.constexpr):
    """fp32 z of rows at `cols`; where V cuts the block, -inf from there on."""
    mask = inside & (cols < stride) if CUT else inside  # at V it would cut loads of 16 bytes
    z = tl.load(z_ptrs + cols, mask=mask, other=0.0).to(tl.float32)
    return tl.where(cols < V, z, float("-inf")) if CUT else z


@jit
def _linear_cross_entropy_rows_kernel(
    z_ptr,  # (M, stride) in z; out dz without its factor, 0 from V on
    targets_ptr,  # (M,) int64
    row_loss_ptr,  # (M,) out, fp32
    M,
    V,
    stride,  # elements between rows of z, a multiple of 16
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,  # elements in 16 bytes
    GRAD: tl.constexpr,
):
    # Last rows first: the GEMM before wrote them last, so some are in L2, and the GEMMs after
    # begin with the first rows.
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ptrs = z_ptr + rows.to(tl.int64) * stride
    target = tl.load(targets_ptr + rows, mask=rows < M, other=ignore_index)
    counted = target != ignore_index
    # No address comes from an id outside the vocabulary; loss and gradients become NaN.
    known = (target >= 0) & (target < V)
    nan = float("nan")
    z_t = tl.load(row_ptrs + target, mask=counted & known, other=nan).to(tl.float32)

    # A lane owns VECTOR neighbours, a maximum and a sum of its own; lanes meet after the row. The
    # maximum comes off before the factor of exp2: z * log2(e) - max * log2(e), one instruction
    # less, would round off 5e-4 where |z| is 1e4, and no longer count the largest as exactly 1.
    lanes: tl.constexpr = BLOCK_V // VECTOR
    cols = tl.arange(0, lanes)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    z_ptrs = row_ptrs[:, None, None]
    inside = (rows < M)[:, None, None]
    whole = V // BLOCK_V * BLOCK_V
    lane_max = tl.full((BLOCK_M, lanes), -3e38, dtype=tl.float32)  # -inf - -inf would be NaN
    lane_sum = tl.zeros((BLOCK_M, lanes), dtype=tl.float32)
    for cut in tl.static_range(2):  # whole blocks, then the one that V cuts
        for v in range(whole if cut else 0, V if cut else whole, BLOCK_V):
            z = _load_lanes(z_ptrs, v + cols, inside, V, stride, cut)
            new_max = tl.maximum(lane_max, tl.max(z, axis=2))
            part = tl.sum(tl.exp2((z - new_max[:, :, None]) * LOG2E), axis=2)
            lane_sum = lane_sum * tl.exp2((lane_max - new_max) * LOG2E) + part
            lane_max = new_max
    row_max = tl.max(lane_max, axis=1)
    row_sum = tl.sum(lane_sum * tl.exp2((lane_max - row_max[:, None]) * LOG2E), axis=1)
    loss = tl.where(counted, (row_max - z_t) + tl.log(row_sum), 0.0)  # near terms first
    tl.store(row_loss_ptr + rows, loss, mask=rows < M)
    if GRAD:
        scale = tl.where(counted, tl.where(known, tl.div_rn(1.0, row_sum), nan), 0.0)
        tl.debug_barrier()  # all lanes have read z_t
        # Backwards, while what was read last is still in a cache.
        for uncut in tl.static_range(2):
            for v in range(0 if uncut else whole, whole if uncut else stride, BLOCK_V):
                at = (whole - BLOCK_V - v if uncut else v) + cols
                z = _load_lanes(z_ptrs, at, inside, V, stride, not uncut)
                dz = tl.exp2((z - row_max[:, None, None]) * LOG2E) * scale[:, None, None]
                dz = dz if uncut else tl.where(at < V, dz, 0.0)  # `scale` may be NaN
                mask = inside if uncut else inside & (at < stride)
                tl.store(z_ptrs + at, dz.to(z_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # all of dz is stored but for the target's -1
        dz_t = tl.exp2((z_t - row_max) * LOG2E) * scale - 1.0
        tl.store(row_ptrs + target, dz_t.to(z_ptr.dtype.element_ty), mask=counted & known)


@jit
def _linear_cross_entropy_scale_kernel(
    grad_ptr,  # (numel,) unscaled gradient
    dloss_ptr,  # () fp32
    count_ptr,  # () int64
    out_ptr,  # (numel,) out
    numel,
    BLOCK_E: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = offs < numel
    N = tl.maximum(tl.load(count_ptr), 1).to(tl.float32)  # without rows both gradients are 0
    scale = tl.div_rn(tl.load(dloss_ptr), N)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (grad * scale).to(out_ptr.dtype.element_ty), mask=mask)


def launch_key(kernel: str, dtype: torch.dtype, arch: int) -> Key:
    """The key of one of the two kernels; none of their rows depends on a size yet."""
    math = "fp32" if dtype == torch.float32 else "16-bit"
    return Key(f"linear_cross_entropy.{kernel}", math, "any", arch)


def chunk_rows(M: int, Vp: int, itemsize: int) -> int:
    """Rows of logits that exist at once: M in the fewest equal chunks of at most CHUNK_BYTES."""
    most = max(CHUNK_BYTES // (Vp * itemsize), 1)
    even = cdiv(M, max(cdiv(M, most), 1))
    return max(min(cdiv(even, 128) * 128, most, M), 1)  # whole tiles, where the bound leaves room


def _accumulate_mm(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b; fp32 from the products on whatever the dtype of a and b."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # out_dtype exists on CUDA alone
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def _fwd_fake(x, weight, targets, vocab_size, ignore_index, needs_dx, needs_dweight):
    loss, count = (x.new_empty((), dtype=dtype) for dtype in (torch.float32, torch.int64))
    dx = x.new_empty(x.shape if needs_dx else 0)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0, dtype=torch.float32)
    return loss, count, dx, dweight


@register(fake=_fwd_fake)
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, C), weight (Vp, C), targets (M,) -> loss, N, and unscaled dx (M, C), dweight.

    loss is () fp32, N () int64, dweight (Vp, C) fp32; a gradient that is not needed is empty.
    """
    M, Vp, V = len(x), len(weight), vocab_size
    check_ids("linear_cross_entropy: targets", targets, V, ignore_index)
    _, _, dx, dweight = _fwd_fake(x, weight, targets, V, ignore_index, needs_dx, needs_dweight)
    w = weight.to(x.dtype)
    rows = chunk_rows(M, Vp, x.dtype.itemsize)
    width = cdiv(Vp, 16) * 16  # each row at a multiple of 16 bytes
    logits = x.new_empty((rows, width))
    fixed = {"VECTOR": 16 // x.dtype.itemsize, "GRAD": needs_dx or needs_dweight}
    kwargs = fixed | launch_for(launch_key("rows", x.dtype, arch(x.device))).kwargs()
    row_loss = x.new_empty(M, dtype=torch.float32)
    for first in range(0, M, rows):
        chunk = slice(first, min(first + rows, M))
        x_m = x[chunk]
        z = logits[: len(x_m), :Vp]
        torch.mm(x_m, w.t(), out=z)
        _linear_cross_entropy_rows_kernel[(cdiv(len(x_m), kwargs["BLOCK_M"]),)](
            logits, targets[chunk], row_loss[chunk], len(x_m), V, width, ignore_index, **kwargs
        )
        if needs_dx:
            torch.mm(z, w, out=dx[chunk])
        if needs_dweight:
            _accumulate_mm(dweight, z.t(), x_m, first=first == 0)
    if M == 0:
        dweight.zero_()
    count = (targets != ignore_index).sum()
    # The mean over no rows is NaN, as torch has it. In fp32 a sum of many is off by more than each.
    loss = (row_loss.sum(dtype=torch.float64) / count).float()
    return loss, count, dx, dweight


@register(fake=lambda grad, dloss, count, dtype: torch.empty_like(grad, dtype=dtype))
def linear_cross_entropy_bwd(
    grad: Tensor, dloss: Tensor, count: Tensor, dtype: torch.dtype
) -> Tensor:
    """grad * dloss / N, rounded to `dtype`; dloss is () fp32, N () int64."""
    out = torch.empty_like(grad, dtype=dtype)
    if out.numel():
        kwargs = launch_for(launch_key("scale", grad.dtype, arch(grad.device))).kwargs()
        _linear_cross_entropy_scale_kernel[(cdiv(out.numel(), kwargs["BLOCK_E"]),)](
            grad, dloss, count, out, out.numel(), **kwargs
        )
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, ignore_index, needs_dx, needs_dweight):
        loss, *saved = linear_cross_entropy_fwd(
            x, weight, targets, vocab_size, ignore_index, needs_dx, needs_dweight
        )
        ctx.save_for_backward(*saved)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):
        refuse_double_backward("linear_cross_entropy")
        count, dx, dweight = ctx.saved_tensors
        (needs_dx, needs_dweight, *_), dtype = ctx.needs_input_grad, ctx.weight_dtype
        dx = linear_cross_entropy_bwd(dx, dloss, count, dx.dtype) if needs_dx else None
        dweight = linear_cross_entropy_bwd(dweight, dloss, count, dtype) if needs_dweight else None
        return dx, dweight, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean cross-entropy of `x @ weight^T` against `targets`, over the rows not ignored.

    Under autocast `x` is cast to the autocast dtype. `weight` is cast inside the op, so that an
    fp32 master receives its gradient in fp32, never rounded to 16 bits.

    Args:
        x: (..., C), contiguous, fp32 / bf16 / fp16.
        weight: (Vp, C), contiguous, fp32 or the dtype of `x`. Rows from `vocab_size` on are
            padding: no part of the loss, a gradient of exactly 0; keep them finite.
        targets: (...), int64, each in [0, vocab_size) or `ignore_index`.
        vocab_size: V <= Vp; Vp when None.
        ignore_index: rows with this target count neither in the sum nor in the mean.

    Returns:
        () fp32. NaN if every row is ignored, with gradients of 0, as in F.cross_entropy. On CUDA,
        where a check would cost a sync, a target that is not an id makes loss and gradients NaN.

    Raises:
        ValueError: a shape, dtype or layout that does not match, or, on the CPU, a target that is
            neither an id nor `ignore_index`.
    """
    check_device("linear_cross_entropy", x)
    C = x.shape[-1] if x.dim() else 0
    if weight.dim() != 2 or weight.shape[1] != C:
        raise ValueError(
            f"linear_cross_entropy: weight must be (Vp, {C}) to match x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    V = weight.shape[0] if vocab_size is None else vocab_size
    if not 0 < V <= weight.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: vocab_size must be in [1, {weight.shape[0]}] to match weight "
            f"{tuple(weight.shape)}, got {V}"
        )
    x = x.to(autocast_dtype(x))
    op, at, dtypes = "linear_cross_entropy", x.device, (torch.float32, x.dtype)
    check_tensor(op, "x", x, x.shape, at)
    check_tensor(op, "weight", weight, weight.shape, at, dtypes)
    check_tensor(op, "targets", targets, x.shape[:-1], at, (torch.int64,))
    rows, ids = x.reshape(-1, C), targets.reshape(-1)
    needs = needs_grad(x), needs_grad(weight)
    return _LinearCrossEntropy.apply(rows, weight, ids, V, ignore_index, *needs)
