"""How a recipe runs on this machine: device, ops, dtype, compilation, micro-batches.

`detect` looks at the machine, `make_plan` decides from that description alone, so every decision
is testable for machines that are not at hand. A plan never changes what is trained.
"""

import os
import platform
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import Ops, parse_ops
from model.flops import flops_per_token
from training.recipes import Recipe

# torch.compile on a CPU calls these; openssl hashes its precompiled headers.
COMPILE_TOOLS = ("g++", "as", "ld", "openssl")
# Compiling takes about 20 s of CPU time with a cold cache and saves about a fifth of an fp32 run
# (4 layers, 256 wide, 2 cores: 1264 -> 1553 tokens/s), so it pays for runs over 100 s. Flops
# stand for time: 2 cores reach about 1e11 a second.
MIN_COMPILE_FLOPS = 1e13
EVAL_TOKENS = {"cpu": 8192, "cuda": 1 << 20}  # about a second of an evaluation during the run


@dataclass(frozen=True)
class Machine:
    """What the decisions depend on.

    Args:
        device: "cpu" or "cuda".
        name: Device name as the vendor writes it.
        arch: Compute capability, 90 for an H100; 0 on a CPU.
        num_threads: Threads torch uses on the CPU.
        has_bf16: bf16 matrix instructions: sm_80 on CUDA, AVX512-BF16 or AMX-BF16 on a CPU.
        missing_tools: What torch.compile needs and the machine lacks.
        interpreted: Triton kernels run on the CPU (TRITON_INTERPRET=1).
    """

    device: str
    name: str
    arch: int = 0
    num_threads: int = 1
    has_bf16: bool = False
    missing_tools: tuple[str, ...] = ()
    interpreted: bool = False


@dataclass(frozen=True)
class Plan:
    """How a recipe runs. Every field is a choice that leaves the losses as they are.

    Args:
        device, device_name: Where it runs.
        num_threads: CPU threads.
        ops: What `kernels.parse_ops` reads.
        dtype: "fp32", or "bf16" for autocast.
        compile: torch.compile on the model.
        micro_batch_size, num_micro_batches: Their product is the recipe's rows per step.
        eval_tokens: Validation tokens of an evaluation during the run; the last one takes all.
        notes: One line for each choice that someone might not expect.
    """

    device: str
    device_name: str
    num_threads: int
    ops: str
    dtype: str
    compile: bool
    micro_batch_size: int
    num_micro_batches: int
    eval_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def op_set(self) -> Ops:
        return parse_ops(self.ops)

    def describe(self) -> str:
        """The plan in one line."""
        return (
            f"plan: {self.device} ({self.device_name}, {self.num_threads} threads), ops {self.ops},"
            f" {self.dtype}, {'compiled' if self.compile else 'not compiled'}, "
            f"{self.num_micro_batches} x {self.micro_batch_size} rows a step"
        )


def detect(device: str = "auto") -> Machine:
    """Describe this machine; `device` is auto, cpu or cuda.

    Raises:
        ValueError: cuda is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("device: cuda asked for, but torch sees no GPU; use --device cpu or auto")
    tools = tuple(t for t in COMPILE_TOOLS if shutil.which(t) is None)
    common = Machine(
        device="cpu",
        name=_cpu_name(),
        num_threads=torch.get_num_threads(),
        missing_tools=tools,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1",
    )
    if device == "cpu" or not has_cuda:
        return replace(common, has_bf16=_cpu_has_bf16())
    major, minor = torch.cuda.get_device_capability()
    return replace(
        common,
        device="cuda",
        name=torch.cuda.get_device_name(),
        arch=10 * major + minor,
        has_bf16=major >= 8,
        missing_tools=tuple(t for t in tools if t == "g++"),
    )


def make_plan(
    recipe: Recipe,
    machine: Machine,
    ops: str = "auto",
    dtype: str = "auto",
    compile: bool | None = None,
) -> Plan:
    """Decide how `recipe` runs on `machine`; arguments other than auto and None are obeyed.

    Raises:
        ValueError: a choice asked for is impossible on this machine.
    """
    notes: list[str] = []
    ops = _choose_ops(ops, machine, notes)
    if dtype == "auto":
        dtype = "bf16" if machine.has_bf16 else "fp32"
        if not machine.has_bf16:
            notes.append(f"dtype fp32: {machine.name} has no bf16 matrix instructions")
    elif dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype: expected auto, bf16 or fp32, got {dtype!r}")
    elif dtype == "bf16" and not machine.has_bf16:
        notes.append(f"dtype bf16 as asked: {machine.name} emulates it, which is slow")
    return Plan(
        device=machine.device,
        device_name=machine.name,
        num_threads=machine.num_threads,
        ops=ops,
        dtype=dtype,
        compile=_choose_compile(compile, recipe, machine, notes),
        micro_batch_size=recipe.batch_size,
        num_micro_batches=recipe.grad_accum_steps,
        eval_tokens=EVAL_TOKENS[machine.device],
        notes=tuple(notes),
    )


def _choose_ops(ops: str, machine: Machine, notes: list[str]) -> str:
    if ops == "auto":
        if machine.device == "cuda" and machine.arch >= 80:
            notes.append(f"ops triton: sm_{machine.arch}")
            return "triton"
        why = "no GPU" if machine.device == "cpu" else f"sm_{machine.arch} is older than sm_80"
        notes.append(f"ops eager: {why}")
        return "eager"
    # Parsed without building the set: triton may not be importable here.
    base, *exceptions = (part.strip() for part in ops.split(","))
    wants_triton = base == "triton" or any(e.endswith("=triton") for e in exceptions)
    if wants_triton and machine.device == "cpu" and not machine.interpreted:
        raise ValueError(
            f"ops: {ops!r} needs a GPU; use --ops eager, or set TRITON_INTERPRET=1 to run the "
            "kernels on the CPU, slowly"
        )
    if wants_triton and machine.device == "cuda" and machine.arch < 80:
        raise ValueError(f"ops: {ops!r} needs sm_80 or newer, got sm_{machine.arch}")
    parse_ops(ops)
    return ops


def _choose_compile(
    wanted: bool | None, recipe: Recipe, machine: Machine, notes: list[str]
) -> bool:
    missing = ", ".join(machine.missing_tools)
    if wanted and missing:
        raise ValueError(f"compile: torch.compile needs {missing} in PATH; leave --compile out")
    if wanted is not None:
        return wanted
    if missing:
        notes.append(f"not compiled: torch.compile needs {missing} in PATH")
        return False
    total = flops_per_token(recipe.model_config, recipe.block_size) * (
        recipe.tokens_per_step * recipe.max_steps
    )
    if machine.device == "cpu" and total < MIN_COMPILE_FLOPS:
        notes.append(
            f"not compiled: {total:.1e} flops in all is too little for compiling to pay "
            f"(from {MIN_COMPILE_FLOPS:.0e}; --compile insists)"
        )
        return False
    return True


def _cpu_has_bf16() -> bool:
    # The query is private until torch 2.12 or so; Linux names the flags either way.
    try:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    except (AttributeError, RuntimeError):
        flags = _cpuinfo("flags").split()
        return "avx512_bf16" in flags or "amx_bf16" in flags


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next(
        (v.strip() for k, _, v in (x.partition(":") for x in lines) if k.strip() == key), ""
    )
