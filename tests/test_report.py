"""Which verdicts a report gives in which case, and that its page is safe."""

import html
import json
import math
import os
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.tokenizer import get_encoding
from tests.test_metrics import evaluation, rows, step
from tests.test_overlap import prose
from training import report
from training.data import SHAKESPEARE_SHA256
from training.overlap import find_overlap
from training.recipes import PRESETS
from training.report import facts, mark_spans, write_report
from training.verdicts import SEED_RECIPE, read_run, read_samples, verdicts


def test_marks_leave_characters_whole():
    text = "ab\u65e5cd<e>"
    assert mark_spans(text, [(0, 3)]) == "<mark>ab</mark>\u65e5cd&lt;e&gt;"
    assert mark_spans(text, [(4, 6)]) == "ab\u65e5<mark>c</mark>d&lt;e&gt;"
    assert mark_spans(text, [(6, 10)]) == "ab\u65e5c<mark>d&lt;e&gt;</mark>"
    assert mark_spans("", []) == ""


def test_samples_are_read(tmp_path: Path):
    text = "[prompt] a\nb\n[model] one\n\ntwo\n\n[prompt] c\n[model] three\n\n"
    wanted = {text: [("a\nb", " one\n\ntwo"), ("c", " three")], "\n": [], "text": [("", "text")]}
    for content, samples in wanted.items():
        (tmp_path / "samples.txt").write_text(content)
        assert read_samples(tmp_path) == samples
    (tmp_path / "samples.txt").unlink()
    os.mkfifo(tmp_path / "samples.txt")
    assert read_samples(tmp_path) == []


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
# A few words of each verdict.
FAILED, UNFINISHED, MEMORISED = "failed", "not ended", "Memorisation"
EASIER, HARDER = "is below", "text is harder"
NO_SIGN, OVERFITTED, NOT_LEARNT = "no sign of memorisation", "Overfitting", "not yet learnt to use"
HEART, DOUBTFUL = "has memorised", "does not tell learning from"
RECITED, PARTLY, ITS_OWN = "are copied:", "partly copied", "the model's own"
BAD = {FAILED, MEMORISED, OVERFITTED, NOT_LEARNT, HEART, RECITED}
VERDICTS = BAD | {UNFINISHED, EASIER, HARDER, NO_SIGN, DOUBTFUL, PARTLY, ITS_OWN}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"samples": [OWN]}, {NO_SIGN, ITS_OWN}),
        ({}, {NO_SIGN}),
        ({"samples": ["short"]}, {NO_SIGN}),  # shorter than a window, so there is no share
        ({"loss": 2.0, "vals": [4.3, 4.9]}, {MEMORISED, OVERFITTED}),
        ({"loss": 2.0, "vals": [4.3, 4.9], "epochs": 0.4}, {HARDER, OVERFITTED}),  # all new
        ({"samples": [TEXT[100:500], TEXT[900:1300]]}, {RECITED}),
        ({"samples": [TEXT[100:180] + OWN * 3]}, {NO_SIGN, PARTLY}),
        ({"loss": 5.0, "vals": [5.1]}, {NOT_LEARNT}),
        ({"loss": 4.5, "vals": [3.9]}, {EASIER}),
        ({"vals": [], "loss": 3.5, "epochs": 0.5}, {DOUBTFUL}),
        ({"vals": [], "loss": 0.7, "epochs": 40.0}, {DOUBTFUL}),
        ({"vals": [], "loss": 0.08, "epochs": 50.6}, {HEART}),
        ({"vals": [], "loss": 0.08, "epochs": 3.0}, {DOUBTFUL}),  # too few to memorise it
        # The name of the recipe decides nothing.
        ({"config": SEED_CONFIG, "vals": [], "loss": 0.08, "epochs": 50.6}, {HEART}),
        ({"config": SEED_CONFIG, "vals": [], "loss": 6.53, "epochs": 1.2}, {DOUBTFUL}),
        ({"config": SEED_CONFIG}, {NO_SIGN}),
        # A failed run gets no other verdict, and a value of another type raises nothing.
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
    """Each verdict appears where the run's numbers say so, and nowhere else."""
    run = write_run(tmp_path / "r", **changes)
    texts = [text for _, text in read_samples(run)]
    found = verdicts(read_run(run), find_overlap(texts, TEXT.encode()) if texts else None)
    said = " ".join(line for _, line in found)
    assert {words for words in VERDICTS if words in said} == expected, said
    for kind, line in found:
        assert DOUBTFUL in line or (kind == "warning") == any(words in line for words in BAD)


