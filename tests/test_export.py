"""Our own model folders: what is written, what is read back, and where an export may go."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig, hf
from model import export as export_folder
from tests.weights import SMALL, assert_same_weights, random_model, refuse, save


def test_round_trip_is_exact(tmp_path: Path):
    model, folder = save(tmp_path)
    again = GPT.from_pretrained(folder)
    assert_same_weights(model, again)
    assert again.config == replace(model.config, block_size=8)
    assert again.trained_context == 8
    assert again.training
    assert again.transformer.wte.weight[SMALL.vocab_size :].abs().max() == 0
    assert "context of 8 tokens" in (folder / "README.md").read_text()
    written = {*export_folder.EXPORTED} - {*export_folder.TOKENIZER}
    assert {p.name for p in folder.iterdir()} == written
    assert [*folder.parent.iterdir()] == [folder]  # no temporary folder is left
    file = load_file(folder / hf.WEIGHTS)
    assert file["transformer.wte.weight"].shape == (SMALL.vocab_size, SMALL.n_embd)
    assert "lm_head.weight" not in file


def test_run_folder(tmp_path: Path):
    model, folder = save(tmp_path)
    run = folder.parent / "run"
    run.mkdir()
    (run / "config.json").write_text('{"recipe": {}}')
    folder.rename(run / "model")
    assert_same_weights(model, GPT.from_pretrained(run))


def test_old_file_without_prefix_with_masks_head_and_surplus_rows(tmp_path: Path):
    """The layout of the hub's first gpt2 file, a copy of the tied head, a padded vocabulary."""
    model, folder = save(tmp_path)
    file = load_file(folder / hf.WEIGHTS).items()
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in file}
    for i in range(SMALL.n_layer):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    surplus = torch.full((5, SMALL.n_embd), 9.0)
    tensors["wte.weight"] = torch.cat([tensors["wte.weight"], surplus])
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / hf.WEIGHTS)
    assert_same_weights(model, GPT.from_pretrained(folder))
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, folder / hf.WEIGHTS)
    with pytest.raises(ValueError, match="tied"):
        GPT.from_pretrained(folder)


def test_sharded(tmp_path: Path):
    model, folder = save(tmp_path)
    tensors = list(load_file(folder / hf.WEIGHTS).items())
    (folder / hf.WEIGHTS).unlink()
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


def test_half_precision_files_load_as_fp32(tmp_path: Path):
    model, folder = save(tmp_path)
    model.save_pretrained(folder, torch.bfloat16)
    again = GPT.from_pretrained(folder)
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert q.dtype == torch.float32
        assert torch.equal(p[: len(q)].to(torch.bfloat16).float(), q), name


def test_missing_and_unknown_tensors(tmp_path: Path):
    _, folder = save(tmp_path)
    tensors = load_file(folder / hf.WEIGHTS)
    less = {k: v for k, v in tensors.items() if "ln_f" not in k}
    more = {**tensors, "transformer.h.0.extra": torch.ones(1)}
    for content, message in (
        (less, r"lacks ln_f\.bias, ln_f\.weight"),
        (more, r"unknown h\.0\.extra"),
    ):
        save_file(content, folder / hf.WEIGHTS)
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(folder)


def test_erf_weights_load_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, folder = save(tmp_path)
    file = folder / hf.CONFIG
    file.write_text(file.read_text().replace("gelu_new", "gelu"))
    GPT.from_pretrained(folder)
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


# ---- where an export goes


def test_an_export_replaces_nothing_but_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    model, folder = save(tmp_path)
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
    assert "is a link to nowhere, which does not exist; make that folder, or name another" in line
    target = folder.parent / "README.md"
    (folder / "README.md").rename(target)
    (folder / "README.md").symlink_to(target)
    with pytest.raises(ValueError, match=r"holds 'README\.md'"):
        model.save_pretrained(folder)


def test_an_export_that_fails_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, folder = save(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_folder, "save_file", full)
    for out in (folder, folder.parent / "a" / "b"):
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(out)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [*folder.parent.iterdir()] == [folder]


def test_an_export_holds_finite_values_only(tmp_path: Path):
    model, folder = save(tmp_path)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 1e5
    with pytest.raises(ValueError, match=r"ln_f\.weight is not finite in torch\.float16"):
        model.save_pretrained(folder.parent / "half", torch.float16)
    assert not (folder.parent / "half").exists()


def test_empty_paths_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    _, folder = save(tmp_path)
    for source, out in (("", "x"), (str(folder), "")):
        assert "path is empty" in refuse(capsys, "export", source, "--out", out)


def test_the_card_of_a_fine_tuned_model(tmp_path: Path):
    """Trained at all 32, then at 8: the card says which positions the last training saw."""
    model, folder = save(tmp_path)
    model.trained_context, model.fine_tuned_context = 32, 8
    model.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert "trained with a context of 32 tokens" in card
    assert "a context of 8 tokens: positions 8 to 31 are from the training before" in card
    again = GPT.from_pretrained(folder)
    assert (again.trained_context, again.fine_tuned_context) == (32, 8)
    assert again.config.block_size == 32


def test_export_command(tmp_path: Path):
    _, folder = save(tmp_path)
    hf.main(["export", str(folder), "--out", str(tmp_path / "b"), "--dtype", "bf16"])
    assert load_file(tmp_path / "b" / "model.safetensors")["transformer.ln_f.weight"].dtype == (
        torch.bfloat16
    )
    assert GPT.from_pretrained(tmp_path / "b").trained_context == 8
