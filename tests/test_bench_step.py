"""Whole steps: which contestants are compared, which take turns, and what memory allows."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import contestants, record, step
from bench.cases import Shape
from bench.contestants import Setup
from bench.record import StepRow
from bench.tables import step_table
from model import GPTConfig
from training.child import ChildDied
from training.plan import Choices
from training.step import TrainStep

CPU = torch.device("cpu")
SETUP = Setup("smoke", Shape(2, 16), accum=2)
TINY = GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=2, n_embd=32)
GIB = 1 << 30
RIGHT = SETUP.row("", losses=[10.8, 10.7], grad_norm=4.0, first_step_s=0.5, peak_gib=2.0)
RIGHT = replace(RIGHT, tokens=SETUP.tokens)


class Machine:
    """Contestants that only report a time, on a machine with `total_gib` of memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total_gib: float, seconds: float = 0.0):
        self.total, self.seconds = total_gib * GIB, seconds
        self.now = 0.0
        self.alive: dict[str, int] = {}
        self.events: list[str] = []
        self.ms = {"a": 100.0, "b": 50.0, "c": 25.0, "d": 200.0, "e": 10.0}
        self.warm = {name: replace(RIGHT, provider=name) for name in self.ms}
        monkeypatch.setattr(
            step.machines, "free_bytes", lambda: int(self.total - sum(self.alive.values()))
        )
        monkeypatch.setattr(step.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Setup, "need_bytes", 2 * GIB)
        monkeypatch.setattr(step, "start_worker", self.start)

    def start(self, name: str, setup: Setup, limit_s: float) -> Any:
        self.events.append(f"+{name}")
        self.now += min(self.seconds, limit_s)
        if self.seconds > limit_s:
            raise ChildDied(f"no answer in {limit_s:.0f} s: compiling")
        self.alive[name] = 2 * GIB
        return FakeRunner(self, name), self.warm[name]

    def measure(self, names: str, deadline: float = 1e9) -> dict[str, StepRow]:
        rows = {}
        for row in step.measure_cpu([*names], SETUP, 1.0, deadline):
            self.events.append(f"row {row.provider}")
            rows[row.provider] = row
        assert not self.alive
        return {row.provider: row for row in step.with_ratios(rows)}


class FakeRunner:
    def __init__(self, machine: Machine, name: str):
        self.machine, self.name = machine, name

    def ask(self, task: str, limit_s: float) -> float:
        return self.machine.ms[self.name]

    def end(self) -> None:
        self.machine.events.append(f"-{self.name}")
        del self.machine.alive[self.name]


@pytest.fixture(autouse=True)
def rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "RIVALS", ("a", "d"))


def test_each_takes_turns_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 5)  # each takes 2 GiB, and one more needs 1.15 times that
    rows = machine.measure("abcd")
    assert machine.events == [
        *("+a", "row a", "+b", "-b", "row b", "+c", "-c", "row c", "+d", "-d", "row d", "-a")
    ]
    assert rows["b"].over == {"a": 2.0, "d": 4.0}  # d's by way of a: they never ran side by side
    assert rows["a"].over == {"a": 1.0, "d": 2.0}


def test_one_at_a_time_where_two_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3)
    rows = machine.measure("abc")
    assert machine.events == [
        *("+a", "row a", "-a", "+b", "-b", "row b", "+a", "-a", "+c", "-c", "row c"),
    ]
    assert rows["c"].over == {"a": 4.0}


def test_what_fits_nowhere_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1.5)
    rows = machine.measure("ab")
    assert machine.events == ["row a", "row b"]
    assert rows["a"].doubt == "needs about 2.0 GiB of memory, 1.5 are free"
    assert rows["b"].doubt == step.NO_REFERENCE


def test_it_ends_within_the_time_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 100, seconds=100.0)
    rows = machine.measure("abcde", deadline=1000.0)
    assert not any(row.doubt for row in rows.values())
    assert machine.now <= 1000.0
    machine = Machine(monkeypatch, 3, seconds=100.0)  # one at a time takes longer
    rows = machine.measure("abcde", deadline=550.0)
    assert machine.now <= 550.0
    assert [rows[name].ms for name in "abc"] == [100.0, 50.0, 25.0]
    assert all("no answer in" in rows[name].doubt for name in "de")
    late = Machine(monkeypatch, 100)
    late.now = 2.0
    assert "no time left" in late.measure("a", deadline=1.0)["a"].doubt


def test_a_contestant_is_held_against_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 100)
    machine.warm["b"] = replace(RIGHT, provider="b", losses=[10.8, 10.9])
    machine.warm["c"] = replace(RIGHT, provider="c", grad_norm=float("nan"))
    rows = machine.measure("abcd")
    assert rows["b"].doubt == "warm loss 10.9000, reference 10.7000, tolerance 0.1"
    assert rows["c"].doubt.startswith("gradient norm nan")
    assert not rows["d"].doubt
    assert not {"b", "c"} & {*rows["d"].over}
    text = step_table([*rows.values()])
    assert "not shown: gradient norm nan" in text
    assert text.count("not shown") == 2


