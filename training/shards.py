"""Token files of this project and of others, seen as one long array.

    ours and nanoGPT    .bin   headerless little-endian uint16
    llm.c, modded-nanogpt .bin 256 int32 header (20240520, 1, number of tokens), then uint16
    build-nanogpt       .npy   numpy v1, uint16

All are memory-mapped: a corpus may be larger than the memory. Formats as read from nanoGPT's
data/*/prepare.py, llm.c's dev/data/data_common.py and build-nanogpt's fineweb.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

TOKEN_DTYPE = np.dtype("<u2")  # GPT-2's 50,257 ids fit
LLMC_MAGIC = 20240520
_LLMC_HEADER = 256  # int32 words
_LLMC_LLAMA_MAGIC = 20240801  # the same layout with uint32 tokens of Llama 3's vocabulary

SUFFIXES = (".bin", ".npy")


def open_shard(path: Path) -> np.ndarray:
    """Map one token file.

    Args:
        path: A file in one of the formats above; a .bin is told apart by its first word.

    Returns:
        (N,) uint16, memory-mapped, read-only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: empty, truncated, of another vocabulary, or of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data: no such file: {path}")
    if path.suffix == ".npy":
        return _open_npy(path)
    num_bytes = path.stat().st_size
    if num_bytes == 0 or num_bytes % TOKEN_DTYPE.itemsize:
        raise ValueError(
            f"data: {path} must hold uint16 tokens, got {num_bytes} bytes; --data takes text too"
        )
    header = np.fromfile(path, dtype="<i4", count=_LLMC_HEADER)
    if len(header) == _LLMC_HEADER and header[0] == _LLMC_LLAMA_MAGIC:
        raise ValueError(
            f"data: {path} is an llm.c shard of Llama 3 tokens (magic {_LLMC_LLAMA_MAGIC}); this "
            f"model needs GPT-2's (magic {LLMC_MAGIC})"
        )
    # Two GPT-2 tokens that read as this word are 13768, 309 (" spotlight" and "F"), then 1, 0:
    # a version word of 1 and a size that fits make a mistake impossible in practice.
    if len(header) == _LLMC_HEADER and header[0] == LLMC_MAGIC and header[1] == 1:
        expected = 4 * _LLMC_HEADER + TOKEN_DTYPE.itemsize * int(header[2])
        if num_bytes != expected:
            raise ValueError(
                f"data: {path} must be {expected} bytes for the {header[2]} tokens its header "
                f"names, got {num_bytes}; it is truncated or damaged"
            )
        return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=4 * _LLMC_HEADER)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r")


def _open_npy(path: Path) -> np.ndarray:
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


def find_shards(folder: Path, split: str) -> list[Path]:
    """Token files of one split in `folder`, by name; [] when it holds none.

    Args:
        folder: Where prepare.py, nanoGPT, llm.c or build-nanogpt wrote.
        split: "train" or "val"; a file belongs to the split its name contains.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    return [p for p in files if split in p.name]


class TokenShards:
    """Several one-dimensional arrays as one, without copying them.

    Supports what a loader needs: `len`, slices with step 1 (another view), and integer arrays of
    any shape (a gather).

    Args:
        parts: (N_i,) uint16 each.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = [p for p in parts if len(p)]
        self.ends = np.cumsum([len(p) for p in self.parts], dtype=np.int64)
        self.dtype = TOKEN_DTYPE

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @overload
    def __getitem__(self, at: slice) -> "TokenShards": ...
    @overload
    def __getitem__(self, at: np.ndarray) -> np.ndarray: ...

    def __getitem__(self, at: slice | np.ndarray) -> "TokenShards | np.ndarray":
        if isinstance(at, slice):
            first, last, step = at.indices(len(self))
            assert step == 1, "token views have no stride"
            starts = self.ends - [len(p) for p in self.parts]
            return TokenShards(
                [
                    part[max(first - start, 0) : max(last - start, 0)]
                    for part, start in zip(self.parts, starts.tolist(), strict=True)
                ]
            )
        out = np.empty(at.shape, dtype=TOKEN_DTYPE)
        owner = np.searchsorted(self.ends, at, side="right")
        for i in np.unique(owner):
            inside = owner == i
            out[inside] = self.parts[i][at[inside] - (self.ends[i] - len(self.parts[i]))]
        return out

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """All of it in memory; for small views such as an evaluation's tokens."""
        whole = np.concatenate(self.parts) if self.parts else np.empty(0, dtype=TOKEN_DTYPE)
        return whole if dtype is None else whole.astype(dtype)
