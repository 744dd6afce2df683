"""Propose launch-table rows: `python -m bench.tune --op gelu_mlp --shape b64t1024` on a GPU.

    python -m bench.tune --list --arch 90      # what would be tried and what not; needs no GPU
    python -m bench.tune --seconds 120         # every kernel at two shapes, two minutes each

For each kernel of an op the launch it would take is replaced by candidates around it, one at a
time, and the op is timed in the direction that runs the kernel. Per kernel and shape:

1. Candidates are the present row with one thing changed, then two, and so on; a few that are
   likely from other people's kernels come first. What cannot fit is pruned by arithmetic.
2. Children compile them, one at a time each: they run it once on small inputs of the same
   specialisation, so that Triton's cache on disk holds it. Nothing is timed meanwhile. A candidate
   with wrong results, or one that kills its child or hangs, is out and costs no other.
3. Those that came back are timed here; then the next batch is compiled, until the budget is
   spent. The fastest few are timed against the present row in turns, and only a gain above
   MIN_GAIN that is larger than the noise is proposed.
4. A row serves every shape of its bucket; tables without buckets (the logits, dlogits) serve all.
   What the winner does at the other shapes of the run that the row would serve is measured too,
   and a winner that costs there is not proposed.

A person pastes the row, with the result file as its source, and runs `make resources`: nothing
here edits a kernel.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import os
import queue
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bench import cli, ops, record, resources, timing
from bench.cases import Shape, find_case, make_inputs
from bench.rows import TuneRow
from kernels import causal_attention, gelu_mlp, layer_norm, linear_cross_entropy
from kernels._launch import (
    Key,
    Launch,
    arch,
    cdiv,
    family,
    launch_for,
    next_pow2,
    replaced,
)

MIN_GAIN = 1.02
FINALISTS = 3
FINAL_S = 5.0  # budget of the last turns; 20 rounds of four contestants rarely need it
SMALL_T = 256  # tokens a child runs: more than the short attention kernels take
START_LIMIT_S = 120.0  # a child imports torch and opens the device
TASK_LIMIT_S = 60.0  # one candidate of a child; a build takes 1 to 3 s, several at once longer
GRACE_S = 15.0  # of the candidates at hand when the budget is spent
BATCH = 4  # candidates of each child before those that came back are timed
BUILD_S = 1.5  # measured for sm_90 with triton 3.7.1: 0.9 to 2.7 s on two busy cores
MAX_REGISTERS = 255
OTHER_REGISTERS = 24  # addresses, masks, bias: what a thread holds beside its tiles

Blocks = Mapping[str, int]
Change = Mapping[str, int | None]  # block sizes and fields of a launch that change together
Axis = tuple[Change, ...]


class NotAsked(Exception):
    """The op does not ask for this kernel's launch at this shape."""


class DeviceLost(Exception):
    """A candidate left the device of this process unusable."""


@dataclass(frozen=True)
class Knob:
    """One kernel whose launch can be tried out.

    Args:
        op, mode: Case and direction that run it.
        label: "<file>.<kernel>".
        key: (shape, itemsize, arch) -> the key of its launch.
        asked: (shape, itemsize, arch) -> whether the op runs this kernel.
        axes: shape -> values to try, grouped by what changes together.
        first: Changes to try before all others.
        misfit: (launch, shape) -> why the kernel refuses the blocks or wastes them; "" if not.
        needs: (blocks, buffers of the pipeline, itemsize, shape) -> bytes of shared memory and
            fp32 values held by a program, both at least.
    """

    op: str
    mode: str
    label: str
    key: Callable[[Shape, int, int], Key]
    axes: Callable[[Shape], tuple[Axis, ...]]
    needs: Callable[[Blocks, int, int, Shape], tuple[int, int]]
    asked: Callable[[Shape, int, int], bool] = lambda shape, itemsize, arch: True
    first: tuple[Change, ...] = ()
    misfit: Callable[[Launch, Shape], str] = lambda launch, shape: ""
    safe: Callable[[Shape, int, int], Launch | None] = lambda shape, itemsize, arch: None

    def launch(self, shape: Shape, itemsize: int, arch: int) -> Launch:
        """The present launch on `arch`, which need not be this machine's."""
        return launch_for(self.key(shape, itemsize, arch), self.safe(shape, itemsize, arch))

    def bucket(self, shape: Shape, itemsize: int) -> tuple[str, str]:
        """What of a shape its row depends on."""
        key = self.key(shape, itemsize, 0)
        return key.math, key.size


def _axis(name: str, *values: int) -> Axis:
    return tuple({name: value} for value in values)


def _limits(*pairs: tuple[int | None, int]) -> Axis:
    return tuple({"maxnreg": regs, "programs_per_sm": count} for regs, count in pairs)


