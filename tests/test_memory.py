"""The memory model against what autograd saves and what the allocator hands out."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

from model import GPT, MODELS, GPTConfig
from training.memory import MemoryEstimate, estimate
from training.optim import configure_adamw
from training.plan import Choices, Machine, Plan, make_plan
from training.recipes import Recipe
from training.step import Outcome, TrainStep, autocast, working_copies

ROOT = Path(__file__).parents[1]
PLAN = Plan("cpu", "test", 2, "triton", "bf16", False, 1, 1, 1)

# rows, T, C, H, L, V. Tokens past one chunk of logits; an odd T; a wide head; depth.
LARGE = [(2, 700, 32, 2, 2, 500), (3, 64, 96, 2, 3, 300), (3, 37, 64, 4, 2, 1000)]
LARGE += [(1, 32, 64, 2, 6, 128)]
SMALL = [(1, 11, 64, 2, 2, 100)]  # the interpreter is slow
SAVED = [("eager", dtype, shape) for dtype in ("fp32", "bf16") for shape in LARGE]
SAVED += [("triton", dtype, shape) for dtype in ("fp32", "bf16") for shape in SMALL]
SAVED += [(f"eager,causal_attention={op}", "bf16", LARGE[1]) for op in ("compiled", "sdpa-flash")]
VARIANTS: list[dict[str, Any]] = [{}, {"recompute": True}, {"working_copies": True}]
VARIANTS += [{"residual": "bf16"}, {"residual": "bf16", "recompute": True}]


def config_of(shape: tuple[int, ...]) -> GPTConfig:
    _, T, C, H, L, V = shape
    return GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C)


def saved_bytes(shape: tuple[int, ...], plan: Plan) -> int:
    """Storages autograd holds after a forward; parameters and working copies left out."""
    residual = torch.bfloat16 if plan.residual == "bf16" else None
    model = GPT(config_of(shape), plan.op_set, residual)
    model.transformer.recompute = plan.recompute
    weights = working_copies(model) if plan.working_copies else {}
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *weights.values())}
    idx = torch.randint(0, shape[-1], shape[:2])
    found: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    uncompiled = torch.compiler.set_stance("force_eager")  # a compiled op saves the same
    with saved_tensors_hooks(pack, lambda t: t), autocast(plan), uncompiled:
        loss = functional_call(model, weights, (idx, idx))
    assert loss.requires_grad  # holds the graph, and so every storage, until here
    return sum(found.values())


@pytest.mark.parametrize(("ops", "dtype", "shape"), SAVED)
def test_saved_for_backward_is_counted(ops, dtype, shape, device):
    if device != "cpu":
        pytest.skip("the casts of autocast differ by backend; counted on the CPU")
    for changes in VARIANTS[: 2 if dtype == "fp32" else 5]:
        plan = replace(PLAN, ops=ops, dtype=dtype, micro_batch_size=shape[0], **changes)
        got, want = saved_bytes(shape, plan), estimate(config_of(shape), shape[1], plan)
        # Eager statistics of a bf16 residual are bf16 too, and its norms keep casts of (C,).
        close = 0.02 if plan.residual == "bf16" else 0.001
        assert want.activations == pytest.approx(got, rel=close), changes


@pytest.fixture
def prompt_gc() -> Iterator[None]:
    """The interpreter leaves cycles that hold tensors; a GPU's launches do not."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(200, 1, 1)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def step_peak(shape: tuple[int, ...], plan: Plan) -> int:
    """Peak bytes of a second step, by the allocator's own events; weights and moments included."""
    rows, T, V, num_micro = shape[0], shape[1], shape[-1], plan.num_micro_batches
    recipe = Recipe(
        model="smoke,block_size=1024", batch_size=rows, block_size=T, grad_accum_steps=num_micro
    )
    model = GPT(config_of(shape), plan.op_set)
    optimizer = configure_adamw(model, recipe)
    step = TrainStep(model, optimizer, recipe, plan)
    ids = torch.randint(0, V, (rows * num_micro, T))

    def once() -> Outcome:
        loss, grad_norm = step.accumulate(), optimizer.clip(recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return Outcome(loss, grad_norm)

    step.run(once, (ids, ids), 1e-3)  # the optimizer makes its moments
    held = 3 * sum(p.nbytes for p in model.parameters())
    held += sum(t.nbytes for t in step.copies.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step.run(once, (ids, ids), 1e-3)
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
    ("eager", "fp32", "", 1, (2, 700, 32, 2, 2, 500)),
    ("eager", "fp32", "", 2, (2, 64, 64, 2, 3, 300)),
    ("eager", "bf16", "", 1, (3, 64, 64, 2, 3, 128)),
    ("eager", "bf16", "working_copies", 2, (3, 37, 64, 4, 2, 1000)),
    ("eager", "bf16", "working_copies", 1, (1, 16, 96, 2, 6, 64)),
    ("triton", "fp32", "", 1, (1, 16, 64, 2, 1, 256)),
    ("triton", "fp32", "", 2, (1, 8, 64, 2, 2, 128)),
]


@pytest.mark.parametrize(("ops", "dtype", "switch", "num_micro", "shape"), STEPS)
def test_peak_of_a_step_is_predicted(ops, dtype, switch, num_micro, shape, device, prompt_gc):
    if device != "cpu":
        pytest.skip("counts the CPU allocator's events")
    plan = replace(PLAN, ops=ops, dtype=dtype, num_micro_batches=num_micro)
    plan = replace(plan, micro_batch_size=shape[0], **{switch: True} if switch else {})
    got, want = step_peak(shape, plan), estimate(config_of(shape), shape[1], plan)
    print(f"measured {got:,}, model {want.total:,}, {want.total / got:.3f}: {want.moments}")
    assert want.total == pytest.approx(got, rel=0.08)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_blocks_change_no_bit(dtype):
    """Dropout draws the same masks again; two micro-batches; the run's own step."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        recipe = Recipe(model="smoke,dropout=0.2", block_size=32, batch_size=2, grad_accum_steps=2)
        plan = replace(PLAN, ops="eager", dtype=dtype, micro_batch_size=2, num_micro_batches=2)
        plan = replace(plan, recompute=recompute)
        model = GPT(GPTConfig(32, 300, 3, 2, 32, 0.2))
        optimizer = configure_adamw(model, recipe)
        step, ids = TrainStep(model, optimizer, recipe, plan), torch.randint(0, 300, (4, 32))

        def once(step=step, optimizer=optimizer) -> Outcome:
            loss, norm = step.accumulate(), optimizer.clip(1.0)
            optimizer.step()
            optimizer.zero_grad()
            return Outcome(loss, norm)

        outcomes = [step.run(once, (ids, ids), 1e-2) for _ in range(3)]
        assert model.transformer.recompute == recompute
        found.append([*[o.loss for o in outcomes], *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


CARD = Machine(device="cuda", name="a card", num_threads=8, arch=80, has_bf16=True)


def test_the_plan_recomputes_where_nothing_else_fits():
    card, recipe = replace(CARD, memory_bytes=16 << 30), Recipe("774m", block_size=1024)
    plan = make_plan(recipe, card)
    assert (plan.recompute, plan.working_copies, plan.micro_batch_size) == (True, False, 4)
    assert plan.memory_bytes < 0.85 * card.memory_bytes
    assert any("blocks recomputed in the backward: 1 x 1024 tokens" in n for n in plan.notes)
    assert "blocks recomputed in the backward" in plan.describe()
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
    plan = replace(PLAN, micro_batch_size=64, num_micro_batches=8)
    got = estimate(MODELS["124m"], 1024, plan)
    mc = 65536 * 768 / 1e6  # 50.3 million elements
    m = 0.065536  # million tokens
    norms = 2 * (2 * mc + 4 * mc + 8 * m)  # y, the residual and its statistics
    attention = 6 * mc + 2 * mc + 4 * m * 12  # qkv, its output, lse
    layer = norms + attention + 8 * mc + 8 * mc + 2 * 12 * 768 * 768 / 1e6  # g, gelu', casts
    once = 8 * m + 4 * mc + 8 * m + 2 * mc + 4 * 50304 * 768 / 1e6  # ids, norm, dx, dweight
    expected = 12 * layer + once
    print(f"activations: model {got.activations / 1e6:,.0f} MB, by hand {expected:,.0f} MB")
    print(f"total {got.total / 1e9:.2f} GB, {got}")
    assert got.activations == pytest.approx(expected * 1e6, rel=1e-3)
    parameters = sum(p.numel() for p in GPT(MODELS["smoke"]).parameters())
    small = estimate(MODELS["smoke"], 64, PLAN)
    assert (small.weights, small.optimizer) == (4 * parameters, 8 * parameters)


def test_each_choice_moves_the_total_the_right_way():
    """Ablations on GPT-2 at 16 rows: which choice costs memory and which saves it."""

    def total(**changes: Any) -> MemoryEstimate:
        plan = replace(PLAN, micro_batch_size=16, num_micro_batches=4)
        return estimate(MODELS["124m"], 1024, replace(plan, **changes))

    base = total()
    assert total(dtype="fp32").total > base.total
    assert total(num_micro_batches=1).total < base.total
    assert total(residual="bf16").activations < base.activations
    copies = total(working_copies=True)
    assert copies.working == base.activations - copies.activations
    eager, compiled = total(ops="eager"), total(ops="eager", compile=True)
    assert eager.moments["loss"] < compiled.moments["loss"]  # it adds up in place
    mixed = total(ops="triton,linear_cross_entropy=eager")
    assert mixed.moments["loss"] == eager.moments["loss"]
