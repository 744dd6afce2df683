"""Tokenise a corpus into shards: `python -m training.prepare corpus/ --out data/corpus`.

Text, JSONL and tables (training/documents.py) become headerless uint16 shards of equal size, each
document preceded by <|endoftext|>. This process reads the files in pieces, other processes tokenise
the pieces, and the results are joined in order. So the memory stays flat, and the shards do not
depend on the number of processes. index.json records which shards are done and what they were made
from. After an interruption the same command resumes where it stopped. If the inputs or the shards
have changed, it starts anew.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from model import tokenizer
from model.edge import check_int, exits, naming, one_line
from model.files import write_atomically
from training import documents, shards
from training.console import surviving
from training.documents import Piece, encode_piece
from training.machines import num_cores
from training.shards import INDEX, TOKEN_DTYPE

SHARD_TOKENS = 100_000_000
MAX_SHARDS = 1000  # index.json is written once per shard, and grows with each


@dataclass(frozen=True)
class Config:
    """Tokenise text, JSONL, Parquet and Arrow into uint16 shards for --data."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Files, patterns, or folders of .txt, .md, code, .jsonl, .parquet and .arrow files; text and
    JSONL also as .gz, .zst, .bz2 or .xz."""
    out: str  # Folder for the shards; the same command resumes an interrupted run.
    shard_tokens: int = SHARD_TOKENS  # Tokens per shard.
    val_tokens: int = 0  # Tokens at the start that become val-*.bin instead of train-*.bin.
    text_column: Annotated[str, tyro.conf.arg(aliases=["--key"])] = documents.KEY
    """JSONL field or table column that holds the document."""
    processes: int = num_cores()  # Number of tokenising processes.

    def check(self) -> None:
        """Raise ValueError for a value out of range. Not in __post_init__, as in train.py."""
        if not self.inputs:
            raise ValueError("prepare: no input; name files of text, or a folder of them")
        for name in ("out", "text_column"):
            if not getattr(self, name):
                raise ValueError(f"prepare: {name} must not be empty")
        check_int("prepare", "shard_tokens", self.shard_tokens, 1, 10**12)
        check_int("prepare", "val_tokens", self.val_tokens, 0, 10**12)
        check_int("prepare", "processes", self.processes, 1, 4 * num_cores())


class ShardWriter:
    """Splits one stream of tokens into shard files and keeps index.json up to date.

    A shard is written under a temporary name and renamed when it is full; then index.json follows.
    So even after a crash the index names only whole shards. It also says where the next one begins:
    `skip_tokens` into piece number `next_piece`.
    """

    def __init__(self, cfg: Config, inputs: Sequence[Path]):
        self.cfg, self.out = cfg, Path(cfg.out)
        command = {
            "format": shards.FORMAT,
            "version": shards.VERSION,
            "encoding": tokenizer.ENCODING,
            "inputs": [str(path) for path in inputs],
            "key": cfg.text_column,
            "piece_bytes": documents.PIECE_BYTES,
            "shard_tokens": cfg.shard_tokens,
            "val_tokens": cfg.val_tokens,
        }
        sha256 = documents.hash_files(inputs)
        self.index: dict[str, Any] = command | {"sha256": sha256, "shards": []}
        self.index |= {"documents": 0, "next_piece": 0, "skip_tokens": 0, "done": False}
        if (self.out / INDEX).exists():
            self._resume([*command])
        elif self.out.is_file() or (self.out.exists() and shards.holds_tokens(self.out)):
            raise ValueError(
                f"prepare: {self.out} is a file or holds other token files; choose another --out"
            )
        self._partial = self.out / ".shard.partial"
        self._count = 0  # tokens in the partial shard
        self._documents = self.index["documents"]
        self.tokens = sum(shard["tokens"] for shard in self.index["shards"])

    def _resume(self, fixed: list[str]) -> None:
        """Take over the index of an interrupted run, unless what it describes has changed."""
        old = shards.read_index(self.out)
        changed = [name for name in fixed if old.get(name) != self.index[name]]
        if changed:
            raise ValueError(
                f"prepare: {self.out} holds shards of another command ({', '.join(changed)} "
                "differ); choose another --out"
            )
        for path in (self.out / shard["file"] for shard in old["shards"]):
            if path.is_dir():  # before a shard is deleted
                raise ValueError(
                    f"prepare: {path} is a folder in the place of a shard; move it away and run "
                    "the same command again"
                )
        what = "the inputs" if old.get("sha256") != self.index["sha256"] else ""
        for shard in old["shards"]:
            try:
                shards.check_shard(self.out / shard["file"], shard, whole=True)
            except ValueError:
                what = "its shards"
        if not what:
            self.index = old
            return
        print(f"prepare: {what} changed since {self.out} was written; starting anew")
        for shard in old["shards"]:
            (self.out / shard["file"]).unlink(missing_ok=True)
        self._save()

    def _target(self) -> tuple[str, int]:
        """Split and size of the shard that is being filled. Validation shards come first."""
        size, left = self.cfg.shard_tokens, self.cfg.val_tokens - (self.tokens - self._count)
        return ("val", min(left, size)) if left > 0 else ("train", size)

    def add(self, piece: int, tokens: np.ndarray) -> None:
        """Append the tokens of piece number `piece`."""
        used = self.index["skip_tokens"] if piece == self.index["next_piece"] else 0
        if used == 0:  # the first time, so its documents are not yet counted
            self._documents += int(np.count_nonzero(tokens == tokenizer.EOT))
        while used < len(tokens):
            part = tokens[used : used + self._target()[1] - self._count]
            used += len(part)
            self.out.mkdir(parents=True, exist_ok=True)
            with naming(self.out), self._partial.open("ab" if self._count else "wb") as file:
                file.write(part.tobytes())
            self._count += len(part)
            self.tokens += len(part)
            if self._count == self._target()[1]:
                self._flush(piece, used)

    def finish(self) -> None:
        """Write the last, shorter shard and mark the folder done.

        Raises:
            ValueError: there was no text, or all of it is for validation.
        """
        if self.tokens <= self.cfg.val_tokens:
            raise ValueError(
                f"prepare: nothing is left to train on: {self.tokens:,} tokens in all, "
                f"val_tokens {self.cfg.val_tokens:,}"
            )
        # Saved with the last shard, or after a kill in between its tokens would be added twice.
        self.index["done"] = True
        if self._count:
            self._flush(self.index["next_piece"], self.index["skip_tokens"])
        self._save()

    def close(self) -> None:
        """Delete a half-written shard."""
        self._partial.unlink(missing_ok=True)

    def _flush(self, next_piece: int, skip_tokens: int) -> None:
        split = self._target()[0]
        number = sum(shard["file"].startswith(split) for shard in self.index["shards"])
        name = f"{split}-{number:06d}.bin"
        samples = shards.hash_samples(np.memmap(self._partial, dtype=TOKEN_DTYPE, mode="r"))
        sha256 = shards.hash_file(self._partial)
        os.replace(self._partial, self.out / name)
        shard = {"file": name, "tokens": self._count, "sha256": sha256, "samples": samples}
        self.index["shards"].append(shard)
        self.index |= {"next_piece": next_piece, "skip_tokens": skip_tokens}
        self.index["documents"], self._count = self._documents, 0
        self._save()

    def _save(self) -> None:
        write_atomically(self.out / INDEX, json.dumps(self.index, indent=1))


def encoded(pieces: Iterable[Piece], processes: int) -> Generator[bytes]:
    """Apply `encode_piece` to the pieces in several processes; the results come in order."""
    if processes == 1:
        yield from map(encode_piece, pieces)
        return
    # A fork can hang once torch or tiktoken has started threads. Only the parent handles Ctrl-C.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, ignore)
    waiting: deque[Future[bytes]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(encode_piece, piece))
            if len(waiting) == 2 * processes:  # a bounded number keeps the memory flat
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:
        raise OSError(
            "prepare: a tokenising process was killed, perhaps for lack of memory; the same "
            "command with fewer --processes resumes"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(cfg: Config) -> dict[str, Any]:
    """Tokenise; returns the contents of index.json.

    Raises:
        ValueError, FileNotFoundError: with one line that names the file and the place in it.
    """
    cfg.check()
    for path in filter(os.path.isdir, cfg.inputs):
        if Path(cfg.out).resolve().is_relative_to(Path(path).resolve()):
            raise ValueError(f"prepare: out must be outside of the inputs, got {cfg.out} in {path}")
    files = documents.find_inputs(cfg.inputs, cfg.text_column)
    if shards.holds_tokens(files[0]):
        raise ValueError(f"prepare: {files[0]} holds tokens already: train.py --data {files[0]}")
    total = sum(path.stat().st_size for path in files)
    plain = not any(documents.is_packed(path) or documents.is_table(path) for path in files)
    if cfg.val_tokens >= total and plain:  # a token is a byte at least
        got = f"{cfg.val_tokens:,} of {total:,} bytes"
        raise ValueError(f"prepare: val_tokens must leave text to train on, got {got}")
    if cfg.shard_tokens < (least := min(SHARD_TOKENS, -(-total // MAX_SHARDS))):
        raise ValueError(
            f"prepare: shard_tokens must be at least {least:,} for {total:,} bytes of text, got "
            f"{cfg.shard_tokens:,}"
        )
    writer = ShardWriter(cfg, files)
    if writer.index["done"]:
        return writer.index
    done = TextColumn("read {task.percentage:5.1f}%, {task.fields[tokens]:,} tokens")
    bar = Progress(done, BarColumn(), TimeRemainingColumn(), disable=not sys.stdout.isatty())
    task = bar.add_task("", total=total, tokens=writer.tokens)

    def read() -> Iterator[Piece]:
        for path in files:
            for piece in documents.cut(path, cfg.text_column):
                yield piece
                bar.advance(task, piece.advance)

    start = writer.index["next_piece"]
    processes = min(cfg.processes, 1 + total // documents.PIECE_BYTES)
    results = encoded(itertools.islice(read(), start, None), processes)
    with bar, contextlib.closing(writer), contextlib.closing(results):
        for i, data in enumerate(results, start):
            writer.add(i, np.frombuffer(data, dtype=TOKEN_DTYPE))
            bar.update(task, tokens=writer.tokens)
        writer.finish()
    return writer.index


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m training.prepare`."""
    with exits(), surviving():
        cfg = tyro.cli(Config, prog="python -m training.prepare", args=arguments)
        index = prepare(cfg)
        tokens = sum(shard["tokens"] for shard in index["shards"])
        made = f"{tokens:,} tokens of {index['documents']:,} documents"
        print(one_line(f"{made} in {len(index['shards'])} shards: train.py --data {cfg.out}"))


if __name__ == "__main__":
    main()
