"""AdamW over all tensors of a model in one pass, and the gradient norm before it in another.

For each element, with t the step count after this step and c the clip coefficient:

    g = grad * c
    p = p * (1 - lr * weight_decay)
    m = m + (1 - beta1) * (g - m)                       v = beta2 * v + (1 - beta2) * g * g
    p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    norm = sqrt(sum(grad * grad))                       c = min(1, max_norm / (norm + 1e-6))

which is torch.optim.AdamW and torch.nn.utils.clip_grad_norm_, in fp32. Scalars per tensor
(1 - lr * weight_decay, the bias corrections) are computed in fp64 and rounded once. Gradients are
fp32 or bf16. If a parameter has a bf16 working copy, the new p is written there too.

Memory-bound. Bytes per parameter:

    step  p, m, v read and written        24, + 4 (fp32 gradient) or 2 (bf16), + 2 (working copy)
    norm  gradient read                    4 or 2

The norm takes two launches and the step two, however many tensors there are. The kernels find the
tensors through a table of addresses (one row per tensor) and their work through a list of chunks
(row, number of the chunk in the tensor). The host sends both only when they change, which is rare,
because tensors keep their addresses. Learning rate, step counts, clip coefficient and the verdict
`found_inf` are read on the device. If `found_inf` is not 0, nothing is written.

Deterministic: each chunk writes one fp32 sum of squares, and one program adds those in a fixed
order. No atomics; reruns are bitwise equal on one device. No host read.

Source: Loshchilov, Hutter 2019, https://arxiv.org/abs/1711.05101; tables of addresses and chunks as
in NVIDIA apex, multi_tensor_apply.
"""

# static_range is a loop, which the triton stubs do not know.
# pyright: reportGeneralTypeIssues=false

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ._jit import jit
from ._launch import Key, arch, cdiv, launch_for
from ._op import INTERPRETED, register

# Elements per program. Beside so many, reading the row of the table costs next to nothing. With 4
# programs on each of 132 SMs, 124M parameters take 29 rounds, so a half-empty last one costs 2%.
CHUNK = tl.constexpr(8192)

# Columns of the table: addresses (0: none) and integers, int64, then seven fp64 numbers: learning
# rate, weight decay, beta1, beta2, their logarithms, eps.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WORKING, STEP, LR_ADDRESS = map(tl.constexpr, range(7))
NUMEL, FLAGS, NUMBERS, FIELDS = map(tl.constexpr, (7, 8, 9, 16))
BF16_GRAD, ALIGNED = tl.constexpr(1), tl.constexpr(2)  # FLAGS
SCALARS = tl.constexpr(8)  # per tensor, from `_adamw_advance_kernel`; the last is unused


@jit
def _load_seven(ptrs, mask=None, other=None):
    """Seven adjacent values."""
    found = ()
    for i in tl.static_range(7):
        found += (tl.load(ptrs + i, mask=mask, other=other),)
    return found


