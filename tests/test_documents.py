"""Which files are taken as text, in which forms, and which are refused."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import tokenizer
from training import documents
from training.prepare import Config, prepare


def read(*paths: str | Path, key: str = "text") -> list[int]:
    """Tokens of the files, each document behind an endoftext."""
    files = documents.find_inputs(paths, key)
    pieces = (documents.encode_piece(p) for file in files for p in documents.cut(file, key))
    return np.frombuffer(b"".join(pieces), dtype="<u2").tolist()


def texts(*paths: str | Path) -> list[str]:
    return tokenizer.decode(read(*paths)).split("<|endoftext|>")[1:]


def packed(pack: Callable[[bytes], bytes], data: bytes = b"") -> bytes:
    return gzip.compress(data, mtime=0) if pack is gzip.compress else pack(data)


REFUSED = {
    "empty": ("a", b"", "is empty"),
    "Latin-1": ("a.txt", b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3; convert it"),
    "UTF-16": ("a.txt", "utf".encode("utf-16"), "byte 0x00 at offset 3; .*iconv -f UTF-16"),
    "UTF-16, no mark": ("a.txt", "utf".encode("utf-16-le"), "text: byte 0x00 at offset 1"),
    "empty gz": ("a.txt.gz", packed(gzip.compress), "is empty"),
    "cut gz": (
        "a.jsonl.gz",
        packed(gzip.compress, b"x" * 99)[:-9],
        "a.jsonl.gz cannot be unpacked",
    ),
    "gz as JSONL": ("a.jsonl", packed(gzip.compress, b"x"), "a.jsonl: line 1: Expecting"),
    "cut bz2": ("a.txt.bz2", bz2.compress(b"x")[:-4], "unpacked .*damaged or was cut short"),
    "broken xz": ("a.txt.xz", lzma.compress(b"x")[:20] + b"\0" * 40, "cannot be unpacked"),
    "Latin-1 in gz": ("a.gz", packed(gzip.compress, b"caf\xe9"), "byte 0xe9 at offset 3"),
    "tar": ("a.tar.gz", packed(gzip.compress, b"name\0\0"), "not UTF-8 text: .* at offset 4"),
    "Parquet in gz": ("a.parquet.gz", packed(gzip.compress, b"PAR1"), "cannot be read as a table"),
    "JSON in xz": ("a.json.xz", lzma.compress(b"{}"), "is JSON; write one object a line"),
    "web page": ("a.parquet", b"<html>", "cannot be read as a table .*or something else"),
    "zip": ("a.zip", b"PK\x03\x04\x14\0", "is not UTF-8 text: .*; unpack it"),
    "LFS": ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "pickle": ("a.pkl", pickle.dumps("x"), "is not UTF-8 text: .*; unpack it, or convert"),
    "weights": ("a.safetensors", b"\x10\0\0\0\0\0\0\0{}", "is not UTF-8 text"),
    "JSON": (
        "a.json",
        b"{}",
        r"is JSON; write one object a line, {\"text\": ...}, .* name it .jsonl",
    ),
    "CSV": ("a.CSV", b"a,b", "is a table"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_by_what_it_is(tmp_path: Path, case: str) -> None:
    name, content, message = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        prepare(Config((str(tmp_path / name),), str(tmp_path / "out"), processes=1))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_paths_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.txt"):
        read(tmp_path / "absent.txt")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no \.txt, \.md, code, .* file in the folder .*folder"):
        read(folder)
    for name in ("a.txt", "b.png", "c.html"):
        (folder / name).write_text("x")
    with pytest.raises(ValueError, match=r"holds b.png, which is not \.txt, \.md"):
        read(folder)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a pipe or a device"):
        read(tmp_path / "pipe")
    for empty in ([""], ["a.txt", ""]):
        with pytest.raises(ValueError, match="must name a file or a folder, got nothing"):
            read(*empty)


def test_a_root_folder_is_refused_without_a_walk_over_the_disk(tmp_path: Path, monkeypatch) -> None:
    """The walk ends in the first folder that holds something else."""
    for name in ("deep/er/a.txt", "deep/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    walk, seen = Path.iterdir, []
    monkeypatch.setattr(Path, "iterdir", lambda path: seen.append(path) or walk(path))
    with pytest.raises(ValueError, match=r"holds deep/b.png, .*or name the files or the folder to"):
        read(tmp_path)
    assert [*dict.fromkeys(seen)] == [tmp_path, tmp_path / "deep"]
    with pytest.raises(ValueError, match=r"the folder / holds \S+ .*which is not \.txt, \.md"):
        read("/")


def test_a_subfolder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("x")

    def refusing(listed: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(path: Any) -> Any:
            if Path(path).name == "sub":
                raise PermissionError(13, "Permission denied", str(path))
            return listed(path)

        return refuse

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    for path in (tmp_path, tmp_path / "**" / "*.txt"):
        with pytest.raises(PermissionError, match=r"denied: .*sub"):
            documents.find_inputs([path])


# ---- the same documents, however they lie around

DOCUMENTS = ["one", "caf\u00e9 \U0001f600\r\n", "", "three " * 40, *map(str, range(90))]
PACKERS = {
    "jsonl": bytes,
    "jsonl.gz": gzip.compress,
    "jsonl.bz2": bz2.compress,
    "jsonl.xz": lzma.compress,
}


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


@pytest.mark.parametrize("form", [*PACKERS, "jsonl.zst", "parquet", "arrow", "dataset"])
def test_every_form_of_the_same_documents_gives_the_same_tokens(tmp_path, monkeypatch, form):
    monkeypatch.setattr(documents, "PIECE_BYTES", 100)
    monkeypatch.setattr(documents, "BATCH_ROWS", 7)
    path = write_documents(tmp_path, form)
    want = np.concatenate([p for t in DOCUMENTS for p in ([tokenizer.EOT], tokenizer.encode(t))])
    assert read(path, key="body") == want.tolist()
    cfg = Config((str(path),), str(tmp_path / "out"), text_column="body", processes=1)
    assert prepare(cfg)["documents"] == len(DOCUMENTS)
    files = documents.find_inputs([path], key="body")
    pieces = [piece for file in files for piece in documents.cut(file, "body")]
    assert len(pieces) > 5
    assert sum(piece.advance for piece in pieces) == sum(file.stat().st_size for file in files)
    with pytest.raises(ValueError, match=r"'text', (it has 'id', 'body'|got None); --text-column"):
        read(path)


def test_tables_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    whole = write_documents(tmp_path, "parquet").read_bytes()
    dataset = write_documents(tmp_path, "dataset")
    stream = (dataset / "data-00001-of-00002.arrow").read_bytes()
    for name, content, message in (
        ("cut.parquet", whole[:-90], "cut.parquet cannot be read as a table"),
        ("holed.parquet", whole[:4] + b"\xff" * 2000 + whole[2004:], "cannot be read as a table"),
        ("cut.arrow", stream[: len(stream) // 2], "cut.arrow cannot be read as a table"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, key="body")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["body", "body"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    null, raw = pa.table({"body": ["a", None]}), pa.table({"body": [b'{"body": "a"}']})
    for name, table in (("twice", twice), ("null", null), ("raw", raw)):
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    for name, message in (
        ("twice.parquet", "twice.parquet must have one column 'body', it has 'body', 'body'"),
        ("twice.arrow", "twice.arrow must have one column 'body', it has 'body', 'body'"),
        ("null.arrow", "row 1: no text under 'body', got None"),
        ("raw.arrow", "row 0: no text under 'body', got b'"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name, key="body")
    (dataset / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"data: no such file: .*data-00001-of-00002"):
        read(dataset, key="body")
    (dataset / "state.json").write_text('{"_data_files": 3}')
    with pytest.raises(ValueError, match=r"state.json: _data_files must be an array, got 3"):
        read(dataset)
    both = dataset.rename(tmp_path / "train").parent
    (both / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(
        ValueError, match=r"holds dataset_dict.json, .*or name the files or the folder"
    ):
        read(both)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_is_read_in_flat_memory(tmp_path: Path, form: str) -> None:
    """Even if one row group holds all rows."""
    pa, pq = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = pa.table({"text": [f"{i} " * (5000 - i % 7) for i in range(1000)]})
    path = tmp_path / f"a.{form}"
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
        with pytest.raises(ValueError, match=r"needs pyarrow, which is not .*; pip install pyarro"):
            read(tmp_path / name)


BAD_LINES: dict[str | bytes, str] = {
    '{"txt": "b"}': "no text under 'text', got None; --text-column names",
    "[1": "Expecting",
    '{"text": 3}': "no text under 'text', got 3; --text-column names",
    "[1]": "no text under",
    '{"text": "\\ud83d"}': r"U\+D83D is half of a surrogate pair",
    "[" * 100_000: "recursion",
    '{"text": ' + "9" * 5000 + "}": "4300 digits",
    b'{"text": "\xff"}': "can't decode byte 0xff",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_bad_jsonl_names_the_line(tmp_path: Path, monkeypatch, line: str | bytes) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", 20)  # so that they are counted over pieces
    path, bad = tmp_path / "bad.jsonl", line.encode() if isinstance(line, str) else line
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n' * 2 + bad + b"\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl: line 5: .*{BAD_LINES[line]}") as refusal:
        read(path)
    assert ("--text-column" in str(refusal.value)) == ("no text under" in BAD_LINES[line])


# ---- patterns


def test_a_jsonl_line_that_is_too_long_is_not_read_to_its_end(tmp_path: Path, monkeypatch) -> None:
    """One array on one line, gigabytes long, would fill the memory of each process."""
    monkeypatch.setattr(documents, "PIECE_BYTES", 16)
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_text(f'[{{"text": "{"x" * 200}"}}]')
    with pytest.raises(ValueError, match=r"a\.jsonl: a line is longer than 64 bytes; JSONL has"):
        next(documents.cut(path))


def test_patterns_and_code(tmp_path: Path) -> None:
    for name in ("b.py", "sub/a.py", "sub/deep/c.PY", "sub/x.png", "d.txt.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((gzip.compress if ".gz" in name else bytes)(name.encode()))
    assert texts(f"{tmp_path}/**/*.py", f"{tmp_path}/*.gz") == ["b.py", "sub/a.py", "d.txt.gz"]
    with pytest.raises(FileNotFoundError, match=r"no such file: .*\*\.rs"):
        texts(tmp_path / "*.rs")
    (tmp_path / "sub" / "x.png").unlink()
    assert texts(f"{tmp_path}/s*/**") == ["sub/a.py", "sub/deep/c.PY"]  # each once


def test_a_pattern_follows_no_link_back_and_takes_nothing_hidden(tmp_path, monkeypatch) -> None:
    for name in ("a.txt", ".b.txt", ".git/c.txt", "d/.e/f.txt", ".kept/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d" / "back").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    plain = (f"{tmp_path}/**/*.txt", "**/*.txt", "d*/../*.txt", "**.txt", f"{tmp_path}/a**t")
    for name, patterns in {"a.txt": plain, ".kept/g.txt": (".k*/*.txt", ".kept/**")}.items():
        for pattern in patterns:
            assert texts(pattern) == [name], pattern
    with pytest.raises(ValueError, match=r"holds back, which is not \.txt"):
        texts(f"{tmp_path}/d*/**")


def test_what_only_looks_compressed_or_like_a_pattern_is_taken_as_it_is(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "BZhello.txt": b"BZhello",
        "notes[1].txt": b"hello",
        "padded.txt.gz": gzip.compress(b"hello") + b"\0" * 512,  # as tapes and tar leave it
        "bom.txt.gz": gzip.compress(b"\xef\xbb\xbfhello"),
    }
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name) == [name[:7] if "BZ" in name else "hello"]
