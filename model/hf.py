"""Reads GPT-2 weights in the layout of Hugging Face folders; model/export.py writes such folders.

A model folder holds model.safetensors, GPT-2's config.json and, for GPT-2's vocabulary, the
tokenizer, so transformers and lm-eval read it offline. That layout differs from ours in three
ways:

    matmul weights    (in, out) in the file, (out, in) in nn.Linear: transposed both ways
    embedding rows    vocab_size in the file, padded_vocab_size here: padded with 0, cropped
    names             as ours; older files lack the `transformer.` prefix and have mask buffers

A folder may come from a stranger. Nothing is unpickled, no link out of it is followed, and names,
shapes, dtypes and values are checked before the model uses them.

Nothing here imports transformers (it would take our folder `kernels` for a package it looks for).

    python -m model.hf import-nanogpt out/ckpt.pt --out runs/imported/model
    python -m model.hf export runs/shakespeare-cpu --out my-gpt2 --dtype bf16
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.config import LARGEST, GPTConfig
from model.edge import check_int, exits, one_line, quoted
from model.files import read_json
from model.find import CONFIG, INDEX, WEIGHTS, describe_file, find_model, regular
from model.gpt import GPT

PREFIX = "transformer."
WTE, HEAD = "wte.weight", "lm_head.weight"
GPT2_VOCAB = 50257
GPT2_HEAD_DIM = 64  # every released size; used only where a weights file has no config.json
# Stored (in, out) by GPT-2's Conv1D. attn.c_proj is square: forgetting it fails no shape check.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")
VOCABULARIES = ("vocab.json", "tokenizer.json")  # either of them
CONTEXTS = ("trained_context", "fine_tuned_context")  # attributes of GPT, kept in our config.json
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
ERF_NOTE = (
    "note: these weights were trained with the erf form of GELU and run here with GPT-2's tanh "
    "form, so the loss changes slightly; fine-tune if that matters"
)


def make_config(where: str, sizes: Mapping[str, Any], **others: Any) -> GPTConfig:
    """A config from n_layer, n_head and n_embd in a file, and from other fields.

    Raises:
        ValueError: a size is missing, or a value is not one of a GPT-2; it begins with `where`.
    """
    try:
        return GPTConfig(**{key: sizes[key] for key in ("n_layer", "n_head", "n_embd")}, **others)
    except KeyError as error:
        raise ValueError(f"{where} lacks the key {error}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('model: ')}") from None


def _read_config(path: Path) -> tuple[GPTConfig, dict[str, int]]:
    """GPT-2's config.json -> our config, and the values of CONTEXTS that it has."""
    raw = read_json(path)
    if raw.get("model_type", "gpt2") != "gpt2":
        raise ValueError(f"model: {path} is a {quoted(raw['model_type'])}, not a 'gpt2'")
    config = make_config(
        f"model: {path}",
        raw,
        block_size=raw.get("n_positions", raw.get("n_ctx", 1024)),
        vocab_size=raw.get("vocab_size", GPT2_VOCAB),
        layer_norm_epsilon=raw.get("layer_norm_epsilon", 1e-5),
    )
    # Each of these changes the function computed; ignoring it would give a wrong model.
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
                f"model: {path}: {key} must be {' or '.join(map(repr, accepted))}, got "
                f"{quoted(raw[key])}"
            )
    if raw.get("activation_function") == "gelu":
        print(ERF_NOTE, file=sys.stderr)
    return config, read_contexts(raw, f"model: {path}", config.block_size)


def read_contexts(raw: Mapping[str, Any], where: str, block_size: int) -> dict[str, int]:
    """The values of CONTEXTS that a config.json has, limited to the positions of the model."""
    contexts = {key: raw[key] for key in CONTEXTS if raw.get(key) is not None}
    for key, value in contexts.items():
        check_int(where, key, value, 1, LARGEST["block_size"])
    return {key: min(value, block_size) for key, value in contexts.items()}


