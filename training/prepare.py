"""Tokenise a corpus into shards: `python -m training.prepare corpus/ --out data/corpus`.

Text files (.txt, one document each) and JSONL (.jsonl, one document a line) become headerless
uint16 shards of equal size, each document preceded by <|endoftext|>. Inputs are cut into pieces
of a few megabytes that are tokenised by several processes and joined in order, so the memory
stays flat and the result does not depend on the number of processes. index.json records what is
done; the same command after an interruption goes on where it stopped.

Cutting a text before a white-space character that follows another kind of character leaves the
tokens unchanged: GPT-2's pre-tokeniser never matches across such a place, because none of its
patterns holds a white-space character anywhere but in front or throughout.
"""

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model import tokenizer
from model.files import write_atomically
from training.shards import TOKEN_DTYPE

FORMAT, VERSION = "fused-gpt-tokens", 1
PIECE_BYTES = 4 << 20  # large enough for tiktoken's full speed, small enough for a flat memory
_PATIENCE_BYTES = 1 << 16  # how far past a piece's end to look for a place to cut


@dataclass(frozen=True)
class Config:
    """Tokenise text and JSONL files into uint16 shards for --data."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """.txt and .jsonl files, or folders of them."""
    out: Path
    """Folder for the shards; the same command again goes on where it stopped."""
    shard_tokens: int = 100_000_000
    """Tokens of a shard."""
    val_tokens: int = 0
    """Tokens at the start that become val-*.bin instead of train-*.bin."""
    key: str = "text"
    """Field of a JSONL object that holds the document."""
    processes: int = os.cpu_count() or 1
    """Tokenising processes."""

    def __post_init__(self) -> None:
        for name in ("shard_tokens", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"prepare: {name} must be at least 1, got {getattr(self, name)}")
        if self.val_tokens < 0:
            raise ValueError(f"prepare: val_tokens must be at least 0, got {self.val_tokens}")
        if not self.inputs:
            raise ValueError("prepare: no input; name .txt or .jsonl files, or a folder of them")


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of one input."""

    path: Path
    start: int
    end: int
    key: str


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """Files to read, in the order they are read.

    Raises:
        FileNotFoundError: no such file. ValueError: a folder without text, or another suffix.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
            if not inside:
                raise ValueError(f"prepare: no .txt or .jsonl file in the folder {path}")
            found += inside
        elif not path.is_file():
            raise FileNotFoundError(f"prepare: no such file: {path}")
        elif path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"prepare: {path} must end in .txt or .jsonl")
        else:
            found.append(path)
    return found


def cut(path: Path, key: str) -> Iterator[Piece]:
    """Pieces of a file, cut where a cut does not change the tokens."""
    size = path.stat().st_size
    start = 0
    with path.open("rb") as f:
        while start < size:
            end = min(start + PIECE_BYTES, size)
            if end < size:
                end = _next_line(f, end, size) if path.suffix == ".jsonl" else _place(f, end, size)
            yield Piece(path, start, end, key)
            start = end


def _next_line(f: Any, end: int, size: int) -> int:
    """First byte of the line after `end`."""
    f.seek(end - 1)
    f.readline()
    return min(f.tell(), size)


def _place(f: Any, end: int, size: int) -> int:
    """First ASCII white space at or after `end` that follows another ASCII character."""
    while True:
        f.seek(end - 1)
        window = np.frombuffer(f.read(_PATIENCE_BYTES), dtype=np.uint8)
        space = (window == 0x20) | (window == 0x0A)
        solid = (window > 0x20) & (window < 0x7F)
        places = np.flatnonzero(space[1:] & solid[:-1])
        if len(places):
            return end + int(places[0])
        end += len(window) - 1
        if end >= size:
            return size


def encode_piece(piece: Piece) -> tuple[bytes, int]:
    """Tokens of one piece as uint16 bytes, and the number of documents that begin in it.

    Raises:
        ValueError: not UTF-8 (byte offset), not JSON or without the key (byte offset of the line).
    """
    with piece.path.open("rb") as f:
        f.seek(piece.start)
        data = f.read(piece.end - piece.start)
    if piece.path.suffix == ".jsonl":
        documents = list(_documents(piece, data))
        parts = [p for text in documents for p in (_EOT, tokenizer.encode(text))]
        return np.concatenate([*parts, _NOTHING]).tobytes(), len(documents)
    first = piece.start == 0
    tokens = tokenizer.encode(_decode(piece, data, 0))
    return (_EOT.tobytes() if first else b"") + tokens.tobytes(), int(first)


_EOT = np.array([tokenizer.EOT], dtype=TOKEN_DTYPE)
_NOTHING = np.empty(0, dtype=TOKEN_DTYPE)


def _documents(piece: Piece, data: bytes) -> Iterator[str]:
    offset = 0
    for line in data.splitlines(keepends=True):
        here, offset = offset, offset + len(line)
        if not line.strip():
            continue
        try:
            text = json.loads(_decode(piece, line, here))[piece.key]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else f"{error}"
            raise ValueError(
                f"prepare: {piece.path}: the line at byte {piece.start + here} cannot be read "
                f"({reason}); each line must be an object with {piece.key!r} (--key)"
            ) from None
        if not isinstance(text, str):
            raise ValueError(
                f"prepare: {piece.path}: {piece.key!r} of the line at byte {piece.start + here} "
                f"must be a string, got {type(text).__name__}"
            )
        yield text


def _decode(piece: Piece, data: bytes, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prepare: {piece.path} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{piece.start + offset + error.start}; convert it, e.g. iconv -t UTF-8"
        ) from None


class ShardWriter:
    """Cuts one stream of tokens into shard files and keeps index.json true.

    A shard is written under a temporary name and renamed when it is full; index.json follows. So
    after a crash the index names whole shards only, and where in the pieces the next one begins.
    """

    def __init__(self, cfg: Config, sources: list[dict[str, Any]]):
        self.cfg = cfg
        self.index_path = cfg.out / "index.json"
        self.index: dict[str, Any] = {
            "format": FORMAT, "version": VERSION, "encoding": tokenizer.ENCODING,
            "dtype": "uint16", "sources": sources, "key": cfg.key, "piece_bytes": PIECE_BYTES,
            "shard_tokens": cfg.shard_tokens, "val_tokens": cfg.val_tokens, "shards": [],
            "documents": 0, "next_piece": 0, "skip_tokens": 0, "done": False,
        }  # fmt: skip
        cfg.out.mkdir(parents=True, exist_ok=True)
        if self.index_path.exists():
            self._resume()
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._documents = self.index["documents"]

    def _resume(self) -> None:
        try:
            old = json.loads(self.index_path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(
                f"prepare: {self.index_path} is damaged; remove the folder and start again"
            ) from None
        fixed = ("format", "version", "encoding", "sources", "key", "piece_bytes", "shard_tokens",
                 "val_tokens")  # fmt: skip
        changed = [name for name in fixed if old.get(name) != self.index[name]]
        if changed:
            raise ValueError(
                f"prepare: {self.cfg.out} holds shards of another command ({', '.join(changed)} "
                f"differ); choose another --out"
            )
        self.index = old

    @property
    def tokens(self) -> int:
        """Tokens in finished shards."""
        return sum(shard["tokens"] for shard in self.index["shards"])

    def _target(self) -> tuple[str, int]:
        """Split and size of the shard being filled; validation comes first."""
        left = self.cfg.val_tokens - self.tokens
        return ("val", min(left, self.cfg.shard_tokens)) if left > 0 else (
            "train", self.cfg.shard_tokens)  # fmt: skip

    def add(self, piece: int, tokens: np.ndarray, documents: int) -> None:
        """Append the tokens of piece number `piece`."""
        used = 0
        if piece == self.index["next_piece"]:
            used = self.index["skip_tokens"]
        self._documents += documents if used == 0 else 0
        rest = tokens[used:]
        while self._buffered + len(rest) >= (size := self._target()[1]):
            take = size - self._buffered
            self._buffer.append(rest[:take])
            used += take
            rest = rest[take:]
            self._flush(next_piece=piece, skip_tokens=used)
        if len(rest):
            self._buffer.append(rest)
            self._buffered += len(rest)

    def finish(self) -> None:
        """Write the last, shorter shard and mark the folder done."""
        if self._buffered:
            self._flush(next_piece=self.index["next_piece"], skip_tokens=0)
        self.index["done"] = True
        self._save()

    def _flush(self, next_piece: int, skip_tokens: int) -> None:
        split = self._target()[0]
        number = sum(shard["file"].startswith(split) for shard in self.index["shards"])
        name = f"{split}-{number:06d}.bin"
        data = np.concatenate(self._buffer).astype(TOKEN_DTYPE).tobytes()
        write_atomically(self.cfg.out / name, data)
        self.index["shards"].append(
            {"file": name, "tokens": len(data) // 2, "sha256": hashlib.sha256(data).hexdigest()}
        )
        self.index |= {"next_piece": next_piece, "skip_tokens": skip_tokens,
                       "documents": self._documents}  # fmt: skip
        self._buffer, self._buffered = [], 0
        self._save()

    def _save(self) -> None:
        write_atomically(self.index_path, json.dumps(self.index, indent=1))


def prepare(cfg: Config, quiet: bool = False) -> dict[str, Any]:
    """Tokenise; returns the contents of index.json.

    Raises:
        ValueError, FileNotFoundError: with one line that names the file and the place in it.
    """
    files = find_inputs(cfg.inputs)
    sources = [{"path": str(p), "bytes": p.stat().st_size} for p in files]
    writer = ShardWriter(cfg, sources)
    if writer.index["done"]:
        return writer.index
    pieces = [piece for path in files for piece in cut(path, cfg.key)]
    total = sum(s["bytes"] for s in sources)
    bar = Progress(TextColumn("tokenising"), BarColumn(), TextColumn("{task.percentage:5.1f}%"),
                   TextColumn("{task.fields[tokens]:,} tokens"), TimeRemainingColumn(),
                   disable=quiet or not sys.stdout.isatty())  # fmt: skip
    # spawn: a fork after torch or tiktoken has started threads can hang.
    with bar, ProcessPoolExecutor(cfg.processes, mp_context=get_context("spawn")) as pool:
        task = bar.add_task("", total=total, tokens=writer.tokens)
        start = writer.index["next_piece"]
        bar.update(task, completed=sum(p.end - p.start for p in pieces[:start]))
        waiting: deque[tuple[int, Future[tuple[bytes, int]]]] = deque()
        todo = iter(range(start, len(pieces)))
        seen = writer.tokens
        while True:
            # A bounded number in flight keeps the memory flat whatever the corpus.
            while len(waiting) < 2 * cfg.processes and (i := next(todo, None)) is not None:
                waiting.append((i, pool.submit(encode_piece, pieces[i])))
            if not waiting:
                break
            i, future = waiting.popleft()
            data, documents = future.result()
            tokens = np.frombuffer(data, dtype=TOKEN_DTYPE)
            writer.add(i, tokens, documents)
            seen += len(tokens)
            bar.update(task, advance=pieces[i].end - pieces[i].start, tokens=seen)
    writer.finish()
    return writer.index


def main() -> int:
    """Exit code 2 and one line on stderr for bad input."""
    try:
        cfg = tyro.cli(Config)
        index = prepare(cfg)
    except (ValueError, OSError) as error:
        print(f"prepare: {str(error).removeprefix('prepare: ')}", file=sys.stderr)
        return 2
    tokens = sum(shard["tokens"] for shard in index["shards"])
    print(
        f"{tokens:,} tokens of {index['documents']:,} documents in {len(index['shards'])} shards: "
        f"train.py --data {cfg.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
