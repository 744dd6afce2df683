"""Where the tokens of a run come from: texts and their cache, token files, a validation text."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

import train
from model import tokenizer
from training import data
from training.data import Corpus, load_corpus
from training.prepare import Config, prepare
from training.shards import hash_file


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Token files of the tests stay in the tests' folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer.get_encoding()  # loaded from the real cache, once
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def all_tokens(corpus: Corpus) -> list[int]:
    return np.asarray(corpus.tokens).tolist()


def no_network(url: str) -> bytes:
    raise OSError(f"no route to {url}")


# ---- sources


def test_documents_are_joined_by_endoftext(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "b.txt").write_text("two\r\nlines", encoding="utf-8", newline="")
    (corpus / "sub" / "a.md").write_text("<|endoftext|>", encoding="utf-8")
    (corpus / "sub" / "c.JSONL").write_text('{"text": "x"}\n\n{"text": "y"}', encoding="utf-8")
    (corpus / ".hidden").write_bytes(b"\0")
    said: list[str] = []
    ids = all_tokens(load_corpus([corpus], said.append))
    assert said == [f"data: {corpus}: 1 .jsonl, 1 .md, 1 .txt"]
    assert ids.count(tokenizer.EOT) == 3  # between the four, not the text that spells it
    eot = "<|endoftext|>"
    assert tokenizer.decode(ids) == f"two\r\nlines{eot}{eot}{eot}x{eot}y"
    files = [corpus / "b.txt", *(corpus / "sub" / name for name in ("a.md", "c.JSONL"))]
    assert all_tokens(load_corpus(files)) == ids
    # What training.prepare makes of it is the same, each document after an endoftext.
    prepare(Config((str(corpus),), str(tmp_path / "out"), processes=1))
    assert all_tokens(load_corpus([tmp_path / "out"])) == [tokenizer.EOT, *ids]


def test_cache_is_used_and_follows_the_source(tmp_path: Path, own_cache: Path, monkeypatch) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three", encoding="utf-8")
    first = load_corpus([text])
    (path,) = (own_cache / "tokens").glob("*.bin")
    meta = json.loads(path.with_suffix(".json").read_text())
    assert meta["encoding"] == "gpt2"
    assert path.stat().st_size == 6

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_piece", lambda _: pytest.fail("tokenised again"))
        assert all_tokens(load_corpus([text])) == all_tokens(first)

    text.write_text("one two four", encoding="utf-8")
    assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two four"

    text.write_text("one two three", encoding="utf-8")
    for damaged in (b"\0\0\0\0", b"\xff" * 6, b"", path.read_bytes()[::-1]):
        path.write_bytes(damaged)
        assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two three"
    path.with_suffix(".json").write_text('{"tokens": "three"}')
    assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two three"


def test_input_txt_comes_first(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("mine", encoding="utf-8")
    said: list[str] = []
    assert tokenizer.decode(all_tokens(load_corpus([], said.append))) == "mine"
    assert "input.txt" in said[0]


def test_download_is_checked_and_kept(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr(data, "_download", lambda _: text)
        corpus = load_corpus([], lambda _: None)
    assert tokenizer.decode(all_tokens(corpus)).encode() == text
    monkeypatch.setattr(data, "_download", no_network)  # the second time needs none
    assert load_corpus([], lambda _: None).name == "tiny Shakespeare"
    # A damaged copy is not believed.
    (own_cache / "tinyshakespeare.txt").write_text("something else", encoding="utf-8")
    assert load_corpus([], lambda _: None).name == "pydoc_data.topics"


def test_wrong_bytes_from_the_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, _: int) -> bytes:
            return b"<html>log in to the network</html>"

    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: Answer())
    said: list[str] = []
    assert load_corpus([], said.append).name == "pydoc_data.topics"
    assert "sha256" in said[0]
    assert "--data FILE" in said[0]


def test_offline_text_is_english_and_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_download", no_network)
    corpus = load_corpus([], lambda _: None)
    assert len(corpus.tokens) > 100_000
    assert "statement" in tokenizer.decode(all_tokens(corpus)[:20_000])


def test_tiny_shakespeare_token_count() -> None:
    root = Path(__file__).parents[1]
    places = [root / "input.txt", root / ".cache" / "tinyshakespeare.txt"]
    known = (p for p in places if p.is_file() and hash_file(p) == data.SHAKESPEARE_SHA256)
    found = next(known, None)
    if found is None:
        pytest.skip("tiny Shakespeare is not on this machine (make train downloads it)")
    corpus = load_corpus([found])
    assert len(corpus.tokens) == 338_025
    assert len(corpus.split(0.0)[0]) == 338_025
    train, val = corpus.split(0.1)
    assert (len(train), len(val)) == (304_223, 33_802)


def test_a_validation_text_of_its_own(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text(f"{name} text here")
    corpus = load_corpus([tmp_path / "train.txt"], val=[tmp_path / "val.txt"])
    for fraction in (0.0, 0.5):
        parts = [tokenizer.decode(np.asarray(part)) for part in corpus.split(fraction)]
        assert parts == ["train text here", "val text here"]
    assert corpus.sha256 not in {
        load_corpus([tmp_path / f"{n}.txt"]).sha256 for n in ("train", "val")
    }
    write_tokens(tmp_path / "both" / "train.bin", 1, 1)
    write_tokens(tmp_path / "both" / "val.bin", 2, 2)
    corpus = load_corpus([tmp_path / "train.txt"], val=[tmp_path / "both"])
    assert np.asarray(corpus.split(0.1)[1]).tolist() == [2, 2]  # never what is trained on
    write_tokens(tmp_path / "short.bin", 7)
    asked = train.parse(["--preset", "smoke", "--val-fraction", "0", "--val", "val.txt"])
    assert asked.evaluates_before(asked.eval_interval, last=False)
    with pytest.raises(ValueError, match="validation needs at least 2 tokens, got 1"):
        load_corpus([tmp_path / "train.txt"], val=[tmp_path / "short.bin"]).split(0.0)


def write_tokens(path: Path, *ids: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(np.array(ids, dtype="<u2").tobytes())
    return path


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_corpus([path])
    write_tokens(path, 15496, 995, 0)
    assert all_tokens(load_corpus([path])) == [15496, 995, 0]
    path.with_suffix(".json").write_text('{"encoding": "cl100k_base"}')
    with pytest.raises(ValueError, match="vocabulary 'cl100k_base', this model needs 'gpt2'"):
        load_corpus([path])
    path.with_suffix(".json").unlink()
    write_tokens(path, *[0] * 10**5, 65535, *[0] * 10**5)
    with pytest.raises(ValueError, match=r"tokens.bin holds token 65535, GPT-2's vocabulary ends"):
        load_corpus([path])
    path.write_bytes(np.arange(100, dtype="<u4").tobytes())
    with pytest.raises(ValueError, match="every other one is 0 or the like; are they uint32"):
        load_corpus([path])
    path.write_bytes((np.arange(100, dtype="<u4") + 127_900).tobytes())  # as Llama 3 has them
    with pytest.raises(ValueError, match="every other one is 1 or the like; are they uint32"):
        load_corpus([path])
    # llm.c's header for Llama 3.
    path.write_bytes(np.array([20240801, 1, 9], dtype="<i4").tobytes())
    with pytest.raises(ValueError, match=r"tokens.bin holds token 55713, .*another vocabulary"):
        load_corpus([path])
    path.write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="got 3 bytes"):
        load_corpus([path])


def test_folders_of_token_files(tmp_path: Path, monkeypatch) -> None:
    """As nanoGPT, llm.c and build-nanogpt write them, beside the scripts that did."""
    folder = tmp_path / "tokens"
    for name, token in (("medieval_train.bin", 1), ("x_val_000000.bin", 2), ("readme.md", 0)):
        write_tokens(folder / name, token, token)
    lines: list[str] = []
    corpus = load_corpus([folder], lines.append)
    assert lines == [f"data: the token files of {folder}; not read: readme.md"]
    assert (all_tokens(corpus), corpus.val and len(corpus.val)) == ([1, 1], 2)
    monkeypatch.chdir(folder)
    assert all_tokens(load_corpus(["."])) == [1, 1]
    with pytest.raises(ValueError, match=r"holds tokens and must stand alone, got 2 paths; name a"):
        load_corpus([folder / "medieval_train.bin", folder / "x_val_000000.bin"])
    (folder / "medieval_train.json").write_text('{"encoding": "cl100k_base"}')
    with pytest.raises(ValueError, match=r"medieval_train.bin was made with the .* 'cl100k"):
        load_corpus([folder])
    (folder / "meta.pkl").write_bytes(b"")
    for path in (folder, folder / "x_val_000000.bin"):
        with pytest.raises(ValueError, match=r"meta.pkl says that .* are characters, as nanoGPT's"):
            load_corpus([path])
    with pytest.raises(ValueError, match=r"holds validation files alone: val.bin"):
        load_corpus([write_tokens(tmp_path / "only" / "val.bin", 1).parent])


@pytest.mark.parametrize(("fraction", "num_val"), [(0.002, 0), (0.015, 1)])
def test_too_little_text_for_validation_is_refused_at_the_start(tmp_path, fraction, num_val):
    path = write_tokens(tmp_path / "a.bin", *range(100))
    assert len(load_corpus([path]).split(0.02)[1]) == 2
    assert len(load_corpus([path]).split(0.0)[0]) == 100
    with pytest.raises(ValueError, match=f"2 tokens, got {num_val} .*--val-fraction 0 for none"):
        load_corpus([path]).split(fraction)