def _gemm_needs(blocks: Blocks, buffers: int, itemsize: int, shape: Shape) -> tuple[int, int]:
    m, n, k = (blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return buffers * (m + n) * k * itemsize, m * n


_TILE = (_axis("BLOCK_M", 128, 64, 256), _axis("BLOCK_N", 128, 256, 64), _axis("BLOCK_K", 64, 32))
_GEMM_LAUNCH = (_axis("num_warps", 8, 4), _axis("num_stages", 3, 4, 2))


def _gemm(m: int, n: int, warps: int, stages: int, limits: Change, **more: int) -> Change:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "num_warps": warps, "num_stages": stages}
    return {**tile, **limits, **more}


def _math(itemsize: int) -> str:
    return "16-bit" if itemsize == 2 else "ieee"


def _gelu(mode: str, kernel: str) -> Knob:
    limits = _limits((None, 1), (128, 2), (168, 3), (None, 2))
    free, two, three, loose_two = limits
    return Knob(
        "gelu_mlp", mode, f"gelu_mlp.{kernel}",
        key=lambda shape, itemsize, arch: (
            gelu_mlp.launch_key(kernel, shape.M, shape.C, _math(itemsize), arch)
        ),
        axes=lambda shape: (*_TILE, *_GEMM_LAUNCH, limits),
        needs=_gemm_needs,
        first=(
            _gemm(128, 256, 8, 3, free), _gemm(128, 128, 8, 3, two), _gemm(128, 128, 8, 4, free),
            _gemm(64, 128, 4, 3, three), _gemm(128, 128, 4, 3, loose_two),
        ),
    )  # fmt: skip


def _attention(mode: str, kernel: str) -> Knob:
    inner, outer = ("BLOCK_M", "BLOCK_N") if kernel == "dkdv" else ("BLOCK_N", "BLOCK_M")

    def misfit(launch: Launch, shape: Shape) -> str:
        blocks = dict(launch.blocks)
        return f"{inner} does not divide {outer}" if blocks[outer] % blocks[inner] else ""

    def needs(blocks: Blocks, buffers: int, itemsize: int, shape: Shape) -> tuple[int, int]:
        D = shape.C // shape.H
        own, streamed, tile = blocks[outer] * D, blocks[inner] * D, blocks[outer] * blocks[inner]
        if kernel == "fwd":  # q, then k and v; y and S
            return (own + buffers * 2 * streamed) * itemsize, own + tile
        if kernel == "dq":  # q and dO, then k and v; dq, S and dP
            return (2 * own + buffers * 2 * streamed) * itemsize, own + 2 * tile
        # k and v, then q and dO; dk and dv, S and dP
        return (2 * own + buffers * 2 * streamed) * itemsize, 2 * own + 2 * tile

    return Knob(
        "causal_attention", mode, f"causal_attention.{kernel}", key=_attention_key(kernel),
        asked=lambda shape, itemsize, arch: (
            not _is_short("fwd" if kernel == "fwd" else "bwd", shape, itemsize, arch)
        ),
        axes=lambda shape: (
            _axis("BLOCK_M", 64, 128, 32), _axis("BLOCK_N", 64, 128, 32),
            _axis("num_warps", 4, 8), _axis("num_stages", 2, 3, 4),
        ),
        needs=needs,
        misfit=misfit,
    )  # fmt: skip


def _attention_key(kernel: str) -> Callable[[Shape, int, int], Key]:
    return lambda shape, itemsize, arch: causal_attention.launch_key(
        kernel, _math(itemsize), shape.C // shape.H, shape.T, arch
    )


