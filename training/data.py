"""From text to batches: find it, tokenise it once, split it, read it in a defined order.

A row is T + 1 consecutive tokens: T inputs, and the same shifted by one as targets. Its place in
the run is one integer, the number of rows drawn before it. So a run resumes exactly, and its order
does not depend on the micro-batch or the number of ranks:

    epoch = row // rows_per_epoch    index = row % rows_per_epoch
    sequential: start = index * T                            (as the text stands)
    shuffled:   start = permutation(seed, epoch)[index] * T  (without replacement)
"""

import hashlib
import json
import re
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import tokenizer
from model.files import read_object, replacing, write_atomically
from training import shards
from training.documents import KEY, TAKEN, cut, encode_piece, find_inputs, hash_files
from training.recipes import Order
from training.shards import TOKEN_DTYPE, TokenShards

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT_S = 5.0
VALIDATION = re.compile(r"(?<![a-z])val(id(ation)?)?(?![a-z])")  # a word in a file's name

Tokens = np.ndarray | TokenShards


@dataclass(frozen=True)
class Corpus:
    tokens: TokenShards  # (N,) uint16
    name: str  # in messages and in config.json
    sha256: str  # by `hash_files` for text, else of the token files
    val: TokenShards | None = None  # the source's own validation part
    val_named: bool = False  # --val names it, so it is used even with --val-fraction 0

    def split(self, val_fraction: float) -> tuple[TokenShards, TokenShards]:
        """Training part, and the validation part: the source's own, else the tail.

        Raises:
            ValueError: validation is asked for, but there is too little text for it.
        """
        first = len(self.tokens) - int(len(self.tokens) * val_fraction)
        train, val = self.tokens[:first], self.tokens[first:]
        wanted = val_fraction > 0 or self.val_named
        if self.val is not None and wanted:
            train, val = self.tokens, self.val
        if wanted and len(val) < 2:
            raise ValueError(
                f"data: validation needs at least 2 tokens, got {len(val)} (val_fraction "
                f"{val_fraction} of {len(self.tokens)}); take more text, a larger --val-fraction, "
                "or --val-fraction 0 for none"
            )
        return train, val


def load_corpus(
    paths: Sequence[str | Path],
    say: Callable[[str], None] = print,
    key: str = KEY,
    val: Sequence[str | Path] = (),
) -> Corpus:
    """The tokens of a text or of token files.

    Args:
        paths: As for `find_inputs`; if empty, input.txt in the working directory, else tiny
            Shakespeare from the network, else a text that comes with Python.
        say: Receives lines about what is read and what is not.
        key: Field or column that holds the text.
        val: Validation text of the same kinds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file holds neither text nor tokens of GPT-2; the message says what it is.
    """
    if val:
        corpus, held_out = load_corpus(paths, say, key), load_corpus(val, say, key)
        both = hashlib.sha256(f"{corpus.sha256} {held_out.sha256}".encode()).hexdigest()
        own = held_out.tokens if held_out.val is None else held_out.val
        return replace(corpus, val=own, val_named=True, sha256=both)
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        name = f"{paths[0]}{more}"
    else:
        name, paths = _default_source(say)
    inputs = find_inputs(paths, key)
    if shards.holds_tokens(inputs[0]):
        beside = inputs[0].iterdir() if inputs[0].is_dir() else ()
        if texts := sorted(p.name for p in beside if p.suffix.lower() in TAKEN):
            say(f"data: the token files of {inputs[0]}; not read: {', '.join(texts[:5])}")
        return open_tokens(inputs[0])
    if len(inputs) > len(paths):
        counts = Counter(path.suffix.lower() for path in inputs)
        say(f"data: {name}: {', '.join(f'{n} {suffix}' for suffix, n in sorted(counts.items()))}")
    return _tokenise(inputs, name, key)


def open_tokens(path: Path) -> Corpus:
    """Open a token file, or a folder of them, in the formats of training/shards.py.

    Files of a folder that have "val" in their name are the validation part.
    """
    is_ours = (path / shards.INDEX).exists()
    parts, sha256 = shards.open_prepared(path) if is_ours else shards.open_foreign(path)
    val = [p for p in parts if path.is_dir() and VALIDATION.search(p.name.lower())]
    if len(val) == len(parts):
        raise ValueError(f"data: {path} holds validation files alone: {val[0].name}")
    train = TokenShards([parts[p] for p in parts if p not in val])
    own_val = TokenShards([parts[p] for p in val]) if val else None
    return Corpus(train, str(path), sha256, own_val)


def _default_source(say: Callable[[str], None]) -> tuple[str, list[Path]]:
    """Name and file of input.txt, else tiny Shakespeare, else Python's manual."""
    here = Path("input.txt")
    if here.is_file():
        say("data: input.txt in the working directory")
        return str(here), [here]
    kept = tokenizer.cache_dir() / "tinyshakespeare.txt"
    if not (kept.is_file() and shards.hash_file(kept) == SHAKESPEARE_SHA256):
        try:
            write_atomically(kept, _download(SHAKESPEARE_URL))
        except (OSError, ValueError) as error:
            say(
                f"data: tiny Shakespeare could not be downloaded ({error}); using the language "
                "reference that comes with Python (pydoc_data.topics). --data FILE takes your text"
            )
            from pydoc_data.topics import topics  # 700 kB of text

            manual = kept.with_name("pydoc_data.topics.jsonl")
            lines = (json.dumps({KEY: topics[name]}) + "\n" for name in sorted(topics))
            write_atomically(manual, "".join(lines))
            return "pydoc_data.topics", [manual]
    say("data: tiny Shakespeare. --data FILE trains on your own text")
    return "tiny Shakespeare", [kept]


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as answer:
        data: bytes = answer.read(1 << 22)
    if (got := hashlib.sha256(data).hexdigest()) != SHAKESPEARE_SHA256:
        raise ValueError(f"its sha256 is {got[:12]}..., not {SHAKESPEARE_SHA256[:12]}...")
    return data


