"""The verbatim overlap against brute force, and what a report says in which case."""

import json
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.run import get_args_parser

import train
from model.tokenizer import get_encoding
from training import folder, report
from training.data import SHAKESPEARE_SHA256
from training.loggers import check_loggers
from training.metrics import RunLog, read_metrics
from training.overlap import find_overlap
from training.plan import Choices
from training.recipes import PRESETS, Recipe
from training.report import mark_spans, write_report
from training.verdicts import SEED_RECIPE, read_run, read_samples, split_samples, verdicts

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
    """Texts patched together from stretches of the corpus and noise; a repetitive corpus too."""
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


def test_marks_leave_characters_whole():
    text = "ab\u65e5cd<e>"
    assert mark_spans(text, [(0, 3)]) == "<mark>ab</mark>\u65e5cd&lt;e&gt;"
    assert mark_spans(text, [(4, 6)]) == "ab\u65e5<mark>c</mark>d&lt;e&gt;"
    assert mark_spans(text, [(6, 10)]) == "ab\u65e5c<mark>d&lt;e&gt;</mark>"
    assert mark_spans("", []) == ""


def test_split_samples():
    text = "[prompt] a\nb\n[model] one\n\ntwo\n\n[prompt] c\n[model] three\n\n"
    assert split_samples(text) == [("a\nb", " one\n\ntwo"), ("c", " three")]
    assert split_samples("just text") == [("", "just text")]
    assert split_samples("\n") == []


# ---- metrics.jsonl


def rows(*values: Any) -> str:
    return "".join(json.dumps(v) + "\n" for v in values)


def step(number: int, loss: float) -> dict[str, Any]:
    return {"step": number, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "ms": 1.0,
            "tokens_per_s": 1.0, "mfu": None}  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "val_loss": loss}


def test_steps_done_again_count_once(tmp_path: Path):
    """After a rollback, and after a resume that kept too much; the log counts the same."""
    path = tmp_path / "metrics.jsonl"
    before = [step(i, 5.0 - i) for i in range(4)]
    back = {"event": "rolled_back", "to_step": 2, "skips": [], "rollbacks": 1}
    path.write_text(rows(*before, evaluation(2, 8.0), evaluation(4, 9.0), back), encoding="utf-8")
    steps, evaluations, events = read_metrics(path)
    assert [s["step"] for s in steps] == [0, 1]
    assert [e["val_loss"] for e in evaluations] == [8.0]
    assert events == [back]
    with path.open("a") as file:
        file.write(
            rows(step(2, 3.5), step(3, 2.5), evaluation(4, 6.0), step(3, 2.25), step(4, 2.0))
        )
    steps, evaluations, _ = read_metrics(path)
    assert [(s["step"], s["loss"]) for s in steps] == [(0, 5), (1, 4), (2, 3.5), (3, 2.25), (4, 2)]
    assert [e["val_loss"] for e in evaluations] == [8.0]
    size = path.stat().st_size
    with RunLog(tmp_path, 9, 1, lambda _: None, steps_done=5, keep_bytes=size) as log:
        assert [(r.step, r.loss) for r in log.records] == [(s["step"], s["loss"]) for s in steps]


def test_damaged_lines_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    good = [step(0, 5.0), evaluation(1, 5.5), {"event": "odd", "x": 1}]
    bad = ["\0" * 9, "[1]", "3", '{"step": "1"}', '{"step": null}', "{}", '{"event": "eval"}']
    bad += ["[" * 9999, '{"event": ["eval"], "step": 1}', '{"step": 1']
    path.write_bytes(b"\xff\n" + "\n".join([*map(json.dumps, good), *bad]).encode())
    steps, evaluations, events = read_metrics(path)
    assert [*steps, *evaluations, events[0]] == good
    assert read_metrics(tmp_path / "none") == ([], [], [])


# ---- loggers


