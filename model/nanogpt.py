"""Reads nanoGPT's ckpt.pt without running code in it."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from model.edge import is_int, quoted
from model.flops import num_parameters
from model.gpt import GPT
from model.hf import GPT2_VOCAB, TRANSPOSED, build, canonical, file_shapes, make_config


def _load(file: Path) -> dict:
    """What torch.save wrote, checked to be a dict of tensors and plain values."""
    if not file.exists():
        raise FileNotFoundError(f"import-nanogpt: no such file: {file}")
    if not file.is_file():
        raise ValueError(f"import-nanogpt: {file} is not a regular file; name the .pt file itself")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        content = None if foreign else torch.load(file, "cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError):
        # torch's own message has several lines, with escape codes and advice to run the pickle.
        raise ValueError(
            f"import-nanogpt: {file} is no checkpoint as torch.save has written them since torch "
            "1.6, or it is damaged; a newer torch loads an old one and saves it again"
        ) from None
    if foreign:
        raise ValueError(
            f"import-nanogpt: {file} holds more than tensors and plain values and was not loaded: "
            f"its classes are {', '.join(map(quoted, foreign[:3]))}. build-nanogpt keeps its sizes "
            "that way; in the program that wrote it save {'model': model.state_dict(), "
            "'model_args': vars(config)} and import that"
        )
    if not isinstance(content, dict):
        raise ValueError(f"import-nanogpt: {file} must hold a dict, got {quoted(type(content))}")
    return content


def load_nanogpt(path: str | Path) -> GPT:
    """A model from nanoGPT's ckpt.pt.

    The file is unpickled with weights_only, so it cannot run code. Matmul weights are (out, in)
    there. A vocabulary padded to 50304 is cropped to 50257; models without biases get zeros.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a nanoGPT checkpoint, or a missing, unknown or misshapen tensor.
    """
    file = Path(path)
    checkpoint = _load(file)
    state, args = checkpoint.get("model"), checkpoint.get("model_args")
    if not isinstance(state, dict) or not isinstance(args, dict):
        raise ValueError(
            f"import-nanogpt: {file} is not a nanoGPT checkpoint: expected 'model' and 'model_args'"
            f", got {', '.join(map(quoted, [*checkpoint][:5]))}"
        )
    size, T = args.get("vocab_size"), args.get("block_size")
    cropped = GPT2_VOCAB if is_int(size) and size == 50304 else size
    where = f"import-nanogpt: {file}: 'model_args'"
    config = make_config(where, args, block_size=T, vocab_size=cropped)
    # A tensor may claim any shape over a few bytes. No sensible dtype has less than two a weight.
    if file.stat().st_size < 2 * num_parameters(config):
        raise ValueError(
            f"import-nanogpt: {file} has {file.stat().st_size:,} bytes, too few for the "
            f"{num_parameters(config):,} weights of its sizes"
        )
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        tensor = isinstance(value, Tensor) and value.is_floating_point()
        dense = tensor and value.layout == torch.strided and value.device.type == "cpu"
        if not (isinstance(key, str) and dense):
            raise ValueError(
                f"import-nanogpt: {file}: {quoted(key)} must name a dense tensor of floats"
            )
        if name := canonical(key):
            tensors[name] = value.t() if name.endswith(TRANSPOSED) and value.ndim == 2 else value
    bias = args.get("bias", True)
    if not (isinstance(bias, Tensor) or bias):  # a config file may say 0
        for name, shape in file_shapes(config).items():
            if name.endswith(".bias"):
                tensors.setdefault(name, torch.zeros(shape))
    return build(file, config, tensors)
