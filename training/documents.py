"""Find the text files that a user names, split them into pieces, and tokenise the pieces.

A text file is one document, a JSONL file has one document per line, a table (Parquet, Arrow) one
per row. Text and JSONL may be compressed. Each document begins with <|endoftext|>.

A file is read as one stream and cut into pieces of a few megabytes, so the memory stays flat
whatever its size. Text is cut only where the cut does not change the tokens. `train.py --data` and
`training.prepare` both read text through this module, so both get the same tokens.
"""

import bz2
import codecs
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from model import tokenizer
from model.edge import quoted, read_utf8
from model.files import read_object
from training import schema
from training.shards import TOKEN_DTYPE, holds_tokens

JSONL, KEY = ".jsonl", "text"
TABLES = (".parquet", ".arrow")
PACKED = (".gz", ".bz2", ".xz", ".zst")
_CODE = (
    "c cc cpp cu cuh cs go h hpp hs java jl js kt lua ml php pl py r rb rs scala sh sql swift ts"
)
# Files that are read from a folder.
TAKEN = (JSONL, *TABLES, *(f".{name}" for name in f"txt md rst tex tsx {_CODE}".split()))
TAKEN_WORDS = ".txt, .md, code, .jsonl, .parquet or .arrow"
PIECE_BYTES = 4 << 20  # large enough for tiktoken's full speed, small enough for a flat memory
BATCH_ROWS = 64  # rows of a table read at once; a row may be a book
MAX_LINE_BYTES = 256 << 20  # of JSONL; a line is read whole
_BOM = codecs.BOM_UTF8
_EOT = np.array([tokenizer.EOT], dtype=TOKEN_DTYPE).tobytes()
_CONTINUATION = bytes(range(0x80, 0xC0))  # all bytes of a UTF-8 character but its first


def _pyarrow(what: object) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"data: {what} needs pyarrow, which is not installed; pip install pyarrow"
        ) from None
    return pyarrow


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    # The zstandard package would accept a truncated file as complete.
    return io.BufferedReader(_pyarrow("zstandard").CompressedInputStream(raw, "zstd"))


# The first bytes of compressed files, and the function that reads them.
_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    **{b"BZh%d" % level: bz2.open for level in range(1, 10)},
}
_TABLE_STARTS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # Parquet, an Arrow file, an Arrow stream
# The first bytes of files that only look like text: what they are, and the way out.
_FOREIGN = {
    b"%PDF": "PDF; extract its text: pdftotext",
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull gets the file",
}
# Text, but not what a model should learn to write.
_NO_PROSE = {".json": "JSON", ".ndjson": "JSON", ".csv": "a table", ".tsv": "a table"}


class Piece(NamedTuple):
    """A part of one input file."""

    path: Path
    start: int  # offset of its first byte; in JSONL or a table, number of its first line or row
    data: bytes | list[Any]  # bytes of text or of JSONL lines; the values of a table's rows
    key: str  # JSONL field or table column that holds the text
    advance: int  # bytes of the file that were read for this piece


def _suffix(path: Path) -> str:
    """The suffix in lower case; of a.txt.gz it is .txt."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def _begins(path: Path, *starts: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(starts)


def is_jsonl(path: Path) -> bool:
    return _suffix(path) == JSONL


def is_table(path: Path) -> bool:
    return _suffix(path) in TABLES or _begins(path, *_TABLE_STARTS)


def is_packed(path: Path) -> bool:
    return _begins(path, *_UNPACK)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The unpacked bytes of a file as a stream, and the file itself.

    Raises:
        ValueError: a compressed file is damaged or was cut short.
    """
    with path.open("rb") as file:
        head = file.peek(8)
        unpack = next((reader for start, reader in _UNPACK.items() if head.startswith(start)), None)
        try:
            yield unpack(file) if unpack else file, file
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if not unpack:
                raise
            raise ValueError(
                f"data: {path} cannot be unpacked ({error}); it is damaged or was cut short"
            ) from None


def find_inputs(paths: Sequence[str | Path], key: str = KEY) -> list[Path]:
    """The text files that `paths` name, in the order of reading, or one file or folder of tokens.

    Args:
        paths: Files, folders, and patterns such as `src/**/*.py`. A file that is named is read if
            it holds text. In a folder, each file must end as in `TAKEN`; hidden ones are skipped.
            A token file or a folder of token files must be the only path.
        key: Column that a table must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty path, a pattern for the whole disk, tokens beside something else, or a
            file that holds no text.
    """
    if "" in map(str, paths):
        raise ValueError("data: a path must name a file or a folder, got nothing")
    named = [match for path in paths for match in _matches(str(path))]
    tokens = [path for path in named if holds_tokens(path)]
    if tokens and len(named) > 1:
        raise ValueError(
            f"data: {tokens[0]} holds tokens and must stand alone, got {len(named)} paths; name a "
            "folder that holds all token files"
        )
    if tokens:
        return tokens
    found = [file for path in named for file in (_inside(path) if path.is_dir() else [path])]
    if not [path for path in found if _has_text(path, key)]:
        raise ValueError(f"data: {', '.join(map(str, paths))} is empty; it needs text to train on")
    return found


