"""The memory model against what autograd saves and what the allocator hands out."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from kernels import parse_ops
from model import GPT, MODELS, GPTConfig
from training.memory import MemoryEstimate, estimate
from training.optim import configure_adamw
from training.plan import Choices, Machine, Plan, make_plan
from training.recipes import Recipe
from training.step import Outcome, TrainStep, working_copies

ROOT = Path(__file__).parents[1]
HOW: dict[str, Any] = {"dtype": "bf16", "ops": "triton", "compiled": False, "working_copies": False}

# rows, T, C, H, L, V. Tokens past one chunk of logits; an odd T; a wide head; depth.
LARGE = [(2, 700, 32, 2, 2, 500), (3, 64, 96, 2, 3, 300), (3, 37, 64, 4, 2, 1000),
         (1, 32, 64, 2, 6, 128)]  # fmt: skip
SMALL = [(1, 11, 64, 2, 2, 100)]  # the interpreter is slow
SAVED = [(ops, dtype, shape) for ops, shapes in (("eager", LARGE), ("triton", SMALL))
         for dtype in ("fp32", "bf16") for shape in shapes]  # fmt: skip


# working copies, residual, recompute
VARIANTS = ((False, "fp32", False), (False, "fp32", True), (True, "fp32", False),
            (False, "bf16", False), (False, "bf16", True))  # fmt: skip


def config_of(shape: tuple[int, ...]) -> GPTConfig:
    _, T, C, H, L, V = shape
    return GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C)


def saved_bytes(
    shape: tuple[int, ...], ops: str, dtype: str, copies: bool, residual: str, recompute: bool
) -> int:
    """Storages autograd holds after a forward; parameters and working copies left out."""
    model = GPT(config_of(shape), parse_ops(ops), torch.bfloat16 if residual == "bf16" else None)
    model.transformer.recompute = recompute
    weights = working_copies(model) if copies else {}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *weights.values())}
    idx = torch.randint(0, shape[-1], shape[:2])
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext()
    with saved_tensors_hooks(pack, lambda t: t), autocast:
        loss = functional_call(model, weights, (idx, idx))
    assert loss.requires_grad  # holds the graph, and so every storage, until here
    return sum(found.values())


@pytest.mark.parametrize(("ops", "dtype", "shape"), SAVED)
def test_saved_for_backward_is_counted(ops, dtype, shape, device):
    if device != "cpu":
        pytest.skip("the casts of autocast differ by backend; counted on the CPU")
    for copies, residual, recompute in VARIANTS[: 2 if dtype == "fp32" else 5]:
        got = saved_bytes(shape, ops, dtype, copies, residual, recompute)
        want = estimate(config_of(shape), *shape[:2], dtype=dtype, ops=ops, compiled=False,
                        working_copies=copies, num_micro_batches=1, residual=residual,
                        recompute=recompute)  # fmt: skip
        # Eager statistics of a bf16 residual are bf16 too, and its norms keep casts of (C,).
        close = 0.02 if residual == "bf16" else 0.001
        assert want.activations == pytest.approx(got, rel=close), (copies, residual, recompute)


class Batches:
    """The same rows for ever, where `TrainStep` wants a Prefetcher."""

    def __init__(self, rows: int, T: int, V: int):
        self.idx = torch.randint(0, V, (rows, T))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.idx, self.idx


@pytest.fixture
def prompt_gc() -> Iterator[None]:
    """The interpreter leaves cycles that hold tensors; a GPU's launches do not."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200, 1, 1)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def step_peak(
    shape: tuple[int, ...], ops: str, dtype: str, copies: bool, num_micro: int, recompute: bool
) -> int:
    """Peak bytes of a second step, by the allocator's own events; weights and moments included."""
    rows, T, V = shape[0], shape[1], shape[-1]
    recipe = Recipe(
        model="smoke,block_size=1024", batch_size=rows, block_size=T, grad_accum_steps=num_micro
    )
    plan = Plan(device="cpu", device_name="test", num_threads=2, ops=ops, dtype=dtype,
                compile=False, micro_batch_size=rows, num_micro_batches=num_micro, eval_tokens=1,
                working_copies=copies, recompute=recompute)  # fmt: skip
    model = GPT(config_of(shape), parse_ops(ops))
    optimizer = configure_adamw(model, recipe)
    step = TrainStep(model, optimizer, recipe, plan)
    batches = cast(Any, Batches(rows * num_micro, T, V))

    def once() -> Outcome:
        loss, grad_norm = step.accumulate(), optimizer.clip(recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return Outcome(loss, grad_norm)

    step.run(once, batches, 1e-3)  # the optimizer makes its moments
    held = 3 * sum(p.nbytes for p in model.parameters())
    held += sum(t.nbytes for t in step.copies.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step.run(once, batches, 1e-3)
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events: list[Any] = recorded.profiler.kineto_results.events()
    events = [e for e in events if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


# Each moment of the model is the peak of one: logits, the MLP's backward, the embedding's.
STEPS = [
    ("eager", "fp32", "recompute", 1, (4, 128, 96, 3, 12, 64)),
    ("eager", "bf16", "recompute", 2, (4, 128, 96, 3, 12, 64)),
    ("triton", "fp32", "recompute", 1, (1, 16, 64, 2, 4, 128)),
    ("eager", "fp32", False, 1, (2, 700, 32, 2, 2, 500)),
    ("eager", "fp32", False, 2, (2, 64, 64, 2, 3, 300)),
    ("eager", "bf16", False, 1, (3, 64, 64, 2, 3, 128)),
    ("eager", "bf16", True, 2, (3, 37, 64, 4, 2, 1000)),
    ("eager", "bf16", True, 1, (1, 16, 96, 2, 6, 64)),
    ("triton", "fp32", False, 1, (1, 16, 64, 2, 1, 256)),
    ("triton", "fp32", False, 2, (1, 8, 64, 2, 2, 128)),
]


@pytest.mark.parametrize(("ops", "dtype", "copies", "num_micro", "shape"), STEPS)
def test_peak_of_a_step_is_predicted(ops, dtype, copies, num_micro, shape, device, prompt_gc):
    if device != "cpu":
        pytest.skip("counts the CPU allocator's events")
    recompute, copies = copies == "recompute", copies is True
    got = step_peak(shape, ops, dtype, copies, num_micro, recompute)
    want = estimate(config_of(shape), *shape[:2], dtype=dtype, ops=ops, compiled=False,
                    working_copies=copies, num_micro_batches=num_micro,
                    recompute=recompute)  # fmt: skip
    print(f"peak {want.peak}: measured {got:,}, model {want.total:,}, {want.total / got:.3f}")
    assert want.total == pytest.approx(got, rel=0.08)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_blocks_change_no_bit(dtype):
    """Dropout draws the same masks again; two micro-batches; the run's own step."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        recipe = Recipe(model="smoke,dropout=0.2", block_size=32, batch_size=2, grad_accum_steps=2)
        plan = Plan(device="cpu", device_name="test", num_threads=2, ops="eager", dtype=dtype,
                    compile=False, micro_batch_size=2, num_micro_batches=2, eval_tokens=1,
                    recompute=recompute)  # fmt: skip
        model = GPT(GPTConfig(32, 300, 3, 2, 32, 0.2))
        optimizer = configure_adamw(model, recipe)
        step, batches = TrainStep(model, optimizer, recipe, plan), Batches(4, 32, 300)

        def once(step=step, optimizer=optimizer) -> Outcome:
            loss, norm = step.accumulate(), optimizer.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
            return Outcome(loss, norm)

        outcomes = [step.run(once, cast(Any, batches), 1e-2) for _ in range(3)]
        assert model.transformer.recompute == recompute
        found.append([*[o.loss for o in outcomes], *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CARD = Machine(device="cuda", name="a card", num_threads=8, arch=80, has_bf16=True)


def test_the_plan_recomputes_where_nothing_else_fits():
    card, recipe = replace(CARD, memory_bytes=16 << 30), Recipe("774m", block_size=1024)
    plan = make_plan(recipe, card)
    assert (plan.recompute, plan.working_copies, plan.micro_batch_size) == (True, False, 4)
    assert plan.memory_bytes < 0.85 * card.memory_bytes
    assert any("blocks computed again in the backward: 1 x 1024 tokens" in n for n in plan.notes)
    assert "blocks computed again in the backward" in plan.describe()
    assert not make_plan(recipe, replace(card, memory_bytes=24 << 30)).recompute
    for little, asked in ((12 << 30, Choices()), (16 << 30, Choices(recompute=False))):
        with pytest.raises(ValueError, match="774m at T=1024 needs about"):
            make_plan(recipe, replace(card, memory_bytes=little), asked)
    small = replace(recipe, model="124m")
    assert not make_plan(small, card).recompute
    assert make_plan(small, card, Choices(recompute=True)).recompute
    with pytest.raises(ValueError, match="--recompute has no use for them"):
        make_plan(small, card, Choices(recompute=True, working_copies=True))


def test_the_table_of_what_fits_is_the_plans():
    """docs/guide.md's: rows at once of steps of 512 rows, by size and T, on cards of so many GB."""
    sizes, lines = (12, 16, 24, 40, 80), []
    for model in ("124m", "350m", "774m", "1558m"):
        for T in (256, 1024):
            cells = []
            for size in sizes:
                recipe = Recipe(model, block_size=T, batch_size=8, grad_accum_steps=64)
                try:
                    plan = make_plan(recipe, replace(CARD, memory_bytes=size << 30))
                    again = " again" if plan.recompute else ""
                    cells.append(f"{plan.micro_batch_size}{again}")
                except ValueError:
                    cells.append("-")
            lines.append(f"| {model} | {T:,} | " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    print(table)
    assert table in (ROOT / "docs/guide.md").read_text()


def test_gpt2_at_64_rows_is_what_arithmetic_says():
    """Tensor by tensor, in MB of 1e6, for M = 65536, C = 768, L = 12, H = 12 in bf16."""
    got = estimate(MODELS["124m"], 64, 1024, **HOW, num_micro_batches=8)
    mc = 65536 * 768 / 1e6  # 50.3 million elements
    layer = {
        "y of ln_1": 2 * mc, "qkv": 6 * mc, "attention": 2 * mc, "lse": 4 * 0.065536 * 12,
        "residuals": 2 * 4 * mc, "statistics": 2 * 8 * 0.065536, "y of ln_2": 2 * mc,
        "g": 8 * mc, "gelu'": 8 * mc, "casts": 2 * 12 * 768 * 768 / 1e6,
    }  # fmt: skip
    once = {"ids": 8 * 0.065536, "residual": 4 * mc, "statistics": 8 * 0.065536, "dx": 2 * mc,
            "dweight": 4 * 50304 * 768 / 1e6}  # fmt: skip
    expected = 12 * sum(layer.values()) + sum(once.values())
    print(f"activations: model {got.activations / 1e6:,.0f} MB, by hand {expected:,.0f} MB")
    print(f"total {got.total / 1e9:.2f} GB, peak at {got.peak}, {got}")
    assert got.activations == pytest.approx(expected * 1e6, rel=1e-3)
    parameters = sum(p.numel() for p in GPT(MODELS["smoke"]).parameters())
    small = estimate(MODELS["smoke"], 1, 64, **HOW, num_micro_batches=1)
    assert (small.weights, small.optimizer) == (4 * parameters, 8 * parameters)


def test_what_is_no_step_is_refused():
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        estimate(MODELS["124m"], 0, 1024, **HOW, num_micro_batches=1)
    fp8: dict[str, Any] = HOW | {"dtype": "fp8"}
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'fp8'"):
        estimate(MODELS["124m"], 1, 1024, **fp8, num_micro_batches=1)


def test_each_choice_moves_the_total_the_right_way():
    """Ablations on GPT-2 at 16 rows: which choice costs memory and which saves it."""

    def total(**changes: Any) -> MemoryEstimate:
        how: dict[str, Any] = HOW | {"num_micro_batches": 4} | changes
        return estimate(MODELS["124m"], 16, 1024, **how)

    base = total()
    assert total(dtype="fp32").total > base.total
    assert total(num_micro_batches=1).total < base.total
    assert total(residual="bf16").activations < base.activations
    copies = total(working_copies=True)
    assert copies.working == base.activations - copies.activations
    eager, compiled = total(ops="eager"), total(ops="eager", compiled=True)
    assert eager.workspace <= compiled.workspace  # it adds up in place
    assert total(ops="triton,linear_cross_entropy=eager").workspace == eager.workspace