def _is_short(direction: str, shape: Shape, itemsize: int, arch: int) -> bool:
    return causal_attention._short_t(direction, itemsize, shape.C // shape.H, arch) >= shape.T


def _layer_norm(mode: str) -> Knob:
    # Copies of the row a program holds: h, x_hat and weight; in the backward six, with dy, dh_out
    # and the sums. Compiled for sm_90, ROWS = 8 on 4 warps spills in the one and not in the other.
    copies = 3 if mode == "fwd" else 6

    def misfit(launch: Launch, shape: Shape) -> str:
        blocks = dict(launch.blocks)
        width, C = blocks["BLOCK_C"], shape.C
        if C > 256 and width not in (128 * _warps_per_row(launch), 256 * _warps_per_row(launch)):
            return "BLOCK_C is not 128 or 256 a warp of the row"
        return "wider than the row" if width > next_pow2(C) else ""

    def needs(blocks: Blocks, buffers: int, itemsize: int, shape: Shape) -> tuple[int, int]:
        width = blocks["BLOCK_C"]
        return 0, copies * blocks["ROWS"] * cdiv(shape.C, width) * width

    return Knob(
        "add_layer_norm", mode, f"layer_norm.{mode}",
        key=lambda shape, itemsize, arch: (  # the residual stream of the case is fp32
            layer_norm.launch_key(mode, shape.M, shape.C, torch.float32, arch)
        ),
        safe=lambda shape, itemsize, arch: layer_norm.safe_launch(mode, shape.C, 4, arch),
        axes=lambda shape: (
            _axis("num_warps", 4, 8), _axis("ROWS", 4, 1, 2, 8),
            _axis("BLOCK_C", 256, 128, 512, 1024, 2048),
            *([_axis("programs_per_sm", 3, 2, 1)] if mode == "bwd" else []),
        ),  # num_stages is no axis: Triton pipelines no loop without a dot, the PTX is the same
        needs=needs,
        misfit=misfit,
    )  # fmt: skip


def _warps_per_row(launch: Launch) -> int:
    return max(1, launch.num_warps // dict(launch.blocks)["ROWS"])


_FREE, _TWO = _limits((None, 1), (128, 1))
_LOGITS_FIRST = tuple(
    _gemm(*tile, limits, GROUP_M=group)
    for tile, limits in (
        ((128, 256, 8, 4), _FREE), ((128, 256, 8, 3), _FREE), ((128, 128, 8, 3), _TWO),
    )
    for group in (16, 8)
)  # fmt: skip

KNOBS: tuple[Knob, ...] = (
    _gelu("fwd", "up"),
    _gelu("bwd", "down"),
    Knob(  # "both" because "fwd" is without gradients, which is another build
        "linear_cross_entropy", "both", "linear_cross_entropy.logits",
        key=lambda shape, itemsize, arch: (
            linear_cross_entropy.launch_key("logits", _math(itemsize), arch)
        ),
        axes=lambda shape: (
            *_TILE, _axis("GROUP_M", 16, 8), *_GEMM_LAUNCH, (_FREE, _TWO),
        ),
        needs=_gemm_needs,
        first=_LOGITS_FIRST,
    ),
    Knob(
        "linear_cross_entropy", "both", "linear_cross_entropy.dlogits",
        key=lambda shape, itemsize, arch: (
            linear_cross_entropy.launch_key("dlogits", _math(itemsize), arch)
        ),
        axes=lambda shape: (
            _axis("BLOCK_M", 1, 2, 4, 8), _axis("BLOCK_V", 512, 1024, 2048),
            _axis("num_warps", 4, 8),
        ),
        needs=lambda blocks, buffers, itemsize, shape: (
            0, 2 * blocks["BLOCK_M"] * blocks["BLOCK_V"]
        ),
    ),
    _layer_norm("fwd"),
    _layer_norm("bwd"),
    # Last, because they may break the device here: kernels of several dots in 4 warps have read out
    # of bounds on Hopper (triton issues 10486, 11366).
    _attention("fwd", "fwd"),
    _attention("bwd", "dq"),
    _attention("bwd", "dkdv"),
    Knob(  # one launch for both directions
        "causal_attention", "both", "causal_attention.short", key=_attention_key("short"),
        asked=lambda shape, itemsize, arch: any(
            _is_short(direction, shape, itemsize, arch) for direction in ("fwd", "bwd")
        ),
        axes=lambda shape: (_axis("num_warps", 4, 8),),
        needs=lambda blocks, buffers, itemsize, shape: (0, 2 * next_pow2(shape.T) ** 2),
    ),
)  # fmt: skip


def find_knob(label: str) -> Knob:
    """The knob of a label; ValueError names the known ones."""
    for knob in KNOBS:
        if knob.label == label:
            return knob
    raise ValueError(f"tune: unknown kernel {label!r}; known: {', '.join(k.label for k in KNOBS)}")


def changed(launch: Launch, change: Change) -> Launch:
    """The launch with some block sizes and fields replaced and all others kept."""
    blocks = tuple((name, change.get(name, size)) for name, size in launch.blocks)
    rest: dict[str, Any] = {k: v for k, v in change.items() if k not in dict(blocks)}
    return replace(launch, blocks=blocks, **rest)  # type: ignore[arg-type] # sizes are never None


def limits_of(arch: int) -> resources.Arch:
    """Limits of an arch; of its generation or the smallest chip for one without a row."""
    smallest = resources.ARCHS[86]
    if arch in resources.ARCHS or arch < 90:
        return resources.ARCHS.get(arch, smallest)
    return resources.ARCHS.get(arch // 10 * 10, smallest)


def why_pruned(knob: Knob, launch: Launch, shape: Shape, itemsize: int, arch: int) -> str:
    """Why a launch is not worth compiling, "" if it is. Estimates err on the small side."""
    if why := knob.misfit(launch, shape):
        return why
    if arch == 0:  # the interpreter has room for anything
        return ""
    limits = limits_of(arch)
    # mma.sync takes its operands from registers, so the stage at hand needs no buffer. Both as
    # compiled for the rows in the tables (`bench.resources`): the estimate is exact for the GEMMs.
    buffers = launch.num_stages - (arch < 90 or arch >= 120)
    shared, values = knob.needs(dict(launch.blocks), max(buffers, 1), itemsize, shape)
    if shared > limits.block_shared:
        return "shared memory"
    registers = values // (32 * launch.num_warps) + OTHER_REGISTERS
    if registers > (launch.maxnreg or MAX_REGISTERS):
        return "registers"
    # A register limit is there to make room for a second program.
    programs = max(launch.programs_per_sm, 2 if launch.maxnreg else 1)
    threads = 32 * launch.num_warps * programs
    if programs > 1 and (
        programs * (shared + resources.BLOCK_RESERVED_SHARED) > limits.sm_shared
        or threads * (launch.maxnreg or registers) > resources.SM_REGISTERS
    ):
        return f"no room for {programs} programs on an SM"
    return ""


@dataclass(frozen=True)
class Plan:
    """What there is to try for one kernel at one shape.

    Args:
        candidates: Most promising first, the present row left out.
        pruned: How many were left out, by reason.
    """

    present: Launch
    candidates: tuple[Launch, ...]
    pruned: Mapping[str, int]


def plan(knob: Knob, present: Launch, shape: Shape, itemsize: int, arch: int) -> Plan:
    """The likely ones, then all combinations with those nearest to the present row first.

    A value of the present row that no axis lists stays one of the choices.
    """
    axes = [
        ({}, *(change for change in axis if changed(present, change) != present))
        for axis in knob.axes(shape)
    ]
    points = sorted(itertools.product(*axes), key=lambda point: sum(map(bool, point)))
    changes = [{k: v for change in point for k, v in change.items()} for point in points]
    candidates: list[Launch] = []
    pruned: Counter[str] = Counter()
    seen = {present}
    for change in (*knob.first, *changes):
        launch = changed(present, change)
        if launch in seen:
            continue
        seen.add(launch)
        if why := why_pruned(knob, launch, shape, itemsize, arch):
            pruned[why] += 1
        else:
            candidates.append(replace(launch, source="candidate"))
    return Plan(present, tuple(candidates), dict(pruned.most_common()))


class Trial:
    """An op at one shape, ready to run with any launch of one of its kernels.

    Args:
        sets: Copies of the inputs to rotate when timed; by default what the timer asks for.

    Raises:
        NotAsked: the op runs another kernel at this shape.
    """

    def __init__(
        self, knob: Knob, shape: Shape, dtype: torch.dtype, device: torch.device,
        sets: int | None = None,
    ):  # fmt: skip
        self.knob, self.device = knob, device
        case = find_case(knob.op)
        fn = ops.find_provider("ours", knob.op, device)
        cuda = device.type == "cuda"
        self.set_bytes = int(case.bytes(shape, dtype.itemsize, knob.mode))
        if sets is None:
            sets = timing.num_sets(self.set_bytes, device) if cuda else 1
        self.stream = timing.capture_stream() if cuda else None
        self.pool: Any = torch.cuda.graph_pool_handle() if cuda else None  # graphs run in turn
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type] # None: no stream to enter
            torch.manual_seed(0)
            inputs = [make_inputs(case, shape, dtype, device, seed) for seed in range(sets)]
            self.calls = [ops.make_call(fn, case, knob.mode, of_set) for of_set in inputs]
            with replaced(knob.label, None) as asked:
                self.want = _results(self.calls[0])
        if not asked:
            raise NotAsked(f"{knob.op} does not run this kernel at {shape.label}")
        self.key, self.present = asked[-1]
        self.arch = int(self.key.arch)

    def check(self, launch: Launch) -> None:
        """Run once; ValueError if the results are not those of the present row."""
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type] # None: no stream to enter
            with replaced(self.knob.label, launch):
                found = _results(self.calls[0])
            if not _same(found, self.want):
                raise ValueError("results differ from the present row's")

    def replay(self, launch: Launch) -> timing.Replay:
        """The op with this launch, checked and ready to be timed."""
        self.check(launch)

        def bound(call: timing.Call) -> timing.Call:
            def run() -> Any:
                with replaced(self.knob.label, launch):
                    return call()

            return run

        calls = [bound(call) for call in self.calls]
        if self.device.type == "cuda":
            return timing.device_replay(calls, self.set_bytes, self.pool)
        return timing.host_replay(*calls)


def _results(call: timing.Call) -> list[Tensor]:
    return [t.detach().clone() for t in call() if isinstance(t, Tensor)]


def _same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal up to rounding of the dtype; summation order differs between tiles."""
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().item()
        error = (a.double() - b.double()).abs().max().item()
        if not error <= 8 * torch.finfo(b.dtype).eps * max(scale, 1e-6):  # NaN too
            return False
    return True


def _is_lost(device: torch.device) -> bool:
    """Whether an error stayed with the device: after an illegal access every call fails."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def small(shape: Shape) -> Shape:
    """A small shape for which Triton compiles what it compiles for `shape`.

    It specialises on whether B * T and T are multiples of 16, and nothing else that changes here.
    """
    T = shape.T if shape.T <= SMALL_T else SMALL_T + shape.T % 16
    return replace(shape, B=math.gcd(shape.B, 16) if T % 16 else 1, T=T)


class NotStarted(Exception):
    """A child never came up."""


class Child:
    """A process that runs one candidate when told to, and is started again after it died."""

    def __init__(self, command: Sequence[str]):
        self.command = command
        self.start()

    def start(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 # `end` reads and closes it
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            self.command, cwd=record.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, bufsize=0, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.is_ready = False

    def wait_ready(self) -> None:
        """Raises NotStarted if it died or is not there START_LIMIT_S after its start."""
        left = self.started + START_LIMIT_S - time.monotonic()
        if not self.is_ready and self._line(left) is None:
            raise NotStarted(self.end(f"not ready in {START_LIMIT_S:.0f} s"))
        self.is_ready = True

    def ask(self, task: str, limit_s: float) -> str:
        """The answer to a task: "" if it ran, else why not. A dead or late child is an answer."""
        if self.errors.closed or self.process.poll() is not None:
            self.end()
            self.start()
        self.wait_ready()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(task.encode() + b"\n")
        line = self._line(limit_s)
        return json.loads(line) if line is not None else self.end(f"no answer in {limit_s:.0f} s")

    def _line(self, limit_s: float) -> bytes | None:
        """What it says next; None if it ended or took too long."""
        assert self.process.stdout is not None
        said, end = b"", time.monotonic() + limit_s
        while not said.endswith(b"\n"):
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)  # so that the exit code is its own
                return None
            said += part
        return said

    def end(self, why: str = "") -> str:
        """Kill it; returns why it is gone: its exit code, or `why` if it lived, and last words."""
        if self.errors.closed:
            return why
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.errors.seek(0)
        words = self.errors.read().decode(errors="replace").strip().splitlines() or ["no words"]
        self.errors.close()
        how = why if code is None else f"the child ended with {code}"
        return f"{how}: {words[-1]}"[:200]


class Children:
    """As many children as may compile at once; candidates go to whichever is free."""

    def __init__(self, command: Sequence[str], count: int):
        self.living = [Child(command) for _ in range(count)]
        self.why_dead = ""
        for child in [*self.living]:
            try:
                child.wait_ready()
            except NotStarted as why:
                self._lose(child, why)

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.living:
            child.end()

    def _lose(self, child: Child, why: NotStarted) -> None:
        self.living.remove(child)
        self.why_dead = str(why)

    def run(self, tasks: Sequence[str], seconds: float) -> list[str | None]:
        """The answer to each task, in their order; None for those the time did not reach."""
        answers: list[str | None] = [None] * len(tasks)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(tasks)):
            todo.put(i)
        deadline = time.monotonic() + seconds

        def feed(child: Child) -> None:
            with contextlib.suppress(queue.Empty):
                while (left := deadline - time.monotonic()) > 0:
                    i = todo.get_nowait()
                    try:
                        answers[i] = child.ask(tasks[i], min(TASK_LIMIT_S, max(left, GRACE_S)))
                    except NotStarted as why:
                        todo.put(i)
                        self._lose(child, why)
                        return

        threads = [threading.Thread(target=feed, args=(child,)) for child in self.living]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


