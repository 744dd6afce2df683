"""Corpora in, shards out: nothing lost, nothing moved, whatever interrupts."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model import tokenizer
from training import prepare, shards
from training.prepare import Config, ShardWriter, cut, encode_piece, find_inputs
from training.shards import TokenShards, find_shards, open_shard

ROOT = Path(__file__).parents[1]
WORDS = ["the", "king's", "1594", "na\u00efve", "\U0001f600", "--", "<|endoftext|>", "   ", "\n\n",
         "\t", "\u00a0", "x" * 40]  # fmt: skip


def random_text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", "\n", ""]) for _ in range(words))


def run(cfg: Config) -> np.ndarray:
    """Prepare in this process (no pool), then read everything back."""
    writer = ShardWriter(cfg, [])
    pieces = [p for path in find_inputs(cfg.inputs) for p in cut(path, cfg.key)]
    for i, piece in enumerate(pieces):
        data, documents = encode_piece(piece)
        writer.add(i, np.frombuffer(data, dtype=np.uint16), documents)
    writer.finish()
    return np.concatenate([open_shard(cfg.out / s["file"]) for s in writer.index["shards"]])


@pytest.mark.parametrize("seed", range(8))
def test_cutting_a_text_does_not_change_its_tokens(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(prepare, "PIECE_BYTES", 97)  # many cuts, in the middle of everything
    text = random_text(seed, 700)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    assert len(list(cut(tmp_path / "a.txt", "text"))) > 10
    got = run(Config((tmp_path / "a.txt",), tmp_path / "out", shard_tokens=331, processes=1))
    want = np.concatenate([[tokenizer.EOT], tokenizer.encode(text)])
    np.testing.assert_array_equal(got, want)


def test_jsonl_documents_each_follow_an_endoftext(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE_BYTES", 64)
    texts = [random_text(s, 12) for s in range(30)] + [""]
    lines = "".join(json.dumps({"body": t, "id": 1}) + "\n" for t in texts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    cfg = Config((tmp_path,), tmp_path / "out", shard_tokens=100, val_tokens=150, key="body",
                 processes=1)  # fmt: skip
    got = run(cfg)
    want = np.concatenate([p for t in texts for p in ([tokenizer.EOT], tokenizer.encode(t))])
    np.testing.assert_array_equal(got, want)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["documents"] == len(texts)
    assert [s["tokens"] for s in index["shards"][:3]] == [100, 50, 100]  # 150 for validation
    assert [p.name for p in find_shards(tmp_path / "out", "val")] == ["val-000000.bin",
                                                                      "val-000001.bin"]  # fmt: skip


@pytest.mark.parametrize("stop_after", [1, 3, 7])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, stop_after):
    monkeypatch.setattr(prepare, "PIECE_BYTES", 300)
    (tmp_path / "a.txt").write_text(random_text(3, 900), encoding="utf-8", newline="")
    whole = run(Config((tmp_path / "a.txt",), tmp_path / "whole", shard_tokens=101, processes=1))
    cfg = Config((tmp_path / "a.txt",), tmp_path / "cut", shard_tokens=101, processes=1)
    pieces = list(cut(tmp_path / "a.txt", "text"))
    for begin_anew in (True, False):
        writer = ShardWriter(cfg, [])
        start = writer.index["next_piece"]
        assert bool(writer.index["shards"]) != begin_anew
        last = stop_after if begin_anew else len(pieces)
        for i in range(start, last):
            data, documents = encode_piece(pieces[i])
            writer.add(i, np.frombuffer(data, dtype=np.uint16), documents)
    writer.finish()
    got = np.concatenate([open_shard(cfg.out / s["file"]) for s in writer.index["shards"]])
    np.testing.assert_array_equal(got, whole)
    assert writer.index["documents"] == 1


def test_the_command_with_two_processes_and_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("hello world " * 1000, encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"fine then \xff")

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "training.prepare", *map(str, arguments)],
                              cwd=ROOT, capture_output=True, text=True, timeout=120)  # fmt: skip

    done = command(tmp_path / "a.txt", "--out", tmp_path / "o", "--processes", 2)
    assert done.returncode == 0, done.stderr
    tokens = open_shard(tmp_path / "o" / "train-000000.bin")
    np.testing.assert_array_equal(tokens[1:], tokenizer.encode("hello world " * 1000))
    failed = command(tmp_path / "bad.txt", "--out", tmp_path / "o2", "--processes", 1)
    assert failed.returncode == 2
    assert "byte 0xff at offset 10" in failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    ("line", "reason"),
    [('{"txt": "b"}', "no field 'text'"), ("[1", "cannot be read"), ('{"text": 3}', "got int")],
)
def test_bad_jsonl_names_the_line(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"byte 14.*{reason}|{reason}.*byte 14"):
        encode_piece(next(cut(path, "text")))


def test_another_command_into_the_same_folder_is_refused(tmp_path):
    ShardWriter(Config((tmp_path,), tmp_path, shard_tokens=10), []).finish()
    with pytest.raises(ValueError, match="shard_tokens differ"):
        ShardWriter(Config((tmp_path,), tmp_path, shard_tokens=20), [])


def write_llmc(path: Path, tokens: np.ndarray, magic: int = shards.LLMC_MAGIC) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens)
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
    write_llmc(tmp_path / "llama.bin", tokens, magic=20240801)
    np.save(tmp_path / "float.npy", tokens.astype(np.float32))
    (tmp_path / "text.npy").write_text("not numpy")
    (tmp_path / "odd.bin").write_bytes(struct.pack("<3B", 1, 2, 3))
    for name, line in (("short.bin", "must be 3024 bytes"), ("llama.bin", "Llama 3"),
                       ("float.npy", "float32"), ("text.npy", "not a readable .npy"),
                       ("odd.bin", "got 3 bytes")):  # fmt: skip
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
