"""Text into tokens: which files are read, and how they are tokenised in pieces of bounded size.

A file is UTF-8 text, one document, or JSONL, one document a line. It is cut into pieces of a few
megabytes where a cut leaves the tokens unchanged, so the memory stays flat whatever the file; each
document begins with <|endoftext|>. `train.py --data` and `training.prepare` read text through here
alone and therefore read the same.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from model import tokenizer
from model.edge import quoted, read_utf8
from training.shards import TOKEN_DTYPE, holds_tokens

JSONL, KEY = ".jsonl", "text"
TAKEN = (".txt", ".md", JSONL)  # of a folder's files
PIECE_BYTES = 4 << 20  # large enough for tiktoken's full speed, small enough for a flat memory
MAX_LINE_BYTES = 256 << 20  # of a JSONL file; a line is read whole
_EOT = np.array([tokenizer.EOT], dtype=TOKEN_DTYPE)
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of a UTF-8 character but its first

# How files begin that are no UTF-8 text: what they are, and the way out.
_UTF16 = "UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
_FOREIGN = {
    b"\x1f\x8b": "gzip; unpack it: gunzip -k",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it: zstd -d",
    b"BZh": "bzip2; unpack it: bunzip2 -k",
    b"\xfd7zXZ": "xz; unpack it: unxz -k",
    b"PK\x03\x04": "a zip archive (.docx, .epub, .npz and .pt are zip too); unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"PAR1": "Parquet; write JSONL with pandas: read_parquet(FILE).to_json(OUT, orient='records', "
    "lines=True)",
    b"ARROW1": "Arrow; write its text as JSONL",
    b"%PDF": "PDF; extract its text: pdftotext",
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull gets the file",
    b"\x80": "a pickle, perhaps of PyTorch; weights go to --init",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
# Text, but not what a model should learn to write.
_TABLES = {".json": "JSON", ".ndjson": "JSON", ".csv": "a table", ".tsv": "a table"}


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of one input; `key` is the field of a JSONL object that is read."""

    path: Path
    start: int
    end: int
    key: str


def find_inputs(
    paths: Sequence[str | Path], say: Callable[[str], None] = lambda _: None
) -> Path | list[Path]:
    """What `paths` hold: a token file or a folder of them, or text files, in the order of reading.

    A file that is named is taken as text if it is some. A folder gives its .txt, .md and .jsonl
    files and must hold nothing else, hidden files apart.

    Args:
        paths: Files and folders.
        say: Called with a line where something of a file is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty path, tokens beside something else, or what is no text, by its name.
    """
    if any(str(path) == "" for path in paths):
        raise ValueError("data: a path must name a file or a folder, got nothing")
    tokens = [p for p in map(Path, paths) if holds_tokens(p)]
    if tokens and len(paths) > 1:
        raise ValueError(
            f"data: {tokens[0]} holds tokens and must stand alone, got {len(paths)} paths; name a "
            "folder that holds all token files"
        )
    if tokens:
        return tokens[0]
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"data: no such file: {path}")
        found += _inside(path) if path.is_dir() else [path]
    for path in found:
        _check_text(path)
    if all(path.stat().st_size == _text_start(path) for path in found):
        raise ValueError(f"data: {', '.join(map(str, paths))} is empty; it needs text to train on")
    if marked := [path for path in found if _text_start(path)]:
        more = f" and {len(marked) - 1} more" if len(marked) > 1 else ""
        say(f"data: the byte order mark at the beginning of {marked[0]}{more} is left out")
    return found


def _inside(folder: Path) -> list[Path]:
    inside = [p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    hidden = [p for p in inside if any(part[0] == "." for part in p.relative_to(folder).parts)]
    files = sorted({*inside} - {*hidden})
    foreign = [p for p in files if p.suffix.lower() not in TAKEN]
    if foreign:
        others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"data: the folder {folder} holds {foreign[0].relative_to(folder)}{others}, which is "
            f"not {', '.join(TAKEN)}; move it out, or name the files to take"
        )
    if not files:
        raise ValueError(f"data: no {', '.join(TAKEN)} file in the folder {folder}")
    return files


def _check_text(path: Path) -> None:
    """Refuse what is no text, by what it is."""
    if not path.is_file():
        raise ValueError(f"data: {path} must be a file or a folder, not a pipe or a device")
    if what := _TABLES.get(path.suffix.lower()):
        raise ValueError(
            f"data: {path} is {what}; write one object a line, {{{json.dumps(KEY)}: ...}}, "
            f"and name it {JSONL}"
        )
    with path.open("rb") as file:
        head = file.read(4096)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"data: {path} must be UTF-8 text, it is {what}")
    if (at := head.find(0)) >= 0:
        raise ValueError(f"data: {path} is binary, not text: byte 0x00 at offset {at}")


