"""The whole model and a real run on the Triton ops against the same on the eager ones."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels
import train
from kernels import EAGER, parse_ops
from model import GPT, GPTConfig

# Odd on purpose: T is no multiple of a tile, the vocabulary is padded, heads are the smallest.
CONFIG = GPTConfig(block_size=40, vocab_size=211, n_layer=2, n_head=4, n_embd=64)


def loss_and_grads(model: GPT, idx: torch.Tensor, targets: torch.Tensor, compiled: bool = False):
    torch.compiler.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = forward(idx, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ops", ["triton", "compiled", "eager,causal_attention=sdpa-flash"])
def test_model_on_any_backend_equals_model_on_eager(device, ops, compiled, monkeypatch):
    if ops.endswith("flash") and device == "cuda":
        pytest.skip("there it takes no fp32")
    if device == "cpu":  # g++ takes half a minute
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        kernels.BACKENDS["compiled"].cache_clear()  # pyright: ignore
    torch.manual_seed(0)
    eager = GPT(CONFIG, EAGER).to(device)
    triton = GPT(CONFIG, parse_ops(ops)).to(device)
    kernels.BACKENDS["compiled"].cache_clear()  # pyright: ignore
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


def test_compiled_ops_are_eager_without_gradients(monkeypatch):
    """Each shape of an evaluation or of generation would be compiled by itself."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: None)
    op = kernels._compiled(EAGER.gelu_mlp)
    x, w, b = torch.ones(2, 4), torch.ones(4, 4), torch.ones(4)
    with torch.no_grad():
        assert torch.equal(op(x, w, b, w, b), EAGER.gelu_mlp(x, w, b, w, b))
    with pytest.raises(TypeError):
        op(x, w, b, w, b)


def test_a_kernel_for_training_is_no_duty_in_evaluation():
    """cuDNN's attention, for one, refuses a row of one token, which may be left of a text."""
    attention = parse_ops("eager,causal_attention=sdpa-cudnn").causal_attention
    qkv = torch.randn(1, 3, 24)
    with torch.no_grad():
        assert torch.equal(attention(qkv, 2), EAGER.causal_attention(qkv, 2))
    with pytest.raises(RuntimeError, match="kernel"):  # a CPU has no cuDNN
        attention(qkv, 2)


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
        flags = "--preset smoke --batch-size 1 --block-size 16 --steps 2 --val-fraction 0"
        flags = [*flags.split(), "--save-every", "0", "--dtype", "fp32", "--ops", ops]
        flags += ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / ops)]
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
