"""`triton.jit` as it is for a type checker: launches take num_warps, constexprs plain numbers."""

from typing import Any

import triton

jit: Any = triton.jit
