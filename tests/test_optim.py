"""AdamW: which parameters decay, the update against the textbook formula, clip, working copies.

What our own kernels do is in tests/test_adamw.py.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from model import GPT, GPTConfig
from training.optim import AdamW, TritonAdamW, configure_adamw
from training.recipes import PRESETS

CONFIG = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=32)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = GPT(CONFIG)
    decay, rest = configure_adamw(model, PRESETS["shakespeare-124m"]).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decay["params"]}
    # Two embeddings and four matrices a block; the tied head is the token embedding.
    per_block = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"transformer.h.{i}.{m}.weight" for i in range(2) for m in per_block}
    assert decayed == expected | {"transformer.wte.weight", "transformer.wpe.weight"}
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert decay["fused"]


def test_update_is_the_textbook_formula() -> None:
    recipe = replace(PRESETS["shakespeare-124m"], warmup_steps=0, max_lr=1e-2)
    model = torch.nn.Linear(5, 3)
    optimizer = configure_adamw(model, recipe)
    exact = {n: p.detach().double() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in exact.items()}
    v = {n: torch.zeros_like(p) for n, p in exact.items()}
    for step in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            m_hat, v_hat = m[name] / (1 - 0.9**step), v[name] / (1 - 0.95**step)
            decay = 0.1 if name == "weight" else 0.0
            exact[name] = exact[name] * (1 - 1e-2 * decay) - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), exact[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0, math.inf])
def test_clip_is_torchs_and_zero_only_measures(max_norm: float) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3, 5)), torch.nn.Parameter(torch.randn(4))]
    optimizer = AdamW([*parameters, torch.nn.Parameter(torch.ones(2))])  # that one has no gradient
    grads = [torch.randn_like(p) for p in parameters]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.clone()
    norm = optimizer.clip(max_norm)
    want = torch.cat([g.flatten() for g in grads]).double().norm()
    assert (norm.shape, norm.dtype) == ((), torch.float32)
    torch.testing.assert_close(norm.double(), want, rtol=1e-6, atol=0.0)
    factor = 0.5 / (norm + 1e-6) if max_norm == 0.5 else 1.0
    for p, g in zip(parameters, grads, strict=True):
        torch.testing.assert_close(p.grad, g * factor, rtol=1e-6, atol=0.0)


def test_clip_of_a_model_is_bitwise_torchs() -> None:
    """The groups hold matrices first; the sum of the norms must not notice."""
    model = GPT(CONFIG)
    optimizer = configure_adamw(model, PRESETS["smoke"])
    for seed in range(20):  # one order in a few gives another last bit
        torch.manual_seed(seed)
        grads = [torch.randn_like(p) for p in model.parameters()]
        norms = []
        for clip in (
            lambda: optimizer.clip(1.0),
            lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        ):
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g.clone()
            norms.append(clip())
        assert torch.equal(*norms)


def test_working_copies_train_as_autocast_does() -> None:
    """A copy cast once a step gives the bits of a cast in every forward."""
    results = []
    norm = torch.zeros(())
    for attached in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 8)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        copies = {"weight": torch.empty(8, 16, dtype=torch.bfloat16, requires_grad=True)}
        if attached:
            optimizer.attach_working({next(model.parameters()): copies["weight"]})
        for _ in range(5):
            x = torch.randn(32, 16)
            with torch.autocast("cpu", torch.bfloat16):
                y = functional_call(model, copies if attached else {}, (x,))
            F.mse_loss(y.float(), x[:, :8]).backward()
            norm = optimizer.clip(0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert copies["weight"].grad is None
            assert model.weight.grad is None
        results.append((norm, model.weight.detach().clone(), model.bias.detach().clone()))
        if attached:
            assert torch.equal(copies["weight"], model.weight.bfloat16())
    for got, want in zip(results[1], results[0], strict=True):
        assert torch.equal(got, want)


def test_gradients_of_copies_add_up_in_fp32() -> None:
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdamW([p])
    copy = torch.empty(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer.attach_working({p: copy})
    assert torch.equal(copy, torch.zeros(4, dtype=torch.bfloat16))
    for value in (1.0, 2.0**-9):  # bf16 would drop the second
        copy.grad = torch.full((4,), value, dtype=torch.bfloat16)
        optimizer.fold_working_gradients()
        assert copy.grad is None
    assert p.grad is not None
    assert torch.equal(p.grad, torch.full((4,), 1.0 + 2.0**-9))


def test_a_bad_step_leaves_everything() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdamW([p])
    copy = torch.empty(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer.attach_working({p: copy})
    copy.grad = torch.full((4,), math.nan, dtype=torch.bfloat16)
    optimizer.found_inf = torch.ones(())
    assert not optimizer.clip(1.0).isfinite()
    optimizer.step()
    assert torch.equal(p, torch.ones(4))
    assert torch.equal(copy, torch.ones(4, dtype=torch.bfloat16))
    assert optimizer.state[p]["step"] == 0


def test_muon_is_torchs_for_the_matrices_and_adamw_for_the_rest(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's in fp32, as ours
    recipe = replace(PRESETS["smoke"], warmup_steps=0, max_lr=1e-2, muon=True)
    ours, plain = GPT(CONFIG), GPT(CONFIG)
    plain.load_state_dict(ours.state_dict())
    mine = configure_adamw(ours, recipe)
    named = [*plain.named_parameters()]
    hidden = [p for name, p in named if ".h." in name and p.dim() == 2]
    assert len(hidden) == 8
    muon = torch.optim.Muon(hidden, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw")
    tables = [p for name, p in named if p.dim() == 2 and ".h." not in name]
    vectors = [p for _, p in named if p.dim() < 2]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(recipe.beta1, recipe.beta2))
    for step in range(4):
        for p, (_, q) in zip(ours.parameters(), named, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours.parameters()]
        kept = [value.clone() for state in mine.state.values() for value in state.values()]
        if step == 2:  # a bad one changes nothing, the momentum included
            for p in ours.parameters():
                p.grad = torch.full_like(p, math.nan)
            mine.step(skip=torch.ones(()))
            assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), before, strict=True))
            now = [value for state in mine.state.values() for value in state.values()]
            assert all(torch.equal(value, was) for value, was in zip(now, kept, strict=True))
        else:
            mine.step(skip=torch.zeros(()))
            muon.step()
            adamw.step()
        mine.zero_grad()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_kernels_are_chosen_by_name() -> None:
    model, recipe = torch.nn.Linear(5, 3), PRESETS["smoke"]
    assert type(configure_adamw(model, recipe)) is AdamW
    assert type(configure_adamw(model, recipe, "torch")) is AdamW
    with pytest.raises(ValueError, match="one of torch, triton, got 'apex'"):
        configure_adamw(model, recipe, "apex")  # pyright: ignore[reportArgumentType]
    if not torch.cuda.is_available():  # interpreted
        optimizer = configure_adamw(model, recipe, "triton")
        assert type(optimizer) is TritonAdamW
        assert [g["weight_decay"] for g in optimizer.param_groups] == [recipe.weight_decay, 0.0]
