"""Two ranks (tests/two_ranks.py) against one: the same bits under every plan."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model import GPT
from tests.forked import Forked, python
from tests.two_ranks import RECIPE
from training.memory import estimate
from training.plan import Choices, Machine, Plan, make_plan
from training.recipes import Recipe

ROOT = Path(__file__).parents[1]


def answers(folder: Path, *kinds: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    commands = [["-m", "tests.two_ranks", str(rank), "2", str(folder), *kinds] for rank in (0, 1)]
    ranks = [Forked(python, *c, cwd=ROOT, environment=environment) for c in commands]
    outputs = [rank.communicate(600) for rank in ranks]
    assert [code for _, code in outputs] == [0, 0], outputs
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, Any]:
    return answers(tmp_path_factory.mktemp("ranks"))


KINDS = ["fp32", "aot_eager", "sharded", "sharded, ours", "captured", "captured, sharded", "cut"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one(together, kind):
    """Each rank has one micro-batch, one rank alone has two: a sum of two terms has one order."""
    if kind in KINDS[3:]:
        pytest.importorskip("triton")
    assert together[kind]["bitwise"], together[kind]["error"]
    steps = [what for what in together[kind]["order"] if what.startswith("asked")]
    assert steps == ["asked to stop: 0"] * (len(steps) - 1) + ["asked to stop: 1"]


@pytest.mark.parametrize("kind", KINDS[4:])
def test_a_captured_step_holds_the_collectives_or_all_but_them(together, kind):
    """NCCL's watchdog must see at least one collective outside the graph in each replay."""
    pytest.importorskip("triton")
    order = together[kind]["order"]
    sent = [what for what in order[order.index("last step") :] if what.startswith("all_reduce")]
    assert sent[-1] == "all_reduce 1"
    num_matrices = 4 * RECIPE.model_config.n_layer + 2
    assert len(sent) == (num_matrices + 2 if kind == "cut" else 1)
    said = "not with the collectives (CUDA error: operation not permitted when stream is capturing)"
    assert together[kind]["said"] == [f"cuda graph: {said}; trying all but them"] * (kind == "cut")


@pytest.mark.parametrize("kind", ["full", "full, bf16"])
def test_matrices_that_are_cut_train_as_whole_ones(together, kind):
    """The norm is added in another order, which may round a bf16 weight the other way."""
    name, rel = ("fp32", 1e-6) if kind == "full" else ("autocast", 1e-4)
    assert together[kind]["loss"] == pytest.approx(together[name]["loss"], rel=rel)
    if kind == "full":  # a key bias has a gradient of rounding errors, which differ in bf16
        assert together[kind]["error"] < 1e-3  # a bias near 0; a lost gradient would make it 1


def test_gradients_added_up_in_bf16(together):
    sums, exact = together["bf16 sums"]["loss"], together["aot_eager"]["loss"]
    assert sums[0] == exact[0]
    assert sums != exact
    assert sums == pytest.approx(exact, abs=1e-3)


def test_working_copies_change_no_bit_there(together):
    """Each rank has two micro-batches; one rank alone has four, in another order."""
    assert together["bf16"]["loss"] == together["autocast"]["loss"]
    assert together["bf16"]["error"] < 1e-6


def test_gradients_travel_while_others_are_computed(together):
    """Each gradient is sent once, and the blocks' before the embedding's exists."""
    order = together["bf16"]["order"]
    order = order[order.index("last step") :]
    model = GPT(replace(RECIPE.model_config, vocab_size=500))
    first, last = (at for at, what in enumerate(order) if what == "last gradient")
    assert last - first > 4 * RECIPE.model_config.n_layer  # all matrices of the blocks
    sent = [int(line.split()[1]) for line in order if line.startswith("all_reduce")]
    assert sum(sent) - 2 == sum(p.numel() for p in model.parameters())
    assert sent[0] == 4 * RECIPE.model_config.n_embd**2  # the last block's last matrix


def test_state_is_shared_out_as_the_memory_model_says(together):
    config = replace(RECIPE.model_config, vocab_size=500)
    alone = Plan("cpu", "", 1, "eager", "fp32", False, 4, 1, 0)
    counts = 4 * len(list(GPT(config).parameters()))
    copies = {"dtype": "bf16", "working_copies": True, "shard": "optimizer"}
    kinds = {
        "fp32": {},
        "sharded": {"shard": "optimizer"},
        "full": {"shard": "full"},
        "cut": copies,
    }
    for kind in kinds.keys() & together.keys():  # without triton there is no "cut"
        plan = replace(alone, **kinds[kind])
        expected = estimate(config, config.block_size, plan, ranks=2)
        weights, moments = map(max, zip(*together[kind]["bytes"], strict=True))
        assert weights <= expected.weights <= 1.02 * weights
        assert expected.optimizer <= moments <= 1.02 * expected.optimizer + counts


def test_moments_are_shared_out_where_they_do_not_fit_otherwise():
    recipe = Recipe(model="1558m", block_size=1024, batch_size=16, grad_accum_steps=32)
    card = Machine("cuda", "a card", 90, has_bf16=True, memory_bytes=28 * 10**9)
    eager = Choices(ops="eager")
    large = replace(card, memory_bytes=80 * 10**9)
    assert make_plan(recipe, card, eager, ranks=8).shard == "optimizer"
    small = make_plan(recipe, replace(card, memory_bytes=12 * 10**9), eager, ranks=8)
    assert (small.shard, small.working_copies, small.cuda_graph) == ("full", False, False)
    for asked in ({"working_copies": True}, {"cuda_graph": True}, {"dtype": "fp16"}):
        with pytest.raises(ValueError, match="shard: full goes without --"):
            make_plan(recipe, large, replace(eager, shard="full", **asked), ranks=8)
    assert make_plan(recipe, large, eager, ranks=8).shard == "none"
    assert make_plan(recipe, large, replace(eager, shard="optimizer"), ranks=1).shard == "none"
    with pytest.raises(ValueError, match="shard: Muon's state cannot be sharded"):
        make_plan(replace(recipe, muon=True), large, replace(eager, shard="optimizer"), ranks=8)
    for asked, ranks in ((eager, 1), (replace(eager, shard="none"), 8)):
        with pytest.raises(ValueError, match="memory: one row of 1558m"):
            make_plan(recipe, card, asked, ranks=ranks)


@pytest.mark.slow
def test_two_compiled_ranks_take_the_steps_of_one(tmp_path):
    kinds = answers(tmp_path, "inductor")
    assert [kinds["model"]["bitwise"], kinds["blocks"]["bitwise"]] == [True, True]
