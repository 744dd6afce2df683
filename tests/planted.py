"""Kernels that must not ship, as `bench.resources` reads them; for test_resources.py alone."""

from collections.abc import Iterator
from functools import partial

import torch
import triton.language as tl

from bench.builds import Build, Run, record
from kernels._jit import jit
from kernels._launch import Key, Launch, launch_for


@jit
def _spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # N * N fp32 in one warp: 512 values a thread where 255 registers are all there is.
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + offs)
    total = tl.sum(tl.sum(x, axis=1), axis=0)
    tl.store(y_ptr + offs, x / total)


@jit
def _matmul_kernel(a_ptr, b_ptr, y_ptr, K, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_N):
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs)[:, None] * BLOCK_N + offs[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(y_ptr + offs[:, None] * BLOCK_N + offs[None, :], acc)


def builds(arch: int) -> Iterator[Build]:
    a, b, y = (torch.empty(128, 128, device="meta") for _ in "aby")

    def spills() -> None:
        row = launch_for(Key("planted.spilling", "fp32", "any", arch), Launch((("N", 128),), 1))
        _spilling_kernel[(1,)](a, y, **row.kwargs())

    def multiply(launch: Launch, precision: str) -> None:
        row = launch_for(Key("planted.matmul", "tf32", "any", arch), launch)
        _matmul_kernel[(1,)](a, b, y, 128, PRECISION=precision, **row.kwargs())

    cases: list[tuple[str, Run]] = [("spills", spills)]
    for label, block, warps, stages, programs, precision in (
        ("wants too much shared memory", 128, 8, 6, 1, "tf32"),
        ("claims TF32, is exact", 64, 4, 2, 1, "ieee"),
        ("does not build", 48, 4, 2, 1, "tf32"),
        ("claims too many programs", 64, 4, 2, 8, "tf32"),
        ("sound", 64, 4, 2, 2, "tf32"),
    ):
        launch = Launch((("BLOCK_N", block),), warps, stages, programs_per_sm=programs)
        cases.append((label, partial(multiply, launch, precision)))
    for label, run in cases:
        for build in record(run, arch):
            yield build._replace(op="planted", label=label)
