"""What a run checks before it trusts the kernels: faults planted in ops, children and the cache."""

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import kernels
import train
from kernels import EAGER, OPS, Ops, _launch
from kernels._op import INTERPRETED
from model import GPT, GPTConfig
from model.config import MODELS
from tests.pretend_cuda import pretend_cuda
from training import child, choose, kernel_check, timing, trials, verify
from training.distributed import ALONE, World
from training.machines import Machine
from training.plan import Choices, Plan, make_plan
from training.recipes import Recipe
from training.resume import RunFailed

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")

# Narrow, and of few words: the interpreter takes a minute for 50,257.
CONFIG = GPTConfig(block_size=16, vocab_size=250, n_layer=1, n_head=1, n_embd=64)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 90, has_bf16=True, memory_bytes=80 << 30)
CPU = Machine("cpu", "a CPU", num_threads=2, interpreted=True, memory_bytes=8 << 30)
RECIPE = Recipe(model="smoke", max_lr=1e-3, min_lr=1e-4, warmup_steps=2, max_steps=3, batch_size=3,
                block_size=16)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A small "smoke", a cache of its own, and no trace of what a run switches on."""
    monkeypatch.setitem(MODELS, "smoke", CONFIG)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verify, "nvidia_smi", lambda *_: {"driver_version": "580.1"})
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore


def plan_of(machine: Machine = CPU, **asked: Any) -> Plan:
    return make_plan(RECIPE, machine, Choices(**{"dtype": "fp32", "compile": False, **asked}))


# ---- one op


class Scaled(torch.autograd.Function):
    """Right values, gradients that are not."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore
        return 1.01 * dy


def with_nan(y: Tensor) -> Tensor:
    lane = torch.zeros_like(y)
    lane.view(-1)[7] = float("nan")
    return y + lane


def detached(y: Tensor) -> Tensor:
    return y.detach() + 0 * y.sum().requires_grad_()


calls: list[int] = []


def once_different(y: Tensor) -> Tensor:
    calls.append(len(calls))
    return y * (1 + 2**-22 * (len(calls) == 3))


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "wrong by 1%": (lambda y: 1.01 * y, "y: error"),
    "NaN in one lane": (with_nan, "y: error nan"),
    "right forward, wrong gradient": (Scaled.apply, "dqkv: error"),
    "wrong at the run's shape alone": (lambda y: y * (1.01 if y.shape[:2] == (3, 16) else 1), "y:"),
    "memory that nobody wrote to": (lambda y: y + 0 * torch.empty_like(y), "y: error nan"),
    "another dtype": (lambda y: y.double(), "y: there is none that is (3, 16, 64), torch.float32"),
    "other bits now and then": (once_different, "y: other bits when it is run again"),
}  # fmt: skip


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any], *names: str) -> None:
    """The ops of Triton are eager ones, with a fault."""

    def wrong(name: str) -> Any:
        return lambda *args, **kwargs: fault(getattr(EAGER, name)(*args, **kwargs))

    ops = replace(EAGER, **{name: wrong(name) for name in names})
    monkeypatch.setattr(kernel_check, "parse_ops", lambda _: ops)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_check.NUM_RERUNS, "cpu", 2)
    calls.clear()
    fault, said = FAULTS[name]
    planted(monkeypatch, fault, "causal_attention")
    assert kernel_check.check("causal_attention", RECIPE, plan_of()).startswith(said)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_eager_ops_pass_and_a_hundredth_is_noticed_in_each(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "EXACT_BYTES", 1)  # row by row
    monkeypatch.setitem(kernel_check.NUM_RERUNS, "cpu", 1)
    recipe = RECIPE
    plan = make_plan(recipe, CPU, Choices(dtype=dtype, ops="eager"))  # pyright: ignore
    both: dict[str, Callable[[Any], Any]] = dict.fromkeys(
        ("add_layer_norm", "embedding"),
        lambda out: ((1.01 * out[0], *out[1:]), (Scaled.apply(out[0]), *out[1:])),
    )
    for op in OPS:
        planted(monkeypatch, lambda y: y)
        assert kernel_check.check(op, recipe, plan) == ""
        for which, name in enumerate(("y", "d")):
            fault = both.get(op, lambda y: (1.01 * y, Scaled.apply(y)))
            planted(monkeypatch, lambda y, fault=fault, which=which: fault(y)[which], op)
            said = kernel_check.check(op, recipe, plan)
            assert "over budget" in said, (op, name)
            assert said[0] in (name, "l", "d"), said


