"""What the bench does on a GPU, on a pretended one; see tests/pretend_cuda.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench import contestants, ops, profile, record, step
from bench.cases import CASES, Shape
from bench.contestants import Setup
from bench.record import OpRow, StepRow
from bench.tables import step_table
from kernels import EAGER
from kernels._op import INTERPRETED
from model import GPTConfig
from tests.pretend_cuda import Pretended

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")

CUDA = torch.device("cuda")  # made here: inside pretend_cuda() it would be the CPU
TINY = Shape(2, 4, C=64, H=1, V=128)
TINY_CONFIG = GPTConfig(block_size=8, vocab_size=128, n_layer=1, n_head=1, n_embd=64)
SETUP = Setup("test", Shape(1, 8))
FATAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dict.fromkeys(("copy_gbs", "matmul_tflops", "matmul_k768_tflops"), 1.0)
    monkeypatch.setattr(record, "limits", lambda device: rates)
    monkeypatch.setitem(contestants.MODELS, "test", TINY_CONFIG)


def measure(op: str, mode: str = "both", **how: Any) -> dict[str, OpRow]:
    how = {"providers": ["eager", "compile", "ours"], "rounds": 1, "seconds": 0.0} | how
    return ops.measure(op, TINY, torch.bfloat16, mode, CUDA, **how)[0]


@pytest.mark.parametrize("op", CASES)
def test_every_provider_of_every_op_has_a_row(op: str, pretended: Pretended) -> None:
    rows = measure(op, providers=[*ops.PROVIDERS])
    assert [*rows] == [name for name, does in ops.PROVIDERS.items() if op in does]
    for name in ("eager", "compile", "ours"):
        row = rows[name]
        assert (row.timed, row.peak_gib) == ("graph", 1.0)
        assert row.ms > 0
        assert {*row.over} == {"eager", "compile"} - {name}
    assert "liger" not in rows or rows["liger"].doubt  # the interpreter cannot run its kernels
    assert bool(rows["compile"].backend) == (op == "causal_attention")


def test_one_provider_s_failure_leaves_the_others(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "parse_ops", lambda _: EAGER)
    monkeypatch.setattr(ops, "doubt_of", lambda *_: "")
    real = ops.find_provider

    def measure_with(error: Exception, first: int) -> dict[str, OpRow]:
        """Eager raises from its call number `first` on."""
        left = iter(range(first - 1))

        def eager(**inputs: Any) -> Tensor:
            if next(left, None) is None:
                raise error
            return EAGER.layer_norm(**inputs)

        monkeypatch.setattr(
            ops, "find_provider", lambda name, *a: eager if name == "eager" else real(name, *a)
        )
        return measure("layer_norm", "fwd")

    for first in (1, 5):  # while calls are made, and while they are captured
        rows = measure_with(AssertionError("no such layout\nat line 5"), first)
        assert rows["eager"].doubt == "AssertionError: no such layout"
        assert rows["ours"].over["compile"] > 0
    rows = measure_with(torch.OutOfMemoryError("CUDA out of memory. Tried to"), 5)
    assert rows["eager"].doubt == "out of memory"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_with(RuntimeError(FATAL), 5)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, contestants.Build]:
    """The contestants; ours with plain PyTorch's ops and optimizer, which take less time here."""
    found = contestants.known_providers(CUDA)
    found["ours bf16"] = contestants._ours(dtype="bf16", ops="eager", optimizer="torch")
    monkeypatch.setattr(contestants, "known_providers", lambda *_: found)
    return found


def assert_step_rows(pretended: Pretended) -> None:
    names = ["compile bf16", "ours bf16"]
    rows = {row.provider: row for row in step.measure_cuda(names, SETUP, CUDA, 0.0)}
    assert [*rows] == ["compile bf16", "ours bf16"]
    assert not any(row.doubt for row in rows.values())
    assert len(pretended.graphs) == 1  # ours was timed as it trains
    compiled, ours = step.with_ratios(rows)
    assert ours.over["compile bf16"] == pytest.approx(compiled.ms / ours.ms)


@pytest.mark.usefixtures("known")
def test_a_step_and_its_compiled_twin(pretended: Pretended) -> None:
    assert_step_rows(pretended)


@pytest.mark.slow  # every kernel of twenty steps interpreted
def test_a_step_of_triton_ops_and_its_compiled_twin(pretended: Pretended) -> None:
    assert_step_rows(pretended)


@pytest.mark.usefixtures("pretended")
def test_a_contestant_that_fails_is_a_row(known: dict[str, contestants.Build]) -> None:
    def raising(error: Exception) -> contestants.Build:
        def build(*_: Any) -> contestants.Plain:
            raise error

        return build

    names = ["compile bf16", "ours bf16", "eager bf16"]
    known["compile bf16"] = raising(AssertionError("inductor: no\nmore"))
    rows: dict[str, StepRow] = {
        row.provider: row for row in step.measure_cuda(names, SETUP, CUDA, 0.0)
    }
    assert rows["compile bf16"].doubt == "AssertionError: inductor: no"
    # There is nothing to compare them with; the file keeps what was measured.
    assert rows["ours bf16"].doubt == rows["eager bf16"].doubt == step.NO_REFERENCE
    assert rows["ours bf16"].ms > 0
    text = step_table([*rows.values()])
    assert f"ours bf16, eager bf16: not shown: {step.NO_REFERENCE}" in text
    assert "|" not in text
    known["compile bf16"] = raising(RuntimeError(FATAL))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(step.measure_cuda(names, SETUP, CUDA, 0.0))


@pytest.mark.usefixtures("known")
def test_a_profiled_step_is_a_replay_and_spans_are_no_kernels(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graphs: list[int] = []
    names = [
        ("nvjet_tst_128x256", 600.0, False),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 200.0, False),
        ("_attention_fwd_kernel", 100.0, False),
        ("Optimizer.step#AdamW.step", 900.0, True),
        ("## Call CompiledFxGraph f3a ##", 900.0, False),
    ]

    same: Any = {"count": 2, "device_type": DeviceType.CUDA}

    @contextmanager
    def profiler(activities: Any) -> Iterator[Any]:  # torch's needs a CUDA build
        graphs.append(len(pretended.graphs))
        keys = ("key", "self_device_time_total", "is_user_annotation")
        events = [SimpleNamespace(**dict(zip(keys, name, strict=True)), **same) for name in names]
        yield SimpleNamespace(export_chrome_trace=str, key_averages=lambda: events)
        graphs.append(len(pretended.graphs))

    monkeypatch.setattr(profile, "profile", profiler)
    rows = profile.trace_step("ours bf16", SETUP, CUDA, 2, tmp_path / "trace.json")
    assert graphs == [1, 1]
    found = {row.kind: row for row in rows}
    assert {*found} == {"GEMM", "attention", "idle"}
    assert found["attention"].ms == pytest.approx(0.15)
    assert found["attention"].names[0].startswith("cudnn_generated_fort_native_sdpa")
    assert rows[0].names == ["nvjet_tst_128x256"]
