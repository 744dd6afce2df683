"""The check of the kernels before a run: lost children, the cache, the plan that follows."""

import json
import os
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kernels import OPS
from kernels._op import INTERPRETED
from model import GPT
from tests.tuned import CONFIG, H100, RECIPE, in_threads, plan_of
from tests.tuned import small as small
from training import verify
from training.distributed import ALONE, World
from training.machines import Machine
from training.plan import Choices, Plan, make_plan
from training.recipes import Recipe
from training.resume import RunFailed

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")

# It does without torch, which takes seconds to import, and finds the op in the pickled bytes.
CHILD = """
import os, sys, time
from multiprocessing.connection import Connection
from pathlib import Path

alone = Path(os.environ["XDG_CACHE_HOME"] + "-alone")
pipe = Connection(int(os.environ["CHILD_PIPE"]))
while True:
    task = pipe.recv_bytes()
    if b"add_layer_norm" in task:
        os.abort()
    if b"layer_norm" in task:
        sys.exit("CUDA-capable device(s) is/are busy or unavailable")
    if b"gelu_mlp" in task:
        time.sleep(600)
    if b"causal_attention" in task:
        sys.exit("CompilationError: at 3:4")
    if b"embedding" in task and not alone.exists():
        alone.touch()
        sys.exit("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    if b"linear_cross_entropy" in task:
        pipe.send({"error": "CUDA out of memory"})
    else:
        pipe.send({"why": ""})
"""