def child_command(device: torch.device) -> list[str]:
    return [sys.executable, "-m", "bench.tune", "--child", device.type]


def task_of(knob: Knob, shape: Shape, dtype: torch.dtype, launch: Launch) -> str:
    """One line for a child."""
    where = {"knob": knob.label, "shape": asdict(small(shape)), "dtype": _name(dtype)}
    return json.dumps({"where": where, "launch": describe(launch)})


def serve(device: torch.device, lines: Iterable[str], say: Callable[[str], None]) -> None:
    """A child's side: run the candidate of each line once and say "" or what was wrong.

    Raises:
        DeviceLost: instead of an answer; the child's end is the answer.
    """
    trial, where = None, None
    say("ready")
    for line in lines:
        task = json.loads(line)
        answer = ""
        try:
            if task["where"] != where:
                trial = None
                gc.collect()
                where = task["where"]
                shape, dtype = Shape(**where["shape"]), getattr(torch, where["dtype"])
                trial = Trial(find_knob(where["knob"]), shape, dtype, device, sets=1)
            assert trial is not None
            trial.check(launch_of(task["launch"]))
        except Exception as error:  # out of resources, a compiler error, wrong numbers
            answer = timing.reason_of(error)
            if trial is None:
                where = None
        if answer and _is_lost(device):
            raise DeviceLost(answer)
        say(json.dumps(answer))


