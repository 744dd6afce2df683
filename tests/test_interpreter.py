"""The judge is judged: bf16 against torch bit for bit, and every planted bug must be caught.

Each bug stands beside the same kernel without it, so that the sanitizer is also seen to pass.
"""

# The triton stubs type a constexpr argument as such, not as the value that is passed.
# pyright: reportArgumentType=false, reportCallIssue=false

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels._op import INTERPRETED
from tests.interpreter import SanitizerError, bf16_to_fp32, fp32_to_bf16

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels run natively here")

N = 1 << 12


def awkward_fp32() -> torch.Tensor:
    """Random bit patterns, ties to both sides, subnormals, infinities, the largest finite."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, N, dtype=np.uint32)
    bits[: N // 4] = (bits[: N // 4] & 0xFFFF0000) | 0x8000  # halfway between two neighbours
    bits[N // 4 : N // 2] &= 0x807FFFFF  # subnormal
    bits[-4:] = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000]
    return torch.from_numpy(bits.view(np.float32).copy())


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    nan = want.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got.view(torch.int16)[~nan], want.view(torch.int16)[~nan])


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    if OP == "+":
        out = x + y
    elif OP == "-":
        out = x - y
    elif OP == "*":
        out = x * y
    elif OP == "max":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "-x":
        out = -x
    else:
        out = tl.where(x > y, x * 1.5, y)
    tl.store(out_ptr + offs, out)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offs, tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs)))


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr, tl.max(x, axis=0) if OP == "max" else tl.sum(x, axis=0))


def test_bf16_rounds_to_nearest_even():
    x = awkward_fp32()
    y = torch.empty(N, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, N)
    assert_same_bits(y, x.to(torch.bfloat16))


def test_bf16_widens_exactly():
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)  # all of them
    bits = x.view(torch.int16).numpy().view(np.uint16)
    y = torch.from_numpy(bf16_to_fp32(bits))
    nan = x.isnan()
    assert torch.equal(y[~nan], x.float()[~nan])
    assert torch.equal(y.isnan(), nan)
    assert np.array_equal(fp32_to_bf16(bf16_to_fp32(bits))[~nan.numpy()], bits[~nan.numpy()])


@pytest.mark.parametrize(
    ("op", "want"),
    [
        ("+", lambda x, y: x + y),
        ("-", lambda x, y: x - y),
        ("*", lambda x, y: x * y),
        ("max", torch.maximum),
        ("-x", lambda x, y: -x),
        ("where", lambda x, y: torch.where(x > y, x * 1.5, y)),
    ],
)
def test_bf16_arithmetic_is_torchs(op, want):
    x, y = torch.randn(2, N).to(torch.bfloat16)
    out = torch.empty_like(x)
    _arithmetic_kernel[(1,)](x, y, out, op, N)
    assert_same_bits(out, want(x, y))


def test_bf16_dot_multiplies_values():
    a, b = torch.randint(-8, 9, (2, 32, 32)).to(torch.bfloat16)  # integers: exact in any order
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, 32)
    assert torch.equal(out, a.float() @ b.float())


def test_bf16_maximum():
    x, y = -torch.rand(64).to(torch.bfloat16) - 1, torch.empty(1)
    _reduce_kernel[(1,)](x, y, "max", 64)
    assert y.item() == x.max().item()


def test_bf16_sum_is_refused():
    with pytest.raises(SanitizerError, match="accumulate in fp32"):
        _reduce_kernel[(1,)](torch.randn(64).to(torch.bfloat16), torch.empty(1), "sum", 64)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, M, MASKED: tl.constexpr, BLOCK_M: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    if MASKED:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < M), mask=offs < M)
    else:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs), mask=offs < M)


def test_load_past_the_end():
    x, y = torch.randn(20), torch.empty(20)
    _copy_kernel[(2,)](x, y, 20, MASKED=True, BLOCK_M=16)
    assert torch.equal(x, y)
    with pytest.raises(
        SanitizerError, match="out of bounds load by program 1, 12 lanes: byte 80 of x"
    ):
        _copy_kernel[(2,)](x, y, 20, MASKED=False, BLOCK_M=16)


def test_store_past_the_end():
    with pytest.raises(SanitizerError, match="out of bounds store by program 1, 4 lanes"):
        _copy_kernel[(2,)](torch.randn(32), torch.empty(20), 24, MASKED=True, BLOCK_M=16)


def test_a_view_is_not_left_even_inside_its_storage():
    pool = torch.randn(64)
    with pytest.raises(SanitizerError, match="out of bounds load"):
        _copy_kernel[(1,)](pool[:20], torch.empty(32), 24, MASKED=True, BLOCK_M=32)


@triton.jit
def _masked_sum_kernel(x_ptr, y_ptr, C, OTHER: tl.constexpr, BLOCK_C: tl.constexpr):
    cols = tl.arange(0, BLOCK_C)
    if OTHER:
        x = tl.load(x_ptr + cols, mask=cols < C, other=0.0)
    else:
        x = tl.load(x_ptr + cols, mask=cols < C)
    tl.store(y_ptr, tl.sum(x.to(tl.float32), axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_missing_other_reaches_the_result(dtype):
    x, y = torch.ones(20, dtype=dtype), torch.empty(1)
    _masked_sum_kernel[(1,)](x, y, 20, OTHER=True, BLOCK_C=32)
    assert y.item() == 20
    _masked_sum_kernel[(1,)](x, y, 20, OTHER=False, BLOCK_C=32)
    assert y.isnan().item()


@triton.jit
def _reduce_rows_kernel(x_ptr, y_ptr, SHARED: tl.constexpr, C: tl.constexpr):
    pid = tl.program_id(0)
    cols = tl.arange(0, C)
    x = tl.load(x_ptr + pid * C + cols)
    row = 0 if SHARED else pid
    tl.store(y_ptr + row * C + cols, x)


def test_two_programs_write_one_element():
    x, y = torch.randn(3, 16), torch.empty(3, 16)
    _reduce_rows_kernel[(3,)](x, y, SHARED=False, C=16)
    assert torch.equal(x, y)
    with pytest.raises(
        SanitizerError, match="race: program 1 writes y_ptr, already written by program 0"
    ):
        _reduce_rows_kernel[(3,)](x, y, SHARED=True, C=16)


@triton.jit
def _neighbour_kernel(x_ptr, C: tl.constexpr, OFFSET: tl.constexpr):
    pid = tl.program_id(0)
    n = tl.num_programs(0)
    cols = tl.arange(0, C)
    x = tl.load(x_ptr + ((pid + OFFSET + n) % n) * C + cols)
    tl.store(x_ptr + pid * C + cols, x + 1.0)


def test_programs_read_what_another_one_writes():
    x = torch.zeros(3, 16)
    _neighbour_kernel[(3,)](x, C=16, OFFSET=0)  # in place, each its own row
    assert torch.equal(x, torch.ones(3, 16))
    with pytest.raises(
        SanitizerError, match="race: program 1 reads x_ptr, already written by program 0"
    ):
        _neighbour_kernel[(3,)](x, C=16, OFFSET=-1)
    with pytest.raises(
        SanitizerError, match="program 1 writes x_ptr, already read by another program"
    ):
        _neighbour_kernel[(3,)](x, C=16, OFFSET=1)


def test_a_race_through_two_views_of_one_storage():
    x = torch.randn(3, 16)
    with pytest.raises(SanitizerError, match="race: program 1 reads"):
        _reduce_rows_kernel[(2,)](x, x[1:], SHARED=False, C=16)


@triton.jit
def _scatter_kernel(y_ptr, DIVISOR: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs // DIVISOR, offs.to(tl.float32))


def test_two_lanes_write_one_element():
    _scatter_kernel[(1,)](torch.empty(16), DIVISOR=1, N=16)
    with pytest.raises(SanitizerError, match="two lanes of program 0 write one element of y_ptr"):
        _scatter_kernel[(1,)](torch.empty(16), DIVISOR=2, N=16)


@triton.jit
def _overwrite_kernel(z_ptr, target_ptr, loss_ptr, BARRIER: tl.constexpr, C: tl.constexpr):
    # As a cross-entropy does that turns logits into their gradient in place.
    cols = tl.arange(0, C)
    z = tl.load(z_ptr + cols)
    tl.store(loss_ptr, tl.load(z_ptr + tl.load(target_ptr)))
    if BARRIER:
        tl.debug_barrier()
    tl.store(z_ptr + cols, z * 0.5)


@triton.jit
def _exchange_kernel(x_ptr, scratch_ptr, y_ptr, BARRIER: tl.constexpr, C: tl.constexpr):
    cols = tl.arange(0, C)
    tl.store(scratch_ptr + cols, tl.load(x_ptr + cols))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + cols, tl.load(scratch_ptr + (C - 1 - cols)))


def test_overwritten_after_another_lane_read_it():
    z, loss = torch.randn(16), torch.empty(1)
    target = torch.tensor([3])
    _overwrite_kernel[(1,)](z.clone(), target, loss, BARRIER=True, C=16)
    assert loss.item() == z[3].item()
    with pytest.raises(SanitizerError, match="overwrites z_ptr after another lane of it has read"):
        _overwrite_kernel[(1,)](z, target, loss, BARRIER=False, C=16)


def test_read_after_another_lane_wrote_it():
    x, scratch, y = torch.randn(3, 16)
    _exchange_kernel[(1,)](x, scratch, y, BARRIER=True, C=16)
    assert torch.equal(y, x.flip(0))
    with pytest.raises(
        SanitizerError, match="reads scratch_ptr where another lane of it has written"
    ):
        _exchange_kernel[(1,)](x, scratch, y, BARRIER=False, C=16)


@triton.jit
def _count_kernel(x_ptr, count_ptr, BLOCK_M: tl.constexpr):
    offs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.atomic_add(count_ptr, tl.sum(tl.load(x_ptr + offs), axis=0))


def test_atomics_may_meet():
    x, count = torch.ones(64), torch.zeros(1)
    _count_kernel[(4,)](x, count, BLOCK_M=16)
    assert count.item() == 64


def test_loop_bound_from_a_tensor():
    x, y = torch.randn(7, 16), torch.empty(16)
    _column_sum_kernel[(1,)](x, y, torch.tensor([7], dtype=torch.int32), C=16)
    torch.testing.assert_close(y, x.sum(0))


@triton.jit
def _column_sum_kernel(x_ptr, y_ptr, rows_ptr, C: tl.constexpr):
    cols = tl.arange(0, C)
    total = tl.zeros((C,), tl.float32)
    for row in range(tl.load(rows_ptr)):
        total += tl.load(x_ptr + row * C + cols)
    tl.store(y_ptr + cols, total)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(4, 4),
        torch.empty_like,
        lambda like: like.new_empty(4, 4),
        lambda like: torch.empty_strided((4, 4), (1, 4)),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_allocations_are_poisoned(allocate, dtype):
    torch.set_default_dtype(dtype)
    try:
        assert allocate(torch.zeros(4, 4)).isnan().all()
    finally:
        torch.set_default_dtype(torch.float32)