def test_a_child_that_is_lost_costs_its_op_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(verify, "LIMIT_S", 10.0)
    plan = plan_of(H100, dtype="auto")
    said: list[str] = []
    found = verify.find_wrong(RECIPE, plan, H100, said.append)
    wrong = {
        "layer_norm": "its process: it ended with 1: CUDA-capable device(s) is/are busy or "
        "unavailable",
        "add_layer_norm": "its process: it ended with -6: it printed nothing",
        "gelu_mlp": "its process: no answer in _ s: it printed nothing",
        "causal_attention": "its process: it ended with 1: CompilationError: at 3:4",
        "linear_cross_entropy": "its process: CUDA out of memory",
    }
    why = {name: why.partition("; `make")[0] for name, why in found.items()}
    assert {name: re.sub(r"in \d+ s", "in _ s", line) for name, line in why.items()} == wrong
    assert said[0].startswith("kernels: checking 6 ops and AdamW on NVIDIA H100 80GB HBM3, this")
    path = verify.cache_path(verify.key_of(RECIPE, plan, H100))
    assert said[1].endswith(f" s, 5 wrong; kept in {path}")
    # A lack of time or memory may pass, and so may a card that takes one process; none is kept.
    kept = json.loads(path.read_text())["wrong"]
    assert kept.keys() == {"add_layer_norm", "embedding", "causal_attention", "adamw"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The names that children were asked about; they find gelu_mlp wrong."""
    found: list[tuple[str, ...]] = []

    def ask(names: tuple[str, ...], recipe: Recipe, plan: Plan) -> dict[str, str]:
        found.append(names)
        return {name: "y: error 1" * (name == "gelu_mlp") for name in names}

    monkeypatch.setattr(verify, "ask_children", ask)
    return found


def test_a_verdict_is_kept_for_its_key(asked: list[Any]) -> None:
    said: list[str] = []
    plan = plan_of(H100, dtype="auto")
    path = verify.cache_path(verify.key_of(RECIPE, plan, H100))
    for _ in range(2):
        found = verify.find_wrong(RECIPE, plan, H100, said.append)
        more = f"`make test OP=gelu_mlp` shows more, without {path} it is checked again"
        assert found == {"gelu_mlp": f"y: error 1; {more}"}
    assert asked == [(*OPS, "adamw")]
    assert said[1].endswith(f" s, 1 wrong; kept in {path}")
    assert said[2] == f"kernels: 6 ops and AdamW were checked on {H100.name} before; see {path}"
    values = json.loads(path.read_text())
    assert values["key"]["card"] == H100.name
    assert values["wrong"]["gelu_mlp"] == "y: error 1"
    # With other ops at the same shapes, children are asked only about unknown ones.
    values["wrong"].pop("layer_norm")
    path.write_text(json.dumps(values))
    verify.find_wrong(RECIPE, replace(plan, ops="eager,gelu_mlp=triton"), H100, said.append)
    assert len(asked) == 1
    verify.find_wrong(RECIPE, plan, H100, said.append)
    assert asked[1:] == [("layer_norm",)]
    assert json.loads(path.read_text())["wrong"].keys() == {*OPS, "adamw"}
    # Each thing that a verdict depends on leads to another file.
    others = [
        (RECIPE, plan, replace(H100, name="NVIDIA A100")),
        (replace(RECIPE, block_size=8), plan, H100),
        (RECIPE, replace(plan, micro_batch_size=1), H100),
        (RECIPE, replace(plan, dtype="fp32"), H100),
        (replace(RECIPE, model="smoke,n_layer=2"), plan, H100),
    ]
    paths = {verify.cache_path(verify.key_of(*other)) for other in others}
    assert len(paths - {path}) == len(others)


@pytest.mark.parametrize("what", ["driver", "torch", "triton", "assembler", "sources"])
def test_versions_are_part_of_the_key(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = plan_of(H100, dtype="auto")
    before = verify.cache_path(verify.key_of(RECIPE, plan, H100))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "layer_norm.py").write_text("another")
    changes: dict[str, tuple[Any, str, Any]] = {
        "driver": (verify, "nvidia_smi", lambda *_: {"driver_version": "590.2"}),
        "torch": (torch, "__version__", "9.9"),
        "triton": (verify, "package_version", lambda _: "9.9"),
        "assembler": (verify, "assembler", lambda: "ptxas 13.9"),
        "sources": (verify, "ROOT", tmp_path),
    }
    monkeypatch.setattr(*changes[what])
    assert verify.cache_path(verify.key_of(RECIPE, plan, H100)) != before


SPOILT: list[Any] = [b"", b"{", b"\xff\xfe", b"[1]", b"[" * 100_000]
SPOILT += [b'{"key": 1}', b'{"key": {}, "wrong": {}}', "wrong"]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_cannot_be_used_is_made_anew(spoil: Any, asked: list[Any]) -> None:
    said: list[str] = []
    plan = plan_of(H100, dtype="auto")
    key = verify.key_of(RECIPE, plan, H100)
    path = verify.cache_path(key)
    path.parent.mkdir(parents=True)
    if isinstance(spoil, str):
        spoil = json.dumps({"key": key, "wrong": 3}).encode()
    path.write_bytes(spoil)
    assert "gelu_mlp" in verify.find_wrong(RECIPE, plan, H100, said.append)
    assert f"; {path} cannot be used: " in said[0]
    verify.find_wrong(RECIPE, plan, H100, said.append)
    assert len(asked) == 1


def test_a_cache_that_cannot_be_written_costs_a_line(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Like a read-only folder, but root cannot write to it either.
    (tmp_path / "cache").write_text("a file")
    said: list[str] = []
    for _ in range(2):
        verify.find_wrong(RECIPE, plan_of(H100, dtype="auto"), H100, said.append)
    assert len(asked) == 2
    assert "1 wrong; not kept: " in said[1]
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as homeless:
        homeless.setattr(os.path, "expanduser", lambda path: path)
        verify.find_wrong(RECIPE, plan_of(H100, dtype="auto"), H100, said.append)
    assert said[-1].endswith("not kept: this user has no home directory; set XDG_CACHE_HOME")
    assert not (tmp_path / "~").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verify.cache_path({}).parent == tmp_path / ".cache" / "fused-gpt"


def test_two_processes_at_once_keep_one_whole_file(asked: list[Any]) -> None:
    plan = plan_of(H100, dtype="auto")
    path = verify.cache_path(verify.key_of(RECIPE, plan, H100))
    found = in_threads(8, lambda _: verify.find_wrong(RECIPE, plan, H100, lambda _: None))
    assert [[*each] for each in found] == [["gelu_mlp"]] * 8
    assert [*path.parent.iterdir()] == [path]
    assert json.loads(path.read_text())["wrong"]["gelu_mlp"]


def settled(
    wrong: dict[str, str], monkeypatch: pytest.MonkeyPatch, recipe: Recipe = RECIPE, **asked: str
) -> Plan:
    choices = Choices(compile=False, **asked)  # pyright: ignore
    rounds: list[Plan] = []

    def find(_: Recipe, plan: Plan, machine: Machine, say: Any) -> dict[str, str]:
        rounds.append(plan)
        return {name: why for name, why in wrong.items() if name in verify.checked_names(plan)}

    monkeypatch.setattr(verify, "find_wrong", find)
    plan = verify.settle(lambda c: make_plan(recipe, H100, c), choices, recipe, H100, ALONE)
    assert len(rounds) <= 2
    return plan


def test_auto_goes_on_without_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = settled({}, monkeypatch)
    assert (plan.ops, plan.optimizer) == ("triton", "triton")
    plan = settled({"gelu_mlp": "y: error 1"}, monkeypatch)
    assert (plan.ops, plan.optimizer) == ("triton,gelu_mlp=eager", "triton")
    line = f"ops: not our gelu_mlp, which fails its check on {H100.name}: y: error 1"
    assert plan.notes[-1] == line
    plan = settled({"adamw": "norm: error 1"}, monkeypatch)
    assert (plan.ops, plan.optimizer) == ("triton", "torch")
    # Ops that the plan itself left to eager code stay eager, and the note about them stays.
    wide = replace(RECIPE, model="smoke,dropout=0.1")
    plan = settled({"gelu_mlp": "y: error 1"}, monkeypatch, wide)
    assert plan.ops == "triton,gelu_mlp=eager,causal_attention=eager"
    assert any(note.startswith("causal_attention eager: ") for note in plan.notes)
    plan = settled(dict.fromkeys((*OPS, "adamw"), "it ended"), monkeypatch)
    assert (plan.ops, plan.optimizer) == ("eager", "torch")
    assert sum("fails its check" in note for note in plan.notes) == 7
    plan = settled({"gelu_mlp": "off"}, monkeypatch, ops="eager", optimizer="torch")
    assert plan.ops == "eager"  # there was nothing to check


def test_what_was_asked_for_by_name_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunFailed, match=r"^ops: not our gelu_mlp, .* off; go on with --ops auto"):
        settled({"gelu_mlp": "y: off"}, monkeypatch, ops="triton")
    with pytest.raises(RunFailed, match=r"^optimizer: not our adamw.* with --optimizer auto"):
        settled({"adamw": "y: off"}, monkeypatch, optimizer="triton")
    asked = "triton,gelu_mlp=eager"
    assert settled({"gelu_mlp": "y: off"}, monkeypatch, ops=asked).ops == asked


def test_rank_0_checks_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(recipe: Recipe, plan: Plan, machine: Machine, say: Any) -> dict[str, str]:
        asked.append(threading.current_thread().name)
        return {"gelu_mlp": "y: off"}

    def difference(*_: Any) -> str:
        return "the first micro-batch is off" * (threading.current_thread().name == "1")

    monkeypatch.setattr(verify, "find_wrong", find)
    monkeypatch.setattr(verify, "_difference", difference)
    store = dist.HashStore()

    def settle(rank: int) -> list[Plan]:
        world = World(rank, 2, rank, store)
        plan = verify.settle(lambda c: make_plan(RECIPE, H100, c), Choices(), RECIPE, H100, world)
        plan = replace(plan, device="cpu")
        rows = torch.zeros(1, 1), torch.zeros(1, 1)
        after = verify.compare_first_batch(GPT(CONFIG), plan, lambda: rows, "auto", world)
        return [plan, after]

    plans = in_threads(2, settle)
    assert asked == ["0"]
    assert plans[0] == plans[1]
    assert [plan.ops for plan in plans[0]] == ["triton,gelu_mlp=eager", "eager"]
