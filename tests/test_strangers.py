"""What a stranger may put into a model folder, a weights file or a nanoGPT checkpoint."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTConfig, hf
from model.files import MAX_JSON_BYTES
from model.nanogpt import load_nanogpt
from tests.weights import SMALL, assert_same_weights, gpt2_sizes, random_model, refuse, save


def edit_tensor(folder: Path, name: str, tensor: Tensor) -> None:
    """Add or replace a tensor in the weights file."""
    file = folder / hf.WEIGHTS
    save_file({**load_file(file), name: tensor}, file)


def edit_config(folder: Path, key: str, value: object) -> None:
    file = folder / hf.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def link_out(folder: Path, name: str) -> None:
    """Move the file out of the folder and leave a link to it."""
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def shard_index(folder: Path, content: object) -> None:
    (folder / hf.WEIGHTS).unlink()
    (folder / hf.INDEX).write_text(json.dumps(content))


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


W, C = hf.WEIGHTS, hf.CONFIG
WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
ODD_DTYPE = b'{"a":{"dtype":"\x1b[31mF","shape":[1],"data_offsets":[0,4]}}'.ljust(70)
ODD_DTYPE = (70).to_bytes(8, "little") + ODD_DTYPE + b"0000"
LARGE = torch.full((32, 128), 1e300, dtype=torch.float64)
# How a folder is spoiled, with which arguments, and what the error says.
Spoiled = tuple[Callable[..., object], tuple[object, ...], str]
STRANGERS: dict[str, Spoiled] = {
    "weights that link out": (link_out, (W,), "link out of"),
    "config that links out": (link_out, (C,), "link out of"),
    "a FIFO for weights": (fifo, (W,), "not a regular file"),
    "a FIFO for a config": (fifo, (C,), "not a regular file"),
    "a pointer of Git LFS": (replace_file, (W, b"version https://git-lfs.github"), "git lfs pull"),
    "a page for weights": (replace_file, (W, b"<!DOCTYPE html><html></html>"), "a web page"),
    "no weights at all": (replace_file, (W, b""), "damaged"),
    "an odd dtype": (replace_file, (W, ODD_DTYPE), "not a safetensors file"),
    "an index of numbers": (shard_index, ({"weight_map": {"a": 1}},), "no file: 1"),
    "an index without a map": (shard_index, ({"weight_map": [1]},), "lacks"),
    "an index up": (shard_index, ({"weight_map": {"a": "../x.safetensors"}},), "names no file"),
    "a backslash": (shard_index, ({"weight_map": {"a": "..\\x.safetensors"}},), "names no file"),
    "an index with a NUL": (shard_index, ({"weight_map": {"a": "a\0"}},), "no file"),
    "a deep config": (replace_file, (C, b"[" * 100_000), "config.json is not valid JSON"),
    "5000 digits": (replace_file, (C, b'{"n_layer": ' + b"1" * 5000 + b"}"), "not valid JSON"),
    "a long config": (replace_file, (C, b" " * (MAX_JSON_BYTES + 1)), "the limit is 16,777,216"),
    **{
        f"{name[:20]!r} {i}": (edit_tensor, (name, tensor), message)
        for i, (name, tensor, message) in enumerate([
            (FC, torch.ones(32, 128).long(), "must be fp64, fp32, fp16 or bf16, got torch.int64"),
            (FC, torch.full((32, 128), torch.nan), "not finite"),
            (FC, LARGE, "h.0.mlp.c_fc.weight holds values that are not finite"),
            (FC, torch.ones(128, 32), r"mlp\.c_fc\.weight.*\(32, 128\).*\(128, 32\)"),
            (WTE, torch.tensor(1.0), r"got \(\)"),
            ("lm_head.weight", torch.tensor(1.0), r"lm_head.weight must be .*got \(\)"),
            ("wte.weight", torch.zeros(197, 32), "repeats the tensor 'wte.weight'"),
            ("h.\x1b[2J\n\u202eevil", torch.ones(1), r"unknown h.\\x1b\[2J \\u202eevil"),
            ("x" * 100_000, torch.ones(1), r"unknown x{70,80}\.\.\. "),
        ])
    },
    **{
        f"{key} {value!r}"[:40]: (edit_config, (key, value), message)
        for key, value, message in [
            ("n_layer", 10_000_000, "n_layer must be a whole number from 1 to 1,000, got 10000000"),
            ("n_layer", "2", "n_layer must be .* got '2'"),
            ("n_layer", True, "n_layer must be .* got True"),
            ("n_layer", 2.0, "n_layer must be .* got 2.0"),
            ("n_layer", None, "n_layer must be .* got None"),
            ("n_embd", 2**64, "n_embd must be"),
            ("n_embd", -32, "n_embd must be"),
            ("n_head", 3, "n_embd 32, n_head 3"),
            ("n_head", [[[1]]], "n_head must be .* got a long list"),
            ("n_positions", 10**12, "block_size must be"),
            ("n_positions", float("nan"), "block_size must be .* got nan"),
            ("vocab_size", {"a": 1}, "vocab_size must be .* got a long dict"),
            ("layer_norm_epsilon", "\x1b[31m", r"epsilon must be in \(0, 1\), got '\\x1b\[31m'"),
            ("layer_norm_epsilon", float("inf"), "epsilon must be"),
            ("trained_context", "all", "trained_context must be a whole number"),
            ("trained_context", -1, "trained_context must be a whole number"),
            ("fine_tuned_context", 1e9, "fine_tuned_context must be a whole number"),
            ("model_type", "\x1b[2J", r"is a '\\x1b\[2J', not a 'gpt2'"),
            ("model_type", "llama", "'llama', not a 'gpt2'"),
            ("n_inner", [], r"n_inner must be None or 128, got \[\]"),
            ("n_inner", 64, "n_inner.*128.*64"),
            ("activation_function", "relu", "activation_function.*'relu'"),
            ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx"),
            ("tie_word_embeddings", False, "tie_word_embeddings"),
        ]
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_folder_is_refused_with_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (spoil, arguments, message), (_, folder) = STRANGERS[name], save(tmp_path)
    spoil(folder, *arguments)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT.from_pretrained(folder)
    refuse(capsys, "export", str(folder), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_error_names_the_folder_that_holds_the_weights(tmp_path: Path):
    _, saved = save(tmp_path)
    folder = saved.rename(tmp_path / "model")
    edit_tensor(folder, FC, torch.full((32, 128), torch.nan))
    with pytest.raises(ValueError, match=f"^model: {folder}: h.0.mlp.c_fc.weight holds"):
        GPT.from_pretrained(tmp_path)


def test_a_folder_of_the_hubs_cache_is_read(tmp_path: Path):
    """Its snapshots are links into a folder of blobs. These links lead out and are followed."""
    model, folder = save(tmp_path)
    cache = folder.parent / "models--gpt2"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, name in enumerate(("model.safetensors", "config.json")):
        (folder / name).rename(cache / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert_same_weights(model, GPT.from_pretrained(snapshot))
    (folder.parent / "link").symlink_to(snapshot)  # the person who names a link chose it
    assert_same_weights(model, GPT.from_pretrained(folder.parent / "link"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", b"PK\x03\x04rest", "a pickle, .*import-nanogpt.*save_pretrained"),
        ("model.pth", b"\x80\x02rest", "a pickle"),
        ("last.ckpt", b"anything", "a pickle"),
        ("tf_model.h5", b"\x89HDF\r\n", "TensorFlow"),
        ("flax_model.msgpack", b"\x81", "Flax"),
        ("model.onnx", b"\x08\x07", "ONNX"),
        ("gpt2-q4.gguf", b"GGUF", "llama.cpp"),
        ("weights.bin", b"\x00\x01", "not in the safetensors format"),
    ],
)
def test_other_formats_are_refused_by_what_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
):
    """If the file itself is named, and if a folder has nothing else."""
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        line = refuse(capsys, "export", str(path), "--out", str(tmp_path / "out"))
        assert re.search(message, line)
        assert name in line


# ---- nanoGPT


def nanogpt_checkpoint(file: Path, model: GPT, bias: Any = True, padded: int = 0) -> None:
    """What nanoGPT's train.py saves of a compiled model, buffers of its old attention included."""
    config = model.config
    state = {}
    for name, p in model.named_parameters():
        if not bias and name.endswith(".bias"):
            continue
        if name == "transformer.wte.weight":
            rows = padded or config.vocab_size
            p = torch.cat(
                [p[: config.vocab_size], torch.ones(rows - config.vocab_size, p.shape[1])]
            )
            state["_orig_mod.lm_head.weight"] = p.detach().clone()
        state["_orig_mod." + name] = p.detach().clone()
    for i in range(config.n_layer):
        state[f"_orig_mod.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 4, 4)
    args = {**gpt2_sizes(config), "block_size": config.block_size, "bias": bias, "dropout": 0.1}
    args["vocab_size"] = padded or config.vocab_size
    torch.save(
        {"model": state, "optimizer": {}, "model_args": args, "iter_num": 5, "config": {"a": "b"}},
        file,
    )


def test_import_nanogpt(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = GPTConfig(block_size=16, vocab_size=50257, n_layer=2, n_head=2, n_embd=16)
    model = random_model(config)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", model, padded=50304)
    hf.main(["import-nanogpt", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")])
    assert "erf form of GELU" in capsys.readouterr().err
    again = GPT.from_pretrained(tmp_path / "out")
    assert again.config == config
    assert_same_weights(model, again)


@pytest.mark.parametrize("bias", [False, 0, None])
def test_import_nanogpt_without_biases(tmp_path: Path, bias: Any):
    model = random_model(SMALL)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
    nanogpt_checkpoint(tmp_path / "ckpt.pt", model, bias=bias)
    assert_same_weights(model, load_nanogpt(tmp_path / "ckpt.pt"))


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_nanogpt_file_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit) as stop:
        hf.main(["import-nanogpt", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "not loaded" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


@dataclass
class Sizes:
    """build-nanogpt keeps an object of such a class, GPTConfig, in its checkpoint."""

    n_layer: int = 2


def spoiled(file: Path, changes: dict[str, object]) -> None:
    """A good checkpoint with other sizes or other contents under `model`; None removes a key."""
    content = torch.load(file)
    for key, value in changes.items():
        part = content["model_args" if key in content["model_args"] else "model"]
        part[key] = value
        if value is None:
            del part[key]
    torch.save(content, file)


EXTRA = "'extra' must name a dense tensor"
OLD = {"_use_new_zipfile_serialization": False}
NAN = torch.full((32,), torch.nan)
NANOGPT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "not a regular file"),
    "text": (lambda f: f.write_text("hello"), "no checkpoint"),
    "nothing": (lambda f: f.write_bytes(b""), "no checkpoint"),
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:3000]), "no checkpoint"),
    "torch's old format": (lambda f: torch.save({}, f, **OLD), "no checkpoint"),
    "build-nanogpt": (
        lambda f: torch.save({"model": {}, "config": Sizes(), "step": 1}, f),
        r"classes are 'tests.test_strangers.Sizes'.*model_args.*import that",
    ),
    "a tensor": (lambda f: torch.save(torch.ones(2), f), "must hold a dict"),
    "only weights": (lambda f: torch.save({"weights": torch.ones(2)}, f), "got 'weights'"),
    "keys that are none": (lambda f: torch.save({3: 1, "\x1b[1m": 2}, f), r"got 3, '\\x1b\[1m'"),
    "model_args a list": (lambda f: torch.save({"model": {}, "model_args": []}, f), "expected"),
    "no sizes": (
        lambda f: torch.save({"model": {}, "model_args": {}}, f),
        "lacks the key",
    ),
    **{
        name: (lambda f, changes=changes: spoiled(f, changes), message)
        for name, changes, message in [
            ("many layers", {"n_layer": 10**7}, "n_layer must be a whole number"),
            ("NaN layers", {"n_layer": float("nan")}, "n_layer must be a whole number"),
            ("a tensor of layers", {"n_layer": torch.ones(9, 9)}, "n_layer must be"),
            ("a vocabulary in words", {"vocab_size": "many"}, "vocab_size must be"),
            ("a tensor of tokens", {"vocab_size": torch.ones(9, 9)}, "vocab_size must be"),
            ("more than the file", {"n_layer": 1000, "n_embd": 65536}, "bytes, too few for"),
            ("no tensor", {"extra": 3}, EXTRA),
            ("integers", {"extra": torch.ones(3).int()}, EXTRA),
            ("sparse", {"extra": torch.eye(3).to_sparse()}, EXTRA),
            ("meta", {"extra": torch.ones(3, device="meta")}, EXTRA),
            ("an unknown tensor", {"\x1b[2J": torch.ones(3)}, r"unknown \\x1b"),
            ("NaN", {"_orig_mod.transformer.ln_f.weight": NAN}, "not finite"),
            (
                "a missing tensor",
                {"_orig_mod.transformer.ln_f.weight": None},
                r"lacks ln_f\.weight",
            ),
        ]
    },
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpt_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    file = tmp_path / "ckpt.pt"
    nanogpt_checkpoint(file, random_model(SMALL))
    spoil, message = NANOGPT[name]
    spoil(file)
    line = refuse(capsys, "import-nanogpt", str(file), "--out", str(tmp_path / "out"))
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


def test_nanogpt_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_nanogpt(tmp_path / "none.pt")
