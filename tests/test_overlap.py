"""The verbatim overlap must equal what brute force finds."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.overlap import find_overlap

WORDS = ["the", "king", "of", "and", "to", "thou", "art", "lord", "speak", "na\u00efve", "\u65e5"]


def prose(num_words: int, seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def plain_longest(texts: list[bytes], corpus: bytes) -> int:
    best = 0
    for text in texts:
        for i in range(len(text)):
            while i + best < len(text) and text[i : i + best + 1] in corpus:
                best += 1
    return best if best >= 16 else 0


def plain_share(texts: list[bytes], corpus: bytes, size: int) -> float:
    windows = [t[i : i + size] for t in texts for i in range(len(t) - size + 1)]
    return sum(w in corpus for w in windows) / len(windows)


def plain_covered(text: bytes, corpus: bytes, size: int) -> list[bool]:
    covered = [False] * len(text)
    for i in range(len(text) - size + 1):
        if text[i : i + size] in corpus:
            covered[i : i + size] = [True] * size
    return covered


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pieces=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 200)), max_size=4),
    repeat=st.booleans(),
)
def test_overlap_equals_brute_force(seed: int, pieces: list[tuple[int, int]], repeat: bool):
    """Texts made of stretches of the corpus and noise, some from a repetitive corpus."""
    corpus = (b"abab" * 400) if repeat else prose(400, seed).encode()
    noise = prose(30, seed + 1).encode()
    text = noise + b"|".join(corpus[start : start + size] for start, size in pieces) + noise
    texts = [text, b"", b"short", noise]
    found = find_overlap(texts, corpus)
    assert len(found.longest) == plain_longest(texts, corpus)
    assert found.longest == b"" or found.longest in corpus
    assert found.longest == b"" or any(found.longest in t for t in texts)
    for size, share in found.shares.items():
        assert share == pytest.approx(plain_share(texts, corpus, size))
    for t, spans in zip(texts, found.spans, strict=True):
        covered = [False] * len(t)
        for start, end in spans:
            assert end - start >= 32
            covered[start:end] = [True] * (end - start)
        assert covered == plain_covered(t, corpus, 32)


def test_overlap_across_chunks_and_at_both_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("training.overlap.CHUNK_BYTES", 64)
    corpus = random.Random(1).randbytes(1000)
    for start, size in ((0, 90), (30, 200), (910, 90), (0, 1000), (48, 16), (9, 31), (70, 63)):
        stretch = corpus[start : start + size]
        assert find_overlap([stretch], corpus).longest == stretch


def test_overlapping_matches_make_one_span():
    """Two stretches of the corpus that share 20 bytes; no 32-byte window joins them."""
    a, b = random.Random(2).randbytes(48), random.Random(3).randbytes(30)
    found = find_overlap([a + b], a + b"####" + a[28:] + b)
    assert found.spans == [[(0, 78)]]
    assert len(found.longest) == 50
    apart = find_overlap([a + b"?" + b + b"?" + a], a + b"####" + b)
    assert apart.spans == [[(0, 48), (80, 128)]]  # b is shorter than a span


def test_overlap_of_nothing():
    for texts, corpus in (([], b"x" * 99), (["a" * 99], b""), (["a" * 99], b"b" * 15), ([""], b"")):
        found = find_overlap(texts, corpus)
        assert (found.longest, found.covered) == (b"", 0.0)
