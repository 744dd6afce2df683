"""AdamW: which parameters decay, and the update against the textbook formula."""

from dataclasses import replace

import torch

from model import GPT, GPTConfig
from training.optim import configure_adamw
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
