"""Text to tokens to batches: sources, the cache, and the order of the rows."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import pickle
import sys
from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from model import tokenizer
from training import data, documents
from training.data import Corpus, DataLoaderLite, Prefetcher, load_corpus
from training.ngrams import DISCOUNT, ngram_losses
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
    prepare(Config((str(corpus),), str(tmp_path / "out"), processes=1), quiet=True)
    assert all_tokens(load_corpus([tmp_path / "out"])) == [tokenizer.EOT, *ids]


def test_cache_is_used_and_follows_the_source(tmp_path: Path, monkeypatch) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three", encoding="utf-8")
    first = load_corpus([text])
    meta = json.loads(first.path.with_suffix(".json").read_text())
    assert (meta["tokens"], meta["encoding"], meta["documents"]) == (3, "gpt2", 1)
    assert first.path.stat().st_size == 6

    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_piece", lambda _: pytest.fail("tokenised again"))
        assert all_tokens(load_corpus([text])) == all_tokens(first)

    text.write_text("one two four", encoding="utf-8")
    assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two four"

    text.write_text("one two three", encoding="utf-8")
    for damaged in (b"\0\0\0\0", b"\xff" * 6, b"", first.path.read_bytes()[::-1]):
        first.path.write_bytes(damaged)
        assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two three"
    first.path.with_suffix(".json").write_text('{"tokens": "three"}')
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a", b"", "is empty"),
        ("a.txt", b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3; convert it"),
        ("a.txt", "utf-16".encode("utf-16"), "must be UTF-8 text, it is UTF-16; .*iconv -f UTF-16"),
        ("a.txt", "utf-16".encode("utf-16-le"), "is binary, not text: byte 0x00 at offset 1"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl", gzip.compress(b"x", mtime=0), r"a.jsonl: line 1 at byte 0 cannot be read"),
        ("a.txt.bz2", bz2.compress(b"x")[:-4], "cannot be unpacked .*damaged or was cut short"),
        ("a.txt.xz", lzma.compress(b"x")[:20] + b"\0" * 40, "cannot be unpacked"),
        ("a.txt.gz", gzip.compress(b"caf\xe9", mtime=0), "not UTF-8: byte 0xe9 at offset 3"),
        (
            "a.tar.gz",
            gzip.compress(b"name\0\0", mtime=0),
            "binary, not text: byte 0x00 at offset 4",
        ),
        (
            "a.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            "is Parquet in a compressed file; unpack",
        ),
        ("a.json.xz", lzma.compress(b"{}"), "is JSON; write one object a line"),
        ("a.parquet", b"<html>", "must be Parquet or Arrow, but it begins with b'<html>'; fetch"),
        ("a.zip", b"PK\x03\x04\x14\0", "is a zip archive"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        ("a.pkl", pickle.dumps("x"), "is a pickle"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "is binary"),
        ("a.json", b"{}", r"is JSON; write one object a line, {\"text\": ...}, and name it .jsonl"),
        ("a.CSV", b"a,b", "is a table"),
    ],
)
def test_what_is_no_text_is_refused_by_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (load_corpus, lambda paths: prepare(Config(tuple(map(str, paths)), "out"))):
        with pytest.raises(ValueError, match=message):
            read([tmp_path / name])
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == [name]


def test_paths_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.txt"):
        load_corpus([tmp_path / "absent.txt"])
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no \.txt, \.md, code, .* file in the folder .*folder"):
        load_corpus([folder])
    for name in ("a.txt", "b.png", "c.html"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=r"holds b.png and 1 more, which is not \.txt, \.md"):
        load_corpus([folder])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a pipe or a device"):
        load_corpus([tmp_path / "pipe"])
    for empty in ([""], ["a.txt", ""]):
        with pytest.raises(ValueError, match="must name a file or a folder, got nothing"):
            load_corpus(empty)


# ---- the same documents, however they lie around

DOCUMENTS = ["one", "caf\u00e9 \U0001f600\r\n", "", "three " * 40, *map(str, range(90))]


def write_documents(folder: Path, form: str) -> Path:
    """DOCUMENTS in a file, or a folder, of one form; the column is called "body"."""
    lines = "".join(json.dumps({"body": text, "id": 1}) + "\n" for text in DOCUMENTS).encode()
    path = folder / f"a.{form}"
    if form in PACKERS:
        half = lines.index(b"\n", len(lines) // 2) - 5  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(b"".join(PACKERS[form](part) for part in (lines[:half], lines[half:])))
        return path
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = pa.table({"id": range(len(DOCUMENTS)), "body": DOCUMENTS})
    if form == "parquet":
        pq.write_table(table, path, row_group_size=50)
    elif form == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    elif form == "jsonl.zst":
        with pa.CompressedOutputStream(path, "zstd") as out:
            out.write(lines)
    else:  # a folder as save_to_disk of Hugging Face's datasets lays it out
        path.mkdir()
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for name, part in zip(names, (table[:30], table[30:]), strict=True):
            with pa.ipc.new_stream(path / name, table.schema) as writer:
                writer.write_table(part, max_chunksize=20)
        (path / "dataset_info.json").write_text("{}")
        state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
        (path / "state.json").write_text(json.dumps(state))
    return path


PACKERS = {
    "jsonl": bytes,
    "jsonl.gz": gzip.compress,
    "jsonl.bz2": bz2.compress,
    "jsonl.xz": lzma.compress,
}


@pytest.mark.parametrize("form", [*PACKERS, "jsonl.zst", "parquet", "arrow", "dataset"])
def test_every_form_of_the_same_documents_gives_the_same_tokens(tmp_path, monkeypatch, form):
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    monkeypatch.setattr(documents, "BATCH_ROWS", 7)
    path = write_documents(tmp_path, form)
    want = np.concatenate([p for t in DOCUMENTS for p in ([tokenizer.EOT], tokenizer.encode(t))])
    assert all_tokens(load_corpus([path], key="body")) == want[1:].tolist()
    cfg = Config((str(path),), str(tmp_path / "out"), text_column="body", processes=1)
    assert prepare(cfg, quiet=True)["documents"] == len(DOCUMENTS)
    assert all_tokens(load_corpus([tmp_path / "out"])) == want.tolist()
    files = documents.find_inputs([path], key="body")
    assert isinstance(files, list)
    pieces = [piece for file in files for piece in documents.cut(file, "body")]
    assert len(pieces) > 5
    assert sum(piece.advance for piece in pieces) == sum(file.stat().st_size for file in files)
    with pytest.raises(ValueError, match=r"'text', (it has 'id', 'body'|got None); --text-column"):
        load_corpus([path])


def test_tables_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    whole = write_documents(tmp_path, "parquet").read_bytes()
    dataset = write_documents(tmp_path, "dataset")
    stream = (dataset / "data-00001-of-00002.arrow").read_bytes()
    with pa.ipc.new_stream(
        tmp_path / "null.arrow", (t := pa.table({"body": ["a", None]})).schema
    ) as w:
        w.write_table(t)
    for name, content, message in (
        ("cut.parquet", whole[:-90], "cut.parquet cannot be read as a table"),
        ("holed.parquet", whole[:4] + b"\xff" * 2000 + whole[2004:], "cannot be read as a table"),
        ("cut.arrow", stream[: len(stream) // 2], "cut.arrow cannot be read as a table"),
        ("null.arrow", (tmp_path / "null.arrow").read_bytes(), "row 1: no text under 'body', got"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_corpus([tmp_path / name], key="body")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["body", "body"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pa.ipc.new_file(tmp_path / "twice.arrow", twice.schema) as w:
        w.write_table(twice)
    for name in ("twice.parquet", "twice.arrow"):
        with pytest.raises(
            ValueError, match=f"{name} must have one column 'body', it has 'body', 'body'"
        ):
            load_corpus([tmp_path / name], key="body")
    (dataset / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"data: no such file: .*data-00001-of-00002"):
        load_corpus([dataset], key="body")
    (dataset / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match=r"state.json is not as .*; name the .arrow files"):
        load_corpus([dataset])
    both = dataset.rename(tmp_path / "train").parent
    (both / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(ValueError, match=r"of several splits; name one of them: .*/train"):
        load_corpus([both])


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_is_read_in_flat_memory(tmp_path: Path, form: str) -> None:
    """Whatever its row groups: here one that holds all."""
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    texts, path = [f"{i} " * (5000 - i % 7) for i in range(1000)], tmp_path / f"a.{form}"
    table = pa.table({"text": texts})
    if form == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False, write_batch_size=50)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    del table
    size, before, most, rows = path.stat().st_size, pa.total_allocated_bytes(), 0, 0
    for piece in documents.cut(path):
        most, rows = max(most, pa.total_allocated_bytes() - before), rows + len(piece.data)
    assert rows == 1000
    assert most < size / 3


def test_without_pyarrow_the_file_and_the_package_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, start in (("a.parquet", b"PAR1...PAR1"), ("a.txt.zst", b"\x28\xb5\x2f\xfd...")):
        (tmp_path / name).write_bytes(start)
        with pytest.raises(
            ValueError, match=r"needs pyarrow, which is not .*; pip install pyarrow"
        ):
            load_corpus([tmp_path / name])


def test_patterns_and_code(tmp_path: Path) -> None:
    for name in ("b.py", "sub/a.py", "sub/deep/c.PY", "sub/x.png", "d.txt.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data = f"# {name}\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    got = tokenizer.decode(all_tokens(load_corpus([f"{tmp_path}/**/*.py", f"{tmp_path}/*.gz"])))
    assert got == "# b.py\n<|endoftext|># sub/a.py\n<|endoftext|># d.txt.gz\n"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*\*\.rs"):
        load_corpus([tmp_path / "*.rs"])
    (tmp_path / "sub" / "x.png").unlink()
    said: list[str] = []
    load_corpus([tmp_path / "sub", tmp_path / "d.txt.gz"], said.append)
    assert said[0].endswith(": 1 .gz, 2 .py")
    assert all_tokens(load_corpus([f"{tmp_path}/s*/**"])).count(tokenizer.EOT) == 1  # each once


def test_a_pattern_follows_no_link_back_and_takes_nothing_hidden(
    tmp_path: Path, monkeypatch
) -> None:
    for name in ("a.txt", ".b.txt", ".git/c.txt", "d/.e/f.txt", ".kept/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d" / "back").symlink_to(tmp_path)
    for pattern, name in (
        (f"{tmp_path}/**/*.txt", "a.txt"),
        ("**/*.txt", "a.txt"),
        ("d/../*.txt", "a.txt"),
        ("**.txt", "a.txt"),
        (f"{tmp_path}/a**t", "a.txt"),
        (".k*/*.txt", ".kept/g.txt"),
        (".kept/**", ".kept/g.txt"),
    ):
        monkeypatch.chdir(tmp_path)
        assert tokenizer.decode(all_tokens(load_corpus([pattern], lambda _: None))) == name, pattern
    with pytest.raises(ValueError, match=r"holds back, which is not \.txt"):
        load_corpus([f"{tmp_path}/d*/**"])


def test_what_only_looks_compressed_or_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    for name, content in (
        ("BZh.txt", b"BZhello, a word"),
        ("notes[1].txt", b"hello"),
        ("padded.txt.gz", gzip.compress(b"hello") + b"\0" * 512),  # as tapes and tar leave it
        ("bom.txt.gz", gzip.compress(b"\xef\xbb\xbfhello")),
    ):
        (tmp_path / name).write_bytes(content)
        said: list[str] = []
        text = tokenizer.decode(all_tokens(load_corpus([tmp_path / name], said.append)))
        assert text == ("BZhello, a word" if name == "BZh.txt" else "hello")
        assert bool(said) == (name == "bom.txt.gz")


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


# ---- order


def counted_up(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint16)


def walk_the_text(tokens: np.ndarray, B: int, T: int, num_batches: int) -> list[np.ndarray]:
    """The published loader, written down again: a window of B*T + 1, back to 0 when it overruns."""
    batches, at = [], 0
    for _ in range(num_batches):
        window = tokens[at : at + B * T + 1]
        batches.append(window[:-1].reshape(B, T))
        at += B * T
        if at + B * T + 1 > len(tokens):
            at = 0
    return batches


# 330 batches in tiny Shakespeare; here 5, not a multiple of 4, with and without a rest.
@pytest.mark.parametrize("num_tokens", [5 * 12 + 1, 5 * 12 + 12, 6 * 12])
@pytest.mark.parametrize("merged", [1, 4])
def test_sequential_order_across_the_wrap(num_tokens: int, merged: int) -> None:
    tokens, B, T = counted_up(num_tokens), 3, 4
    expected = walk_the_text(tokens, B, T, 16)
    loader = DataLoaderLite(tokens, B * merged, T, "sequential", wrap_rows=B)
    got: list[np.ndarray] = []
    for _ in range(16 // merged):
        x, y = loader.next_batch()
        torch.testing.assert_close(x[:, 1:], y[:, :-1])
        torch.testing.assert_close(y - x, torch.ones_like(x))  # the next token, also in the text
        got += np.split(x.numpy(), merged)
    np.testing.assert_array_equal(got, expected)


def test_shuffled_order_draws_each_row_once_an_epoch() -> None:
    tokens, T = counted_up(10 * 4 + 3), 4
    loader = DataLoaderLite(tokens, 3, T, seed=5)
    assert loader.rows_per_epoch == 10
    rows = np.concatenate([loader.next_batch()[0][:, 0].numpy() for _ in range(10)])  # 3 epochs
    epochs = rows.reshape(3, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 40, T))
    assert len({tuple(e) for e in epochs}) == 3
    assert (loader.epoch, loader.index) == (3, 0)
    again = DataLoaderLite(tokens, 3, T, seed=5).next_batch()[0][:, 0].numpy()
    np.testing.assert_array_equal(again, rows[:3])
    other = DataLoaderLite(tokens, 10, T, seed=6).next_batch()[0][:, 0].numpy()
    assert not np.array_equal(other, rows[:10])


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_position_resumes_and_ranks_share(order: data.Order) -> None:
    tokens = counted_up(101)
    whole = DataLoaderLite(tokens, 4, 5, order, seed=1, wrap_rows=2)
    batches = [whole.next_batch()[0] for _ in range(12)]  # 48 rows of 20: two wraps
    resumed = DataLoaderLite(tokens, 4, 5, order, seed=1, wrap_rows=2, position=4 * 7)
    torch.testing.assert_close(resumed.next_batch()[0], batches[7])
    ranks = [
        DataLoaderLite(tokens, 2, 5, order, seed=1, wrap_rows=2, rank=r, world_size=2)
        for r in range(2)
    ]
    for batch in batches:
        shared = torch.cat([loader.next_batch()[0] for loader in ranks])
        torch.testing.assert_close(shared, batch)


def test_too_little_text_for_a_batch() -> None:
    with pytest.raises(ValueError, match="2 x 8 needs 17 training tokens, got 16; take more text"):
        DataLoaderLite(counted_up(16), 2, 8)
    DataLoaderLite(counted_up(17), 2, 8).next_batch()


def test_prefetching_changes_nothing_but_the_thread() -> None:
    plain = DataLoaderLite(counted_up(101), 4, 5)
    ahead = Prefetcher(DataLoaderLite(counted_up(101), 4, 5), "cpu")
    for _ in range(8):
        for a, b in zip(plain.next_batch(), ahead.next_batch(), strict=True):
            torch.testing.assert_close(a, b)
        assert ahead.position == plain.position  # not that of the batch read ahead
    ahead.close()


def test_an_error_while_reading_ahead_reaches_the_loop() -> None:
    loader = DataLoaderLite(counted_up(101), 4, 5)
    loader.tokens = counted_up(3)
    ahead = Prefetcher(loader, "cpu")
    with pytest.raises(IndexError):
        ahead.next_batch()
    ahead.close()


# ---- baselines


def test_ngram_losses_against_counting_by_hand() -> None:
    rng = np.random.default_rng(0)
    V = 7
    train, val = rng.integers(0, V - 1, 300), rng.integers(0, V, 100)  # val has an unseen token
    ones, pairs = Counter(train.tolist()), Counter(pairwise(train))
    follows = Counter(train[:-1].tolist())

    def unigram(b: int) -> float:
        return (ones[b] + 1) / (len(train) + V)

    def bigram(a: int, b: int) -> float:
        if not follows[a]:
            return unigram(b)
        distinct = sum(1 for first, _ in pairs if first == a)
        rest = DISCOUNT * distinct / follows[a]
        return max(pairs[a, b] - DISCOUNT, 0) / follows[a] + rest * unigram(b)

    for a in range(V):
        assert abs(sum(bigram(a, b) for b in range(V)) - 1) < 1e-12
    expected = {
        "unigram": -sum(log(unigram(b)) for b in val[1:]) / 99,
        "bigram": -sum(log(bigram(a, b)) for a, b in pairwise(val)) / 99,
    }
    assert ngram_losses(train, val, V) == pytest.approx(expected)
