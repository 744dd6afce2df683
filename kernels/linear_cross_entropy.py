"""LM head and cross-entropy in one op: the logits never exist whole.

Forward, over the N rows whose target t is not `ignore_index`, with V of the weight's Vp rows real:

    z = x @ weight[:V]^T        lse = log(sum_v exp(z_v))        loss = sum_rows(lse - z_t) / N

Backward, computed in the forward while the logits of a chunk are at hand:

    dz = (exp(z - lse) - onehot(t)) * dloss / N        dx = dz @ weight        dweight = dz^T @ x

Per chunk of rows: (1) a GEMM stores z in x's dtype and, from its fp32 accumulators, the maximum and
the sum of exponentials of each row of each half tile, and z_t; (2) a small kernel combines these
partials per row; (3) dz overwrites z; (4) two cuBLAS GEMMs, dweight accumulating in fp32 over the
chunks. Chunks are of tokens: chunks of the vocabulary would need z a second time, a fourth GEMM.

Two sums of exponentials are kept. The loss uses the one of the fp32 z. The gradient uses the one of
z as stored, so that exp(z - lse) sums to one over what step 3 reads: with the other, the error of a
bf16 gradient is 3 to 40 times plain PyTorch's once |z| reaches 40 to 150.

dz, dx and dweight stay without the factor dloss / N until the backward multiplies dx and dweight by
it in fp32: dloss is not known yet, and dz / N would underflow in fp16.

Bound by the tensor cores. At M = 65536, C = 768, Vp = 50304, bf16: three GEMMs of 5.06 TFLOP; z is
written, read, overwritten and read twice, 6.6 GB each time, in chunks of at most CHUNK_BYTES; the
weight (0.08 GB) is read and dweight (0.15 GB, fp32) read and written once a chunk. No atomics:
reruns are bitwise equal. No host sync: N stays on the device, so a CUDA graph can hold the op.

Source: chunks of tokens with gradients in the forward: Liger-Kernel, https://arxiv.org/abs/2410.10989
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._aot import AotCase, aot_case
from ._gemm import dot_tile, halves, tile_at
from ._jit import jit
from ._launch import Key, arch, cdiv, launch_for, math_of, precision_of
from ._op import autocast_dtype, check_device, needs_grad, refuse_double_backward, register
from .reference import check_targets

LOG2E = tl.constexpr(1.4426950408889634)
# Bytes of logits alive at once. At GPT-2's shape in bf16 this gives 5 chunks of 13184 rows and a
# peak of 1.7 GB beside the inputs; 4 chunks of 16384 would pass 2 GB, and each chunk fewer saves
# one read and write of dweight (309 MB of the 40 GB a call moves).
CHUNK_BYTES = 1_450_000_000


@jit
def _logits_half(
    z,  # (BLOCK_M, HALF_N) fp32
    targets,  # (BLOCK_M,) int32, relative to the half's first column
    logits_ptr,  # first element of the half
    target_logit_ptr,  # first row of the tile, as the next three
    max_ptr,
    sum_ptr,
    stored_sum_ptr,
    num_rows,  # rows of the tile inside M
    num_cols,  # columns of the half inside V, at least 1
    num_stored,  # columns of the half to store
    Vp,
    BLOCK_M: tl.constexpr,
    HALF_N: tl.constexpr,
    GRAD: tl.constexpr,
):
    """Store half a tile of logits and its share of the row statistics."""
    rows = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, HALF_N)
    inside = rows < num_rows
    z = tl.where(cols[None, :] < num_cols, z, float("-inf"))
    z_max = tl.max(z, axis=1)
    tl.store(max_ptr + rows, z_max, mask=inside)
    tl.store(sum_ptr + rows, tl.sum(tl.exp2((z - z_max[:, None]) * LOG2E), axis=1), mask=inside)
    # Exactly one half tile holds a row's target, so exactly one program writes it.
    target_logit = tl.sum(tl.where(cols[None, :] == targets[:, None], z, 0.0), axis=1)
    here = inside & (targets >= 0) & (targets < tl.minimum(num_cols, HALF_N))
    tl.store(target_logit_ptr + rows, target_logit, mask=here)
    if GRAD:
        stored = z.to(logits_ptr.dtype.element_ty)
        mask = inside[:, None] & (cols[None, :] < num_stored)
        tl.store(logits_ptr + rows[:, None] * Vp + cols[None, :], stored, mask=mask)
        # Rounding keeps order: this is the maximum of what is stored.
        stored_max = z_max.to(logits_ptr.dtype.element_ty).to(tl.float32)
        e = tl.exp2((stored.to(tl.float32) - stored_max[:, None]) * LOG2E)
        tl.store(stored_sum_ptr + rows, tl.sum(e, axis=1), mask=inside)


@jit
def _linear_cross_entropy_logits_kernel(
    x_ptr,  # (M, C)
    w_ptr,  # (Vp, C)
    targets_ptr,  # (M,) int64
    logits_ptr,  # (M, Vp) out, columns < num_stored, -inf from V on; unused without GRAD
    target_logit_ptr,  # (M,) out, fp32, rows with 0 <= target < V
    max_ptr,  # (S, M) out, fp32, per half tile: S = ceil(V / (BLOCK_N / 2))
    sum_ptr,  # (S, M) out, fp32: sum of exp(z - max), z from the accumulators
    stored_sum_ptr,  # (S, M) out, fp32: the same of z and max as stored; unused without GRAD
    M,
    C,
    V,
    num_stored,
    Vp,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides C
    GRAD: tl.constexpr,
):
    HALF_N: tl.constexpr = BLOCK_N // 2
    pid_m, pid_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(V, BLOCK_N), GROUP_M)
    col = pid_n * BLOCK_N
    row = (pid_m * BLOCK_M).to(tl.int64)  # M * Vp may pass 2^31; offsets inside a tile do not
    num_rows = M - pid_m * BLOCK_M
    num_cols = V - col
    rows = tl.arange(0, BLOCK_M)
    acc = dot_tile(
        x_ptr + row * C, w_ptr + col.to(tl.int64) * C, num_rows, num_cols, C, 1, C,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, "repeat", PRECISION,
    )  # fmt: skip

    targets = tl.load(targets_ptr + row + rows, mask=rows < num_rows, other=-1)
    # Relative to the tile, in 32 bits; -1 also for what is not an id, however large.
    targets = tl.where((targets >= col) & (targets < V), targets - col, -1).to(tl.int32)
    logits_ptr += row * Vp + col
    target_logit_ptr += row
    at = (col // HALF_N).to(tl.int64) * M + row  # slot-major: a tile's rows are neighbours
    max_ptr += at
    sum_ptr += at
    stored_sum_ptr += at
    # Half a tile at a time: the exponentials of a whole one do not fit in registers beside it.
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    _logits_half(left, targets, logits_ptr, target_logit_ptr, max_ptr, sum_ptr, stored_sum_ptr,
                 num_rows, num_cols, num_stored - col, Vp, BLOCK_M, HALF_N, GRAD)  # fmt: skip
    if num_cols > HALF_N:
        _logits_half(right, targets - HALF_N, logits_ptr + HALF_N, target_logit_ptr, max_ptr + M,
                     sum_ptr + M, stored_sum_ptr + M, num_rows, num_cols - HALF_N,
                     num_stored - col - HALF_N, Vp, BLOCK_M, HALF_N, GRAD)  # fmt: skip


@jit
def _linear_cross_entropy_rows_kernel(
    targets_ptr,  # (M,) int64
    target_logit_ptr,  # (M,) fp32
    max_ptr,  # (S, M) fp32
    sum_ptr,  # (S, M) fp32
    stored_sum_ptr,  # (S, M) fp32; unused without GRAD
    loss_ptr,  # (M,) out, fp32
    row_max_ptr,  # (M,) out, dtype of the logits; unused without GRAD
    row_scale_ptr,  # (M,) out, fp32: exp(row_max - lse) over z as stored; unused without GRAD
    M,
    S,
    V,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GRAD: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    stored_dtype: tl.constexpr = row_max_ptr.dtype.element_ty
    z_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    stored = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for s in range(0, S, BLOCK_S):
        slots = s + tl.arange(0, BLOCK_S)
        at = slots[:, None].to(tl.int64) * M + rows[None, :]
        mask = (slots[:, None] < S) & inside[None, :]
        slot_max = tl.load(max_ptr + at, mask=mask, other=float("-inf"))
        # 0 keeps rows past M, which nothing reads, free of inf - inf.
        new_max = tl.where(inside, tl.maximum(z_max, tl.max(slot_max, axis=0)), 0.0)
        scale = tl.exp2((slot_max - new_max[None, :]) * LOG2E)
        rescale = tl.exp2((z_max - new_max) * LOG2E)
        part = tl.load(sum_ptr + at, mask=mask, other=0.0)
        total = total * rescale + tl.sum(part * scale, axis=0)
        if GRAD:
            stored_max = new_max.to(stored_dtype).to(tl.float32)
            slot_max = slot_max.to(stored_dtype).to(tl.float32)
            scale = tl.exp2((slot_max - stored_max[None, :]) * LOG2E)
            rescale = tl.exp2((z_max.to(stored_dtype).to(tl.float32) - stored_max) * LOG2E)
            part = tl.load(stored_sum_ptr + at, mask=mask, other=0.0)
            stored = stored * rescale + tl.sum(part * scale, axis=0)
        z_max = new_max

    targets = tl.load(targets_ptr + rows, mask=inside, other=0)
    counted = targets != ignore_index
    known = (targets >= 0) & (targets < V)
    # An id outside the vocabulary makes loss and gradients NaN: seen, and never read with.
    nan = float("nan")
    z_t = tl.load(target_logit_ptr + rows, mask=inside & counted & known, other=nan)
    loss = (z_max - z_t) + tl.log(tl.where(inside, total, 1.0))  # near terms first: |z| may be 1e4
    tl.store(loss_ptr + rows, tl.where(counted, loss, 0.0), mask=inside)
    if GRAD:
        scale = tl.where(known, 1.0 / tl.where(inside, stored, 1.0), nan)
        tl.store(row_max_ptr + rows, z_max.to(stored_dtype), mask=inside)
        tl.store(row_scale_ptr + rows, tl.where(counted, scale, 0.0), mask=inside)


@jit
def _linear_cross_entropy_dlogits_kernel(
    targets_ptr,  # (M,) int64
    row_max_ptr,  # (M,) dtype of the logits
    row_scale_ptr,  # (M,) fp32
    logits_ptr,  # (M, Vp) in z, out dz without its factor
    M,
    V,
    num_stored,
    Vp,
    ignore_index,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # Last rows first: the GEMM before wrote them last, so some are in L2, and the GEMMs after
    # begin with the first rows.
    blocks = tl.cdiv(Vp, BLOCK_V)
    row = (tl.cdiv(M, BLOCK_M) - 1 - tl.program_id(0) // blocks) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    z_ptrs = logits_ptr + row.to(tl.int64) * Vp + (rows - row)[:, None] * Vp + cols[None, :]

    target = tl.load(targets_ptr + rows, mask=rows < M, other=-1)
    row_max = tl.load(row_max_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)
    row_scale = tl.load(row_scale_ptr + rows, mask=rows < M, other=0.0)
    inside = rows[:, None] < M
    # From V on z is -inf, stored or not, and becomes the zeros of exp(-inf).
    mask = inside & (cols[None, :] < num_stored)
    z = tl.load(z_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
    # In place without a hazard: each element, the target's too, is read only by the lane that
    # overwrites it.
    p = tl.exp2((z - row_max[:, None]) * LOG2E) * row_scale[:, None]
    hit = (cols[None, :] == target[:, None]) & (target != ignore_index)[:, None]
    dz = tl.where(cols[None, :] < V, p - hit.to(tl.float32), 0.0)
    tl.store(z_ptrs, dz.to(logits_ptr.dtype.element_ty), mask=inside & (cols[None, :] < Vp))


@jit
def _linear_cross_entropy_mean_kernel(
    targets_ptr,  # (M,) int64
    row_loss_ptr,  # (M,) fp32
    loss_ptr,  # () out, fp32
    inv_count_ptr,  # () out, fp32
    M,
    ignore_index,
    BLOCK_R: tl.constexpr,
):
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    count = tl.zeros((BLOCK_R,), dtype=tl.int32)
    for r in range(0, M, BLOCK_R):
        rows = r + tl.arange(0, BLOCK_R)
        mask = rows < M
        total += tl.load(row_loss_ptr + rows, mask=mask, other=0.0)
        targets = tl.load(targets_ptr + rows, mask=mask, other=0)
        count += (mask & (targets != ignore_index)).to(tl.int32)
    N = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.maximum(N, 1).to(tl.float32)
    # As torch has it: the mean over no rows is NaN, its gradients are 0.
    tl.store(loss_ptr, tl.where(N > 0, mean, float("nan")))
    tl.store(inv_count_ptr, tl.where(N > 0, 1.0 / tl.maximum(N, 1).to(tl.float32), 0.0))


@jit
def _linear_cross_entropy_scale_kernel(
    grad_ptr,  # (numel,) unscaled gradient
    dloss_ptr,  # () fp32
    inv_count_ptr,  # () fp32
    out_ptr,  # (numel,) out
    numel,
    BLOCK_E: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = offs < numel
    scale = tl.load(dloss_ptr) * tl.load(inv_count_ptr)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, (grad * scale).to(out_ptr.dtype.element_ty), mask=mask)


def launch_key(kernel: str, math: str, arch: int) -> Key:
    """The key of one of the five kernels; none of their rows depends on a size yet."""
    return Key(f"linear_cross_entropy.{kernel}", math, "any", arch)


def chunk_rows(M: int, Vp: int, itemsize: int) -> int:
    """Rows of logits alive at once: M in the fewest equal chunks of at most CHUNK_BYTES."""
    most = max(CHUNK_BYTES // (Vp * itemsize), 1)
    even = cdiv(M, max(cdiv(M, most), 1))
    return max(min(cdiv(even, 128) * 128, most, M), 1)  # whole tiles, where the bound leaves room


def _accumulate_mm(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b; fp32 from the products on whatever the dtype of a and b."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:  # out_dtype exists on CUDA alone
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def aot_cases(arch: int) -> Iterator[AotCase]:
    """Every build a launch can choose at GPT-2's shape."""
    gemm = _linear_cross_entropy_logits_kernel
    for name, kernel, label, dtype, math, even_k, grad in (
        ("logits", gemm, "bf16 train", "bf16", "16-bit", True, True),
        ("logits", gemm, "bf16 eval", "bf16", "16-bit", True, False),
        ("logits", gemm, "bf16 train, ragged C", "bf16", "16-bit", False, True),
        ("logits", gemm, "fp16 train", "fp16", "16-bit", True, True),
        ("logits", gemm, "tf32 train", "fp32", "tf32", True, True),
        ("logits", gemm, "tf32 train, ragged C", "fp32", "tf32", False, True),
        ("logits", gemm, "ieee train", "fp32", "ieee", True, True),
        ("logits", gemm, "ieee train, ragged C", "fp32", "ieee", False, True),
        ("rows", _linear_cross_entropy_rows_kernel, "train", "bf16", "16-bit", True, True),
        ("dlogits", _linear_cross_entropy_dlogits_kernel, "bf16", "bf16", "16-bit", True, True),
        ("mean", _linear_cross_entropy_mean_kernel, "any", "bf16", "16-bit", True, True),
        ("scale", _linear_cross_entropy_scale_kernel, "bf16", "bf16", "16-bit", True, True),
    ):
        launch = launch_for(launch_key(name, math, arch))
        fixed = {"PRECISION": precision_of(math), "EVEN_K": even_k, "GRAD": grad}
        mma = "BLOCK_M" if kernel is gemm and math != "ieee" else ""
        yield aot_case("linear_cross_entropy", kernel, label, launch, dtype, fixed, mma=mma,
                       unaligned=("V", "S", "ignore_index"))  # fmt: skip


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.float32)
    dx = x.new_empty(x.shape if needs_dx else 0)
    dweight = weight.new_empty(weight.shape if needs_dweight else 0, dtype=torch.float32)
    return loss, torch.empty_like(loss), dx, dweight