def _tokenise(files: Sequence[Path], name: str, key: str) -> Corpus:
    """The tokens of text files, from the cache or newly made; <|endoftext|> between documents."""
    sha256 = hash_files(files, key)
    path = tokenizer.cache_dir() / "tokens" / f"{sha256[:16]}-{tokenizer.ENCODING}.bin"
    kept = read_object(path.with_suffix(".json"))
    # Only a hash of the whole file detects a damaged cache; the whole text was read anyway.
    if not path.is_file() or kept.get("tokens_sha256") != shards.hash_file(path):
        chunks = (encode_piece(piece) for file in files for piece in cut(file, key))
        first = next(filter(None, chunks), b"")  # it begins with <|endoftext|>
        with replacing(path) as partial:
            with partial.open("wb") as out:
                out.write(first[TOKEN_DTYPE.itemsize :])
                out.writelines(chunks)
            if not partial.stat().st_size:
                raise ValueError(f"data: {name} holds no text to train on")
            tokens_sha256 = shards.hash_file(partial)
        meta = {"name": name, "encoding": tokenizer.ENCODING, "tokens_sha256": tokens_sha256}
        # The JSON comes last: a token file without it is not used.
        write_atomically(path.with_suffix(".json"), json.dumps(meta, indent=1))
    return Corpus(TokenShards([np.memmap(path, dtype=TOKEN_DTYPE, mode="r")]), name, sha256)


@dataclass
class DataLoaderLite:
    """Batches of rows in an order that is a function of (seed, epoch, index) alone.

    Raises:
        ValueError: there are fewer tokens than one batch needs.
    """

    tokens: Tokens  # (N,) uint16
    batch_size: int  # rows per batch and rank
    T: int
    order: Order = "shuffled"
    seed: int = 0
    # Sequential order starts over when fewer rows are left. 0 is batch_size. With the recipe's
    # batch_size, a batch of 64 rows always equals four of 16.
    wrap_rows: int = 0
    rank: int = 0  # a global batch is world_size batches, in rank order
    world_size: int = 1
    position: int = 0  # rows drawn before, over all ranks
    skips: Sequence[tuple[int, int]] = ()  # row ranges [first, last) to leave out

    def __post_init__(self) -> None:
        wrap_rows, T = self.wrap_rows or self.batch_size, self.T
        needed = wrap_rows * T + 1
        if len(self.tokens) < needed:
            raise ValueError(
                f"data: one batch of {wrap_rows} x {T} needs {needed} training tokens, got "
                f"{len(self.tokens)}; take more text, or a smaller --batch-size or --block-size"
            )
        num_rows = (len(self.tokens) - 1) // T
        left = num_rows % wrap_rows if self.order == "sequential" else 0
        self.rows_per_epoch = num_rows - left
        self.skips = tuple(self.skips)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next batch of this rank, each (batch_size, T) int64."""
        skips = dict(self.skips)
        while self.position in skips:
            self.position = skips[self.position]
        rows = self.position + self.rank * self.batch_size + np.arange(self.batch_size)
        epochs, index = np.divmod(rows, self.rows_per_epoch)
        if self.order == "shuffled":
            for epoch in np.unique(epochs):
                inside = epochs == epoch
                order = _permutation(self.seed, int(epoch), self.rows_per_epoch)
                index[inside] = order[index[inside]]
        places = self.T * index[:, None] + np.arange(self.T + 1)
        both = torch.from_numpy(self.tokens[places].astype(np.int64))
        self.position += self.batch_size * self.world_size
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


@lru_cache(maxsize=1)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


class Prefetcher:
    """Reads one batch ahead of the training step, in its own thread.

    On CUDA the thread pins the batch, and `next_batch` copies it asynchronously on the current
    stream. `position` counts the batches handed out, not those read ahead.
    """

    def __init__(self, loader: DataLoaderLite, device: torch.device | str):
        self.loader = loader
        self.device = torch.device(device)
        self.position = loader.position
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._next = self._pool.submit(self._read)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the device, each (B, T) int64."""
        x, y, position = self._next.result()
        self._next = self._pool.submit(self._read)
        self.position = position
        return (x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))

    def seek(self, position: int, skips: Sequence[tuple[int, int]]) -> None:
        """Continue from row `position`, without the ranges `skips`."""
        self._next.result()  # the thread must not read while the loader moves
        self.loader.position, self.loader.skips = position, tuple(skips)
        self.position = position
        self._next = self._pool.submit(self._read)

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self) -> tuple[Tensor, Tensor, int]:
        x, y = self.loader.next_batch()
        if self.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        return x, y, self.loader.position
