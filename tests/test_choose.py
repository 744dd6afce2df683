"""What a run takes by time is decided from numbers, measured by children and kept in a file."""

import json
import sys
import threading
import tomllib
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from kernels import read_ops
from kernels._op import INTERPRETED
from model import GPT
from tests.pretend_cuda import pretend_cuda
from tests.test_plan import MACHINES
from tests.tuned import CPU, H100, REAL_CHILD, RECIPE, in_threads
from tests.tuned import small as small
from training import choose, probe, resume, trials
from training.checkpoint import Checkpoint
from training.choose import AS_CHOSEN, COMMITTED, STEP
from training.distributed import ALONE, World
from training.machines import Machine
from training.plan import Choices, Plan, make_plan
from training.state import made_on

CARDS = {
    **{name: MACHINES[name] for name in ("A100", "H100", "H200", "4090", "3090", "T4")},
    "MI300X": replace(H100, name="AMD Instinct MI300X", arch=94, rocm=True),
    "B300": replace(H100, name="NVIDIA B300", arch=103),
}
# Invented figures, so that each rule shows at one op.
MS = tomllib.loads("""
layer_norm = {triton = 1.0, eager = 3.0, compiled = 0.99}  # too small a gain
add_layer_norm = {triton = 1.0, eager = 3.0, compiled = 0.9}
embedding = {triton = 1.0, eager = 3.0, compiled = 1.5}
gelu_mlp = {triton = 1.0, eager = 0.8, compiled = 0.7}
causal_attention = {triton = 1.0, eager = 1.1, compiled = 1.2, sdpa-flash = 0.9, sdpa-cudnn = 0.6}
linear_cross_entropy = {triton = 1.0, eager = 3.0, compiled = 1.5}
""")
BEST = "triton,add_layer_norm=compiled,gelu_mlp=compiled,causal_attention=sdpa-cudnn"
NEW, PLAIN = read_ops(BEST), read_ops("compiled,causal_attention=eager")
UP, NORM = "gelu_mlp.up", "layer_norm.fwd"
ROW = '["{}", "16-bit", "large", 90, "3.7", {{BLOCK_M = 64}}, 4, {}, 0, 1, "here"],'
UP_ROWS, NORM_ROWS = ([ROW.format(k, i) for i in range(1, 5)] for k in ("up", "fwd"))
ROWS = f"[measured]\ngelu_mlp = [\n    {UP_ROWS[2]}\n]\n"  # the fastest row that `measured` has


