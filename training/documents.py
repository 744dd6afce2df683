"""Text into tokens: which files are read, and how they are tokenised in pieces of bounded size.

A file is UTF-8 text, one document; JSONL, one document a line; or a table (Parquet, Arrow), one
document a row. Text and JSONL may be compressed. A file is read as one stream and parted into
pieces of a few megabytes, text only where a cut leaves the tokens unchanged, so the memory stays
flat whatever the file; each document begins with <|endoftext|>. `train.py --data` and
`training.prepare` read text through here alone and therefore read the same.
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
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from model import tokenizer
from model.edge import quoted, read_utf8
from training.shards import TOKEN_DTYPE, holds_tokens

JSONL, KEY = ".jsonl", "text"
TABLES = (".parquet", ".arrow")
_CODE = (
    "c cc cpp cu cuh cs go h hpp hs java jl js kt lua ml php pl py r rb rs scala sh sql swift ts"
)
# Of a folder's files.
TAKEN = (JSONL, *TABLES, *(f".{name}" for name in f"txt md rst tex tsx {_CODE}".split()))
TAKEN_WORDS = ".txt, .md, code, .jsonl, .parquet or .arrow"
PIECE_BYTES = 4 << 20  # large enough for tiktoken's full speed, small enough for a flat memory
BATCH_ROWS = 64  # of a table at once; a row may be a book
MAX_LINE_BYTES = 256 << 20  # of a JSONL file; a line is read whole
_EOT = np.array([tokenizer.EOT], dtype=TOKEN_DTYPE)
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of a UTF-8 character but its first


def _open_zstd(raw: BinaryIO) -> BinaryIO:
    # Not the zstandard package: it takes a file that was cut short for a whole one.
    return io.BufferedReader(_pyarrow("zstandard").CompressedInputStream(raw, "zstd"))


# How compressed files begin, and what reads them.
_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
    **{b"BZh%d" % level: bz2.open for level in range(1, 10)},
}
PACKED = (".gz", ".bz2", ".xz", ".zst")
_TABLE_STARTS = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the last is a stream of Arrow
# How files begin that are no UTF-8 text: what they are, and the way out.
_UTF16 = "UTF-16; convert it: iconv -f UTF-16 -t UTF-8"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive (.docx, .epub, .npz and .pt are zip too); unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"PAR1": "Parquet in a compressed file; unpack it",
    b"ARROW1": "Arrow in a compressed file; unpack it",
    b"%PDF": "PDF; extract its text: pdftotext",
    b"version https://git-lfs": "a pointer of Git LFS; git lfs pull gets the file",
    b"\x80": "a pickle, perhaps of PyTorch; weights go to --init",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
}
# Text, but not what a model should learn to write.
_NO_PROSE = {".json": "JSON", ".ndjson": "JSON", ".csv": "a table", ".tsv": "a table"}


class Piece(NamedTuple):
    """A part of one input."""

    path: Path
    start: int  # offset of its first byte in the unpacked text, or number of its first row or line
    data: bytes | list[Any]  # of text or of JSONL, or the values of a table's rows
    key: str  # field of a JSONL object, or column of a table, that is read
    advance: int  # bytes of the file that were read for it


def _pyarrow(what: object) -> Any:
    """pyarrow with its Parquet reader; ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"data: {what} needs pyarrow, which is not installed; pip install pyarrow"
        ) from None
    return pyarrow


def _suffix(path: Path) -> str:
    """The suffix in lower case, without that of a compression."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def _begins(path: Path, *starts: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(starts)


def is_jsonl(path: Path) -> bool:
    return _suffix(path) == JSONL


def is_table(path: Path) -> bool:
    return _begins(path, *_TABLE_STARTS)


def is_packed(path: Path) -> bool:
    return _begins(path, *_UNPACK)


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file's bytes, unpacked where it is compressed, and the file itself.

    Raises:
        ValueError: it is compressed and damaged or cut short.
    """
    unpack = next((unpack for start, unpack in _UNPACK.items() if _begins(path, start)), None)
    with path.open("rb") as file:
        try:
            yield unpack(file) if unpack else file, file
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            if not unpack:
                raise
            raise ValueError(
                f"data: {path} cannot be unpacked ({error}); it is damaged or was cut short"
            ) from None


