"""Better launch rows for the run's kernels: what `make tune` tries, and in which order.

The candidates for a kernel are the launches of [candidates] and of other rows of launches.toml
with the same blocks, then the present launch with one thing changed, then with two, and so on.
Children build them in parallel, for few rows that Triton compiles alike, which fills Triton's cache
on disk. Then a single child checks their results and times them. A candidate
that kills its child or hangs costs only itself. The fastest few are timed in turns with the present
launch; training/choose.py decides by these samples.
"""

import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from kernels import read_ops
from kernels._launch import Key, Launch, family, rows
from training import child
from training.machines import Machine, num_cores
from training.plan import Plan
from training.recipes import Recipe
from training.timing import Timing
from training.trials import COMMAND, list_launches, try_launches

FINALISTS = 3
FINAL = {"rounds": 20, "seconds": 5.0}  # for the last turns; four launches rarely need that long
QUICK = {"rounds": 5, "seconds": 0.3, "warmup": 1}
MAX_CANDIDATES = 200  # for one kernel
BATCH = 4  # candidates that each child builds before those are timed
TASK_LIMIT_S = 90.0  # for one candidate, perhaps with a start; a build takes 1 to 3 s, or more
CHILD_BYTES = 3 << 29  # of the card, for each: its CUDA context, and an op's tensors for few rows
SMALL_T = 256  # tokens per sequence in a build: more than the short attention kernels take
BRIEF = ("layer_norm.sum", "linear_cross_entropy.scale")  # too short to matter
# Kernels with a grid of programs_per_sm programs on each SM.
PERSISTENT = ("gelu_mlp.up", "gelu_mlp.down", "layer_norm.bwd")
Samples = list[float]  # ms


def known_launches(present: Launch) -> list[Launch]:
    """The present launch, and those of rows with its blocks."""
    found = [launch for layer in reversed(rows()) for key, launch in layer.items() if key.arch != 0]
    names = dict(present.blocks).keys()
    return [present, *(x for x in found if names and dict(x.blocks).keys() == names)]


