"""The model is GPT-2: parity with Hugging Face, sizes, initial weights, and that it learns."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import EAGER
from model import GPT, MODELS, GPTConfig
from training.optim import configure_adamw
from training.recipes import PRESETS

SMALL = GPTConfig(block_size=32, vocab_size=97, n_layer=2, n_head=2, n_embd=32)

# (config, B, T): full context; one token; widths and head sizes that are no powers of two; a
# vocabulary that needs no padding.
SHAPES = [
    (SMALL, 2, 32),
    (SMALL, 3, 1),
    (GPTConfig(block_size=17, vocab_size=130, n_layer=3, n_head=3, n_embd=60), 2, 13),
    (GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=4, n_embd=64), 1, 50),
]

# Hugging Face's side runs where our folder named `kernels` is not importable: transformers looks
# for a package of that name.
HUGGING_FACE = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
for folder in sys.argv[1:]:
    given = load_file(f"{folder}/ours.safetensors")
    V, n_head, idx, targets = (given.pop(k) for k in ("V", "n_head", "idx", "targets"))
    T, C = given["transformer.wpe.weight"].shape
    n_layer = sum(name.endswith("ln_1.weight") for name in given)
    config = GPT2Config(vocab_size=int(V), n_positions=T, n_embd=C, n_layer=n_layer,
                        n_head=int(n_head), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(config)
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    logits = model(idx).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    out = {"logits": logits, "loss": loss}
    out.update({n: p.grad for n, p in model.named_parameters()})
    save_file({n: t.detach().contiguous() for n, t in out.items()}, f"{folder}/theirs.safetensors")
"""


def is_conv1d(name: str) -> bool:
    """Hugging Face keeps these as (in, out)."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def as_published(model: GPT, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in GPT-2's layout: padding rows cropped, four matrices transposed."""
    out = {}
    for name, value in values.items():
        value = value.T if is_conv1d(name) else value
        value = value[: model.config.vocab_size] if name.endswith("wte.weight") else value
        out[name] = value.detach().clone().contiguous()
    return out


def test_parity_with_hugging_face(tmp_path: Path) -> None:
    ours = []
    for number, (config, B, T) in enumerate(SHAPES):
        model = GPT(config, EAGER)
        with torch.no_grad():
            for name, p in model.named_parameters():  # biases and norms too, so that they count
                p.add_(torch.randn_like(p) * 0.05)
                if name.endswith("wte.weight"):
                    p[config.vocab_size :] = 0
        idx = torch.randint(config.vocab_size, (B, T))
        targets = torch.randint(config.vocab_size, (B, T))
        targets[0, 0] = -100
        if T > 1:
            targets[-1, T // 2 :] = -100
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(
            as_published(model, dict(model.named_parameters()))
            | {"V": torch.tensor(config.vocab_size), "n_head": torch.tensor(config.n_head)}
            | {"idx": idx, "targets": targets},
            folder / "ours.safetensors",
        )
        loss = model(idx, targets)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(grads) == len(list(model.parameters()))
        results = as_published(model, grads) | {"logits": model(idx).detach(), "loss": loss}
        ours.append((folder, results))

    subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, *(str(folder) for folder, _ in ours)],
        check=True,
        cwd=tmp_path,
        timeout=600,
    )
    for folder, results in ours:
        theirs = load_file(folder / "theirs.safetensors")
        assert theirs.keys() == results.keys()
        for name, value in results.items():
            expected = theirs[name]
            assert value.shape == expected.shape, name
            error = (value - expected).abs().max() / expected.abs().max()
            assert error <= 1e-5, f"{folder.name} {name}: relative error {error:.1e}"


def test_published_sizes() -> None:
    # From Radford et al.'s released weights.
    published = (124_439_808, 354_823_168, 774_030_080, 1_557_611_200)
    for name, count in zip(("124m", "350m", "774m", "1558m"), published, strict=True):
        with torch.device("meta"):
            model = GPT(MODELS[name])
        padding = 47 * model.config.n_embd
        assert sum(p.numel() for p in model.parameters()) - padding == count
        assert model.num_parameters() == count
        assert model.transformer.wte.weight.shape[0] == 50_304
        assert not list(model.buffers())  # no causal masks: 48 MiB of the published run's file
    assert GPTConfig() == MODELS["124m"]