def propose(
    knob: Knob,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float = 60.0,
    limit: int | None = None,
    rounds: int = 20,
    children: Children | None = None,
    others: Sequence[Shape] = (),
) -> dict[str, Any]:
    """Try candidates until time or they run out; the row says what was found.

    Args:
        seconds: Budget of compiling and timing the candidates; the last turns come on top.
        limit: At most so many candidates.
        children: Who compiles; without them each candidate is compiled here when its turn comes.
        others: Shapes at which a winner must not cost; they ask for the same row.

    Raises:
        NotAsked: the op runs another kernel at this shape.
        DeviceLost: a candidate broke the device here, though a child had run it.
    """
    row, best = _search(knob, shape, dtype, device, seconds, limit, rounds, children)
    row["elsewhere"] = {}
    if _verdict(row) == "propose":  # so far
        for other in others:
            with contextlib.suppress(NotAsked):
                row["elsewhere"][other.label] = _gain_at(knob, other, dtype, device, best, rounds)
    row["verdict"] = _verdict(row)
    row["propose"] = row["verdict"] == "propose"
    return row


def _search(
    knob: Knob, shape: Shape, dtype: torch.dtype, device: torch.device,
    seconds: float, limit: int | None, rounds: int, children: Children | None,
) -> tuple[dict[str, Any], Launch]:  # fmt: skip
    """The row of one shape and its winner; what they were timed with is freed at the end."""
    end = time.monotonic() + seconds
    trial = Trial(knob, shape, dtype, device)
    planned = plan(knob, trial.present, shape, dtype.itemsize, trial.arch)
    launches = planned.candidates[:limit]
    now = trial.replay(trial.present)
    _wake(device)
    present_ms = _quick(now)
    failures: list[str] = []
    fastest: list[tuple[float, Launch, timing.Replay]] = []
    tried = 0
    tasks = [task_of(knob, shape, dtype, launch) for launch in launches]
    answers = _compiled(tasks, children, end, device)
    for launch, answer in zip(launches, answers, strict=True):
        if time.monotonic() > end:
            break
        if answer is None:  # time ran out, or its child did not come up again
            continue
        tried += 1
        if answer:
            failures.append(answer)
            continue
        try:
            found = trial.replay(launch)
            ms = _quick(found)
        except Exception as error:  # out of shared memory, a compiler error, wrong numbers
            failures.append(timing.reason_of(error))
            if _is_lost(device):
                raise DeviceLost(f"{knob.label} {shape.label}: {launch}: {error}") from error
            continue
        if ms < MIN_GAIN * present_ms:  # a hurried figure: what seems even may yet be ahead
            fastest = sorted([*fastest, (ms, launch, found)], key=lambda f: f[0])[:FINALISTS]

    contestants = {"present": now} | {str(i): found for i, (_, _, found) in enumerate(fastest)}
    timed = timing.interleave(contestants, rounds=rounds, seconds=FINAL_S)
    gains = {name: timing.ratio(timed["present"], timed[name]) for name in contestants}
    name = max(gains, key=lambda name: gains[name])
    best = fastest[int(name)][1] if name != "present" else trial.present
    pairs = zip(timed["present"].samples_ms, timed[name].samples_ms, strict=False)
    low, _, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    row = {
        "op": knob.op,
        "kernel": knob.label,
        "mode": knob.mode,
        "shape": shape.label,
        "dtype": _name(dtype),
        "key": asdict(trial.key),
        "present": describe(trial.present),
        "present_ms": timed["present"].median_ms,
        "best": describe(best),
        "best_ms": timed[name].median_ms,
        "gain": gains[name],
        "gain_q1": low,
        "gain_q3": high,
        "within_noise": best != trial.present and low <= 1.0,
        "candidates": len(planned.candidates),
        "pruned": dict(planned.pruned),
        "tried": tried,
        "failed": len(failures),
        "first_failure": failures[0] if failures else None,
    }
    return row, best


