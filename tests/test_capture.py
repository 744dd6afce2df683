"""The step as one CUDA graph: what it may not do, what it costs in bits, and when it fails."""

import contextlib
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import train
from kernels import EAGER, reference
from model import GPT
from tests.pretend_cuda import HOST_READS, pretend_cuda
from tests.test_step import (
    RECIPE,
    GuardedStep,
    choices,
    interpreted_only,
    loader,
    make_step,
    open_batches,
    plain_loop,
    run,
    worst,
)
from training import metrics
from training.data import Prefetcher
from training.guard import Guard
from training.optim import configure_adamw
from training.plan import Choices, detect, make_plan
from training.step import NUM_WARMUP


class Recorder(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def persistent(step: GuardedStep) -> dict[str, Tensor]:
    assert step.guard is not None
    found = {"idx": step.idx, "targets": step.targets, "lr": step.lr, **step.guard.tensors()}
    for i, state in enumerate(step.optimizer.state.values()):
        found |= {f"{i}.{key}": value for key, value in state.items()}
    found |= {f"copy {name}": copy for name, copy in step.copies.items()}
    return found | dict(step.model.named_parameters())


@interpreted_only
@pytest.mark.parametrize("optimizer", ["torch", "triton"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_can_be_captured(
    dtype: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the CPU the ids are looked at, which no capture would allow; on CUDA they are not.
    monkeypatch.setattr(reference, "check_ids", lambda *_: None)
    step = make_step(choices(dtype=dtype, optimizer=optimizer))
    with contextlib.closing(open_batches(step)) as batches:
        for s in range(NUM_WARMUP):
            step(batches, RECIPE.learning_rate(s))
        before = {name: (t.data_ptr(), t.clone()) for name, t in persistent(step).items()}
        first_rows = step.idx.clone()
        with Recorder() as recorder:
            step(batches, RECIPE.learning_rate(NUM_WARMUP))
    after = persistent(step)
    assert {n: a for n, (a, _) in before.items()} == {n: t.data_ptr() for n, t in after.items()}
    assert not torch.equal(step.idx, first_rows)  # the rows were copied into the same buffer
    changed = [n for n, (_, old) in before.items() if not torch.equal(old, after[n])]
    assert set(changed) >= {"transformer.wte.weight", "lr", "losses", "0.exp_avg"}
    assert not {*recorder.names} & HOST_READS
    assert "copy_" in recorder.names  # it did see the step


def test_the_recorder_sees_a_host_read() -> None:
    with Recorder() as recorder:
        torch.ones(()).item()
    assert "_local_scalar_dense" in recorder.names


def test_what_cannot_be_captured_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    refused = RuntimeError("operation not permitted when stream is capturing\nmore")
    step = captured_by(refused, make_step(choices(dtype="fp32")), monkeypatch)
    expected, _ = plain_loop("fp32", 6)
    assert worst(run(step, 6), expected) <= 1e-5
    assert not step.plan.cuda_graph
    assert (
        "cuda graph: the step cannot be captured (operation not permitted when stream is "
        "capturing); going on without"
    ) in capsys.readouterr().out


def test_another_capture_comes_after_a_step_without_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Only such a step can pin the memory that an upload needs."""
    step = make_step(choices(dtype="fp32", ops="eager"))
    averaging = Mock(overlaps=True, finish=lambda values: values.unbind())
    step.averaging = averaging
    step = captured_by(RuntimeError("refused"), step, monkeypatch)
    captures = []
    with contextlib.closing(open_batches(step)) as batches:
        for _ in range(NUM_WARMUP + 3):
            step(batches, 1e-3)
            captures.append(step.num_captures)
    assert captures == [0] * NUM_WARMUP + [1, 2, 2]
    assert averaging.overlaps
    said = capsys.readouterr().out
    assert "cuda graph: not with the collectives (refused); trying all but them" in said
    assert "the step cannot be captured (refused); going on without" in said


@interpreted_only
def test_a_failed_capture_leaves_its_pool_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def end(*_: Any) -> None:
        calls.append("end")

    def end_again(*_: Any) -> None:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: calls.append("release"))
    for closing, expected in ((end, ["end", "release"]), (end_again, [])):
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", closing)
        calls.clear()
        with pretend_cuda(), monkeypatch.context() as patched:
            step = make_step(choices(dtype="fp32"))
            run(captured_by(RuntimeError("refused"), step, patched), NUM_WARMUP + 1)
        assert calls == expected  # a second release would end the process


@pytest.mark.parametrize(
    "short",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),  # in making the graph, not a tensor
    ],
)
def test_memory_that_runs_out_in_the_capture_halves_the_batch(
    short: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    step = make_step(choices(dtype="fp32", micro_batch_size=8))
    step = captured_by(short, step, monkeypatch)
    expected, _ = plain_loop("fp32", NUM_WARMUP + 2)
    assert worst(run(step, NUM_WARMUP + 2), expected) <= 1e-5
    assert (step.plan.micro_batch_size, step.plan.cuda_graph) == (4, True)
    assert step.warm_steps == 2  # the smaller shape warms up before it is captured
    assert "memory: 8 rows at once do not fit, going on with 4" in capsys.readouterr().out


@interpreted_only
def test_what_a_failed_capture_held_is_free_before_the_batch_is_halved() -> None:
    held: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    def attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        if torch.cuda.is_current_stream_capturing() and len(qkv) > 4:
            activations = torch.ones(3)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return EAGER.causal_attention(qkv, n_head, dropout_p)

    with pretend_cuda():
        made = make_plan(RECIPE, detect("cuda"), choices(dtype="fp32", ops="eager"))
        model = GPT(
            replace(RECIPE.model_config, vocab_size=500), replace(EAGER, causal_attention=attention)
        )
        optimizer = configure_adamw(model, RECIPE, "torch")
        step = GuardedStep(model, optimizer, RECIPE, made, say=lambda _: None)
        halve = step._halve
        step._halve = lambda: (freed.append(held[0]() is None), halve())[1]
        run(step, NUM_WARMUP + NUM_WARMUP + 2)
        assert step.graph  # of the halved batch
    assert freed == [True]


def captured_by(
    error: Exception, step: GuardedStep, monkeypatch: pytest.MonkeyPatch
) -> GuardedStep:
    """A step whose capture ends in `error`."""

    @contextlib.contextmanager
    def refuse(*_: Any, **__: Any):
        yield
        raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # What a capture records it does not execute.
    monkeypatch.setattr(step, "_capture", undone(step, step._capture))
    step.plan = replace(step.plan, cuda_graph=True)
    return step


def undone(step: GuardedStep, capture: Callable[[Any], None]) -> Callable[[Any], None]:
    def call(once: Any) -> None:
        before = {name: t.detach().clone() for name, t in persistent(step).items()}
        capture(once)
        with torch.no_grad():
            for name, t in persistent(step).items():
                t.copy_(before[name])

    return call


def assert_capture_changes_no_bit(asked: Choices, muon: bool = False) -> None:
    """Steps as one CUDA graph and launch by launch: losses and weights are the same bits."""
    found, recipe = [], replace(RECIPE, muon=muon)
    for graph in (False, True):
        torch.manual_seed(recipe.seed)
        made = make_plan(recipe, detect("cuda"), replace(asked, cuda_graph=graph))
        model = GPT(replace(recipe.model_config, vocab_size=500), made.op_set).to("cuda")
        made_optimizer = configure_adamw(model, recipe, made.optimizer)
        said: list[str] = []
        step = GuardedStep(model, made_optimizer, recipe, made, say=said.append)
        step.guard = Guard("cuda")
        with contextlib.closing(Prefetcher(loader(recipe, 8), "cuda")) as batches:
            losses = [step(batches, recipe.learning_rate(s)).loss.clone() for s in range(7)]
        assert bool(step.graph) == graph, said
        found.append((torch.stack(losses), [p.detach().clone() for p in model.parameters()]))
    (plain, weights), (captured, same) = found
    assert len(set(plain.tolist())) == len(plain)  # a replay on stale rows or weights would repeat
    assert torch.equal(plain, captured)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["torch", "triton", "muon"])
def test_a_captured_step_changes_no_bit(optimizer: Any) -> None:
    muon, whose = optimizer == "muon", optimizer.replace("muon", "torch")
    assert_capture_changes_no_bit(choices(dtype="bf16", ops="triton", optimizer=whose), muon)


@interpreted_only
@pytest.mark.parametrize(
    ("dtype", "optimizer", "micro"),
    [
        ("fp32", "torch", 8),
        ("bf16", "torch", 2),
        ("bf16", "triton", 2),
        pytest.param("fp32", "triton", 8, marks=pytest.mark.slow),
        ("bf16", "muon", 2),
    ],
)
def test_a_capture_by_the_rules_of_cuda_changes_no_bit(
    dtype: Any, optimizer: Any, micro: int
) -> None:
    muon, whose = optimizer == "muon", optimizer.replace("muon", "torch")
    asked = choices(dtype=dtype, ops="eager", optimizer=whose, micro_batch_size=micro)
    with pretend_cuda() as pretended:
        assert_capture_changes_no_bit(asked, muon)
    assert len(pretended.graphs) == 1


@interpreted_only
def test_the_step_of_train_py_is_captured_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "finish", lambda *_: None)  # samples have graphs of their own
    (tmp_path / "text.txt").write_text("the king said that no man shall want for bread " * 40)
    asked = (
        "--preset smoke --model smoke,n_layer=1,n_embd=16,n_head=1 --steps 6 --batch-size 2 "
        "--block-size 16 --grad-accum-steps 2 --device cuda --ops eager --optimizer torch "
        "--micro-batch-size 2 --save-every 0 --data"
    ).split()
    text = str(tmp_path / "text.txt")
    found = []
    for graph in ("on", "off"):
        with pretend_cuda() as pretended:
            out = tmp_path / graph
            assert train.main([*asked, text, "--cuda-graph", graph, "--out", str(out)]) == 0
        steps = metrics.read_metrics(out / "metrics.jsonl")[0]
        found.append([(step["loss"], step["grad_norm"]) for step in steps])
        assert len(pretended.graphs) == (graph == "on"), capsys.readouterr().out
    assert len({*found[0]}) == 6
    assert found[0] == found[1]


@interpreted_only
def test_the_pretended_graph_finds_what_a_real_one_would() -> None:
    """Values held by Python go stale, host reads are refused, a capture executes nothing."""
    with pretend_cuda():
        x = torch.ones(3, device="cuda")
        graph, factor = torch.cuda.CUDAGraph(), 2.0
        with torch.cuda.graph(graph):
            doubled = x * factor
            x += 1
        assert torch.equal(x, torch.ones(3))
        factor = 100.0
        for expected in (2.0, 4.0, 6.0):
            graph.replay()
            assert doubled.tolist() == [expected] * 3
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(graph):
            x.nanmedian()
        with pytest.raises(RuntimeError, match="not permitted"), torch.cuda.graph(graph):
            x.sum().item()


@pytest.mark.gpu
def test_a_host_read_falls_back_and_leaves_the_stream(capsys: pytest.CaptureFixture) -> None:
    def reads(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        assert qkv.flatten()[0].item() is not None
        return EAGER.causal_attention(qkv, n_head, dropout_p)

    made = make_plan(RECIPE, detect("cuda"), choices(dtype="bf16"))
    config = replace(RECIPE.model_config, vocab_size=500)
    model = GPT(config, replace(EAGER, causal_attention=reads)).to("cuda")
    step = GuardedStep(model, configure_adamw(model, RECIPE, made.optimizer), RECIPE, made)
    before = torch.cuda.current_stream()
    with contextlib.closing(Prefetcher(loader(RECIPE, 8), "cuda")) as batches:
        losses = [step(batches, 1e-3).loss.item() for _ in range(NUM_WARMUP + 3)]
    assert torch.cuda.current_stream() == before
    assert all(map(math.isfinite, losses))
    assert "the step cannot be captured" in capsys.readouterr().out