@register(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor targets, SymInt vocab_size,"
    " int ignore_index, bool needs_dx, bool needs_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
)
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    ignore_index: int,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (M, C), weight (Vp, C), targets (M,) -> loss, 1 / N, and unscaled dx (M, C), dweight.

    loss and 1 / N are () fp32, dweight (Vp, C) fp32; a gradient that is not needed is empty.
    """
    M, C = x.shape
    Vp, V = weight.shape[0], vocab_size
    grad = needs_dx or needs_dweight
    if targets.device.type == "cpu":
        check_targets(targets, V, ignore_index)
    loss, inv_count, dx, dweight = _fwd_fake(
        x, weight, targets, V, ignore_index, needs_dx, needs_dweight
    )
    w = weight.to(x.dtype)
    math = math_of(x.dtype)
    launch, row_launch, dz_launch, mean_launch = (
        launch_for(launch_key(kernel, math, arch(x.device)))
        for kernel in ("logits", "rows", "dlogits", "mean")
    )
    blocks, row_blocks, dz_blocks = (
        dict(found.blocks) for found in (launch, row_launch, dz_launch)
    )
    S = cdiv(V, blocks["BLOCK_N"] // 2)
    # z is stored up to a multiple of 16, -inf from V on: a mask that ends at V = 50257 would cut a
    # thread's 16 stores of 16 bytes into 128 of 2 (bf16 on sm_90, compile-only). 16 divides half a
    # tile, so what dlogits reads has been written.
    num_stored = min(cdiv(V, 16) * 16, Vp)

    rows = chunk_rows(M, Vp, x.dtype.itemsize)
    logits = x.new_empty((rows if grad else 0, Vp))
    row_loss = x.new_empty(M, dtype=torch.float32)
    partials = x.new_empty((3 if grad else 2, S * rows), dtype=torch.float32)
    target_logit, row_scale = x.new_empty((2, rows), dtype=torch.float32)
    row_max = x.new_empty(rows)
    slot_max, slot_sum, slot_stored = partials[0], partials[1], partials[-1]
    for first in range(0, M, rows):
        m = min(rows, M - first)
        chunk = slice(first, first + m)
        x_m, targets_m, z = x[chunk], targets[chunk], logits[:m]
        tiles = cdiv(m, blocks["BLOCK_M"]) * cdiv(V, blocks["BLOCK_N"])
        _linear_cross_entropy_logits_kernel[(tiles,)](
            x_m, w, targets_m, z, target_logit, slot_max, slot_sum, slot_stored,
            m, C, V, num_stored, Vp,
            PRECISION=precision_of(math), EVEN_K=C % blocks["BLOCK_K"] == 0, GRAD=grad,
            **launch.kwargs(),
        )  # fmt: skip
        _linear_cross_entropy_rows_kernel[(cdiv(m, row_blocks["BLOCK_M"]),)](
            targets_m, target_logit, slot_max, slot_sum, slot_stored, row_loss[chunk], row_max,
            row_scale, m, S, V, ignore_index,
            GRAD=grad, **row_launch.kwargs(),
        )  # fmt: skip
        if not grad:
            continue
        tiles = cdiv(m, dz_blocks["BLOCK_M"]) * cdiv(Vp, dz_blocks["BLOCK_V"])
        _linear_cross_entropy_dlogits_kernel[(tiles,)](
            targets_m, row_max, row_scale, z, m, V, num_stored, Vp, ignore_index,
            **dz_launch.kwargs(),
        )  # fmt: skip
        if needs_dx:
            torch.mm(z, w, out=dx[chunk])
        if needs_dweight:
            _accumulate_mm(dweight, z.t(), x_m, first=first == 0)
    if M == 0:
        dweight.zero_()
    _linear_cross_entropy_mean_kernel[(1,)](
        targets, row_loss, loss, inv_count, M, ignore_index, **mean_launch.kwargs()
    )
    return loss, inv_count, dx, dweight


def _bwd_fake(grad: Tensor, dloss: Tensor, inv_count: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(grad, dtype=dtype)


@register(
    "linear_cross_entropy_bwd(Tensor grad, Tensor dloss, Tensor inv_count, ScalarType dtype)"
    " -> Tensor",
    fake=_bwd_fake,
)
def linear_cross_entropy_bwd(
    grad: Tensor, dloss: Tensor, inv_count: Tensor, dtype: torch.dtype
) -> Tensor:
    """grad * dloss / N, rounded to `dtype`; dloss and 1 / N are () fp32."""
    out = _bwd_fake(grad, dloss, inv_count, dtype)
    if out.numel():
        launch = launch_for(launch_key("scale", math_of(grad.dtype), arch(grad.device)))
        _linear_cross_entropy_scale_kernel[(cdiv(out.numel(), dict(launch.blocks)["BLOCK_E"]),)](
            grad, dloss, inv_count, out, out.numel(), **launch.kwargs()
        )
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        ignore_index: int,
        needs_dx: bool,
        needs_dweight: bool,
    ) -> Tensor:
        loss, inv_count, dx, dweight = linear_cross_entropy_fwd(
            x, weight, targets, vocab_size, ignore_index, needs_dx, needs_dweight
        )
        ctx.save_for_backward(inv_count, dx, dweight)
        ctx.needs = needs_dx, needs_dweight
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):
        refuse_double_backward("linear_cross_entropy")
        inv_count, dx, dweight = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs
        if needs_dx:
            dx = linear_cross_entropy_bwd(dx, dloss, inv_count, dx.dtype)
        if needs_dweight:
            dweight = linear_cross_entropy_bwd(dweight, dloss, inv_count, ctx.weight_dtype)
        return (
            dx if needs_dx else None, dweight if needs_dweight else None,
            None, None, None, None, None,
        )  # fmt: skip


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean cross-entropy of `x @ weight^T` against `targets`, over the rows not ignored.

    Under autocast `x` is cast to the autocast dtype. `weight` is cast inside the op, so that an
    fp32 master receives its gradient in fp32, never rounded to 16 bits on the way.

    Args:
        x: (..., C), contiguous, fp32 / bf16 / fp16.
        weight: (Vp, C), contiguous, fp32 or the dtype of `x`. Rows from `vocab_size` on are
            padding: no part of the loss, a gradient of exactly 0; keep them finite.
        targets: (...), int64, each in [0, vocab_size) or `ignore_index`.
        vocab_size: V <= Vp; Vp when None.
        ignore_index: rows with this target count neither in the sum nor in the mean.

    Returns:
        () fp32. NaN when every row is ignored, with gradients of 0, as F.cross_entropy. On CUDA,
        where looking would cost a sync, a target that is no id makes loss and gradients NaN.

    Raises:
        ValueError: a shape, dtype or layout that does not match, or, on the CPU, a target that is
            neither an id nor `ignore_index`.
    """
    check_device("linear_cross_entropy", x)
    V = weight.shape[0] if vocab_size is None else vocab_size
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear_cross_entropy: weight must be (Vp, {x.shape[-1]}) to match x "
            f"{tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if targets.shape != x.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets must be int64 {tuple(x.shape[:-1])} to match x "
            f"{tuple(x.shape)}, got {targets.dtype} {tuple(targets.shape)}"
        )
    if not 0 < V <= weight.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: vocab_size must be in [1, {weight.shape[0]}] to match weight "
            f"{tuple(weight.shape)}, got {V}"
        )
    for name, t in (("x", x), ("weight", weight), ("targets", targets)):
        if not t.is_contiguous():
            raise ValueError(f"linear_cross_entropy: {name} must be contiguous, got {t.stride()}")
        if t.device != x.device:
            raise ValueError(
                f"linear_cross_entropy: {name} must be on {x.device} with x, got {t.device}"
            )
    x = x.to(autocast_dtype(x))
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"linear_cross_entropy: x must be fp32, fp16 or bf16, got {x.dtype}")
    if weight.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"linear_cross_entropy: weight must be fp32 or {x.dtype} like x, got {weight.dtype}"
        )
    return _LinearCrossEntropy.apply(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), V, ignore_index,
        needs_grad(x), needs_grad(weight),
    )  # fmt: skip
