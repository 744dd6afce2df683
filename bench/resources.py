"""What each kernel build takes of an SM, found by compiling alone: no GPU, no driver.

    python -m bench.resources
    python -m bench.resources --arch 90 --op causal_attention
    python -m bench.resources --json resources.json

Each kernel module lists its builds in `aot_cases(arch)`. The exit status is 1 if a build fails,
spills, needs more shared memory than a block may have, fits on an SM fewer times than its launch
row counts on, has its WGMMA serialised, or on sm_90 has no HGMMA in a 16-bit or TF32 tile of 64
rows or more. The table does not show that a row is fast; it sometimes shows that it cannot be.
"""

import concurrent.futures
import contextlib
import importlib
import io
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import kernels
from bench import cli
from kernels._aot import AotCase
from kernels._launch import cdiv
from kernels._op import INTERPRETED
from model.edge import exits
from model.files import write_atomically
from training.environment import package_version
from training.metrics import write_json


class Arch(NamedTuple):
    """Limits of one compute capability: CUDA C++ Programming Guide 13, table 'Technical
    Specifications per Compute Capability'."""

    block_shared: int  # bytes, opt-in
    sm_shared: int
    sm_warps: int
    sm_blocks: int


ARCHS = {
    80: Arch(163 << 10, 164 << 10, 64, 32),
    86: Arch(99 << 10, 100 << 10, 48, 16),
    89: Arch(99 << 10, 100 << 10, 48, 24),
    90: Arch(227 << 10, 228 << 10, 64, 32),
    100: Arch(227 << 10, 228 << 10, 64, 32),
    120: Arch(99 << 10, 100 << 10, 48, 24),
}
SM_REGISTERS = 65536
BLOCK_RESERVED_SHARED = 1024  # what the runtime keeps of each block's shared memory
HGMMA_MIN_ROWS = 64  # a warpgroup's WGMMA is 64 rows; smaller tiles rightly use HMMA
TENSOR_OPS = ("HMMA", "HGMMA", "UTCHMMA")
PROCESSES = 2
REPORT_VERSION = 2  # part of the cache key; raise it when `_measure` reads something else


@dataclass(frozen=True)
class Resources:
    """One build; `violations` say why it must not ship."""

    op: str
    kernel: str
    label: str
    arch: int
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    blocks_per_sm: int = 0
    tensor_ops: dict[str, int] = field(default_factory=dict)
    violations: tuple[str, ...] = ()


