"""GPT-2 weights in and out, as Hugging Face folders.

A model folder holds model.safetensors, GPT-2's config.json and, for GPT-2's vocabulary, the
tokenizer, so transformers and lm-eval read it without a network. Three differences lie between
that layout and ours:

    matmul weights    (in, out) in the file, (out, in) in nn.Linear: transposed both ways
    embedding rows    vocab_size in the file, padded_vocab_size here: padded with 0, cropped
    names             as ours; older files lack the `transformer.` prefix and carry mask buffers

A folder may come from a stranger. Nothing is unpickled, no link out of it is followed, and names,
shapes, dtypes and values are checked before the model takes them.

Nothing here imports transformers (its look-up of a package named `kernels` would find ours).

    python -m model.hf import-nanogpt out/ckpt.pt --out runs/imported/model
    python -m model.hf export runs/shakespeare-cpu --out my-gpt2 --dtype bf16
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels import EAGER, Ops
from model.config import LARGEST, GPTConfig
from model.edge import check_int, exits, one_line, quoted
from model.files import replacing
from model.flops import num_parameters
from model.gpt import GPT

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# All that an export writes. Into a folder that holds anything else nothing is written.
EXPORTED = (CONFIG, "generation_config.json", "README.md", "tokenizer.json",
            "tokenizer_config.json", "vocab.json", "merges.txt", WEIGHTS)  # fmt: skip
PARTIAL = ".export-"  # an export in the making
MAX_JSON_BYTES = 16 << 20  # a config has 1 kB; the index of many shards has some 100
PREFIX = "transformer."
GPT2_VOCAB = 50257
GPT2_HEAD_DIM = 64  # every released size; used only where a weights file has no config.json
END_OF_TEXT = "<|endoftext|>"
# Stored (in, out) by GPT-2's Conv1D. attn.c_proj is square: forgetting it fails no shape check.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
CONTEXTS = ("trained_context", "fine_tuned_context")  # of a GPT, and in our config.json
FLOATS = ("F64", "F32", "F16", "BF16")
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
ERF_NOTE = (
    "note: these weights were trained with the erf form of GELU and run here with GPT-2's tanh "
    "form, so the loss changes slightly; fine-tune if that matters"
)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


# ---- reading


def find_model(path: str | Path) -> Path:
    """The folder or .safetensors file that holds the weights.

    Args:
        path: A model folder, a run folder (its `model/` is taken), or a .safetensors file.

    Raises:
        FileNotFoundError: nothing there, or no weights in it.
        ValueError: a file of another kind.
    """
    if path == "":
        raise ValueError("from_pretrained: the path is empty; name a run or a model folder")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"from_pretrained: no such file or folder: {path}")
    if not path.is_dir():
        if path.suffix == ".safetensors" and path.is_file():
            return path
        raise ValueError(
            f"from_pretrained: expected a folder or a .safetensors file, got {path}: "
            f"{describe_file(path)}"
        )
    folders = (path, path / "model")
    for folder in folders:
        if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
            return folder
    suffixes = (*FOREIGN, ".bin")
    other = next((f for d in folders for s in suffixes for f in sorted(d.glob(f"*{s}"))), None)
    raise FileNotFoundError(
        f"from_pretrained: {path} has neither {WEIGHTS} nor {INDEX}, nor a folder model/ with one"
        + (f"; it has {other.name}: {describe_file(other)}" if other else "")
    )


_PICKLE = (
    "a pickle, which can run code when it is read; `python -m model.hf import-nanogpt FILE --out "
    "DIR` converts a nanoGPT checkpoint; of a file you trust, transformers loads the folder and "
    "writes safetensors with save_pretrained"
)
_CONVERT = f"; the library that wrote it can convert it, or look for {WEIGHTS} where it came from"
FOREIGN = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".pkl"), _PICKLE),
    ".h5": f"weights for TensorFlow{_CONVERT}",
    ".msgpack": f"weights for Flax{_CONVERT}",
    ".onnx": f"an ONNX graph{_CONVERT}",
    ".gguf": f"weights for llama.cpp{_CONVERT}",
}
# What a file begins with says more than its name.
_SIGNATURES = {
    b"version https://git-lfs": "a pointer of Git LFS, not the weights; `git lfs pull` gets them",
    **dict.fromkeys((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"), _PICKLE),
    b"\x89HDF": FOREIGN[".h5"],
    b"GGUF": FOREIGN[".gguf"],
    b"<": "a web page; download the file itself",
}


def describe_file(file: Path) -> str:
    """What a file is that is no safetensors file, and what to do about it."""
    if not file.is_file():
        return "not a regular file"
    with open(file, "rb") as handle:
        start = handle.read(64)
    known = (what for signature, what in _SIGNATURES.items() if start.startswith(signature))
    return next(known, FOREIGN.get(file.suffix, "not in the safetensors format, or damaged"))


def _regular(file: Path, named: Path) -> Path:
    """`file`, once it is known to be a regular file in the folder a person named.

    Links that leave it are not followed, but for those of the hub's cache (snapshots/<revision>/
    beside blobs/).

    Raises:
        FileNotFoundError, ValueError: it is not.
    """
    if not file.exists():
        raise FileNotFoundError(f"from_pretrained: no such file: {file}")
    target, folder = file.resolve(), named.resolve()
    cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    if not (cached or folder in target.parents):
        raise ValueError(f"from_pretrained: {file} is a link out of {named}; copy the file there")
    if not target.is_file():
        raise ValueError(f"from_pretrained: {file} is not a regular file")
    return file


def _read_json(path: Path) -> dict[str, Any]:
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(
            f"from_pretrained: {path} has {size:,} bytes, at most {MAX_JSON_BYTES:,} are read"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"from_pretrained: {path} must hold a JSON object")
    return content


def _read_config(path: Path) -> tuple[GPTConfig, dict[str, int]]:
    """GPT-2's config.json -> our config, and the contexts it was trained at (see `GPT`)."""
    raw = _read_json(path)
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"from_pretrained: {path} is a {quoted(raw['model_type'])}, not a 'gpt2'")
    try:
        config = GPTConfig(
            block_size=raw.get("n_positions", raw.get("n_ctx", 1024)),
            vocab_size=raw.get("vocab_size", GPT2_VOCAB),
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
        )
    except KeyError as error:
        raise ValueError(f"from_pretrained: {path} lacks the key {error}") from None
    except ValueError as error:
        raise ValueError(f"from_pretrained: {path}: {error}") from None
    # Each of these changes the function computed; silence would be a wrong model.
    fixed = {
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
        "add_cross_attention": (False,),
        "activation_function": (*TANH_GELU, "gelu"),
    }
    for key, accepted in fixed.items():
        if key in raw and raw[key] not in accepted:
            raise ValueError(
                f"from_pretrained: {path}: {key} must be one of {list(accepted)}, "
                f"got {quoted(raw[key])}"
            )
    if raw.get("activation_function") == "gelu":
        _note(ERF_NOTE)
    contexts = {key: raw[key] for key in CONTEXTS if raw.get(key) is not None}
    for key, value in contexts.items():
        check_int(f"from_pretrained: {path}", key, value, 1, LARGEST["block_size"])
    return config, {key: min(value, config.block_size) for key, value in contexts.items()}