def samples(ms: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    return {what: {name: [x] * 5 for name, x in of.items()} for what, of in ms.items()}


@pytest.mark.parametrize("card", CARDS)
def test_each_card_takes_what_is_fastest_of_what_it_can_run(card: str) -> None:
    machine = CARDS[card]
    plan = make_plan(RECIPE, machine)
    old = card in ("T4", "MI300X")  # neither our kernels nor SDPA's run there
    taken = choose.choose(plan, machine, samples(MS | {STEP: {AS_CHOSEN: 5.0, "other": 4.0}}))
    assert taken == (PLAIN if old else NEW) | {STEP: "other"}
    assert choose.choose(plan, machine, {}) == read_ops(plan.ops) | {STEP: AS_CHOSEN}
    bare = replace(machine, missing_tools=("g++",))
    assert "compiled" not in choose.choose(plan, bare, samples(MS)).values()


@pytest.mark.parametrize(
    ("rival", "taken"),
    [
        ([0.97] * 8, True),
        ([0.985] * 8, False),  # under 2%
        ([0.5, 0.5, 1.3, 1.3] * 2, False),  # it loses half of the turns
        ([0.0] * 8, False),
        ([-1.0] * 8, False),
        ([float("nan")] * 8, False),
        ([0.5] * 7 + [float("inf")], False),
        ([1e-4] * 8, False),  # nothing was captured
        ([], False),
    ],
)
def test_only_a_gain_beyond_noise_changes_anything(rival: list[float], taken: bool) -> None:
    times = {"gelu_mlp": {"triton": [1.0] * 8, "compiled": rival}}
    found = choose.choose(make_plan(RECIPE, H100), H100, times)
    assert found["gelu_mlp"] == ("compiled" if taken else "triton")
    # If the present one could not be timed, none counts as faster.
    lost = {"gelu_mlp": {"triton": [float("nan")], "compiled": rival}}
    assert choose.choose(make_plan(RECIPE, H100), H100, lost)["gelu_mlp"] == "triton"


def test_what_is_asked_for_is_no_question() -> None:
    def names(**asked: Any) -> list[str]:
        wishes, make = Choices(**asked), partial(make_plan, RECIPE, H100)
        return [*choose.step_plans(make, wishes, make(wishes), H100, {})]

    every = [AS_CHOSEN, "blocks not compiled", "PyTorch's AdamW", "plain PyTorch, compiled"]
    assert names() == every
    assert names(compile=True) == every[:1] + every[2:3]
    assert names(ops="triton", optimizer="torch") == every[:2]


# ---- children

# It does without torch: it finds the kind of task and the op in the pickled bytes.
CHILD = """
import os, sys, time
from multiprocessing.connection import Connection

pipe = Connection(int(os.environ["CHILD_PIPE"]))
while True:
    task = pipe.recv_bytes()
    build = b"\\x05build" in task  # the word, not a part of one
    if b"add_layer_norm" in task and build:
        os.abort()
    if b"gelu_mlp" in task and not build:
        time.sleep(600)
    if b"causal_attention" in task and not build:
        sys.exit("illegal memory access")
    if b"linear_cross_entropy" in task:
        pipe.send({"error": "out of memory"})
    elif build:
        pipe.send({"failed": {"eager": "RuntimeError: no"}})
    else:
        pipe.send({"ms": {"triton": [1.0], "compiled": [0.1235]}, "failed": {}})
"""


def test_a_child_that_is_lost_costs_its_op_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "COMMAND", (sys.executable, "-S", "-E", "-c", CHILD))
    monkeypatch.setattr(choose, "TIME_S", 3.0)
    plan = make_plan(RECIPE, H100)
    ms, failed = choose._time_ops(choose.rivals(plan, H100), RECIPE, plan, 60.0)
    assert {op: of for op, of in ms.items() if of} == {
        op: {"triton": [1.0], "compiled": [0.1235]} for op in ("layer_norm", "embedding")
    }
    assert {op: of["all"].partition(":")[0] for op, of in failed.items() if "all" in of} == {
        "add_layer_norm": "it ended with -6",
        "gelu_mlp": "no answer in 3 s",
        "causal_attention": "it ended with 1",
        "linear_cross_entropy": "out of memory",
    }
    assert failed["layer_norm"] == {"eager": "RuntimeError: no"}


def test_a_step_that_cannot_be_timed_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"ms": [5.0, 5.0]}, {"error": "it ended with -9"}, {"ms": [4.0, 4.0]}])
    monkeypatch.setattr(choose.child.Crew, "ask", lambda *_: next(answers))
    plan = make_plan(RECIPE, H100)
    ms, failed = choose._time_steps({AS_CHOSEN: plan, "a": plan, "b": plan}, RECIPE, 60.0)
    assert (ms, failed) == ({AS_CHOSEN: [5.0, 5.0], "b": [4.0, 4.0]}, {"a": "it ended with -9"})
    monkeypatch.undo()
    assert choose._time_steps({"a": plan}, RECIPE, -1.0) == ({}, {"a": "no time left"})


def test_a_step_is_timed_as_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "MAX_STEPS", 2)
    plan = make_plan(RECIPE, H100, Choices(ops="eager", optimizer="torch"))
    models: list[weakref.ref[GPT]] = []
    configure = probe.configure_adamw

    def configured(model: GPT, *how: Any) -> Any:
        assert all(earlier() is None for earlier in models)  # the device may lack room for both
        models.append(weakref.ref(model))
        return configure(model, *how)

    monkeypatch.setattr(probe, "configure_adamw", configured)
    with pretend_cuda() as pretended:
        found, again = (trials.answer(partial(trials.time_step, RECIPE, plan)) for _ in range(2))
    assert "error" not in again
    assert len(found["ms"]) == 2
    assert min(found["ms"]) > 0
    assert len(pretended.graphs) == 2  # replayed


