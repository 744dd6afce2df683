"""GPT-2 weights in and out: Hugging Face folders and nanoGPT checkpoints.

A model folder holds model.safetensors, GPT-2's config.json and, for GPT-2's vocabulary, the
tokenizer, so transformers and lm-eval read it without a network. Three differences lie between
that layout and ours:

    matmul weights    (in, out) in the file, (out, in) in nn.Linear: transposed both ways
    embedding rows    vocab_size in the file, padded_vocab_size here: padded with 0, cropped
    names             as ours; older files lack the `transformer.` prefix and carry mask buffers

Nothing here imports transformers (its look-up of a package named `kernels` would find ours).

    python -m model.hf import-nanogpt out/ckpt.pt --out runs/imported/model
    python -m model.hf export runs/shakespeare-cpu --out my-gpt2 --dtype bf16
"""

import json
import pickle
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kernels import EAGER, Ops
from model.config import GPTConfig
from model.files import replacing, write_atomically
from model.gpt import GPT

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREFIX = "transformer."
GPT2_VOCAB = 50257
GPT2_HEAD_DIM = 64  # every released size; used only where a weights file has no config.json
END_OF_TEXT = "<|endoftext|>"
# Stored (in, out) by GPT-2's Conv1D. attn.c_proj is square: forgetting it fails no shape check.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
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
    path = Path(path)
    if path.is_file():
        if path.suffix == ".safetensors":
            return path
        raise ValueError(
            f"from_pretrained: expected a folder or a .safetensors file, got {path} (a nanoGPT "
            f"checkpoint is converted by `python -m model.hf import-nanogpt {path} --out DIR`)"
        )
    if not path.exists():
        raise FileNotFoundError(f"from_pretrained: no such file or folder: {path}")
    for folder in (path, path / "model"):
        if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
            return folder
    raise FileNotFoundError(
        f"from_pretrained: {path} has neither {WEIGHTS} nor {INDEX}, nor a folder model/ with one"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"from_pretrained: {path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"from_pretrained: {path} must hold a JSON object")
    return content


def _read_config(path: Path) -> tuple[GPTConfig, int]:
    """GPT-2's config.json -> our config and the trained context."""
    raw = _read_json(path)
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"from_pretrained: {path} is a {raw['model_type']!r}, not a 'gpt2'")
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
                f"from_pretrained: {path}: {key} must be one of {list(accepted)}, got {raw[key]!r}"
            )
    if raw.get("activation_function") == "gelu":
        _note(ERF_NOTE)
    return config, min(raw.get("trained_context", config.block_size), config.block_size)


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
    layers = {int(name.split(".")[1]) for name in shapes if name.startswith("h.")}
    if C % GPT2_HEAD_DIM:
        raise ValueError(
            f"from_pretrained: {path} has no config.json beside it; n_head cannot be guessed "
            f"for n_embd {C} (not a multiple of {GPT2_HEAD_DIM}); put a config.json there"
        )
    return GPTConfig(T, V, len(layers), C // GPT2_HEAD_DIM, C)


def _weight_files(source: Path) -> list[Path]:
    """One file, or the shards an index names."""
    if source.is_file():
        return [source]
    if (source / WEIGHTS).is_file():
        return [source / WEIGHTS]
    names = sorted(set(_read_json(source / INDEX).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name:  # an index may not point out of its folder
            raise ValueError(f"from_pretrained: {source / INDEX} names a path, not a file: {name}")
        if not (source / name).is_file():
            raise FileNotFoundError(f"from_pretrained: {source / INDEX} names {name}, not there")
    return [source / name for name in names]


def _canonical(name: str) -> str | None:
    """A file's tensor name without prefixes; None for mask buffers of older versions."""
    name = name.removeprefix("_orig_mod.").removeprefix(PREFIX)
    return None if name.endswith(MASK_BUFFERS) else name


def _read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(str(file), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                name = _canonical(key)
                if name is not None:
                    yield name, handle.get_tensor(key)


def _read_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dict
                    name = _canonical(key)
                    if name is not None:
                        shapes[name] = handle.get_slice(key).get_shape()
        except SafetensorError as error:
            raise ValueError(
                f"from_pretrained: {file} is not a safetensors file: {error}"
            ) from None
    return shapes


def _file_shape(name: str, config: GPTConfig, shape: torch.Size) -> list[int]:
    """Shape in the file of a parameter that has `shape` here."""
    if name.endswith(TRANSPOSED):
        return [shape[1], shape[0]]
    return [config.vocab_size, shape[1]] if name == "wte.weight" else [*shape]


def _check_shapes(
    where: str, config: GPTConfig, ours: Mapping[str, Tensor], shapes: Mapping[str, list[int]]
) -> None:
    """Every tensor there, of the right shape, and none that nobody would read."""
    missing = sorted(ours.keys() - shapes.keys())
    unknown = sorted(shapes.keys() - ours.keys() - {"lm_head.weight"})
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"from_pretrained: {where} {what} {', '.join(names[:5])}{more} "
                f"(for {config.n_layer} layers, n_embd {config.n_embd})"
            )
    for name, shape in shapes.items():
        expected = _file_shape(
            name, config, ours["wte.weight" if name == "lm_head.weight" else name].shape
        )
        if name == "lm_head.weight":
            expected = [config.vocab_size, config.n_embd]
        # Files of padded vocabularies carry surplus rows; they are cropped.
        rows_ok = name in ("wte.weight", "lm_head.weight") and shape[0] >= expected[0]
        if shape != expected and not (rows_ok and shape[1:] == expected[1:]):
            raise ValueError(
                f"from_pretrained: {where}: {name} must be {tuple(expected)} to match its "
                f"config, got {tuple(shape)}"
            )


@torch.no_grad()
def _build(
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
    ours = _our_tensors(model)
    wte = ours["wte.weight"]
    wte[config.vocab_size :].zero_()
    head: Tensor | None = None
    for name, tensor in tensors:
        if name == "wte.weight":
            wte[: config.vocab_size].copy_(tensor[: config.vocab_size])
        elif name == "lm_head.weight":
            head = tensor[: config.vocab_size]
        else:
            turn = transposed and name.endswith(TRANSPOSED)
            ours[name].copy_(tensor.t() if turn else tensor)
    if head is not None and not torch.equal(head.to(wte.dtype), wte[: config.vocab_size]):
        raise ValueError(
            f"from_pretrained: {where}: lm_head.weight differs from wte.weight; GPT-2's head is "
            f"tied, an untied one is not supported"
        )
    return model


def _our_tensors(model: GPT) -> dict[str, Tensor]:
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
        ValueError: another architecture; a missing, unknown or misshapen tensor.
    """
    source = find_model(path)
    files = _weight_files(source)
    shapes = _read_shapes(files)
    config, trained_context = _find_config(source, shapes)
    with torch.device("meta"):
        ours = _our_tensors(GPT(config))
    _check_shapes(str(source), config, ours, shapes)
    model = _build(str(source), config, ops, _read_tensors(files), transposed=True)
    model.trained_context = trained_context
    return model


def read_config(path: str | Path) -> GPTConfig:
    """The shape of what `from_pretrained` would read, without its weights; same errors."""
    source = find_model(path)
    return _find_config(source, _read_shapes(_weight_files(source)))[0]


def _find_config(source: Path, shapes: Mapping[str, list[int]]) -> tuple[GPTConfig, int]:
    """Shape and trained context of a model, from its config.json or the shapes of its tensors."""
    config_file = (source.parent if source.is_file() else source) / "config.json"
    if config_file.is_file():
        return _read_config(config_file)
    if not source.is_file():
        raise FileNotFoundError(f"from_pretrained: {source} has weights but no config.json")
    config = _guess_config(source, shapes)
    return config, config.block_size


# ---- writing


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def hf_config(model: GPT, dtype: torch.dtype) -> dict[str, Any]:
    """GPT-2's config.json; `trained_context` is ours and transformers carries it along."""
    config = model.config
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
        "trained_context": model.trained_context,
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
    write_atomically(folder / "merges.txt", merges_text)


def model_card(model: GPT) -> str:
    """README.md of a model folder; says which positions training has seen."""
    config, context = model.config, model.trained_context
    sizes = (
        f"{model.num_parameters():,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} wide, {config.block_size} positions, {config.vocab_size:,} tokens."
    )
    window = f"It was trained at a context of {context} tokens."
    if context < config.block_size:
        window += (
            f" Positions from {context} to {config.block_size - 1} never had a gradient, so a "
            f"longer prompt gives noise: crop to {context} tokens, prompt and continuation "
            f"together, or slide the window."
        )
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- gpt2\n---\n\n"
        f"# GPT-2, {model.num_parameters() / 1e6:.0f}M parameters\n\n{sizes}\n\n"
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
    for name, p in _our_tensors(model).items():
        view = p.detach()[: model.config.vocab_size] if name == "wte.weight" else p.detach()
        tensors[PREFIX + name] = view.t() if name.endswith(TRANSPOSED) else view
    return tensors


@torch.no_grad()
def save_pretrained(model: GPT, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that GPT2LMHeadModel and AutoTokenizer load.

    Args:
        model: The model itself, not what torch.compile returned.
        path: Folder, made if needed. The weights are written last and renamed into place, so a
            folder with model.safetensors is a whole one.
        dtype: torch.float32, torch.bfloat16 or torch.float16.

    Raises:
        ValueError: another dtype, or the path is a file.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"save_pretrained: dtype must be fp32, bf16 or fp16, got {dtype}")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    _write_json(folder / "config.json", hf_config(model, dtype))
    ids = {
        k: v for k, v in hf_config(model, dtype).items() if k in ("bos_token_id", "eos_token_id")
    }
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_atomically(folder / "README.md", model_card(model))
    if config.vocab_size == GPT2_VOCAB:
        _write_tokenizer(folder, model.trained_context)
    tensors = {k: v.to("cpu", dtype).contiguous() for k, v in file_tensors(model).items()}
    with replacing(folder / WEIGHTS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})


# ---- nanoGPT


def load_nanogpt(file: str | Path, ops: Ops = EAGER) -> GPT:
    """A model from nanoGPT's ckpt.pt.

    The file is unpickled with weights_only, so it cannot run code. Matmul weights are (out, in)
    as ours. A vocabulary padded to 50304 is cropped to 50257; models without biases get zeros.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a checkpoint; a missing, unknown or misshapen tensor.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"import-nanogpt: no such file: {file}")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"import-nanogpt: {file} holds more than tensors and plain values, or is no "
            f"checkpoint; it was not loaded ({reason[:160]})"
        ) from None
    try:
        state, args = checkpoint["model"], checkpoint["model_args"]
        padded = args["vocab_size"]
        config = GPTConfig(
            block_size=args["block_size"],
            vocab_size=GPT2_VOCAB if padded == 50304 else padded,
            n_layer=args["n_layer"],
            n_head=args["n_head"],
            n_embd=args["n_embd"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"import-nanogpt: {file} is not a nanoGPT checkpoint: expected 'model' and "
            f"'model_args' with the sizes, missing {error}"
        ) from None
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _canonical(key)
        if name is not None:
            tensors[name] = value
    with torch.device("meta"):
        ours = _our_tensors(GPT(config))
    if not args.get("bias", True):
        for name, p in ours.items():
            if name.endswith(".bias"):
                tensors.setdefault(name, torch.zeros(p.shape))
    # The checks speak of file layout, so show them what a GPT-2 file would hold.
    shapes = {
        name: [*reversed(t.shape)] if name.endswith(TRANSPOSED) else [*t.shape]
        for name, t in tensors.items()
    }
    _check_shapes(str(file), config, ours, shapes)
    return _build(str(file), config, ops, tensors.items(), transposed=False)


# ---- command line


def main(args: list[str] | None = None) -> None:
    """`python -m model.hf`: import-nanogpt and export."""
    import tyro  # not needed by who only loads a model

    app = tyro.extras.SubcommandApp()

    @app.command(name="import-nanogpt")
    def import_nanogpt(file: tyro.conf.Positional[Path], out: Path) -> None:
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
        path: tyro.conf.Positional[Path],
        out: Path,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    ) -> None:
        """Write a run or a model as a Hugging Face folder, in another dtype if asked.

        Args:
            path: A run, a model folder or a .safetensors file.
            out: Folder to write.
            dtype: Of the weights written.
        """
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        from_pretrained(path).save_pretrained(out, dtypes[dtype])
        print(f"{out}: written in {dtype}")

    try:
        app.cli(prog="python -m model.hf", args=args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
