"""Launch arithmetic and tuned launch tables shared by the kernels. No tensors here.

Tuning is committed data. A table row is written by a person from a measurement (`bench.tune`
proposes it) and carries the result file it came from; a key without a row takes the safe row.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Launch:
    """One launch configuration.

    Args:
        blocks: constexpr block sizes by kernel parameter name, e.g. {"BLOCK_M": 128}.
        num_warps, num_stages: as in triton.
        source: result file and date that chose the row, or why it is the safe row.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    source: str

    def kwargs(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


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