def build(case: AotCase, arch: int) -> Any:
    """Compile one case ahead of time; returns triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, names = case.kernel, case.kernel.arg_names
    for parameter in kernel.params:
        if parameter.is_constexpr and parameter.name in case.signature:
            raise ValueError(f"{case.label}: {parameter.name} is a constexpr and has no value")
    # The JIT finds these divisors on usual shapes. Without them no load is wide or asynchronous.
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in case.unaligned
        and case.signature.get(name, "").startswith(("*", "i32", "i64"))
    }
    source = ASTSource(
        fn=kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs=divisible,
    )
    options = {k: v for k, v in case.launch.kwargs().items() if k not in names}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _measure(case: AotCase, arch: int) -> dict[str, Any]:
    """Registers, spills and warnings of ptxas, instructions by nvdisasm; kept on disk."""
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = build(case, arch)
        kept = Path(knobs.cache.dir) / f"fused_gpt_resources/{compiled.hash}-{REPORT_VERSION}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        if not said.getvalue():
            # It came from triton's cache, which does not keep what ptxas said. Only triton itself
            # can compile it again: its choice of ptxas and flags changes the registers.
            knobs.compilation.always_compile = True
            compiled = build(case, arch)
            knobs.compilation.always_compile = False
    ptxas, ptx, sass = said.getvalue(), compiled.asm["ptx"], ""
    if "mma" in ptx:  # mma.sync, wgmma or tcgen05.mma; nvdisasm is the slowest step here
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [knobs.nvidia.nvdisasm.path, "-c", cubin.name]
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(pattern: str, text: str = ptxas) -> int:
        found = re.search(pattern, text)
        assert found is not None, ptxas
        return int(found[1])

    mnemonics = Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", sass))
    found = {
        "registers": number(r"Used (\d+) registers"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,
        "threads": number(r"\.reqntid (\d+)", ptx),
        "serialised": "wgmma.mma_async instructions are serialized" in ptxas,
        "tensor_ops": {op: mnemonics[op] for op in TENSOR_OPS if mnemonics[op]},
    }
    write_atomically(kept, json.dumps(found))  # two processes may measure one build
    return found


def blocks_per_sm(registers: int, threads: int, shared_bytes: int, arch: int) -> int:
    """How many blocks of a kernel fit on one SM."""
    limits = ARCHS[arch]
    warps = cdiv(threads, 32)
    warp_registers = cdiv(registers * 32, 256) * 256  # a warp gets them in units of 256
    return min(
        limits.sm_blocks,
        limits.sm_warps // warps,
        SM_REGISTERS // (warp_registers * warps),
        limits.sm_shared // (shared_bytes + BLOCK_RESERVED_SHARED),
    )


def inspect_case(case: AotCase, arch: int) -> Resources:
    row = Resources(case.op, case.kernel.__name__, case.label, arch)
    try:
        found = _measure(case, arch)
    except Exception as error:  # whatever stops a build is a finding, not a crash
        reason = str(error).strip().splitlines() or [""]
        violation = f"does not build: {type(error).__name__}: {reason[-1][:200]}"
        return replace(row, violations=(violation,))
    shared, limit = found["shared_bytes"], ARCHS[arch].block_shared
    threads, serialised = found.pop("threads"), found.pop("serialised")
    fit = blocks_per_sm(found["registers"], threads, shared, arch)
    violations = []
    if found["stack_bytes"] or found["spill_bytes"]:
        violations.append(f"spills {found['spill_bytes']} B, stack {found['stack_bytes']} B")
    if shared > limit:
        violations.append(f"shared memory {shared} B, a block may have {limit}")
    elif fit < (wanted := case.launch.programs_per_sm):
        violations.append(f"{fit} programs fit on an SM, the row counts on {wanted}")
    if serialised:
        violations.append("WGMMA is serialised")
    if arch == 90 and case.mma_rows >= HGMMA_MIN_ROWS and "HGMMA" not in found["tensor_ops"]:
        violations.append(f"no HGMMA with {case.mma_rows} rows")
    return replace(row, **found, blocks_per_sm=fit, violations=tuple(violations))


def kernel_modules() -> list[str]:
    """The modules of the public ops and of the optimizer."""
    ops = (getattr(kernels.TRITON, f.name).__module__ for f in fields(kernels.Ops))
    return [*dict.fromkeys(ops), "kernels.adamw"]


def table(
    modules: Sequence[str], archs: Sequence[int], ops: Sequence[str] = ()
) -> Iterator[Resources]:
    """A row for each build of these modules and ops, as soon as it is measured.

    Raises:
        ValueError: nothing to build, or the interpreter is on: it replaces `triton.jit`.
    """
    if INTERPRETED:
        raise ValueError("resources: cannot compile under TRITON_INTERPRET=1; unset it")
    cases: list[tuple[AotCase, int]] = []
    for module in map(importlib.import_module, modules):
        for arch in archs:
            cases += [(c, arch) for c in module.aot_cases(arch) if not ops or c.op in ops]
    if not cases:
        raise ValueError(f"resources: no case of ops {[*ops]} in modules {[*modules]}")
    # A jitted function does not pickle, so forked workers inherit the cases. Nothing opens CUDA.
    _CASES[:] = cases
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        yield from pool.map(_inspect_at, range(len(cases)))


_CASES: list[tuple[AotCase, int]] = []


def _inspect_at(index: int) -> Resources:
    return inspect_case(*_CASES[index])


LINE = "{:<21}{:<30}{:<44}{:>4}{:>6}{:>7}{:>7}{:>9}{:>8}  {}"
HEADER = "op kernel row sm regs spill stack shared CTA/SM tensor"


def format_row(row: Resources) -> str:
    values = asdict(row)
    values["kernel"] = row.kernel.strip("_")
    values["tensor_ops"] = " ".join(f"{op} {n}" for op, n in row.tensor_ops.items()) or "-"
    *cells, tensor, violations = values.values()
    lines = [LINE.format(*cells, tensor), *(f"    VIOLATION: {text}" for text in violations)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.resources", __doc__)
    add = parser.add_argument
    add("--arch", type=int, action="append", choices=[*ARCHS], help="default: all")
    ops = [*(f.name for f in fields(kernels.Ops)), "adamw"]
    add("--op", action="append", choices=ops, help="default: all")
    add("--module", action="append", help="modules with aot_cases; default: kernels")
    add("--json", type=cli.path, help="also write the table there")
    args = parser.parse_args(argv)
    rows = []
    print(LINE.format(*HEADER.split()))
    for row in table(args.module or kernel_modules(), args.arch or [*ARCHS], args.op or ()):
        print(format_row(row), flush=True)
        rows.append(row)
    failed = [row for row in rows if row.violations]
    triton = package_version("triton")
    if args.json:
        write_json(args.json, {"triton": triton, "rows": [asdict(row) for row in rows]})
    for row in failed:  # again, at the end of a long table
        print(format_row(row))
    verdict = f"{len(failed)} of them in violation" if failed else "none spills, all fit"
    print(f"resources: {len(rows)} builds with triton {triton}, {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    with exits():  # no thread that prints: the workers are forks
        sys.exit(main())