def _check_tokenizer(folder: Path, named: Path) -> None:
    """Raise ValueError if the tokenizer beside the weights has other ids than GPT-2's."""
    from model.tokenizer import vocab_files

    for file in (folder / name for name in VOCABULARIES if (folder / name).exists()):
        vocab: Any = read_json(regular(file, named))
        if file.name == "tokenizer.json":
            vocab = vocab["model"].get("vocab") if isinstance(vocab.get("model"), dict) else None
        ours = read_json(vocab_files()[0])
        if not (isinstance(vocab, dict) and vocab.items() >= ours.items()):
            raise ValueError(f"model: {file} is not GPT-2's vocabulary, the only one known here")
        return  # they say the same


def _guess_config(path: Path, tensors: Mapping[str, Tensor]) -> GPTConfig:
    """A config from shapes alone. They do not show the heads, so these get GPT-2's width."""
    try:
        V, C = tensors[WTE].shape
        T, _ = tensors["wpe.weight"].shape
    except (KeyError, ValueError):
        raise ValueError(
            f"model: {path} has no config.json beside it and no wte and wpe to read a GPT-2's "
            f"sizes from"
        ) from None
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    if C % GPT2_HEAD_DIM:
        raise ValueError(
            f"model: {path} has no config.json beside it; n_head cannot be guessed for n_embd {C} "
            f"(not a multiple of {GPT2_HEAD_DIM}); put a config.json there"
        )
    return GPTConfig(T, V, len(layers), C // GPT2_HEAD_DIM, C)


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names."""
    weight_map = read_json(index).get("weight_map")
    names = [*weight_map.values()] if isinstance(weight_map, dict) else []
    for name in names:
        if not isinstance(name, str) or {*"/\\\0"} & {*name}:  # or it might leave its folder
            raise ValueError(f"model: {index} names no file: {quoted(name)}")
    return sorted({*names})


def canonical(name: str) -> str | None:
    """A file's tensor name without prefixes; None for mask buffers of older versions."""
    name = name.removeprefix("_orig_mod.").removeprefix(PREFIX)
    return None if name.endswith(MASK_BUFFERS) else name


def _map_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors by canonical name. Files are mapped, so a value is read at its first use."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"model: {file} is not a safetensors file: {describe_file(file)} "
                f"({one_line(error, 160)})"
            ) from None
        for key, tensor in found.items():
            name = canonical(key)
            if name in tensors:
                raise ValueError(f"model: {file} repeats the tensor {quoted(name)}")
            if name and tensor.dtype not in FLOATS:
                raise ValueError(
                    f"model: {file}: {quoted(name)} must be fp64, fp32, fp16 or bf16, "
                    f"got {tensor.dtype}"
                )
            if name:
                tensors[name] = tensor
    return tensors


def file_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights by the name and in the layout of a file; views of the parameters, no copies."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        view = p.detach()[: model.config.vocab_size] if name.endswith(WTE) else p.detach()
        tensors[name] = view.t() if name.endswith(TRANSPOSED) else view
    return tensors


