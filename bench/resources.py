"""What each kernel build takes of an SM, found by compiling alone: no GPU, no driver.

    python -m bench.resources
    python -m bench.resources --arch 90 --op causal_attention
    python -m bench.resources --json resources.json

The builds are those of bench/builds.py. The exit status is 1 if a build fails,
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import kernels
from bench import cli
from bench.builds import Build
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
PRODUCT = re.compile(rf"\b({'|'.join(TENSOR_OPS)})\b")
PROCESSES = 2
REPORT_VERSION = 5  # part of the cache key; raise it when `_measure` reads something else


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
    outside: int = 0  # instructions outside the loops with products: prologue and epilogue
    tensor_ops: dict[str, int] = field(default_factory=dict)
    violations: tuple[str, ...] = ()


def compiled(build: Build) -> Any:
    """Compile one build; returns triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", build.arch, 32)
    return triton.compile(build.source, target=target, options=build.options)


def _measure(build: Build) -> dict[str, Any]:
    """Registers, spills and warnings of ptxas, instructions by nvdisasm; kept on disk."""
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        kernel = compiled(build)
        kept = Path(knobs.cache.dir) / f"fused_gpt_resources/{kernel.hash}-{REPORT_VERSION}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        if not said.getvalue():
            # It came from triton's cache, which does not keep what ptxas said. Only triton itself
            # can compile it again: its choice of ptxas and flags changes the registers.
            knobs.compilation.always_compile = True
            kernel = compiled(build)
            knobs.compilation.always_compile = False
    ptxas, ptx = said.getvalue(), kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", cubin.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(pattern: str, text: str = ptxas) -> int:
        found = re.search(pattern, text)
        assert found is not None, ptxas
        return int(found[1])

    dots = re.findall(r"tt\.dot .* tensor<(\d+)x", kernel.asm["ttir"])
    mnemonics = Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", sass))
    found = {
        "registers": number(r"Used (\d+) registers"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": kernel.metadata.shared,
        "threads": number(r"\.reqntid (\d+)", ptx),
        "serialised": "wgmma.mma_async instructions are serialized" in ptxas,
        "outside": outside_loops(sass),
        "dot_rows": min(map(int, dots), default=0),
        "tensor_ops": {op: mnemonics[op] for op in TENSOR_OPS if mnemonics[op]},
    }
    write_atomically(kept, json.dumps(found))  # two processes may measure one build
    return found


def outside_loops(sass: str) -> int:
    """Instructions of nvdisasm's listing that stand outside the innermost loops with products."""
    listed: list[str] = []
    labels: dict[str, int] = {}
    loops: list[set[int]] = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(listed)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            listed.append(line)
            back = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
            if back and back[1] in labels:
                loops.append({*range(labels[back[1]], len(listed))})
            elif re.search(r"\*/\s+EXIT\b", line):
                break  # what follows waits, and jumps back into the middle
    products = [loop for loop in loops if any(PRODUCT.search(listed[i]) for i in loop)]
    inner = [loop for loop in products if not any(other < loop for other in products)]
    return len(listed) - len(set().union(*inner))


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


def inspect(build: Build) -> Resources:
    """Compile a build and say what it takes and what is wrong with it."""
    arch = build.arch
    row = Resources(build.op, build.source.name, build.label, arch)
    try:
        found = _measure(build)
    except Exception as error:  # whatever stops a build is a finding, not a crash
        reason = str(error).strip().splitlines() or [""]
        violation = f"does not build: {type(error).__name__}: {reason[-1][:200]}"
        return replace(row, violations=(violation,))
    shared, limit = found["shared_bytes"], ARCHS[arch].block_shared
    threads, serialised, rows = (found.pop(k) for k in ("threads", "serialised", "dot_rows"))
    fit = blocks_per_sm(found["registers"], threads, shared, arch)
    violations = []
    if found["stack_bytes"] or found["spill_bytes"]:
        violations.append(f"spills {found['spill_bytes']} B, stack {found['stack_bytes']} B")
    if shared > limit:
        violations.append(f"shared memory {shared} B, a block may have {limit}")
    elif fit < (wanted := build.launch.programs_per_sm):
        violations.append(f"{fit} programs fit on an SM, the row counts on {wanted}")
    if serialised:
        violations.append("WGMMA is serialised")
    exact = build.key.math == "ieee"
    if arch == 90 and not exact and rows >= HGMMA_MIN_ROWS and "HGMMA" not in found["tensor_ops"]:
        violations.append(f"no HGMMA with {rows} rows")
    return replace(row, **found, blocks_per_sm=fit, violations=tuple(violations))


def table(
    recorded: Callable[[int], Iterable[Build]], archs: Sequence[int], ops: Sequence[str] = ()
) -> Iterator[Resources]:
    """A row for each build that `recorded` gives for a chip, as soon as it is measured.

    Raises:
        ValueError: nothing to build, or the interpreter is on: it replaces `triton.jit`.
    """
    if INTERPRETED:
        raise ValueError("resources: cannot compile under TRITON_INTERPRET=1; unset it")
    _BUILDS[:] = [b for arch in archs for b in recorded(arch) if not ops or b.op in ops]
    if not _BUILDS:
        raise ValueError(f"resources: no build of {', '.join(ops)}")
    # A jitted function does not pickle, so forked workers inherit the builds. Nothing opens CUDA.
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        yield from pool.map(_inspect_at, range(len(_BUILDS)))


_BUILDS: list[Build] = []


def _inspect_at(index: int) -> Resources:
    return inspect(_BUILDS[index])


LINE = "{:<21}{:<34}{:<44}{:>4}{:>6}{:>7}{:>7}{:>9}{:>8}{:>8}  {}"
HEADER = "op kernel row sm regs spill stack shared CTA/SM outside tensor"


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
    add("--module", default="bench.builds", help="where `builds` is")
    add("--json", type=cli.path, help="also write the table there")
    args = parser.parse_args(argv)
    rows = []
    print(LINE.format(*HEADER.split()))
    recorded = importlib.import_module(args.module).builds
    for row in table(recorded, args.arch or [*ARCHS], args.op or ()):
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
