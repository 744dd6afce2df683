"""What a run takes of what computes the same: measured once on the user's own device.

Children time each op's backends at the run's own shapes, in turns. `make tune` has them look for
better launch rows before (training/search.py), and time whole steps after, by the plan that follows
and by its rivals, plain PyTorch compiled among them: what ops gain alone they may lose together.
`choose` decides from the numbers alone. The answer is a file of JSON beside the verdicts of
training/verify.py, with every sample.
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

# For all ops, the end of the children left out; where they are asked for, for all steps and rows.
OPS_S, STEPS_S, ROWS_S = 50.0, 100.0, 80.0
BUILD, TIME_S = 0.7, 15.0  # share of the ops' that compiling may take; of one op, which may hang
MAX_GAIN = 100.0  # more is a mistake of the clock: a graph of nothing takes no time
STEP, AS_CHOSEN, COMMITTED = "step", "as chosen", "committed launch rows"
Samples = Mapping[str, Sequence[float]]  # ms, by who was timed, in turns
TIMES = schema.Every([schema.of(float)], ".*")
KEPT = dict.fromkeys(("key", "chosen", "failed"), schema.OBJECT)
KEPT |= {"ms": schema.Every(TIMES, ".*"), "seconds": schema.of(float)}


def rivals(plan: Plan, machine: Machine) -> dict[str, list[str]]:
    """By op what it can be computed by, the plan's own backend first.

    Triton's is one only where the plan has it: elsewhere it is wrong, or takes no such shape.
    """
    found, sdpa = {}, plan.device == "cuda" and not machine.rocm
    for op, present in read_ops(plan.ops).items():
        known = [*BACKENDS, *(SDPA if sdpa and op == "causal_attention" else ())]
        others = (name for name in known if name not in (present, "triton"))
        found[op] = [present, *(x for x in others if not lacks(x, machine, plan.dtype))]
    return found


def steps(choices: Choices, asked: Choices, machine: Machine, dtype: str) -> dict[str, Choices]:
    """What a step is timed by: as chosen, and with one thing that nobody asked for changed."""
    found = {AS_CHOSEN: choices}
    if asked.compile is None:
        found["blocks not compiled"] = replace(choices, compile=False)
    if asked.optimizer == "auto" and choices.optimizer != "torch":
        found["PyTorch's AdamW"] = replace(choices, optimizer="torch")
    if asked.ops == "auto" and asked.compile is None and not lacks("compiled", machine, dtype):
        scope = "model" if asked.compile_scope == "auto" else asked.compile_scope
        found["plain PyTorch, compiled"] = replace(
            choices, ops="eager", compile=True, compile_scope=scope
        )
    return found


def choose(plan: Plan, machine: Machine, measured: Mapping[str, Samples]) -> dict[str, str]:
    """What to take of each op, and of the step; from numbers alone.

    Args:
        plan: What is taken where nothing better is known.
        machine: What cannot run there is not taken, whatever was measured.
        measured: By op, by kernel (its present launch row first), and of STEP.
    """
    names = {kernel: [*of] for kernel, of in measured.items() if "." in kernel and of}
    names |= rivals(plan, machine) | {STEP: [AS_CHOSEN, *measured.get(STEP, {})]}
    return {what: _fastest(of, measured.get(what, {})) for what, of in names.items()}


def launch_rows(chosen: Mapping[str, str], measured: Mapping[str, Samples]) -> str:
    """The rows of kernels that others than their present ones were chosen for, as [measured]."""
    found: dict[str, str] = {}
    for kernel, row in chosen.items():
        if "." in kernel and row != next(iter(measured[kernel])):
            op = kernel.partition(".")[0]
            found[op] = f"{found.get(op, '')}    {row}\n"
    lines = [f"{op} = [\n{rows}]\n" for op, rows in found.items()]
    return "".join(["[measured]\n", *lines] if lines else [])


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


def take_fastest(
    make: Callable[[Choices], Plan],
    asked: Choices,
    checked: Plan,
    recipe: Recipe,
    machine: Machine,
    world: World,
) -> Plan:
    """The plan of `make` with what is fastest here, and a note of what that was decided by.

    Args:
        make, asked: As of training/verify.py's `settle`.
        checked: What that returned.
        recipe, machine, world: Of the run. Rank 0 measures and tells.

    Raises:
        ValueError: --tune-file names a file that is no answer of this kind.
    """
    if asked.tune == "off" or (asked.tune == "auto" and checked.device != "cuda"):
        return checked
    long = world.size == 1 and checked.device == "cuda" and asked.tune in ("on", "only")
    names = {op: of for op, of in rivals(checked, machine).items() if len(of) > 1}
    names = names if asked.ops == "auto" else {}

    def plans(measured: Mapping[str, Samples]) -> dict[str, Plan]:
        chosen = choose(checked, machine, measured)
        choices = replace(asked, ops=checked.ops, optimizer=checked.optimizer)
        if asked.ops == "auto":
            ops = spell_ops({op: chosen[op] for op in read_ops(checked.ops)})
            choices = replace(choices, ops=ops)
        every = steps(choices, asked, machine, checked.dtype)
        found = {name: make(changed) for name, changed in every.items()}
        if rows := launch_rows(chosen, measured):
            with_rows = {name: replace(plan, launches=rows) for name, plan in found.items()
                         if "triton" in read_ops(plan.ops).values()}  # fmt: skip
            found |= with_rows | {COMMITTED: found[AS_CHOSEN]}
        return found

    def measure(trouble: str) -> tuple[dict[str, Any], str]:
        takes = "up to four minutes" if long else "up to a minute, --tune off leaves it out"
        world.say(
            f"tune: timing what a step can be made of on {machine.name}; takes {takes}{trouble}"
        )
        began = time.monotonic()
        launches = _sound_launches(checked, recipe, machine, world.say) if long else {}
        rows = launch_rows(choose(checked, machine, launches), launches)
        ms, failed = _time_ops(names, recipe, replace(checked, launches=rows), OPS_S)
        ms |= launches
        if long:
            ms[STEP], failed[STEP] = _time_steps(plans(ms), recipe, STEPS_S)
        seconds = round(time.monotonic() - began, 1)
        lost = [
            f", {op} could not be timed ({of['all']})" for op, of in failed.items() if "all" in of
        ]
        values = {"chosen": choose(checked, machine, ms), "ms": ms, "failed": failed}
        return values | {"seconds": seconds}, f"measured in {seconds:.0f} s{''.join(lost)}, "

    def answer() -> tuple[dict[str, Samples], str] | None:
        """Samples, and in words where they are from."""
        wishes = {k: v for k, v in asdict(asked).items() if not k.startswith("tune")}
        key = key_of(recipe, checked, machine) | {"from": names, "asked": wishes}
        path = Path(asked.tune_file) if asked.tune_file else cache_path(key, "choice")
        kept, trouble = read_kept(path, key, KEPT, check_rows)
        if trouble and asked.tune_file:
            raise ValueError(f"tune_file{trouble}; name another, or remove it")
        if kept and asked.tune == "auto":
            return kept["ms"], f"measured before, see {path}"
        if not (names or long):  # what was asked for by name is no question
            return None
        found, said = measure(trouble)
        more = "" if long else "; `make tune` searches launch rows and times whole steps too"
        return found["ms"], f"{said}{keep(path, {'key': key, **found})}{more}"

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
    """Raise ValueError for a kept launch row that is none of its kernel."""
    for kernel, of in kept["ms"].items():
        for row in of if "." in kernel else ():
            text = launch_rows({kernel: row}, {kernel: {"": ()}})
            if "\n" in row or [key.kernel for key in read_rows(text)[0]] != [kernel]:
                raise ValueError(f"{quoted(row)} is no launch row of {quoted(kernel)}")


def _sound_launches(
    plan: Plan, recipe: Recipe, machine: Machine, say: Callable[[str], None]
) -> dict[str, Any]:
    """Samples of launch rows; none where a kernel is wrong with those that follow from them."""
    ms = time_launches(recipe, plan, machine, ROWS_S)
    rows = launch_rows(choose(plan, machine, ms), ms)
    if rows and (wrong := find_wrong(recipe, replace(plan, launches=rows), machine, say)):
        say(f"tune: the launch rows stay as they are: {next(iter(wrong.values()))}")
        return {}
    return ms


def table(plan: Plan, machine: Machine, measured: Mapping[str, Samples]) -> Iterator[str]:
    """A line for each thing that was timed: what was chosen, its time, its rivals'."""
    for what, chosen in choose(plan, machine, measured).items():
        ms = {name: Timing(of).median_ms for name, of in measured.get(what, {}).items() if of}
        if "." in what:  # whose names are rows
            labels = {row: f"row {i}" if i else "as committed" for i, row in enumerate(ms)}
            ms, chosen = {labels[row]: of for row, of in ms.items()}, labels.get(chosen, chosen)
        if chosen in ms:
            own = f"{ms.pop(chosen):.4g} ms"
            others = ", ".join(f"{name} {other:.4g}" for name, other in ms.items())
            yield f"{what:<21} {chosen:<12} {own:>10}  ({others or 'no rival'})"