class StandIn(ModuleType):
    """A module with what wandb and trackio have in common; keeps what it is given."""

    def __init__(self, name: str):
        super().__init__(name)
        self.api, self.Settings = Mock(api_key=None), dict
        self.opened: list[dict[str, Any]] = []
        self.rows: list[tuple[Any, ...]] = []
        self.finished = 0

    def init(self, **more: Any) -> "StandIn":
        self.opened.append(more)
        return self

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def log(self, *row: Any) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def log_steps(folder: Path, names: Sequence[str], first: int, last: int, **more: Any) -> int:
    """Steps [first, last) and the evaluation behind them, as train.py logs them.

    Returns:
        What a checkpoint of step `last` would keep of metrics.jsonl.
    """
    one = torch.ones(())
    log = RunLog(folder, 9, 1, lambda _: None, loggers=names, steps_done=first,
                 keep_bytes=more.pop("keep_bytes", 10**9), config={"seed": 3})  # fmt: skip
    with log:
        if first:
            log.event("hellaswag", step=first, hellaswag=0.25)
        for number in range(first, last):
            log.step(number, 0.5, 0, one * (9 - number), one)
        log.finish()
        log.event("eval", step=last, val_loss=7.0)
        log.event("hellaswag", step=last, hellaswag=0.25)
        log.event("samples", step=last, texts=[])
        return log.num_bytes