def test_rows_state_what_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Machine(monkeypatch, 100).measure("a")["a"]
    assert row.tokens == 64
    assert row.tokens_per_s == 640.0
    assert (row.losses, row.grad_norm, row.peak_gib) == ([10.8, 10.7], 4.0, 2.0)
    assert row.tflops_palm == pytest.approx(row.tflops_llmc, rel=0.1)


def test_workers_live_in_processes_of_their_own() -> None:
    worker, row = step.start_worker("eager fp32", SETUP, 120.0)
    assert worker.process.pid != os.getpid()
    assert worker.ask("step", 60.0) > 0
    worker.end()
    _, here = contestants.prepare("eager fp32", SETUP, CPU)
    assert row.losses == pytest.approx(here.losses, rel=1e-5)
    assert row.first_step_s > 0
    assert 0.1 < (row.peak_gib or 0) < 8


def test_our_contestant_takes_the_trainer_s_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = contestants.Ours(SETUP, CPU, Choices(compile=False, dtype="fp32"))
    assert isinstance(ours.take_step, TrainStep)
    assert ours.take_step.plan.micro_batch_size == 2 * SETUP.shape.B  # merged, as in training
    _, plain = contestants.prepare("eager fp32", SETUP, CPU)
    monkeypatch.setattr(contestants, "find_provider", lambda *_: lambda *_: ours)
    _, found = contestants.prepare("ours fp32", SETUP, CPU)
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)  # its softmax has no padding
    assert found.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3)


def test_a_wrong_model_shows_in_its_gradient_where_its_loss_is_right(monkeypatch) -> None:
    monkeypatch.setitem(contestants.MODELS, "test", TINY)
    setup = Setup("test", Shape(2, 16), accum=2)
    _, right = contestants.prepare("eager fp32", setup, CPU)
    build = contestants.known_providers(CPU)["eager fp32"]

    def other_weights(setup: Setup, device: torch.device) -> contestants.Plain:
        contestant = build(setup, device)
        assert isinstance(contestant, contestants.Plain)
        for p in contestant.model.parameters():
            p.data.mul_(1.5)
        return contestant

    monkeypatch.setattr(contestants, "find_provider", lambda *_: other_weights)
    _, wrong = contestants.prepare("eager fp32", setup, CPU)
    assert step.disagreement(right, right) == ""
    assert step.disagreement(wrong, right).startswith("gradient norm")


# A model of nanoGPT's interface: constructor arguments, names of weights, (logits, loss).
NANOGPT = """
from dataclasses import dataclass
from bench.baseline import BaselineGPT
from model import GPTConfig as G
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int
    dropout: float; bias: bool
class GPT(BaselineGPT):
    def __init__(self, c):
        super().__init__(G(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd))
    def forward(self, idx, targets):
        return None, super().forward(idx, targets)
"""


def test_nanogpt_is_a_model_by_path(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"no such file.*git clone"):
        contestants.load_nanogpt(tmp_path / "model.py")
    (tmp_path / "model.py").write_text("GPT = None\n")
    with pytest.raises(ValueError, match=r"model.py does not define GPTConfig$"):
        contestants.load_nanogpt(tmp_path)
    (tmp_path / "model.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match="cannot be imported: No module named 'no_such_package'"):
        contestants.load_nanogpt(tmp_path)
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setitem(contestants.MODELS, "test", TINY)
    contestants.weights.cache_clear()
    setup = Setup("test", Shape(2, 16), nanogpt=tmp_path)
    _, theirs = contestants.prepare("nanogpt eager fp32", setup, CPU)
    _, plain = contestants.prepare("eager fp32", setup, CPU)
    assert theirs.losses == pytest.approx(plain.losses, abs=1e-5)
    assert contestants.weights.cache_info().misses == 1  # for all
    assert "lm_head.weight" not in contestants.weights(setup.config)


def test_each_row_is_written_as_it_comes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 3)  # one at a time
    results = record.open_result(CPU, tmp_path, commit="c" * 40)
    written: list[int] = []

    def start(*args: Any) -> Any:
        written.append(len(record.load(results.path).rows("step")) if written else 0)
        return machine.start(*args)

    results.write()
    monkeypatch.setattr(step, "start_worker", start)
    step.run("abc", SETUP, CPU, results, seconds=1.0, minutes=1.0)
    assert written == [0, 1, 2, 2]
    assert record.load(results.path).rows("step")[1].over == {"a": 2.0}
