"""Choose how a run computes its ops, from times measured once on the user's own device.

Children time the backends of each op at the run's own shapes, in turns. `make tune` first searches
for better launch rows (training/search.py). Finally it times whole steps of the resulting plan and
its rivals, plain PyTorch compiled among them, because gains of single ops may not add up.
`choose` decides from the numbers alone. The answer, with every sample, is a JSON file beside the
verdicts of training/verify.py.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from kernels import BACKENDS, SDPA, read_ops, spell_ops
from kernels._launch import read_rows
from model.edge import quoted
from training import child, schema
from training.distributed import World
from training.machines import Machine, num_cores
from training.plan import Choices, Plan, lacks
from training.recipes import Recipe
from training.search import time_launches
from training.timing import Timing, gains, ratio
from training.trials import COMMAND, time_op, time_step
from training.verify import cache_path, find_wrong, keep, key_of, read_kept

# Seconds for timing all ops; in `make tune`, also for all steps and for all launch rows.
OPS_S, STEPS_S, ROWS_S = 50.0, 100.0, 80.0
BUILD = 0.7  # share of OPS_S that compiling may take
TIME_S = 15.0  # for timing one op, which may hang
MAX_GAIN = 100.0  # a larger gain is a fault of the clock: an empty graph takes no time
STEP, AS_CHOSEN, COMMITTED = "step", "as chosen", "committed launch rows"
Samples = Mapping[str, Sequence[float]]  # ms, by what was timed, in turns
TIMES = schema.Every([schema.of(float)], ".*")
KEPT = dict.fromkeys(("key", "chosen", "failed"), schema.OBJECT)
KEPT |= {"ms": schema.Every(TIMES, ".*"), "seconds": schema.of(float)}


def rivals(plan: Plan, machine: Machine) -> dict[str, list[str]]:
    """The backends that can compute each op, the plan's own first.

    Triton is a rival only where the plan has it: elsewhere its kernel failed the check, or does not
    take the shape.
    """
    found, sdpa = {}, plan.device == "cuda" and not machine.rocm
    for op, present in read_ops(plan.ops).items():
        known = [*BACKENDS, *(SDPA if sdpa and op == "causal_attention" else ())]
        others = (name for name in known if name not in (present, "triton"))
        found[op] = [present, *(x for x in others if not lacks(x, machine, plan.dtype))]
    return found


def choose(plan: Plan, machine: Machine, measured: Mapping[str, Samples]) -> dict[str, str]:
    """Choose a backend per op, a row per kernel and a plan for the step, from numbers alone.

    Args:
        plan: What is used where nothing better is known.
        machine: What cannot run there is not chosen, whatever was measured.
        measured: By op, by kernel (its present launch row first), and of STEP.
    """
    names = {kernel: [*of] for kernel, of in measured.items() if "." in kernel and of}
    names |= rivals(plan, machine) | {STEP: [AS_CHOSEN, *measured.get(STEP, {})]}
    return {what: _fastest(of, measured.get(what, {})) for what, of in names.items()}


def _fastest(names: Sequence[str], samples: Samples) -> str:
    """The first, unless another is faster beyond noise."""
    timed = {name: Timing(samples[name]) for name in names if _sound(samples.get(name, ()))}
    if not (present := timed.get(names[0])):
        return names[0]
    better = {name: ratio(present, of) for name, of in timed.items() if gains(present, of)}
    better = {name: gain for name, gain in better.items() if gain <= MAX_GAIN}
    return max(better, key=lambda name: better[name], default=names[0])


def _sound(samples: Sequence[float]) -> bool:
    return len(samples) > 0 and all(math.isfinite(ms) and ms > 0 for ms in samples)


def launch_rows(measured: Mapping[str, Samples]) -> str:
    """The rows that are faster than their kernels' present ones, as a table [measured]; or ""."""
    found: dict[str, str] = {}
    for kernel, of in measured.items():
        if "." in kernel and of and (row := _fastest([*of], of)) != next(iter(of)):
            op = kernel.partition(".")[0]
            found[op] = f"{found.get(op, '')}    {row}\n"
    lines = [f"{op} = [\n{rows}]\n" for op, rows in found.items()]
    return "".join(["[measured]\n", *lines] if lines else [])


