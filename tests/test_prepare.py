"""Shards hold the tokens of their texts, also after interruptions, kills and damage."""

import gzip
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from model import files, tokenizer
from training import documents, shards
from training import prepare as prepare_module
from training.data import load_corpus
from training.documents import cut, encode_piece
from training.prepare import Config, main, prepare
from training.shards import TokenShards, open_shard

ROOT = Path(__file__).parents[1]
WORDS = ["the", "king's", "1594", "na\u00efve", "\U0001f600", "--", "<|endoftext|>", "   "]
WORDS += ["\n\n", "\t", "\u00a0", "x" * 40]


def random_text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", "\n", ""]) for _ in range(words))


def config(path: Path, out: Path, **more: Any) -> Config:
    return Config((str(path),), str(out), **{"processes": 1, **more})


def run(cfg: Config) -> np.ndarray:
    """Prepare in this process, then read everything back."""
    index = prepare(cfg)
    return np.concatenate([open_shard(Path(cfg.out) / s["file"]) for s in index["shards"]])


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and blocks, so that short texts are cut often and in awkward places."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 400)
    monkeypatch.setattr(tokenizer, "BLOCK", 100)
    monkeypatch.setattr(tokenizer, "MARGIN", 8)


CHINESE = "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u3002"
TEXTS = {
    **{f"random {seed}": random_text(seed, 700) for seed in range(4)},
    "base64": "".join(random.Random(5).choices("ABCabc0123456789+/", k=3000)),
    "Chinese": CHINESE * 200,
    "Chinese without a mark": "".join(random.Random(6).choices(CHINESE[:6], k=900)),
    "newlines": "\n" * 3000 + "x",
    "one letter": "a" * 3000,
    "dashes and apostrophes": "--'" * 1000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_cutting_a_text_does_not_change_its_tokens(tmp_path, small_pieces, name):
    """No text lacks places to cut: pieces stay small, the memory flat, the tokens the same."""
    path = tmp_path / "a.txt"
    path.write_text(TEXTS[name], encoding="utf-8", newline="")
    pieces = list(cut(path))
    assert len(pieces) > 6
    assert max(len(p.data) for p in pieces) <= 400
    assert all(a.start + len(a.data) == b.start for a, b in pairwise(pieces))
    assert sum(p.advance for p in pieces) == path.stat().st_size
    got = run(config(path, tmp_path / "out", shard_tokens=331))
    want = [tokenizer.EOT, *tokenizer.get_encoding().encode_ordinary(TEXTS[name])]
    assert got.tolist() == want


def test_jsonl_documents_each_follow_an_endoftext(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    texts = [random_text(s, 12) for s in range(30)] + [""]
    lines = "".join(json.dumps({"body": t, "id": 1}) + "\r\n" for t in texts)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8", newline="")
    cfg = config(
        tmp_path / "in", tmp_path / "out", shard_tokens=100, val_tokens=150, text_column="body"
    )
    got = run(cfg)
    want = np.concatenate([p for t in texts for p in ([tokenizer.EOT], tokenizer.encode(t))])
    np.testing.assert_array_equal(got, want)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["documents"] == len(texts)
    assert [s["tokens"] for s in index["shards"][:3]] == [100, 50, 100]  # 150 for validation
    assert len(load_corpus([tmp_path / "out"]).split(0.1)[1]) == 150


@pytest.mark.parametrize(("stop_after", "name"), [(1, "a.txt"), (3, "a.txt.gz"), (7, "a.parquet")])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, stop_after, name):
    monkeypatch.setattr(documents, "PIECE_BYTES", 300)
    monkeypatch.setattr(documents, "BATCH_ROWS", 7)
    path, text = tmp_path / name, random_text(3, 900)
    if name == "a.parquet":
        pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
        pq.write_table(pa.table({"text": text.split("\n")}), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if name == "a.txt.gz" else text.encode())
    whole = run(config(path, tmp_path / "whole", shard_tokens=101))
    done: list[Path] = []

    def interrupted(piece: documents.Piece) -> bytes:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(piece.path)
        return encode_piece(piece)

    cfg = config(path, tmp_path / "cut", shard_tokens=101)
    monkeypatch.setattr(prepare_module, "encode_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg)
    monkeypatch.setattr(prepare_module, "encode_piece", encode_piece)
    assert {p.suffix for p in (tmp_path / "cut").iterdir()} == {".bin", ".json"}
    with pytest.raises(ValueError, match="is not finished; run the same"):
        load_corpus([tmp_path / "cut"])
    np.testing.assert_array_equal(run(cfg), whole)
    assert prepare(cfg)["documents"] == (len(text.split("\n")) if name == "a.parquet" else 1)


def test_a_kill_after_any_write_of_the_index_loses_and_doubles_nothing(tmp_path, monkeypatch):
    path, written = tmp_path / "a.txt", 0
    path.write_text(random_text(3, 60), encoding="utf-8", newline="")
    whole = run(config(path, tmp_path / "whole", shard_tokens=101))

    def killed(target: Path, data: str) -> None:
        nonlocal written
        files.write_atomically(target, data)
        if (written := written - 1) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, "write_atomically", killed)
    for stop_after in range(1, len(whole) // 101 + 2):
        cfg, written = config(path, tmp_path / f"{stop_after}", shard_tokens=101), stop_after
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg)
        np.testing.assert_array_equal(run(cfg), whole)


@pytest.mark.slow
def test_the_command_with_two_processes(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("hello world " * 1000, encoding="utf-8")
    b.write_text("and more", encoding="utf-8")
    command = [sys.executable, "-m", "training.prepare", a, b, "--out", tmp_path / "o"]
    command += ["--processes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tokens = open_shard(tmp_path / "o" / "train-000000.bin")
    want = [tokenizer.encode("hello world " * 1000), [tokenizer.EOT], tokenizer.encode("and more")]
    np.testing.assert_array_equal(tokens[1:], np.concatenate(want))


def test_pieces_stay_in_order_whatever_the_number_of_processes(tmp_path, small_pieces, monkeypatch):
    """Threads stand in for the processes; each piece takes its own time."""
    (tmp_path / "a.txt").write_text(random_text(7, 700), encoding="utf-8", newline="")
    pieces = [*cut(tmp_path / "a.txt")]

    def slowed(piece: documents.Piece) -> bytes:
        time.sleep(0.01 * (piece.start % 3))
        return encode_piece(piece)

    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", lambda n, *_: ThreadPoolExecutor(n))
    monkeypatch.setattr(prepare_module, "encode_piece", slowed)
    assert [*prepare_module.encoded(pieces, 3)] == [encode_piece(piece) for piece in pieces]


def test_the_commands_exit_codes(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.txt").write_bytes(b"fine then \xff")
    arguments = [str(tmp_path / "bad.txt"), "--out", str(tmp_path / "out")]

    def fails(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        return exit.value.code, capsys.readouterr().err

    code, line = fails(*arguments)
    assert (code, line.count("\n")) == (2, 1)
    assert "bad.txt is not UTF-8: byte 0xff at offset 10" in line
    assert fails(*arguments[:2], "") == (2, "error: prepare: out must not be empty\n")
    monkeypatch.setattr(prepare_module, "prepare", Mock(side_effect=KeyboardInterrupt))
    assert fails(*arguments)[0] == 130
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_folder_and_leaves_no_half_shard(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*out'"):
            prepare(config(tmp_path / "a.txt", tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [*(tmp_path / "out").iterdir()]


def test_a_killed_process_is_one_line(tmp_path, monkeypatch):
    pool = Mock(submit=Mock(side_effect=BrokenExecutor("a child process terminated abruptly")))
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", lambda *_: pool)
    with pytest.raises(OSError, match=r"killed, perhaps for lack of memory; .* --processes"):
        next(prepare_module.encoded([documents.Piece(tmp_path, 0, b"", "", 0)], 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_tokens": 0}, "shard_tokens must be a whole number from 1"),
        ({"shard_tokens": 10**30}, "shard_tokens must be a whole number from 1"),
        (
            {"inputs": ("long.txt",), "shard_tokens": 20},
            "shard_tokens must be at least 21 for 20,005 bytes of text, got 20",
        ),
        ({"val_tokens": -1}, "val_tokens must be a whole number from 0"),
        ({"val_tokens": 9}, "val_tokens must leave text to train on, got 9 of 9 bytes"),
        ({"processes": 0}, "processes must be a whole number from 1"),
        ({"processes": 10**9}, "processes must be a whole number from 1"),
        ({"out": ""}, "out must not be empty"),
        ({"text_column": ""}, "text_column must not be empty"),
        ({"inputs": ()}, "no input"),
        ({"inputs": ("",)}, "must name a file or a folder, got nothing"),
        (
            {"inputs": ("a.txt", "in")},
            "no .txt, .md, code, .jsonl, .parquet or .arrow file in the folder in",
        ),
        ({"inputs": ("a.bin",)}, "a.bin holds tokens already: train.py --data a.bin"),
        ({"out": "a.txt"}, "a.txt is a file"),
        ({"inputs": (".",)}, "out must be outside of the inputs"),
        ({"out": "tokens"}, "tokens is a file or holds other token files"),
    ],
)
def test_prepare_refuses_and_leaves_nothing_behind(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("some text")
    Path("long.txt").write_text("word " * 4001)
    for folder in ("in", "tokens"):
        Path(folder).mkdir()
    Path("tokens", "train.bin").write_bytes(b"1234")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        prepare(Config(**{"inputs": ("a.txt",), "out": "out", **changes}))
    assert sorted(tmp_path.rglob("*")) == before


def test_text_that_is_all_for_validation_is_not_done(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be")
    with pytest.raises(ValueError, match="nothing is left to train on: 7 tokens in all"):
        prepare(config(tmp_path / "a.txt", tmp_path / "out", val_tokens=9))


def test_another_command_into_the_same_folder_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("some text")
    prepare(config(tmp_path / "a.txt", tmp_path / "out"))
    for other, message in (
        (config(tmp_path / "a.txt", tmp_path / "out", shard_tokens=20), "shard_tokens differ"),
        (config(tmp_path / "b.txt", tmp_path / "out"), "inputs differ"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(other)


def flip(path: Path, at: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def prepared(tmp_path: Path) -> Config:
    """A folder of three shards."""
    (tmp_path / "a.txt").write_text("so are they all, all honourable men. " * 20)
    cfg = config(tmp_path / "a.txt", tmp_path / "out", shard_tokens=80, val_tokens=60)
    prepare(cfg)
    return cfg


@pytest.mark.parametrize("whole", [True, False], ids=["hashed", "sampled"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "train-000001.bin is missing, or not what index.json describes"),
        (lambda p: p.write_bytes(p.read_bytes()[:-2]), "train-000001.bin is missing, or not what"),
        (flip, "train-000001.bin is missing, or not what index.json describes"),
        (lambda p: p.rename(p.with_name("train-000009.bin")), "train-000009.bin is not named in"),
        (lambda p: (p.rename(p.parent / "x"), p.symlink_to("x")), "is missing"),
    ],
)
def test_shards_that_are_not_as_written_are_noticed_and_made_again(
    prepared: Config, monkeypatch, damage, message, whole
):
    monkeypatch.setattr(shards, "FULL_BYTES", 10**9 if whole else 0)
    out = Path(prepared.out)
    before = np.asarray(load_corpus([out]).tokens)
    damage(out / "train-000001.bin")
    with pytest.raises(ValueError, match=message):
        load_corpus([out])
    prepare(prepared)
    (out / "train-000009.bin").unlink(missing_ok=True)
    np.testing.assert_array_equal(np.asarray(load_corpus([out]).tokens), before)


def test_a_folder_in_the_place_of_a_shard_loses_nothing(prepared: Config):
    out = Path(prepared.out)
    (out / "train-000001.bin").unlink()
    (out / "train-000001.bin").mkdir()
    (out / "train-000001.bin" / "kept").write_text("a person's")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"train-000001.bin is a folder in the place of a shard"):
        prepare(prepared)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (out / "train-000001.bin").rename(out / "moved")
    prepare(prepared)
    assert (out / "moved" / "kept").read_text() == "a person's"
    assert len(load_corpus([out]).tokens) > 80


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_left_out(tmp_path, small_pieces, suffix):
    text = random_text(1, 300).encode()
    if suffix == ".jsonl":
        text = b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(99))
    plain, marked = (tmp_path / f"{name}{suffix}" for name in ("plain", "marked"))
    plain.write_bytes(text)
    marked.write_bytes(b"\xef\xbb\xbf" + text)
    tokens = [np.asarray(load_corpus([p]).tokens).tolist() for p in (plain, marked)]
    assert tokens[0] == tokens[1]
    want, got = (run(config(p, tmp_path / f"out {p.stem}")) for p in (plain, marked))
    np.testing.assert_array_equal(got, want)
    marked.write_bytes(b"\xef\xbb\xbf")
    for read in (lambda: load_corpus([marked]), lambda: prepare(config(marked, tmp_path / "no"))):
        with pytest.raises(ValueError, match="is empty"):
            read()


def test_files_that_were_joined_with_their_marks(tmp_path):
    lines = b'\xef\xbb\xbf{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n\xef\xbb\xbf\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    eot, a, b = tokenizer.EOT, *tokenizer.encode("a"), *tokenizer.encode("b")
    assert run(config(tmp_path / "a.jsonl", tmp_path / "out")).tolist() == [eot, a, eot, b]


def test_edits_that_keep_the_size_are_tokenised_again(prepared: Config):
    source, out = Path(prepared.inputs[0]), Path(prepared.out)
    times = source.stat()
    source.write_text(source.read_text().replace("honourable", "d" * 10))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare(prepared)["shards"] == prepare(prepared)["shards"]
    assert "honourable" not in tokenizer.decode(np.asarray(load_corpus([out]).tokens))
    assert len([*out.iterdir()]) == len(prepare(prepared)["shards"]) + 1  # the old ones are gone


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": {}},
        {"shards": None},
        {"shards": [1]},
        {"shards": [{"file": "../a.bin", "tokens": 1, "sha256": ""}]},
        {"shards": [{"file": "/etc/passwd", "tokens": 1, "sha256": ""}]},
        {"shards": [{"file": "train-000000.bin", "tokens": "1", "sha256": ""}]},
        {"shards": [{"file": "train-000000.bin", "tokens": -1, "sha256": ""}]},
        {"shards": [{"file": "train-000000.bin", "tokens": 1}]},
        {"shards": [{"file": "train-000000.bin", "tokens": 10**30, "sha256": ""}] * 2},
        {"next_piece": "x"},
        {"done": None},
        {"version": 9},
        {"format": "mds"},
        {"encoding": ["gpt2"]},
    ],
)
def test_an_odd_index_is_refused_by_both(prepared: Config, changes):
    path = Path(prepared.out, "index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for read in (lambda: load_corpus([prepared.out]), lambda: prepare(prepared)):
        with pytest.raises(ValueError, match=r"index.json|vocabulary|encoding differ"):
            read()


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 10**5, b"\xff", b'{"format": '])
def test_an_index_that_is_no_json_is_refused(prepared: Config, content: bytes):
    Path(prepared.out, "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        load_corpus([prepared.out])


def test_an_index_that_is_a_pipe_is_refused(prepared: Config):
    path = Path(prepared.out, "index.json")
    path.unlink()
    os.mkfifo(path)
    for read in (lambda: load_corpus([prepared.out]), lambda: prepare(prepared)):
        with pytest.raises(ValueError, match=r"index\.json is not a regular file"):
            read()


def test_the_first_format_still_opens(prepared: Config, monkeypatch):
    path = Path(prepared.out, "index.json")
    index = json.loads(path.read_text()) | {"version": 1}
    for shard in index["shards"]:
        del shard["samples"]
    path.write_text(json.dumps(index))
    for full in (0, 10**9):
        monkeypatch.setattr(shards, "FULL_BYTES", full)
        assert len(load_corpus([prepared.out]).tokens) > 80


def write_llmc(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = shards.LLMC_MAGIC, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def test_every_format_reads_the_same_tokens(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "nanogpt.bin")
    np.save(tmp_path / "build.npy", tokens)
    write_llmc(tmp_path / "llmc.bin", tokens)
    for name in ("nanogpt.bin", "build.npy", "llmc.bin"):
        np.testing.assert_array_equal(open_shard(tmp_path / name), tokens)


def test_damaged_and_foreign_files_are_named(tmp_path):
    tokens = np.arange(1000, dtype=np.uint16)
    write_llmc(tmp_path / "short.bin", tokens)
    whole = (tmp_path / "short.bin").read_bytes()
    (tmp_path / "short.bin").write_bytes(whole[:-10])
    np.save(tmp_path / "float.npy", tokens.astype(np.float32))
    (tmp_path / "text.npy").write_text("not numpy")
    (tmp_path / "odd.bin").write_bytes(struct.pack("<3B", 1, 2, 3))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    write_llmc(tmp_path / "none.bin", tokens[:0])
    header = struct.pack("<3i", shards.LLMC_MAGIC, 1, -2)
    (tmp_path / "negative.bin").write_bytes(header.ljust(1020, b"\0"))
    for name, line in {
        "short.bin": "must be 3024 bytes",
        "negative.bin": "for the -2 tokens its header names",
        "float.npy": "float32",
        "text.npy": "not a readable .npy",
        "odd.bin": "got 3 bytes",
        "pytorch_model.bin": "PyTorch's weights",
        "none.bin": "damaged or empty",
    }.items():
        with pytest.raises(ValueError, match=line):
            open_shard(tmp_path / name)


def test_shards_behave_as_one_array():
    whole = np.arange(50, dtype=np.uint16)
    view = TokenShards([whole[:7], whole[7:7], whole[7:30], whole[30:]])
    assert len(view) == 50
    at = np.random.default_rng(0).integers(0, 50, (6, 9))
    np.testing.assert_array_equal(view[at], whole[at])
    for first, last in ((0, 50), (3, 8), (7, 30), (29, 50), (40, 41), (10, 10)):
        np.testing.assert_array_equal(np.asarray(view[first:last]), whole[first:last])


def test_an_id_outside_the_vocabulary_never_leaves_the_shards():
    """When a large corpus is opened, only samples of it are checked."""
    view = TokenShards([np.array([1, 2], dtype=np.uint16), np.array([3, 65535], dtype=np.uint16)])
    assert view[np.arange(3)].tolist() == [1, 2, 3]
    for read in (lambda: view[np.arange(4)], lambda: np.asarray(view[1:])):
        with pytest.raises(OSError, match="holds token 65535, GPT-2's vocabulary ends at 50256"):
            read()
