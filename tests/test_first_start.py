"""First and second start of a run on a device: ops are checked, timed, and compared with eager."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
import train
from kernels import EAGER
from kernels._op import INTERPRETED
from model import GPT
from tests.tuned import CONFIG, H100, REAL_CHILD, Crew, of_triton, plan_of
from tests.tuned import small as small
from training import child, choose, state, timing, trials, verify
from training.distributed import ALONE
from training.plan import Plan
from training.resume import RunFailed

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Train on ids below CONFIG's 250, without the samples, which need the whole vocabulary."""
    np.save(tmp_path / "corpus.npy", (np.arange(600) * 7 % 50).astype(np.uint16))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    runs: list[int] = []

    def begin(*flags: str) -> int:
        runs.append(len(runs))
        paths = [f"--data={tmp_path / 'corpus.npy'}", f"--out={tmp_path / f'run{len(runs)}'}"]
        fixed = "--preset smoke --val-fraction 0 --block-size 16 --save-every 0"
        return train.main([*fixed.split(), *paths, *flags])

    return begin


def test_an_interpreted_run_is_checked_once_and_by_its_first_batch(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(verify, "COMMAND", REAL_CHILD)
    ops = "eager,layer_norm=triton,gelu_mlp=triton"
    flags = "--device cpu --dtype fp32 --no-compile --batch-size 1 --steps 1 --ops".split()
    flags.append(ops)
    assert start(*flags) == 0
    out = capsys.readouterr().out
    assert "kernels: checking 2 ops on " in out
    assert " s, all right; kept in " in out
    # The second start asks no child; its first batch shows what the verdict does not know.
    monkeypatch.setattr(verify, "ask_children", None)
    wrong = of_triton(gelu_mlp=lambda x, *rest: x + EAGER.gelu_mlp(x, *rest))
    monkeypatch.setattr(Plan, "op_set", property(lambda _: wrong))
    assert start(*flags) == 1
    said = capsys.readouterr()
    assert "were checked on " in said.out
    line = f"train.py: ops: {ops} is wrong on this device: the first micro-batch has "
    assert said.err.startswith(line)
    assert said.err.endswith("; go on with --ops eager\n")


def test_a_first_and_a_second_start_on_a_pretended_gpu(
    start, pretended, monkeypatch, capsys, tmp_path
):
    off = partial(lambda *args, **kwargs: 1.01 * EAGER.gelu_mlp(*args, **kwargs))
    monkeypatch.setitem(kernels.BACKENDS, "triton", lambda: of_triton(gelu_mlp=off))
    monkeypatch.setitem(kernels.BACKENDS, "compiled", of_triton)
    monkeypatch.setattr(child, "Crew", Crew)
    monkeypatch.setitem(trials.NUM_RERUNS, "cuda", 0)
    # Each is replayed, and then gets a time from this table.
    ms = {"triton": 1.0, "eager": 2.0, "compiled": 1.01, "sdpa-cudnn": 0.9, "sdpa-flash": 0.5}
    replayed: list[str] = []

    def interleave(replays: Any, **_: Any) -> dict[str, timing.Timing]:
        replayed.extend(name for name, replay in replays.items() if replay.once() > 0)
        return {name: timing.Timing([ms[name]] * 4, "graph") for name in replays}

    monkeypatch.setattr(timing, "interleave", interleave)
    here_alone = nullcontext(SimpleNamespace(map=map))  # only this thread has the pretended device
    monkeypatch.setattr(choose, "ThreadPoolExecutor", lambda _: here_alone)
    flags = ["--batch-size", "2", "--save-every", "1", "--steps"]
    run, said = ["--out", str(tmp_path / "run")], []

    def get_ptxas(arch: int) -> Any:  # each triton has a rule of its own
        return SimpleNamespace(path=f"/bin/the one for sm_{arch}", version="13.1.80")

    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", get_ptxas)
    with monkeypatch.context() as here:
        here.setitem(state._GENERATORS, "cuda0?", state._GENERATORS["cpu"])  # the pretended one's
        for steps_, *more in (["2", *run], ["1"], ["3", *run, "--override"]):
            assert start(*flags, steps_, *more) == 0
            said.append(capsys.readouterr().out)
            ms["triton"] = 9.0  # on another day it might be slow
        next((tmp_path / "cache").rglob("choice-*")).unlink()
        here.setattr(torch, "__version__", "9.9")
        assert start(*flags, "4", *run, "--override") == 0
    said.append(capsys.readouterr().out)
    assert start(*flags, "1", "--ops", "triton") == 1
    failed = capsys.readouterr().err
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
    assert config["versions"]["assembler"] == "the one for sm_90 13.1.80"
    # Every backend that can run was timed, once; the answer holds for this card and versions.
    assert {*replayed, "sdpa-cudnn"} == {*ms}  # the CPU may refuse it
    assert f"tune: timing the ways to compute a step on {name}; takes up to a minute" in first
    assert "tune: measured in " in first
    assert "causal_attention sdpa-flash 0.5 ms (triton 1, eager 2, compiled 1.01" in first
    assert "tune: timing" not in second + third
    assert "tune: measured before, see " in second
    assert f"resume: on this card as before: ops {ops}, compile True, " in third
    assert "resume: torch was " in fourth
    assert ", now '9.9': the plan is chosen anew\n" in fourth
    assert "resume: another plan (ops was " in fourth
    assert "tune: measured in " in config["plan"]["notes"][-1]
    assert config["plan"]["ops"].startswith("compiled,")


def test_a_first_batch_that_differs_is_trained_by_eager_ops(
    pretended, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, plan = GPT(CONFIG), plan_of(H100, dtype="auto")
    rows = torch.arange(48).view(3, 16), torch.arange(1, 49).view(3, 16)
    ops = of_triton()
    monkeypatch.setattr(Plan, "op_set", property(lambda _: ops))

    def compared(asked: str = "auto") -> Plan:
        return verify.compare_first_batch(model, plan, lambda: rows, asked, ALONE)

    assert compared() == plan
    assert model.ops is ops is model.transformer.h[0].mlp.ops  # pyright: ignore
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    # Where not all rows fit, it takes fewer.
    tried: list[int] = []

    def narrow(*args: Any) -> Tensor:
        tried.append(len(args[0]))
        if len(args[0]) == 3:
            raise torch.OutOfMemoryError
        return EAGER.causal_attention(*args)

    ops = of_triton(causal_attention=narrow)
    assert compared() == plan
    assert tried == [3, 1]
    plan = replace(plan, recompute=True)  # nor does it keep what the run's steps do not
    assert compared() == plan
    assert tried[2:] == [3, 1, 1]
    ops = of_triton(linear_cross_entropy=lambda *args: 1.05 * EAGER.linear_cross_entropy(*args))
    with pytest.raises(RunFailed, match=r"^ops: triton is wrong .*; go on with --ops eager$"):
        compared("triton")
    found = compared()
    assert (found.ops, model.ops) == ("eager", EAGER)
    assert "going on with eager ops" in capsys.readouterr().out
    assert "the first micro-batch has " in found.notes[-1]
    # Weights that are not finite are not the ops' fault. Eager ops are not compared at all.
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))  # pyright: ignore
    assert compared() == plan
    ops = EAGER
    assert compared() == plan