def test_loggers_get_the_curves_and_go_on_in_the_same_place(tmp_path: Path, monkeypatch):
    wandb, trackio = (StandIn(name) for name in ("wandb", "trackio"))
    for module in (wandb, trackio):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    size = log_steps(tmp_path, ["csv", "wandb", "trackio", "csv"], 0, 2)
    log_steps(tmp_path, ["csv"], 2, 4, keep_bytes=size)
    # Back to the checkpoint of step 2: what followed it is there once.
    log_steps(tmp_path, ["csv", "wandb", "trackio"], 2, 4, keep_bytes=size)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    names = [json.loads(line).get("event") for line in kept]
    again = ["hellaswag", "samples"]
    assert names == [None, None, "eval", "hellaswag", None, None, "eval", *again]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    ends = (",7.0,", ",,0.25")  # an evaluation belongs before the step of its number
    want = [("0,9.0,0.5", ""), ("1,8.0,0.5", ""), *(("2,,,", e) for e in ends),
            ("2,7.0,0.5", ""), ("3,6.0,0.5", ""), *(("4,,,", e) for e in ends)]  # fmt: skip
    assert len(lines[1:]) == len(want)
    for line, (start, end) in zip(lines[1:], want, strict=True):
        assert line.startswith(start)
        assert line.endswith(end)
    ident = (tmp_path / "log-id").read_text()
    assert [run["id"] for run in wandb.opened] == [ident] * 2
    assert [run["name"] for run in trackio.opened] == [f"{tmp_path.name}-{ident}"] * 2
    assert {(run["resume"], run["config"]["seed"]) for run in wandb.opened} == {("allow", 3)}
    assert wandb.opened[0]["mode"] == "offline"  # no account, and nobody to ask
    assert wandb.rows[2] == ({"step": 2, "val_loss": 7.0},)
    assert trackio.rows[0][1] == 0
    assert trackio.rows[3] == ({"hellaswag": 0.25}, 2)
    assert wandb.finished == trackio.finished == 2
    log_steps(tmp_path, ["wandb"], 0, 1)  # afresh
    assert wandb.opened[2]["id"] != ident


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_logger_that_fails_is_named_once_and_stops_nothing(tmp_path, monkeypatch, capsys, where):
    module = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(module, where, Mock(side_effect=RuntimeError("no route to host")))
    log_steps(tmp_path, ["wandb", "csv"], 0, 4)
    said = capsys.readouterr().out
    assert said.count("log: wandb failed (no route to host); the run goes on without it") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == 4
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 1 + 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_the_libraries_themselves_take_it_without_a_network(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first in (0, 2):
        log_steps(tmp_path, [name], first, 4)
    assert "failed" not in capsys.readouterr().out
    written = "log-id" if name == "trackio" else name  # trackio keeps one place for all runs
    assert (tmp_path / written).exists()


def test_the_link_that_wandb_makes_stops_no_resume(tmp_path: Path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "latest-run").symlink_to("offline-run-1")
    with folder.opened(tmp_path, None, print):
        assert (tmp_path / "wandb" / "latest-run").is_symlink()  # each of its runs has a folder


def test_loggers_that_are_not_known(monkeypatch):
    for flag in ("--log", "--log-to"):
        asked = train.parse(["--preset", "smoke", flag, "csv,wandb", "--tensorboard"])
        assert asked.loggers == ["csv", "wandb", "tensorboard"]
    with pytest.raises(ValueError, match=r"log: must be of tensorboard, .*, csv, got 'wandbb'"):
        check_loggers(["csv", "wandbb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="log: trackio is not installed; pip install trackio"):
        check_loggers(["trackio"])


def test_no_flag_could_be_short_for_one_of_torchruns():
    """It would refuse the command, though the flag stands behind train.py."""
    theirs = [*get_args_parser()._option_string_actions]
    names = [field.name for of in (train.Config, Recipe, Choices) for field in fields(of)]
    for flag in (f"--{name.replace('_', '-')}" for name in names):
        assert not [other for other in theirs if other.startswith(flag)], flag


# ---- the report


def write_run(folder: Path, **changes: Any) -> Path:
    """A run folder as train.py leaves it: 100 steps, loss from 5 to `loss`.

    Args:
        folder: Made.
        changes: `loss`, `vals` of the evaluations, `lines` behind metrics.jsonl, `samples`,
            `config`; all else replaces a number of summary.json.
    """
    loss, vals = changes.pop("loss", 4.0), changes.pop("vals", [4.5, 4.2])
    config = {"recipe": {"name": "mine", "model": "tiny"}, "parameters": 3_000_000}
    config |= changes.pop("config", {})
    folder.mkdir(exist_ok=True)
    losses = [5 + (loss - 5) * min(1.0, i / 90) for i in range(100)]
    found = [step(i, x) for i, x in enumerate(losses)]
    found += [evaluation(50 * (i + 1), v) for i, v in enumerate(vals)]
    (folder / "metrics.jsonl").write_text(
        rows(*found, *changes.pop("lines", ())) + '{"step": 1', encoding="utf-8"
    )
    for sample in changes.pop("samples", ()):
        with (folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"[prompt] a prompt\n[model]{sample}\n\n")
    summary = {
        "final_step": 100, "val_loss": vals[-1] if vals else None, "val_bits_per_byte": 1.75,
        "tokens_seen": 102_400, "epochs": 1.5, "corpus_tokens": 60_000, "trained_context": 64,
        "train_s": 1.0, "wall_s": 3.5, "tokens_per_s": 102_400.0, "model_bytes": 1234,
        "device": "a <test> CPU", "baselines": {"unigram": 6.4, "bigram": 5.0},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | changes), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


TEXT = prose(5000, 5)
OWN = "quite another text, written anew " * 3
SEED_CONFIG: dict[str, Any] = {
    "recipe": {"name": SEED_RECIPE, **asdict(PRESETS[SEED_RECIPE])},
    "data": {"sha256": SHAKESPEARE_SHA256},
    "flags": {"init": None},
}
# Words of each verdict.
FAILED, UNFINISHED, MEMORISED = "failed", "not ended", "Memorisation"
EASIER, HARDER = "lies below", "text is harder"
NO_SIGN, OVERFITTED, NOT_LEARNT = "no sign of memorisation", "Overfitting", "not learnt to use"
HEART, DOUBTFUL = "is recitation", "cannot be told from recitation"
RECITED, PARTLY, ITS_OWN = "recite:", "partly recited", "the model's own"
VERDICTS = (FAILED, UNFINISHED, MEMORISED, EASIER, HARDER, NO_SIGN, OVERFITTED, NOT_LEARNT, HEART,
            DOUBTFUL, RECITED, PARTLY, ITS_OWN)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"samples": [OWN]}, {NO_SIGN, ITS_OWN}),
        ({}, {NO_SIGN}),
        ({"samples": ["short"]}, {NO_SIGN}),  # shorter than a window: nothing can be said of it
        ({"loss": 2.0, "vals": [4.3, 4.9]}, {MEMORISED, OVERFITTED}),
        ({"loss": 2.0, "vals": [4.3, 4.9], "epochs": 0.4}, {HARDER, OVERFITTED}),  # all new
        ({"samples": [TEXT[100:500], TEXT[900:1300]]}, {RECITED}),
        ({"samples": [TEXT[100:180] + OWN * 3]}, {NO_SIGN, PARTLY}),
        ({"loss": 5.0, "vals": [5.1]}, {NOT_LEARNT}),
        ({"loss": 4.5, "vals": [3.9]}, {EASIER}),
        ({"vals": [], "loss": 3.5, "epochs": 0.5}, {DOUBTFUL}),
        ({"vals": [], "loss": 0.7, "epochs": 40.0}, {DOUBTFUL}),
        ({"vals": [], "loss": 0.08, "epochs": 50.6}, {HEART}),
        ({"vals": [], "loss": 0.08, "epochs": 3.0}, {DOUBTFUL}),  # too few to learn it by heart
        # What the recipe is called decides nothing, in any direction.
        ({"config": SEED_CONFIG, "vals": [], "loss": 0.08, "epochs": 50.6}, {HEART}),
        ({"config": SEED_CONFIG, "vals": [], "loss": 6.53, "epochs": 1.2}, {DOUBTFUL}),
        ({"config": SEED_CONFIG}, {NO_SIGN}),
        # No failure ends in another verdict, and no number of another type in a traceback.
        ({"lines": [step(100, math.nan)], "samples": ["!!!!" * 30]}, {FAILED}),
        ({"lines": [step(100, math.inf), step(101, math.nan)]}, {FAILED}),
        ({"lines": [{"step": 100, "loss": None}]}, {FAILED}),
        ({"vals": [4.5, math.nan]}, {FAILED}),
        ({"vals": [4.5], "val_loss": math.inf}, {FAILED}),
        ({"lines": [{"event": "give_up", "step": 99, "loss": 9.0}]}, {FAILED}),
        ({"lines": [step(100, 4.0), {"event": "failed", "reason": "a disk"}]}, {FAILED}),
        ({"lines": [{"event": "failed"}, step(100, 4.0)]}, {UNFINISHED, NO_SIGN}),
        ({"vals": [4.5], "val_loss": "3", "epochs": [], "baselines": 3}, {FAILED}),
        (
            {"lines": [step(100, math.nan), {"event": "skipped", "step": 100}], "final_step": 101},
            {NO_SIGN},
        ),
        ({"lines": [step(100, 4.0)]}, {UNFINISHED, NO_SIGN}),  # it has been extended since
    ],
)
def test_verdicts(tmp_path: Path, changes: dict[str, Any], expected: set[str]):
    """Each verdict where the run's own numbers say so, and nowhere else."""
    run = write_run(tmp_path / "r", **changes)
    texts = [text for _, text in read_samples(run)]
    found = verdicts(read_run(run), find_overlap(texts, TEXT.encode()) if texts else None)
    said = " ".join(line for _, line in found)
    assert {words for words in VERDICTS if words in said} == expected, said
    bad = {FAILED, MEMORISED, OVERFITTED, NOT_LEARNT, HEART, RECITED}
    for kind, line in found:
        assert DOUBTFUL in line or (kind == "warning") == any(words in line for words in bad)


