"""The step against the plain loop, and what it does when memory runs out."""

import contextlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import EAGER
from kernels._op import INTERPRETED
from model import GPT
from training.data import DataLoaderLite, Prefetcher
from training.guard import Guard
from training.optim import configure_adamw
from training.plan import Choices, Machine, detect, make_plan
from training.recipes import Recipe, find_preset
from training.resume import restore
from training.step import Outcome, TrainStep

MODEL = "smoke,n_embd=64,n_layer=2,n_head=2,block_size=16"
ROWS = {"batch_size": 2, "grad_accum_steps": 4, "block_size": 16}
RECIPE = replace(find_preset("smoke"), model=MODEL, warmup_steps=5, max_steps=200, **ROWS)
CPU = Machine("cpu", "a CPU", num_threads=2, interpreted=True)
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="kernels on CPU tensors")
# A count up to 50 with one token in four at random: there is something to learn.
_rng = np.random.default_rng(0)
TOKENS = np.where(_rng.random(4000) < 0.25, _rng.integers(0, 500, 4000), np.arange(4000) % 50)
TOKENS = TOKENS.astype(np.uint16)


def choices(**changed: Any) -> Choices:
    return replace(Choices(compile=False), **changed)


class GuardedStep(TrainStep):
    """A step as train.py takes it."""

    guard: Guard | None = None

    def __call__(self, batches: Any, lr: float) -> Outcome:
        return self.run(self.once, batches.next_batch(), lr)

    def once(self) -> Outcome:
        loss = self.accumulate()
        grad_norm = self.optimizer.clip(self.recipe.grad_clip)
        bad = self.guard.judge(loss, grad_norm) if self.guard else None
        self.optimizer.step(skip=bad)
        self.optimizer.zero_grad()
        return Outcome(loss, grad_norm, bad)


def make_step(asked: Choices, recipe: Recipe = RECIPE, ops: Any = EAGER) -> GuardedStep:
    torch.manual_seed(recipe.seed)
    made = make_plan(recipe, CPU, asked)
    model = GPT(replace(recipe.model_config, vocab_size=500), ops)
    optimizer = configure_adamw(model, recipe, made.optimizer)
    step = GuardedStep(model, optimizer, recipe, made)
    step.guard = Guard("cpu")
    return step


def open_batches(step: GuardedStep) -> Prefetcher:
    return Prefetcher(loader(step.recipe, step.recipe.rows_per_step), "cpu")


def loader(recipe: Recipe, rows: int) -> DataLoaderLite:
    return DataLoaderLite(TOKENS, rows, recipe.block_size, wrap_rows=recipe.batch_size)


def run(step: GuardedStep, num_steps: int) -> list[float]:
    with contextlib.closing(open_batches(step)) as batches:
        return [step(batches, step.recipe.learning_rate(s)).loss.item() for s in range(num_steps)]


def plain_loop(dtype: str, num_steps: int, recipe: Recipe = RECIPE) -> tuple[list[float], GPT]:
    """What everyone writes: micro-batches one by one, autocast, clip_grad_norm_, AdamW."""
    torch.manual_seed(recipe.seed)
    model = GPT(replace(recipe.model_config, vocab_size=500))
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}]
    groups += [{"params": others, "weight_decay": 0.0}]
    betas = recipe.beta1, recipe.beta2
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=recipe.eps, fused=True)
    rows, losses = loader(recipe, recipe.batch_size), []
    for s in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(np.float32(recipe.learning_rate(s)))  # the step's is fp32
        total = 0.0
        for _ in range(recipe.grad_accum_steps):
            idx, targets = rows.next_batch()
            with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext():
                loss = model(idx, targets) / recipe.grad_accum_steps
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model


def worst(losses: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))


long = pytest.mark.parametrize("steps", [50, pytest.param(200, marks=pytest.mark.slow)])


@long
def test_fp32_steps_equal_the_plain_loop(steps: int) -> None:
    expected, _ = plain_loop("fp32", steps)
    assert expected[-1] < expected[0] - 1.0  # it learns, so a lost gradient would show
    assert worst(run(make_step(choices(dtype="fp32")), steps), expected) <= 1e-5


@pytest.mark.parametrize("micro", [1, 4])
def test_merged_micro_batches_are_the_same_rows(micro: int) -> None:
    expected, _ = plain_loop("fp32", 30)
    step = make_step(choices(dtype="fp32", micro_batch_size=micro))
    assert step.plan.num_micro_batches == 8 // micro
    assert worst(run(step, 30), expected) <= 1e-5


@long
def test_bf16_steps_equal_the_plain_loop(steps: int) -> None:
    expected, _ = plain_loop("bf16", steps)
    step = make_step(choices(dtype="bf16"))
    assert step.plan.working_copies
    assert len(step.copies) == 4 * 2  # two layers
    assert worst(run(step, steps), expected) <= 1e-3


