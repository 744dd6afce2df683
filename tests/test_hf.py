"""GPT-2 weights in and out. transformers runs in a process of its own, with another working
directory: beside our folder named `kernels` it would take that for the package it looks for."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, MODELS, GPTConfig, hf
from model import export as export_folder
from model.nanogpt import load_nanogpt

SMALL = GPTConfig(block_size=32, vocab_size=197, n_layer=2, n_head=2, n_embd=32)
SIZES = ("124m", "350m", "774m", "1558m")

TRANSFORMERS_SIDE = """
import json, sys
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

request = json.load(sys.stdin)
answer = {"load": {}, "tokenizer": {}, "structure": {}, "pipeline": {}, "rolling": {}}
for folder, dtype in request["load"]:
    # eager attention: the same formula on every CPU
    model, info = GPT2LMHeadModel.from_pretrained(
        folder, output_loading_info=True, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    idx = torch.load(folder + "/idx.pt")
    with torch.no_grad():
        logits = model.eval().float()(idx).logits
    torch.save(logits.clone(), folder + "/logits.pt")
    answer["load"][folder] = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "mismatched": [str(k) for k in info["mismatched_keys"]],
        "dtype": str(next(model.parameters()).dtype),
        "trained_context": getattr(model.config, "trained_context", None),
    }
    del model
for folder, texts in request["tokenizer"]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = Tokenizer.from_file(folder + "/tokenizer.json")  # which AutoTokenizer half overrides
    answer["tokenizer"][folder] = {
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "file_ids": [file.encode(text).ids for text in texts],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in texts],
        "eos": tokenizer.eos_token_id,
        "model_max_length": tokenizer.model_max_length,
    }
for folder, prompt in request["pipeline"]:
    [made] = pipeline("text-generation", model=folder)(prompt)
    answer["pipeline"][folder] = made["generated_text"]
for folder, prefix, tokens in request["rolling"]:
    # lm-eval's rolling log-likelihood: its HFLM takes n_positions first for the longest input, and
    # each window predicts that many tokens after one of context.
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    length, total = model.config.n_positions, 0.0
    for at in range(0, len(tokens), length):
        end = min(at + length, len(tokens))
        inputs = [prefix, *tokens][max(0, end - length) : end]
        with torch.no_grad():
            log_p = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        new = torch.tensor(tokens[at:end])
        total += log_p[-len(new) :].gather(-1, new[:, None]).sum().item()
    answer["rolling"][folder] = total
