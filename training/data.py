"""From text to batches: find it, tokenise it once, split it, walk through it in a defined order.

A sample is a row of T + 1 consecutive tokens, the last shifted by one as target. Its place in the
run is one integer, the number of rows drawn before it, so that a run resumes exactly and shards
over ranks whatever the micro-batch:

    epoch = row // rows_per_epoch    index = row % rows_per_epoch
    sequential: start = index * T                            (as the text stands)
    shuffled:   start = permutation(seed, epoch)[index] * T  (without replacement)
"""

import hashlib
import importlib
import json
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import tokenizer
from model.files import write_atomically
from training.recipes import Order
from training.shards import SUFFIXES, TOKEN_DTYPE, TokenShards, open_shard

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT_S = 5.0

Tokens = np.ndarray | TokenShards


@dataclass(frozen=True)
class Source:
    """Documents and where they come from.

    Args:
        name: What to call it in messages and in config.json.
        documents: UTF-8 text of each document.
        sha256: Over the documents' bytes with their lengths.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Token ids on disk.

    Args:
        tokens: (N,) uint16, memory-mapped.
        name, sha256: Of the source, see `Source`.
        path: The token file, or the folder of shards.
        val: (N_val,) uint16 where the source has a validation part of its own.
    """

    tokens: Tokens
    name: str
    sha256: str
    path: Path
    val: Tokens | None = None

    def split(self, val_fraction: float) -> tuple[Tokens, Tokens]:
        """Training part, and the validation part: the source's own, else the tail."""
        if self.val is not None and val_fraction > 0:
            return self.tokens, self.val
        num_train = len(self.tokens) - int(len(self.tokens) * val_fraction)
        return self.tokens[:num_train], self.tokens[num_train:]


def load_corpus(paths: Sequence[str | Path], say: Callable[[str], None] = print) -> Corpus:
    """Tokens of `paths`, or of a text found without them.

    Args:
        paths: UTF-8 text files, folders of .txt files, or one token file (.bin). Empty: input.txt
            in the working directory, else tiny Shakespeare from the network, else text that
            comes with Python.
        say: Called with a line that says what was taken.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, not UTF-8, a folder without text, or tokens of another vocabulary.
    """
    if len(paths) == 1 and _holds_tokens(path := Path(paths[0])):
        return open_tokens(path)
    source = _read_documents([Path(p) for p in paths]) if paths else _default_source(say)
    return _tokenise(source, tokenizer.cache_dir() / "tokens")


def _holds_tokens(path: Path) -> bool:
    """A token file, or a folder with one in it."""
    if path.is_dir():
        return any(p.suffix in SUFFIXES for p in path.iterdir())
    return path.suffix in SUFFIXES