@pytest.mark.skipif(not INTERPRETED, reason="kernels on CPU tensors")
def test_the_interpreter_is_timed_as_a_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child, real kernels, real clocks; interpreted, ours lose by a lot."""
    monkeypatch.setattr(choose, "COMMAND", REAL_CHILD)
    plan = make_plan(RECIPE, CPU, Choices(ops="triton", dtype="fp32", compile=False))
    monkeypatch.setattr(choose, "TIME_S", 300.0)
    names = {"causal_attention": ["triton", "eager", "sdpa-flash", "no such"]}
    ms, failed = choose._time_ops(names, RECIPE, plan, 600.0)
    assert {*ms["causal_attention"]} == {"triton", "eager", "sdpa-flash"}
    assert all(len(of) >= 3 for of in ms["causal_attention"].values())
    assert failed["causal_attention"]["no such"].startswith("ValueError: ops: cannot read")
    monkeypatch.setattr(choose, "MAX_GAIN", float("inf"))
    assert choose.choose(plan, CPU, ms)["causal_attention"] == "eager"


# ---- the answer


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The threads that measured; a step is fastest with PyTorch's AdamW."""
    asked: list[Any] = []

    def time_ops(names: Any, recipe: Any, plan: Plan, _: float) -> Any:
        asked.append(threading.current_thread().name)
        return samples(MS), {"layer_norm": {}}

    def time_launches(*_: Any) -> Any:
        up = dict(zip(UP_ROWS, (1.0, 0.9, 0.8, 0.99), strict=True))
        return samples({UP: up, NORM: dict(zip(NORM_ROWS, (1.0, 0.99), strict=False))})

    def time_steps(plans: dict[str, Plan], *_: Any) -> Any:
        assert plans[AS_CHOSEN].ops == BEST
        assert plans[AS_CHOSEN].optimizer == "triton"
        with_rows = {name for name, plan in plans.items() if plan.launches == ROWS}
        assert with_rows == plans.keys() - {COMMITTED, "plain PyTorch, compiled"}
        return {name: [4.0 if "AdamW" in name else 5.0] * 3 for name in plans}, {}

    monkeypatch.setattr(choose, "_time_ops", time_ops)
    monkeypatch.setattr(choose, "time_launches", time_launches)
    monkeypatch.setattr(choose, "find_wrong", lambda *_: {})
    monkeypatch.setattr(choose, "_time_steps", time_steps)
    return asked


def taken(asked: Choices = Choices(), world: World = ALONE, machine: Machine = H100) -> Plan:  # noqa: B008
    def make(choices: Choices) -> Plan:
        return make_plan(RECIPE, machine, choices)

    return choose.take_fastest(make, asked, make(asked), RECIPE, machine, world)


