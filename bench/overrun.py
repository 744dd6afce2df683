"""A store past the end of a tensor: what compute-sanitizer has to find in `bench.gpu`."""

# Launches take a constexpr as an int, which the triton stubs do not know.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl


@triton.jit
def _overrun_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


def run(device: torch.device) -> None:
    _overrun_kernel[(1,)](torch.empty(64, device=device), BLOCK=4096)
    torch.cuda.synchronize()
