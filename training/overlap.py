"""Which parts of a text appear verbatim in a corpus: exact, in seconds on 100 MB.

One pass over the corpus finds where a 16-byte window of the text begins. It hashes each window with
a few numpy operations and looks it up in a bitmap of the text's hashes, then among the hashes. A
longer match is a run of such windows, so the runs, a few kilobytes, then replace the corpus. The
pass is bound by memory traffic; an index over the corpus would cost more than it saves for so short
a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEED_BYTES = 16  # shorter matches are ordinary language: four words
SPAN_BYTES = 32  # length of the shortest span: a power of two times SEED_BYTES
CHUNK_BYTES = 1 << 19  # temporaries of 8 bytes per position stay in a second-level cache or near it
TABLE_BITS = 20
# Odd 64-bit constants of splitmix64; the top bits of a * K1 + b * K2 are the hash.
K1, K2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class Overlap:
    """Verbatim overlap of some texts with a corpus.

    Args:
        longest: The longest part of a text that the corpus contains, as bytes; empty if it is
            shorter than SEED_BYTES.
        shares: Window size in bytes -> share of the texts' windows that the corpus contains. Sizes
            double from SEED_BYTES until no window is found, and reach SPAN_BYTES if a text does.
        spans: For each text the byte ranges (start, end) that the corpus contains, each of at
            least SPAN_BYTES and as long as possible. Adjacent matches make one span, even from
            different places in the corpus.
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


def _candidates(corpus: bytes, texts: Sequence[bytes]) -> str:
    """The parts of the corpus that may match, one character per byte, in the corpus's order."""
    long = [text for text in texts if len(text) >= SEED_BYTES]
    if not long:
        return ""
    wanted = np.unique(np.concatenate([_hashes(np.frombuffer(t, dtype=np.uint8)) for t in long]))
    table, shift = np.zeros(1 << TABLE_BITS, dtype=bool), np.uint64(64 - TABLE_BITS)
    table[wanted >> shift] = True
    data, inside = np.frombuffer(corpus, dtype=np.uint8), np.zeros(len(corpus), dtype=bool)
    for start in range(0, len(data) - SEED_BYTES + 1, CHUNK_BYTES):
        hashes = _hashes(data[start : start + CHUNK_BYTES + SEED_BYTES - 1])
        near = np.flatnonzero(table[hashes >> shift])
        seen = hashes[near]
        found = wanted[np.searchsorted(wanted, seen) % len(wanted)] == seen
        inside[start + near[found]] = True
    edges = np.flatnonzero(np.diff(inside, prepend=False)).reshape(-1, 2).tolist()
    runs = [corpus[first : end + SEED_BYTES - 1] for first, end in edges]
    # A character that is not a byte separates them, so no match spans two.
    return "\u0100".join(run.decode("latin-1") for run in dict.fromkeys(runs))


def _match_lengths(text: str, corpus: str) -> list[int]:
    """Length of the longest match at each character; less than SEED_BYTES means none."""
    lengths, end = [], 0
    for start in range(len(text)):
        end = max(end, start + SEED_BYTES - 1)
        while end < len(text) and text[start : end + 1] in corpus:
            end += 1
        lengths.append(end - start)
    return lengths


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    inside = np.zeros(len(lengths), dtype=np.int8)
    for start, length in enumerate(lengths):
        if length >= SPAN_BYTES:
            inside[start : start + length] = 1
    edges = np.flatnonzero(np.diff(inside, prepend=0, append=0))
    return [(start, end) for start, end in edges.reshape(-1, 2).tolist()]


def find_overlap(texts: Sequence[str | bytes], corpus: bytes) -> Overlap:
    """Find what parts of `texts` appear verbatim in `corpus`.

    Args:
        texts: What was generated; str is taken as UTF-8.
        corpus: UTF-8 bytes of what was trained on.
    """
    raw = [t if isinstance(t, bytes) else t.encode("utf-8", "replace") for t in texts]
    likely = _candidates(corpus, raw)
    lengths = [_match_lengths(text.decode("latin-1"), likely) for text in raw]
    every = [length for each in lengths for length in each]

    shares, size = dict[int, float](), SEED_BYTES
    while num_windows := sum(max(0, len(text) - size + 1) for text in raw):
        shares[size] = sum(length >= size for length in every) / num_windows
        if not shares[size] and size >= SPAN_BYTES:
            break
        size *= 2

    longest, most = b"", max(every, default=0)
    if most >= SEED_BYTES:
        ties = []
        for text, each in zip(raw, lengths, strict=True):
            ties += [text[i : i + most] for i, length in enumerate(each) if length == most]
        longest = min(ties, key=corpus.find)
    spans = [_spans(each) for each in lengths]
    inside = sum(end - start for each in spans for start, end in each)
    return Overlap(longest, shares, spans, inside / (len(every) or 1))