def _time_ops(
    names: Mapping[str, list[str]], recipe: Recipe, plan: Plan, seconds: float
) -> tuple[Any, Any]:
    """Samples of each op, and why others have none; compiled side by side, timed one by one."""
    ms: dict[str, Any] = {}
    failed: dict[str, Any] = {}
    began = time.monotonic()

    def left(share: float = 1.0) -> float:
        return began + share * seconds - time.monotonic()

    def build(op: str, who: int) -> dict[str, Any]:
        task = partial(time_op, op, names[op], recipe, plan, build=True)
        return crew.ask(task, left(BUILD), who)

    with child.Crew(COMMAND, len(names)) as crew:
        with ThreadPoolExecutor(num_cores()) as pool:
            built = [*pool.map(build, names, range(len(names)))]
        for who, (op, answer) in enumerate(zip(names, built, strict=True)):
            bad = answer.get("failed", {})
            if "error" not in answer:
                sound = [name for name in names[op] if name not in bad]
                task = partial(time_op, op, sound, recipe, plan)
                answer = crew.ask(task, min(TIME_S, left()), who)
            ms[op] = {name: _rounded(of) for name, of in answer.get("ms", {}).items()}
            why = {"all": answer["error"]} if "error" in answer else {}
            failed[op] = bad | answer.get("failed", {}) | why
    return ms, failed


def _time_steps(plans: Mapping[str, Plan], recipe: Recipe, seconds: float) -> tuple[Any, Any]:
    """Samples of the step by each plan, one after the other: a device has room for one."""
    ms, failed, end = {}, {}, time.monotonic() + seconds
    with child.Crew(COMMAND, 1) as crew:
        for name, plan in plans.items():
            answer = crew.ask(partial(time_step, recipe, plan), end - time.monotonic())
            if "ms" in answer:
                ms[name] = _rounded(answer["ms"])
            else:
                failed[name] = answer["error"]
    return ms, failed


def _rounded(samples: Sequence[float]) -> list[float]:
    return [float(f"{ms:.4g}") for ms in samples]
