"""Files that are written whole, and with the mode that the umask asks for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig, tokenizer
from model.files import replacing, write_atomically
from training.data import load_corpus
from training.prepare import Config, prepare


@pytest.fixture(params=[0o022, 0o007], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


def test_every_writer_obeys_the_umask(umask: int, tmp_path: Path, monkeypatch) -> None:
    """Token cache, vocabulary, shards and an exported model, weights included."""
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path / "cache")
    tokenizer.get_encoding.__wrapped__()
    (tmp_path / "a.txt").write_text("to be or not to be")
    load_corpus([tmp_path / "a.txt"])
    prepare(Config((str(tmp_path / "a.txt"),), str(tmp_path / "shards")))
    torch.manual_seed(0)
    GPT(GPTConfig(8, 50257, 1, 1, 8)).save_pretrained(tmp_path / "model")
    assert len([*tmp_path.rglob("*")]) > 14
    assert modes(tmp_path) == {0o666 & ~umask}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a"
    write_atomically(path, "\u00e9")
    assert path.read_bytes() == b"\xc3\xa9"

    def fail() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError(28, "no space left")  # of a write: it names no file

    with pytest.raises(OSError, match=f"no space left: '{path}'"):
        fail()
    assert [p.name for p in path.parent.iterdir()] == ["a"]
    assert path.read_bytes() == b"\xc3\xa9"
