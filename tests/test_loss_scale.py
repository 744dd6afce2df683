"""fp16: the loss is scaled, what overflows is left out and no fault, and resumes know the scale."""

import math
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels._op import INTERPRETED
from tests.pretend_cuda import pretend_cuda
from tests.test_step import RECIPE, GuardedStep, choices, make_step, open_batches, plain_loop, run
from training import state, step
from training.guard import Guard
from training.plan import Machine, make_plan
from training.step import NUM_WARMUP, Outcome

CARDS = {"Tesla T4": 75, "Tesla V100-SXM2-16GB": 70, "NVIDIA GeForce RTX 2080 Ti": 75}


class Step(GuardedStep):
    """As train.py takes it."""

    def once(self) -> Outcome:
        loss = self.accumulate()
        grad_norm = self.optimizer.clip(self.recipe.grad_clip)
        bad = self.guard.judge(loss, grad_norm) if self.guard else None
        self.optimizer.step(skip=self.skip(bad))
        self.optimizer.zero_grad()
        return Outcome(loss, grad_norm, bad)


def fp16_step(**how: Any) -> Step:
    made = make_step(choices(dtype="fp16", ops="eager", **how))
    return Step(made.model, made.optimizer, made.recipe, made.plan)


def scale_of(taken: GuardedStep) -> list[float]:
    assert taken.optimizer.loss_scale is not None
    return taken.optimizer.loss_scale.tolist()


def weights(taken: GuardedStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in taken.model.parameters()]


@pytest.mark.parametrize("card", CARDS)
def test_who_has_no_bf16_trains_in_fp16(card: str) -> None:
    made = make_plan(RECIPE, Machine("cuda", card, CARDS[card], memory_bytes=15 << 30))
    assert (made.dtype, made.working_copies, made.optimizer) == ("fp16", False, "torch")
    assert f"dtype fp16 with loss scaling: {card} has no bf16" in made.notes
    old = Machine("cuda", "Tesla P100", 60, memory_bytes=15 << 30)
    assert make_plan(RECIPE, old).dtype == "fp32"


def test_losses_are_those_of_fp32() -> None:
    taken = fp16_step()
    losses, (expected, _) = run(taken, 8), plain_loop("fp32", 8)
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) < 2e-3
    assert scale_of(taken) == [step.FIRST_SCALE, 8.0]


@pytest.mark.parametrize("captured", [False, True])
def test_an_overflow_is_skipped_and_no_bad_step(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if captured and not INTERPRETED:
        pytest.skip("pretends a GPU")
    monkeypatch.setattr(step, "FIRST_SCALE", 2.0**30)
    monkeypatch.setattr(step, "GROWTH_STEPS", 3)
    taken = fp16_step()
    if captured:
        taken.plan = replace(taken.plan, cuda_graph=True)
    taken.guard = Guard("cpu")
    before, scales, norms, bads = weights(taken), [], [], []
    num_steps = NUM_WARMUP + 25
    with pretend_cuda() if captured else nullcontext(), closing(open_batches(taken)) as batches:
        if captured:
            taken.stream = torch.cuda.Stream()
        for _ in range(num_steps):
            found = taken(batches, 1e-3)
            scales.append(scale_of(taken)[0])
            norms.append(found.grad_norm.item())
            bads.append(found.bad.item())  # pyright: ignore
            if norms[-1] == 0:
                assert all(map(torch.equal, weights(taken), before))
            else:
                before = weights(taken)
        assert bool(taken.graph) == captured
    assert bads == [0.0] * num_steps
    first = next(i for i, norm in enumerate(norms) if norm > 0)
    assert first >= 3
    assert scales[:first] == [2.0 ** (29 - i) for i in range(first)]
    assert all(map(math.isfinite, norms))
    # It grows again, and falls where that was too much.
    assert 2 * scales[first] in scales[first:]


def test_gradients_that_no_scale_saves_are_the_guard_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "FIRST_SCALE", 0.5)
    taken = fp16_step()
    taken.guard = Guard("cpu")
    hook = next(taken.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    with closing(open_batches(taken)) as batches:
        before = weights(taken)
        found = taken(batches, 1e-3)
        hook.remove()
    assert found.bad is not None
    assert found.bad.item() == 1.0
    assert all(map(torch.equal, weights(taken), before))


def test_gradients_of_zero_leave_a_scale_that_can_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "FIRST_SCALE", 2.0**125)
    monkeypatch.setattr(step, "GROWTH_STEPS", 2)
    taken = fp16_step()
    parameters = list(taken.model.parameters())
    taken.forward = lambda *_: 0.0 * torch.nn.utils.parameters_to_vector(parameters).sum()
    assert run(taken, 8) == [0.0] * 8
    assert scale_of(taken) == [2.0**127, 0.0]
    made = taken.model, taken.optimizer, None
    saved = state.capture(state.Progress(step=8), *made, taken.recipe, taken.plan, "00")
    state.restore(saved, *made)


def test_a_resume_knows_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = fp16_step()
    run(taken, 2)
    assert taken.optimizer.loss_scale is not None
    taken.optimizer.loss_scale[0] = 128.0
    progress = state.Progress(step=2)
    saved = state.capture(
        progress, taken.model, taken.optimizer, None, taken.recipe, taken.plan, "00"
    )
    assert saved.state["loss_scale"] == [128.0, 2.0]
    other = make_step(choices(dtype="fp16", ops="eager"))
    other.optimizer.loss_scale = None  # as when train.py restores: before there is a step
    state.restore(saved, other.model, other.optimizer, None)
    again = Step(other.model, other.optimizer, other.recipe, other.plan)
    assert scale_of(again) == [128.0, 2.0]
    held = again.optimizer.loss_scale
    state.restore(saved, other.model, other.optimizer, None)  # after a rollback, in place
    assert again.optimizer.loss_scale is held
    scales = [[scale, 0] for scale in (math.inf, 1e-30, 96.0, 2.0**128, 0.25)]
    counts = [[1.0, count] for count in (-1.0, 1e9, math.nan)]
    for odd in (*scales, *counts, [0.0, 2.0], [1.0], "x", {"1": 2}):
        saved.state["loss_scale"] = odd
        with pytest.raises(ValueError, match="loss_scale must be a scale, a power of two"):
            state.restore(saved, other.model, other.optimizer, None)
    # In another dtype there is none.
    plan = replace(other.plan, dtype="fp32")
    assert Step(other.model, other.optimizer, other.recipe, plan).optimizer.loss_scale is None
