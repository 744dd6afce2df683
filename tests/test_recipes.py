"""The recipes' numbers against the published run, and what a recipe refuses."""

import math
from dataclasses import replace
from typing import Any

import pytest

from model import MODELS, GPTConfig
from training.recipes import PRESETS, PUBLISHED_LOSS, Recipe, find_preset, parse_model, spell_model

SEED = PRESETS["shakespeare-124m"]


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 6e-7),  # max_lr * 1 / 1000
        (100, 6.06e-5),
        (500, 3.006e-4),
        (1000, 6e-4),  # the first step after the warm-up
        # progress 3175 / 199000: 6e-5 + 5.4e-4 * (1 + cos(0.0501228)) / 2
        (4175, 5.9966089e-4),
        (200_000, 6e-5),
        (10**7, 6e-5),
    ],
)
def test_schedule_of_the_published_run(step: int, lr: float) -> None:
    assert math.isclose(SEED.learning_rate(step), lr, rel_tol=1e-6)


def test_schedule_prints_the_published_table() -> None:
    # Its column at 4175 reads 6.00e-04, which a horizon under 164,874 steps would not give.
    assert f"{SEED.learning_rate(4175):.2e}" == "6.00e-04"
    assert f"{replace(SEED, horizon_steps=160_000).learning_rate(4175):.2e}" == "5.99e-04"


def test_published_recipe() -> None:
    assert (SEED.batch_size, SEED.block_size, SEED.grad_accum_steps) == (16, 64, 4)
    assert SEED.tokens_per_step == 4096
    assert (SEED.beta1, SEED.beta2, SEED.eps) == (0.9, 0.95, 1e-8)
    assert (SEED.weight_decay, SEED.grad_clip, SEED.target_loss) == (0.1, 1.0, 0.09)
    assert (SEED.val_fraction, SEED.order, SEED.model) == (0.0, "sequential", "124m")
    assert PUBLISHED_LOSS[-1] == (4175, 0.082)


def test_fineweb_recipe_is_half_a_million_tokens_a_step() -> None:
    recipe = PRESETS["fineweb-124m"]
    assert (recipe.tokens_per_step, recipe.block_size) == (524_288, 1024)
    assert (recipe.warmup_steps, recipe.max_steps) == (715, 19_073)


def test_horizon_follows_the_steps() -> None:
    recipe = replace(PRESETS["smoke"], max_steps=50, horizon_steps=0)
    assert recipe.learning_rate(49) < 1.05 * recipe.min_lr
    assert recipe.learning_rate(50) == recipe.min_lr
    lrs = [recipe.learning_rate(s) for s in range(recipe.warmup_steps, 51)]
    assert lrs == sorted(lrs, reverse=True)


# warm-up 10, horizon 110, from 1.0 to 0.1; wsd falls in the last 22 steps.
JOINTS = {
    "cosine": {9: 1.0, 10: 1.0, 60: 0.55, 85: 0.1 + 0.45 * (1 - 2**-0.5), 110: 0.1, 500: 0.1},
    "linear": {9: 1.0, 10: 1.0, 60: 0.55, 109: 0.109, 110: 0.1, 500: 0.1},
    "wsd": {9: 1.0, 10: 1.0, 87: 1.0, 88: 1.0, 99: 0.55, 109: 0.1 + 0.9 / 22, 110: 0.1, 500: 0.1},
    "constant": {9: 1.0, 10: 1.0, 109: 1.0, 110: 1.0, 500: 1.0},
}


@pytest.mark.parametrize("schedule", JOINTS)
def test_schedules_at_their_joints(schedule: Any) -> None:
    recipe = Recipe(schedule=schedule, max_lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert recipe.learning_rate(4) == 0.5
    for step, lr in JOINTS[schedule].items():
        assert math.isclose(recipe.learning_rate(step), lr, rel_tol=1e-12), step
    longer = replace(recipe, max_steps=200, horizon_steps=110)
    assert all(longer.learning_rate(s) == recipe.learning_rate(s) for s in range(600))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2, 1 / 3, 0.5, 0.9])
def test_a_cool_down_falls_from_its_step_on(share: float) -> None:
    recipe = Recipe(schedule="wsd", max_steps=10_000, horizon_steps=9_000, decay_fraction=share)
    for step in (1, 2, 7, 99, 100, 1_000, 8_888):
        cooled = recipe.cooled_down_from(step)
        assert cooled.learning_rate(step) == recipe.learning_rate(0)
        assert cooled.learning_rate(step + 1) < recipe.learning_rate(0)
        assert cooled.learning_rate(cooled.max_steps) == recipe.min_lr
        assert abs((cooled.max_steps - step) / cooled.max_steps - share) < 1 / step
        assert cooled.cooled_down_from(step) == cooled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_lr": -1e-3}, "max_lr must be at least 0, got -0.001"),
        ({"max_lr": math.nan}, "max_lr must be at least 0, got nan"),
        ({"min_lr": math.inf}, r"min_lr must be at most 1e\+30, got inf"),
        ({"max_lr": 1e-5}, "min_lr must be at most max_lr"),
        ({"max_steps": -5}, "max_steps must be at least 1, got -5"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, r"val_fraction must be in \[0, 1\), got -0.1"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"order": "random"}, "order must be one of sequential, shuffled, got 'random'"),
        ({"schedule": "step"}, "schedule must be one of cosine, wsd, linear, constant, got 'step'"),
        ({"keep": "first"}, "keep must be one of best, last, got 'first'"),
        ({"decay_fraction": 1.0}, r"decay_fraction must be in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, "eps must be at least 1e-30, got 0.0"),
        ({"seed": 2**64}, f"seed must be at most {2**63}, got {2**64}"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"block_size": 2048}, "block_size must be at most the model's 1024 positions, got 2048"),
        ({"model": "124x"}, "unknown size '124x'; did you mean '124m'?"),
        ({"model": "124m,n_head=7"}, "n_embd must be divisible by n_head"),
        ({"model": "124m,n_head=x"}, "n_head must be a whole number, got 'x'"),
        ({"model": "124m,vocab_size=9"}, "cannot change 'vocab_size=9', only block_size,"),
    ],
)
def test_a_recipe_refuses(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_the_nearest_preset_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"'shakespear-cpu'; did you mean 'shakespeare-cpu'\?"):
        find_preset("shakespear-cpu")
    with pytest.raises(ValueError, match=r"unknown recipe 'xyzzy' \(known: shakespeare-124m"):
        find_preset("xyzzy")


def test_model_sizes_with_changes() -> None:
    config = parse_model("small, n_embd=320,n_head=5,dropout=0.1")
    assert (config.n_layer, config.n_embd, config.n_head, config.dropout) == (6, 320, 5, 0.1)
    assert config.vocab_size == 50257


@pytest.mark.parametrize(
    "spec", [*MODELS, "350m,dropout=0.1", "124m,n_layer=3,dropout=0.25", "tiny,n_embd=64"]
)
def test_a_shape_spelled_reads_back(spec: str) -> None:
    config = parse_model(spec)
    assert parse_model(spell_model(config)) == config
    if spec.partition(",dropout")[0] in MODELS:
        assert spell_model(config) == spec


def test_a_shape_no_recipe_has_cannot_be_spelled() -> None:
    said = "vocab_size must be 50257 to be trained here, got {}"
    with pytest.raises(ValueError, match=said.format("50258; .* cuts off added tokens")):
        spell_model(GPTConfig(vocab_size=50_258))  # GPT-2 with a token to pad with
    with pytest.raises(ValueError, match=said.format("1000$")):
        spell_model(GPTConfig(vocab_size=1000))