@jit
def _adamw_advance_kernel(
    table_ptr,  # (N, FIELDS) int64; writes through STEP, each () fp32
    numbers_ptr,  # the same memory as fp64
    found_inf_ptr,  # () fp32
    scalars_ptr,  # (N, SCALARS) out, fp32
    reached,  # the tensors behind the table, for the interpreter's sanitizer; None when compiled
    N,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < N
    table_ptr += rows * FIELDS
    numbers_ptr += rows * FIELDS
    step_ptrs = tl.load(table_ptr + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    lr_address = tl.load(table_ptr + LR_ADDRESS, mask=mask, other=0)
    on_device = lr_address != 0
    lr = tl.load(lr_address.to(tl.pointer_type(tl.float32)), mask=on_device, other=0.0)
    numbers = _load_seven(numbers_ptr + NUMBERS, mask, 0.0)
    number, weight_decay, beta1, beta2, log_beta1, log_beta2, eps = numbers
    lr = tl.where(on_device, lr.to(tl.float64), number)

    step = tl.load(step_ptrs, mask=mask, other=0.0)
    step += tl.where(tl.load(found_inf_ptr) == 0.0, 1.0, 0.0)
    tl.store(step_ptrs, step, mask=mask)

    t = step.to(tl.float64)  # in fp32, 1 - 0.999 has a relative error of 1e-5
    bias_correction1 = 1.0 - tl.exp(t * log_beta1)
    bias_correction2 = 1.0 - tl.exp(t * log_beta2)
    decay, step_size = 1.0 - lr * weight_decay, lr / bias_correction1
    inv_sqrt_bc2 = 1.0 / tl.sqrt(bias_correction2)
    scalars = (decay, step_size, inv_sqrt_bc2, 1.0 - beta1, beta2, 1.0 - beta2, eps)
    for i in tl.static_range(7):
        tl.store(scalars_ptr + rows * SCALARS + i, scalars[i].to(tl.float32), mask=mask)


@jit
def _update_chunk(
    row_ptr,  # (FIELDS,) int64, the tensor's row of the table
    scalars_ptr,  # (SCALARS,) fp32, of the same tensor
    clip,
    first,  # element the chunk begins at
    GRAD_DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,  # all CHUNK elements are there, at aligned addresses: no mask, wide loads
    BLOCK: tl.constexpr,
):
    working = tl.load(row_ptr + WORKING)
    p_ptr = tl.load(row_ptr + PARAM).to(tl.pointer_type(tl.float32)) + first
    g_type = tl.pointer_type(GRAD_DTYPE)  # pyright: ignore[reportArgumentType]
    g_ptr = tl.load(row_ptr + GRAD).to(g_type) + first
    m_ptr = tl.load(row_ptr + EXP_AVG).to(tl.pointer_type(tl.float32)) + first
    v_ptr = tl.load(row_ptr + EXP_AVG_SQ).to(tl.pointer_type(tl.float32)) + first
    working_ptr = working.to(tl.pointer_type(tl.bfloat16)) + first
    if WHOLE:
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
        working_ptr = tl.multiple_of(working_ptr, 16)
    scalars = _load_seven(scalars_ptr)
    decay, step_size, inv_sqrt_bc2, one_minus_beta1, beta2, one_minus_beta2, eps = scalars
    rest = tl.load(row_ptr + NUMEL) - first
    end = CHUNK if WHOLE else tl.minimum(rest, CHUNK).to(tl.int32)
    for start in range(0, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = None if WHOLE else offs < end
        other = None if WHOLE else 0.0
        p = tl.load(p_ptr + offs, mask=mask, other=other)
        g = tl.load(g_ptr + offs, mask=mask, other=other).to(tl.float32) * clip
        m = tl.load(m_ptr + offs, mask=mask, other=other)
        v = tl.load(v_ptr + offs, mask=mask, other=other)
        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        # Rounded to nearest: the approximate forms are 2 ulp off and the memory is slower anyway.
        denominator = tl.sqrt_rn(v) * inv_sqrt_bc2 + eps
        p = p * decay - step_size * tl.div_rn(m, denominator)
        tl.store(p_ptr + offs, p, mask=mask)
        tl.store(m_ptr + offs, m, mask=mask)
        tl.store(v_ptr + offs, v, mask=mask)
        if working != 0:
            tl.store(working_ptr + offs, p.to(tl.bfloat16), mask=mask)


@jit
def _find_chunk(table_ptr, chunks_ptr):
    """Row of the table, first element, and what decides the branch: (bf16 gradient, whole)."""
    at = chunks_ptr + 2 * tl.program_id(0)
    row = tl.load(at)
    first = tl.load(at + 1).to(tl.int64) * CHUNK
    row_ptr = table_ptr + row * FIELDS
    flags = tl.load(row_ptr + FLAGS)
    fits = first + CHUNK <= tl.load(row_ptr + NUMEL)
    return row, first, (flags & BF16_GRAD) != 0, ((flags & ALIGNED) != 0) & fits


@jit
def _adamw_kernel(
    table_ptr,  # (N, FIELDS) int64; writes through PARAM, EXP_AVG, EXP_AVG_SQ, WORKING
    chunks_ptr,  # (programs, 2) int32: row of the table, chunk of that tensor
    scalars_ptr,  # (N, SCALARS) fp32
    clip_ptr,  # () fp32
    found_inf_ptr,  # () fp32
    reached,  # see _adamw_advance_kernel
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf_ptr) == 0.0:
        row, first, bf16_grad, whole = _find_chunk(table_ptr, chunks_ptr)
        row_ptr = table_ptr + row * FIELDS
        scalars_ptr += row * SCALARS
        clip = tl.load(clip_ptr)
        # A whole program takes one branch. The body is built four times, once per branch, so that
        # no value leaves a branch: it might have to change its layout for that.
        if bf16_grad:
            if whole:
                _update_chunk(row_ptr, scalars_ptr, clip, first, tl.bfloat16, True, BLOCK)
            else:
                _update_chunk(row_ptr, scalars_ptr, clip, first, tl.bfloat16, False, BLOCK)
        else:
            if whole:
                _update_chunk(row_ptr, scalars_ptr, clip, first, tl.float32, True, BLOCK)
            else:
                _update_chunk(row_ptr, scalars_ptr, clip, first, tl.float32, False, BLOCK)


@jit
def _sum_squares(
    row_ptr,
    first,
    GRAD_DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of squares of a chunk of a gradient; arguments as in _update_chunk."""
    g_type = tl.pointer_type(GRAD_DTYPE)  # pyright: ignore[reportArgumentType]
    g_ptr = tl.load(row_ptr + GRAD).to(g_type) + first
    if WHOLE:
        g_ptr = tl.multiple_of(g_ptr, 16)
    rest = tl.load(row_ptr + NUMEL) - first
    end = CHUNK if WHOLE else tl.minimum(rest, CHUNK).to(tl.int32)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = None if WHOLE else offs < end
        other = None if WHOLE else 0.0
        g = tl.load(g_ptr + offs, mask=mask, other=other).to(tl.float32)
        acc += g * g
    return tl.sum(acc, axis=0)


@jit
def _adamw_norm_kernel(
    table_ptr,  # (N, FIELDS) int64
    chunks_ptr,  # (programs, 2) int32
    partial_ptr,  # (programs,) out, fp32
    reached,  # see _adamw_advance_kernel
    BLOCK: tl.constexpr,
):
    row, first, bf16_grad, whole = _find_chunk(table_ptr, chunks_ptr)
    row_ptr = table_ptr + row * FIELDS
    if bf16_grad:
        if whole:
            total = _sum_squares(row_ptr, first, tl.bfloat16, True, BLOCK)
        else:
            total = _sum_squares(row_ptr, first, tl.bfloat16, False, BLOCK)
    else:
        if whole:
            total = _sum_squares(row_ptr, first, tl.float32, True, BLOCK)
        else:
            total = _sum_squares(row_ptr, first, tl.float32, False, BLOCK)
    tl.store(partial_ptr + tl.program_id(0), total)


@jit
def _adamw_clip_kernel(
    partial_ptr,  # (P,) fp32
    out_ptr,  # (2,) out, fp32: norm, clip coefficient
    P,
    max_norm,  # 0: measure only
    BLOCK: tl.constexpr,
):
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, P, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partial_ptr + offs, mask=offs < P, other=0.0)
    norm = tl.sqrt_rn(tl.sum(acc, axis=0))
    coefficient = tl.div_rn(max_norm, norm + 1e-6)
    # Written so that NaN stays NaN, as in torch: such a step must not look like a good one.
    coefficient = tl.where(coefficient > 1.0, 1.0, coefficient)
    tl.store(out_ptr, norm)
    tl.store(out_ptr + 1, tl.where(max_norm > 0.0, coefficient, 1.0))


def launch_key(kernel: str, arch: int) -> Key:
    """The key of "norm", "clip", "advance" or "step"; none of their rows depends on a size yet."""
    return Key(f"adamw.{kernel}", "fp32", "any", arch)


def _launch(kernel: str, table: Tensor) -> dict[str, int]:
    """Keyword arguments of a launch."""
    return launch_for(launch_key(kernel, arch(table.device))).kwargs()


@register(fake=lambda table, chunks, max_norm, grads: table.new_empty(2, dtype=torch.float32))
def adamw_norm(table: Tensor, chunks: Tensor, max_norm: float, grads: Sequence[Tensor]) -> Tensor:
    """table (N, FIELDS), chunks (P, 2) -> (2,) fp32: norm, clip coefficient."""
    P, reached = len(chunks), (*grads,) if INTERPRETED else None
    out, partial = (table.new_empty(n, dtype=torch.float32) for n in (2, P))
    if P > 0:
        _adamw_norm_kernel[(P,)](table, chunks, partial, reached, **_launch("norm", table))
    _adamw_clip_kernel[(1,)](partial, out, P, max_norm, **_launch("clip", table))
    return out


@register(fake=lambda table, chunks, clip, found_inf, written, read: None, writes=("written",))
def adamw_step(
    table: Tensor,
    chunks: Tensor,
    clip: Tensor,
    found_inf: Tensor,
    written: Sequence[Tensor],
    read: Sequence[Tensor],
) -> None:
    """table (N, FIELDS), chunks (P, 2), clip () and found_inf () fp32; writes behind the table."""
    N, P, reached = len(table), len(chunks), (*written, *read) if INTERPRETED else None
    scalars = table.new_empty((N, SCALARS.value), dtype=torch.float32)
    if N > 0:
        advance = _launch("advance", table)
        _adamw_advance_kernel[(cdiv(N, advance["BLOCK"]),)](
            table, table.view(torch.float64), found_inf, scalars, reached, N, **advance
        )
    if P > 0:
        step = _launch("step", table)
        _adamw_kernel[(P,)](table, chunks, scalars, clip, found_inf, reached, **step)
