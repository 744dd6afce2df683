"""Kernels that must not ship, as `bench.resources` reads them; for test_resources.py alone."""

from collections.abc import Iterator

import triton
import triton.language as tl

from kernels._aot import AotCase
from kernels._launch import Launch


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # N * N fp32 in one warp: 512 values a thread where 255 registers are all there is.
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    total = tl.sum(tl.sum(x, axis=1), axis=0)
    tl.store(y_ptr + offs, x / total)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, y_ptr, K, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_N):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs)[:, None] * BLOCK_N + offs[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(y_ptr + offs[:, None] * BLOCK_N + offs[None, :], acc)


def aot_cases(arch: int) -> Iterator[AotCase]:
    yield AotCase(
        "layer_norm", _spilling_kernel, "spills", Launch((("N", 128),), num_warps=1), "fp32"
    )
    tf32, ieee = {"PRECISION": "tf32"}, {"PRECISION": "ieee"}
    for label, block, warps, stages, programs, constexprs in (
        ("wants too much shared memory", 128, 8, 6, 1, tf32),
        ("claims TF32, is exact", 64, 4, 2, 1, ieee),
        ("does not build", 48, 4, 2, 1, tf32),
        ("lacks a constexpr", 64, 4, 2, 1, {}),
        ("claims too many programs", 64, 4, 2, 8, tf32),
        ("sound", 64, 4, 2, 2, tf32),
    ):
        launch = Launch((("BLOCK_N", block),), warps, stages, programs_per_sm=programs)
        yield AotCase("gelu_mlp", _matmul_kernel, label, launch, "fp32", constexprs, mma="BLOCK_N")
