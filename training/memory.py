"""Device memory of one training step, counted from what the ops save and what their code creates.

Bytes, with M = rows * T tokens of a micro-batch, C, H, L, Vp as in the model, e the bytes of an
activation (4 in fp32, 2 in bf16) and r those of the residual stream (4 unless it is bf16 too).

Alive through the step: 4 bytes of master weight and 8 of AdamW moments a parameter, padding rows
included; with working copies 2 more for each of the blocks' matrices. Ranks that share these out
have a part of the moments each, and of the masters that a copy stands for. Where they share out the
matrices altogether, two blocks' are whole at a time, with one's gradients. Gradients, 4 bytes a
parameter, come as the backward of the first micro-batch goes; those of working copies are bf16 in a
step of one micro-batch, and in a longer one are folded into fp32 after each.

Saved for backward, per layer:

    c_attn              y of ln_1                  e M C
    causal_attention    qkv, its output, lse       e 3 M C + e M C + 4 M H     (c_proj's input too)
    add_layer_norm      sum of the residual        r M C + 8 M   (twice a layer)
    gelu_mlp            x, and two of width 4C     e M C + 2 * e 4 M C     (eager h, g; triton g, d)
    bf16                casts of the 4 matrices    2 * 12 C^2          (unless they are kept copies)

With `recompute` a block keeps its two inputs alone, e M C + r M C, and all of the above exists for
one block at a time, in the backward.

And once: ids 8 M, the first norm's input and statistics, and what linear_cross_entropy computes
ahead of its backward, dx (e M C) and dweight (4 Vp C). Dropout adds a mask byte an element, as on
CUDA. A compiled model saves the same: there is no matmul-free way back to these tensors.

The peak is at one of these moments; `MemoryEstimate.moments` has them with what they add:

    loss      a chunk of logits in e: of 1024 rows eager, larger triton; and eager dweight once more
    turn      the loss's backward scales dx and dweight: both exist twice
    mlp       the last layer's backward: a gradient of (M, 4C), and those of the two matrices,
              beside all that was saved
    bottom    the embedding's gradient three times: the head's, the table's and their sum; where
              the op is ours twice, the head's and what it is added into
    update    all gradients in fp32, which is what torch's clipping wants
    gather    of several ranks: before an evaluation or a checkpoint, the weights that others have

Gradients are part of the first three moments only where an earlier micro-batch left some. What the
allocator rounds and fragments, the CUDA context (0.5 GB) and cuBLAS's workspace are not counted:
leave room for them in the budget.
"""

from dataclasses import dataclass

from kernels import read_ops
from kernels.reference import CHUNK_TOKENS
from model import GPTConfig


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one step.

    Args:
        weights: fp32 masters of one rank, padding rows included.
        gradients: All of them.
        optimizer: AdamW's two moments, fp32, of one rank.
        working: bf16 copies of the blocks' matrices that live from step to step.
        activations: Saved for backward by one micro-batch.
        workspace: Beside all the others at the peak. peak: Name of its moment.
        moments: (name, bytes beside weights, optimizer and working).
    """

    weights: int
    gradients: int
    optimizer: int
    working: int
    activations: int
    workspace: int
    peak: str
    moments: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Peak bytes: not the sum, because gradients and activations take turns."""
        return self.weights + self.optimizer + self.working + dict(self.moments)[self.peak]