def find_inputs(
    paths: Sequence[str | Path], say: Callable[[str], None] = lambda _: None, key: str = KEY
) -> Path | list[Path]:
    """What `paths` hold: a token file or a folder of them, or text files, in the order of reading.

    They are files, folders and patterns such as `src/**/*.py`. A file that is named is taken as
    text if it is some. A folder gives the files that end as `TAKEN` says and must hold nothing
    else, hidden files apart. `say` is told what of a file is left out; a table must have `key`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty path, tokens beside something else, or what is no text, by its name.
    """
    if any(str(path) == "" for path in paths):
        raise ValueError("data: a path must name a file or a folder, got nothing")
    named = [match for path in paths for match in _matches(str(path))]
    tokens = [p for p in named if holds_tokens(p)]
    if tokens and len(named) > 1:
        raise ValueError(
            f"data: {tokens[0]} holds tokens and must stand alone, got {len(named)} paths; name a "
            "folder that holds all token files"
        )
    if tokens:
        return tokens[0]
    found = [inner for path in named for inner in (_inside(path) if path.is_dir() else [path])]
    heads = [_check_text(path, key) for path in found]
    if all(head in (b"", codecs.BOM_UTF8) for head in heads):
        raise ValueError(f"data: {', '.join(map(str, paths))} is empty; it needs text to train on")
    marked = [p for p, head in zip(found, heads, strict=True) if head.startswith(codecs.BOM_UTF8)]
    if marked:
        more = f" and {len(marked) - 1} more" if len(marked) > 1 else ""
        say(f"data: the byte order mark at the beginning of {marked[0]}{more} is left out")
    return found


def _matches(path: str) -> list[Path]:
    """What a pattern names, each once; what exists, or is no pattern, names itself.

    No link to a folder is followed below `**`: it may lead back to where it stands.
    """
    pattern = Path(path)
    if pattern.exists() or not glob.has_magic(path):
        return [pattern]
    dotted = [part for part in pattern.parts if part.startswith(".")]

    def shown(match: Path) -> bool:
        hidden = [part for part in match.parts if part.startswith(".")]
        return all(any(fnmatch.fnmatch(part, each) for each in dotted) for part in hidden)

    # Within a name, as in **.txt, two stars are one; Path.glob of Python 3.11 refuses them.
    parts = [part if part == "**" else part.replace("**", "*") for part in pattern.parts]
    inside = Path(pattern.anchor).glob(str(Path(*parts).relative_to(pattern.anchor)))
    found = {match for match in inside if shown(match)}
    # ** names a folder and all that is in it.
    return sorted(m for m in found if found.isdisjoint(m.parents)) or [pattern]


