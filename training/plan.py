"""How a recipe runs on this machine: device, ops, dtype, compilation, micro-batches, optimizer.

`make_plan` decides from a description of the machine (`training/machines.py`) and from what was
asked for (`Choices`) alone, so each decision can be tested for machines that are not available.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from kernels import SDPA, Ops, parse_ops, read_ops, unfit
from model.flops import flops_per_token
from training import memory
from training.machines import Machine
from training.machines import detect as detect  # for those who make a plan
from training.recipes import Recipe

# Compiling the blocks takes 20 to 30 s of CPU time with a cold cache and saves 1.5 to 4% of a step
# (bench/LOG.md), so it pays for runs over a quarter of an hour: 2 cores do 1e11 to 4e11 flop/s.
MIN_COMPILE_FLOPS = 2e14
CPU_TOKENS = 4096  # at once; with 1,024, products spend 4 to 14% on packing weights again
EVAL_TOKENS = {"cpu": 8192, "cuda": 1 << 20}  # read by an evaluation during the run, in about 1 s
# Share of a GPU's memory for what training/memory.py counts. The rest is for the CUDA context,
# cuBLAS workspaces, the allocator's fragments and a desktop.
MEMORY_SHARE = 0.85
ID_BYTES = 32  # per token of a step: ids and targets, in the step's buffers and read ahead
UNKNOWN_BYTES = 1 << 40  # assumed if the memory size is unknown
MIN_TRITON_ARCH = 80  # the oldest the kernels are built and checked for; see kernels/_op.py
MIN_FP16_ARCH = 70  # the oldest with fast fp16 products
MIN_SDPA_ARCH = 80  # the oldest that PyTorch's flash attention and cuDNN's run on, in 16 bits

_SHARED = {"optimizer": "AdamW's state", "full": "the blocks' matrices and AdamW's state"}
_STATES = {"auto": None, "on": True, "off": False}


_THREE_STATES = tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1),
    metavar="{auto,on,off}",
    choices=tuple(_STATES),
    instance_from_str=lambda words: _STATES[words[0] if words else "on"],  # a bare flag is "on"
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [word for word, is_ in _STATES.items() if is_ is value],
)
Switch = Annotated[bool | None, _THREE_STATES]


@dataclass(frozen=True)
class Choices:
    """What the user may decide instead of the plan; each field is a flag of train.py."""

    ops: str = "auto"
    """auto, triton, eager or compiled, with exceptions as in triton,layer_norm=eager;
    causal_attention may also be sdpa-cudnn or sdpa-flash."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 and fp16 mean autocast with fp32 weights, fp16 with loss scaling. auto: bf16 if the
    hardware is fast in it, else fp16 on a GPU that is fast in that (T4, V100, 20xx), else fp32."""
    compile: Switch = None
    """torch.compile the model; auto: if it works here and pays."""
    compile_scope: Literal["auto", "model", "blocks"] = "auto"
    """Compile the whole model as one graph, or one block for all layers, which starts sooner."""
    micro_batch_size: int = 0
    """Rows computed at once; 0: as many of a step's rows as fit, on a CPU up to 4,096 tokens."""
    optimizer: Literal["auto", "torch", "triton"] = "auto"
    """Fused AdamW: PyTorch's (torch) or our own (triton)."""
    working_copies: Switch = None
    """bf16 copies of the fp32 weights, written by the optimizer, so that no micro-batch casts
    them; auto: with bf16."""
    cuda_graph: Switch = None
    """Replay the whole step as one CUDA graph; auto: on a GPU."""
    shard: Literal["auto", "none", "optimizer", "full"] = "auto"
    """What to shard over the ranks. optimizer: AdamW's state; full: also the blocks' matrices
    and their gradients; auto: the first of none, optimizer and full that fits."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which ranks sum the gradients of matrices. bf16 sends half as much and rounds the
    sums, which changes the numerics."""
    recompute: Switch = None
    """Recompute each block's forward in the backward instead of storing its activations: same
    bits, a fraction of the memory, a third more arithmetic; auto: if nothing else fits."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the residual stream under bf16. bf16 changes the numerics."""
    tune: Literal["auto", "on", "off", "only"] = "auto"
    """Time the backends of each op and use the fastest. auto: once, on a GPU; on: again, with
    launch rows and whole steps; only: like on, but do not train."""
    tune_file: str | None = None
    """File for the results of --tune. Default: one in the user's cache directory."""

    def or_else(self, values: Mapping[str, Any]) -> "Choices":
        """Fill the open choices with these values. Ignores other names."""
        ours = {k: v for k, v in values.items() if k in _OPEN and getattr(self, k) == _OPEN[k]}
        return replace(self, **ours)


_OPEN = vars(Choices())


