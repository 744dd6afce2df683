"""What a run logs: records that come a step late, metrics.jsonl, and the loggers beside it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import train
from training import folder, metrics
from training.loggers import check_loggers
from training.metrics import RunLog, read_metrics


def rows(*values: Any) -> str:
    return "".join(json.dumps(v) + "\n" for v in values)


def step(number: int, loss: float) -> dict[str, Any]:
    ones = dict.fromkeys(("grad_norm", "ms", "tokens_per_s"), 1.0)
    return {"step": number, "loss": loss, "lr": 1e-3, "mfu": None, **ones}


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "val_loss": loss}


def test_steps_done_again_count_once(tmp_path: Path):
    """After a rollback, or a resume that kept too much, the reader and the log count alike."""
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


def test_a_log_that_is_too_long_is_moved_away(tmp_path: Path, capsys):
    """A stranger's may be larger than the memory, and takes no room on the disk."""
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(metrics.MAX_LOG_BYTES + 1)
    with RunLog(tmp_path, 9, 1, lambda _: None, steps_done=1, keep_bytes=7) as log:
        assert log.records == []
        assert log.num_bytes == 0
    assert "1 of the 1 steps done are missing" in capsys.readouterr().out
    assert (tmp_path / "metrics-too-long.jsonl").exists()


def test_values_are_read_a_step_late(tmp_path: Path) -> None:
    with RunLog(tmp_path, 3, 100, lambda tokens_per_s: tokens_per_s / 1e9) as log:
        one = torch.tensor(1.0)
        log.step(0, 1e-3, 0, one * 5, one)
        assert list(log.read()) == []  # it may still be running
        log.step(1, 1e-3, 0, one * 4, one)
        (first,) = log.read()
        assert (first.step, first.loss) == (0, 5.0)
        (last,) = log.read(wait=True)
        assert (last.step, last.loss) == (1, 4.0)
        assert last.mfu == last.tokens_per_s / 1e9
        assert list(log.read(wait=True)) == []
    assert [s["step"] for s in read_metrics(tmp_path / "metrics.jsonl")[0]] == [0, 1]


def test_time_aside_belongs_to_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, 3, 100, lambda _: None) as log:
        for step in range(3):
            now[0] += 2.0
            log.step(step, 1e-3, 0, torch.tensor(1.0), torch.tensor(1.0))
            with log.aside():
                now[0] += 100.0
    assert [s["ms"] for s in read_metrics(tmp_path / "metrics.jsonl")[0]] == [
        2000.0,
        2000.0,
        2000.0,
    ]


# ---- loggers


class StandIn(ModuleType):
    """A module with the interface of wandb and trackio; records its calls."""

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


def log_steps(
    folder: Path, names: Sequence[str], first: int, last: int, keep_bytes: int = 10**9
) -> int:
    """Log steps [first, last) and the evaluation after them, as train.py does.

    Returns:
        What a checkpoint of step `last` would keep of metrics.jsonl.
    """
    one = torch.ones(())
    where = {"steps_done": first, "keep_bytes": keep_bytes, "config": {"seed": 3}}
    with RunLog(folder, 9, 1, lambda _: None, loggers=names, **where) as log:
        if first:
            log.event("hellaswag", step=first, hellaswag=0.25)
        for number in range(first, last):
            log.step(number, 0.5, 0, one * (9 - number), one)
        log.finish()
        log.event("skipped", step=last - 1, loss=1.0, grad_norm=1.0)  # this is no point of a curve
        log.event("eval", step=last, val_loss=7.0)
        size = log.num_bytes  # a checkpoint comes before what a resumed run makes again
        log.event("hellaswag", step=last, hellaswag=0.25)
        log.event("samples", step=last, texts=[])
        return size


def test_loggers_get_the_curves_and_go_on_in_the_same_place(tmp_path: Path, monkeypatch):
    wandb, trackio = (StandIn(name) for name in ("wandb", "trackio"))
    for module in (wandb, trackio):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    size = log_steps(tmp_path, ["csv", "wandb", "trackio", "csv"], 0, 2)
    log_steps(tmp_path, ["csv"], 2, 4, keep_bytes=size)
    # Back to the checkpoint of step 2; what follows it must be there once.
    log_steps(tmp_path, ["csv", "wandb", "trackio"], 2, 4, keep_bytes=size)
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()
    names = [json.loads(line).get("event") for line in kept]
    again = ["hellaswag", "samples"]
    steps = [None, None, "skipped", "eval"]
    assert names == [*steps, "hellaswag", *steps, *again]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    # Start and end of each line; an evaluation comes before the step with its number.
    want = """0,9.0,0.5 .. | 1,8.0,0.5 .. | 2,,, .. ,7.0, | 2,,, .. ,,0.25
        | 2,7.0,0.5 .. | 3,6.0,0.5 .. | 4,,, .. ,7.0, | 4,,, .. ,,0.25"""
    ends = [each.strip().partition(" ..") for each in want.split("|")]
    for line, (start, _, end) in zip(lines[1:], ends, strict=True):
        assert line.startswith(start)
        assert line.endswith(end.strip())
    ident = (tmp_path / "log-id").read_text()
    assert [run["id"] for run in wandb.opened] == [ident] * 2
    assert [run["name"] for run in trackio.opened] == [f"{tmp_path.name}-{ident}"] * 2
    assert {(run["resume"], run["config"]["seed"]) for run in wandb.opened} == {("allow", 3)}
    assert wandb.opened[0]["mode"] == "offline"  # no account, and nobody to ask
    assert wandb.rows[2] == ({"step": 2, "val_loss": 7.0},)
    assert trackio.rows[0][1] == 0
    assert trackio.rows[3] == ({"hellaswag": 0.25}, 2)
    assert wandb.finished == trackio.finished == 2
    log_steps(tmp_path, ["wandb"], 0, 1)  # a fresh start
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
        asked = train.parse(["--preset", "smoke", flag, "csv,wandb,"])
        assert asked.loggers == ["csv", "wandb"]
    with pytest.raises(ValueError, match=r"log: must be one of tensorboard, .*, csv, got 'wandbb'"):
        check_loggers(["csv", "wandbb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="log: trackio is not installed; pip install trackio"):
        check_loggers(["trackio"])
