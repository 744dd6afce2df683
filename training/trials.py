"""What a run could take, tried on this device: checks and times, in a process that may crash.

It answers training/verify.py, training/choose.py and training/search.py, one task after the other:
a call of a function below, with recipe and plan last.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from training.numerics import default_douts
from training.plan import Plan
from training.probe import probe_steps
from training.recipes import Recipe
from training.step import autocast, start_process

SERVE = "from training import child, trials; child.serve(0, trials.answer)"
COMMAND = (sys.executable, "-c", SERVE)
LIMIT_S = 600  # nobody waits that long; it ends where the process that asked is gone
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
        name, backends: The op, and what it is computed by.
        recipe, plan: Of the run: each gets the arguments that the model passes.
        build: Only have each compiled, which others may do meanwhile.
    """
    failed: dict[str, str] = {}
    contestants: dict[str, list[timing.Call]] = {}
    with _on_stream(plan):
        inputs, nbytes, num_sets = _inputs(name, recipe, plan)
        for backend in backends:
            try:
                fn = getattr(parse_ops(f"eager,{name}={backend}"), name)
                calls = [_call(fn, inputs, plan) for _ in range(1 if build else num_sets)]
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


def _inputs(name: str, recipe: Recipe, plan: Plan) -> tuple[dict[str, Any], int, int]:
    """Of an op in the run's model, how many bytes they are, and how many sets are to rotate."""
    inputs = model_inputs(recipe, plan)[name]
    nbytes = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
    return inputs, nbytes, timing.num_sets(nbytes, torch.device(plan.device))


def _call(fn: Callable[..., Any], inputs: dict[str, Any], plan: Plan) -> timing.Call:
    """Forward and backward, on copies of the inputs that no other call reads."""
    tensors = {key: v for key, v in inputs.items() if isinstance(v, Tensor)}
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in tensors.items()}
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        with autocast(plan):
            out = fn(**inputs | leaves)
        return out if isinstance(out, tuple) else (out,)

    douts = default_douts(forward())

    def both() -> list[Tensor]:
        outputs = forward()
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, douts)]

    return both


@lru_cache(maxsize=2)  # an op's at the run's shapes and at small ones, until the next op's come
def calls_by_kernels(
    name: str, recipe: Recipe, plan: Plan, rotate: bool
) -> tuple[list[timing.Call], list[Tensor], int]:
    """An op's calls by our kernels, what the first gives, and bytes of a call's inputs."""
    inputs, nbytes, num_sets = _inputs(name, recipe, plan)
    fn = getattr(parse_ops("triton"), name)
    calls = [_call(fn, inputs, plan) for _ in range(num_sets if rotate else 1)]
    return calls, _results(calls[0]), nbytes


def _results(call: timing.Call) -> list[Tensor]:
    return [t.detach().clone() for t in call()]


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


def answer(task: partial[dict[str, Any]]) -> dict[str, Any]:
    """What was found, or as "error" why it was not, "short" where memory was."""
    recipe, plan = task.args[-2:]
    if alarm := getattr(signal, "alarm", None):
        alarm(LIMIT_S)
    try:
        start_process(plan, recipe.seed)
        return task()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            return {"error": one_line(error, 200), "short": True}
        if task.func is check_op or timing.is_fatal(error):
            # A device's context may be lost with it: the next op gets a process of its own.
            raise SystemExit(f"{type(error).__name__}: {one_line(error, 200)}") from error
        return {"error": timing.reason_of(error)}
    finally:
        if alarm:
            alarm(0)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
