"""Every op in plain PyTorch: the `eager` backend. Tests compare with their own formulas.

Names and signatures are those of the Triton ops, whose files have the math. Nothing here may import
triton. Under autocast each op returns what the Triton op returns: activations in the autocast
dtype, residual stream and loss in fp32.

A machine without a GPU trains on these, so `linear_cross_entropy` must be fast, compiled or not.
The others are written as simply as possible.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 1024  # rows of logits at once: 1024 x 50304 in fp32 are 206 MB
# Up to this T a CPU computes bf16 attention as one product after the other: SDPA's backward takes
# three to six times as long. At T = 256 and D = 64 the probabilities take as much memory as qkv and
# y.
MAX_T_OF_PRODUCTS = 256


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype of an op's activations: the autocast dtype under autocast, else x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(..., C) -> (..., C); see kernels/layer_norm.py."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(
        autocast_dtype(x)
    )


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """x, residual (..., C) -> y in x's dtype, residual + x in residual's; see layer_norm.py."""
    residual_out = residual + x.to(residual.dtype)
    dtype = autocast_dtype(x)
    y = F.layer_norm(
        residual_out, weight.shape, weight.to(residual.dtype), bias.to(residual.dtype), eps
    )
    return y.to(dtype), residual_out


def check_ids(what: str, ids: Tensor, V: int, ignore_index: int | None = None) -> None:
    """Refuse an id outside [0, V) other than `ignore_index`, on a CPU; on CUDA it costs a sync."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = ids[(ids < 0) | (ids >= V)]
    allowed = f"[0, {V})"
    if ignore_index is not None:
        outside = outside[outside != ignore_index]
        allowed += f" or ignore_index {ignore_index}"
    if outside.numel():
        raise ValueError(f"{what} must be in {allowed}, got {outside[0].item()}")


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """idx (B, T) -> y, residual (B, T, C), wte; see embedding.py. Here wpe may be (B, T, C) too."""
    check_ids("embedding: idx", idx, len(wte))
    residual = F.embedding(idx, wte) + wpe
    if residual_dtype is not None:
        residual = residual.to(residual_dtype)
    return layer_norm(residual, weight, bias, eps), residual, wte


def gelu_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """(..., C) -> (..., C) through 4C; see kernels/gelu_mlp.py."""
    h = F.linear(x, w_fc, b_fc)
    if torch.compiler.is_compiling() and h.device.type == "cpu":
        # As a sigmoid, see kernels/gelu_mlp.py: an exponential takes a third of a tanh's time.
        z = h.to(torch.promote_types(h.dtype, torch.float32))
        g = (z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z * z * z))).to(h.dtype)
    else:
        g = F.gelu(h, approximate="tanh")
    return F.linear(g, w_proj, b_proj)


def by_products(device: str, bf16: bool, T: int, dropout_p: float) -> bool:
    """Whether `causal_attention` here computes product by product, and so keeps (H, T, T)."""
    return device == "cpu" and bf16 and T <= MAX_T_OF_PRODUCTS and dropout_p == 0