for name, sizes in request["structure"]:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**sizes))
    shapes = {k: list(v.shape) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    answer["structure"][name] = shapes
for config, folder in request["save"]:
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    model.save_pretrained(folder)
    idx = torch.arange(24).view(2, 12)
    torch.save(idx, folder + "/idx.pt")
    with torch.no_grad():
        torch.save(model(idx).logits.clone(), folder + "/logits.pt")
print("ANSWER" + json.dumps(answer))
"""


def ask_transformers(cwd: Path, **request: list) -> dict:
    pytest.importorskip("tokenizers", reason="transformers is not installed")
    names = ("load", "tokenizer", "structure", "save", "pipeline", "rolling")
    whole = {**{name: [] for name in names}, **request}
    done = subprocess.run(
        [sys.executable, "-I", "-c", TRANSFORMERS_SIDE],
        cwd=cwd,
        input=json.dumps(whole),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("ANSWER")[-1])


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Every parameter random: with zero biases a swapped bias would go unnoticed."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        model.transformer.wte.weight[config.vocab_size :].zero_()
    return model


def export(
    model: GPT, folder: Path, dtype: torch.dtype = torch.float32, idx: Tensor | None = None
) -> Tensor:
    """Save model and token ids, return our logits for them."""
    model.save_pretrained(folder, dtype)
    if idx is None:
        T = min(24, model.trained_context)
        idx = torch.arange(2 * T).view(2, T) % model.config.vocab_size
    torch.save(idx, folder / "idx.pt")
    with torch.no_grad():
        return model(idx)


@dataclass
class Exchange:
    """One conversation with transformers, shared by the tests that read it (its import is slow)."""

    folders: dict[str, Path]
    logits: dict[str, Tensor]
    answer: dict


TEXTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.",
    "naive cafe: na\u00efve caf\u00e9, \u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469 end",
    "   spaces \t and\n\n\nnewlines it's we'll 12345 !!??",
]


EOT = 50256
TOKENS = [*range(1000, 1000 + 4 * 16 * 37, 37)]  # four windows of the trained context


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Exchange:
    root = tmp_path_factory.mktemp("exchange")
    folders: dict[str, Path] = {}
    logits: dict[str, Tensor] = {}
    load = []
    for name, config, dtype in [
        ("fp32", SMALL, torch.float32),
        ("bf16", SMALL, torch.bfloat16),
        ("full-vocab", replace(MODELS["smoke"], n_layer=1), torch.float32),
        # The widths of the four sizes; depth and vocabulary cut, since they only repeat.
        *(
            (f"width-{size}", replace(MODELS[size], n_layer=1, vocab_size=301), torch.float32)
            for size in SIZES
        ),
    ]:
        model = random_model(config)
        model.trained_context = 16
        if dtype == torch.bfloat16:  # what the file can hold; then logits must agree again
            with torch.no_grad():
                for p in model.parameters():
                    p.copy_(p.to(dtype).float())
        folders[name] = root / name
        logits[name] = export(model, folders[name], dtype)
        load.append((str(folders[name]), str(dtype).removeprefix("torch.")))
    structure = [(size, gpt2_sizes(MODELS[size])) for size in SIZES]
    folders["theirs"] = root / "theirs"
    save = [({**gpt2_sizes(SMALL), "vocab_size": 199}, str(folders["theirs"]))]
    full = str(folders["full-vocab"])
    answer = ask_transformers(
        root,
        load=load,
        tokenizer=[(full, TEXTS)],
        structure=structure,
        save=save,
        pipeline=[(full, "ROMEO:")],
        rolling=[(full, EOT, TOKENS)],
    )
    return Exchange(folders, logits, answer)


def gpt2_sizes(config: GPTConfig) -> dict[str, int]:
    return {
        "n_positions": config.block_size,
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
    }


@pytest.mark.parametrize(
    "name", ["fp32", "bf16", "full-vocab", *(f"width-{size}" for size in SIZES)]
)
def test_transformers_loads_what_we_save(exchange: Exchange, name: str):
    info = exchange.answer["load"][str(exchange.folders[name])]
    assert info["missing"] == info["unexpected"] == info["mismatched"] == []
    assert info["trained_context"] == 16
    theirs = torch.load(exchange.folders[name] / "logits.pt")
    ours = exchange.logits[name]
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_file_has_the_tensors_of_every_size(exchange: Exchange, size: str):
    """Names and shapes at full depth and vocabulary, on the meta device."""
    with torch.device("meta"):
        ours = hf.file_tensors(GPT(MODELS[size]))
    shapes = {name: [*tensor.shape] for name, tensor in ours.items()}
    assert shapes == exchange.answer["structure"][size]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_whole_size_round_trip(tmp_path: Path, size: str):
    model = random_model(MODELS[size])
    logits = export(model, tmp_path / size, idx=torch.arange(40).view(2, 20) * 1000)
    del model
    answer = ask_transformers(tmp_path, load=[(str(tmp_path / size), "float32")])
    info = answer["load"][str(tmp_path / size)]
    assert info["missing"] == info["unexpected"] == []
    theirs = torch.load(tmp_path / size / "logits.pt")
    assert ((logits - theirs).abs().max() / theirs.abs().max()).item() < 1e-5


def test_tokenizer_files_agree_with_tiktoken(exchange: Exchange):
    from model.tokenizer import get_encoding

    answer = exchange.answer["tokenizer"][str(exchange.folders["full-vocab"])]
    encoding = get_encoding()
    assert answer["ids"] == [encoding.encode_ordinary(text) for text in TEXTS]
    assert answer["file_ids"] == answer["ids"]
    assert answer["decoded"] == TEXTS
    assert answer["eos"] == 50256
    assert answer["model_max_length"] == 16


def test_an_export_says_its_true_length_everywhere(exchange: Exchange):
    """Trained at 16 of its 64 positions: it has 16, and what fills a context fills 16 tokens."""
    folder = exchange.folders["full-vocab"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["n_positions"], config["n_ctx"], config["trained_context"]) == (16, 16, 16)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["max_length"] == 16
    assert load_file(folder / "model.safetensors")["transformer.wpe.weight"].shape[0] == 16
    assert "16 positions" in (folder / "README.md").read_text()


def test_text_generation_pipeline_ends_within_the_positions(exchange: Exchange):
    from model.tokenizer import get_encoding

    text = exchange.answer["pipeline"][str(exchange.folders["full-vocab"])]
    assert text.startswith("ROMEO:")
    assert 4 < len(get_encoding().encode_ordinary(text)) <= 20  # 16, which may be spelled otherwise


def test_rolling_log_likelihood_is_our_evaluation(exchange: Exchange):
    """lm-eval is no pin (40 packages, 420 MB): its windows are restated on transformers' side."""
    from training.evaluate import evaluate_tokens

    folder = exchange.folders["full-vocab"]
    ours = evaluate_tokens(GPT.from_pretrained(folder), np.array([EOT, *TOKENS]))
    theirs = -exchange.answer["rolling"][str(folder)] / len(TOKENS)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_we_load_what_transformers_saves(exchange: Exchange):
    folder = exchange.folders["theirs"]
    model = GPT.from_pretrained(folder).eval()
    with torch.no_grad():
        ours = model(torch.load(folder / "idx.pt"))
    theirs = torch.load(folder / "logits.pt")
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 1e-5
    assert model.trained_context == model.config.block_size  # their config names none


# ---- our own files


@pytest.fixture
def saved(tmp_path: Path) -> tuple[GPT, Path]:
    model = random_model(SMALL)
    model.trained_context = 8
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


def assert_same_weights(a: GPT, b: GPT) -> None:
    """Of `a`, the positions it was trained at."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name in left:
        trained = a.trained_context if name.endswith("wpe.weight") else None
        assert torch.equal(left[name][:trained], right[name]), name


def test_round_trip_is_exact(saved: tuple[GPT, Path]):
    model, folder = saved
    again = GPT.from_pretrained(folder)
    assert_same_weights(model, again)
    assert again.config == replace(model.config, block_size=8)
    assert again.trained_context == 8
    assert again.training
    assert again.transformer.wte.weight[SMALL.vocab_size :].abs().max() == 0
    assert "context of 8 tokens" in (folder / "README.md").read_text()
    written = {*export_folder.EXPORTED} - {*export_folder.TOKENIZER}
    assert {p.name for p in folder.iterdir()} == written
    assert [*folder.parent.iterdir()] == [folder]  # nothing is left of the making
    (folder.parent / "plain").touch()  # every file has the mode the umask gives
    assert {p.stat().st_mode for p in folder.iterdir()} == {
        (folder.parent / "plain").stat().st_mode
    }
    file = load_file(folder / "model.safetensors")
    assert file["transformer.wte.weight"].shape == (SMALL.vocab_size, SMALL.n_embd)
    assert "lm_head.weight" not in file


def test_run_folder(saved: tuple[GPT, Path]):
    model, folder = saved
    run = folder.parent / "run"
    run.mkdir()
    (run / "config.json").write_text('{"recipe": {}}')
    folder.rename(run / "model")
    assert_same_weights(model, GPT.from_pretrained(run))


def test_old_file_without_prefix_with_masks_and_head(saved: tuple[GPT, Path]):
    """The layout of the hub's first gpt2 file, and a stored copy of the tied head."""
    model, folder = saved
    tensors = {
        k.removeprefix("transformer."): v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    for i in range(SMALL.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert_same_weights(model, GPT.from_pretrained(folder))
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="tied"):
        GPT.from_pretrained(folder)


def test_sharded(saved: tuple[GPT, Path]):
    model, folder = saved
    tensors = list(load_file(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    index = {}
    for i, part in enumerate((tensors[:9], tensors[9:])):
        name = f"model-0000{i + 1}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        index |= dict.fromkeys((k for k, _ in part), name)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_same_weights(model, GPT.from_pretrained(folder))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        GPT.from_pretrained(folder)
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="names no file"):
        GPT.from_pretrained(folder)


def test_file_without_config(tmp_path: Path):
    config = GPTConfig(block_size=16, vocab_size=131, n_layer=1, n_head=2, n_embd=128)
    model = random_model(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    again = GPT.from_pretrained(tmp_path / "model.safetensors")
    assert again.config == config
    assert_same_weights(model, again)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        GPT.from_pretrained(tmp_path)


def test_surplus_rows_are_cropped(saved: tuple[GPT, Path]):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    wte = tensors["transformer.wte.weight"]
    tensors["transformer.wte.weight"] = torch.cat([wte, torch.full((5, wte.shape[1]), 9.0)])
    save_file(tensors, folder / "model.safetensors")
    assert_same_weights(model, GPT.from_pretrained(folder))


def test_half_precision_files_load_as_fp32(saved: tuple[GPT, Path]):
    model, folder = saved
    model.save_pretrained(folder, torch.bfloat16)
    again = GPT.from_pretrained(folder)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert q.dtype == torch.float32
        assert torch.equal(p[: len(q)].to(torch.bfloat16).float(), q), name


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_wrong_shape_names_the_tensor_and_both_shapes(saved: tuple[GPT, Path]):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    key = "transformer.h.1.mlp.c_fc.weight"
    tensors[key] = tensors[key].t().contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight.*\(32, 128\).*\(128, 32\)"):
        GPT.from_pretrained(folder)


def test_missing_and_unknown_tensors(saved: tuple[GPT, Path]):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    less = {k: v for k, v in tensors.items() if "ln_f" not in k}
    save_file(less, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks ln_f\.bias, ln_f\.weight"):
        GPT.from_pretrained(folder)
    save_file({**tensors, "transformer.h.0.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown h\.0\.extra"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama', not a 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function.*'relu'"),
        ({"n_inner": 64}, "n_inner.*128.*64"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_head": 3}, "n_embd 32, n_head 3"),
    ],
)
def test_another_architecture_is_refused(saved: tuple[GPT, Path], change: dict, message: str):
    edit_config(saved[1], **change)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(saved[1])


def test_erf_weights_load_with_a_line(saved: tuple[GPT, Path], capsys: pytest.CaptureFixture[str]):
    edit_config(saved[1], activation_function="gelu")
    GPT.from_pretrained(saved[1])
    assert "erf form of GELU" in capsys.readouterr().err


def test_bad_paths(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        GPT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="import-nanogpt"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a safetensors file"):
        GPT.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        random_model(SMALL).save_pretrained(tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"torch\.float64"):
        random_model(SMALL).save_pretrained(tmp_path / "m", torch.float64)


# ---- what a stranger may put into a folder


def edit_tensors(folder: Path, **changes: Tensor) -> None:
    """Add or replace tensors of the file; names with dots go in as **{"a.b": ...}."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **changes}, file)


def link_out(folder: Path, name: str) -> None:
    """The file as it is, but outside, with a link in its place."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (folder / name).rename(outside / name)
    (folder / name).symlink_to(outside / name)


def replace_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def shard_index(folder: Path, content: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / hf.INDEX).write_text(json.dumps(content))


def fifo(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


WTE, FC = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"
STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights that link out": (lambda d: link_out(d, "model.safetensors"), "link out of"),
    "config that links out": (lambda d: link_out(d, "config.json"), "link out of"),
    "a FIFO for weights": (lambda d: fifo(d, "model.safetensors"), "not a regular file"),
    "a FIFO for a config": (lambda d: fifo(d, "config.json"), "not a regular file"),
    "integers": (
        lambda d: edit_tensors(d, **{FC: torch.ones(32, 128, dtype=torch.int64)}),
        "c_fc.weight' must be one of F64, F32, F16, BF16, got I64",
    ),
    "NaN": (lambda d: edit_tensors(d, **{FC: torch.full((32, 128), torch.nan)}), "not finite"),
    "too large for fp32": (
        lambda d: edit_tensors(d, **{FC: torch.full((32, 128), 1e300, dtype=torch.float64)}),
        "h.0.mlp.c_fc.weight holds values that are not finite",
    ),
    "a scalar for a table": (lambda d: edit_tensors(d, **{WTE: torch.tensor(1.0)}), r"got \(\)"),
    "a scalar for the head": (
        lambda d: edit_tensors(d, **{"lm_head.weight": torch.tensor(1.0)}),
        r"lm_head.weight must be .*got \(\)",
    ),
    "one name twice": (
        lambda d: edit_tensors(d, **{"wte.weight": torch.zeros(197, 32)}),
        "repeats the tensor 'wte.weight'",
    ),
    "escape codes in a name": (
        lambda d: edit_tensors(d, **{"h.\x1b[2J\n\u202eevil": torch.ones(1)}),
        r"unknown h.\\x1b\[2J \\u202eevil",
    ),
    "a very long name": (
        lambda d: edit_tensors(d, **{"x" * 100_000: torch.ones(1)}),
        r"unknown x{70,80}\.\.\. ",
    ),
    "a pointer of Git LFS": (
        lambda d: replace_file(d, "model.safetensors", b"version https://git-lfs.github.com/spec"),
        "git lfs pull",
    ),
    "a page instead of weights": (
        lambda d: replace_file(d, "model.safetensors", b"<!DOCTYPE html><html></html>"),
        "a web page",
    ),
    "no weights at all": (lambda d: replace_file(d, "model.safetensors", b""), "damaged"),
    "an unknown dtype": (
        lambda d: replace_file(
            d,
            "model.safetensors",
            (70).to_bytes(8, "little")
            + b'{"a":{"dtype":"\x1b[31mF","shape":[1],"data_offsets":[0,4]}}'.ljust(70)
            + b"0000",
        ),
        "not a safetensors file",
    ),
    "an index of numbers": (lambda d: shard_index(d, {"weight_map": {"a": 1}}), "no file: 1"),
    "an index without a map": (lambda d: shard_index(d, {"weight_map": [1]}), "lacks"),
    "an index with a separator": (
        lambda d: shard_index(d, {"weight_map": {"a": "..\\\\x.safetensors"}}),
        "names no file",
    ),
    "an index with a NUL": (lambda d: shard_index(d, {"weight_map": {"a": "a\0"}}), "no file"),
    "a deep config": (
        lambda d: replace_file(d, "config.json", b"[" * 100_000),
        "config.json is not valid JSON",
    ),
    "a number of 5000 digits": (
        lambda d: replace_file(d, "config.json", b'{"n_layer": ' + b"1" * 5000 + b"}"),
        "not valid JSON",
    ),
    "a long config": (
        lambda d: replace_file(d, "config.json", b" " * (hf.MAX_JSON_BYTES + 1)),
        "at most 16,777,216 are read",
    ),
    **{
        f"{key} {value!r}"[:40]: (lambda d, k=key, v=value: edit_config(d, **{k: v}), message)
        for key, value, message in [
            ("n_layer", 10_000_000, "n_layer must be a whole number from 1 to 1,000, got 10000000"),
            ("n_layer", "2", "n_layer must be .* got '2'"),
            ("n_layer", True, "n_layer must be .* got True"),
            ("n_layer", 2.0, "n_layer must be .* got 2.0"),
            ("n_layer", None, "n_layer must be .* got None"),
            ("n_embd", 2**64, "n_embd must be"),
            ("n_embd", -32, "n_embd must be"),
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
            ("n_inner", [], "n_inner must be one of .* got a long list"),
        ]
    },
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_folder_is_refused_with_one_line(
    name: str, saved: tuple[GPT, Path], capsys: pytest.CaptureFixture[str]
):
    spoil, message = STRANGERS[name]
    spoil(saved[1])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GPT.from_pretrained(saved[1])
    refuse(capsys, "export", str(saved[1]), "--out", str(saved[1].parent / "out"))
    assert not (saved[1].parent / "out").exists()


def refuse(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The command ends with 2 and one plain line, which is returned."""
    with pytest.raises(SystemExit) as stop:
        hf.main([*args])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.removesuffix("\n")
    assert line.isprintable()
    return line


def test_a_folder_of_the_hubs_cache_is_read(saved: tuple[GPT, Path]):
    """Its snapshots are links into a folder of blobs; those lead out and are followed."""
    model, folder = saved
    cache = folder.parent / "models--gpt2"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, name in enumerate(("model.safetensors", "config.json")):
        (folder / name).rename(cache / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert_same_weights(model, GPT.from_pretrained(snapshot))
    (folder.parent / "link").symlink_to(snapshot)  # which a person names is theirs to choose
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
    """As the file itself, and as all there is in a folder."""
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        line = refuse(capsys, "export", str(path), "--out", str(tmp_path / "out"))
        assert re.search(message, line)
        assert name in line


# ---- where an export goes


def test_an_export_replaces_nothing_but_an_export(
    saved: tuple[GPT, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model, folder = saved
    run = folder.parent / "run"
    for name in ("config.json", "metrics.jsonl", "README.md"):
        run.mkdir(exist_ok=True)
        (run / name).write_text("{}")
        for out in (str(run), "."):
            monkeypatch.chdir(run)
            line = refuse(capsys, "export", str(folder), "--out", out)
            assert "must be new, empty or an earlier export" in line
        assert {p.read_text() for p in run.iterdir()} == {"{}"}
    other = random_model(replace(SMALL, n_layer=1))
    other.save_pretrained(folder)  # another model over an earlier export: all of it is the new one
    assert_same_weights(other, GPT.from_pretrained(folder))
    (folder / "notes").mkdir()
    with pytest.raises(ValueError, match="holds 'notes'"):
        model.save_pretrained(folder)
    (folder / "notes").rmdir()
    (folder.parent / "link").symlink_to("nowhere")
    line = refuse(capsys, "export", str(folder), "--out", str(folder.parent / "link"))
    assert "is a link to nowhere, which is not there; make that folder, or name another" in line
    target = folder.parent / "README.md"
    (folder / "README.md").rename(target)
    (folder / "README.md").symlink_to(target)
    with pytest.raises(ValueError, match=r"holds 'README\.md'"):
        model.save_pretrained(folder)


def test_an_export_that_fails_leaves_what_was(
    saved: tuple[GPT, Path], monkeypatch: pytest.MonkeyPatch
):
    model, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_folder, "save_file", full)
    for out in (folder, folder.parent / "a" / "b"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(out)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [*folder.parent.iterdir()] == [folder]


def test_an_export_holds_finite_values_only(saved: tuple[GPT, Path]):
    model, folder = saved
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 1e5
    with pytest.raises(ValueError, match=r"ln_f\.weight is not finite in torch\.float16"):
        model.save_pretrained(folder.parent / "half", torch.float16)
    assert not (folder.parent / "half").exists()


def test_empty_paths_are_refused(capsys: pytest.CaptureFixture[str], saved: tuple[GPT, Path]):
    assert "path is empty" in refuse(capsys, "export", "", "--out", "x")
    assert "path is empty" in refuse(capsys, "export", str(saved[1]), "--out", "")


def test_the_card_of_a_fine_tuned_model(saved: tuple[GPT, Path]):
    """Trained at all 32, then at 8: positions 8 to 31 have been trained, and it says when."""
    model, folder = saved
    model.trained_context, model.fine_tuned_context = 32, 8
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "trained at a context of 32 tokens" in card
    assert "last training was at 8 tokens: positions from 8 to 31 are those of" in card
    again = GPT.from_pretrained(folder)
    assert (again.trained_context, again.fine_tuned_context) == (32, 8)
    assert again.config.block_size == 32


# ---- nanoGPT


def nanogpt_checkpoint(file: Path, model: GPT, bias: bool = True, padded: int = 0) -> None:
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


def test_import_nanogpt_without_biases(tmp_path: Path):
    model = random_model(SMALL)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias"):
                p.zero_()
    nanogpt_checkpoint(tmp_path / "ckpt.pt", model, bias=False)
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


def spoiled(file: Path, **changes: object) -> None:
    """A good checkpoint with other sizes, or with other contents under `model`."""
    content = torch.load(file)
    for key, value in changes.items():
        content["model_args" if key in content["model_args"] else "model"][key] = value
    torch.save(content, file)


NANOGPT: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "not a regular file"),
    "text": (lambda f: f.write_text("hello"), "no checkpoint"),
    "nothing": (lambda f: f.write_bytes(b""), "no checkpoint"),
    "cut short": (lambda f: f.write_bytes(f.read_bytes()[:3000]), "no checkpoint"),
    "torch's old format": (
        lambda f: torch.save({}, f, _use_new_zipfile_serialization=False),
        "no checkpoint",
    ),
    "build-nanogpt": (
        lambda f: torch.save({"model": {}, "config": Sizes(), "step": 1}, f),
        r"classes are 'tests.test_hf.Sizes'.*model_args.*import that",
    ),
    "a tensor": (lambda f: torch.save(torch.ones(2), f), "must hold a dict"),
    "only weights": (lambda f: torch.save({"weights": torch.ones(2)}, f), "got 'weights'"),
    "keys that are none": (lambda f: torch.save({3: 1, "\x1b[1m": 2}, f), r"got 3, '\\x1b\[1m'"),
    "model_args a list": (lambda f: torch.save({"model": {}, "model_args": []}, f), "expected"),
    "no sizes": (lambda f: torch.save({"model": {}, "model_args": {}}, f), "lacks 'vocab_size'"),
    "many layers": (lambda f: spoiled(f, n_layer=10**7), "n_layer must be a whole number"),
    "NaN layers": (lambda f: spoiled(f, n_layer=float("nan")), "n_layer must be a whole number"),
    "a tensor of layers": (lambda f: spoiled(f, n_layer=torch.ones(9, 9)), "n_layer must be"),
    "a vocabulary in words": (lambda f: spoiled(f, vocab_size="many"), "vocab_size must be"),
    "more than the file": (lambda f: spoiled(f, n_layer=1000, n_embd=65536), "bytes, too few for"),
    "no tensor": (lambda f: spoiled(f, extra=3), "'extra' must name a dense tensor"),
    "integers": (lambda f: spoiled(f, extra=torch.ones(3).int()), "'extra' must name a dense"),
    "sparse": (lambda f: spoiled(f, extra=torch.eye(3).to_sparse()), "'extra' must name a dense"),
    "meta": (lambda f: spoiled(f, extra=torch.ones(3, device="meta")), "'extra' must name"),
    "an unknown tensor": (lambda f: spoiled(f, **{"\x1b[2J": torch.ones(3)}), r"unknown \\x1b"),
    "NaN": (
        lambda f: spoiled(f, **{"_orig_mod.transformer.ln_f.weight": torch.full((32,), torch.nan)}),
        "not finite",
    ),
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
    nanogpt_checkpoint(tmp_path / "ckpt.pt", random_model(SMALL))
    content = torch.load(tmp_path / "ckpt.pt")
    del content["model"]["_orig_mod.transformer.ln_f.weight"]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"lacks ln_f\.weight"):
        load_nanogpt(tmp_path / "ckpt.pt")


def test_export_command(saved: tuple[GPT, Path], tmp_path: Path):
    hf.main(["export", str(saved[1]), "--out", str(tmp_path / "b"), "--dtype", "bf16"])
    assert load_file(tmp_path / "b" / "model.safetensors")["transformer.ln_f.weight"].dtype == (
        torch.bfloat16
    )
    assert GPT.from_pretrained(tmp_path / "b").trained_context == 8
