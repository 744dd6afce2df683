"""What a GPT-2 is: sizes and nothing about how it is trained or run."""

from dataclasses import dataclass

VOCAB_MULTIPLE = 128  # GEMM tiles and 16-byte rows want an even vocabulary: 50257 -> 50304


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2.

    Args:
        block_size: Positions the model has (n_positions in GPT-2's config.json).
        vocab_size: Real tokens. The embedding table is padded inside; see `padded_vocab_size`.
        n_layer, n_head, n_embd: Depth, heads, width C.
        dropout: Probability on embeddings, attention weights and residual branches.
        layer_norm_epsilon: Added to the variance in every LayerNorm.

    Raises:
        ValueError: a size is not positive, n_embd is not divisible by n_head, or dropout is
            outside [0, 1).
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"model: {name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model: n_embd must be divisible by n_head, got n_embd {self.n_embd}, "
                f"n_head {self.n_head}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model: dropout must be in [0, 1), got {self.dropout}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to a multiple of 128."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


# Radford et al. 2019, table 2, with the parameter counts of the released weights.
MODELS: dict[str, GPTConfig] = {
    "124m": GPTConfig(),
    "350m": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "774m": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "1558m": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
    # Ours, for CPUs and tests; every one keeps GPT-2's vocabulary.
    "small": GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384),
    "mini": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256),
    "tiny": GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128),
    "smoke": GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64),
}