def _matches(path: str) -> list[Path]:
    """The files and folders that a pattern names; [path] where it exists or is no pattern."""
    if Path(path).exists() or not glob.has_magic(path):
        return [Path(path)]
    if Path(path).parts[:2] == ("/", "**"):
        raise ValueError(f"data: {path} would read the whole disk; begin it with a folder")
    found = set(_expand(Path(), Path(path).parts))
    # ** matches a folder and all that is in it.
    return sorted(m for m in found if found.isdisjoint(m.parents)) or [Path(path)]


def _expand(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """What a pattern matches in a folder. Unlike glob, fails where a folder may not be read."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        if (folder / part).exists():
            yield from _expand(folder / part, rest)
        return
    if part == "**":
        yield from _expand(folder, rest)
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") and not part.startswith("."):
            continue
        if part == "**":  # a link may lead back to a folder that holds it
            if entry.is_dir() and not entry.is_symlink():
                yield from _expand(entry, parts)
        elif fnmatch.fnmatch(entry.name, part) and (not rest or entry.is_dir()):
            yield from _expand(entry, rest)


def _inside(folder: Path) -> list[Path]:
    """The files of a folder and its subfolders, in order, without hidden ones."""
    if (state := folder / "state.json").is_file():  # a Hugging Face dataset, which lists its files
        files: Any = read_object(state).get("_data_files")
        schema.check(f"data: {state}: _data_files", files, [{"filename": schema.TEXT}])
        return [folder / Path(file["filename"]).name for file in files]
    files = []
    for path in _expand(folder, ("**", "*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if _suffix(path) not in TAKEN:
            raise ValueError(
                f"data: the folder {folder} holds {path.relative_to(folder)}, which is not "
                f"{TAKEN_WORDS}; move it out, or name the files or the folder to take"
            )
        files.append(path)
    if not files:
        raise ValueError(f"data: no {TAKEN_WORDS} file in the folder {folder}")
    return sorted(files)


def _has_text(path: Path, key: str) -> bool:
    """False for an empty file. Raises ValueError that names what the file is, if not text."""
    if not path.exists():
        raise FileNotFoundError(f"data: no such file: {path}")
    if not path.is_file():
        raise ValueError(f"data: {path} must be a file or a folder, not a pipe or a device")
    if what := _NO_PROSE.get(_suffix(path)):
        raise ValueError(
            f"data: {path} is {what}; write one object a line, {{{json.dumps(KEY)}: ...}}, "
            f"and name it {JSONL}"
        )
    if is_table(path):
        next(_cut_table(path, key))
        return True
    with opened(path) as (text, _):
        head = text.read(4096)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"data: {path} must be text, it is {what}")
    if (at := head.find(0)) >= 0:
        raise ValueError(
            f"data: {path} is not UTF-8 text: byte 0x00 at offset {at}; unpack it, or convert it: "
            "iconv -f UTF-16 -t UTF-8"
        )
    return bool(head.removeprefix(_BOM))


def hash_files(files: Sequence[Path], key: str = KEY) -> str:
    """SHA-256 over kind, key, length and bytes of each file, without a byte order mark."""
    digest = hashlib.sha256()
    for path in files:
        if is_jsonl(path) or is_table(path):
            digest.update(f"{JSONL if is_jsonl(path) else 'table'} {key} ".encode())
        start = len(_BOM) * _begins(path, _BOM)
        digest.update((path.stat().st_size - start).to_bytes(8, "little"))
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def cut(path: Path, key: str = KEY) -> Iterator[Piece]:
    """The pieces of a file, cut where a cut does not change the tokens; at least one.

    A piece is longer than PIECE_BYTES if one row or JSONL line is, or if a run of one character is
    so long that `tokenizer.cuts` finds no place in it.

    Raises:
        ValueError: a table cannot be read or lacks the column, or a JSONL line is too long.
    """
    before = 0
    for start, data, read in _cut_table(path, key) if is_table(path) else _cut_text(path):
        yield Piece(path, start, data, key, read - before)
        before = read


def _cut_text(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Yields start, data, and the bytes of the file read so far; JSONL is cut between lines."""
    jsonl, held, ended = is_jsonl(path), b"", False
    start = int(jsonl)  # lines are counted from 1
    with opened(path) as (text, file):
        while not ended:
            wanted = PIECE_BYTES - len(held) % PIECE_BYTES
            more = text.read(wanted)
            held, ended = held + more, len(more) < wanted
            if start == 0 and held.startswith(_BOM):  # in JSONL, encode_piece leaves it out
                start, held = len(_BOM), held[len(_BOM) :]
            if jsonl and not ended and not held.endswith(b"\n"):
                rest = text.readline(MAX_LINE_BYTES)
                if len(rest) == MAX_LINE_BYTES:
                    raise ValueError(
                        f"data: {path}: a line is longer than {MAX_LINE_BYTES:,} bytes; JSONL has "
                        "one document per line"
                    )
                held += rest
            end = len(held) if jsonl or ended else _text_end(held)
            if end or ended:
                yield start, held[:end], file.tell()
            start += held.count(b"\n", 0, end) if jsonl else end
            held = held[end:]


def _text_end(data: bytes) -> int:
    """The last place where `data` can be cut, or 0 if there is none."""
    near = max(0, len(data) - 4 * tokenizer.PATIENCE)
    # Nearly always there is a safe place near the end. If not, look through all of the data.
    for first in (near, 0):
        part = data[first:].lstrip(_CONTINUATION)
        try:
            text, _ = codecs.utf_8_decode(part, "strict", False)
        except UnicodeDecodeError:
            return len(data)  # encode_piece will name the byte
        if at := tokenizer.sure_cut(text) or (0 if first else max(tokenizer.cuts(text), default=0)):
            return len(data) - len(part) + len(text[:at].encode())
    return 0


def _cut_table(path: Path, key: str) -> Iterator[tuple[int, list[Any], int]]:
    """Yields first row, values, and the bytes of the file read so far."""
    arrow = _pyarrow(path)
    held: list[Any] = []
    start = size = 0
    try:
        with path.open("rb") as file:
            if _begins(path, b"PAR1"):
                # A memory map or a whole column of a row group may take gigabytes.
                table = arrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False)
                names = table.schema_arrow.names
                batches = table.iter_batches(BATCH_ROWS, columns=[key])
            elif _begins(path, b"ARROW1"):
                table = arrow.ipc.open_file(file)
                names = table.schema.names
                batches = map(table.get_batch, range(table.num_record_batches))
            else:
                batches = arrow.ipc.open_stream(file)
                names = batches.schema.names
            if names.count(key) != 1:
                raise ValueError(
                    f"data: {path} must have one column {key!r}, it has "
                    f"{', '.join(map(repr, names))}; --text-column names the one to read"
                )
            for batch in batches:
                for first in range(0, batch.num_rows, BATCH_ROWS):
                    column = batch.column(key).slice(first, BATCH_ROWS)
                    held += column.to_pylist()
                    size += column.nbytes
                    if size >= PIECE_BYTES:
                        yield start, held, file.tell()
                        start, held, size = start + len(held), [], 0
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data: {path} cannot be read as a table ({error}); it is damaged, or something else"
        ) from None
    yield start, held, path.stat().st_size


