"""Losses of the unigram and bigram models, to compare a validation loss with.

    unigram:  p(b) = (c(b) + 1) / (N + V)
    bigram:   p(b|a) = max(c(ab) - D, 0) / c(a) + D * n(a) / c(a) * p(b)

with n(a) the number of distinct successors of a (absolute discounting, Ney, Essen and Kneser 1994).
A model that does not beat the bigram has not learnt to use more than one token of context.
"""

import numpy as np

DISCOUNT = 0.75  # the usual value; 0.7 to 0.9 change tiny Shakespeare's loss by 0.01
MAX_TOKENS = 5_000_000  # counting takes about a second up to here


def ngram_losses(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Losses of the two models in nats per token of `val`, fitted on `train`.

    Only the first 5 million tokens of each are counted.

    Args:
        train, val: (N,) integer token ids.
        vocab_size: Number of ids, V.

    Returns:
        {"unigram": nats, "bigram": nats}; empty when `val` has no pair of tokens.
    """
    train, val = train[:MAX_TOKENS].astype(np.int64), val[:MAX_TOKENS].astype(np.int64)
    if len(train) < 2 or len(val) < 2:
        return {}
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1.0) / (len(train) + vocab_size)
    before, after = val[:-1], val[1:]

    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    total = np.bincount(train[:-1], minlength=vocab_size)
    successors = np.bincount(pairs // vocab_size, minlength=vocab_size)
    wanted = before * vocab_size + after
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[at] == wanted, pair_counts[at], 0)
    c_before = np.maximum(total[before], 1)
    rest = np.where(total[before] > 0, DISCOUNT * successors[before] / c_before, 1.0)
    bigram = np.maximum(seen - DISCOUNT, 0.0) / c_before + rest * unigram[after]
    losses = {"unigram": -np.log(unigram[after]).mean(), "bigram": -np.log(bigram).mean()}
    return {name: float(loss) for name, loss in losses.items()}