def test_initial_weights() -> None:
    config = replace(MODELS["tiny"], n_layer=8, block_size=512)
    model = GPT(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            values = p[: config.vocab_size]
            # Five standard errors of a standard deviation, and of a mean.
            n = values.numel()
            assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
            assert abs(values.mean().item()) < 5 * std / math.sqrt(n), name
    first_loss = model(torch.randint(50257, (2, 64)), torch.randint(50257, (2, 64)))
    assert abs(first_loss.item() - math.log(50257)) < 0.3


def test_padding_rows_stay_zero_and_take_no_part() -> None:
    model = GPT(SMALL)
    wte = model.transformer.wte.weight
    assert wte.shape[0] == 128
    optimizer = configure_adamw(model, replace(PRESETS["smoke"], warmup_steps=0))
    for _ in range(20):
        idx = torch.randint(97, (2, 33))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (wte[97:] == 0).all()
    assert (wte[:97] != 0).all()
    idx = torch.randint(97, (2, 16))
    before, logits = model(idx, idx), model(idx)
    assert logits.shape == (2, 16, 97)
    with torch.no_grad():
        wte[97:] = 100.0  # would swallow the softmax
    assert torch.equal(model(idx, idx), before)
    assert torch.equal(model(idx), logits)


def test_loss_is_the_mean_over_targets_that_count() -> None:
    model = GPT(SMALL)
    idx = torch.randint(97, (2, 16))
    targets = idx.clone()
    targets[0] = -100
    log_p = torch.log_softmax(model(idx).double(), dim=-1)
    expected = -log_p[1].gather(-1, idx[1, :, None]).mean()
    torch.testing.assert_close(model(idx, targets).double(), expected, rtol=1e-6, atol=0)


def test_no_token_sees_the_future() -> None:
    model = GPT(SMALL)
    idx = torch.randint(97, (1, 16))
    changed = idx.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 97
    torch.testing.assert_close(model(idx)[:, :10], model(changed)[:, :10], rtol=0, atol=1e-6)
    assert not torch.allclose(model(idx)[:, 10:], model(changed)[:, 10:])


def test_dropout_acts_in_training_only() -> None:
    model = GPT(replace(SMALL, dropout=0.5))
    idx = torch.randint(97, (1, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_overfits_one_batch() -> None:
    model = GPT(SMALL)
    recipe = replace(PRESETS["smoke"], warmup_steps=0, max_lr=1e-2, min_lr=1e-2, weight_decay=0.0)
    optimizer = configure_adamw(model, recipe)
    rows = torch.randint(97, (4, 33))
    for _ in range(100):
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Random rows: the first tokens cannot be told apart by what came before, the rest must be.
    assert model(rows[:, :-1], rows[:, 1:]).item() < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 100, "n_head": 3}, "n_embd must be divisible by n_head"),
        ({"n_layer": 0}, "n_layer must be a whole number from 1 to 1,000, got 0"),
        ({"n_layer": 10**7}, "n_layer must be a whole number from 1 to 1,000, got 10000000"),
        ({"n_head": True}, "n_head must be a whole number .* got True"),
        ({"n_embd": "768"}, "n_embd must be a whole number .* got '768'"),
        ({"block_size": math.nan}, "block_size must be a whole number .* got nan"),
        ({"vocab_size": 2**64}, "vocab_size must be a whole number"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0"}, r"dropout must be in \[0, 1\), got '0'"),
        ({"layer_norm_epsilon": 0}, r"layer_norm_epsilon must be in \(0, 1\), got 0"),
        ({"layer_norm_epsilon": math.nan}, r"layer_norm_epsilon must be in \(0, 1\), got nan"),
    ],
)
def test_shapes_that_cannot_be(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**fields)


def test_a_row_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="T must be at most block_size 32, got 33"):
        GPT(SMALL)(torch.zeros(1, 33, dtype=torch.int64))
