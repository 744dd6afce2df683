"""GPT-2 as a good PyTorch engineer would write it: the baseline of the bench.

It uses none of our ops, but nn.Linear, F.layer_norm, F.scaled_dot_product_attention,
F.cross_entropy, AdamW(fused=True), bf16 autocast, a vocabulary padded to 50304, and torch.compile
around it. Parameters have the names of the released weights, so `model.GPT` loads the same state.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from model.config import GPTConfig

LEARNING_RATE = 6e-4
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(causal_attention(self.c_attn(x), self.n_head))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class BaselineGPT(nn.Module):
    """forward(idx, targets) -> scalar mean loss over all positions, as the trainer calls it.

    The softmax runs over the padded vocabulary, as in nanoGPT with vocab_size=50304; with an
    unpadded vocabulary that is a multiple of 128 the loss equals `model.GPT`'s.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
            }
        )

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts.wte(idx) + parts.wpe.weight[: idx.shape[1]]
        for block in parts.h:
            x = block(x)
        logits = F.linear(parts.ln_f(x), parts.wte.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as nanoGPT configures it: decay on matrices only, fused."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5):
    residual = residual + x
    return F.layer_norm(residual, weight.shape, weight, bias, eps).to(x.dtype), residual


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor, weight: Tensor, bias: Tensor):
    h = F.embedding(idx, wte) + wpe
    return layer_norm(h, weight, bias), h, wte


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def heads(qkv: Tensor, n_head: int) -> list[Tensor]:
    """q, k and v, each (B, H, T, D)."""
    B, T, C3 = qkv.shape
    shape = (B, T, n_head, C3 // (3 * n_head))
    return [part.view(shape).transpose(1, 2) for part in qkv.split(C3 // 3, dim=2)]


def causal_attention(qkv: Tensor, n_head: int) -> Tensor:
    q, k, v = heads(qkv, n_head)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).flatten(2)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(x, weight)[..., :vocab_size].flatten(0, -2)
    wide = torch.promote_types(logits.dtype, torch.float32)  # float64 stays: it is the oracle
    return F.cross_entropy(logits.to(wide), targets.flatten())


_OPS = (layer_norm, add_layer_norm, embedding, gelu_mlp, causal_attention, linear_cross_entropy)
OPS: dict[str, Callable[..., Any]] = {op.__name__: op for op in _OPS}


def chosen_sdpa(qkv: Tensor, n_head: int) -> str:
    """Name of the SDPA backend that torch picks for these tensors."""
    q, k, v = heads(qkv.detach(), n_head)
    return SDPBackend(torch._fused_sdp_choice(q, k, v, is_causal=True)).name