def step_plans(
    make: Callable[[Choices], Plan],
    asked: Choices,
    checked: Plan,
    machine: Machine,
    measured: Mapping[str, Samples],
) -> dict[str, Plan]:
    """The plan with the ops and launch rows that were chosen, and its rivals, by name.

    Each rival differs in one thing that the user left open.
    """
    chosen, ops = choose(checked, machine, measured), checked.ops
    if asked.ops == "auto":
        ops = spell_ops({op: chosen[op] for op in read_ops(ops)})
    choices = replace(asked, ops=ops, optimizer=checked.optimizer)
    found = {AS_CHOSEN: make(choices)}
    if asked.compile is None:
        found["blocks not compiled"] = make(replace(choices, compile=False))
    if asked.optimizer == "auto" and choices.optimizer != "torch":
        found["PyTorch's AdamW"] = make(replace(choices, optimizer="torch"))
    compiles = asked.compile is None and not lacks("compiled", machine, checked.dtype)
    if asked.ops == "auto" and compiles:
        scope = "model" if asked.compile_scope == "auto" else asked.compile_scope
        plain = replace(choices, ops="eager", compile=True, compile_scope=scope)
        found["plain PyTorch, compiled"] = make(plain)
    if rows := launch_rows(measured):
        committed = found[AS_CHOSEN]
        for name, plan in found.items():
            if "triton" in read_ops(plan.ops).values():
                found[name] = replace(plan, launches=rows)
        found[COMMITTED] = committed
    return found


def take_fastest(
    make: Callable[[Choices], Plan],
    asked: Choices,
    checked: Plan,
    recipe: Recipe,
    machine: Machine,
    world: World,
) -> Plan:
    """The plan of `make` with the fastest choices here, and a note of the times behind them.

    Args:
        make, asked: As of training/verify.py's `settle`.
        checked: What that returned.
        recipe, machine, world: Of the run. Rank 0 measures and tells the others.

    Raises:
        ValueError: --tune-file names a file that does not hold results for this run.
    """
    on_cuda = checked.device == "cuda"
    if asked.tune == "off" or (asked.tune == "auto" and not on_cuda):
        return checked
    long = world.size == 1 and on_cuda and asked.tune in ("on", "only")
    names = {op: of for op, of in rivals(checked, machine).items() if len(of) > 1}
    names = names if asked.ops == "auto" else {}
    plans = partial(step_plans, make, asked, checked, machine)

    def answer() -> tuple[dict[str, Samples], str] | None:
        """Samples, and where they are from."""
        wishes = {k: v for k, v in asdict(asked).items() if not k.startswith("tune")}
        key = key_of(recipe, checked, machine) | {"from": names, "asked": wishes}
        path = Path(asked.tune_file) if asked.tune_file else cache_path(key, "choice")
        kept, trouble = read_kept(path, key, KEPT, check_rows)
        if trouble and asked.tune_file:
            raise ValueError(f"tune_file: {trouble.removeprefix('; ')}; name another, or remove it")
        if kept and asked.tune == "auto":
            return kept["ms"], f"measured before, see {path}"
        if not (names or long):  # flags decide everything
            return None
        takes = "up to four minutes" if long else "up to a minute, --tune off skips it"
        line = f"tune: timing the ways to compute a step on {machine.name}; takes {takes}{trouble}"
        world.say(line)
        began = time.monotonic()
        launches = _sound_launches(checked, recipe, machine, world.say) if long else {}
        with_rows = replace(checked, launches=launch_rows(launches))
        ms, failed = _time_ops(names, recipe, with_rows, OPS_S)
        ms |= launches
        if long:
            ms[STEP], failed[STEP] = _time_steps(plans(ms), recipe, STEPS_S)
        seconds = round(time.monotonic() - began, 1)
        found = {"chosen": choose(checked, machine, ms), "ms": ms, "failed": failed}
        where = keep(path, {"key": key, **found, "seconds": seconds})
        lost = {op: of["all"] for op, of in failed.items() if "all" in of}
        missing = "".join(f", {op} could not be timed ({why})" for op, why in lost.items())
        more = "" if long else "; `make tune` also searches launch rows and times whole steps"
        return ms, f"measured in {seconds:.0f} s{missing}, {where}{more}"

    if not (found := world.first("times", answer)):
        return checked
    measured, source = found
    every, lines = plans(measured), [*table(checked, machine, measured)]
    made = every.get(choose(checked, machine, measured)[STEP], every[AS_CHOSEN])
    if asked.tune == "only":
        world.say("\n".join([f"tune: {source}", *lines]))
        if made.launches:
            world.say(f"CONTRIBUTING.md says how to send these rows:\n{made.launches}")
    note = f"tune: {source}: {'; '.join(' '.join(line.split()) for line in lines)}"
    return replace(made, notes=tuple(dict.fromkeys([*checked.notes, *made.notes, note])))