def test_numbers_in_verdicts(tmp_path: Path):
    run = read_run(write_run(tmp_path / "r", loss=2.0, vals=[4.3, 4.9]))
    (_, memorised), (_, overfitted) = verdicts(run)
    assert "The gap of 2.90 nats" in memorised
    assert "was 4.30 at step 50" in overfitted
    run = write_run(tmp_path / "heart", vals=[], loss=0.08, epochs=50.6, corpus_tokens=338_025)
    ((_, heart),) = verdicts(read_run(run))
    assert "A loss of 0.08 after 50.6 epochs over 338,025 tokens means" in heart
    run = read_run(write_run(tmp_path / "short", vals=[], loss=3.5, epochs=0.003))
    assert "loss of 3.50 after less than 0.1 epochs over 60,000 tokens" in verdicts(run)[0][1]
    assert facts(run)["epochs (passes over the text)"] == "0.003"


def test_facts(tmp_path: Path):
    run = write_run(tmp_path / "r", samples=[OWN])
    write_report(run, TEXT.encode())
    facts = report.facts(read_run(run), len(TEXT.encode()))
    assert facts["tokens seen"] == "102,400"
    assert facts["perplexity, held-out text"] == "66.69"  # e^4.2
    assert facts["bits per byte, held-out text"] == "1.750"
    assert facts["model"] == "tiny, 3,000,000 parameters"
    assert facts["training text"] == f"{len(TEXT.encode()):,} bytes"
    assert (run / "corpus.txt").read_bytes() == TEXT.encode()
    page = (run / "report.html").read_text(encoding="utf-8")
    for name, value in facts.items():
        assert f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" in page


def test_the_published_run_stands_beside_a_repetition_of_it_only(tmp_path: Path):
    run = write_run(tmp_path / "same", config=SEED_CONFIG, vals=[], loss=0.08)
    write_report(run, TEXT.encode())
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<td>4,175</td><td>0.082</td><td></td>" in page
    assert page.count("published run</text>") == 1
    changes = [("recipe", {"max_lr": 1e-4}), ("recipe", {"model": "mini"})]
    for part, changed in (*changes, ("data", {"sha256": "0"}), ("flags", {"init": "gpt2"})):
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
        assert self.open.pop() == tag  # tags such as <line/> come here at once


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
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 2  # of numbers and configuration, both empty
    assert "<td>" not in page


ODD = ("[1]", '"x"', "{", '{"recipe": 1, "data": [], "flags": "x"}')


@pytest.mark.parametrize("content", [*ODD, '{"parameters": 1e999, "recipe": {"name": []}}'])
def test_odd_files_make_no_traceback(tmp_path: Path, content: str):
    for name in ("summary.json", "config.json", "metrics.jsonl"):
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "samples.txt").write_bytes(b"\xff")
    write_report(tmp_path, TEXT.encode())


def test_only_the_models_part_of_a_sample_counts(tmp_path: Path):
    (tmp_path / "samples.txt").write_text(
        f"[prompt] {TEXT[:300]}\n[model] {'own words ' * 4}\n\n", encoding="utf-8"
    )
    write_report(tmp_path, TEXT.encode())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The longest match" not in page
    assert "the longest match has fewer than 16 bytes" in page


def test_a_strangers_links_are_not_written_through(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("kept", encoding="utf-8")
    run = write_run(tmp_path / "r")
    for name in ("report.html", "corpus.txt", "loss.png"):
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
    monkeypatch.setattr(report, "MAX_CORPUS_BYTES", 9000)  # as for a longer text
    report.report_run(run, tokens, lines.append)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert re.search(r"Only the first [\d,]+ bytes", page)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "r", loss=2.0)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    report.main([str(run), "--corpus", str(tmp_path / "text.txt")])
    assert "warning: Memorisation" in capsys.readouterr().out
    os.mkfifo(tmp_path / "pipe")
    bad = [[run, "--corpus", name] for name in ("none.txt", tmp_path, tmp_path / "pipe")]
    for args in (*bad, [], [tmp_path / "none"], [tmp_path / "text.txt"]):
        with pytest.raises(SystemExit) as stop:
            report.main([*map(str, args)])
        assert stop.value.code == 2
        assert len(capsys.readouterr().err) > 20
