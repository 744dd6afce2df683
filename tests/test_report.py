"""The verbatim overlap against brute force, and what a report says in which case."""

import json
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import get_encoding
from training import report
from training.metrics import RunLog, read_metrics
from training.overlap import find_overlap
from training.report import mark_spans, split_samples, svg_plot, write_report

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
    with pytest.raises(ValueError, match=r"min_bytes must be one of .* got 20"):
        find_overlap(["a"], b"a", min_bytes=20)


def test_overlap_is_fast_on_a_large_corpus():
    """16 MB; brute force needs minutes here. The bound is ten times what 2 cores took."""
    corpus = b"".join(random.Random(i).randbytes(1 << 20) for i in range(16))
    sample = corpus[9_000_000:9_000_500] + random.Random(99).randbytes(4000)
    start = time.perf_counter()
    found = find_overlap([sample], corpus)
    assert time.perf_counter() - start < 10
    assert found.longest == sample[:500]


def test_marks_leave_characters_whole():
    text = "ab\u65e5cd<e>"
    assert mark_spans(text, [(0, 3)]) == "<mark>ab</mark>\u65e5cd&lt;e&gt;"
    assert mark_spans(text, [(4, 6)]) == "ab\u65e5<mark>c</mark>d&lt;e&gt;"
    assert mark_spans(text, [(6, 10)]) == "ab\u65e5c<mark>d&lt;e&gt;</mark>"
    assert mark_spans("", []) == ""


def test_split_samples():
    text = "[prompt] a\nb\n[model] one\n\ntwo\n\n[prompt] c\n[model] three\n\n"
    assert split_samples(text) == [" one\n\ntwo", " three"]
    assert split_samples("just text") == ["just text"]
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
    path.write_text(rows(*before, evaluation(2, 8.0), evaluation(4, 9.0), back))
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
    with RunLog(tmp_path, 9, 1, lambda _: None, keep_bytes=path.stat().st_size) as log:
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


# ---- the report


