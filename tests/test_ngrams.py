"""The baselines with which a report compares a loss."""

from collections import Counter
from itertools import pairwise
from math import log

import numpy as np
import pytest

from training.ngrams import DISCOUNT, ngram_losses


def test_ngram_losses_against_counting_by_hand() -> None:
    rng = np.random.default_rng(0)
    V = 7
    train, val = rng.integers(0, V - 1, 300), rng.integers(0, V, 100)  # val has an unseen token
    ones, pairs = Counter(train.tolist()), Counter(pairwise(train))
    follows = Counter(train[:-1].tolist())

    def unigram(b: int) -> float:
        return (ones[b] + 1) / (len(train) + V)

    def bigram(a: int, b: int) -> float:
        if not follows[a]:
            return unigram(b)
        distinct = sum(1 for first, _ in pairs if first == a)
        rest = DISCOUNT * distinct / follows[a]
        return max(pairs[a, b] - DISCOUNT, 0) / follows[a] + rest * unigram(b)

    for a in range(V):
        assert abs(sum(bigram(a, b) for b in range(V)) - 1) < 1e-12
    expected = {
        "unigram": -sum(log(unigram(b)) for b in val[1:]) / 99,
        "bigram": -sum(log(bigram(a, b)) for a, b in pairwise(val)) / 99,
    }
    assert ngram_losses(train, val, V) == pytest.approx(expected)
