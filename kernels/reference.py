"""Every op in plain PyTorch: the `eager` backend. Tests compare with formulas of their own.

Same names and signatures as the Triton ops; the math stands in their files. Nothing here may
import triton. Under autocast each op returns what the Triton op returns: activations in the
autocast dtype, residual stream and loss in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 1024  # rows of logits alive at once: 1024 x 50304 fp32 is 206 MB


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype activations leave an op in: the autocast dtype where autocast is on, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(..., C) -> (..., C); see kernels/layer_norm.py."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(
        _autocast_dtype(x)
    )


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x, residual (..., C) -> y in x's dtype, residual + x in residual's; see layer_norm.py."""
    residual_out = residual + x.to(residual.dtype)
    dtype = _autocast_dtype(x)
    y = F.layer_norm(
        residual_out, weight.shape, weight.to(residual.dtype), bias.to(residual.dtype), eps
    )
    return y.to(dtype), residual_out


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """(..., C) -> (..., C) through 4C; see kernels/gelu_mlp.py."""
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """(B, T, 3C) -> (B, T, C); see kernels/causal_attention.py."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and, while the logits of a chunk are at hand, the gradients of x and weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                ignore_index: int, needs_dx: bool, needs_dweight: bool) -> Tensor:  # fmt: skip
        count = (targets != ignore_index).sum()
        # 0 / 0 = NaN for an all-ignored batch, as F.cross_entropy gives.
        scale = 1.0 / count.to(torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        w = weight.to(x.dtype)
        dxs: list[Tensor] = []
        dweight = torch.zeros_like(weight) if needs_dweight else None
        for rows, ids in zip(x.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True):
            z = F.linear(rows, w)[:, :vocab_size].float()
            lse = torch.logsumexp(z, dim=-1, keepdim=True)
            valid = (ids != ignore_index)[:, None]
            at = ids.clamp(0, vocab_size - 1)[:, None]
            loss = loss + torch.where(valid, lse - z.gather(1, at), 0.0).sum()
            if not (needs_dx or needs_dweight):
                continue
            dz = torch.exp(z - lse) * valid * 1.0
            dz.scatter_add_(1, at, -valid.to(dz.dtype))
            dz = F.pad(dz, (0, weight.shape[0] - vocab_size)).to(x.dtype)
            if needs_dx:
                dxs.append((dz @ w).float() * scale)
            if dweight is not None:
                dweight += (dz.T @ rows).to(dweight.dtype)
        ctx.save_for_backward(
            torch.cat(dxs).to(x.dtype) if needs_dx else None,
            dweight * scale if dweight is not None else None,
        )
        return loss * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):
        dx, dweight = ctx.saved_tensors
        dx = dx * dloss.to(dx.dtype) if dx is not None else None
        dweight = dweight * dloss.to(dweight.dtype) if dweight is not None else None
        return dx, dweight, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """x (..., C), weight (Vp, C), targets (...) -> mean loss; see linear_cross_entropy.py."""
    rows = x.reshape(-1, x.shape[-1]).to(_autocast_dtype(x))
    grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        rows, weight, targets.reshape(-1), vocab_size or weight.shape[0], ignore_index,
        grad and x.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