def _compiled(
    tasks: Sequence[str], children: Children | None, end: float, device: torch.device
) -> Iterator[str | None]:
    """What a child says of each task, a batch at a time; "" for all where there are no children.

    In batches, because what the timing will not reach need not be compiled; and never while
    something is timed, because the children's runs would disturb it.
    """
    if children is None or not children.living:
        yield from ("" for _ in tasks)
        return
    size = BATCH * len(children.living)
    for i in range(0, len(tasks), size):
        answers = children.run(tasks[i : i + size], end - time.monotonic())
        _wake(device)
        yield from answers


def _wake(device: torch.device) -> None:
    """Bring the clock up: compiling leaves the GPU idle."""
    if device.type == "cuda":
        timing.spin(device)


def _gain_at(
    knob: Knob, shape: Shape, dtype: torch.dtype, device: torch.device, launch: Launch, rounds: int
) -> float:
    """How many times faster the launch is than the present row; 0 if it fails there."""
    trial = Trial(knob, shape, dtype, device)
    try:
        contestants = {"present": trial.replay(trial.present), "best": trial.replay(launch)}
    except Exception as error:
        if _is_lost(device):
            raise DeviceLost(f"{knob.label} {shape.label}: {launch}: {error}") from error
        return 0.0
    _wake(device)
    timed = timing.interleave(contestants, rounds=rounds, seconds=FINAL_S)
    return timing.ratio(timed["present"], timed["best"])


