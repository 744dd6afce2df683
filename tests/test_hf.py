"""GPT-2 weights in and out. transformers runs in a process of its own, with another working
directory: beside our folder named `kernels` it would take that for the package it looks for."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, MODELS, GPTConfig, hf

SMALL = GPTConfig(block_size=32, vocab_size=197, n_layer=2, n_head=2, n_embd=32)
SIZES = ("124m", "350m", "774m", "1558m")

TRANSFORMERS_SIDE = """
import json, sys
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

request = json.load(sys.stdin)
answer = {"load": {}, "tokenizer": {}, "structure": {}}
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
    whole = {"load": [], "tokenizer": [], "structure": [], "save": [], **request}
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
        idx = torch.arange(2 * 24).view(2, 24) % model.config.vocab_size
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
    answer = ask_transformers(
        root, load=load, tokenizer=[(str(folders["full-vocab"]), TEXTS)],
        structure=structure, save=save,
    )  # fmt: skip
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
        ours = hf._our_tensors(GPT(MODELS[size]))
    shapes = {
        hf.PREFIX + name: hf._file_shape(name, MODELS[size], p.shape) for name, p in ours.items()
    }
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
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def test_round_trip_is_exact(saved: tuple[GPT, Path]):
    model, folder = saved
    again = GPT.from_pretrained(folder)
    assert_same_weights(model, again)
    assert again.config == model.config
    assert again.trained_context == 8
    assert again.training
    assert again.transformer.wte.weight[SMALL.vocab_size :].abs().max() == 0
    assert "context of 8 tokens" in (folder / "README.md").read_text()
    assert not list(folder.glob("*.partial"))
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
    with pytest.raises(ValueError, match="names a path"):
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
        assert torch.equal(p.to(torch.bfloat16).float(), q), name


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
    assert_same_weights(model, hf.load_nanogpt(tmp_path / "ckpt.pt"))


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


def test_nanogpt_bad_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        hf.load_nanogpt(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="no checkpoint"):
        hf.load_nanogpt(tmp_path / "text.pt")
    torch.save({"weights": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a nanoGPT checkpoint"):
        hf.load_nanogpt(tmp_path / "other.pt")
    model = random_model(SMALL)
    nanogpt_checkpoint(tmp_path / "ckpt.pt", model)
    content = torch.load(tmp_path / "ckpt.pt")
    del content["model"]["_orig_mod.transformer.ln_f.weight"]
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"lacks ln_f\.weight"):
        hf.load_nanogpt(tmp_path / "ckpt.pt")


def test_export_command(saved: tuple[GPT, Path], tmp_path: Path):
    hf.main(["export", str(saved[1]), "--out", str(tmp_path / "b"), "--dtype", "bf16"])
    assert load_file(tmp_path / "b" / "model.safetensors")["transformer.ln_f.weight"].dtype == (
        torch.bfloat16
    )
    assert GPT.from_pretrained(tmp_path / "b").trained_context == 8