def answers(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache").rglob("choice-*")]


def test_an_answer_is_kept_and_read(
    measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = taken(Choices(tune="on"))
    assert read_ops(first.ops) == NEW
    assert (first.optimizer, first.launches) == ("torch", ROWS)
    [path] = answers(tmp_path)
    assert first.notes[-1].startswith(f"tune: measured in 0 s, kept in {path}: ")
    assert ": gelu_mlp.up row 2 0.8 ms (as committed 1, row 1 0.9, row 3 0.99); " in first.notes[-1]
    assert "layer_norm.fwd as committed 1 ms (row 1 0.99); layer_norm triton 1" in first.notes[-1]
    assert "step PyTorch's AdamW 4 ms (as chosen 5, " in first.notes[-1]
    text = path.read_text()
    assert '"sdpa-cudnn": [0.6, 0.6, 0.6, 0.6, 0.6]' in text.replace("[ ", "[").replace(" ]", "]")
    rows = {UP: UP_ROWS[2], NORM: NORM_ROWS[0]}
    assert json.loads(text)["chosen"] == NEW | rows | {STEP: "PyTorch's AdamW"}
    second = taken()
    assert replace(second, notes=()) == replace(first, notes=())
    assert second.notes[-1].startswith(f"tune: measured before, see {path}: ")
    assert len(measured) == 1
    # On first use, which may take a minute, only ops are timed.
    path.unlink()
    short = taken()
    assert (short.ops, short.optimizer, short.launches) == (first.ops, "triton", "")
    more = "; `make tune` also searches launch rows and times whole steps: layer_norm triton 1 ms"
    assert more in short.notes[-1]
    assert "step" not in short.notes[-1].partition("too: ")[2]
    assert taken(Choices(tune="off")) == make_plan(RECIPE, H100, Choices(tune="off"))
    taken(Choices(tune="on"))
    taken(Choices(compile=True))  # it asks for something else
    assert taken(machine=CPU) == make_plan(RECIPE, CPU)
    assert len(measured) == 4
    assert len(answers(tmp_path)) == 2
    said = capsys.readouterr().out
    assert said.count("tune: timing the ways to compute a step on ") == 4
    # `make tune`
    taken(Choices(tune="only"))
    said = capsys.readouterr().out
    _, head, *rows = said.splitlines()
    assert head == f"tune: measured in 0 s, kept in {path}"
    assert [row.split()[:4] for row in rows[2:4]] == [
        ["layer_norm", "triton", "1", "ms"],
        ["add_layer_norm", "compiled", "0.9", "ms"],
    ]
    assert rows[2].endswith("(eager 3, compiled 0.99)")
    assert said.endswith(f"CONTRIBUTING.md says how to send these rows:\n{ROWS}\n")


def test_rows_that_a_kernel_is_wrong_with_or_a_step_slower_are_not_taken(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def checked(recipe: Any, plan: Plan, *_: Any) -> dict[str, str]:
        assert plan.launches == ROWS
        return {"gelu_mlp": "y: error 1"}

    def time_steps(plans: dict[str, Plan], *_: Any) -> Any:
        seen.append([*plans])
        return {name: [1.0 if name == COMMITTED else 5.0] * 3 for name in plans}, {}

    seen: list[list[str]] = []
    monkeypatch.setattr(choose, "_time_steps", time_steps)
    assert (taken(Choices(tune="on")).launches, taken().launches) == ("", "")
    assert COMMITTED in seen[0]
    with monkeypatch.context() as here:
        here.setattr(choose, "find_wrong", checked)
        assert taken(Choices(tune="on")).launches == ""
    assert COMMITTED not in seen[1]
    assert "tune: the launch rows are not changed: y: error 1\n" in capsys.readouterr().out


SPOILT: list[Any] = [b"{", 3, {STEP: 3}, {UP: {"a": [1.0]}}, {UP: {NORM_ROWS[0]: [1.0]}}]
SPOILT += [{UP: {UP_ROWS[0] + "\n": [1.0]}}]
SPOILT += [{STEP: {AS_CHOSEN: of}} for of in (["a"], None, [10**400])]


@pytest.mark.parametrize("spoil", SPOILT)
def test_an_answer_that_cannot_be_used_is_made_anew(
    spoil: Any, measured: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    want = taken()
    [path] = answers(tmp_path)
    good = path.read_bytes()
    if not isinstance(spoil, bytes):
        spoil = json.dumps(json.loads(good) | {"ms": spoil}).encode()
    path.write_bytes(spoil)
    assert replace(taken(), notes=()) == replace(want, notes=())
    assert f"; {path} cannot be used: " in capsys.readouterr().out
    assert json.loads(path.read_bytes())["ms"] == json.loads(good)["ms"]
    # A file that the user names is not overwritten.
    mine = tmp_path / "mine.json"
    mine.write_bytes(spoil)
    with pytest.raises(ValueError, match=f"^tune_file: {mine} cannot be used: .*; name another"):
        taken(Choices(tune_file=str(mine)))
    assert mine.read_bytes() == spoil


def test_where_an_answer_is_kept(measured: list[Any], tmp_path: Path) -> None:
    asked = Choices(tune_file=str(tmp_path / "a.json"))
    assert f"kept in {tmp_path / 'a.json'}; " in taken(asked).notes[-1]
    assert f"measured before, see {tmp_path / 'a.json'}: " in taken(asked).notes[-1]
    with pytest.raises(ValueError, match="version, shape or choice of flags; name another"):
        taken(replace(asked, compile=True))
    assert len(measured) == 1
    # Like a read-only folder, but root cannot write to it either.
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        made = taken()
        assert read_ops(made.ops) == NEW
        assert "not kept: " in made.notes[-1]
    assert len(measured) == 3


def test_rank_0_measures_and_tells(measured: list[Any]) -> None:
    store = dist.HashStore()
    made = in_threads(2, lambda rank: taken(world=World(rank, 2, rank, store)))
    assert measured == ["0"]
    assert made[0] == made[1]
    assert read_ops(made[0].ops) == NEW
    assert made[0].optimizer == "triton"  # one rank alone does not time a step of several


# ---- going on


def test_a_checkpoint_s_choice_goes_on_where_it_was_made() -> None:
    plan = make_plan(RECIPE, H100, Choices(ops="compiled", optimizer="torch"))
    state = {"plan": vars(plan), "recipe": vars(RECIPE), "made_on": made_on(H100.name)}
    saved = Checkpoint(1, {}, state)
    kept, [line] = resume.adopt(saved, Choices(), RECIPE, H100)
    same = {"compile_scope": "blocks", "recompute": False, "micro_batch_size": 3}
    assert kept == {"ops": "compiled", "compile": True, "optimizer": "torch", **same}
    assert line.startswith("resume: on this card as before: ops compiled, compile True, ")
    made = make_plan(RECIPE, H100, Choices().or_else(kept))
    assert replace(made, notes=()) == replace(plan, notes=())
    # What the user asks for comes first; on another card, or with --tune on, all is chosen anew.
    kept, _ = resume.adopt(saved, Choices(ops="eager", micro_batch_size=1), RECIPE, H100)
    assert {*kept} == {"compile", "compile_scope", "recompute", "optimizer"}
    other = replace(H100, name="NVIDIA A100")
    kept, [line] = resume.adopt(saved, Choices(), RECIPE, other)
    assert kept == {}
    assert line == f"resume: card was '{H100.name}', now 'NVIDIA A100': the plan is chosen anew"
    nothing: Any = ({}, [])
    assert resume.adopt(saved, Choices(tune="on"), RECIPE, H100) == nothing
    assert resume.adopt(saved, Choices(), RECIPE, CPU) == nothing
    assert resume.adopt(saved, Choices(), replace(RECIPE, batch_size=6), H100) == nothing
    assert resume.adopt(None, Choices(), RECIPE, H100) == nothing
    # Launch rows of this card are kept, unless they cannot be read.
    odd = ("[measured", "measured = 3", "[measured]\ngelu_mlp = 3")
    for text in (ROWS, *odd, "sources = 3\n[measured]\ngelu_mlp = [[3]]"):
        state["plan"] = vars(replace(plan, launches=text))
        kept, _ = resume.adopt(saved, Choices(), RECIPE, H100)
        assert kept.pop("launches", None) == (text if text == ROWS else None)
        assert Choices().or_else(kept) == Choices().or_else(kept | {"launches": text})
    # A checkpoint may come from a stranger.
    state["plan"] = {"ops": 3, "compile": "yes", "micro_batch_size": 0.5, "optimizer": "sgd"}
    state["plan"] |= {"compile_scope": "all"}
    assert resume.adopt(saved, Choices(), RECIPE, H100) == nothing