def _verdict(row: Mapping[str, Any]) -> str:
    """What to do: "propose" the best, or keep the present row and why."""
    if row["best"] == row["present"]:
        return "keep: nothing was faster"
    if row["within_noise"]:
        return f"keep: x{row['gain']:.3f} is within noise"
    if row["gain"] < MIN_GAIN:
        return f"keep: x{row['gain']:.3f} is under x{MIN_GAIN}"
    for label, gain in row["elsewhere"].items():
        if gain < 1 / MIN_GAIN:
            return f"keep: x{row['gain']:.3f} here, but x{gain:.3f} at {label}, of the same row"
    return "propose"


def _quick(replay: timing.Replay) -> float:
    return timing.interleave({"": replay}, rounds=5, seconds=0.3, warmup=1)[""].median_ms


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(launch: Launch) -> dict[str, Any]:
    """Every field, as JSON holds it; `launch_of` reads it back."""
    found = {field.name: getattr(launch, field.name) for field in fields(launch)}
    return found | {"blocks": dict(launch.blocks)}


def launch_of(described: Mapping[str, Any]) -> Launch:
    return Launch(**{**described, "blocks": tuple(described["blocks"].items())})


def source_of(row: Mapping[str, Any], result: str) -> str:
    """The row of launches.toml to paste; `result` is the file and its date."""
    best, key = row["best"], row["key"]
    why = f"{result}: {row['present_ms']:.4g} -> {row['best_ms']:.4g} ms, {row['shape']}"
    blocks = ", ".join(f"{name} = {size}" for name, size in best["blocks"].items())
    values = [
        key["kernel"].partition(".")[2], key["math"], key["size"], family(key["arch"]),
        key["triton"], best["num_warps"], best["num_stages"], best["maxnreg"] or 0,
        best["programs_per_sm"], why,
    ]  # fmt: skip
    words = [json.dumps(value) for value in values]
    return f"[{', '.join([*words[:5], f'{{{blocks}}}', *words[5:]])}],"


def run(
    knobs: Sequence[Knob],
    shapes: Sequence[Shape],
    device: torch.device,
    results: record.Results,
    *,
    seconds: float,
    deadline: float = float("inf"),
    dtype: torch.dtype = torch.bfloat16,
    limit: int | None = None,
    jobs: int | None = None,
) -> None:
    """Every knob at every shape, each row written as it comes.

    Args:
        seconds: Budget of a knob at a shape, where there is no deadline.
        deadline: As of time.monotonic(); no further knob begins after it. What is left until then
            is shared among those still to come, those with more candidates getting more.
        limit: At most so many candidates of a knob at a shape.
        jobs: Children that compile at once; two fewer than there are cores by default. 0: none.

    Raises:
        DeviceLost: as `propose`; the rows before it are written.
    """
    if jobs is None:
        jobs = default_jobs()
    todo = [(knob, shape) for shape in shapes for knob in knobs]
    weights = [_weight(knob, shape, dtype.itemsize, arch(device)) for knob, shape in todo]
    with Children(child_command(device), jobs) as children:
        if jobs and not children.living:
            print(f"tune: no child came up ({children.why_dead}); compiling here", flush=True)
        for i, (knob, shape) in enumerate(todo):
            left = deadline - time.monotonic()
            if left < 0:
                print(f"tune: no time for the last {len(todo) - i} of {len(todo)}", flush=True)
                return
            share = seconds
            if left != float("inf"):
                share = left * weights[i] / max(sum(weights[i:]), 1)
            size = dtype.itemsize
            others = [
                s for s in shapes if s != shape and knob.bucket(s, size) == knob.bucket(shape, size)
            ]
            here = f"{knob.label} {shape.label}"
            try:
                row = propose(
                    knob, shape, dtype, device,
                    seconds=share, limit=limit, children=children, others=others,
                )  # fmt: skip
            except NotAsked as why:
                print(f"{here}: nothing to tune, {why}", flush=True)
                continue
            except DeviceLost:
                raise
            except Exception as error:
                print(f"{here}: {timing.reason_of(error)}", flush=True)
                if _is_lost(device):
                    raise
                continue
            if row["propose"]:
                date = results.about["date"].partition(" ")[0]
                row["paste"] = source_of(row, f"{os.path.relpath(results.path)} {date}")
            named = {f.name: row.pop(f.name) for f in fields(TuneRow) if f.name in row}
            results.add("tune", TuneRow(**named, more=row))
            row |= named
            print(f"{here}: {_line_of(row)}", flush=True)


