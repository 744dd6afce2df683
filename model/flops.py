"""Model flops and the peak rates they are compared with.

Two formulas are in use in the field and differ by about 6% for GPT-2 124M, so both are named:

    palm:  6 * (N - wpe) + 12 * L * C * T    nanoGPT and the PaLM paper; attention not halved
    llmc:  6 * N + 6 * L * C * T             llm.c; causal attention counted once

per token, forward and backward, N with the tied embedding counted once.
"""

from model.config import GPTConfig

# Dense bf16 TFLOP/s without sparsity, vendors' datasheets; matched as a part of the device name.
PEAK_BF16_TFLOPS: dict[str, float] = {
    "B200": 2250.0,
    "H200": 989.5,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
    "T4": 65.0,
}


def num_parameters(config: GPTConfig) -> int:
    """Parameters of a GPT-2 of this shape, padding rows not counted."""
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


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name; None when the name is unknown."""
    return next((peak for key, peak in PEAK_BF16_TFLOPS.items() if key in device_name), None)


def mfu(config: GPTConfig, T: int, tokens_per_s: float, device_name: str) -> float | None:
    """Model flops utilisation in [0, 1] by the palm form; None for an unknown device."""
    peak = peak_tflops(device_name)
    return None if peak is None else flops_per_token(config, T) * tokens_per_s / (peak * 1e12)
