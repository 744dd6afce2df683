"""What a run could take, tried on this device: checks and times, in a process that may crash.

It answers training/verify.py, training/choose.py and training/search.py, one task after the other.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import parse_ops
from kernels._launch import ANY, Launch, replaced
from model.edge import one_line
from training import child, timing
from training.kernel_check import check, model_inputs
from training.numerics import default_douts
from training.plan import Plan
from training.probe import probe_steps
from training.recipes import Recipe
from training.step import autocast, start_process

COMMAND = (sys.executable, "-m", "training.trials")
LIMIT_S = 600  # nobody waits that long; it ends where the process that asked is gone
ROUNDS = {"rounds": 15, "seconds": 1.5}  # of an op's backends, in turns
STEPS_S = 3.0  # of steps that no graph replays


def time_op(
    name: str, backends: Sequence[str], recipe: Recipe, plan: Plan, build: bool = False
) -> dict[str, Any]:
    """Samples of an op's forward and backward by backend, in ms, and why others have none.

    Args:
        name, backends: The op, and what it is computed by.
        recipe, plan: Of the run: each gets the arguments that the model passes.
        build: Only have each compiled, which others may do meanwhile.
    """
    failed: dict[str, str] = {}
    contestants: dict[str, list[timing.Call]] = {}
    with _on_stream(plan):
        inputs, nbytes = _inputs(name, recipe, plan)
        num_sets = 1 if build else timing.num_sets(nbytes, torch.device(plan.device))
        for backend in backends:
            try:
                fn = getattr(parse_ops(f"eager,{name}={backend}"), name)
                calls = [_call(fn, inputs, plan) for _ in range(num_sets)]
                calls[0]()
                contestants[backend] = calls
            except Exception as error:  # a backend that refuses the shape, a compiler error, ...
                timing.note_failure(failed, backend, error)
    if build:
        return {"failed": failed}
    device = torch.device(plan.device)
    found = timing.time_calls(contestants, device, nbytes, failed=failed, **ROUNDS)
    return {"ms": {key: of.samples_ms for key, of in found.items()}, "failed": failed}


@contextmanager
def _on_stream(plan: Plan) -> Iterator[None]:
    stream = timing.capture_stream() if plan.device == "cuda" else None
    with torch.cuda.stream(stream):  # type: ignore[arg-type] # None: no stream to enter
        yield


def _inputs(name: str, recipe: Recipe, plan: Plan) -> tuple[dict[str, Any], int]:
    """Of an op in the run's model, and how many bytes they are."""
    inputs = model_inputs(recipe, plan)[name]
    return inputs, sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))


def _call(fn: Callable[..., Any], inputs: dict[str, Any], plan: Plan) -> timing.Call:
    """Forward and backward, on copies of the inputs that no other call reads."""
    leaves = {
        key: v.detach().clone().requires_grad_(v.is_floating_point())
        for key, v in inputs.items() if isinstance(v, Tensor)
    }  # fmt: skip
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        with autocast(plan):
            out = fn(**inputs | leaves)
        return out if isinstance(out, tuple) else (out,)

    douts = default_douts(forward())

    def both() -> list[Tensor]:
        outputs = forward()
        grads = torch.autograd.grad(outputs, wanted, douts)
        return [*(y.detach() for y in outputs), *grads]

    return both


# Of one op at a time, at the run's shapes and at small ones: calls, their results, bytes.
_held: dict[Any, Any] = {}


def _calls_by_kernels(
    name: str, recipe: Recipe, plan: Plan, rotate: bool
) -> tuple[list[timing.Call], list[Tensor], int]:
    if (key := (name, recipe, plan, rotate)) not in _held:
        for other in [other for other in _held if other[0] != name]:
            del _held[other]
        inputs, nbytes = _inputs(name, recipe, plan)
        num_sets = timing.num_sets(nbytes, torch.device(plan.device)) if rotate else 1
        calls = [_call(getattr(parse_ops("triton"), name), inputs, plan) for _ in range(num_sets)]
        _held[key] = calls, _results(calls[0]), nbytes
    return _held[key]


def _results(call: timing.Call) -> list[Tensor]:
    return [t.detach().clone() for t in call()]


def list_launches(name: str, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """(key, launch) of each kernel of an op at the run's shapes."""
    with _on_stream(plan), replaced(ANY, None) as asked:
        _calls_by_kernels(name, recipe, plan, False)[0][0]()
    return {"launches": [*{key.kernel: (key, launch) for key, launch in asked}.values()]}


def try_launches(
    name: str, kernel: str, launches: Sequence[Launch], how: dict[str, Any], recipe: Recipe,
    plan: Plan,
) -> dict[str, Any]:  # fmt: skip
    """Samples of an op's forward and backward by launch of one of its kernels, in ms.

    Args:
        name, kernel, launches: Op, kernel, and what that is launched with.
        how: As of timing.interleave; empty only has each run once.
        recipe, plan: Of the run.

    Raises:
        ValueError: the results are not those of the present row.
    """

    def launched(launch: Launch, call: Callable[[], Any]) -> Any:
        with replaced(kernel, launch):
            return call()

    with _on_stream(plan):
        calls, want, nbytes = _calls_by_kernels(name, recipe, plan, bool(how))
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
    """Equal up to rounding of the dtype; summation order differs between tiles."""
    return all(
        ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        <= 8 * torch.finfo(b.dtype).eps  # false for NaN too
        for a, b in zip(ours, theirs, strict=True)
    )


def time_step(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Samples of the run's whole step by a plan, in ms."""
    torch.compiler.reset()  # or all plans share one limit of recompiling
    vocab, rows = recipe.model_config.vocab_size, 2 * recipe.rows_per_step
    tokens = np.random.default_rng(0).integers(vocab, size=rows * (recipe.block_size + 1))
    found = probe_steps(recipe, plan, tokens.astype(np.uint16), STEPS_S)
    return {"ms": [1e3 * s for s in found.seconds]}


TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": lambda *task: {"why": check(*task)},
    "build": partial(time_op, build=True),
    "time": time_op,
    "step": time_step,
    "list": list_launches,
    "launches": try_launches,
}


def answer(task: tuple[Any, ...]) -> dict[str, Any]:
    """For the process that asks: what was found, or as "error" why it was not; "short" of memory.

    Args:
        task: A name of TRIALS and its arguments, recipe and plan last.
    """
    kind, *arguments = task
    recipe, plan = task[-2:]
    if alarm := getattr(signal, "alarm", None):
        alarm(LIMIT_S)
    try:
        start_process(plan, recipe.seed)
        return TRIALS[kind](*arguments)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            return {"error": one_line(error, 200), "short": True}
        if kind == "check" or timing.is_fatal(error):
            # A device's context may be lost with it: the next op gets a process of its own.
            raise SystemExit(f"{type(error).__name__}: {one_line(error, 200)}") from error
        return {"error": timing.reason_of(error)}
    finally:
        if alarm:
            alarm(0)
        if plan.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    child.serve(os.getpid(), answer)
