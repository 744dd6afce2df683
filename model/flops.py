"""Model flops.

Two formulas are in use in the field and differ by about 6% for GPT-2 124M, so both are named:

    palm:  6 * (N - wpe) + 12 * L * C * T    nanoGPT and the PaLM paper; attention not halved
    llmc:  6 * N + 6 * L * C * T             llm.c; causal attention counted once

per token, forward and backward, N with the tied embedding counted once.
"""

from model.config import GPTConfig


def num_parameters(config: GPTConfig) -> int:
    """Parameters of a GPT-2 of this shape, without padding rows."""
    C, L = config.n_embd, config.n_layer
    block = 12 * C * C + 13 * C  # c_attn, c_proj, c_fc, c_proj with biases; two LayerNorms
    return (config.vocab_size + config.block_size) * C + L * block + 2 * C


def flops_per_token(config: GPTConfig, T: int, form: str = "palm") -> float:
    """Flops of one token's forward and backward at sequence length T.

    Args:
        config: The shape.
        T: Sequence length trained at.
        form: "palm" or "llmc"; see the module docstring.
    """
    N, L, C = num_parameters(config), config.n_layer, config.n_embd
    if form == "palm":
        return 6.0 * (N - config.block_size * C) + 12.0 * L * C * T
    if form == "llmc":
        return 6.0 * N + 6.0 * L * C * T
    raise ValueError(f"flops: form must be 'palm' or 'llmc', got {form!r}")
