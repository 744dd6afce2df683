"""Kernels that must not ship, as `bench.resources` reads them; for test_resources.py alone."""

from collections.abc import Iterator

import triton
import triton.language as tl

from kernels._launch import AotCase


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # N * N fp32 in one warp: 512 values a thread where 255 registers are all there is.
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    total = tl.sum(tl.sum(x, axis=1), axis=0)
    tl.store(y_ptr + offs, x / total)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, y_ptr, K, N: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, K, N):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs)[:, None] * N + offs[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(y_ptr + offs[:, None] * N + offs[None, :], acc)


def aot_cases(arch: int) -> Iterator[AotCase]:
    yield AotCase(
        op="layer_norm", kernel=_spilling_kernel, label="spills",
        signature={"x_ptr": "*fp32", "y_ptr": "*fp32"}, constexprs={"N": 128},
        num_warps=1, num_stages=1,
    )  # fmt: skip
    matmul = {"a_ptr": "*fp32", "b_ptr": "*fp32", "y_ptr": "*fp32", "K": "i32"}
    yield AotCase(
        op="gelu_mlp", kernel=_matmul_kernel, label="wants too much shared memory",
        signature=matmul, constexprs={"N": 128, "PRECISION": "tf32"}, num_warps=8, num_stages=6,
        mma_rows=128,
    )  # fmt: skip
    yield AotCase(
        op="gelu_mlp", kernel=_matmul_kernel, label="claims TF32, is exact",
        signature=matmul, constexprs={"N": 64, "PRECISION": "ieee"}, num_warps=4, num_stages=2,
        mma_rows=64,
    )  # fmt: skip
    yield AotCase(
        op="gelu_mlp", kernel=_matmul_kernel, label="does not build",
        signature=matmul, constexprs={"N": 48, "PRECISION": "tf32"}, num_warps=4, num_stages=2,
    )  # fmt: skip
    yield AotCase(
        op="gelu_mlp", kernel=_matmul_kernel, label="sound",
        signature=matmul, constexprs={"N": 64, "PRECISION": "tf32"}, num_warps=4, num_stages=2,
        mma_rows=64,
    )  # fmt: skip
