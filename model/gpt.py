"""GPT-2 as published: learned positions, pre-LN, biases everywhere, tanh GELU, tied head.

Every op with a hand-written kernel is called through `ops`, so the model does not know which
backend runs. Each residual add is one op with the LayerNorm that follows it, so the loop below
passes each block the norm of the next one:

    y, residual = LN(wte[idx] + wpe[:T]; h[0].ln_1), and the sum
    for each block:
        y, residual = add_LN(attn(y), residual; ln_2)
        y, residual = add_LN(mlp(y), residual; ln_1 of the next block, or ln_f)
    loss = CE(y @ wte^T, targets)

Source: Radford et al. 2019; parameter names are those of the released weights.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import EAGER, Ops
from model.config import GPTConfig
from model.flops import num_parameters

INIT_STD = 0.02


def _dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout, but not at p = 0, where compiled code would copy every branch."""
    return F.dropout(x, p, training) if p > 0 else x


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return self.c_proj(self.ops.causal_attention(self.c_attn(x), self.n_head, dropout_p))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.gelu_mlp(
            x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias
        )


class Block(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config, ops)
        self.dropout = config.dropout
        self.ops = ops

    def forward(self, y: Tensor, residual: Tensor, next_norm: nn.LayerNorm):
        """y = ln_1(residual) in; next_norm(residual_out), residual_out out; all (B, T, C)."""
        branch = _dropout(self.attn(y), self.dropout, self.training)
        y, residual = self.ops.add_layer_norm(
            branch, residual, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps
        )
        branch = _dropout(self.mlp(y), self.dropout, self.training)
        return self.ops.add_layer_norm(
            branch, residual, next_norm.weight, next_norm.bias, next_norm.eps
        )


class Transformer(nn.Module):
    def __init__(self, config: GPTConfig, ops: Ops):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, ops) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.dropout = config.dropout
        self.recompute = False  # run each block's forward again in the backward, to save memory
        self.ops = ops

    def forward(
        self,
        idx: Tensor,
        residual_dtype: torch.dtype | None,
        positions: slice | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """idx (B, T) int64 -> ln_f of the last residual, (B, T, C), and the table for the head.

        Args:
            positions: Of the tokens: (B, T), or a slice that all rows share; None counts from 0.
        """
        wte = self.wte.weight
        wpe = self.wpe.weight[slice(idx.shape[1]) if positions is None else positions]
        norms = [*(block.ln_1 for block in self.h), self.ln_f]
        first = norms[0].weight, norms[0].bias, norms[0].eps
        if self.dropout > 0 and self.training:  # dropout stands between the sum and its norm
            residual = F.dropout(F.embedding(idx, wte) + wpe, self.dropout)
            if residual_dtype is not None:
                residual = residual.to(residual_dtype)
            y = self.ops.layer_norm(residual, *first)
        else:
            y, residual, wte = self.ops.embedding(idx, wte, wpe, *first, residual_dtype)
        for block, next_norm in zip(self.h, norms[1:], strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Saving a generator's state reads it on the host, which no CUDA graph can do.
                rng = self.dropout > 0
                y, residual = checkpoint(
                    block, y, residual, next_norm, use_reentrant=False, preserve_rng_state=rng
                )
            else:
                y, residual = block(y, residual, next_norm)
        return y, wte


class GPT(nn.Module):
    """GPT-2 with a tied head.

    The embedding table has `config.padded_vocab_size` rows. Those past `vocab_size` start at 0,
    get no gradient and no decay, and never reach a logit, the loss or a saved file.

    Args:
        config: The shape.
        ops: The op set; `kernels.EAGER` or `kernels.TRITON` or a mixture (`kernels.parse_ops`).
        residual_dtype: Dtype of the residual stream; None keeps the embeddings' (fp32), which is
            what plain autocast does. torch.bfloat16 changes the numerics.
    """

    def __init__(
        self, config: GPTConfig, ops: Ops = EAGER, residual_dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        self.trained_context = config.block_size  # positions used in training; set by training
        self.fine_tuned_context: int | None = None  # the same of the last fine-tuning
        self.residual_dtype = residual_dtype
        self.ops = ops
        self.transformer = Transformer(config, ops)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02); residual projections scaled by (2 * n_layer)^-0.5; biases 0; LN 1 and 0."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = residual_std if name.endswith("c_proj") else INIT_STD
                module.weight.normal_(0.0, std)
                module.bias.zero_()
        # Real rows only, so that the draw does not depend on the padding.
        self.transformer.wte.weight[: self.config.vocab_size].normal_(0.0, INIT_STD)
        self.transformer.wte.weight[self.config.vocab_size :].zero_()
        self.transformer.wpe.weight.normal_(0.0, INIT_STD)

    def use(self, ops: Ops) -> None:
        """Switch to another op set."""
        for module in self.modules():
            if hasattr(module, "ops"):
                setattr(module, "ops", ops)  # noqa: B010 # pyright takes it for a tensor otherwise

    def num_parameters(self) -> int:
        """Parameters of the published model, without padding rows."""
        return num_parameters(self.config)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the loss.

        Args:
            idx: (B, T) int64 token ids, T <= block_size.
            targets: (B, T) int64; positions of -100 are ignored.

        Returns:
            Without targets the logits (B, T, vocab_size); with targets the scalar mean loss, fp32.

        Raises:
            ValueError: T exceeds block_size.
        """
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"model: T must be at most block_size {self.config.block_size}, got {idx.shape[1]}"
            )
        y, weight = self.transformer(idx, self.residual_dtype)
        if targets is None:
            return F.linear(y, weight[: self.config.vocab_size])
        return self.ops.linear_cross_entropy(y, weight, targets, self.config.vocab_size)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GPT":
        """A model from a GPT-2 folder or safetensors file; see model/hf.py."""
        from model import hf  # hf builds a GPT, so it imports this module

        return hf.from_pretrained(path)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write what GPT2LMHeadModel.from_pretrained reads; see model/export.py."""
        from model import export

        export.save_pretrained(self, path, dtype)


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """The model is in eval mode inside, and in its earlier mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