def open_tokens(path: Path) -> Corpus:
    """Open a token file, or a folder of shards; formats in training/shards.py.

    In a folder, files with "val" in their name are the validation part and the others are trained
    on. A JSON beside a file, or index.json in a folder, names the encoding.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is empty or odd, or was made with another vocabulary.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
    meta = _read_meta(path / "index.json" if path.is_dir() else _meta_path(path))
    encoding = meta.get("encoding", tokenizer.ENCODING)
    if encoding != tokenizer.ENCODING:
        raise ValueError(
            f"data: {path} was made with the vocabulary {encoding!r}, this model needs "
            f"{tokenizer.ENCODING!r}; tokenise the text again"
        )
    if meta.get("done") is False:
        raise ValueError(
            f"data: {path} is not finished; run the same training.prepare command again"
        )
    val = [p for p in files if path.is_dir() and "val" in p.name]
    parts = {p: open_shard(p) for p in files}
    for file, tokens in parts.items():
        if (largest := _largest(tokens)) >= tokenizer.VOCAB_SIZE:
            raise ValueError(
                f"data: {file} holds token {largest}, GPT-2's vocabulary ends at "
                f"{tokenizer.VOCAB_SIZE - 1}; it was made with another vocabulary"
            )
    digest = hashlib.sha256()
    for shard in meta.get("shards", ()):
        digest.update(shard["sha256"].encode())
    for file in [] if "shards" in meta or "sha256" in meta else files:
        digest.update(_hash_file(file).encode())
    sha256 = str(meta.get("sha256") or digest.hexdigest())
    train = _join([parts[p] for p in files if p not in val])
    return Corpus(train, str(meta.get("name", path)), sha256, path,
                  _join([parts[p] for p in val]) if val else None)  # fmt: skip


def _join(parts: list[np.ndarray]) -> Tokens:
    return parts[0] if len(parts) == 1 else TokenShards(parts)


def _default_source(say: Callable[[str], None]) -> Source:
    """input.txt, tiny Shakespeare, or Python's own manual, whichever comes first."""
    here = Path("input.txt")
    if here.is_file():
        say("data: input.txt of the working directory")
        return _read_documents([here])
    kept = tokenizer.cache_dir() / "tinyshakespeare.txt"
    if not (kept.is_file() and _hash_file(kept) == SHAKESPEARE_SHA256):
        try:
            write_atomically(kept, _download(SHAKESPEARE_URL))
        except (OSError, ValueError) as error:
            say(
                f"data: tiny Shakespeare could not be downloaded ({error}); taking the language "
                "reference that comes with Python (pydoc_data.topics). --data FILE takes your text"
            )
            topics = importlib.import_module("pydoc_data.topics").topics
            documents = tuple(topics[name] for name in sorted(topics))
            return Source("pydoc_data.topics", documents, _hash_documents(documents))
    say("data: tiny Shakespeare. --data FILE takes your own text")
    return Source("tiny Shakespeare", (text := kept.read_text(encoding="utf-8"),),
                  _hash_documents((text,)))  # fmt: skip


def _download(url: str) -> bytes:
    """The bytes behind `url`; ValueError when they are not tiny Shakespeare."""
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer:
        data: bytes = answer.read(1 << 22)
    if (got := hashlib.sha256(data).hexdigest()) != SHAKESPEARE_SHA256:
        raise ValueError(f"its sha256 is {got[:12]}..., not {SHAKESPEARE_SHA256[:12]}...")
    return data


def _read_documents(paths: Sequence[Path]) -> Source:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*.txt") if p.is_file())
            if not inside:
                raise ValueError(f"data: no .txt file in the folder {path}")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"data: no such file: {path}")
    documents = tuple(_read_text(path) for path in files)
    if not any(documents):
        raise ValueError(f"data: {', '.join(map(str, paths))} is empty; it needs text to train on")
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return Source(name, documents, _hash_documents(documents))


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data: {path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}; "
            f"convert it, e.g. iconv -t UTF-8"
        ) from None


def _tokenise(source: Source, folder: Path) -> Corpus:
    """Tokens of `source` from the cache, or into it. Documents are joined by <|endoftext|>."""
    path = folder / f"{source.sha256[:16]}-{tokenizer.ENCODING}.bin"
    meta = _read_meta(_meta_path(path))
    size = path.stat().st_size if path.is_file() else -1
    if meta.get("sha256") != source.sha256 or size != TOKEN_DTYPE.itemsize * meta.get("tokens", 0):
        pieces: list[np.ndarray] = []
        for document in source.documents:
            if pieces:
                pieces.append(np.array([tokenizer.EOT], dtype=TOKEN_DTYPE))
            pieces.append(tokenizer.encode(document))
        tokens = np.concatenate(pieces).astype(TOKEN_DTYPE)
        meta = {
            "name": source.name,
            "sha256": source.sha256,
            "encoding": tokenizer.ENCODING,
            "documents": len(source.documents),
            "tokens": len(tokens),
            "dtype": "uint16",
        }
        # The JSON last: without it the token file counts as absent.
        write_atomically(path, tokens.tobytes())
        write_atomically(_meta_path(path), json.dumps(meta, indent=1))
    tokens = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
    return Corpus(tokens, source.name, source.sha256, path)


