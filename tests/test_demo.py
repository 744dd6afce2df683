"""The functions behind the page, and its line of visitors."""

import asyncio
import html
import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from model import GPT, GPTConfig
from model.sampling import Sampling
from model.tokenizer import get_encoding
from tests.weights import generate_text

gr = pytest.importorskip("gradio", reason="gradio is not installed")

import demo  # noqa: E402 - it imports gradio
from demo import app, line, space  # noqa: E402
from demo.texts import shaded, token_chances  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def test_without_gradio_a_line_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "demo.app")
    with pytest.raises(SystemExit, match="make setup-dev"):
        importlib.import_module("demo.app")


def make_run(folder: Path) -> GPT:
    """A run folder with a random model that needs some milliseconds a token, and a corpus that
    holds what the model answers to "Recite" at temperature 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=256))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        model.transformer.wte.weight[50257:].zero_()
    model.save_pretrained(folder / "model")
    greedy = Sampling(max_new_tokens=30, temperature=0.0)
    text = generate_text(model, ["Recite"], greedy)[0]
    (folder / "corpus.txt").write_text(f"{SECRET}. {text} After.")
    samples = "".join(f"[prompt] {p}\n[model] answer\n\n" for p in (" Of my own text", "1 | 2"))
    (folder / "samples.txt").write_text(samples)
    rows = [{"step": i, "loss": 10.0 - i / 10} for i in range(50)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    summary = {"tokens_seen": 123_456, "train_loss": 5.1, "val_loss": 9.9, "final_step": 50}
    (folder / "summary.json").write_text(json.dumps(summary))
    config = {"recipe": {"name": "a-test-recipe"}, "flags": {"data": [str(folder / "my.txt")]}}
    (folder / "config.json").write_text(json.dumps(config))
    return model


SECRET = "words of the training text that nobody else has seen"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def models(run: Path) -> app.Models:
    return app.Models(run)


# ---- the functions behind the page


DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "max_new_tokens": 20}
DEFAULTS |= {"seed": "0", "num_samples": 1}


def ask(models: app.Models, prompt: str, **changes: Any) -> list[tuple[str, str]]:
    return [*app.generate(models, prompt, *{**DEFAULTS, **changes}.values())]


def plain(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page))


def test_last_text_is_what_the_library_generates(models: app.Models):
    texts, status = ask(models, "Hello", seed="5", top_k=40)[-1]
    sampling = Sampling(max_new_tokens=20, temperature=0.8, top_k=40, seed=5)
    expected = generate_text(models.get().model, ["Hello"], sampling)[0]
    assert plain(texts) == "Hello" + expected
    assert re.search(r"20 tokens, \d+ tokens/s, seed 5;", status)


def test_an_empty_seed_draws_one_that_gives_the_text_again(models: app.Models):
    drawn = [ask(models, "a", seed=seed)[-1] for seed in ("", " ")]
    assert drawn[0][0] != drawn[1][0]
    seed = re.findall(r"seed (\d+)", drawn[0][1])[0]
    assert ask(models, "a", seed=seed)[-1][0] == drawn[0][0]


def test_recited_text_is_marked(models: app.Models):
    texts, status = ask(models, "Recite", temperature=0, max_new_tokens=30)[-1]
    assert "<mark>" in texts
    assert "100% appears verbatim" in status
    texts, status = ask(models, "Something else", seed="3")[-1]
    assert "<mark>" not in texts
    assert "0% appears verbatim" in status


def test_shades_are_the_chances_of_the_tokens(models: app.Models):
    """Against one forward for each token; a character of several tokens is shaded once."""
    model = models.get().model
    text = "one \U0001f600 <b> two" * 9  # longer than the window of 64
    tokens = get_encoding().encode_ordinary("Hello") + get_encoding().encode_ordinary(text)
    got = token_chances(model, "Hello", text)
    assert b"".join(data for data, _ in got).decode() == text
    window, first = model.trained_context, len(tokens) - len(got)
    with torch.no_grad():
        for i in range(0, window - first, 9):
            chance = got[i][1]
            logits = model(torch.tensor([tokens[: first + i]]))[0, -1]
            assert chance == pytest.approx(logits.softmax(-1)[tokens[first + i]].item(), rel=1e-3)
    assert token_chances(model, "", "one")[0][1] > 0
    texts, status = [*app.generate(models, "Recite", 0, 0, 1.0, 9, "", 1, chances=True)][-1]
    assert "verbatim" in status
    assert "marked" not in status
    assert len(re.findall(r'class="chance" style="--p:0\.\d+" title="\d+\.\d%"', texts)) >= 5
    emoji = shaded([(b"\xf0\x9f", 0.5), (b"\x98\x80", 0.5), (b"<", 1.0), (b"\xf0", 1.0)])
    assert re.sub("<.*?>", "", emoji) == "\U0001f600&lt;\ufffd"
    assert "--p:0.250" in emoji


def test_two_models_answer_side_by_side_from_the_same_seed(run: Path, tmp_path: Path):
    other = app.Models(run).get().model
    with torch.no_grad():
        other.transformer.wpe.weight.mul_(-3)
    other.save_pretrained(tmp_path / "other" / "model")
    models = app.Models(run, beside=tmp_path / "other")
    *early, (texts, status) = ask(models, "Hello", max_new_tokens=8)
    seed = re.findall(r"seed (\d+)", status)[0]
    first, second = app.Models(run), models.all[1]
    alone = [ask(each, "Hello", max_new_tokens=8, seed=seed)[-1][0] for each in (first, second)]
    assert alone[0] != alone[1]
    assert all(text in texts for text in alone)
    assert 'class="status done"' in status
    assert not any("done" in early_status for _, early_status in early)
    panel, _ = app.about(models)
    assert panel.count('class="run"') == 2
    assert str(tmp_path / "other" / "model") in panel
    with pytest.raises(SystemExit):
        app.main(["--model", str(run), "--beside", str(tmp_path / "none")])


def test_text_is_escaped(models: app.Models):
    texts, _ = ask(models, "<img src=x onerror=alert(1)>", max_new_tokens=1)[-1]
    assert "<img" not in texts
    assert "&lt;img" in texts


BAD = (
    ({"temperature": -1}, "temperature must be finite and &gt;= 0"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 0}, r"top_p must be in \(0, 1\]"),
    ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": float("inf")}, "infinity"),
    ({"max_new_tokens": 0}, "max new tokens must be 1 to 500, got 0"),
    ({"max_new_tokens": 10**6}, "max new tokens must be 1 to 500"),
    ({"num_samples": 50}, "samples must be 1 to 4, got 50"),
    ({"seed": "-1"}, "seed must be a whole number or empty, got &#x27;-1&#x27;"),
    ({"seed": "1.5"}, "seed must be"),
    ({"seed": str(2**64)}, "seed must be"),
    ({"top_k": "3"}, "every setting must be a number"),
    ({"top_p": None}, "every setting must be a number"),
)


def test_bad_settings(models: app.Models):
    for change, message in BAD:
        with pytest.raises(gr.Error, match=message):
            ask(models, "a", **change)


def test_prompts_too_long_or_empty(models: app.Models):
    with pytest.raises(gr.Error, match="has 4,001 characters, the limit is 4,000"):
        ask(models, "x" * 4001)
    _, status = ask(models, "one two " * 60, max_new_tokens=1)[-1]
    assert "only its last 64 are read" in status
    assert "20 tokens" in ask(models, "")[-1][1]


def test_a_model_that_fails_while_it_writes_is_told_in_words(models: app.Models, monkeypatch):
    def pieces(*_: Any, **__: Any) -> Iterator[Any]:
        yield from ()
        raise ValueError("logits are <not> finite")

    monkeypatch.setattr(app, "stream_text", pieces)
    with pytest.raises(gr.Error, match="logits are &lt;not&gt; finite"):
        ask(models, "a")


def test_no_model_and_then_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The page may be opened before the training has ended."""
    monkeypatch.chdir(tmp_path)
    models = app.Models()
    panel, examples = app.about(models)
    assert "make train" in panel
    assert examples == []
    with pytest.raises(gr.Error, match="make train"):
        ask(models, "a")
    shutil.copytree(run, tmp_path / "runs" / "first")
    assert "a-test-recipe" in app.about(models)[0]
    assert ask(models, "a")
    named = app.Models(tmp_path / "nowhere")
    assert "no such file or folder" in app.about(named)[0]
    with pytest.raises(gr.Error, match="no such file or folder"):
        ask(named, "a")