@dataclass(frozen=True)
class Plan:
    """How a recipe runs. Only `residual` and `reduce_dtype` change the losses.

    Fields without a comment are explained in `Choices`.
    """

    device: str
    device_name: str
    num_threads: int  # of torch on the CPU
    ops: str  # in the form that `kernels.parse_ops` reads
    dtype: str
    compile: bool
    micro_batch_size: int  # times num_micro_batches: the recipe's rows per step
    num_micro_batches: int
    eval_tokens: int  # read by an evaluation during the run; the final one reads all
    compile_scope: str = "model"
    optimizer: str = "torch"
    working_copies: bool = False
    cuda_graph: bool = False
    shard: str = "none"
    reduce_dtype: str = "fp32"
    recompute: bool = False
    residual: str = "fp32"
    memory_bytes: int = 0  # estimate of what a step needs, by training/memory.py
    launches: str = ""  # rows measured here, in the form of kernels/launches.toml
    notes: tuple[str, ...] = ()  # a line for each decision that a user might not expect

    @property
    def op_set(self) -> Ops:
        return parse_ops(self.ops)

    def describe(self, muon: bool = False) -> str:
        """The plan in one line; `muon` is the recipe's."""
        cpu = self.device == "cpu"
        threads = f", {self.num_threads} thread{'s' * (self.num_threads > 1)}" if cpu else ""
        others = "0.5 to 1 for torch itself" if cpu else "0.5 for CUDA itself"
        parts = {
            f"plan: {self.device} ({self.device_name}{threads})": True,
            f"ops {self.ops}": True,
            self.dtype + " with bf16 working copies" * self.working_copies: True,
            f"compiled ({self.compile_scope})" if self.compile else "not compiled": True,
            f"{self.num_micro_batches} x {self.micro_batch_size} rows per step": True,
            "Muon and " * muon + f"{self.optimizer} AdamW": True,
            f"{_SHARED.get(self.shard)} sharded over the ranks": self.shard in _SHARED,
            "gradients summed in bf16": self.reduce_dtype == "bf16",
            "one CUDA graph": self.cuda_graph,
            "blocks recomputed in the backward": self.recompute,
            "bf16 residual stream: changed numerics": self.residual == "bf16",
            f"about {self.memory_bytes / 2**30:.1f} GiB for a step, plus {others}": True,
        }
        return ", ".join(part for part, holds in parts.items() if holds)


def make_plan(
    recipe: Recipe, machine: Machine, choices: Choices | None = None, ranks: int = 1
) -> Plan:
    """Decide how `recipe` runs on `machine`; choices other than auto, None and 0 are binding.

    The plan covers all rows of a step; `distributed.share` divides them among several ranks.

    Raises:
        ValueError: a choice asked for is impossible on this machine.
    """
    asked = choices or Choices()
    notes = [*machine.notes]
    on_cuda, rows = machine.device == "cuda", recipe.rows_per_step
    dtype = _choose_dtype(asked.dtype, machine, notes)
    made = Plan(
        device=machine.device,
        device_name=machine.name,
        num_threads=machine.num_threads,
        ops=_choose_ops(asked.ops, recipe, machine, dtype, notes),
        dtype=dtype,
        compile=_choose_compile(asked.compile, recipe, machine, notes),
        micro_batch_size=1,
        num_micro_batches=rows,
        eval_tokens=EVAL_TOKENS[machine.device],
        compile_scope="blocks" if asked.compile_scope == "auto" else asked.compile_scope,
        optimizer=_choose_optimizer(asked.optimizer, recipe, machine, dtype),
        reduce_dtype=asked.reduce_dtype if ranks > 1 else "fp32",
        residual=asked.residual,
    )
    _refuse(asked, recipe, machine, dtype)
    if on_cuda and (backend := read_ops(made.ops)["causal_attention"]) != "triton":
        notes.append(
            f"causal_attention {backend}: PyTorch's backward adds up in any order on a GPU, so a "
            "rerun or a resumed run is equal only up to rounding"
        )
    if asked.residual == "bf16":
        notes.append("residual bf16 as asked: the losses are not those of plain autocast")

    def tried(micro: int, recompute: bool, shard: str) -> Plan:
        copies = dtype == "bf16" and not recompute and shard != "full"
        plan = replace(
            made,
            micro_batch_size=micro,
            num_micro_batches=rows // micro,
            shard=shard,
            recompute=recompute,
            working_copies=copies and asked.working_copies is not False,
        )
        return replace(plan, memory_bytes=step_bytes(plan, recipe, ranks))

    memory_bytes = machine.memory_bytes or UNKNOWN_BYTES
    budget, recompute = MEMORY_SHARE * memory_bytes, asked.recompute is True
    if ranks == 1 or recipe.muon:
        kinds = ["none"]
    elif asked.shard != "auto":
        kinds = [asked.shard]
    elif _not_with_full(asked, dtype):
        kinds = ["none", "optimizer"]
    else:
        kinds = ["none", "optimizer", "full"]
    fitting = (kind for kind in kinds if tried(1, recompute, kind).memory_bytes <= budget)
    shard = next(fitting, kinds[-1])
    if asked.recompute is None and not (asked.working_copies or asked.micro_batch_size):
        least = 1 if on_cuda else recipe.batch_size
        once, twice = (tried(least, again, shard).memory_bytes for again in (False, True))
        if once > budget:
            recompute = twice < once
            notes.append(
                f"blocks recomputed in the backward: {least} x {recipe.block_size} tokens take "
                f"{twice / 2**30:,.1f} GiB with it, {once / 2**30:,.1f} without"
            )

    def needs(micro: int) -> int:
        return tried(micro, recompute, shard).memory_bytes

    # A user may insist on --micro-batch-size, but building a far too large model would bring the
    # machine down.
    micro, needed = asked.micro_batch_size, needs(1)
    can_be_built = needed <= (4 if micro else 1) * memory_bytes
    if can_be_built and not micro:
        micro = _merge_micro_batches(recipe, machine, budget, needs, notes)
    if not (can_be_built and micro):
        raise ValueError(
            f"memory: one row of {recipe.model} at T={recipe.block_size} needs about "
            f"{needed / 2**30:,.1f} GiB (ids of the {rows:,} rows of a step included), "
            f"{machine.name} has {budget / 2**30:,.1f} GiB for it; use a smaller --model, "
            "--block-size or --grad-accum-steps, or try anyway with --micro-batch-size 1"
        )
    graph = on_cuda and shard != "full" if asked.cuda_graph is None else asked.cuda_graph
    return replace(tried(micro, recompute, shard), cuda_graph=graph, notes=tuple(notes))