def _meta_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_meta(path: Path) -> dict:
    """The JSON that describes a token file; empty when absent or unreadable."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _largest(tokens: np.ndarray) -> int:
    """Largest id; of a long file in 64 places, for reading 20 GB at every start is no check."""
    piece = 1 << 20
    starts = range(0, len(tokens), piece)
    if len(starts) > 64:
        starts = np.linspace(0, len(tokens) - piece, 64, dtype=np.int64).tolist()
    return max(int(tokens[i : i + piece].max()) for i in starts)


def _hash_documents(documents: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DataLoaderLite:
    """Batches of rows in an order that is a function of (seed, epoch, index) alone.

    Args:
        tokens: (N,) uint16.
        batch_size: Rows per batch and rank.
        T: Tokens of a row.
        order: "sequential" or "shuffled".
        seed: Of the permutation.
        wrap_rows: Rows that the text must hold at least; sequential order starts over when fewer
            are left. The recipe's batch_size: with it a batch of 64 rows is four of 16, wrap
            included.
        rank, world_size: A global batch is world_size batches, in rank order.
        position: Rows drawn before, over all ranks.
        skips: Row ranges [first, last) to leave out, as a rollback names them.

    Raises:
        ValueError: there are fewer tokens than one batch needs.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        T: int,
        order: Order = "shuffled",
        seed: int = 0,
        wrap_rows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
        skips: Sequence[tuple[int, int]] = (),
    ):
        wrap_rows = wrap_rows or batch_size
        needed = wrap_rows * T + 1
        if len(tokens) < needed:
            raise ValueError(
                f"data: one batch of {wrap_rows} x {T} needs {needed} training tokens, got "
                f"{len(tokens)}; take more text, or a smaller --batch-size or --block-size"
            )
        self.tokens, self.T, self.order, self.seed = tokens, T, order, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        num_rows = (len(tokens) - 1) // T
        self.rows_per_epoch = (
            num_rows // wrap_rows * wrap_rows if order == "sequential" else num_rows
        )
        self.position, self.skips = position, dict(skips)
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    @property
    def epoch(self) -> int:
        return self.position // self.rows_per_epoch

    @property
    def index(self) -> int:
        return self.position % self.rows_per_epoch

    def starts(self, first_row: int, num_rows: int) -> np.ndarray:
        """Token offsets of the rows `first_row` and following, int64."""
        rows = np.arange(first_row, first_row + num_rows)
        index = rows % self.rows_per_epoch
        if self.order == "shuffled":
            epochs = rows // self.rows_per_epoch
            for epoch in np.unique(epochs):
                inside = epochs == epoch
                index[inside] = self._permute(int(epoch))[index[inside]]
        return index * self.T

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next batch of this rank, each (batch_size, T) int64."""
        while self.position in self.skips:
            self.position = self.skips[self.position]
        starts = self.starts(self.position + self.rank * self.batch_size, self.batch_size)
        rows = self.tokens[starts[:, None] + np.arange(self.T + 1)].astype(np.int64)
        self.position += self.batch_size * self.world_size
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _permute(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._permutation = epoch, rng.permutation(self.rows_per_epoch)
        return self._permutation


class Prefetcher:
    """Reads one batch ahead of the training step, off the main thread.

    On CUDA the batch is pinned there and copied asynchronously here, on the current stream.
    `position` is that of the batches handed out, not of those read ahead.
    """

    def __init__(self, loader: DataLoaderLite, device: torch.device | str):
        self.loader = loader
        self.device = torch.device(device)
        self.position = loader.position
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._next = self._submit()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the device, each (B, T) int64."""
        x, y, position = self._next.result()
        self._next = self._submit()
        self.position = position
        return (x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))

    def seek(self, position: int, skips: Sequence[tuple[int, int]]) -> None:
        """Go to a row, leaving out the ranges `skips` from there on."""
        self._next.result()  # nothing reads while the loader moves
        self.loader.position, self.loader.skips = position, dict(skips)
        self.position = position
        self._next = self._submit()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> Future[tuple[Tensor, Tensor, int]]:
        return self._pool.submit(self._read)

    def _read(self) -> tuple[Tensor, Tensor, int]:
        x, y = self.loader.next_batch()
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y, self.loader.position