def test_numbers_in_verdicts(tmp_path: Path):
    write_report(write_run(tmp_path / "r", loss=2.0, vals=[4.3, 4.9]), TEXT.encode())
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "The gap of 2.90 nats" in page
    assert "was 4.30 at step 50" in page
    run = write_run(tmp_path / "heart", vals=[], loss=0.08, epochs=50.6, corpus_tokens=338_025)
    write_report(run, b"")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "A loss of 0.08 after 50.6 epochs over 338,025 tokens is recitation" in page


def test_facts(tmp_path: Path):
    write_report(write_run(tmp_path / "r", samples=[OWN]), TEXT.encode())
    facts = json.loads((tmp_path / "r" / "report.json").read_text(encoding="utf-8"))["facts"]
    assert facts["tokens seen"] == "102,400"
    assert facts["perplexity, held-out text"] == "66.69"  # e^4.2
    assert facts["bits per byte, held-out text"] == "1.750"
    assert facts["model"] == "tiny, 3,000,000 parameters"
    assert facts["training text"] == f"{len(TEXT.encode()):,} bytes"
    assert (tmp_path / "r" / "corpus.txt").read_bytes() == TEXT.encode()


def test_the_published_run_stands_beside_a_repetition_of_it_only(tmp_path: Path):
    run = write_run(tmp_path / "same", config=SEED_CONFIG, vals=[], loss=0.08)
    write_report(run, TEXT.encode())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<td>4,175</td><td>0.082</td><td></td>" in page
    assert page.count("published run</text>") == 1
    for part, changed in (("recipe", {"max_lr": 1e-4}), ("recipe", {"model": "mini"}),
                          ("data", {"sha256": "0"}), ("flags", {"init": "gpt2"})):  # fmt: skip
        config = SEED_CONFIG | {part: SEED_CONFIG[part] | changed}
        assert read_run(write_run(tmp_path / "other", config=config)).published == ()


