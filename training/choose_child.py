"""What a run could take, timed on this device; the side of training/choose.py that may crash."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import parse_ops
from training import child, timing
from training.numerics import default_douts
from training.plan import Plan
from training.probe import probe_steps
from training.recipes import Recipe
from training.step import autocast, start_process
from training.verify_child import model_inputs

ROUNDS = {"rounds": 15, "seconds": 1.5}  # of an op's backends, in turns
STEPS_S = 3.0  # of steps that no graph replays


def time_op(
    name: str, backends: list[str], recipe: Recipe, plan: Plan, build: bool
) -> dict[str, Any]:
    """Samples of an op's forward and backward by backend, in ms, and why others have none.

    Args:
        name, backends: The op, and what it is computed by.
        recipe, plan: Of the run: each gets the arguments that the model passes.
        build: Only have each compiled, which others may do meanwhile.
    """
    device, cuda, failed = torch.device(plan.device), plan.device == "cuda", {}
    stream = timing.capture_stream() if cuda else None
    contestants: dict[str, list[timing.Call]] = {}
    with torch.cuda.stream(stream):  # type: ignore[arg-type] # None: no stream to enter
        inputs = model_inputs(recipe, plan)[name]
        tensors = {key: v for key, v in inputs.items() if isinstance(v, Tensor)}
        nbytes = sum(t.nbytes for t in tensors.values())
        num_sets = 1 if build else timing.num_sets(nbytes, device)
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
    found = timing.time_calls(contestants, device, nbytes, failed=failed, **ROUNDS)
    return {"ms": {key: of.samples_ms for key, of in found.items()}, "failed": failed}


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
    return lambda: torch.autograd.grad(forward(), wanted, douts)


def time_step(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Samples of the run's whole step by a plan, in ms."""
    vocab, rows = recipe.model_config.vocab_size, 2 * recipe.rows_per_step
    tokens = np.random.default_rng(0).integers(vocab, size=rows * (recipe.block_size + 1))
    found = probe_steps(recipe, plan, tokens.astype(np.uint16), STEPS_S)
    return {"ms": [1e3 * s for s in found.seconds]}


def answer(task: tuple[str, list[Any]]) -> dict[str, Any]:
    """For the process that asks: what was measured, or in words why it was not."""
    kind, arguments = task
    plan = next(value for value in arguments if isinstance(value, Plan))
    try:
        start_process(plan, 0)
        if kind == "step":
            torch.compiler.reset()  # or all plans share one limit of recompiling
        how = {"step": time_step, "build": partial(time_op, build=True)}
        return how.get(kind, partial(time_op, build=False))(*arguments)
    except Exception as error:
        if timing.is_fatal(error):
            raise  # the error stays with the device: the child's end is the answer
        return {"error": timing.reason_of(error)}
    finally:
        if plan.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    child.serve(os.getpid(), answer)
