"""Checks that the kernels compute the same as plain PyTorch here, before a run trusts them.

`settle` has child processes (training/trials.py) check AdamW and each op that a plan gives to
Triton. An illegal access kills a process, and a bad launch may never return; a lost child costs
only its op. The verdicts are kept in the user's cache directory, in a readable file for each card,
driver, version, assembler, state of the sources and shape. Every run does `compare_first_batch`.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import EAGER, Ops, read_ops, spell_ops
from model import GPT
from model.edge import one_line
from model.files import read_regular, write_atomically
from training import child, schema
from training.distributed import World
from training.environment import assembler, package_version
from training.machines import Machine, num_cores, nvidia_smi
from training.plan import Choices, Plan
from training.recipes import Recipe
from training.resume import RunFailed
from training.step import autocast
from training.trials import COMMAND, check_op

ROOT = Path(__file__).parents[1]
# The sources that a verdict or a time depends on.
SOURCES = """
    kernels/*.py kernels/*.toml model/gpt.py training/trials.py
    training/numerics.py training/optim.py training/choose.py training/search.py training/timing.py
"""
LIMIT_S = 300.0  # for one check, its start and compiling included, on a machine that may be busy
# What a lack of device memory is called, by others than torch's allocator too.
SHORT = ("out of memory", "ALLOC_FAILED", "STATUS_NOT_INITIALIZED")
# Failures that may not recur at the next start, so they are not kept.
PASSING = ("no answer", "ended with -9", "allocate memory", "busy or unavailable", *SHORT)
ADAMW = "adamw"
KEPT = {"key": schema.OBJECT, "wrong": schema.of(dict[str, str]), "seconds": schema.of(float)}
# How far loss and gradient norm of the first micro-batch may differ. Only gross faults show there;
# the check of each op is stricter.
FIRST_BATCH = {"fp32": (1e-3, 1e-2), "bf16": (1e-2, 1e-1), "fp16": (1e-2, 1e-1)}


def checked_names(plan: Plan) -> tuple[str, ...]:
    """The ops of a plan that are Triton's, and AdamW where it is ours."""
    names = [name for name, backend in read_ops(plan.ops).items() if backend == "triton"]
    return (*names, *[ADAMW] * (plan.optimizer == "triton"))


def settle(
    make: Callable[[Choices], Plan], asked: Choices, recipe: Recipe, machine: Machine, world: World
) -> Plan:
    """The plan of `make` without the kernels that are wrong here; a note names each one.

    Raises:
        RunFailed: one of them was asked for by name.
    """
    choices, notes, rows, earlier = asked, {}, 0, ()
    # A plan with other ops may take other rows at once, so that all is checked again.
    while checked_names(plan := make(choices)) and plan.micro_batch_size != rows:
        rows, earlier = plan.micro_batch_size, earlier or plan.notes
        check = partial(find_wrong, recipe, plan, machine, world.say)
        for name, why in world.first(f"kernels at {rows} rows", check).items():
            flag = "optimizer" if name == ADAMW else "ops"
            notes[name] = f"{flag}: not our {name}, which fails its check on {machine.name}: {why}"
            if getattr(asked, flag) != "auto":
                raise RunFailed(f"{notes[name]}; go on with --{flag} auto")
        if ops := notes.keys() - {ADAMW}:
            without = read_ops(plan.ops) | dict.fromkeys(ops, "eager")
            choices = replace(choices, ops=spell_ops(without))
        if ADAMW in notes:
            choices = replace(choices, optimizer="torch")
    return replace(plan, notes=tuple(dict.fromkeys([*earlier, *plan.notes, *notes.values()])))


def find_wrong(
    recipe: Recipe, plan: Plan, machine: Machine, say: Callable[[str], None]
) -> dict[str, str]:
    """What is wrong with the plan's kernels, by name, from the cache or from children."""
    if plan.device == "cpu" and plan.dtype == "bf16":
        say("kernels: not checked, triton's interpreter does not round bf16 as hardware does")
        return {}
    names, key = checked_names(plan), key_of(recipe, plan, machine)
    path = cache_path(key)
    kept, trouble = read_kept(path, key, KEPT)
    known = kept["wrong"] if kept else {}
    new = tuple(name for name in names if name not in known)
    ops = len({*(new or names)} - {ADAMW})
    what = " and ".join([f"{ops} ops"] * (ops > 0) + ["AdamW"] * (ADAMW in (new or names)))
    if new:
        say(f"kernels: checking {what} on {machine.name}, this once; takes about a minute{trouble}")
        began = time.monotonic()
        found = ask_children(new, recipe, plan)
        seconds, wrong = time.monotonic() - began, sum(map(bool, found.values()))
        sure = {n: why for n, why in found.items() if not any(text in why for text in PASSING)}
        where = keep(path, {"key": key, "wrong": known | sure, "seconds": round(seconds, 1)})
        result = f"{wrong} wrong" if wrong else "all right"
        say(f"kernels: {what} checked on {machine.name} in {seconds:.0f} s, {result}; {where}")
        known |= found
    else:
        say(f"kernels: {what} were checked on {machine.name} before; see {path}")
    again = f", without {path} it is checked again" if path.exists() else ""
    return {
        name: f"{known[name]}; `make test OP={name}` shows more{again}"
        for name in names
        if known[name]
    }


def key_of(recipe: Recipe, plan: Plan, machine: Machine) -> dict[str, Any]:
    """All that a verdict may depend on."""
    sources = hashlib.sha256()
    for source in sorted(path for pattern in SOURCES.split() for path in ROOT.glob(pattern)):
        sources.update(source.read_bytes())
    return {
        "card": machine.name,
        "driver": nvidia_smi("driver_version").get("driver_version", ""),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "assembler": assembler(),
        "sources": sources.hexdigest(),
        "model": asdict(recipe.model_config),
        "rows": plan.micro_batch_size,
        "T": recipe.block_size,
        "dtype": plan.dtype,
        "residual": plan.residual,
        "working_copies": plan.working_copies,
        "launches": plan.launches,
    }


def cache_path(key: Mapping[str, Any], kind: str = "kernels") -> Path:
    """The file that keeps what was found for a key."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG standard says to ignore a relative one
        base = Path(os.path.expanduser("~/.cache"))
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return base / "fused-gpt" / f"{kind}-{name}.json"


def keep(path: Path, values: Mapping[str, Any]) -> str:
    """Write a file for `read_kept`; returns where it is, or why it could not be written."""
    lists = re.compile(r"\[[^\[\]{}\"]*\]")  # lists of samples; each goes on one line
    text = lists.sub(lambda found: " ".join(found[0].split()), json.dumps(values, indent=2))
    try:
        if str(path).startswith("~"):
            raise OSError("this user has no home directory; set XDG_CACHE_HOME")
        write_atomically(path, text + "\n")
        return f"kept in {path}"
    except OSError as error:
        return f"not kept: {one_line(error)}"


def read_kept(
    path: Path, key: Mapping[str, Any], like: Any, check: Callable[[Any], None] = lambda _: None
) -> tuple[dict[str, Any] | None, str]:
    """What a file keeps for a key, or None and why the file that is there cannot be used.

    It must be as the schema `like` says, and `check` must not raise ValueError.
    """
    try:
        values = json.loads(read_regular(path))
        schema.check("it", values, like)
        check(values)
        if values["key"] == key:
            return values, ""
        why = "it is for another card, version, shape or choice of flags"
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, RecursionError) as error:
        why = one_line(error, 200)
    return None, f"; {path} cannot be used: {why}"


def ask_children(names: tuple[str, ...], recipe: Recipe, plan: Plan) -> dict[str, str]:
    """What is wrong with each of the kernels on the plan's device, or ""."""
    tasks = [partial(check_op, name, recipe, plan) for name in names]
    side_by_side = min(len(tasks), num_cores()) if plan.device == "cuda" else 1
    with child.Crew(COMMAND, side_by_side) as crew:
        answers = crew.share(tasks, LIMIT_S)
        for i, answer in enumerate(answers):
            if any(text in answer.get("error", "") for text in SHORT):  # again, alone
                answers[i] = crew.ask(tasks[i], LIMIT_S)
    why = [one_line(each.get("why", f"its process: {each.get('error')}")) for each in answers]
    return dict(zip(names, why, strict=True))


def compare_first_batch(
    model: GPT, plan: Plan, rows: Callable[[], tuple[Tensor, Tensor]], asked: str, world: World
) -> Plan:
    """The plan, with eager ops if the chosen ops give a different loss or gradient.

    Args:
        model: On the device, with the weights that training begins with. It leaves with the ops of
            the returned plan.
        plan: Of this rank.
        rows: Returns inputs and targets of the first micro-batch.
        asked: Choices.ops.
        world: All ranks; one that finds a difference decides for all.

    Raises:
        RunFailed: they differ, and the ops were asked for by name.
    """
    if not set(read_ops(plan.ops).values()) - {"eager"}:
        return plan
    idx, targets = (t.to(plan.device) for t in rows())
    training = model.training
    model.eval()  # no dropout
    why = _difference(model, plan, idx, targets)
    model.train(training)
    if idx.is_cuda:
        torch.cuda.empty_cache()  # a graph's pool cannot use what the cache holds
    if not (found := [line for line in world.gather("first batch", why) if line]):
        return plan
    line = f"ops: {plan.ops} is wrong on this device: {found[0]}"
    if asked != "auto":
        raise RunFailed(f"{line}; go on with --ops eager")
    world.say(f"{line}; going on with eager ops")
    model.use(EAGER)
    return replace(plan, ops="eager", notes=(*plan.notes, line))


def _difference(model: GPT, plan: Plan, idx: Tensor, targets: Tensor) -> str:
    """How the chosen ops differ from eager ones, or ""; on fewer rows if memory is short."""
    both = EAGER, plan.op_set
    while True:
        try:
            eager, ours = (_loss_and_norm(model, plan, ops, idx, targets) for ops in both)
            break
        except torch.OutOfMemoryError:
            if len(idx) == 1:
                raise
        idx, targets = idx[: len(idx) // 2], targets[: len(idx) // 2]
        torch.cuda.empty_cache()
    if not all(map(math.isfinite, eager)):
        return ""  # the weights are at fault, and the guard says so
    loss_share, norm_share = FIRST_BATCH[plan.dtype]
    budgets = loss_share * max(eager[0], 1.0), norm_share * eager[1]
    for name, mine, plain, budget in zip(
        ("loss", "gradient norm"), ours, eager, budgets, strict=True
    ):
        if not abs(mine - plain) <= budget:
            return f"the first micro-batch has {name} {mine:.6g}, with eager ops {plain:.6g}"
    return ""


def _loss_and_norm(
    model: GPT, plan: Plan, ops: Ops, idx: Tensor, targets: Tensor
) -> tuple[float, float]:
    model.use(ops)
    model.transformer.recompute = plan.recompute
    with autocast(plan):
        loss = model(idx, targets)
    grads = torch.autograd.grad(loss, [*model.parameters()])
    return loss.item(), torch.nn.utils.get_total_norm(grads).item()