def _guess_config(path: Path, shapes: Mapping[str, list[int]]) -> GPTConfig:
    """A config from shapes alone; only the head count is a convention and not a fact."""
    try:
        V, C = shapes["wte.weight"]
        T, _ = shapes["wpe.weight"]
    except (KeyError, ValueError):
        raise ValueError(
            f"from_pretrained: {path} has no config.json beside it and no wte and wpe to read "
            f"a GPT-2's sizes from"
        ) from None
    layers = {name.split(".")[1] for name in shapes if name.startswith("h.")}
    if C % GPT2_HEAD_DIM:
        raise ValueError(
            f"from_pretrained: {path} has no config.json beside it; n_head cannot be guessed "
            f"for n_embd {C} (not a multiple of {GPT2_HEAD_DIM}); put a config.json there"
        )
    return GPTConfig(T, V, len(layers), C // GPT2_HEAD_DIM, C)


def _weight_files(source: Path, named: Path) -> list[Path]:
    """One file, or the shards an index names."""
    if source.is_file():
        return [source]
    if (source / WEIGHTS).exists():
        return [_regular(source / WEIGHTS, named)]
    index = _regular(source / INDEX, named)
    weight_map = _read_json(index).get("weight_map")
    names = [*weight_map.values()] if isinstance(weight_map, dict) else []
    for name in names:
        if not isinstance(name, str) or {*"/\\\0"} & {*name}:  # or it might leave its folder
            raise ValueError(f"from_pretrained: {index} names no file: {quoted(name)}")
    return [_regular(source / name, named) for name in sorted({*names})]


def canonical(name: str) -> str | None:
    """A file's tensor name without prefixes; None for mask buffers of older versions."""
    name = name.removeprefix("_orig_mod.").removeprefix(PREFIX)
    return None if name.endswith(MASK_BUFFERS) else name


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"from_pretrained: {file} is not a safetensors file: {describe_file(file)} "
            f"({one_line(error, 160)})"
        ) from None


