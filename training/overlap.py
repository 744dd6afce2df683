"""What of a text stands verbatim in a corpus, exactly, in seconds on 100 MB.

A stretch of at least n bytes stands in the corpus exactly when all its n-byte windows do and
they do so side by side, so everything here follows from one question: at which corpus positions
does one of the text's 16-byte windows begin?

    one pass over the corpus     hash every 16-byte window with a few numpy operations, look it up
                                 in a bitmap of the text's hashes, compare the few that remain
    longer windows, 32, 64, ...  only where both halves were found
    longest stretch              bisection between the last size found and its double

The pass is bound by memory traffic; an index over the corpus would cost more than it saves for
the few kilobytes a person generates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SEED_BYTES = 16  # shorter matches are ordinary language: four words
CHUNK_BYTES = 1 << 19  # temporaries of 8 bytes per position stay in a second-level cache or near it
TABLE_BITS = 20
# Odd 64-bit constants of splitmix64; the top bits of a * K1 + b * K2 are the hash.
K1, K2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class Overlap:
    """Verbatim overlap of some texts with a corpus.

    Args:
        longest: The longest stretch of a text that stands in the corpus, as bytes; empty where
            nothing of SEED_BYTES or more does.
        shares: Window size in bytes -> share of the texts' windows that stand in the corpus; up to
            the first size of which none does, and at `min_bytes` if a text is that long.
        spans: Per text the byte ranges (start, end) that stand in the corpus, each of at least
            `min_bytes` and as long as it can be.
        num_bytes: Bytes of the texts.
    """

    longest: bytes
    shares: dict[int, float]
    spans: list[list[tuple[int, int]]]
    num_bytes: int

    @property
    def covered(self) -> float:
        """Share of the bytes inside a span."""
        inside = sum(end - start for spans in self.spans for start, end in spans)
        return inside / self.num_bytes if self.num_bytes else 0.0


def _hashes(data: np.ndarray) -> np.ndarray:
    """Hash of every 16-byte window of uint8 data: (N,) -> (N - 15,) uint64."""
    num = len(data) - SEED_BYTES + 1
    # Unaligned little-endian words at every byte; numpy reads them through a buffer.
    words = np.ndarray((num + 8,), dtype="<u8", buffer=data, strides=(1,))
    return words[:num] * K1 + words[8:] * K2


def _seed_positions(corpus: bytes, windows: set[bytes]) -> np.ndarray:
    """Sorted corpus positions at which one of these 16-byte windows begins."""
    joined = np.frombuffer(b"".join(windows), dtype=np.uint8)
    wanted = np.unique(_hashes(joined)[::SEED_BYTES])
    shift = np.uint64(64 - TABLE_BITS)
    table = np.zeros(1 << TABLE_BITS, dtype=bool)
    table[wanted >> shift] = True
    data = np.frombuffer(corpus, dtype=np.uint8)
    found = []
    for start in range(0, len(data) - SEED_BYTES + 1, CHUNK_BYTES):
        hashes = _hashes(data[start : start + CHUNK_BYTES + SEED_BYTES - 1])
        near = np.flatnonzero(table[hashes >> shift])
        at = np.minimum(np.searchsorted(wanted, hashes[near]), len(wanted) - 1)
        near = near[wanted[at] == hashes[near]] + start
        if len(near):
            found.append(near)
    # 64 equal bits are not equality.
    positions = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    exact = [corpus[p : p + SEED_BYTES] in windows for p in positions.tolist()]
    return positions[np.array(exact, dtype=bool)]


def _windows(texts: Sequence[bytes], size: int) -> set[bytes]:
    return {text[i : i + size] for text in texts for i in range(len(text) - size + 1)}


def _grow(corpus: bytes, positions: np.ndarray, grams: set[bytes], size: int) -> list[int]:
    """Those positions at which a window of `size` bytes in `grams` begins."""
    return [p for p in positions.tolist() if corpus[p : p + size] in grams]


def find_overlap(texts: Sequence[str | bytes], corpus: bytes, min_bytes: int = 32) -> Overlap:
    """Find what of `texts` stands verbatim in `corpus`.

    Args:
        texts: What was generated; str is taken as UTF-8.
        corpus: UTF-8 bytes of what was trained on.
        min_bytes: Shortest span to report, a power of two times SEED_BYTES.

    Raises:
        ValueError: another min_bytes.
    """
    sizes = [SEED_BYTES << i for i in range(24)]
    if min_bytes not in sizes:
        raise ValueError(f"overlap: min_bytes must be one of {sizes[:4]} ..., got {min_bytes}")
    raw = [t if isinstance(t, bytes) else t.encode("utf-8", "replace") for t in texts]
    grams = _windows(raw, SEED_BYTES)
    positions = _seed_positions(corpus, grams) if grams else np.empty(0, dtype=np.int64)
    size, found = SEED_BYTES, {corpus[p : p + SEED_BYTES] for p in positions.tolist()}
    shares: dict[int, float] = {}
    spans: list[list[tuple[int, int]]] = [[] for _ in raw]
    longest = b""
    while True:
        total = sum(max(0, len(text) - size + 1) for text in raw)
        hits = [[i for i in range(len(t) - size + 1) if t[i : i + size] in found] for t in raw]
        if total:
            shares[size] = sum(map(len, hits)) / total
        if size == min_bytes:
            spans = [_merge(starts, size) for starts in hits]
        if not found:
            break
        # The halves of a longer match are matches: no other position needs a look.
        pairs = positions[np.isin(positions + size, positions, assume_unique=True)]
        grams = _windows(raw, 2 * size)
        longer = _grow(corpus, pairs, grams, 2 * size)
        if not longer:
            longest = _bisect(raw, corpus, positions, size)
        positions, found = (
            np.array(longer, dtype=np.int64),
            {corpus[p : p + 2 * size] for p in longer},
        )
        size *= 2
    if any(len(text) >= min_bytes for text in raw):
        shares.setdefault(min_bytes, 0.0)
    return Overlap(longest, shares, spans, sum(map(len, raw)))


def _bisect(raw: Sequence[bytes], corpus: bytes, positions: np.ndarray, size: int) -> bytes:
    """The longest match, which begins at one of `positions` and is shorter than 2 * size."""
    low, high = size, 2 * size  # found, not found
    while high - low > 1:
        middle = (low + high) // 2
        grams = _windows(raw, middle)
        starts = _grow(corpus, positions, grams, middle)
        if starts:
            low, positions = middle, np.array(starts, dtype=np.int64)
        else:
            high = middle
    start = int(positions[0])
    return corpus[start : start + low]


def _merge(starts: list[int], size: int) -> list[tuple[int, int]]:
    """Windows at these sorted starts -> ranges.

    Two windows that begin side by side may come from different places of the corpus, so a range
    is covered by matches and need not be one match.
    """
    if not starts:
        return []
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(starts)) if b > a + size]
    edges = [0, *breaks, len(starts)]
    return [(starts[a], starts[b - 1] + size) for a, b in pairwise(edges)]
