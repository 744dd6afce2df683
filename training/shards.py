"""Token files of this project and of others, as one long array.

    ours and nanoGPT    .bin   headerless little-endian uint16
    llm.c, modded-nanogpt .bin 256 int32 header (20240520, 1, number of tokens), then uint16
    build-nanogpt       .npy   numpy v1, uint16

All are memory-mapped, as a corpus may be larger than the memory. The formats are those of nanoGPT's
data/*/prepare.py, llm.c's dev/data/data_common.py and build-nanogpt's fineweb.py.

A folder that training.prepare wrote has an index.json with the name, size and SHA-256 of each
file. All three are checked when the folder is opened. In a folder of more than FULL_BYTES only 64
samples of each file are hashed.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model import tokenizer
from model.edge import quoted
from model.files import read_object
from training import schema
from training.schema import Must

TOKEN_DTYPE = np.dtype("<u2")  # GPT-2's 50,257 ids fit
LLMC_MAGIC = 20240520
_LLMC_HEADER = 1024  # bytes, 256 int32 words

SUFFIXES = (".bin", ".npy")
INDEX = "index.json"
FORMAT, VERSION = "fused-gpt-tokens", 2
FULL_BYTES = 1 << 30  # hashing as much takes about a second
_SAMPLES, _SAMPLE_TOKENS = 64, 2048
_AGAIN = "run the same training.prepare command again"
_NAME = re.compile(r"(train|val)-\d{6,}\.bin")
_SHARD = {
    "file": Must("the name of a shard", lambda v: isinstance(v, str) and bool(_NAME.fullmatch(v))),
    "tokens": Must("a number of tokens", lambda v: schema.COUNT.holds(v) and v > 0),
    "sha256": schema.TEXT,
    "samples?": schema.TEXT,  # not in version 1
}
_INDEX = {
    "format": Must(f"{FORMAT!r}, as training.prepare writes it", lambda v: v == FORMAT),
    "version": Must(f"1 or {VERSION}", lambda v: v in (1, VERSION)),
    "shards": [_SHARD],
    "done": schema.PLAIN[bool],
    **dict.fromkeys(("documents", "next_piece", "skip_tokens"), schema.COUNT),
}


def holds_tokens(path: Path) -> bool:
    """Whether it is a token file, or a folder with one in it."""
    if path.is_dir():
        return (path / INDEX).exists() or any(holds_tokens(p) for p in _token_files(path))
    return path.suffix.lower() in SUFFIXES


def _token_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a file in one of the formats above, (N,) uint16, memory-mapped, read-only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, truncated, or of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    if path.suffix.lower() == ".npy":
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"data: {path} is not a readable .npy file: {error}") from None
        if tokens.ndim != 1 or tokens.dtype != TOKEN_DTYPE or not len(tokens):
            raise ValueError(
                f"data: {path} must be a one-dimensional array of uint16, "
                f"got {tokens.dtype} of shape {tokens.shape}"
            )
        return tokens
    with path.open("rb") as file:
        start = file.read(12)
    if start.startswith((b"PK\x03\x04", b"\x80\x02\x8a\n")):
        raise ValueError(f"data: {path} holds PyTorch's weights, not tokens; weights go to --init")
    num_bytes = path.stat().st_size
    if num_bytes == 0 or num_bytes % TOKEN_DTYPE.itemsize:
        raise ValueError(
            f"data: {path} must hold uint16 tokens, got {num_bytes} bytes; --data takes text too"
        )
    magic, version, num = np.frombuffer(start.ljust(12, b"\0"), dtype="<i4").tolist()
    # A headerless file is mistaken only if its tokens begin with " spotlight", "F", 1, 0.
    if magic != LLMC_MAGIC or version != 1:
        return np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
    expected = _LLMC_HEADER + TOKEN_DTYPE.itemsize * num
    if num_bytes != expected or num < 1:
        raise ValueError(
            f"data: {path} must be {expected} bytes for the {num} tokens its header names, got "
            f"{num_bytes}; it is truncated, damaged or empty"
        )
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=_LLMC_HEADER)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_samples(tokens: np.ndarray) -> str:
    """SHA-256 of samples from 64 places in a file, both ends included."""
    last = max(len(tokens) - _SAMPLE_TOKENS, 0)
    digest = hashlib.sha256()
    for start in np.linspace(0, last, _SAMPLES, dtype=np.int64).tolist():
        digest.update(tokens[start : start + _SAMPLE_TOKENS].tobytes())
    return digest.hexdigest()


def open_foreign(path: Path) -> tuple[dict[Path, np.ndarray], str]:
    """Open the token files of another program, or one file of ours without its index.

    Args:
        path: A file or a folder.

    Returns:
        The tokens by file, and a SHA-256 over all of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file is odd or was made with another vocabulary.
    """
    files = _token_files(path) if path.is_dir() else [path]
    if (pickle := files[0].with_name("meta.pkl")).exists():
        raise ValueError(
            f"data: {pickle} says that the tokens beside it are characters, as nanoGPT's "
            "shakespeare_char has them, not GPT-2's; give the text itself"
        )
    parts = {file: open_shard(file) for file in files}
    digest = hashlib.sha256()
    for file, tokens in parts.items():
        check_encoding(file, read_object(file.with_suffix(".json")))  # it may stand beside the file
        start = tokens[: 1 << 20]
        if np.count_nonzero(start[::2]) > 8 and (start[1::2] < 4).all():  # ids below 2^18
            raise ValueError(
                f"data: {file} must hold uint16 tokens, but every other one is {start[1]} or the "
                "like; are they uint32?"
            )
        check_vocabulary(tokens, file)
        digest.update(hash_file(file).encode())
    return parts, digest.hexdigest()


def open_prepared(folder: Path) -> tuple[dict[Path, np.ndarray], str]:
    """Open the shards that training.prepare wrote; returns what `open_foreign` does.

    Raises:
        ValueError: they are not what index.json describes, or not finished.
    """
    index = read_index(folder)
    check_encoding(folder, index)
    if not (index["done"] and index["shards"]):
        raise ValueError(f"data: {folder} is not finished; {_AGAIN}")
    shards = {folder / shard["file"]: shard for shard in index["shards"]}
    if others := [p for p in _token_files(folder) if p not in shards]:
        raise ValueError(f"data: {others[0]} is not named in {INDEX}; move it out of the folder")
    num_tokens = sum(shard["tokens"] for shard in index["shards"])
    whole = num_tokens * TOKEN_DTYPE.itemsize <= FULL_BYTES
    parts = {path: check_shard(path, shard, whole) for path, shard in shards.items()}
    digest = hashlib.sha256("".join(shard["sha256"] for shard in index["shards"]).encode())
    return parts, digest.hexdigest()


def check_shard(path: Path, shard: dict[str, Any], whole: bool) -> np.ndarray:
    """Open a shard and compare it with its entry in index.json; hash all of it, or samples.

    Raises:
        ValueError: it is missing, truncated, changed, or a link to something else.
    """
    num_bytes = TOKEN_DTYPE.itemsize * shard["tokens"]
    if path.is_file() and not path.is_symlink() and path.stat().st_size == num_bytes:
        tokens = np.memmap(path, dtype=TOKEN_DTYPE, mode="r")
        found = hash_file(path) if whole else hash_samples(tokens)
        if found == shard.get("sha256" if whole else "samples", found):  # version 1 has no samples
            return tokens
    raise ValueError(f"data: {path} is missing, or not what {INDEX} describes; {_AGAIN}")


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check index.json of a prepared folder.

    Raises:
        ValueError: training.prepare did not write it, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"data: {path} is not a regular file; training.prepare writes one")
    try:  # with a folder of many files it is larger than what read_object takes
        index: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data: {path} is not valid JSON: {error}") from None
    schema.check(f"data: {path}", index, schema.OBJECT)
    schema.check(f"data: {path}", {name: index.get(name) for name in _INDEX}, _INDEX)
    names = [shard["file"] for shard in index["shards"]]
    if len({*names}) < len(names):
        raise ValueError(f"data: {path}: shards must be different files")
    return index


def check_encoding(path: Path, description: dict[str, Any]) -> None:
    if (encoding := description.get("encoding", tokenizer.ENCODING)) != tokenizer.ENCODING:
        raise ValueError(
            f"data: {path} was made with the vocabulary {quoted(encoding)}, this model needs "
            f"{tokenizer.ENCODING!r}; tokenise the text again"
        )


def check_vocabulary(
    tokens: np.ndarray, where: object, error: type[Exception] = ValueError
) -> None:
    if tokens.size and (largest := int(tokens.max())) >= tokenizer.VOCAB_SIZE:
        raise error(
            f"data: {where} holds token {largest}, GPT-2's vocabulary ends at "
            f"{tokenizer.VOCAB_SIZE - 1}; it was made with another vocabulary, or is damaged"
        )


class TokenShards:
    """Several (N_i,) uint16 arrays as one, without copying them.

    Supports what a loader needs: `len`, slices with step 1 (another view), and integer arrays of
    any shape (a gather).

    Raises:
        OSError: an id that is read lies outside the vocabulary, so the disk failed.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = [p for p in parts if len(p)]
        self.edges = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.edges[-1])

    def __getitem__(self, at: slice | np.ndarray) -> Any:
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            assert step == 1, "token views have no stride"
            places = zip(self.parts, self.edges[:-1].tolist(), strict=True)
            return TokenShards([p[max(first - s, 0) : max(last - s, 0)] for p, s in places])
        out = np.empty(at.shape, dtype=TOKEN_DTYPE)
        owner = np.searchsorted(self.edges, at, side="right") - 1
        for i in np.unique(owner):
            inside = owner == i
            out[inside] = self.parts[i][at[inside] - self.edges[i]]
        check_vocabulary(out, "the corpus", OSError)
        return out

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of it in memory; for small views such as an evaluation's tokens."""
        whole = np.concatenate([np.empty(0, dtype=TOKEN_DTYPE), *self.parts])
        check_vocabulary(whole, "the corpus", OSError)
        return whole if dtype is None else whole.astype(dtype)