def estimate(
    config: GPTConfig,
    rows: int,
    T: int,
    *,
    dtype: str,
    ops: str,
    compiled: bool,
    working_copies: bool,
    num_micro_batches: int,
    residual: str = "fp32",
    shards: int = 1,
    recompute: bool = False,
    full: bool = False,
) -> MemoryEstimate:
    """Memory of a step; the module docstring has the formulas.

    Args:
        config, rows, T: The shape, rows of a micro-batch, tokens of a row.
        dtype: "fp32", or "bf16" or "fp16" for autocast over fp32 masters.
        ops: What `kernels.parse_ops` reads.
        compiled: torch.compile; the eager loss then adds its chunks up out of place.
        working_copies: The optimizer keeps bf16 copies of the blocks' matrices.
        num_micro_batches: From the second on, gradients are there during forward.
        residual: Dtype of the residual stream, "fp32" or "bf16".
        shards: Ranks that share AdamW's state out, a parameter to one of them.
        recompute: Blocks compute their forward again in the backward.
        full: They share out the blocks' matrices, with their gradients and moments, by rows.

    Raises:
        ValueError: a size below 1, or a dtype or ops that do not exist.
    """
    for name, value in (("rows", rows), ("T", T), ("num_micro_batches", num_micro_batches)):
        if value < 1:
            raise ValueError(f"memory: {name} must be at least 1, got {value}")
    halves = ("fp32", "bf16", *(["fp16"] if residual == "fp32" else []))
    for name, value in (("dtype", dtype), ("residual", residual)):
        if value not in halves:
            raise ValueError(f"memory: {name} must be one of {halves}, got {value!r}")
    ours = {op for op, backend in read_ops(ops).items() if backend == "triton"}
    M, C, H, L = rows * T, config.n_embd, config.n_head, config.n_layer
    e, r = (4, 4) if dtype == "fp32" else (2, 2 if residual == "bf16" else 4)
    tables = 2 if "embedding" in ours and config.dropout == 0 else 3
    head = 4 * config.padded_vocab_size * C  # the tied embedding, fp32
    matrices = 12 * C * C * L
    num_parameters = head // 4 + config.block_size * C + matrices + 13 * C * L + 2 * C
    working = 2 * matrices if working_copies else 0

    layer = M * (2 * r * C + 14 * e * C + 2 * 8 + 4 * H)
    once = M * (8 + r * C + 8 + e * C) + head
    if config.dropout > 0:
        once, layer = once + M * C, layer + 2 * M * C  # masks
    if dtype != "fp32" and not working and not full:
        layer += 2 * matrices // L  # casts
    # A block's inputs; the first one's residual is the first norm's input.
    kept = L * (e + r) * M * C - r * M * C
    activations = once + (kept if recompute else L * layer)
    again = layer if recompute else 0

    loss = e * M * C + (head // 2 if dtype != "fp32" else 0)
    if "linear_cross_entropy" not in ours:
        R = min(M, CHUNK_TOKENS)
        loss += e * R * config.padded_vocab_size  # dz takes the place of z
        if compiled or read_ops(ops)["linear_cross_entropy"] == "compiled":
            loss += head if M > R else 0
        elif dtype != "fp32":
            loss += head // 2  # a product on its way into the sum
    else:
        from kernels.linear_cross_entropy import chunk_rows  # needs triton, as these ops do

        logits = chunk_rows(M, config.padded_vocab_size, e) * config.padded_vocab_size
        loss += e * logits
    whole = weights = 4 * num_parameters
    if full:
        weights -= 4 * matrices - 4 * matrices // shards
    folded = working if num_micro_batches > 1 else 0  # bf16 gradients on their way into fp32 ones
    grads = weights if folded or not working else weights - working
    before = grads if num_micro_batches > 1 else 0
    moments = {
        "loss": before + activations + loss,
        "turn": before + activations + head + e * M * C,
        "mlp": before + activations + again + (5 if e < r else 4) * e * M * C + 8 * e * C * C,
        "bottom": max(before, grads - head) + folded + tables * head + r * M * C,
        "update": weights,
    }
    moments_bytes = 2 * weights
    if full:
        working = (3 * e + 4) * matrices // L
    else:
        moments_bytes = 2 * max(whole // shards, head)  # the embedding is one parameter of one rank
        weights -= max(0, 2 * working - whole // shards)  # the rank that owns no embedding
    if shards > 1:
        moments["gather"] = whole - weights
    peak = max(moments, key=lambda name: moments[name])
    beside = {"bottom": max(before, grads - head), "update": grads, "gather": 0}
    beside = beside.get(peak, before + activations)
    workspace = moments[peak] - beside
    return MemoryEstimate(
        weights, grads, moments_bytes, working, activations, workspace, peak, tuple(moments.items())
    )
