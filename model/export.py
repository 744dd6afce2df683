"""Writes a model as a Hugging Face folder that transformers and lm-eval read without a network."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.config import GPTConfig
from model.edge import quoted
from model.files import read_object, replacing
from model.find import WEIGHTS
from model.flops import num_parameters
from model.gpt import GPT
from model.hf import CONFIG, CONTEXTS, GPT2_VOCAB, file_tensors

# All that an export writes. Into a folder that holds anything else nothing is written.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
EXPORTED = (CONFIG, "generation_config.json", "README.md", *TOKENIZER, WEIGHTS)
PARTIAL = ".export-"  # an export in the making


def _write_json(path: Path, content: Mapping[str, Any], indent: int | None = 2) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def hf_config(model: GPT, dtype: torch.dtype, config: GPTConfig | None = None) -> dict[str, Any]:
    """GPT-2's config.json of a model, or of `config` where the file has another shape.

    The contexts are ours; transformers carries them along.
    """
    config = config or model.config
    eot = GPT2_VOCAB - 1 if config.vocab_size >= GPT2_VOCAB else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("scale_attn_weights", "tie_word_embeddings", "use_cache"), True),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot),
        "dtype": str(dtype).removeprefix("torch."),
        **{key: getattr(model, key) for key in CONTEXTS},
    }


def _write_tokenizer(folder: Path, model_max_length: int) -> None:
    """GPT-2's tokenizer in the files AutoTokenizer reads, from the vocabulary tiktoken uses."""
    from model.tokenizer import END_OF_TEXT, vocab_files

    encoder, merges = vocab_files()
    vocab: dict[str, int] = json.loads(encoder.read_text(encoding="utf-8"))
    merges_text = merges.read_text(encoding="utf-8")
    pairs = [line.split() for line in merges_text.splitlines()[1:] if line]  # line 1: #version
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    special = {
        **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        "id": vocab[END_OF_TEXT],
        "content": END_OF_TEXT,
        "normalized": True,
        "special": True,
    }
    whole = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding")),
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "trim_offsets": True},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        "model_max_length": model_max_length,
    }
    # Nobody reads 50,000 lines, and indenting them takes ten times as long.
    _write_json(folder / "tokenizer.json", whole, indent=None)
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "vocab.json", vocab, indent=None)
    (folder / "merges.txt").write_text(merges_text, encoding="utf-8")


def model_card(model: GPT, config: GPTConfig) -> str:
    """README.md of a model folder; says which positions training has seen."""
    context, tuned, params = config.block_size, model.fine_tuned_context, num_parameters(config)
    sizes = (
        f"{params:,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} wide, {context} positions, {config.vocab_size:,} tokens."
    )
    window = (
        f"It was trained at a context of {context} tokens. Prompt and continuation together hold "
        f"at most that many; for longer text crop the prompt or slide the window."
    )
    if tuned is not None and tuned < context:
        window += (
            f" Its last training was at {tuned} tokens: positions from {tuned} to {context - 1} "
            f"are those of the training before."
        )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n---\n\n"
        f"# GPT-2, {params / 1e6:.0f}M parameters\n\n{sizes}\n\n"
        f"## Trained context\n\n{window}\n\n"
        "## Use\n\n```python\n"
        "from transformers import AutoTokenizer, GPT2LMHeadModel\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        'model = GPT2LMHeadModel.from_pretrained("PATH")\n'
        'inputs = tokenizer("The ", return_tensors="pt")\n'
        f"print(tokenizer.decode(model.generate(**inputs, max_length={context})[0]))\n```\n"
    )


def check_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is not there, empty, or holds an earlier export alone."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"save_pretrained: {folder} is a link to {folder.readlink()}, which is not there; "
            "make that folder, or name another"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file; name a folder")
    inside = [*folder.iterdir()] if folder.is_dir() else []
    names = [p.name for p in inside if not p.name.startswith(PARTIAL)]
    foreign = [n for n in names if n not in EXPORTED or (folder / n).is_symlink()]
    if names and not foreign and "trained_context" not in read_object(folder / CONFIG):
        foreign = names
    if foreign:
        raise ValueError(
            f"save_pretrained: {folder} must be new, empty or an earlier export, and it holds "
            f"{quoted(min(foreign))}; move that, or name another folder"
        )


@torch.no_grad()
def save_pretrained(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that GPT2LMHeadModel and AutoTokenizer load; an earlier export is replaced.

    It has the positions that were trained and no others: what reads a GPT-2 takes its positions for
    the context it can use. Everything is written beside it first and the weights come last, so a
    folder with model.safetensors is whole. `model` is not what torch.compile returned.

    Raises:
        ValueError: another dtype, a weight that is not finite in it, or the path is a file or a
            folder with something else in it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"save_pretrained: dtype must be fp32, bf16 or fp16, got {dtype}")
    if path == "":
        raise ValueError("save_pretrained: the path is empty; name a folder")
    folder = Path(path)
    check_folder(folder)
    config = replace(model.config, block_size=min(model.trained_context, model.config.block_size))
    tensors: dict[str, Tensor] = {}
    for name, tensor in file_tensors(model).items():
        rows = config.block_size if name.endswith("wpe.weight") else None
        tensors[name] = tensor[:rows].to("cpu", dtype).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(
                f"save_pretrained: {name} is not finite in {dtype}; nothing is written"
            )
    # Beside a folder that is not there yet is the nearest one that is.
    beside = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    with tempfile.TemporaryDirectory(dir=beside, prefix=PARTIAL) as name:
        partial = Path(name)
        whole = hf_config(model, dtype, config)
        _write_json(partial / CONFIG, whole)
        generation = {key: whole[key] for key in ("bos_token_id", "eos_token_id")}
        generation["max_length"] = config.block_size
        _write_json(partial / "generation_config.json", generation)
        (partial / "README.md").write_text(model_card(model, config), encoding="utf-8")
        if config.vocab_size == GPT2_VOCAB:
            _write_tokenizer(partial, config.block_size)
        try:
            with replacing(partial / WEIGHTS) as file:  # whose mode is the umask's
                save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:  # no space, for one
            raise OSError(f"save_pretrained: {folder}: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        for file in EXPORTED:  # the weights, which come last, must never be of another model
            (folder / file).unlink(missing_ok=True)
        for file in EXPORTED:
            if (partial / file).exists():
                os.replace(partial / file, folder / file)
