"""Loss of a text against one forward per row, and the numbers derived from it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import GPT, GPTConfig
from model.tokenizer import get_encoding
from training import evaluate, hellaswag
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
@pytest.mark.parametrize("batch_tokens", [1, 3 * 16, evaluate.BATCH_TOKENS])
def test_loss_equals_row_by_row(model: GPT, num: int, batch_tokens: int, monkeypatch):
    """Fewer than a row, exactly one, one more token than a row, a ragged end."""
    monkeypatch.setattr(evaluate, "BATCH_TOKENS", batch_tokens)
    tokens = np.random.default_rng(0).integers(0, 50257, num).astype(np.uint16)
    expected = plain_loss(model, tokens.tolist(), 16)
    model.train()
    assert evaluate_tokens(model, tokens) == pytest.approx(expected, rel=1e-5)
    assert model.training


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
    result = evaluate_text(model, text.encode())
    ids = get_encoding().encode_ordinary(text)
    assert result["num_tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(plain_loss(model, ids, 16), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    first = len(get_encoding().decode_bytes(ids[:1]))
    assert result["num_bytes"] == len(text.encode()) - first
    assert result["bits_per_byte"] == pytest.approx(
        result["loss"] * result["num_tokens"] / math.log(2) / result["num_bytes"]
    )
    assert evaluate_text(model, text.encode(), max_tokens=5)["num_tokens"] == 4
    assert evaluate_text(model, b"\xef\xbb\xbf" + text.encode()) == result


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
        evaluate_text(model, b"abc\xff")
    with pytest.raises(ValueError, match="the model has 97 tokens"):
        evaluate_text(GPT(GPTConfig(16, 97, 1, 1, 8)), b"abc")


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
    assert json.loads(capsys.readouterr().out) == result
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


# ---- HellaSwag, on items written for this test

ENDINGS = {
    "A man climbs onto a roof. He": "sings.|is eating the moon with a very long spoon made of "
    "glass.|nails down a tile.|na\u00efve caf\u00e9",
    "To clean a pan, first": "scrub it, then rinse it.|dogs|throw the pan away, buy a car|x y z",
    "She opens the book and": "reads|reads a|b|c d e f",
}
ITEMS: list[dict[str, Any]] = [
    {"ctx": context, "ind": 1, "label": label, "endings": endings.split("|")}
    for (context, endings), label in zip(ENDINGS.items(), (2, "0", 3), strict=True)
]


@pytest.fixture
def items_file(tmp_path: Path) -> Path:
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    return path


def test_hellaswag_losses_are_those_of_transformers(items_file: Path):
    """Each ending alone, unpadded, through GPT2LMHeadModel, its log-probabilities in fp64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=None)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(6)
    theirs.save_pretrained(items_file.parent / "hf")
    model = GPT.from_pretrained(items_file.parent / "hf")
    encoding, want = get_encoding(), []
    for item in ITEMS:
        context = encoding.encode_ordinary(str(item["ctx"]))
        for ending in item["endings"]:
            tokens = encoding.encode_ordinary(" " + ending)
            row = torch.tensor([context + tokens])
            with torch.no_grad():
                chances = theirs(row).logits[0, :-1].double().log_softmax(-1)
            picked = chances[torch.arange(len(chances)), row[0, 1:]]
            want.append(-picked[len(context) - 1 :].mean().item())
    items = hellaswag.read_items(items_file)
    got = hellaswag.ending_losses(model, items, 32)
    assert [loss for row in got for loss in row] == pytest.approx(want, rel=1e-5)
    answers = [min(range(4), key=want[4 * i : 4 * i + 4].__getitem__) for i in range(3)]
    right = sum(answer == item.label for answer, item in zip(answers, items, strict=True))
    for tokens in (1, 4096):  # one item at a time, or all
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hellaswag, "BATCH_TOKENS", tokens)
            assert hellaswag.count_right(model, items) == (right, 3)
    # The right answer is what is counted, not a place: the model's own choices are all right.
    own = [item._replace(label=answer) for item, answer in zip(items, answers, strict=True)]
    assert hellaswag.count_right(model, own) == (3, 3)
    assert hellaswag.count_right(model, items, stopped=lambda: True) == (0, 0)


def test_a_row_longer_than_the_window_loses_its_beginning(model: GPT, items_file: Path):
    items = hellaswag.read_items(items_file)
    got = hellaswag.ending_losses(model, items[:1], 4)
    for loss, ending in zip(got[0], items[0].endings, strict=True):
        row = torch.tensor([(items[0].context + ending)[-5:]])
        scored = min(len(ending), 4)
        with torch.no_grad():
            logits = model(row[:, :-1])[0, -scored:]
        assert loss == pytest.approx(F.cross_entropy(logits, row[0, -scored:]).item(), rel=1e-5)


def test_hellaswag_command(model: GPT, items_file: Path, capsys: pytest.CaptureFixture[str]):
    model.save_pretrained(items_file.parent / "m")
    args = ["--model", str(items_file.parent / "m"), "--hellaswag", str(items_file)]
    evaluate.main([*args, "--json", "--max-items", "2"])
    result = json.loads(capsys.readouterr().out)
    assert result["items"] == 2
    evaluate.main(args)
    assert "of 3), " in (out := capsys.readouterr().out)
    assert "published weights: GPT-2's 124M 29.4 to 29.6%" in out
    for bad, message in (
        (["--model", args[1]], "either --text FILE or --hellaswag FILE"),
        ([*args, "--text", "a.txt"], "either --text FILE or --hellaswag FILE"),
        ([*args, "--max-items", "0"], "max_items must be a whole number from 1"),
        ([*args[:3], "none.jsonl"], "hellaswag: no such file: none.jsonl"),
        # The model is read last: it may be large, or be fetched.
        (["--model", "none", "--hellaswag", "none.jsonl"], "hellaswag: no such file: none.jsonl"),
        (["--model", "none", "--text", "none.txt"], "data: no such file: none.txt"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(bad)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{}", "'ctx'"),
        ("[1]", "list indices"),
        ("3", "not subscriptable"),
        ("{", "Expecting"),
        (json.dumps(ITEMS[0] | {"label": ""}), "invalid literal"),
        (json.dumps(ITEMS[0] | {"label": 4}), "'label' must be from 0 to 3, got 4"),
        (json.dumps(ITEMS[0] | {"label": True}), "invalid literal"),
        (json.dumps(ITEMS[0] | {"endings": "abcd"}), "'endings' a list"),
        (json.dumps(ITEMS[0] | {"ctx": ""}), "'ctx' must be text"),
    ],
)
def test_a_line_that_is_no_item_is_named(items_file: Path, line: str, reason: str):
    items_file.write_text(json.dumps(ITEMS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"line 2 is not an item .*{reason}"):
        hellaswag.read_items(items_file)
    assert len(hellaswag.read_items(items_file, 1)) == 1
    items_file.write_text("")
    with pytest.raises(ValueError, match="holds no items"):
        hellaswag.read_items(items_file)
