"""`triton.jit`, and the builds that `bench.resources` compiles without a GPU.

`aot_cases(arch)` of a kernel module yields each build that its ops can choose on a chip. It asks
for launches with the keys of the ops, so no row can ship unchecked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import triton

from ._launch import Launch

jit: Any = triton.jit  # a type checker need not know that launches take num_warps and the like

# Other pointers are to the operands' dtype, other arguments 32-bit integers.
_NAMES = {
    "*i64": "targets_ptr count_ptr table_ptr idx_ptr ids_ptr order_ptr",
    "*i32": "chunks_ptr",
    "*fp64": "numbers_ptr",
    "*fp32": "weight_ptr bias_ptr b_ptr stats_ptr partial_ptr sums_ptr lse_ptr delta_ptr "
    "row_loss_ptr dloss_ptr dwte_ptr carry_ptr",
    "fp32": "eps scale max_norm",
}
TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}


@dataclass(frozen=True)
class AotCase:
    """One build of one kernel."""

    op: str  # public op that the kernel belongs to
    kernel: Any  # the `@jit` function; its parameters give the names of the arguments
    label: str  # what tells this build from the kernel's others, e.g. "fwd C=768 bf16"
    launch: Launch
    dtype: str  # of the operands, e.g. "bf16"
    # Constexprs that the launch leaves open, and None for a pointer that is not passed. Names that
    # the kernel lacks are ignored.
    values: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)  # where neither `dtype` nor TYPES fits
    # The block that gives the rows of the smallest `tl.dot` with 16-bit or TF32 operands, if any.
    mma: str = ""
    # Arguments that need not be a multiple of 16 (bytes for a pointer). All other pointers and
    # integers are compiled as multiples, as triton specialises nice shapes.
    unaligned: Sequence[str] = ()

    @property
    def constexprs(self) -> dict[str, Any]:
        """The value of every constexpr, and None for a pointer that is not passed."""
        known = {**dict(self.launch.blocks), **self.values}
        return {name: known[name] for name in self.kernel.arg_names if name in known}

    @property
    def signature(self) -> dict[str, str]:
        """The type of each other argument, e.g. {"x_ptr": "*bf16", "M": "i32"}."""
        special, fixed = {**TYPES, **self.types}, self.constexprs
        return {
            name: special.get(name, f"*{self.dtype}" if name.endswith("_ptr") else "i32")
            for name in self.kernel.arg_names
            if name not in fixed
        }

    @property
    def mma_rows(self) -> int:
        """Rows of that `tl.dot`, 0 without one. From 64 on, sm_90 must use HGMMA."""
        return self.constexprs.get(self.mma, 0)
