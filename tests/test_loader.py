"""The order of the rows, resumed, shared by ranks and read ahead."""

import numpy as np
import pytest
import torch

from training.data import DataLoaderLite, Prefetcher
from training.recipes import Order


def counted_up(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint16)


def walk_the_text(tokens: np.ndarray, B: int, T: int, num_batches: int) -> list[np.ndarray]:
    """The published loader, written down again: a window of B*T + 1, back to 0 when it overruns."""
    batches, at = [], 0
    for _ in range(num_batches):
        window = tokens[at : at + B * T + 1]
        batches.append(window[:-1].reshape(B, T))
        at += B * T
        if at + B * T + 1 > len(tokens):
            at = 0
    return batches


# 330 batches in tiny Shakespeare; here 5, not a multiple of 4, with and without a rest.
@pytest.mark.parametrize("num_tokens", [5 * 12 + 1, 5 * 12 + 12, 6 * 12])
@pytest.mark.parametrize("merged", [1, 4])
def test_sequential_order_across_the_wrap(num_tokens: int, merged: int) -> None:
    tokens, B, T = counted_up(num_tokens), 3, 4
    expected = walk_the_text(tokens, B, T, 16)
    loader = DataLoaderLite(tokens, B * merged, T, "sequential", wrap_rows=B)
    got: list[np.ndarray] = []
    for _ in range(16 // merged):
        x, y = loader.next_batch()
        torch.testing.assert_close(x[:, 1:], y[:, :-1])
        torch.testing.assert_close(y - x, torch.ones_like(x))  # the next token, also in the text
        got += np.split(x.numpy(), merged)
    np.testing.assert_array_equal(got, expected)


def test_shuffled_order_draws_each_row_once_an_epoch() -> None:
    tokens, T = counted_up(10 * 4 + 3), 4
    loader = DataLoaderLite(tokens, 3, T, seed=5)
    assert loader.rows_per_epoch == 10
    rows = np.concatenate([loader.next_batch()[0][:, 0].numpy() for _ in range(10)])  # 3 epochs
    epochs = rows.reshape(3, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 40, T))
    assert len({tuple(e) for e in epochs}) == 3
    assert loader.position == 3 * 10
    again = DataLoaderLite(tokens, 3, T, seed=5).next_batch()[0][:, 0].numpy()
    np.testing.assert_array_equal(again, rows[:3])
    other = DataLoaderLite(tokens, 10, T, seed=6).next_batch()[0][:, 0].numpy()
    assert not np.array_equal(other, rows[:10])


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_position_resumes_and_ranks_share(order: Order) -> None:
    tokens = counted_up(101)
    whole = DataLoaderLite(tokens, 4, 5, order, seed=1, wrap_rows=2)
    batches = [whole.next_batch()[0] for _ in range(12)]  # 48 rows of 20: two wraps
    resumed = DataLoaderLite(tokens, 4, 5, order, seed=1, wrap_rows=2, position=4 * 7)
    torch.testing.assert_close(resumed.next_batch()[0], batches[7])
    ranks = [
        DataLoaderLite(tokens, 2, 5, order, seed=1, wrap_rows=2, rank=r, world_size=2)
        for r in range(2)
    ]
    for batch in batches:
        shared = torch.cat([loader.next_batch()[0] for loader in ranks])
        torch.testing.assert_close(shared, batch)


def test_too_little_text_for_a_batch() -> None:
    with pytest.raises(ValueError, match="2 x 8 needs 17 training tokens, got 16; take more text"):
        DataLoaderLite(counted_up(16), 2, 8)
    DataLoaderLite(counted_up(17), 2, 8).next_batch()


def test_prefetching_changes_nothing_but_the_thread() -> None:
    plain = DataLoaderLite(counted_up(101), 4, 5)
    ahead = Prefetcher(DataLoaderLite(counted_up(101), 4, 5), "cpu")
    for _ in range(8):
        for a, b in zip(plain.next_batch(), ahead.next_batch(), strict=True):
            torch.testing.assert_close(a, b)
        assert ahead.position == plain.position  # not that of the batch read ahead
    ahead.close()


def test_an_error_while_reading_ahead_reaches_the_loop() -> None:
    loader = DataLoaderLite(counted_up(101), 4, 5)
    loader.tokens = counted_up(3)
    ahead = Prefetcher(loader, "cpu")
    with pytest.raises(IndexError):
        ahead.next_batch()
    ahead.close()