def _weight(knob: Knob, shape: Shape, itemsize: int, arch: int) -> int:
    """Share of the time; 20 for what every knob takes, however few candidates it has."""
    if not knob.asked(shape, itemsize, arch):
        return 0
    present = knob.launch(shape, itemsize, arch)
    return 20 + len(plan(knob, present, shape, itemsize, arch).candidates)


def _line_of(row: Mapping[str, Any]) -> str:
    text = f"{row['tried']} of {row['candidates']} tried, {sum(row['pruned'].values())} pruned"
    if row["failed"]:
        text += f", {row['failed']} failed ({row['first_failure']})"
    text += f"; {row['verdict']}"
    if row["propose"]:
        text += f" x{row['gain']:.3f} ({row['gain_q1']:.3f} to {row['gain_q3']:.3f})"
        text += "".join(f", x{gain:.3f} at {label}" for label, gain in row["elsewhere"].items())
        text += f": {row['paste']}"
    return text


def default_jobs() -> int:
    return max(1, (os.cpu_count() or 1) - 2)


def list_plan(
    knobs: Sequence[Knob], shapes: Sequence[Shape], arch: int, jobs: int, itemsize: int = 2
) -> Iterator[str]:
    """What `run` would try on an arch, a line a kernel and shape, and how long compiling takes."""
    builds: set[tuple[str, tuple[tuple[str, int], ...]]] = set()
    total = 0
    for shape in shapes:
        for knob in knobs:
            here = f"{knob.label} ({knob.op} {knob.mode}) {shape.label}"
            if not knob.asked(shape, itemsize, arch):
                yield f"{here}: not asked on sm_{arch}"
                continue
            present = knob.launch(shape, itemsize, arch)
            found = plan(knob, present, shape, itemsize, arch)
            total += len(found.candidates)
            builds |= {(knob.label, tuple(c.kwargs().items())) for c in found.candidates}
            why = ", ".join(f"{count} {reason}" for reason, count in found.pruned.items())
            yield f"{here}: {len(found.candidates)} candidates, {sum(found.pruned.values())} pruned"
            yield f"    now {_short_text(present)}" + (f"; pruned: {why}" if why else "")
    seconds = len(builds) * BUILD_S / jobs
    yield f"{total} candidates, {len(builds)} builds on sm_{arch}"
    yield f"about {seconds:.0f} s of compiling them all, {jobs} at once at {BUILD_S} s each"


def _short_text(launch: Launch) -> str:
    blocks = " ".join(f"{name} {size}" for name, size in launch.blocks)
    text = f"{blocks}, {launch.num_warps} warps, {launch.num_stages} stages"
    if launch.maxnreg or launch.programs_per_sm > 1:
        text += f", maxnreg {launch.maxnreg}, {launch.programs_per_sm} programs an SM"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.tune", __doc__)
    known = list(dict.fromkeys(knob.op for knob in KNOBS))
    parser.add_argument("--op", action="append", default=[], choices=known)
    parser.add_argument("--shape", action="append", default=[], type=cli.shape, help="b<B>t<T>")
    parser.add_argument("--seconds", type=cli.amount, default=60.0, help="of a kernel and a shape")
    parser.add_argument("--minutes", type=cli.amount, help="of all, shared among the kernels")
    parser.add_argument("--limit", type=cli.count, help="candidates per kernel and shape, at most")
    parser.add_argument("--jobs", type=int, help="children that compile; default: cores less two")
    parser.add_argument("--list", action="store_true", help="say what would be tried; needs no GPU")
    parser.add_argument("--arch", type=int, default=90, help="of --list; default: 90")
    parser.add_argument("--out", type=cli.path, default=record.RESULTS)
    parser.add_argument("--commit", help="what is tuned, where git is not at hand")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        become_child(torch.device(args.child))
        return
    knobs = [knob for knob in KNOBS if not args.op or knob.op in args.op]
    shapes = args.shape or [Shape(64, 1024), Shape(16, 64)]
    jobs = default_jobs() if args.jobs is None else args.jobs
    if args.list:
        print(*list_plan(knobs, shapes, args.arch, max(jobs, 1)), sep="\n")
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "tune: launch rows are chosen by time on a GPU; there is none here, only --list works"
        )
    device = torch.device("cuda")
    results = record.Results(device, args.out, args.commit)
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    run(knobs, shapes, device, results, seconds=args.seconds, deadline=deadline, limit=args.limit,
        jobs=jobs)  # fmt: skip


def become_child(device: torch.device) -> None:
    """Answer the tasks of standard input. What kernels and libraries print goes with the errors."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.zeros(1, device=device)  # opens the device, before it says that it is ready
    serve(device, sys.stdin, lambda text: print(text, file=answers))


if __name__ == "__main__":
    cli.run(main)