def sdpa(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """`causal_attention` by PyTorch's own function."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C3 // (3 * n_head)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def causal_attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """(B, T, 3C) -> (B, T, C); see kernels/causal_attention.py."""
    B, T, C3 = qkv.shape
    if not by_products(qkv.device.type, qkv.dtype == torch.bfloat16, T, dropout_p):
        return sdpa(qkv, n_head, dropout_p)
    D = C3 // (3 * n_head)
    heads = qkv.view(B, T, 3, n_head, D).permute(2, 0, 3, 1, 4)
    q, k, v = heads.reshape(3, B * n_head, T, D)
    ahead = qkv.new_full((T, T), -torch.inf).triu(1)
    p = torch.baddbmm(ahead, q, k.mT, alpha=D**-0.5).softmax(-1)
    y = torch.bmm(p, v).view(B, n_head, T, D)
    return y.transpose(1, 2).reshape(B, T, C3 // 3)


def _turn_into_dz(z: Tensor, V: int, ids: Tensor, needs_dz: bool) -> tuple[Tensor, Tensor]:
    """log p of `ids` (R, 1) under softmax(z), and the softmax less onehot(ids); z (R, Vp) is lost.

    Compiled, it is pointwise from z to dz: it compares instead of indexing, and writes the
    exponential twice, so that it is recomputed instead of stored. Otherwise a few rows go through
    all passes before the next begin, so that their fp32 form stays in a cache.
    """
    if torch.compiler.is_compiling():
        logits, cols = z[:, :V].float(), torch.arange(V, device=z.device)
        z_max = logits.amax(dim=-1, keepdim=True)
        log_sum = torch.exp(logits - z_max).sum(dim=-1, keepdim=True).log()
        # The maximum and the logarithm stay apart: at |z| of 1e4 their sum is off by 5e-4.
        log_p = logits.gather(1, ids) - z_max - log_sum
        dz = torch.exp(logits - z_max - log_sum) - torch.where(cols == ids, 1.0, 0.0)
        return log_p, F.pad(dz, (0, z.shape[1] - V)).to(z.dtype)
    z[:, V:] = -torch.inf
    num_rows = 128 if z.is_cuda else 16 * torch.get_num_threads()
    log_p = z.new_empty(ids.shape, dtype=torch.float32)
    for rows, at, out in zip(*(t.split(num_rows) for t in (z, ids, log_p)), strict=True):
        p = rows.float()
        torch.log_softmax(p, dim=-1, out=p)
        out.copy_(p.gather(1, at))
        if needs_dz:
            rows.copy_(p.exp_())
    if needs_dz:  # in deterministic mode, scatter_ would copy a whole slice
        z[torch.arange(len(z), device=z.device), ids[:, 0]] = torch.expm1(log_p[:, 0]).to(z.dtype)
    return log_p, z


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, and the gradients of x and weight, made while the logits of a chunk exist."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, ignore_index, needs_dx, needs_dweight):
        counted = targets != ignore_index
        known = (targets >= 0) & (targets < vocab_size)
        # 1 where a row counts, 0 where it is ignored, NaN for an id outside the vocabulary.
        share = torch.where(counted, torch.where(known, 1.0, float("nan")), 0.0)[:, None]
        count = counted.sum()
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        w = weight.to(x.dtype)
        ids = targets.clamp(0, vocab_size - 1)[:, None]
        dxs: list[Tensor] = []
        dweight: Tensor | None = None  # (C, Vp), which takes a CPU two thirds of the time in bf16
        for rows, at, part in zip(*(t.split(CHUNK_TOKENS) for t in (x, ids, share)), strict=True):
            z = F.linear(rows, w)
            # Without its 1 / count, which fp16 could not hold; it is applied at the end, in fp32.
            log_p, dz = _turn_into_dz(z, vocab_size, at, needs_dx or needs_dweight)
            loss = loss - (log_p * part).sum()
            part = part.to(x.dtype)
            if needs_dx:
                dxs.append((dz @ w) * part)
            if not needs_dweight:
                continue
            rows = (rows * part).T.contiguous()
            if dweight is not None and x.dtype == dweight.dtype:
                dweight.addmm_(rows, dz)
            else:
                part_dweight = rows @ dz
                dweight = part_dweight.float() if dweight is None else dweight.add_(part_dweight)
        ctx.save_for_backward(count, torch.cat(dxs) if needs_dx else None, dweight)
        ctx.weight_dtype = weight.dtype
        return loss / count  # 0 / 0 = NaN for an all-ignored batch, as F.cross_entropy gives

    @staticmethod
    def backward(ctx: Any, dloss: Tensor):
        if torch.is_grad_enabled():  # the gradients were computed in forward, out of its sight
            raise RuntimeError("linear_cross_entropy: double backward is not supported")
        count, dx, dweight = ctx.saved_tensors
        scale = dloss / count.clamp(min=1)  # if every target is ignored: 0 * dloss
        dx = (dx.float() * scale).to(dx.dtype) if dx is not None else None
        if dweight is not None:
            turned = dweight.new_empty(dweight.T.shape)
            dweight = torch.mul(dweight.T, scale, out=turned).to(ctx.weight_dtype)
        return dx, dweight, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """x (..., C), weight (Vp, C), targets (...) -> mean loss; see linear_cross_entropy.py."""
    V = weight.shape[0] if vocab_size is None else vocab_size
    check_ids("linear_cross_entropy: targets", targets, V, ignore_index)
    needs = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    rows, ids = x.reshape(-1, x.shape[-1]).to(autocast_dtype(x)), targets.reshape(-1)
    return _LinearCrossEntropy.apply(rows, weight, ids, V, ignore_index, *needs)