def file_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Shape in a file of each tensor, by its canonical name."""
    with torch.device("meta"):
        tensors = file_tensors(GPT(config))
    return {name.removeprefix(PREFIX): tensor.shape for name, tensor in tensors.items()}


def _check_shapes(where: object, config: GPTConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless exactly the right tensors are there, in the right shapes."""
    expected = file_shapes(config)
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys() - {HEAD})
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            some = ", ".join(one_line(name, 80) for name in names[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"model: {where} {what} {some}{more} "
                f"(for {config.n_layer} layers, n_embd {config.n_embd})"
            )
    expected[HEAD] = expected[WTE]
    for name, tensor in tensors.items():
        shape = tensor.shape
        if name in (WTE, HEAD) and shape[:1] > expected[name][:1]:
            shape = tensor[: config.vocab_size].shape  # a padded vocabulary is cropped
        if shape != expected[name]:
            raise ValueError(
                f"model: {where}: {name} must be {tuple(expected[name])} to match its config, "
                f"got {tuple(tensor.shape)}"
            )


@torch.no_grad()
def build(where: object, config: GPTConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """A GPT with these tensors, given by canonical name and in the layout of a file.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen or not finite, or the head differs from
            the embedding.
    """
    _check_shapes(where, config, tensors)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.transformer.wte.weight[config.vocab_size :].zero_()
    for name, ours in file_tensors(model).items():
        ours.copy_(tensors[name.removeprefix(PREFIX)][: len(ours)])
        if not torch.isfinite(ours).all():
            raise ValueError(
                f"model: {where}: {name.removeprefix(PREFIX)} holds values that are not finite; "
                f"the training that wrote it failed, or the file is damaged"
            )
    wte = model.transformer.wte.weight[: config.vocab_size]
    if HEAD in tensors and not torch.equal(tensors[HEAD][: len(wte)].to(wte.dtype), wte):
        raise ValueError(
            f"model: {where}: lm_head.weight differs from wte.weight; GPT-2's head is tied, an "
            f"untied one is not supported"
        )
    return model


def from_pretrained(path: str | Path) -> GPT:
    """The model at `path` (see `find_model`), in fp32 on the CPU, in training mode as a new one.

    Without a config.json beside a file the sizes are read from the shapes, with heads of 64;
    `trained_context` is the one in config.json, or all positions.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: another architecture; a link out of the folder; a missing, unknown or misshapen
            tensor, one of integers, or one with non-finite values.
    """
    tensors, config, contexts = _look_at(path)
    model = build(find_model(path), config, tensors)
    for key, value in contexts.items():
        setattr(model, key, value)
    return model


def read_config(path: str | Path) -> GPTConfig:
    """The shape of what `from_pretrained` would read, without its weights; same errors."""
    return _look_at(path)[1]


def _look_at(path: str | Path) -> tuple[dict[str, Tensor], GPTConfig, dict[str, int]]:
    """The tensors of the model at `path`, not read yet, its config, and those of CONTEXTS in it."""
    source = find_model(path)
    folder = source if source.is_dir() else source.parent
    named = Path(path) if Path(path).is_dir() else folder
    files = [source]
    if source.is_dir():
        names = [WEIGHTS]
        if not (source / WEIGHTS).exists():
            names = shard_names(regular(source / INDEX, named))
        files = [regular(source / name, named) for name in names]
    tensors = _map_tensors(files)
    if (folder / CONFIG).exists():
        _check_tokenizer(folder, named)
        return tensors, *_read_config(regular(folder / CONFIG, named))
    if source.is_dir():
        raise FileNotFoundError(f"model: {source} has weights but no config.json")
    return tensors, _guess_config(source, tensors), {}


def main(args: list[str] | None = None) -> None:
    import tyro  # loading a model does not need it

    from model.nanogpt import load_nanogpt  # here, because it imports this module

    app = tyro.extras.SubcommandApp()

    @app.command(name="import-nanogpt")
    def import_nanogpt(file: tyro.conf.Positional[str], out: str) -> None:
        """Convert a nanoGPT ckpt.pt into a model folder.

        Args:
            file: The checkpoint.
            out: Folder to write.
        """
        model = load_nanogpt(file)
        print(ERF_NOTE, file=sys.stderr)
        model.save_pretrained(out)
        sizes = f"{model.num_parameters():,} parameters, context {model.trained_context}"
        print(one_line(f"{out}: {sizes}"))

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
            dtype: Dtype of the written weights.
        """
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        from_pretrained(path).save_pretrained(out, dtypes[dtype])
        print(one_line(f"{out}: written in {dtype}"))

    with exits():
        app.cli(prog="python -m model.hf", args=args)


if __name__ == "__main__":
    main()
