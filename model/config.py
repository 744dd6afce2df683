"""The sizes of a GPT-2, but not how it is trained or run."""

from dataclasses import dataclass

from model.edge import check_int, is_real, quoted

VOCAB_MULTIPLE = 128  # GEMM tiles and 16-byte rows need a padded vocabulary: 50257 -> 50304
# Far above any GPT-2, so that a stranger's config.json cannot allocate without limit.
LARGEST = {
    "block_size": 1 << 20,
    "vocab_size": 1 << 20,
    "n_layer": 1000,
    "n_head": 1 << 16,
    "n_embd": 1 << 16,
}


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2.

    Args:
        block_size: Number of positions (n_positions in GPT-2's config.json).
        vocab_size: Real tokens. The embedding table is padded inside; see `padded_vocab_size`.
        n_layer, n_head, n_embd: Depth, heads, width C.
        dropout: Probability on embeddings, attention weights and residual branches.
        layer_norm_epsilon: Added to the variance in every LayerNorm.

    Raises:
        ValueError: a size is not a whole number from 1 to its limit, n_embd is not divisible by
            n_head, or dropout or layer_norm_epsilon is outside its range.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            check_int("model", name, getattr(self, name), 1, most)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"model: n_embd must be divisible by n_head, got n_embd {self.n_embd}, "
                f"n_head {self.n_head}"
            )
        if not (is_real(self.dropout) and 0.0 <= self.dropout < 1.0):
            raise ValueError(f"model: dropout must be in [0, 1), got {quoted(self.dropout)}")
        epsilon = self.layer_norm_epsilon
        if not (is_real(epsilon) and 0.0 < epsilon < 1.0):
            raise ValueError(f"model: layer_norm_epsilon must be in (0, 1), got {quoted(epsilon)}")

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
    # Our own, for CPUs and tests, with GPT-2's vocabulary.
    "small": GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384),
    "mini": GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256),
    "tiny": GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128),
    "smoke": GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=64),
}
