"""Launch arithmetic and tuned launch tables shared by the kernels. No tensors here.

Tuning is committed data. A table row is written by a person from a measurement (`bench.tune`
proposes it) and carries the result file it came from; a key without a row takes the safe row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One launch configuration.

    Args:
        blocks: constexpr block sizes by kernel parameter name, e.g. {"BLOCK_M": 128}.
        num_warps, num_stages: as in triton.
        source: result file and date that chose the row, or why it is the safe row.
        maxnreg: register limit per thread, where it buys another program per SM; as in triton.
        programs_per_sm: programs of a persistent grid that are to run side by side on one SM.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    source: str
    maxnreg: int | None = None
    programs_per_sm: int = 1

    def kwargs(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        warps = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**dict(self.blocks), **warps, **limit}


@dataclass(frozen=True)
class AotCase:
    """One build of one kernel, as `bench.resources` compiles and checks it without a GPU.

    Every kernel module has `aot_cases(arch: int) -> Iterator[AotCase]`, which yields each build
    its launch function can choose on that compute capability: the table rows of 80, 90 and 100,
    and the safe row for every arch. It builds the launch through the same function as the op, so
    a row cannot ship unchecked.

    Args:
        op: public op the kernel belongs to, e.g. "layer_norm".
        kernel: the `@triton.jit` function.
        label: what tells this row from its neighbours, e.g. "C=768 bf16 safe".
        signature: type of each non-constexpr argument, e.g. {"x_ptr": "*bf16", "C": "i32",
            "eps": "fp32"}; a host descriptor is "tensordesc<bf16[128, 64]>".
        constexprs: every constexpr argument, and None for a pointer that is not passed.
        num_warps, num_stages, maxnreg: as in the launch.
        mma_rows: rows of the smallest `tl.dot` tile with 16-bit or TF32 operands. From 64 on,
            sm_90 must use HGMMA. 0: no `tl.dot`, or exact fp32.
        unaligned: arguments that need not be a multiple of 16 (bytes for a pointer); all other
            pointers and integers are compiled as multiples, as triton specialises nice shapes.
    """

    op: str
    kernel: Any
    label: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    mma_rows: int = 0
    unaligned: tuple[str, ...] = ()
    maxnreg: int | None = None


def next_pow2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def row_warps(block_c: int) -> int:
    """Warps for a kernel that holds one row of `block_c` elements in registers."""
    return min(max(block_c // 256, 1), 8)


@cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: any small number exercises the row loop
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def arch(device: torch.device) -> int:
    """Compute capability as triton names it: 90 for an H100 or H200; 0 off CUDA."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