def _read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with _open(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name = canonical(key)
                if name is not None:
                    yield name, handle.get_tensor(key)


def _read_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        with _open(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name, tensor = canonical(key), handle.get_slice(key)
                if name is None:
                    continue
                if name in shapes:
                    raise ValueError(f"from_pretrained: {file} repeats the tensor {quoted(name)}")
                if tensor.get_dtype() not in FLOATS:
                    raise ValueError(
                        f"from_pretrained: {file}: {quoted(name)} must be one of "
                        f"{', '.join(FLOATS)}, got {tensor.get_dtype()}"
                    )
                shapes[name] = tensor.get_shape()
    return shapes


def _file_shape(name: str, config: GPTConfig, shape: torch.Size) -> list[int]:
    """Shape in the file of a parameter that has `shape` here."""
    if name.endswith(TRANSPOSED):
        return [shape[1], shape[0]]
    return [config.vocab_size, shape[1]] if name == "wte.weight" else [*shape]


def check_shapes(where: str, config: GPTConfig, shapes: Mapping[str, list[int]]) -> None:
    """Every tensor there, of the right shape in the file, and none that nobody would read."""
    with torch.device("meta"):
        ours = our_tensors(GPT(config))
    expected = {name: _file_shape(name, config, p.shape) for name, p in ours.items()}
    missing = sorted(expected.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - expected.keys() - {"lm_head.weight"})
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"from_pretrained: {where} {what} "
                f"{', '.join(one_line(name, 80) for name in names[:5])}{more} "
                f"(for {config.n_layer} layers, n_embd {config.n_embd})"
            )
    expected["lm_head.weight"] = expected["wte.weight"]
    for name, shape in shapes.items():
        rows = shape
        if name in ("wte.weight", "lm_head.weight") and shape[:1] > expected[name][:1]:
            rows = [config.vocab_size, *shape[1:]]  # of a padded vocabulary; cropped
        if rows != expected[name]:
            raise ValueError(
                f"from_pretrained: {where}: {name} must be {tuple(expected[name])} to match its "
                f"config, got {tuple(shape)}"
            )


@torch.no_grad()
def build(
    where: str,
    config: GPTConfig,
    ops: Ops,
    tensors: Iterable[tuple[str, Tensor]],
    transposed: bool,
) -> GPT:
    """A GPT with these tensors (checked before); nothing is initialised only to be overwritten."""
    with torch.device("meta"):
        model = GPT(config, ops)
    model.to_empty(device="cpu")
    ours = our_tensors(model)
    wte = ours["wte.weight"]
    wte[config.vocab_size :].zero_()
    head: Tensor | None = None
    for name, tensor in tensors:
        if name == "lm_head.weight":
            head = tensor[: config.vocab_size]
            continue
        turn = transposed and name.endswith(TRANSPOSED)
        target = wte[: config.vocab_size] if name == "wte.weight" else ours[name]
        target.copy_(tensor.t() if turn else tensor[: len(target)])
        if not torch.isfinite(target).all():
            raise ValueError(
                f"from_pretrained: {where}: {name} holds values that are not finite; the training "
                f"that wrote it failed, or the file is damaged"
            )
    if head is not None and not torch.equal(head.to(wte.dtype), wte[: config.vocab_size]):
        raise ValueError(
            f"from_pretrained: {where}: lm_head.weight differs from wte.weight; GPT-2's head is "
            f"tied, an untied one is not supported"
        )
    return model


def our_tensors(model: GPT) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): p for name, p in model.named_parameters()}


def from_pretrained(path: str | Path, ops: Ops = EAGER) -> GPT:
    """A model from a GPT-2 folder, one of our run folders, or a safetensors file.

    Args:
        path: See `find_model`. Without a config.json beside a file the sizes are read from the
            shapes, with heads of 64.
        ops: The op set of the model.

    Returns:
        The model in fp32 on the CPU, in training mode as a new one; `trained_context` is the
        file's, or all positions.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another architecture; a link out of the folder; a missing, unknown or misshapen
            tensor, one of integers, or one with values that are not finite.
    """
    source, files, shapes, config, contexts = _look_at(path)
    check_shapes(str(source), config, shapes)
    model = build(str(source), config, ops, _read_tensors(files), transposed=True)
    for key, value in contexts.items():
        setattr(model, key, value)
    return model


def read_config(path: str | Path) -> GPTConfig:
    """The shape of what `from_pretrained` would read, without its weights; same errors."""
    return _look_at(path)[3]


def _look_at(path: str | Path):
    """Where the model is, its files, the shapes in them, its config and its contexts."""
    source = find_model(path)
    named = Path(path) if Path(path).is_dir() else source.parent
    files = _weight_files(source, named)
    shapes = _read_shapes(files)
    config_file = (source.parent if source.is_file() else source) / CONFIG
    if config_file.exists():
        return source, files, shapes, *_read_config(_regular(config_file, named))
    if not source.is_file():
        raise FileNotFoundError(f"from_pretrained: {source} has weights but no config.json")
    return source, files, shapes, _guess_config(source, shapes), {}