def encode_piece(piece: Piece) -> bytes:
    """The tokens of a piece as uint16, <|endoftext|> before each document that begins in it.

    Raises:
        ValueError: not UTF-8, or no text under the key; names the file and the place in it.
    """
    if isinstance(piece.data, bytes) and not is_jsonl(piece.path):
        tokens = tokenizer.encode(read_utf8(f"data: {piece.path}", piece.data, piece.start))
        begins = piece.start <= len(_BOM)  # no later piece begins so early
        return _EOT * begins + tokens.tobytes()
    parts: list[bytes] = []
    lines = isinstance(piece.data, bytes)
    values: Any = piece.data.split(b"\n") if isinstance(piece.data, bytes) else piece.data
    for number, value in enumerate(values, piece.start):
        try:
            if lines:
                line = value.removeprefix(_BOM)  # joined files keep their marks
                if not line.strip():
                    continue
                content = json.loads(line.decode())
                value = content.get(piece.key) if isinstance(content, dict) else None
            if not isinstance(value, str):
                raise ValueError(
                    f"no text under {piece.key!r}, got {quoted(value)}; --text-column names "
                    "another field"
                )
            parts += [_EOT, tokenizer.encode(value).tobytes()]
        except (ValueError, RecursionError) as error:
            where = f"{piece.path}: {'line' if lines else 'row'} {number}"
            hint = f"; each line must be an object whose {piece.key!r} is text" if lines else ""
            raise ValueError(f"data: {where}: {error}{hint}") from None
    return b"".join(parts)