def _refuse(asked: Choices, recipe: Recipe, machine: Machine, dtype: str) -> None:
    """Raise ValueError for choices that contradict each other, the recipe or the machine."""
    rows, micro, copies = recipe.rows_per_step, asked.micro_batch_size, asked.working_copies
    if asked.cuda_graph and machine.device != "cuda":
        raise ValueError("cuda_graph: needs a GPU; leave --cuda-graph out")
    if copies and dtype != "bf16":
        raise ValueError(f"working_copies: they are bf16, but dtype is {dtype}; add --dtype bf16")
    if copies and asked.recompute:
        raise ValueError(
            "working_copies: --recompute has no use for them; leave one of the two out"
        )
    if asked.residual == "bf16" != dtype:
        raise ValueError(f"residual: bf16 needs --dtype bf16, got {dtype}")
    if micro < 0:
        raise ValueError(f"micro_batch_size: must be at least 0, got {micro}")
    if micro and rows % micro:
        raise ValueError(f"micro_batch_size: must divide the {rows} rows of a step, got {micro}")
    if asked.shard in _SHARED and recipe.muon:
        raise ValueError("shard: Muon's state cannot be sharded; leave --shard out")
    if asked.shard == "full" and (flag := _not_with_full(asked, dtype)):
        raise ValueError(f"shard: full goes without --{flag}; leave one of the two out")


def _not_with_full(asked: Choices, dtype: str) -> str:
    """A flag that cannot be combined with full sharding, or ""."""
    flags = {"working-copies": asked.working_copies, "cuda-graph": asked.cuda_graph}
    flags["dtype fp16"] = dtype == "fp16"
    return next((flag for flag, given in flags.items() if given), "")


def step_bytes(plan: Plan, recipe: Recipe, ranks: int = 1) -> int:
    """Memory for a step of this plan, or of one rank's part of it."""
    rows, T = plan.micro_batch_size * plan.num_micro_batches, recipe.block_size
    return memory.estimate(recipe.model_config, T, plan, ranks).total + ID_BYTES * rows * T


