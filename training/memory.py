"""Device memory of one training step, counted from what the ops save and allocate.

Bytes, with M = rows * T tokens of a micro-batch, C, H, L, Vp as in the model, e the bytes of an
activation (4 in fp32, 2 in bf16) and r those of the residual stream (4 unless it is bf16 too).

Alive through the step: for each parameter, padding rows included, 4 bytes of master weight and 8 of
AdamW's moments; with working copies 2 more for the blocks' matrices. With `shard` "optimizer" a
rank has a part of the moments, and of the masters that have a copy. With "full" it also has only a
part of the matrices, and two blocks' matrices are whole at a time, with one block's gradients.
Gradients take 4 bytes per parameter. They appear during the first backward; those of working copies
are bf16, and are added into fp32 ones after each micro-batch if a step has several.

Saved for backward, per layer:

    c_attn              y of ln_1                  e M C
    causal_attention    qkv, its output, lse       e 3 M C + e M C + 4 M H     (also c_proj's input;
                        PyTorch, bf16 on a CPU: probabilities, e M H T, not lse)
    add_layer_norm      sum of the residual        r M C + 8 M   (twice per layer)
    gelu_mlp            x, and two of width 4C     e M C + 2 * e 4 M C     (eager h, g; triton g, d)
    bf16                casts of the 4 matrices    2 * 12 C^2          (unless there are copies)

With `recompute` a block keeps only its two inputs, e M C + r M C; all of the above exists for one
block at a time, in the backward.

And once: ids 8 M, the first norm's input and statistics, and what linear_cross_entropy computes
ahead of its backward, dx (e M C) and dweight (4 Vp C). Dropout adds a mask of a byte per element,
as on CUDA. A compiled model saves the same.

The peak is at one of these moments, the keys of `MemoryEstimate.moments`:

    loss      a chunk of logits in e: of 1024 rows eager, larger triton; and eager dweight once more
    turn      the loss's backward scales dx and dweight: both exist twice
    mlp       the last layer's backward: a gradient of (M, 4C), and those of the two matrices,
              beside all that was saved
    bottom    the embedding's gradient three times: the head's, the table's and their sum; where
              the op is ours twice, the head's and what it is added into
    update    all gradients in fp32, as torch's clipping needs them
    gather    on several ranks, before an evaluation or a checkpoint: the weights of other ranks

The first three include gradients only if an earlier micro-batch left some. Leave room for what is
not counted: rounding and fragmentation in the allocator, the CUDA context (0.5 GB) and cuBLAS's
workspace.
"""

from typing import TYPE_CHECKING, NamedTuple

from kernels import read_ops
from kernels.reference import CHUNK_TOKENS, by_products
from model import GPTConfig

if TYPE_CHECKING:
    from training.plan import Plan


class MemoryEstimate(NamedTuple):
    """Bytes of one step on one rank."""

    weights: int  # fp32 masters, padding rows included
    optimizer: int  # AdamW's two moments, fp32
    working: int  # bf16 copies of weights
    activations: int  # saved for backward by one micro-batch
    moments: dict[str, int]  # at each moment, besides weights, optimizer and working

    @property
    def total(self) -> int:
        """Peak bytes; less than the sum, because gradients and activations alternate."""
        return self.weights + self.optimizer + self.working + max(self.moments.values())


def estimate(config: GPTConfig, T: int, plan: "Plan", ranks: int = 1) -> MemoryEstimate:
    """Memory of a step of `plan` on rows of T tokens; the module docstring has the formulas."""
    backends = read_ops(plan.ops)
    shards, full = (1 if plan.shard == "none" else ranks), plan.shard == "full"
    M, C, H, L = plan.micro_batch_size * T, config.n_embd, config.n_head, config.n_layer
    e, r = (4, 4) if plan.dtype == "fp32" else (2, 2 if plan.residual == "bf16" else 4)
    head = 4 * config.padded_vocab_size * C  # the tied embedding, fp32
    matrices = 12 * C * C * L
    num_parameters = head // 4 + config.block_size * C + matrices + 13 * C * L + 2 * C
    working = 2 * matrices if plan.working_copies else 0

    products = by_products(plan.device, plan.dtype == "bf16", T, config.dropout)
    plain = backends["causal_attention"] in ("eager", "compiled")
    per_head = e * T if products and plain else 4
    layer = M * (2 * r * C + 14 * e * C + 2 * 8 + per_head * H)
    once = M * (8 + r * C + 8 + e * C) + head
    if config.dropout > 0:
        once, layer = once + M * C, layer + 2 * M * C  # masks
    if plan.dtype != "fp32" and not working and not full:
        layer += 2 * matrices // L  # casts
    # A block's two inputs, but the first block's residual is the first norm's input.
    kept = L * (e + r) * M * C - r * M * C
    activations = once + (kept if plan.recompute else L * layer)
    again = layer if plan.recompute else 0

    loss = e * M * C + (head // 2 if plan.dtype != "fp32" else 0)
    if backends["linear_cross_entropy"] == "triton":
        from kernels.linear_cross_entropy import chunk_rows  # needs triton

        loss += e * chunk_rows(M, config.padded_vocab_size, e) * config.padded_vocab_size
    else:
        R = min(M, CHUNK_TOKENS)
        loss += e * R * config.padded_vocab_size  # dz takes the place of z
        whole_model = plan.compile and plan.compile_scope == "model"
        if whole_model or backends["linear_cross_entropy"] == "compiled":
            loss += head if M > R else 0  # compiled code adds chunks up out of place
        elif plan.dtype != "fp32":
            loss += head // 2  # a product on its way into the sum
    whole = weights = 4 * num_parameters
    if full:
        weights -= 4 * matrices - 4 * matrices // shards
    several = plan.num_micro_batches > 1
    folded = working if several else 0  # bf16 gradients on their way into fp32 ones
    grads = weights if folded or not working else weights - working
    before = grads if several else 0
    tables = 2 if backends["embedding"] == "triton" and config.dropout == 0 else 3
    moments = {
        "loss": before + activations + loss,
        "turn": before + activations + head + e * M * C,
        "mlp": before + activations + again + (5 if e < r else 4) * e * M * C + 8 * e * C * C,
        "bottom": max(before, grads - head) + folded + tables * head + r * M * C,
        "update": weights,
    }
    if full:
        optimizer, working = 2 * weights, (3 * e + 4) * matrices // L
    else:
        optimizer = 2 * max(whole // shards, head)  # the embedding is one parameter of one rank
        weights -= max(0, 2 * working - whole // shards)  # the rank that owns no embedding
    if shards > 1:
        moments["gather"] = whole - weights
    return MemoryEstimate(weights, optimizer, working, activations, moments)
