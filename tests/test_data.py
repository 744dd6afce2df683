"""Text to tokens to batches: sources, the cache, and the order of the rows."""

import hashlib
import json
from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
import torch

from model import tokenizer
from training import data
from training.baselines import DISCOUNT, ngram_losses
from training.data import Corpus, DataLoaderLite, Prefetcher, load_corpus


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Token files of the tests stay in the tests' folder."""
    monkeypatch.chdir(tmp_path)
    tokenizer.get_encoding()  # loaded from the real cache, once
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def all_tokens(corpus: Corpus) -> list[int]:
    return np.asarray(corpus.tokens).tolist()


def no_network(url: str) -> bytes:
    raise OSError(f"no route to {url}")


# ---- sources


def test_documents_are_joined_by_endoftext(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("two\r\nlines", encoding="utf-8", newline="")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("<|endoftext|>", encoding="utf-8")
    (tmp_path / "sub" / "ignored.md").write_text("no", encoding="utf-8")
    ids = all_tokens(load_corpus([tmp_path]))
    assert ids.count(tokenizer.EOT) == 1  # between the two, not the text that spells it
    assert tokenizer.decode(ids) == "two\r\nlines<|endoftext|><|endoftext|>"
    two_files = load_corpus([tmp_path / "b.txt", tmp_path / "sub" / "a.txt"])
    assert all_tokens(two_files) == ids


def test_cache_is_used_and_follows_the_source(tmp_path: Path, monkeypatch) -> None:
    text = tmp_path / "my.txt"
    text.write_text("one two three", encoding="utf-8")
    first = load_corpus([text])
    meta = json.loads(first.path.with_suffix(".json").read_text())
    assert (meta["tokens"], meta["encoding"], meta["documents"]) == (3, "gpt2", 1)
    assert first.path.stat().st_size == 6

    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", lambda _: pytest.fail("tokenised again"))
        assert all_tokens(load_corpus([text])) == all_tokens(first)

    text.write_text("one two four", encoding="utf-8")
    assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two four"

    text.write_text("one two three", encoding="utf-8")
    first.path.write_bytes(b"\0\0\0\0")  # cut short
    assert tokenizer.decode(all_tokens(load_corpus([text]))) == "one two three"


def test_input_txt_comes_first(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("mine", encoding="utf-8")
    said: list[str] = []
    assert tokenizer.decode(all_tokens(load_corpus([], said.append))) == "mine"
    assert "input.txt" in said[0]


def test_download_is_checked_and_kept(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    with monkeypatch.context() as patch:
        patch.setattr(data, "_download", lambda _: text)
        corpus = load_corpus([], lambda _: None)
    assert tokenizer.decode(all_tokens(corpus)).encode() == text
    monkeypatch.setattr(data, "_download", no_network)  # the second time needs none
    assert load_corpus([], lambda _: None).name == "tiny Shakespeare"
    # A damaged copy is not believed.
    (own_cache / "tinyshakespeare.txt").write_text("something else", encoding="utf-8")
    assert load_corpus([], lambda _: None).name == "pydoc_data.topics"


def test_wrong_bytes_from_the_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, _: int) -> bytes:
            return b"<html>log in to the network</html>"

    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: Answer())
    said: list[str] = []
    assert load_corpus([], said.append).name == "pydoc_data.topics"
    assert "sha256" in said[0]
    assert "--data FILE" in said[0]


def test_offline_text_is_english_and_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_download", no_network)
    corpus = load_corpus([], lambda _: None)
    assert len(corpus.tokens) > 100_000
    assert "statement" in tokenizer.decode(all_tokens(corpus)[:20_000])


def test_tiny_shakespeare_token_count() -> None:
    root = Path(__file__).parents[1]
    places = [root / "input.txt", root / ".cache" / "tinyshakespeare.txt"]
    known = (p for p in places if p.is_file() and data._hash_file(p) == data.SHAKESPEARE_SHA256)
    found = next(known, None)
    if found is None:
        pytest.skip("tiny Shakespeare is not on this machine (make train downloads it)")
    corpus = load_corpus([found])
    assert len(corpus.tokens) == 338_025
    assert len(corpus.split(0.0)[0]) == 338_025
    train, val = corpus.split(0.1)
    assert (len(train), len(val)) == (304_223, 33_802)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"caf\xe9", "not UTF-8: byte 0xe9 at offset 3"),
        ("utf-16".encode("utf-16"), "not UTF-8: byte 0xff at offset 0"),
    ],
)
def test_bad_text_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus([path])


def test_paths_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.txt"):
        load_corpus([tmp_path / "absent.txt"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"no \.txt file in the folder .*folder"):
        load_corpus([tmp_path / "folder"])


def test_token_files(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_corpus([path])
    path.write_bytes(np.array([15496, 995, 0], dtype="<u2").tobytes())
    assert all_tokens(load_corpus([path])) == [15496, 995, 0]
    path.with_suffix(".json").write_text('{"encoding": "cl100k_base"}')
    with pytest.raises(ValueError, match="vocabulary 'cl100k_base', this model needs 'gpt2'"):
        load_corpus([path])
    path.with_suffix(".json").unlink()
    path.write_bytes(np.array([15496, 50257], dtype="<u2").tobytes())
    with pytest.raises(ValueError, match="holds token 50257"):
        load_corpus([path])
    path.write_bytes(b"\0\0\0")
    with pytest.raises(ValueError, match="got 3 bytes"):
        load_corpus([path])


# ---- order


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
    assert (loader.epoch, loader.index) == (3, 0)
    again = DataLoaderLite(tokens, 3, T, seed=5).next_batch()[0][:, 0].numpy()
    np.testing.assert_array_equal(again, rows[:3])
    other = DataLoaderLite(tokens, 10, T, seed=6).next_batch()[0][:, 0].numpy()
    assert not np.array_equal(other, rows[:10])


@pytest.mark.parametrize("order", ["sequential", "shuffled"])
def test_position_resumes_and_ranks_share(order: data.Order) -> None:
    tokens = counted_up(101)
    whole = DataLoaderLite(tokens, 4, 5, order, seed=1, wrap_rows=2)
    batches = [whole.next_batch()[0] for _ in range(12)]  # 48 rows of 20: two wraps
    resumed = DataLoaderLite(tokens, 4, 5, order, seed=1, wrap_rows=2, position=4 * 7)
    torch.testing.assert_close(resumed.next_batch()[0], batches[7])
    ranks = [DataLoaderLite(tokens, 2, 5, order, seed=1, wrap_rows=2, rank=r, world_size=2)
             for r in range(2)]  # fmt: skip
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


# ---- baselines


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
