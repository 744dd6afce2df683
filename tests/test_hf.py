"""GPT-2 weights in and out. transformers runs in a process of its own, with another working
directory: beside our folder named `kernels` it would take that for the package it looks for."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model import GPT, MODELS, hf
from tests.weights import SMALL, gpt2_sizes, random_model

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
    """A model trained at 16 of its 64 positions is exported with 16."""
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


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_model_with_another_tokenizer_is_refused(name: str, tmp_path: Path):
    """Many models on the hub have GPT-2's shape, 50,257 tokens, and a vocabulary of their own."""
    GPT(MODELS["smoke"]).save_pretrained(tmp_path)
    if name == "tokenizer.json":  # as transformers writes it since version 5
        (tmp_path / "vocab.json").unlink()
    GPT.from_pretrained(tmp_path)
    held = json.loads((tmp_path / name).read_text())
    vocab = held if name == "vocab.json" else held["model"]["vocab"]
    vocab["the"], vocab["of"] = vocab["of"], vocab["the"]
    (tmp_path / name).write_text(json.dumps(held))
    with pytest.raises(ValueError, match=f"{name} is not GPT-2's vocabulary"):
        GPT.from_pretrained(tmp_path)
