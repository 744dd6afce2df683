"""The builds that `bench.resources` compiles without a GPU, read off the kernels' own signatures.

Every kernel module has `aot_cases(arch)`, which yields each build its ops can choose on a chip. It
asks for launches with the keys of the ops, so no row can ship unchecked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ._launch import Launch

# What is not the operands' dtype, as pointers are, nor a 32-bit integer, as all else is.
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
    """One build of one kernel.

    Args:
        op: public op the kernel belongs to, e.g. "layer_norm".
        kernel: the `@jit` function.
        label: what tells this build from its neighbours, e.g. "fwd C=768 bf16".
        launch: the row.
        signature: type of each argument that is no constexpr, e.g. {"x_ptr": "*bf16", "C": "i32"}.
        constexprs: every constexpr argument, and None for a pointer that is not passed.
        mma_rows: rows of the smallest `tl.dot` tile with 16-bit or TF32 operands. From 64 on,
            sm_90 must use HGMMA. 0: no `tl.dot`, or exact fp32.
        unaligned: arguments that need not be a multiple of 16 (bytes for a pointer); all other
            pointers and integers are compiled as multiples, as triton specialises nice shapes.
    """

    op: str
    kernel: Any
    label: str
    launch: Launch
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    mma_rows: int
    unaligned: Sequence[str]


def aot_case(
    op: str,
    kernel: Any,
    label: str,
    launch: Launch,
    dtype: str,
    constexprs: Mapping[str, Any] = {},
    *,
    types: Mapping[str, str] = {},
    mma: str = "",
    unaligned: Sequence[str] = (),
) -> AotCase:
    """A case with pointers of `dtype`, but for TYPES and `types`.

    Of `constexprs` and of the launch's blocks it takes those that the kernel has. `mma` is the
    block that gives the rows of the smallest product; "" where none uses tensor cores.
    """
    names = kernel.arg_names
    known = {**dict(launch.blocks), **constexprs}
    fixed = {name: known[name] for name in names if name in known}
    special = {**TYPES, **types}
    signature = {
        name: special.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in names
        if name not in fixed
    }
    return AotCase(op, kernel, label, launch, signature, fixed, fixed.get(mma, 0), unaligned)
