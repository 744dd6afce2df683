"""`triton.jit` for the kernels."""

from typing import Any

import triton

jit: Any = triton.jit  # a type checker need not know that launches take num_warps and the like
