"""Loss of a text against one forward per row, and the numbers derived from it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from model.tokenizer import get_encoding
from training import evaluate
from training.evaluate import eval_pieces, evaluate_text, evaluate_tokens

CONFIG = GPTConfig(block_size=16, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8)
    return model


def plain_loss(model: GPT, tokens: list[int], window: int) -> float:
    """Row by row from the logits in fp64; every token but the first is predicted once."""
    model.eval()
    total = 0.0
    for at in range(0, len(tokens) - 1, window):
        row = torch.tensor([tokens[at : at + window + 1]])
        with torch.no_grad():
            logits = model(row[:, :-1])[0].double()
        total += F.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("num", [2, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_loss_equals_row_by_row(model: GPT, num: int, batch_size: int | None):
    """Fewer than a row, exactly one, one more token than a row, a ragged end."""
    tokens = np.random.default_rng(0).integers(0, 50257, num).astype(np.uint16)
    expected = plain_loss(model, tokens.tolist(), 16)
    model.train()
    assert evaluate_tokens(model, tokens, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-5
    )
    assert model.training
    as_tensor = torch.from_numpy(tokens.astype(np.int32))
    assert evaluate_tokens(model, as_tensor, batch_size=batch_size) == pytest.approx(
        expected, rel=1e-5
    )


def test_window(model: GPT):
    tokens = np.arange(40)
    assert evaluate_tokens(model, tokens, window=8) == pytest.approx(
        plain_loss(model, tokens.tolist(), 8), rel=1e-5
    )
    short = GPT(CONFIG)
    short.load_state_dict(model.state_dict())
    short.trained_context = 4
    assert evaluate_tokens(short, tokens) == pytest.approx(
        plain_loss(model, tokens.tolist(), 4), rel=1e-5
    )


def test_dropout_is_off():
    model = GPT(GPTConfig(16, 50257, 1, 1, 8, dropout=0.5)).train()
    assert evaluate_tokens(model, np.arange(9)) == evaluate_tokens(model, np.arange(9))


def test_text(model: GPT):
    text = "Caf\u00e9 \U0001f600: to be or not to be. <|endoftext|> is text here.\n" * 3
    result = evaluate_text(model, get_encoding(), text.encode())
    ids = get_encoding().encode_ordinary(text)
    assert result.num_tokens == len(ids) - 1
    assert result.loss == pytest.approx(plain_loss(model, ids, 16), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    first = len(get_encoding().decode_bytes(ids[:1]))
    assert result.num_bytes == len(text.encode()) - first
    assert result.bits_per_byte == pytest.approx(
        result.loss * result.num_tokens / math.log(2) / result.num_bytes
    )
    assert evaluate_text(model, get_encoding(), text.encode(), max_tokens=5).num_tokens == 4
    assert evaluate_text(model, get_encoding(), b"\xef\xbb\xbf" + text.encode()) == result


def test_uniform_model_scores_log_vocab():
    """All-zero embeddings: every token is equally likely, so the loss is ln V."""
    model = GPT(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert evaluate_tokens(model, np.arange(50)) == pytest.approx(math.log(50257), rel=1e-6)


def test_bad_input(model: GPT):
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        evaluate_tokens(model, np.arange(1))
    with pytest.raises(ValueError, match="window must be a whole number from 2 to 16"):
        evaluate_tokens(model, np.arange(9), window=17)
    with pytest.raises(ValueError, match="byte 0xff at offset 3"):
        evaluate_text(model, get_encoding(), b"abc\xff")
    with pytest.raises(ValueError, match="the model has 97 tokens"):
        evaluate_text(GPT(GPTConfig(16, 97, 1, 1, 8)), get_encoding(), b"abc")


def test_command_line(model: GPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "t.txt").write_text("to be or not to be")
    args = ["--model", str(tmp_path / "m"), "--text", str(tmp_path / "t.txt")]
    evaluate.main([*args, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["num_tokens"] == 5
    evaluate.main(args)
    assert f"loss {result['loss']:.4f} nats per token" in capsys.readouterr().out
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfto be or not to be")
    evaluate.main([*args, "--json"])
    again = capsys.readouterr()
    assert json.loads(again.out) == result
    assert "byte order mark at the beginning of" in again.err
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    for bad, message in (
        (["--model", str(tmp_path / "none"), *args[2:]], "no such file or folder"),
        ([*args[:2], "--text", "none.txt"], "no such file: none.txt"),
        ([*args[:2], "--text", str(tmp_path / "bad.txt")], "byte 0xff at offset 1"),
        ([*args[:2], "--text", ""], "must name a file or a folder, got nothing"),
        ([*args[:2], "--text", str(tmp_path / "a.jsonl")], "must be one file of plain text"),
        ([*args[:2], "--text", str(tmp_path / "m")], "the folder "),
        (["--model", "", *args[2:]], "the path is empty"),
        ([*args, "--max-tokens", "-5"], "max_tokens must be a whole number from 2"),
        ([*args, "--max-tokens", "0"], "max_tokens must be a whole number from 2"),
        ([*args, "--window", "99"], "window must be a whole number from 2 to 16"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(bad)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("size", "shares"), [(1, 1), (7, 3), (100, 1), (100, 2), (101, 4)])
def test_pieces_of_a_whole_text_predict_each_token_once(size, shares):
    pieces = eval_pieces(size + 1, 1000, 8, shares)
    predicted = [i for first, last in pieces for i in range(first + 1, last)]
    assert predicted == list(range(1, size + 1))
    assert all(first % 8 == 0 for first, _ in pieces)


def test_pieces_of_a_long_text_are_spread_over_it():
    pieces = eval_pieces(100_001, 8192, 64, 2)
    assert len(pieces) == 8
    assert pieces[0] == (0, 1025)
    assert pieces[-1][1] == 100_001
    assert all(last - first == 1025 for first, last in pieces)