def test_panel_and_examples_are_of_the_run(models: app.Models, run: Path, tmp_path: Path):
    panel, examples = app.about(models)
    assert "123,456" in panel
    assert "Memorisation" in panel  # 9.9 against about 5.1
    assert "<svg" in panel
    assert examples == ["Of my own text"]  # samples without a word are left out
    shutil.copytree(run / "model", tmp_path / "alone")
    panel, examples = app.about(app.Models(tmp_path / "alone"))
    assert "is unknown" in panel
    assert "trained context" in panel
    assert "emorisation" not in panel
    assert examples == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "nowhere"], "no such file or folder: nowhere"),
        (["--model", ""], "the path is empty"),
        (["--port", "99999"], "--port must be a whole number from 1 to 65,535, got 99999"),
        (["--port", "0"], "--port must be a whole number from 1 to 65,535, got 0"),
        (["--port", "-1"], "--port must be a whole number from 1 to 65,535, got -1"),
        (["--port", "http"], ""),
        (["--bogus"], ""),
    ],
)
def test_bad_flags(args: list[str], message: str, capsys, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for main, first in ((app.main, []), (space.main, ["out"])):
        if "--port" in args and main is not app.main:
            continue
        with pytest.raises(SystemExit) as stop:
            main([*first, *args])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []


def test_what_gradio_cannot_read_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADIO_SERVER_PORT", "99999")
    with pytest.raises(SystemExit) as stop:
        app.main([])
    assert stop.value.code == 2
    assert "must be a whole number from 1 to 65,535, got 99999" in capsys.readouterr().err
    monkeypatch.setenv("GRADIO_SERVER_PORT", "7860")
    for name, value in {"SERVER_PORT": "abc", "NUM_PORTS": "", "NUM_WORKERS": "-1"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(f"GRADIO_{name}", value)
            with pytest.raises(SystemExit, match="2"):
                importlib.reload(demo)
        line = (
            f"error: demo: GRADIO_{name} must be a whole number, got {value!r}; gradio reads it\n"
        )
        assert capsys.readouterr().err == line


# ---- visitors in a line


def new_visit() -> dict[str, int]:
    return {"newest": 0, "stopped": -1}


def test_fifty_visitors_wait_in_the_order_they_came(monkeypatch: pytest.MonkeyPatch):
    """Nobody is sent away. Two are served at once; the others see their place in the queue fall."""
    monkeypatch.setattr(line, "POLL_S", 0.001)
    served: list[int] = []
    at_once = most = 0

    def generate(visitor: int, ended: Any) -> Iterator[tuple[str, str]]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        yield "begun", str(visitor)
        served.append(visitor)
        at_once -= 1
        yield "all", str(visitor)

    async def visit(waiting: line.Line, visitor: int) -> list[tuple[Any, str]]:
        turns = waiting.serve(partial(generate, visitor), new_visit(), 1)
        return [update async for update in turns]

    async def everyone() -> list[list[tuple[Any, str]]]:
        waiting = line.Line()
        return await asyncio.gather(*(visit(waiting, i) for i in range(50)))

    told = asyncio.run(everyone())
    assert [updates[-1] for updates in told] == [("all", str(i)) for i in range(50)]
    assert most <= line.AT_ONCE
    assert all(abs(place - visitor) <= 2 for place, visitor in enumerate(served))
    for visitor, updates in enumerate(told):
        found = re.findall(r"place (\d+) in the queue", " ".join(status for _, status in updates))
        places = [int(place) for place in found]
        assert places == sorted({*places}, reverse=True)
        assert places[:1] == ([visitor - 1] if visitor >= line.AT_ONCE else [])


def test_two_texts_at_once_are_what_each_would_be_alone(models: app.Models):
    settings = {**DEFAULTS, "max_new_tokens": 40}

    async def visit(waiting: line.Line, i: int) -> tuple[str, str]:
        values = {**settings, "seed": str(i)}.values()
        generate = partial(app.generate, models, f"Client {i}:", *values)
        return [update async for update in waiting.serve(generate, new_visit(), 1)][-1]

    async def both() -> list[tuple[str, str]]:
        waiting = line.Line()
        return [*await asyncio.gather(visit(waiting, 0), visit(waiting, 1))]

    for i, (texts, _) in enumerate(asyncio.run(both())):
        sampling = Sampling(max_new_tokens=40, temperature=0.8, seed=i)
        (text,) = generate_text(models.get().model, [f"Client {i}:"], sampling)
        assert plain(texts) == f"Client {i}:{text}"


@pytest.mark.parametrize("waiting", [False, True])
def test_stop_ends_the_turn_it_names_and_no_later_one(
    monkeypatch: pytest.MonkeyPatch, waiting: bool
):
    """Whether Stop or the next press of Generate reaches the server first."""
    monkeypatch.setattr(line, "POLL_S", 0.001)

    def generate(name: str, ended: Any) -> Iterator[tuple[str, str]]:
        while not ended():
            yield name, "more"
            if name == "second":
                break
        yield name, "end"

    async def turns(order: str) -> tuple[list[tuple[Any, str]], list[tuple[Any, str]]]:
        visitors, visit = line.Line(at_once=0 if waiting else 2), new_visit()
        updates: list[list[tuple[Any, str]]] = [[], []]

        async def press(turn: int, name: str) -> None:
            async for update in visitors.serve(partial(generate, name), visit, turn):
                updates[turn - 1].append(update)

        first = asyncio.create_task(press(1, "first"))
        while not updates[0]:
            await asyncio.sleep(0.001)
        if order == "stop only":
            visit["stopped"] = 1
            await asyncio.wait_for(first, 200)
            return updates[0], []
        if order == "stop first":
            visit["stopped"] = 1
        visitors.at_once = 2
        second = asyncio.create_task(press(2, "second"))
        await asyncio.sleep(0.01)
        visit["stopped"] = 1
        await asyncio.wait_for(asyncio.gather(first, second), 200)
        return updates[0], updates[1]

    for order in ("stop first", "stop last"):
        first, second = asyncio.run(turns(order))
        assert second == [("second", "more"), ("second", "end")]
        assert ("first", "end") not in first or order == "stop first"
    alone, _ = asyncio.run(turns("stop only"))
    assert ("stopped" in alone[-1][1]) if waiting else alone[-1] == ("first", "end")