def _merge_micro_batches(
    recipe: Recipe,
    machine: Machine,
    budget: float,
    needs: Callable[[int], int],
    notes: list[str],
) -> int:
    """The most rows at once that fit, or 0. More at once means fewer launches and larger products.

    A CPU takes at most CPU_TOKENS and half of the memory, but never fewer than the recipe's batch.
    """
    rows, batch = recipe.rows_per_step, recipe.batch_size
    small = [d for d in range(1, math.isqrt(rows) + 1) if rows % d == 0]
    divisors = sorted({*small, *(rows // d for d in small)}, reverse=True)
    if machine.device == "cpu":
        most, budget = CPU_TOKENS // recipe.block_size, machine.memory_bytes / 2
        divisors = [*(d for d in divisors if batch < d <= most), batch]
        budget = max(budget, needs(batch))
    micro = next((d for d in divisors if needs(d) <= budget), 0)
    if micro > batch:
        notes.append(f"{micro} rows at once instead of the recipe's {batch}: fewer micro-batches")
    elif micro < batch:
        notes.append(f"{micro} rows at once instead of the recipe's {batch}: more do not fit")
    return micro


def _choose_dtype(dtype: str, machine: Machine, notes: list[str]) -> str:
    if dtype == "auto":
        if machine.device == "cuda" and not machine.has_bf16 and machine.arch >= MIN_FP16_ARCH:
            notes.append(f"dtype fp16 with loss scaling: {machine.name} has no bf16")
            return "fp16"
        if not machine.has_bf16:
            notes.append(f"dtype fp32: {machine.name} has no fast bf16 products")
        return "bf16" if machine.has_bf16 else "fp32"
    if dtype == "bf16" and not machine.has_bf16:
        notes.append(f"dtype bf16 as asked: {machine.name} is faster in fp32")
    return dtype


def lacks(backend: str, machine: Machine, dtype: str) -> str:
    """What a backend of the ops, or our AdamW ("triton"), needs but does not find; or ""."""
    on_cuda = machine.device == "cuda"
    if backend == "triton":
        if not machine.has_triton:
            return "the triton package, which `make -B setup` installs"
        if not on_cuda:
            return "" if machine.interpreted else "a GPU"
        if machine.arch < MIN_TRITON_ARCH:
            return f"sm_{MIN_TRITON_ARCH} or newer, got sm_{machine.arch}"
        return ", ".join(machine.launcher_lacks)
    if backend == "compiled":
        return ", ".join(machine.missing_tools)
    if backend in SDPA and on_cuda:
        if machine.arch < MIN_SDPA_ARCH:
            return f"sm_{MIN_SDPA_ARCH} or newer, got sm_{machine.arch}"
        return "--dtype bf16" if dtype == "fp32" else ""
    return "a GPU" if backend == "sdpa-cudnn" else ""


def _choose_optimizer(wanted: str, recipe: Recipe, machine: Machine, dtype: str) -> str:
    missing = "a recipe without Muon" if recipe.muon else lacks("triton", machine, dtype)
    if wanted == "triton" and missing:
        raise ValueError(f"optimizer: triton needs {missing}; use --optimizer torch")
    if wanted != "auto":
        return wanted
    ours = machine.device == "cuda" and not (missing or machine.rocm)
    return "triton" if ours else "torch"


def _choose_ops(ops: str, recipe: Recipe, machine: Machine, dtype: str, notes: list[str]) -> str:
    config = recipe.model_config
    wanted = unfit(config.n_embd, config.n_head, config.dropout)
    if ops == "auto":
        missing = lacks("triton", machine, dtype)
        why = f"triton needs {missing}" if missing else ""
        if machine.device == "cpu":
            why = "no GPU"
        elif machine.rocm:
            why = "our kernels have never run on AMD GPUs; --ops triton tries them"
        if why:
            notes.append(f"ops eager: {why}")
            return "eager"
        notes.append(f"ops triton: sm_{machine.arch}")
        notes += [f"{op} eager: triton's needs {what}" for op, what in wanted.items()]
        return ",".join(["triton", *(f"{op}=eager" for op in wanted)])
    chosen = read_ops(ops)
    for backend in dict.fromkeys(chosen.values()):
        if missing := lacks(backend, machine, dtype):
            interpreter = ", or set TRITON_INTERPRET=1 to run the kernels on the CPU, slowly"
            raise ValueError(
                f"ops: {ops!r} needs {missing}; use --ops eager"
                + (interpreter if (backend, missing) == ("triton", "a GPU") else "")
            )
    for op, what in wanted.items():
        if chosen[op] == "triton":
            raise ValueError(f"ops: {op} of triton needs {what}; use --ops {ops},{op}=eager")
    return ops


def _choose_compile(
    wanted: bool | None, recipe: Recipe, machine: Machine, notes: list[str]
) -> bool:
    missing = ", ".join(machine.missing_tools)
    if wanted and missing:
        raise ValueError(f"compile: torch.compile needs {missing}; leave --compile out")
    if wanted is not None:
        return wanted
    if missing:
        notes.append(f"not compiled: torch.compile needs {missing}")
        return False
    total = flops_per_token(recipe.model_config, recipe.block_size) * (
        recipe.tokens_per_step * recipe.max_steps
    )
    if machine.device == "cpu" and total < MIN_COMPILE_FLOPS:
        notes.append(
            f"not compiled: this run has {total:.1e} flops, and compiling pays off from "
            f"{MIN_COMPILE_FLOPS:.0e}; --compile does it anyway"
        )
        return False
    return True
