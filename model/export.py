"""Writes a model as a Hugging Face folder that transformers and lm-eval read offline."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.edge import quoted
from model.files import read_object, replacing
from model.find import CONFIG, WEIGHTS
from model.flops import num_parameters
from model.gpt import GPT
from model.hf import CONTEXTS, GPT2_VOCAB, file_tensors

# All files of an export. Nothing is written into a folder that holds anything else.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
EXPORTED = (CONFIG, "generation_config.json", "README.md", *TOKENIZER, WEIGHTS)
PARTIAL = ".export-"  # an unfinished export

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# GPT-2, {millions:.0f}M parameters

{parameters:,} parameters: {n_layer} layers, {n_head} heads, {n_embd} wide, {context} positions, \
{vocab_size:,} tokens.

## Trained context

It was trained with a context of {context} tokens. Prompt and continuation together may have at \
most that many; for longer text crop the prompt or slide the window.{tuned}

## Use

```python
from transformers import AutoTokenizer, GPT2LMHeadModel

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = GPT2LMHeadModel.from_pretrained("PATH")
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_length={context})[0]))
```
"""
TUNED = (
    " Its last training used a context of {tuned} tokens: positions {tuned} to {last} are from the "
    "training before."
)


def hf_config(model: GPT, dtype: torch.dtype) -> dict[str, Any]:
    """GPT-2's config.json. The contexts are our fields; transformers preserves them."""
    config = model.config
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


def _json(content: Mapping[str, Any], indent: int | None = 2) -> str:
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"


def _tokenizer_files(model_max_length: int) -> dict[str, str]:
    """Name and content of the files AutoTokenizer reads, from the vocabulary tiktoken uses."""
    from model.tokenizer import END_OF_TEXT, vocab_files

    encoder, merges = (file.read_text(encoding="utf-8") for file in vocab_files())
    vocab: dict[str, int] = json.loads(encoder)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    special = {
        **dict.fromkeys(("single_word", "lstrip", "rstrip"), False),
        "id": vocab[END_OF_TEXT],
        "content": END_OF_TEXT,
        "normalized": True,
        "special": True,
    }
    pairs = [line.split() for line in merges.splitlines()[1:] if line]  # line 1: #version
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
    texts = (_json(whole, indent=None), _json(settings), _json(vocab, indent=None), merges)
    return dict(zip(TOKENIZER, texts, strict=True))


def _model_card(model: GPT, context: int) -> str:
    """README.md of a model folder; says which positions were trained."""
    parameters, tuned = num_parameters(replace(model.config, block_size=context)), ""
    if model.fine_tuned_context is not None and model.fine_tuned_context < context:
        tuned = TUNED.format(tuned=model.fine_tuned_context, last=context - 1)
    facts = {"millions": parameters / 1e6, "parameters": parameters, "context": context}
    return CARD.format(**asdict(model.config), **facts, tuned=tuned)


def check_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is missing, empty, or holds only an earlier export."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"export: {folder} is a link to {folder.readlink()}, which does not exist; "
            "make that folder, or name another"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export: {folder} is a file; name a folder")
    inside = [*folder.iterdir()] if folder.is_dir() else []
    names = [p.name for p in inside if not p.name.startswith(PARTIAL)]
    foreign = [n for n in names if n not in EXPORTED or (folder / n).is_symlink()]
    if names and not foreign and "trained_context" not in read_object(folder / CONFIG):
        foreign = names
    if foreign:
        raise ValueError(
            f"export: {folder} must be new, empty or an earlier export, but it holds "
            f"{quoted(min(foreign))}; move that, or name another folder"
        )


@torch.no_grad()
def save_pretrained(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that GPT2LMHeadModel and AutoTokenizer load; an earlier export is replaced.

    It has only the positions that were trained, because programs take a GPT-2's positions for its
    context. Everything is written beside it first, and the weights are moved in last, so a folder
    with model.safetensors is complete. `model` must not be what torch.compile returned.

    Raises:
        ValueError: the dtype is not fp32, bf16 or fp16, a weight is not finite in it, or the path
            is a file or a folder with something else in it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"export: dtype must be fp32, bf16 or fp16, got {dtype}")
    if path == "":
        raise ValueError("export: the path is empty; name a folder")
    folder = Path(path)
    check_folder(folder)
    context = min(model.trained_context, model.config.block_size)
    tensors: dict[str, Tensor] = {}
    for name, tensor in file_tensors(model).items():
        rows = context if name.endswith("wpe.weight") else None
        tensors[name] = tensor[:rows].to("cpu", dtype).contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"export: {name} is not finite in {dtype}; nothing is written")
    config = hf_config(model, dtype) | dict.fromkeys(("n_positions", "n_ctx"), context)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    texts = {
        CONFIG: _json(config),
        "generation_config.json": _json({**generation, "max_length": context}),
        "README.md": _model_card(model, context),
        **(_tokenizer_files(context) if model.config.vocab_size == GPT2_VOCAB else {}),
    }
    # The folder may not exist yet, so go up to one that does.
    beside = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    with tempfile.TemporaryDirectory(dir=beside, prefix=PARTIAL) as name:
        partial = Path(name)
        for file, text in texts.items():
            (partial / file).write_text(text, encoding="utf-8")
        try:
            with replacing(partial / WEIGHTS) as file:  # for the mode that the umask asks for
                save_file(tensors, file, metadata={"format": "pt"})
        except SafetensorError as error:  # for instance no space
            raise OSError(f"export: {folder}: {error}") from None
        folder.mkdir(parents=True, exist_ok=True)
        for file in EXPORTED:  # so that weights and config are never of two models
            (folder / file).unlink(missing_ok=True)
        for file in (*texts, WEIGHTS):
            os.replace(partial / file, folder / file)