def _text_start(path: Path) -> int:
    """Where the text begins: behind a byte order mark, which is none of it."""
    with path.open("rb") as file:
        return len(codecs.BOM_UTF8) * (file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)


def hash_files(files: Sequence[Path]) -> str:
    """SHA-256 over the files' text with its lengths."""
    digest = hashlib.sha256()
    for path in files:
        if is_jsonl(path):
            digest.update(f"{JSONL} {KEY} ".encode())
        start = _text_start(path)
        digest.update((path.stat().st_size - start).to_bytes(8, "little"))
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def cut(path: Path, key: str = KEY) -> Iterator[Piece]:
    """Pieces of a file, cut where a cut does not change the tokens; an empty file is one piece.

    A piece is longer than PIECE_BYTES where a JSONL line is, and in a run of a character that
    `tokenizer.cuts` cannot part.

    Raises:
        ValueError: a JSONL line that is too long to be read.
    """
    size = path.stat().st_size
    find_end = _line_end if is_jsonl(path) else _text_end
    start = _text_start(path)
    with path.open("rb") as file:
        while True:
            end = target = start
            while end == start and target < size:
                target = min(target + PIECE_BYTES, size)
                end = size if target == size else find_end(file, start, target)
            yield Piece(path, start, end, key)
            if end >= size:
                return
            start = end


def _line_end(file: BinaryIO, start: int, end: int) -> int:
    """First byte of the line after `end`."""
    file.seek(end - 1)
    if len(file.readline(MAX_LINE_BYTES)) == MAX_LINE_BYTES:
        raise ValueError(
            f"data: {file.name}: the line around byte {end} is longer than {MAX_LINE_BYTES:,} "
            "bytes; JSONL has one document a line"
        )
    return file.tell()


def _text_end(file: BinaryIO, start: int, end: int) -> int:
    """Last place in bytes (start, end] for a cut; `start` where there is none."""

    def last_cut(text: str) -> int:
        return max(tokenizer.cuts(text), default=0)

    # All of the piece only where its end has no place that is sure by itself.
    near = max(start, end - 4 * tokenizer.PATIENCE)
    for first, find in ((near, tokenizer.sure_cut), (start, last_cut)):
        file.seek(first)
        data = file.read(end - first).lstrip(_CONTINUATION)
        try:
            text, _ = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            return end  # whoever tokenises the piece will name the byte
        if at := find(text):
            return end - len(data) + len(text[:at].encode())
    return start


def encode_piece(piece: Piece) -> tuple[bytes, int]:
    """Tokens of one piece as uint16 bytes, and the number of documents that begin in it.

    Raises:
        ValueError: not UTF-8 or not JSON with the key; names the file and the place in it.
    """
    with piece.path.open("rb") as file:
        file.seek(piece.start)
        data = file.read(piece.end - piece.start)
    if is_jsonl(piece.path):
        parts = [part for tokens in _documents(piece, data) for part in (_EOT, tokens)]
        return b"".join(part.tobytes() for part in parts), len(parts) // 2
    tokens = tokenizer.encode(read_utf8(f"data: {piece.path}", data, piece.start))
    first = piece.start <= len(codecs.BOM_UTF8)  # no other begins so early
    return (_EOT.tobytes() if first else b"") + tokens.tobytes(), int(first)


def _documents(piece: Piece, data: bytes) -> Iterator[np.ndarray]:
    """Tokens of each line's document."""
    at = piece.start
    for line in data.split(b"\n"):
        here, at = at, at + len(line) + 1
        line = line.removeprefix(codecs.BOM_UTF8)  # of a file that was joined to another
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode())
            text = content.get(piece.key) if isinstance(content, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"no text under {piece.key!r}, got {quoted(text)}; for another field: "
                    "training.prepare --key"
                )
            yield tokenizer.encode(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"data: {piece.path}: line {_line_number(piece.path, here)} at byte {here} cannot "
                f"be read ({error}); each line must be an object whose {piece.key!r} is text"
            ) from None


def _line_number(path: Path, offset: int) -> int:
    """Number, from 1, of the line that begins at `offset`."""
    count = 1
    with path.open("rb") as file:
        for start in range(0, offset, 1 << 20):
            count += file.read(min(1 << 20, offset - start)).count(b"\n")
    return count


def is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == JSONL