def test_working_copies_change_no_bit() -> None:
    """A copy is what autocast would cast, its gradient what autocast would cast back."""
    expected, theirs = plain_loop("bf16", 20)
    step = make_step(choices(dtype="bf16", micro_batch_size=RECIPE.batch_size))
    assert worst(run(step, 20), expected) <= 1e-5  # the plain loop adds its losses in fp64
    for (name, ours), other in zip(step.model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=0, msg=name)
    masters = dict(step.model.named_parameters())
    for name, copy in step.copies.items():
        torch.testing.assert_close(copy.detach(), masters[name].to(torch.bfloat16), rtol=0, atol=0)


def short_of_memory(limit: int) -> Callable[..., Tensor]:
    """An attention that runs out of memory on more than `limit` rows."""

    def attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        if len(qkv) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return EAGER.causal_attention(qkv, n_head, dropout_p)

    return attention


def test_out_of_memory_halves_the_batch_and_goes_on(capsys: pytest.CaptureFixture) -> None:
    expected, _ = plain_loop("fp32", 10)
    ops = replace(EAGER, causal_attention=short_of_memory(3))
    step = make_step(choices(dtype="fp32", micro_batch_size=8), ops=ops)
    assert worst(run(step, 10), expected) <= 1e-5
    assert (step.plan.micro_batch_size, step.plan.num_micro_batches) == (2, 4)
    said = capsys.readouterr().out
    assert "memory: 8 rows at once do not fit, going on with 4; same rows" in said
    assert said.count("memory:") == 2  # 8 -> 4 -> 2, once


def test_one_row_too_many_is_the_end() -> None:
    ops = replace(EAGER, causal_attention=short_of_memory(0))
    needed = r"^memory: not even one row at a time fits, .* take 0\.\d\d GiB of it; take a smaller"
    with pytest.raises(torch.OutOfMemoryError, match=needed):
        run(make_step(choices(dtype="fp32", micro_batch_size=8), ops=ops), 1)


def test_memory_that_runs_out_in_the_optimizer_s_state_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Half of the moments are there when it does; no weight has moved, and none moves twice."""
    expected, _ = plain_loop("fp32", 3)
    step, zeros_like, made = (
        make_step(choices(dtype="fp32", micro_batch_size=8)),
        torch.zeros_like,
        0,
    )

    def short(like: Tensor, **how: Any) -> Tensor:
        nonlocal made
        made += isinstance(like, torch.nn.Parameter)
        if made % 12 == 11 and step.plan.micro_batch_size > 2:  # past all matrices
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros_like(like, **how)

    monkeypatch.setattr(torch, "zeros_like", short)
    assert worst(run(step, 3), expected) <= 1e-5
    assert (step.plan.micro_batch_size, step.plan.num_micro_batches) == (2, 4)
    assert capsys.readouterr().out.count("memory:") == 2  # 8 -> 4 -> 2


def test_a_bad_step_is_skipped_and_working_copies_follow_a_rollback() -> None:
    from training import state

    step = make_step(choices(dtype="bf16"))
    run(step, 3)
    assert step.guard is not None
    saved = state.capture(
        state.Progress(step=3), step.model, step.optimizer, step.guard, RECIPE, step.plan, "x"
    )
    kept = {name: copy.detach().clone() for name, copy in step.copies.items()}
    with torch.no_grad():
        step.model.transformer.ln_f.weight.fill_(math.nan)
    loss = run(step, 1)[0]
    assert math.isnan(loss)
    assert step.outcome is not None
    assert step.outcome.bad is not None
    assert step.outcome.bad.item() == 1
    for name, copy in step.copies.items():
        torch.testing.assert_close(copy.detach(), kept[name], rtol=0, atol=0)
    run(step, 1)
    with torch.no_grad():
        for copy in step.copies.values():
            copy.zero_()
    restore(saved, step.model, step.optimizer, step.guard)
    for name, copy in step.copies.items():
        torch.testing.assert_close(copy.detach(), kept[name], rtol=0, atol=0)


@pytest.mark.slow  # each compiles for ten seconds and more
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scope", ["model", "blocks"])
def test_compiled_steps_equal_the_plain_loop(dtype: Any, scope: Any) -> None:
    if missing := detect("cpu").missing_tools:
        pytest.skip(f"torch.compile needs {missing}")
    torch.compiler.reset()
    expected, _ = plain_loop(dtype, 20)
    step = make_step(choices(dtype=dtype, compile=True, compile_scope=scope))
    assert worst(run(step, 20), expected) <= (1e-5 if dtype == "fp32" else 1e-3)
