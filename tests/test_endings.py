"""How a run ends when it does not end well: signals, losses that are no numbers, a full disk."""

import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import train
from tests.faults import Small, wait_for
from training import checkpoint, ending, report, run
from training.metrics import RunLog, read_metrics, to_json
from training.recipes import Recipe, find_preset
from training.signals import EXIT_RESUMABLE
from training.step import TrainStep

pytestmark = pytest.mark.usefixtures("heard")


@pytest.fixture
def start(text: Path, tmp_path: Path) -> Callable[..., int]:
    """A run of a tiny model in `tmp_path`/run, in this process; its exit code."""

    def start(*arguments: str) -> int:
        fixed = """--preset smoke --model smoke,n_layer=1,n_embd=16,n_head=1 --dtype fp32 --steps 6
            --batch-size 2 --block-size 16 --save-every 0"""
        where = ["--data", str(text), "--out", str(tmp_path / "run")]
        return train.main([*fixed.split(), *where, *arguments])

    return start


def strict(path: Path) -> Any:
    """JSON as the standard has it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{path} holds {word}")

    text, lines = path.read_text(encoding="utf-8"), path.suffix == ".jsonl"
    found = [json.loads(t, parse_constant=refuse) for t in (text.splitlines() if lines else [text])]
    return found if lines else found[0]


# ---- signals


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_each_signal_saves_and_leaves(name, start, tmp_path, monkeypatch, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    rate = Recipe.learning_rate

    def signal_in_step_2(recipe: Recipe, step: int) -> float:
        if step == 2:
            os.kill(os.getpid(), number)
        return rate(recipe, step)

    monkeypatch.setattr(Recipe, "learning_rate", signal_in_step_2)
    assert start() == EXIT_RESUMABLE
    assert signal.getsignal(number) is before
    assert f"{name}: stopped after 3 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    monkeypatch.undo()
    assert start() == 0
    assert [s["step"] for s in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]] == [*range(6)]


@pytest.mark.parametrize(
    ("where", "saving"), [("evaluation", "0"), ("samples", "4"), ("samples", "0")]
)
def test_the_end_of_a_run_answers_too(where, saving, start, tmp_path, monkeypatch):
    """Within a batch or a token, and the same command does the rest, and logs it once."""
    count, items = [0], tmp_path / "items.jsonl"
    items.write_text('{"ctx": "To be", "endings": ["or", "not"], "label": 0}')
    arguments = "--save-every", saving, "--hellaswag", str(items)
    if where == "evaluation":
        real = run.evaluate_tokens

        def evaluate(*arguments, poll, **keywords):
            def polled() -> None:
                count[0] += 1
                if count[0] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                poll()

            return real(*arguments, poll=polled, **keywords)

        monkeypatch.setattr("training.evaluate.BATCH_TOKENS", 16)
        monkeypatch.setattr(run, "evaluate_tokens", evaluate)
    else:
        real = ending.stream_text

        def stream(*arguments, **keywords):
            for piece in real(*arguments, **keywords):
                count[0] += 1
                if count[0] == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield piece

        monkeypatch.setattr(ending, "stream_text", stream)
    assert start(*arguments) == EXIT_RESUMABLE
    assert count[0] == 2
    out = tmp_path / "run"
    assert (out / "checkpoints" / "step-00000006").is_dir()
    assert not (out / "summary.json").exists()
    monkeypatch.undo()
    assert start(*arguments) == 0
    steps, evaluations, events = read_metrics(out / "metrics.jsonl")
    assert ([s["step"] for s in steps], len(evaluations)) == ([*range(6)], 1)
    scores = [event["hellaswag"] for event in events if event["event"] == "hellaswag"]
    assert [json.loads((out / "summary.json").read_text())["hellaswag"]] == scores
    assert f"<td>{scores[0]:.2%}</td>" in (out / "report.html").read_text()


@pytest.mark.slow  # in short: test_console.py, test_nobody_reads_and_the_run_is_to_stop
@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="makes a pipe short")
def test_a_log_that_nobody_reads_does_not_hold_up_the_answer(tmp_path):
    """Standard output is a full pipe: SIGTERM used to end in "reentrant call", or nowhere."""
    small = Small(tmp_path, steps=100_000, save_every=0, flags=("--log-every", "1"))
    process = small.start("run")
    assert process.stdout is not None
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)  # some 40 steps
    log = tmp_path / "run" / "metrics.jsonl"
    try:
        assert wait_for(process, "file", log, 0.0)
        deadline, size = time.monotonic() + 200.0, -1
        while time.monotonic() < deadline and (size != log.stat().st_size or size < 1000):
            size = log.stat().st_size
            time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) == EXIT_RESUMABLE
        assert "Traceback" not in process.stdout.read()
    finally:
        process.kill()


# ---- numbers that are not finite


def test_without_a_guard_the_first_loss_that_is_no_number_ends_the_run(start, tmp_path, capsys):
    assert start("--no-guard", "--max-lr", "1e25", "--min-lr", "1e25", "--steps", "400") == 1
    error = capsys.readouterr().err
    assert error.startswith("train.py: step ")
    assert "which nothing undoes without a guard" in error
    assert error.count("\n") == 1
    out = tmp_path / "run"
    rows = strict(out / "metrics.jsonl")
    assert len(rows) < 10
    assert rows[-1]["event"] == "failed"
    assert rows[-2]["loss"] is None or rows[-2]["grad_norm"] is None
    assert not (out / "summary.json").exists()
    assert not (out / "model").exists()
    report.main([str(out)])
    said = capsys.readouterr().out
    assert "warning: This run failed" in said
    assert "memorisation" not in said.lower()
    assert start("--no-guard", "--max-lr", "1e25", "--min-lr", "1e25", "--steps", "400") == 1


@pytest.mark.parametrize(("val_fraction", "last"), [("0", 1e30), ("0.1", 1e30), ("0", math.inf)])
def test_a_model_that_is_not_finite_is_no_result(
    val_fraction, last, start, tmp_path, monkeypatch, capsys
):
    """The last update breaks the model, which no step is left to see."""
    rate = Recipe.learning_rate
    monkeypatch.setattr(
        Recipe, "learning_rate", lambda recipe, step: rate(recipe, step) if step < 5 else last
    )
    flags = ("--val-fraction", val_fraction, "--save-every", "3", "--keep-last", "1")
    assert start(*flags) == 1
    said = capsys.readouterr()
    assert "step 6: after it the loss is nan" in said.err
    rows = strict(tmp_path / "run" / "metrics.jsonl")
    assert [r["event"] for r in rows if "event" in r][-1] == "failed"
    assert not (tmp_path / "run" / "model").exists()
    if last == math.inf:  # the weights themselves: no run could go on from them
        assert "step 6 could not be written (transformer." in said.out
        assert "is not finite); training goes on, last good one: step 3" in said.out
        monkeypatch.undo()
        assert start(*flags) == 0
        assert "step-00000003, 3 steps done" in capsys.readouterr().out


def test_numbers_that_are_not_finite_are_null(tmp_path):
    values = {"a": [1.0, float("nan"), {"b": (float("inf"), 2)}], "c": True}
    assert json.loads(to_json(values)) == {"a": [1.0, None, {"b": [None, 2]}], "c": True}
    with RunLog(tmp_path, 2, 10, lambda _: None) as log:
        log.step(0, 1e-3, 0, torch.tensor(float("nan")), torch.tensor(float("inf")))
        log.finish()
    (row,) = strict(tmp_path / "metrics.jsonl")
    assert (row["loss"], row["grad_norm"]) == (None, None)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    again = RunLog(tmp_path, 2, 10, lambda _: None, keep_bytes=size, steps_done=1)
    assert not again.records[0].finite
    again.records[0].line()


# ---- disks


@pytest.mark.parametrize("what", ["model", "curve", "summary"])
def test_a_full_disk_at_the_end_is_a_line(what, start, tmp_path, monkeypatch, capsys):
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "run" / what))

    def full_for_safetensors(*arguments: Any, **keywords: Any) -> None:
        raise SafetensorError("Error while serializing: No space left on device")

    if what == "model":
        monkeypatch.setattr("model.export.save_file", full_for_safetensors)
    elif what == "curve":
        monkeypatch.setattr("training.plot.save", full)
    else:
        real = run.metrics.write_json
        monkeypatch.setattr(
            run.metrics, "write_json", lambda p, v: (full if p.stem == what else real)(p, v)
        )
    assert start("--save-every", "3") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left" in error
    assert "the same command goes on" in error
    monkeypatch.undo()
    assert start("--save-every", "3") == 0
    assert strict(tmp_path / "run" / "summary.json")["final_step"] == 6
    assert "failed" not in {e["event"] for e in read_metrics(tmp_path / "run" / "metrics.jsonl")[2]}


def test_rows_that_did_not_fit_are_not_tried_again(start, tmp_path, monkeypatch):
    run_micro_batches, short = TrainStep._micro_batches, iter([True])

    def run_out_of_memory(self: TrainStep) -> torch.Tensor:
        if next(short, False):
            raise torch.OutOfMemoryError("none left")
        return run_micro_batches(self)

    monkeypatch.setattr(TrainStep, "_micro_batches", run_out_of_memory)
    assert start("--steps", "1", "--save-every", "1") == 0
    saved = checkpoint.read(tmp_path / "run" / "checkpoints" / "step-00000001").state["plan"]
    assert (saved["micro_batch_size"], saved["num_micro_batches"]) == (1, 2)


def test_a_log_that_cannot_be_written_costs_the_log(start, tmp_path, monkeypatch, capsys):
    opened = RunLog.__init__

    def open_full(self, *arguments: Any, **keywords: Any) -> None:
        opened(self, *arguments, **keywords)
        self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(RunLog, "__init__", open_full)
    assert start() == 0
    assert capsys.readouterr().out.count("metrics.jsonl: cannot be written") == 1
    assert strict(tmp_path / "run" / "summary.json")["final_step"] == 6


# ---- what is said


def test_a_longer_run_says_what_becomes_of_the_learning_rate(start, capsys):
    assert start("--save-every", "6") == 0
    capsys.readouterr()
    assert start("--save-every", "6", "--override", "--steps", "12") == 0
    said = capsys.readouterr().out
    before, after = (replace(find_preset("smoke"), max_steps=n) for n in (6, 12))
    assert after.learning_rate(6) > 2 * before.learning_rate(5)
    assert (
        f"the learning rate was {before.learning_rate(5):.2e} in the last step and goes on at "
        f"{after.learning_rate(6):.2e}"
    ) in said
    assert start("--save-every", "6", "--override", "--steps", "12", "--seed", "5") == 0
    assert "the learning rate was" not in capsys.readouterr().out