def write_run(folder: Path, **changes: Any) -> Path:
    """A run folder as train.py leaves it: 100 steps, loss from 5 to `loss`."""
    loss, val = changes.pop("loss", 4.0), changes.pop("val", 4.2)
    vals = changes.pop("vals", [4.5, val])
    folder.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"step": i, "loss": 5 + (loss - 5) * min(1.0, i / 90), "lr": 1e-3, "grad_norm": 1.0,
         "ms": 10.0, "tokens_per_s": 1e4, "mfu": None}
        for i in range(100)
    ]  # fmt: skip
    rows += [{"event": "eval", "step": 50 * i, "val_loss": v} for i, v in enumerate(vals)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 1')
    summary = {
        "final_step": 100, "val_loss": val, "tokens_seen": 102_400, "epochs": 1.5,
        "corpus_tokens": 60_000, "trained_context": 64, "train_s": 1.0, "wall_s": 3.5,
        "tokens_per_s": 102_400.0, "model_bytes": 1234, "device": "a <test> CPU",
        "baselines": {"unigram": 6.4, "bigram": 5.0},
    }  # fmt: skip
    name = changes.pop("name", "shakespeare-cpu")
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    (folder / "config.json").write_text(json.dumps({"recipe": {"name": name, "model": "tiny"}}))
    return folder


def verdicts_of(folder: Path, corpus: bytes, samples: list[str] | None = None) -> dict[str, str]:
    write_report(folder, corpus, samples)
    content = json.loads((folder / "report.json").read_text())
    return {v["text"].split(":")[0]: v["kind"] for v in content["verdicts"]}


CORPUS = prose(5000, 5).encode()


def test_healthy_run(tmp_path: Path):
    found = verdicts_of(
        write_run(tmp_path / "r"), CORPUS, ["quite another text, written anew " * 3]
    )
    assert set(found.values()) == {"note"}
    assert "The samples are the model's own" in found
    facts = json.loads((tmp_path / "r" / "report.json").read_text())["facts"]
    assert facts["tokens seen"] == "102,400"
    assert facts["perplexity, held-out text"] == "66.69"  # e^4.2
    bytes_per_token = len(CORPUS) / 60_000
    assert float(facts["bits per byte, held-out text"]) == pytest.approx(
        4.2 / 0.6931472 / bytes_per_token, abs=1e-3
    )
    assert (tmp_path / "r" / "corpus.txt").read_bytes() == CORPUS


def test_gap_means_memorisation(tmp_path: Path):
    found = verdicts_of(write_run(tmp_path / "r", loss=2.0, val=4.9, vals=[4.3, 4.9]), CORPUS)
    assert found["Memorisation"] == "warning"
    assert found["Overfitting"] == "warning"
    page = (tmp_path / "r" / "report.html").read_text()
    assert "The gap of 2.90 nats" in page
    assert "was 4.30 at step 0" in page


def test_recited_samples(tmp_path: Path):
    text = CORPUS.decode()
    found = verdicts_of(write_run(tmp_path / "r"), CORPUS, [text[100:500], text[900:1300]])
    assert found["The samples recite"] == "warning"
    assert "<mark>" in (tmp_path / "r" / "report.html").read_text()


def test_no_better_than_counting(tmp_path: Path):
    run = write_run(tmp_path / "r", loss=5.0, val=5.2)
    assert any("not below the 5.00" in line for line in verdicts_of(run, CORPUS))


def test_without_validation(tmp_path: Path):
    run = write_run(tmp_path / "r", val=None, vals=[], loss=0.5, epochs=40.0)
    line = "No validation split"
    assert verdicts_of(run, CORPUS)[line] == "warning"
    run = write_run(tmp_path / "r", val=None, vals=[], loss=3.5, epochs=0.5)
    assert verdicts_of(run, CORPUS)[line] == "note"


def test_seed_recipe_is_called_recitation(tmp_path: Path):
    run = write_run(tmp_path / "r", name="shakespeare-124m", val=None, vals=[], loss=0.08)
    write_report(run, CORPUS, ["x" * 50])
    page = (run / "report.html").read_text()
    assert "loss of 0.08 after 50 epochs over 338 thousand tokens is recitation" in page
    assert "published run" in page
    assert "<td class=n>4,175</td><td class=n>0.082</td>" in page


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
    run = write_run(tmp_path / "r")
    write_report(run, CORPUS, ["<script>alert(1)</script>" + CORPUS.decode()[:60]])
    page = (run / "report.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.urls == []
    assert parser.open == []
    assert not re.search(r"https?://|@import|url\(", page)
    assert "<script" not in page
    assert "a &lt;test&gt; CPU" in page
    assert page.count("<svg") == 4


def test_empty_run_folder(tmp_path: Path):
    page = write_report(tmp_path, b"").read_text()
    assert "n/a" in page
    assert not (tmp_path / "corpus.txt").exists()
    assert json.loads((tmp_path / "report.json").read_text())["overlap"] is None


def test_samples_file_is_read_and_only_the_models_part_counts(tmp_path: Path):
    text = CORPUS.decode()
    (tmp_path / "samples.txt").write_text(f"[prompt] {text[:300]}\n[model] own words\n\n")
    write_report(tmp_path, CORPUS)
    assert json.loads((tmp_path / "report.json").read_text())["overlap"]["longest_bytes"] == 0


def test_curve_places_points():
    """Two points in opposite corners of the plot, a level half-way."""
    plot = svg_plot([("a", "line", [(0, 1.0), (10, 3.0)])], [("half", 2.0)], "t", (100, 100))
    assert 'd="M56.0 70.0L88.0 28.0"' in plot
    assert 'y1="49.0"' in plot
    log = svg_plot([("a", "line", [(0, 1.0), (5, 10.0), (10, 100.0)])], size=(100, 100), log_y=True)
    assert "L72.0 49.0L" in log
    nan = svg_plot([("a", "line", [(0, float("nan")), (1, 2.0)])])
    assert "nan" not in nan
    assert "n/a" in svg_plot([])


def test_end_of_a_run(tmp_path: Path):
    run = write_run(tmp_path / "r", loss=2.0, val=4.9, vals=[4.9])
    (run / "samples.txt").write_text("[prompt] x\n[model] own words\n\n")
    tokens = np.array(get_encoding().encode_ordinary(CORPUS.decode()), dtype=np.uint16)
    lines: list[str] = []
    report.report_run(run, tokens, lines.append)
    assert (run / "corpus.txt").read_bytes() == CORPUS
    assert lines[0].startswith("warning: Memorisation: the loss is 2.0")
    assert lines[1:] == [f"report: {run / 'report.html'}"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "r", loss=2.0, val=4.9)
    (tmp_path / "text.txt").write_bytes(CORPUS)
    report.main([str(run), "--corpus", str(tmp_path / "text.txt")])
    assert "warning: Memorisation" in capsys.readouterr().out
    for args in ([str(tmp_path / "none")], [str(run), "--corpus", "none.txt"]):
        with pytest.raises(SystemExit) as stop:
            report.main(args)
        assert stop.value.code == 2
        assert "no such" in capsys.readouterr().err