# ---- writing


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": str(dtype).removeprefix("torch."),
        **{key: getattr(model, key) for key in CONTEXTS},
    }


def _write_tokenizer(folder: Path, model_max_length: int) -> None:
    """GPT-2's tokenizer in the files AutoTokenizer reads, from the vocabulary tiktoken uses."""
    from model.tokenizer import vocab_files

    encoder, merges = vocab_files()
    vocab: dict[str, int] = json.loads(encoder.read_text(encoding="utf-8"))
    merges_text = merges.read_text(encoding="utf-8")
    pairs = [line.split() for line in merges_text.splitlines()[1:] if line]  # line 1: #version
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": vocab[END_OF_TEXT],
                    "content": END_OF_TEXT,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": True,
                    "special": True,
                }
            ],
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "trim_offsets": True},
            "post_processor": {**byte_level, "trim_offsets": False},
            "decoder": {**byte_level, "trim_offsets": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": pairs,
            },
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "model_max_length": model_max_length,
        },
    )
    _write_json(folder / "vocab.json", vocab)
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


def file_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by the name and in the layout of a file; views of the parameters, no copies."""
    tensors: dict[str, Tensor] = {}
    for name, p in our_tensors(model).items():
        view = p.detach()[: model.config.vocab_size] if name == "wte.weight" else p.detach()
        tensors[PREFIX + name] = view.t() if name.endswith(TRANSPOSED) else view
    return tensors


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError where `folder` holds anything that no export wrote."""
    entries = [p for p in folder.iterdir() if not p.name.startswith(PARTIAL)]
    foreign = [p.name for p in entries if p.is_symlink() or p.name not in EXPORTED]
    if entries and not foreign:
        try:
            ours = "trained_context" in _read_json(folder / CONFIG)
        except (OSError, ValueError):
            ours = False
        foreign = [] if ours else [entries[0].name]
    if foreign:
        raise ValueError(
            f"save_pretrained: {folder} must be new, empty or an earlier export, and it holds "
            f"{quoted(min(foreign))}; name another folder"
        )


@torch.no_grad()
def save_pretrained(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that GPT2LMHeadModel and AutoTokenizer load.

    It has the positions that were trained and no others: what reads a GPT-2 takes its positions for
    the context it can use.

    Args:
        model: The model itself, not what torch.compile returned.
        path: Folder, made if needed; an earlier export in it is replaced. Everything is written
            beside it first and the weights come last, so a folder with model.safetensors is whole.
        dtype: torch.float32, torch.bfloat16 or torch.float16.

    Raises:
        ValueError: another dtype, a weight that is not finite in it, or the path is a file or a
            folder with something else in it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"save_pretrained: dtype must be fp32, bf16 or fp16, got {dtype}")
    if path == "":
        raise ValueError("save_pretrained: the path is empty; name a folder")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file; name a folder")
    if folder.exists():
        _refuse_foreign(folder)
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
        _write_json(partial / CONFIG, hf_config(model, dtype, config))
        eot = GPT2_VOCAB - 1 if config.vocab_size >= GPT2_VOCAB else None
        _write_json(
            partial / "generation_config.json",
            {"bos_token_id": eot, "eos_token_id": eot, "max_length": config.block_size},
        )
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


# ---- command line


def main(args: list[str] | None = None) -> None:
    """`python -m model.hf`: import-nanogpt and export."""
    import tyro  # not needed by who only loads a model

    from model.nanogpt import load_nanogpt  # which imports this module

    app = tyro.extras.SubcommandApp()

    @app.command(name="import-nanogpt")
    def import_nanogpt(file: tyro.conf.Positional[str], out: str) -> None:
        """Convert a nanoGPT ckpt.pt into a model folder.

        Args:
            file: The checkpoint.
            out: Folder to write.
        """
        model = load_nanogpt(file)
        _note(ERF_NOTE)
        model.save_pretrained(out)
        print(f"{out}: {model.num_parameters():,} parameters, context {model.trained_context}")

    @app.command
    def export(
        path: tyro.conf.Positional[str],
        out: str,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        """Write a run or a model as a Hugging Face folder, in another dtype if asked.

        Args:
            path: A run, a checkpoint, a model folder or a .safetensors file.
            out: Folder to write: new, empty, or an earlier export.
            dtype: Of the weights written.
        """
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        from_pretrained(path).save_pretrained(out, dtypes[dtype])
        print(f"{out}: written in {dtype}")

    with exits():
        app.cli(prog="python -m model.hf", args=args)


if __name__ == "__main__":
    main()