class Outside(HTMLParser):
    """Collects everything a browser would load from elsewhere, and unclosed tags."""

    def __init__(self):
        super().__init__()
        self.urls: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]):
        self.urls += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str):
        assert self.open.pop() == tag  # <line/> and the like come here at once


def test_page_is_self_contained_and_escaped(tmp_path: Path):
    evil = "<script>alert(1)</script>"
    config = {"recipe": {"name": evil, "model": evil}, evil: evil}
    baselines = {evil: 5.0}
    run = write_run(
        tmp_path / "r<b>", samples=[evil + TEXT[:60]], config=config, baselines=baselines
    )
    write_report(run, TEXT.encode())
    page = (run / "report.html").read_text(encoding="utf-8")
    parser = Outside()
    parser.feed(page)
    assert parser.urls == []
    assert parser.open == []
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert "<script" not in page
    assert "<b>" not in page
    assert "a &lt;test&gt; CPU" in page
    assert "<mark>" in page
    assert page.count("<svg") == 2
    assert 'name="viewport"' in page


def test_empty_run_folder(tmp_path: Path):
    assert write_report(tmp_path, b"") == []
    assert not (tmp_path / "corpus.txt").exists()
    assert not (tmp_path / "loss.png").exists()
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content == {"verdicts": [], "facts": {}, "train_loss": None, "val_loss": None,
                       "overlap": None}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["[1]", '"x"', "{", '{"recipe": 1, "data": [], "flags": "x"}',
     '{"parameters": 1e999, "recipe": {"name": []}}'],
)  # fmt: skip
def test_odd_files_make_no_traceback(tmp_path: Path, content: str):
    for name in ("summary.json", "config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "samples.txt").write_bytes(b"\xff")
    write_report(tmp_path, TEXT.encode())


def test_only_the_models_part_of_a_sample_counts(tmp_path: Path):
    (tmp_path / "samples.txt").write_text(
        f"[prompt] {TEXT[:300]}\n[model] own words\n\n", encoding="utf-8"
    )
    write_report(tmp_path, TEXT.encode())
    facts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert facts["overlap"]["longest_bytes"] == 0


def test_a_strangers_links_are_not_written_through(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("kept", encoding="utf-8")
    run = write_run(tmp_path / "r")
    for name in ("report.html", "report.json", "corpus.txt", "loss.png"):
        (run / name).symlink_to(outside)
    write_report(run, TEXT.encode())
    assert outside.read_bytes() == b"kept"


def test_end_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path / "r", loss=2.0, vals=[4.9], samples=[" own words" * 9])
    tokens = np.array(get_encoding().encode_ordinary(TEXT), dtype=np.uint16)
    monkeypatch.setattr(report, "DECODE_TOKENS", 1000)
    lines: list[str] = []
    report.report_run(run, tokens, lines.append)
    assert (run / "corpus.txt").read_text(encoding="utf-8") == TEXT
    assert lines[0].startswith("warning: Memorisation: the loss is 2.0")
    assert lines[1:] == [f"report: {run / 'report.html'}"]
    assert (run / "loss.png").stat().st_size > 9000
    monkeypatch.setattr(report, "MAX_CORPUS_BYTES", 9000)  # and of a longer text
    report.report_run(run, tokens, lines.append)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert re.search(r"Only the first [\d,]+ bytes", page)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "r", loss=2.0)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    report.main([str(run), "--corpus", str(tmp_path / "text.txt")])
    assert "warning: Memorisation" in capsys.readouterr().out
    for args in ([str(tmp_path / "none")], [str(run), "--corpus", "none.txt"], [],
                 [str(run), "--corpus", str(tmp_path)], [str(tmp_path / "text.txt")]):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            report.main(args)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err) > 20
