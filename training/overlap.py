"""What of a text stands verbatim in a corpus, exactly, in seconds on 100 MB.

One pass over the corpus finds where a 16-byte window of the text begins: it hashes every window
with a few numpy operations, looks it up in a bitmap of the text's hashes and compares the few that
remain. A longer window stands there exactly where its first and its last 16 bytes do and what lies
between is equal too. The pass is bound by memory traffic; an index over the corpus would cost more
than it saves for the few kilobytes a person generates.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED_BYTES = 16  # shorter matches are ordinary language: four words
SPAN_BYTES = 32  # of the shortest span: a power of two times SEED_BYTES
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
            the first size of which none does, and at SPAN_BYTES if a text is that long.
        spans: Per text the byte ranges (start, end) that stand in the corpus, each of at least
            SPAN_BYTES and as long as it can be.
        covered: Share of the texts' bytes inside a span.
    """

    longest: bytes
    shares: dict[int, float]
    spans: list[list[tuple[int, int]]]
    covered: float


def _hashes(data: np.ndarray) -> np.ndarray:
    """Hash of every 16-byte window of uint8 data: (N,) -> (N - 15,) uint64."""
    num = len(data) - SEED_BYTES + 1
    # Unaligned little-endian words at every byte; numpy reads them through a buffer.
    words = np.ndarray((num + 8,), dtype="<u8", buffer=data, strides=(1,))
    return words[:num] * K1 + words[8:] * K2


def _positions(corpus: bytes, texts: Sequence[bytes]) -> np.ndarray:
    """Corpus positions at which a 16-byte window begins whose hash is one of the texts', sorted."""
    long = [text for text in texts if len(text) >= SEED_BYTES]
    hashes = [_hashes(np.frombuffer(text, dtype=np.uint8)) for text in long]
    found = [np.empty(0, dtype=np.int64)]
    if hashes:
        wanted, shift = np.unique(np.concatenate(hashes)), np.uint64(64 - TABLE_BITS)
        table = np.zeros(1 << TABLE_BITS, dtype=bool)
        table[wanted >> shift] = True
        data = np.frombuffer(corpus, dtype=np.uint8)
        for start in range(0, len(data) - SEED_BYTES + 1, CHUNK_BYTES):
            hashes = _hashes(data[start : start + CHUNK_BYTES + SEED_BYTES - 1])
            near = np.flatnonzero(table[hashes >> shift])
            found.append(near[np.isin(hashes[near], wanted)] + start)
    return np.concatenate(found)


def _merge(starts: Sequence[int]) -> list[tuple[int, int]]:
    """Windows of SPAN_BYTES at these sorted starts -> ranges.

    Two windows that begin side by side may come from different places of the corpus, so a range
    is covered by matches and need not be one match.
    """
    spans: list[tuple[int, int]] = []
    for start in starts:
        first = spans.pop()[0] if spans and start <= spans[-1][1] else start
        spans.append((first, start + SPAN_BYTES))
    return spans


def find_overlap(texts: Sequence[str | bytes], corpus: bytes) -> Overlap:
    """Find what of `texts` stands verbatim in `corpus`.

    Args:
        texts: What was generated; str is taken as UTF-8.
        corpus: UTF-8 bytes of what was trained on.
    """
    raw = [t if isinstance(t, bytes) else t.encode("utf-8", "replace") for t in texts]
    seeds = starts = _positions(corpus, raw)

    def among(starts: np.ndarray, size: int) -> np.ndarray:
        """Those corpus positions at which a window of `size` bytes of a text begins."""
        likely = starts[np.isin(starts + (size - SEED_BYTES), seeds, assume_unique=True)]
        windows = {text[i : i + size] for text in raw for i in range(len(text) - size + 1)}
        exact = [corpus[p : p + size] in windows for p in likely.tolist()]
        return likely[np.array(exact, dtype=bool)]

    size, shares = SEED_BYTES, dict[int, float]()
    spans: list[list[tuple[int, int]]] = [[] for _ in raw]
    while True:
        shorter, starts = starts, among(starts, size)
        found = {corpus[p : p + size] for p in starts.tolist()}
        hits = [[i for i in range(len(t) - size + 1) if t[i : i + size] in found] for t in raw]
        if total := sum(max(0, len(text) - size + 1) for text in raw):
            shares[size] = sum(map(len, hits)) / total
        if size == SPAN_BYTES:
            spans = [_merge(each) for each in hits]
        if not found:
            break
        size *= 2
    longest = b""
    if size > SEED_BYTES:
        sizes = range(size // 2, size)  # the first of which was found
        most = sizes[bisect_left(sizes, True, key=lambda n: not len(among(shorter, n))) - 1]
        start = among(shorter, most)[0]
        longest = corpus[start : start + most]
    if any(len(text) >= SPAN_BYTES for text in raw):
        shares.setdefault(SPAN_BYTES, 0.0)
    inside = sum(end - start for each in spans for start, end in each)
    return Overlap(longest, shares, spans, inside / (sum(map(len, raw)) or 1))
