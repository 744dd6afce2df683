"""What a child process tries on this device: it checks or times, and it may crash.

Each task is a call of a function below, with recipe and plan last. training/verify.py,
training/choose.py and training/search.py send them.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import parse_ops
from kernels._launch import ANY, Launch, replaced
from model.edge import one_line
from training import timing
from training.kernel_check import check, model_inputs
from training.numerics import gradient_call
from training.plan import Plan
from training.probe import probe_steps
from training.recipes import Recipe
from training.step import autocast, start_process

COMMAND = (
    sys.executable,
    "-c",
    "from training import child, trials; child.serve(trials.answer)",
)
LIMIT_S = 600  # of a task: longer than anyone waits, so that a hung child outlives no run for long
ROUNDS = {"rounds": 15, "seconds": 1.5}  # of an op's backends, in turns
STEPS_S = 3.0  # of steps that no graph replays


def check_op(name: str, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Why an op of ours, or AdamW, is wrong here."""
    return {"why": check(name, recipe, plan)}


def time_op(
    name: str, backends: Sequence[str], recipe: Recipe, plan: Plan, build: bool = False
) -> dict[str, Any]:
    """Samples of an op's forward and backward by backend, in ms, and why others have none.

    Args:
        name, backends: The op, and the backends that compute it.
        recipe, plan: Of the run, whose model passes arguments of these shapes.
        build: Only compile each backend, which children may do at the same time.
    """
    failed: dict[str, str] = {}
    contestants: dict[str, list[timing.Call]] = {}
    with _on_stream(plan):
        inputs, nbytes, num_sets = _inputs(name, recipe, plan)
        for backend in backends:
            try:
                fn = getattr(parse_ops(f"eager,{name}={backend}"), name)
                contestants[backend] = _calls(fn, inputs, plan, 1 if build else num_sets)
            except Exception as error:  # a backend that refuses the shape, a compiler error, ...
                timing.note_failure(failed, backend, error)
    if build:
        return {"failed": failed}
    device = torch.device(plan.device)
    found = timing.time_calls(contestants, device, nbytes, failed=failed, **ROUNDS)
    return {"ms": {key: of.samples_ms for key, of in found.items()}, "failed": failed}


def _on_stream(plan: Plan) -> AbstractContextManager[Any]:
    cuda = plan.device == "cuda"
    return torch.cuda.stream(timing.capture_stream()) if cuda else nullcontext()


def _inputs(name: str, recipe: Recipe, plan: Plan) -> tuple[dict[str, Any], int, int]:
    """An op's arguments in the run's model, their bytes, and how many sets of them to rotate."""
    inputs = model_inputs(recipe, plan)[name]
    nbytes = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
    return inputs, nbytes, timing.num_sets(nbytes, torch.device(plan.device))


def _calls(
    fn: Callable[..., Any], inputs: dict[str, Any], plan: Plan, count: int
) -> list[timing.Call]:
    """So many calls of forward and backward, each on its own copies of the inputs."""

    def forward(**arguments: Any) -> Any:
        with autocast(plan):
            return fn(**arguments)

    calls = [gradient_call(forward, inputs) for _ in range(count)]
    for call in calls:
        call()  # the first one draws output gradients, which no capture could record
    return calls


@lru_cache(maxsize=2)  # the op's calls at the run's shapes, and at small ones
def calls_by_kernels(
    name: str, recipe: Recipe, plan: Plan, rotate: bool
) -> tuple[list[timing.Call], list[Tensor], int]:
    """An op's calls by our kernels, the results of the first, and bytes of a call's inputs."""
    inputs, nbytes, num_sets = _inputs(name, recipe, plan)
    calls = _calls(getattr(parse_ops("triton"), name), inputs, plan, num_sets if rotate else 1)
    return calls, _results(calls[0]), nbytes


def _results(call: timing.Call) -> list[Tensor]:
    return [t.clone() for t in call().values()]


def list_launches(name: str, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """(key, launch) of each kernel of an op at the run's shapes."""
    with _on_stream(plan), replaced(ANY, None) as asked:
        calls_by_kernels(name, recipe, plan, False)[0][0]()
    return {"launches": [*{key.kernel: (key, launch) for key, launch in asked}.values()]}


def try_launches(
    name: str,
    kernel: str,
    launches: Sequence[Launch],
    how: dict[str, Any],
    recipe: Recipe,
    plan: Plan,
) -> dict[str, Any]:
    """Samples of an op's forward and backward by launch of one of its kernels, in ms.

    Args:
        name, kernel, launches: The op, one of its kernels, and the launches to try.
        how: Arguments of timing.interleave; if empty, each launch only runs once.
        recipe, plan: Of the run.

    Raises:
        ValueError: the results are not those of the present row.
    """

    def launched(launch: Launch, call: Callable[[], Any]) -> Any:
        with replaced(kernel, launch):
            return call()

    with _on_stream(plan):
        calls, want, nbytes = calls_by_kernels(name, recipe, plan, bool(how))
        for launch in launches:
            if not same(launched(launch, partial(_results, calls[0])), want):
                raise ValueError("results differ from the present row's")
    if not how:
        return {}
    contestants = {
        str(i): [partial(launched, launch, call) for call in calls]
        for i, launch in enumerate(launches)
    }
    found = timing.time_calls(contestants, torch.device(plan.device), nbytes, **how)
    return {"ms": [[*found[i].samples_ms] for i in contestants]}


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal up to rounding of the dtype; the order of summation differs between tiles."""
    return all(
        ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        <= 8 * torch.finfo(b.dtype).eps  # false for NaN too
        for a, b in zip(ours, theirs, strict=True)
    )


def time_step(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Samples of the run's whole step by a plan, in ms."""
    torch.compiler.reset()  # all plans would share one limit of recompilations
    vocab, rows = recipe.model_config.vocab_size, 2 * recipe.rows_per_step
    tokens = np.random.default_rng(0).integers(vocab, size=rows * (recipe.block_size + 1))
    found = probe_steps(recipe, plan, tokens.astype(np.uint16), STEPS_S)
    return {"ms": [1e3 * s for s in found.seconds]}


def answer(task: partial[dict[str, Any]]) -> dict[str, Any]:
    """The result of a task, or {"error": why there is none}, with "short" where memory ran out."""
    recipe, plan = task.args[-2:]
    signal.alarm(LIMIT_S)
    try:
        start_process(plan, recipe.seed)
        return task()
    except torch.OutOfMemoryError as error:
        return {"error": one_line(error, 200), "short": True}
    except Exception as error:
        if task.func is check_op or timing.is_fatal(error):
            # The device's context may be lost: the next task needs a process of its own.
            raise SystemExit(f"{type(error).__name__}: {one_line(error, 200)}") from error
        return {"error": timing.reason_of(error)}
    finally:
        signal.alarm(0)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