@pytest.mark.slow  # half a minute in the interpreter
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_own_kernels_pass(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel_check.NUM_RERUNS, "cpu", 1)
    choices = Choices(ops="triton", optimizer="triton", dtype=dtype)  # pyright: ignore
    plan = replace(make_plan(RECIPE, CPU, choices), working_copies=dtype == "bf16")
    assert verify.checked_names(plan) == (*OPS, "adamw")
    for name in verify.checked_names(plan):
        assert kernel_check.check(name, RECIPE, plan) == "", name


def test_what_float64_says_does_not_depend_on_how_the_batch_is_cut() -> None:
    recipe, plan = replace(RECIPE, batch_size=5), replace(plan_of(), micro_batch_size=5)
    for op in OPS:
        *_, exact = kernel_check._runs_of(op, recipe, plan)
        fn, tensors, douts, _ = exact.args  # pyright: ignore
        whole, cut = (kernel_check.exact_values(fn, tensors, douts, n) for n in (5, 2))
        assert whole.keys() == cut.keys()
        for key, value in whole.items():
            torch.testing.assert_close(cut[key], value, rtol=1e-12, atol=1e-14, msg=f"{op} {key}")


@pytest.mark.parametrize("fault", ["", "moment", "copy", "norm"])
def test_adamw_is_checked_likewise(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure = kernel_check.configure_adamw

    def ours(model: GPT, recipe: Recipe, kind: str) -> Any:
        optimizer = configure(model, recipe, "torch")
        step, clip = optimizer.step, optimizer.clip

        def spoilt(closure: Any = None, skip: Any = None) -> None:
            step()
            with torch.no_grad():
                if fault == "moment":
                    optimizer.state[next(model.parameters())]["exp_avg_sq"][1] *= 1.01
                if fault == "copy":
                    next(iter(optimizer.copies.values()))[3] *= 1.02

        if kind == "triton":
            optimizer.step = spoilt
            optimizer.clip = lambda max_norm: clip(max_norm) * (1.0001 if fault == "norm" else 1)
        return optimizer

    monkeypatch.setattr(kernel_check, "configure_adamw", ours)
    plan = replace(plan_of(dtype="bf16"), working_copies=True)
    said = {"moment": "weights: error", "copy": "copies: error", "norm": "norm: error"}
    assert kernel_check.check("adamw", RECIPE, plan).startswith(said.get(fault, ""))
    assert bool(fault) == bool(kernel_check.check("adamw", RECIPE, plan))


# ---- children

# Without torch, which would take seconds: the name is the first word of a pickled task.
CHILD = """
import os, sys, time
from multiprocessing.connection import Connection

pipe = Connection(int(os.environ["CHILD_PIPE"]))
pipe.send("ready")
while True:
    task = pipe.recv_bytes()
    if b"add_layer_norm" in task:
        os.abort()
    if b"gelu_mlp" in task:
        time.sleep(600)
    if b"causal_attention" in task:
        sys.exit("CompilationError: at 3:4")
    if b"linear_cross_entropy" in task:
        pipe.send({"error": "CUDA out of memory", "short": True})
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
        "add_layer_norm": "its process: it ended with -6: nothing said",
        "gelu_mlp": "its process: no answer in _ s: nothing said",
        "causal_attention": "its process: it ended with 1: CompilationError: at 3:4",
        "linear_cross_entropy": "its process: CUDA out of memory",
    }
    why = {name: why.partition("; `make")[0] for name, why in found.items()}
    assert {name: re.sub(r"in \d+ s", "in _ s", line) for name, line in why.items()} == wrong
    assert said[0].startswith("kernels: checking 6 ops and AdamW on NVIDIA H100 80GB HBM3, this")
    path = verify.cache_path(verify.key_of(RECIPE, plan, H100))
    assert said[1].endswith(f" s, 4 wrong; kept in {path}")
    # Time and memory may be short for once; the rest is known.
    kept = json.loads(path.read_text())["wrong"]
    assert kept.keys() == {"layer_norm", "add_layer_norm", "embedding", "causal_attention", "adamw"}


def test_a_child_says_what_an_op_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    task = partial(trials.check_op, "gelu_mlp", RECIPE, plan_of())
    planted(monkeypatch, fails, "gelu_mlp")
    with pytest.raises(SystemExit, match=r"^RuntimeError: CUDA error: an illegal memory access"):
        trials.answer(task)
    planted(monkeypatch, lambda _: short(), "gelu_mlp")
    assert trials.answer(task) == {"error": "full", "short": True}


def short() -> Any:
    raise torch.OutOfMemoryError("full")


# ---- the cache


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What children were asked for, who find gelu_mlp wrong."""
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
    # Other ops at the same shapes: what is not known is asked.
    values["wrong"].pop("layer_norm")
    path.write_text(json.dumps(values))
    verify.find_wrong(RECIPE, replace(plan, ops="eager,gelu_mlp=triton"), H100, said.append)
    assert len(asked) == 1
    verify.find_wrong(RECIPE, plan, H100, said.append)
    assert asked[1:] == [("layer_norm",)]
    assert json.loads(path.read_text())["wrong"].keys() == {*OPS, "adamw"}
    # Whatever a verdict depends on is another file.
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


@pytest.mark.parametrize("spoil", [
    b"", b"{", b"\xff\xfe", b"[1]", b'{"key": 1}', b"[" * 100_000, b'{"key": {}, "wrong": {}}',
    "wrong",
])  # fmt: skip
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
    (tmp_path / "cache").write_text("a file")  # as a read-only folder, for whoever is root too
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


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = [None] * count

    def one(i: int) -> None:
        found[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,), name=str(i)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_processes_at_once_keep_one_whole_file(asked: list[Any]) -> None:
    plan = plan_of(H100, dtype="auto")
    path = verify.cache_path(verify.key_of(RECIPE, plan, H100))
    found = in_threads(8, lambda _: verify.find_wrong(RECIPE, plan, H100, lambda _: None))
    assert [[*each] for each in found] == [["gelu_mlp"]] * 8
    assert [*path.parent.iterdir()] == [path]
    assert json.loads(path.read_text())["wrong"]["gelu_mlp"]


# ---- what a plan makes of it


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
    # What the plan itself leaves to eager code stays there, and its reason stays said.
    wide = replace(RECIPE, model="smoke,dropout=0.1")
    plan = settled({"gelu_mlp": "y: error 1"}, monkeypatch, wide)
    assert plan.ops == "triton,gelu_mlp=eager,causal_attention=eager"
    assert any(note.startswith("causal_attention eager: ") for note in plan.notes)
    plan = settled(dict.fromkeys((*OPS, "adamw"), "it ended"), monkeypatch)
    assert (plan.ops, plan.optimizer) == ("eager", "torch")
    assert sum("fails its check" in note for note in plan.notes) == 7
    plan = settled({"gelu_mlp": "off"}, monkeypatch, ops="eager", optimizer="torch")
    assert plan.ops == "eager"  # nothing was asked


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


# ---- whole runs


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains on ids below CONFIG's 250, up to the samples, which need the whole vocabulary."""
    np.save(tmp_path / "corpus.npy", (np.arange(600) * 7 % 50).astype(np.uint16))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    runs: list[int] = []

    def begin(*flags: str) -> int:
        runs.append(len(runs))
        return train.main([
            "--preset", "smoke", "--data", str(tmp_path / "corpus.npy"), "--val-fraction", "0",
            "--block-size", "16", "--save-every", "0", "--out", str(tmp_path / f"run{len(runs)}"),
            *flags,
        ])  # fmt: skip

    return begin


def wrong_loss(*args: Any, **kwargs: Any) -> Tensor:
    return 1.05 * EAGER.linear_cross_entropy(*args, **kwargs)


# A child as a run starts it, but for the vocabulary, and bf16 that rounds as hardware does.
REAL_CHILD = """
from tests import interpreter, test_verify

interpreter.install()
test_verify.MODELS["smoke"] = test_verify.CONFIG
test_verify.child.serve(0, test_verify.trials.answer)
"""


def test_an_interpreted_run_is_checked_once_and_by_its_first_batch(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(verify, "COMMAND", (sys.executable, "-c", REAL_CHILD))
    ops = "eager,layer_norm=triton,gelu_mlp=triton"
    flags = ["--device", "cpu", "--ops", ops, "--dtype", "fp32", "--no-compile",
             "--batch-size", "1", "--steps", "1"]  # fmt: skip
    assert start(*flags) == 0
    out = capsys.readouterr().out
    assert "kernels: checking 2 ops on " in out
    assert " s, all right; kept in " in out
    # The second start asks nobody; what no verdict knew, its first batch shows.
    monkeypatch.setattr(verify, "ask_children", None)
    wrong = replace(EAGER, layer_norm=partial(EAGER.layer_norm),
                    gelu_mlp=lambda x, *rest: x + EAGER.gelu_mlp(x, *rest))  # fmt: skip
    monkeypatch.setattr(Plan, "op_set", property(lambda _: wrong))
    assert start(*flags) == 1
    said = capsys.readouterr()
    assert "were checked on " in said.out
    line = f"train.py: ops: {ops} is wrong on this device: the first micro-batch has "
    assert said.err.startswith(line)
    assert said.err.endswith("; go on with --ops eager\n")


class Crew(child.Crew):
    """Its children are this process: a pretended device is nowhere else."""

    def share(self, tasks: Any, *_: Any) -> Any:
        return [trials.answer(task) for task in tasks]

    def ask(self, task: Any, *_: Any) -> dict[str, Any]:
        return trials.answer(task)


def of_triton(**changed: Callable[..., Any]) -> Ops:
    """Eager ops that pass for Triton's, which take seconds a step in the interpreter."""
    calls = {name: partial(getattr(EAGER, name)) for name in OPS}
    return Ops(**{**calls, **changed})


def test_a_first_and_a_second_start_on_a_pretended_gpu(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:  # fmt: skip
    off = partial(lambda *args, **kwargs: 1.01 * EAGER.gelu_mlp(*args, **kwargs))
    monkeypatch.setitem(kernels.BACKENDS, "triton", lambda: of_triton(gelu_mlp=off))
    monkeypatch.setitem(kernels.BACKENDS, "compiled", of_triton)
    monkeypatch.setattr(child, "Crew", Crew)
    monkeypatch.setitem(kernel_check.NUM_RERUNS, "cuda", 0)
    # Each is replayed, and then has the time that decides: as one card or another might.
    for name, value in {"MAX_SETS": 1, "MIN_GRAPH_CALLS": 1, "SPIN_SIZE": 8,
                        "SPIN_SECONDS": 0.0}.items():  # fmt: skip
        monkeypatch.setattr(timing, name, value)
    ms = {"triton": 1.0, "eager": 2.0, "compiled": 1.01, "sdpa-flash": 0.5}
    replayed: list[str] = []

    def interleave(replays: Any, **_: Any) -> dict[str, timing.Timing]:
        replayed.extend(name for name, replay in replays.items() if replay.once() > 0)
        return {name: timing.Timing([ms[name]] * 4, "graph") for name in replays}

    monkeypatch.setattr(timing, "interleave", interleave)
    here_alone = nullcontext(SimpleNamespace(map=map))  # a pretended device is of this thread
    monkeypatch.setattr(choose, "ThreadPoolExecutor", lambda _: here_alone)
    timing.capture_stream.cache_clear()
    flags = ["--batch-size", "2", "--save-every", "1", "--steps"]
    run, said = ["--out", str(tmp_path / "run")], []
    _launch.arch.cache_clear()
    with pretend_cuda():
        with monkeypatch.context() as here:
            here.setattr(torch.cuda, "get_rng_state_all", list)  # there are none to go back to
            for steps_, *more in (["2", *run], ["1"], ["3", *run, "--override"]):
                assert start(*flags, steps_, *more) == 0
                said.append(capsys.readouterr().out)
                ms["triton"] = 9.0  # as another day might have it
            next((tmp_path / "cache").rglob("choice-*")).unlink()
            here.setattr(torch, "__version__", "9.9")
            assert start(*flags, "4", *run, "--override") == 0
        said.append(capsys.readouterr().out)
        assert start(*flags, "1", "--ops", "triton") == 1
        failed = capsys.readouterr().err
    _launch.arch.cache_clear()
    timing.capture_stream.cache_clear()
    first, second, third, fourth = said
    name = "NVIDIA H100 80GB HBM3"
    assert f"kernels: checking 6 ops and AdamW on {name}, this once; takes about a" in first
    assert " s, 1 wrong; kept in " in first
    assert f"kernels: 6 ops and AdamW were checked on {name} before; see " in second
    ops = "triton,gelu_mlp=compiled,causal_attention=sdpa-flash"
    assert f"ops {ops}, bf16 with bf16 working copies, " in third
    for out in (first, second):
        assert f"ops {ops}, bf16 with bf16 working copies, " in out
        assert f"ops: not our gelu_mlp, which fails its check on {name}: " in out
    assert f"train.py: ops: not our gelu_mlp, which fails its check on {name}: " in failed
    assert failed.endswith("; go on with --ops auto\n")
    assert not (tmp_path / "run5").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["versions"]["assembler"].startswith("ptxas 1")
    # Timed once, by every backend that can run; the answer holds where card and versions do.
    assert {*replayed} == {*ms}
    assert f"tune: timing what a step can be made of on {name}; takes up to a minute" in first
    assert "tune: measured in " in first
    assert "causal_attention sdpa-flash 0.5 ms (triton 1, eager 2, compiled 1.01); " in first
    assert "tune: timing" not in second + third
    assert "tune: measured before, see " in second
    assert f"resume: on this card as before: ops {ops}, compile True, " in third
    assert "resume: torch was " in fourth
    assert ", now '9.9': the plan is chosen anew\n" in fourth
    assert "resume: another plan (ops was " in fourth
    assert "tune: measured in " in config["plan"]["notes"][-1]
    assert config["plan"]["ops"].startswith("compiled,")


def test_a_first_batch_that_differs_is_trained_by_eager_ops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, plan = GPT(CONFIG), plan_of(H100, dtype="auto")
    rows = torch.arange(48).view(3, 16), torch.arange(1, 49).view(3, 16)
    ops = of_triton()
    monkeypatch.setattr(Plan, "op_set", property(lambda _: ops))

    def compared(asked: str = "auto") -> Plan:
        with pretend_cuda():
            return verify.compare_first_batch(model, plan, lambda: rows, asked, ALONE)

    assert compared() == plan
    assert model.ops is ops is model.transformer.h[0].mlp.ops  # pyright: ignore
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    # Fewer rows where all do not fit.
    tried: list[int] = []

    def narrow(*args: Any) -> Tensor:
        tried.append(len(args[0]))
        return EAGER.causal_attention(*args) if len(args[0]) < 3 else short()

    ops = of_triton(causal_attention=narrow)
    assert compared() == plan
    assert tried == [3, 1]
    ops = of_triton(linear_cross_entropy=wrong_loss)
    with pytest.raises(RunFailed, match=r"^ops: triton is wrong .*; go on with --ops eager$"):
        compared("triton")
    found = compared()
    assert (found.ops, model.ops) == ("eager", EAGER)
    assert "going on with eager ops" in capsys.readouterr().out
    assert "the first micro-batch has " in found.notes[-1]
    # Weights that are beyond help are not the ops' fault; and eager ops are not compared at all.
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))  # pyright: ignore
    assert compared() == plan
    ops = EAGER
    assert compared() == plan