def axes_of(name: str, present: Launch) -> list[list[dict[str, Any]]]:
    """The changes to try, by axis: to the values of known launches, and to neighbouring ones."""
    known, now = known_launches(present), vars(present) | dict(present.blocks)
    values: dict[str, set[int]] = {
        block: {dict(launch.blocks)[block] for launch in known} | {size // 2, size * 2} - {0}
        for block, size in present.blocks
    }
    values["num_warps"] = {launch.num_warps for launch in known} | {4, 8}
    stages = {launch.num_stages for launch in known}
    if len(stages) > 1:  # otherwise the kernel has no loop to pipeline
        values["num_stages"] = stages | {present.num_stages + 1, max(1, present.num_stages - 1)}
    axes = [[{k: v} for v in sorted(found - {now[k]})] for k, found in values.items()]
    limit, programs = present.maxnreg or 0, present.programs_per_sm
    limits = {(launch.maxnreg or 0, launch.programs_per_sm) for launch in known} | {(0, 1)}
    if name in PERSISTENT:
        limits |= {(limit, programs + 1), (0, programs)}
    pairs = sorted(limits - {(limit, programs)})
    return [*axes, [{"maxnreg": regs or None, "programs_per_sm": n} for regs, n in pairs]]


def candidates(name: str, present: Launch) -> list[Launch]:
    """What to try, the most promising first; all launch differently."""
    changes = itertools.product(*([{}, *axis] for axis in axes_of(name, present)))
    launches = known_launches(present)
    for change in sorted(changes, key=lambda change: sum(map(bool, change))):
        fields = {name: value for part in change for name, value in part.items()}
        blocks = tuple((block, fields.pop(block, size)) for block, size in present.blocks)
        launches.append(replace(present, blocks=blocks, **fields))
    found: dict[Any, Launch] = {}
    for launch in launches:
        programs = launch.programs_per_sm if name in PERSISTENT else 0
        found.setdefault((*launch.kwargs().items(), programs), launch)
    return [*found.values()][1 : 1 + MAX_CANDIDATES]  # the first is the present one


def small(recipe: Recipe, plan: Plan) -> tuple[Recipe, Plan]:
    """Few rows for which Triton compiles the same code: B * T and T divide by 16 as before."""
    T = recipe.block_size
    short = T if T <= SMALL_T else SMALL_T + T % 16
    few = math.gcd(plan.micro_batch_size, 16) if T % 16 else 1
    return replace(recipe, block_size=short), replace(plan, micro_batch_size=few)


def row_text(key: Key, launch: Launch, source: str) -> str:
    """A row as launches.toml has it."""
    blocks = ", ".join(f"{name} = {size}" for name, size in launch.blocks)
    kernel, where = key.kernel.partition(".")[2], family(int(key.arch))
    words = [json.dumps(value) for value in (kernel, key.math, key.size, where, key.triton)]
    limits = [launch.num_warps, launch.num_stages, launch.maxnreg or 0, launch.programs_per_sm]
    return f"[{', '.join([*words, f'{{{blocks}}}', *map(str, limits), json.dumps(source)])}],"


def time_launches(
    recipe: Recipe, plan: Plan, machine: Machine, seconds: float
) -> dict[str, dict[str, Samples]]:
    """Samples of each kernel of the plan's Triton ops, by row; the present row is the first.

    The kernels share the time. One that cannot be timed is left out.
    """
    found: dict[str, dict[str, Samples]] = {}
    end = time.monotonic() + seconds
    where = f"{machine.name}, {datetime.now(UTC):%Y-%m-%d}"
    where += f", B={plan.micro_batch_size} T={recipe.block_size}"
    room = machine.memory_bytes // 2 // CHILD_BYTES if plan.device == "cuda" else 1
    jobs = max(1, min(num_cores() - 2, room))
    ops = [op for op, backend in read_ops(plan.ops).items() if backend == "triton"]
    with child.Crew(COMMAND, jobs) as crew:
        todo: dict[str, tuple[str, Key, Launch]] = {}
        for op in reversed(ops):  # add_layer_norm, which is most of the norms, before layer_norm
            task = partial(list_launches, op, recipe, plan)
            for key, launch in crew.ask(task, TASK_LIMIT_S).get("launches", ()):
                if key.kernel not in BRIEF:
                    todo.setdefault(key.kernel, (op, key, launch))
        for i, (kernel, (op, key, present)) in enumerate(todo.items()):
            until = time.monotonic() + (end - time.monotonic()) / (len(todo) - i)
            timed = _search(crew, op, kernel, present, (recipe, plan), until)
            for launch, ms in timed:
                gain = f"{Timing(timed[0][1]).median_ms:.4g} -> {Timing(ms).median_ms:.4g} ms"
                source = present.source if launch is present else f"{where}: {op} {gain}"
                found.setdefault(kernel, {})[row_text(key, launch, source)] = ms
    return found


def _search(
    crew: child.Crew, op: str, kernel: str, present: Launch, run: tuple[Recipe, Plan], end: float
) -> list[tuple[Launch, Samples]]:
    """Launches and their samples in turns, the present one first; tries others until `end`."""

    def timed(launches: Sequence[Launch], how: dict[str, Any]) -> list[Samples]:
        task = partial(try_launches, op, kernel, launches, how, *run)
        return crew.ask(task, TASK_LIMIT_S).get("ms", [])

    fastest: list[tuple[float, int]] = []
    todo = candidates(kernel, present)
    size = BATCH * len(crew.children)
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        tasks = [partial(try_launches, op, kernel, [x], {}, *small(*run)) for x in batch]
        for i, answer in enumerate(crew.share(tasks, TASK_LIMIT_S, end), start):
            if answer == {} and time.monotonic() < end and (ms := timed([todo[i]], QUICK)):
                fastest.append((Timing(ms[0]).median_ms, i))
        if time.monotonic() > end:
            break
    launches = [present, *(todo[i] for _, i in sorted(fastest)[:FINALISTS])]
    return [*zip(launches, timed(launches, FINAL), strict=False)]