def check_rows(kept: Mapping[str, Any]) -> None:
    """Raise ValueError for a kept launch row that is not one of its kernel."""
    for kernel, of in kept["ms"].items():
        for row in of if "." in kernel else ():
            text = f"[measured]\n{kernel.partition('.')[0]} = [\n    {row}\n]\n"
            if "\n" in row or [key.kernel for key in read_rows(text)[0]] != [kernel]:
                raise ValueError(f"{quoted(row)} is not a launch row of {quoted(kernel)}")


def _sound_launches(
    plan: Plan, recipe: Recipe, machine: Machine, say: Callable[[str], None]
) -> dict[str, Any]:
    """Samples of launch rows; none if a kernel is wrong with the rows that they favour."""
    ms = time_launches(recipe, plan, machine, ROWS_S)
    rows = launch_rows(ms)
    if rows and (wrong := find_wrong(recipe, replace(plan, launches=rows), machine, say)):
        say(f"tune: the launch rows are not changed: {next(iter(wrong.values()))}")
        return {}
    return ms


def table(plan: Plan, machine: Machine, measured: Mapping[str, Samples]) -> Iterator[str]:
    """A line per timed thing: what was chosen, its time, and its rivals' times."""
    for what, chosen in choose(plan, machine, measured).items():
        ms = {name: Timing(of).median_ms for name, of in measured.get(what, {}).items() if of}
        if "." in what:  # a kernel, whose names are whole rows
            labels = {row: f"row {i}" if i else "as committed" for i, row in enumerate(ms)}
            ms, chosen = {labels[row]: of for row, of in ms.items()}, labels.get(chosen, chosen)
        if chosen in ms:
            own = f"{ms.pop(chosen):.4g} ms"
            others = ", ".join(f"{name} {other:.4g}" for name, other in ms.items())
            yield f"{what:<21} {chosen:<12} {own:>10}  ({others or 'no rival'})"


def _time_ops(
    names: Mapping[str, list[str]], recipe: Recipe, plan: Plan, seconds: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples of each op by backend, and why others have none.

    Each op has its own child. They compile side by side, and time one after the other.
    """
    ms: dict[str, Any] = {}
    failed: dict[str, Any] = {}
    began = time.monotonic()

    def build(op: str, who: int) -> dict[str, Any]:
        task = partial(time_op, op, names[op], recipe, plan, build=True)
        return crew.ask(task, began + BUILD * seconds - time.monotonic(), who)

    with child.Crew(COMMAND, len(names)) as crew:
        with ThreadPoolExecutor(num_cores()) as pool:
            built = [*pool.map(build, names, range(len(names)))]
        for who, (op, answer) in enumerate(zip(names, built, strict=True)):
            failed[op] = answer.get("failed", {})
            if "error" not in answer:
                sound = [name for name in names[op] if name not in failed[op]]
                left = began + seconds - time.monotonic()
                task = partial(time_op, op, sound, recipe, plan)
                answer = crew.ask(task, min(TIME_S, left), who)
                failed[op] |= answer.get("failed", {})
            if "error" in answer:
                failed[op]["all"] = answer["error"]
            ms[op] = answer.get("ms", {})
    return ms, failed


def _time_steps(
    plans: Mapping[str, Plan], recipe: Recipe, seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Samples of the step by each plan, one by one, because a device has room for only one."""
    end = time.monotonic() + seconds
    with child.Crew(COMMAND, 1) as crew:
        answers = {
            name: crew.ask(partial(time_step, recipe, plan), end - time.monotonic())
            for name, plan in plans.items()
        }
    ms = {name: of["ms"] for name, of in answers.items() if "ms" in of}
    return ms, {name: of["error"] for name, of in answers.items() if "error" in of}