def _inside(folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise ValueError(
            f"data: {folder} is a Hugging Face dataset of several splits; name one of them: "
            f"{', '.join(str(folder / split) for split in splits)}"
        )
    if (folder / "state.json").is_file():  # what save_to_disk writes: its shards in their order
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [folder / Path(part["filename"]).name for part in state["_data_files"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(
                f"data: {folder / 'state.json'} is not as Hugging Face's save_to_disk writes it; "
                "name the .arrow files themselves"
            ) from None
    files: list[Path] = []
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        links = [name for name in folders if os.path.islink(f"{here}/{name}")]
        files += [Path(here, name) for name in (*names, *links) if name[0] != "."]
        if foreign := sorted(path for path in files if _suffix(path) not in TAKEN):
            # It ends here: whoever names / or a home by mistake need not wait for all of it.
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ValueError(
                f"data: the folder {folder} holds {foreign[0].relative_to(folder)}{others}, which "
                f"is not {TAKEN_WORDS}; move it out, or name the files or the folder to take"
            )
    if not files:
        raise ValueError(f"data: no {TAKEN_WORDS} file in the folder {folder}")
    return sorted(files)


def _check_text(path: Path, key: str) -> bytes:
    """How the text of a file begins; refuses what holds none, by what it is."""
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
        return _TABLE_STARTS[0]
    with opened(path) as (text, _):
        head = text.read(4096)
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise ValueError(f"data: {path} must be UTF-8 text, it is {what}")
    if head and _suffix(path) in TABLES:
        raise ValueError(
            f"data: {path} must be Parquet or Arrow, but it begins with {head[:8]!r}; fetch it "
            "again"
        )
    if (at := head.find(0)) >= 0:
        raise ValueError(f"data: {path} is binary, not text: byte 0x00 at offset {at}")
    return head


def hash_files(files: Sequence[Path], key: str = KEY) -> str:
    """SHA-256 over the files' text with its lengths, and over what of it is read."""
    digest = hashlib.sha256()
    for path in files:
        if kind := JSONL if is_jsonl(path) else "table" if is_table(path) else "":
            digest.update(f"{kind} {key} ".encode())
        start = len(codecs.BOM_UTF8) * _begins(path, codecs.BOM_UTF8)
        digest.update((path.stat().st_size - start).to_bytes(8, "little"))
        with path.open("rb") as file:
            file.seek(start)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def cut(path: Path, key: str = KEY) -> Iterator[Piece]:
    """Pieces of a file, cut where a cut does not change the tokens; an empty file is one piece.

    A piece is longer than PIECE_BYTES where a row or a JSONL line is, and in a run of a character
    that `tokenizer.cuts` cannot part.

    Raises:
        ValueError: a JSONL line that is too long to be read, or a table without text.
    """
    before = 0
    for start, data, read in _cut_table(path, key) if is_table(path) else _cut_text(path):
        yield Piece(path, start, data, key, read - before)
        before = read


def _cut_text(path: Path) -> Iterator[tuple[int, bytes, int]]:
    jsonl = is_jsonl(path)
    with opened(path) as (text, file):
        held = text.read(PIECE_BYTES)
        start = len(codecs.BOM_UTF8) * held.startswith(codecs.BOM_UTF8)
        held, whole = held[start:], len(held) == PIECE_BYTES
        start = 1 if jsonl else start
        while whole:
            if jsonl and not held.endswith(b"\n"):
                held += _end_of_line(path, text)
            if end := len(held) if jsonl else _text_end(held):
                yield start, held[:end], file.tell()
                start += held.count(b"\n", 0, end) if jsonl else end
                held = held[end:]
            wanted = PIECE_BYTES - len(held) % PIECE_BYTES
            more = text.read(wanted)
            held, whole = held + more, len(more) == wanted
        yield start, held, file.tell()


def _end_of_line(path: Path, text: BinaryIO) -> bytes:
    """The rest of a JSONL line."""
    rest = text.readline(MAX_LINE_BYTES)
    if len(rest) == MAX_LINE_BYTES:
        raise ValueError(
            f"data: {path}: a line is longer than {MAX_LINE_BYTES:,} bytes; JSONL has one document "
            "a line"
        )
    return rest


def _text_end(data: bytes) -> int:
    """Last place in `data` for a cut; 0 where there is none."""
    near = max(0, len(data) - 4 * tokenizer.PATIENCE)
    # All of it only where its end has no place that is sure by itself.
    for first in (near, 0):
        part = data[first:].lstrip(_CONTINUATION)
        try:
            text, _ = codecs.utf_8_decode(part, "strict", False)
        except UnicodeDecodeError:
            return len(data)  # whoever tokenises the piece will name the byte
        if at := tokenizer.sure_cut(text) or (0 if first else max(tokenizer.cuts(text), default=0)):
            return len(data) - len(part) + len(text[:at].encode())
    return 0


def _cut_table(path: Path, key: str) -> Iterator[tuple[int, list[Any], int]]:
    arrow = _pyarrow(path)
    held: list[Any] = []
    start = size = 0
    try:
        with path.open("rb") as file:
            if _begins(path, b"PAR1"):
                # Neither a memory map nor a whole column of a row group: either may be gigabytes.
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
        raise ValueError(f"data: {path} cannot be read as a table: {error}") from None
    yield start, held, path.stat().st_size


def encode_piece(piece: Piece) -> tuple[bytes, int, int]:
    """Tokens of one piece as uint16 bytes, how many documents begin in it, and its `advance`.

    Raises:
        ValueError: not UTF-8, or no text under the key; names the file and the place in it.
    """
    if isinstance(piece.data, bytes) and not is_jsonl(piece.path):
        tokens = tokenizer.encode(read_utf8(f"data: {piece.path}", piece.data, piece.start))
        first = piece.start <= len(codecs.BOM_UTF8)  # no other begins so early
        return (_EOT.tobytes() if first else b"") + tokens.tobytes(), int(first), piece.advance
    parts: list[np.ndarray] = []
    jsonl = isinstance(piece.data, bytes)
    values: Any = piece.data.split(b"\n") if isinstance(piece.data, bytes) else piece.data
    for number, value in enumerate(values, piece.start):
        try:
            if jsonl:
                line = value.removeprefix(codecs.BOM_UTF8)  # of a file that was joined to another
                if not line.strip():
                    continue
                content = json.loads(line.decode())
                value = content.get(piece.key) if isinstance(content, dict) else None
            if not isinstance(value, str):
                raise ValueError(
                    f"no text under {piece.key!r}, got {quoted(value)}; --text-column names "
                    "another field"
                )
            parts += [_EOT, tokenizer.encode(value)]
        except (ValueError, RecursionError) as error:
            where = f"{piece.path}: {'line' if jsonl else 'row'} {number}"
            hint = f"; each line must be an object whose {piece.key!r} is text" if jsonl else ""
            raise ValueError(f"data: {where}: {error}{hint}") from None
    return b"".join(part.tobytes() for part in parts), len(parts) // 2, piece.advance
