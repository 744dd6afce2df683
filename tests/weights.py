"""Models of random weights and their folders, for the tests of reading and writing them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig, hf
from model.sampling import Sampling
from model.text import stream_text

SMALL = GPTConfig(block_size=32, vocab_size=197, n_layer=2, n_head=2, n_embd=32)


def gpt2_sizes(config: GPTConfig) -> dict[str, int]:
    return {
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
    }


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Every parameter random: with zero biases a swapped bias would go unnoticed."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        model.transformer.wte.weight[config.vocab_size :].zero_()
    return model


def save(tmp_path: Path) -> tuple[GPT, Path]:
    """A model that was trained at 8 of its positions, and its folder."""
    model = random_model(SMALL)
    model.trained_context = 8
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


def assert_same_weights(a: GPT, b: GPT) -> None:
    """Equal weights; of the positions those at which `a` was trained."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name in left:
        trained = a.trained_context if name.endswith("wpe.weight") else None
        assert torch.equal(left[name][:trained], right[name]), name


def refuse(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line of a `model.hf` command that ends with code 2 and prints nothing else."""
    with pytest.raises(SystemExit) as stop:
        hf.main([*args])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.removesuffix("\n")
    assert line.isprintable()
    return line


def generate_text(model: GPT, prompts: Sequence[str], sampling: Sampling, **more: Any) -> list[str]:
    """The continuation of each row, prompts not included; arguments as for `stream_text`."""
    texts: dict[int, str] = {}
    for piece in stream_text(model, prompts, sampling, **more):
        texts[piece.row] = texts.get(piece.row, "") + piece.text
    return [texts[r] for r in sorted(texts)]
