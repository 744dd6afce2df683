"""The whole model and a real run on the Triton ops against the same on the eager ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from kernels import EAGER, TRITON
from model import GPT, GPTConfig

# Odd on purpose: T is no multiple of a tile, the vocabulary is padded, heads are the smallest.
CONFIG = GPTConfig(block_size=40, vocab_size=211, n_layer=2, n_head=4, n_embd=64)


def loss_and_grads(model: GPT, idx: torch.Tensor, targets: torch.Tensor, compiled: bool = False):
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = forward(idx, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_model_on_triton_equals_model_on_eager(device, compiled):
    torch.manual_seed(0)
    eager = GPT(CONFIG, EAGER).to(device)
    triton = GPT(CONFIG, TRITON).to(device)
    triton.load_state_dict(eager.state_dict())
    tokens = torch.randint(0, CONFIG.vocab_size, (3, 38), device=device)
    idx, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[1, 5:] = -100
    want, want_grads = loss_and_grads(eager, idx, targets)
    got, got_grads = loss_and_grads(triton, idx, targets, compiled)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for name, exact in want_grads.items():
        grad = got_grads[name]
        assert grad is not None, name
        assert exact is not None, name
        assert (grad - exact).norm() <= 1e-5 * exact.norm(), name


def test_smoke_recipe_on_triton_gives_the_losses_of_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smoke recipe, narrowed so that the interpreter takes seconds.

    On a GPU its fp32 products are in TF32, by cuBLAS and by ours: 4e-5 apart on an H100.
    """
    (tmp_path / "text.txt").write_text("all the world's a stage, and all the men merely " * 40)
    # A minute each in the interpreter; tests/test_verify.py has them for a smaller vocabulary.
    monkeypatch.setattr(train, "settle", lambda make, asked, *_: make(asked))
    monkeypatch.setattr(train, "compare_first_batch", lambda model, plan, *_: plan)
    losses = {}
    here = train.detect
    monkeypatch.setattr(train, "detect", lambda device: replace(here(device), has_triton=True))
    before = torch.are_deterministic_algorithms_enabled()
    for ops in ("eager", "triton"):
        flags = ["--preset", "smoke", "--data", str(tmp_path / "text.txt"), "--ops", ops,
                 "--out", str(tmp_path / ops), "--batch-size", "1", "--block-size", "16",
                 "--steps", "2", "--val-fraction", "0", "--save-every", "0",
                 "--dtype", "fp32"]  # fmt: skip
        try:
            assert train.main(flags) == 0
        finally:
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
        lines = (tmp_path / ops / "metrics.jsonl").read_text().splitlines()
        losses[ops] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["triton"]) == 2  # before an update and after one
    rtol = 1e-3 if torch.cuda.is_available() else 1e-5
    torch.testing.assert_close(
        torch.tensor(losses["triton"]), torch.tensor(losses["eager"]), rtol=rtol, atol=0
    )
