"""What the bench does on a GPU, run to its end on a pretended one; see tests/pretend_cuda.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench import contestants, ops, optimizer, profile, record, step
from bench.cases import CASES, Shape
from bench.contestants import Setup
from bench.rows import OpRow, StepRow
from bench.tables import step_table
from kernels import EAGER
from kernels._op import INTERPRETED
from kernels.linear_cross_entropy import chunk_rows
from model import GPTConfig
from tests import numerics
from tests.pretend_cuda import Pretended, pretend_cuda
from training import timing

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")

CUDA = torch.device("cuda")  # made here: inside pretend_cuda() it would be the CPU
TINY = Shape(2, 4, C=64, H=1, V=128)
TINY_CONFIG = GPTConfig(block_size=8, vocab_size=128, n_layer=1, n_head=1, n_embd=64)
SETUP = Setup("test", Shape(1, 8))
FATAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretended]:
    """A GPU that takes its time: few calls, few samples, and no limits to measure."""
    for name, value in {"MAX_SETS": 1, "MIN_GRAPH_CALLS": 1, "SPIN_SIZE": 8}.items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(timing, "SPIN_SECONDS", 0.0)
    rates = dict.fromkeys(("copy_gbs", "matmul_tflops", "matmul_k768_tflops"), 1.0)
    monkeypatch.setattr(timing, "limits", lambda device: rates)
    monkeypatch.setattr(timing, "interleave", partial(timing.interleave, warmup=0, min_rounds=1))
    monkeypatch.setitem(contestants.MODELS, "test", TINY_CONFIG)
    timing.capture_stream.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a few elements, threads only wait for one another
    with pretend_cuda() as pretended:
        yield pretended
    torch.set_num_threads(threads)
    timing.capture_stream.cache_clear()


def measure(op: str, mode: str = "both", **how: Any) -> dict[str, OpRow]:
    how = {"providers": ["eager", "compile", "ours"], "rounds": 1, "seconds": 0.0} | how
    return ops.measure(op, TINY, torch.bfloat16, mode, CUDA, **how)[0]


def test_calls_that_can_be_captured_are_one_graph(pretended: Pretended) -> None:
    x, seen = torch.zeros(2), []

    def call(i: int) -> Tensor:
        seen.append(i)
        return x[i].add_(1)

    found = timing.device_replay([partial(call, 0), partial(call, 1)], set_bytes=1 << 30)
    assert found.mode == "graph"
    assert len(pretended.graphs) == 1
    assert seen[-2:] == [0, 1]
    count, before = len(seen), x.clone()
    assert found.once() > 0
    assert torch.equal(x, before + 1)
    assert len(seen) == count  # the host takes no part


def test_a_call_that_waits_for_the_device_is_never_captured(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: pytest.fail("tried to capture"))
    x, before = torch.ones(2), torch.cuda.current_stream()
    found = timing.device_replay([lambda: x.sum().item()])
    assert found.mode == "launches"
    assert found.once() > 0
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() is before


def test_a_capture_that_is_refused_gives_the_stream_back(pretended: Pretended) -> None:
    def call() -> None:  # as a wait that the debug mode does not know of
        if torch.cuda.is_current_stream_capturing():
            torch.ones(()).item()

    before = torch.cuda.current_stream()
    found = timing.device_replay([call])
    assert torch.cuda.current_stream() is before
    assert found.mode == "launches"
    assert found.once() > 0

    def short() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # a row says so; timing launches would be another
        timing.device_replay([short])
    assert torch.cuda.current_stream() is before


def test_errors_are_fatal_or_have_one_line() -> None:
    assert timing.is_fatal(RuntimeError(FATAL))
    assert not timing.is_fatal(RuntimeError("CUDA error: operation not permitted"))
    hidden = RuntimeError("the capture failed")
    hidden.__context__ = RuntimeError(FATAL)
    assert timing.is_fatal(hidden)
    hidden.__context__ = inner = RuntimeError("another")
    inner.__cause__ = hidden  # Triton's interpreter makes such circles
    assert not timing.is_fatal(hidden)
    assert timing.reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert timing.reason_of(KeyError()) == "KeyError: no message"
    assert timing.reason_of(RuntimeError("\n first\nsecond")) == "RuntimeError: first"


@pytest.mark.parametrize("op", CASES)
def test_every_provider_of_every_op_has_a_row(op: str, pretended: Pretended) -> None:
    rows = measure(op, providers=[*ops.PROVIDERS])
    assert [*rows] == [name for name, does in ops.PROVIDERS.items() if op in does]
    for name in ("eager", "compile", "ours"):
        row = rows[name]
        assert (row.timed, row.peak_gib) == ("graph", 1.0)
        assert row.ms > 0
        assert {*row.over} == {"eager", "compile"} - {name}
    assert rows["ours"].checked == TINY.label
    assert "liger" not in rows or rows["liger"].doubt  # its kernels are not for the interpreter
    assert bool(rows["compile"].backend) == (op == "causal_attention")


def test_one_provider_s_failure_leaves_the_others(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "parse_ops", lambda _: EAGER)
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
        return measure("layer_norm", "fwd", checked=False)

    for first in (1, 5):  # when its calls are made, and when they are captured
        rows = measure_with(AssertionError("no such layout\nat line 5"), first)
        assert rows["eager"].doubt == "AssertionError: no such layout"
        assert rows["ours"].over["compile"] > 0
    rows = measure_with(torch.OutOfMemoryError("CUDA out of memory. Tried to"), 5)
    assert rows["eager"].doubt == "out of memory"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        measure_with(RuntimeError(FATAL), 5)


def test_what_does_not_fit_is_left_out_and_the_rest_share_a_pool(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[Any] = []
    built: list[str] = []
    real = timing.device_replay

    def replay(calls: Any, set_bytes: int, pool: Any) -> timing.Replay:
        pools.append(pool)
        built.append(calls[0].__name__)
        return real(calls, set_bytes, pool)

    def large() -> Tensor:
        return torch.zeros(1)

    def small() -> Tensor:
        return torch.zeros(1)

    def huge() -> Tensor:
        raise AssertionError("tried all the same")

    monkeypatch.setattr(timing, "device_replay", replay)
    handles = iter(range(9))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    failed: dict[str, str] = {}
    found = timing.time_calls(
        {"large": [large], "small": [small], "huge": [huge]}, CUDA,
        needs={"large": 40 << 30, "small": 1 << 30, "huge": 90 << 30}, failed=failed,
        rounds=1, seconds=0.0,
    )  # fmt: skip
    assert failed == {"huge": "out of memory"}
    assert built == ["small", "large"]
    assert pools == [0, 0]
    assert [*found] == ["large", "small"]


def test_an_error_while_timing_drops_its_contestant_alone() -> None:
    turns = {"a": 0, "b": 0}

    def replay(name: str) -> timing.Replay:
        def once() -> float:
            turns[name] += 1
            if name == "b" and turns[name] == 3:
                raise RuntimeError("launch failed")
            return 1.0

        return timing.Replay(once, "host")

    failed: dict[str, str] = {}
    how: dict[str, Any] = {"rounds": 4, "warmup": 1}
    found = timing.interleave({n: replay(n) for n in turns}, failed=failed, **how)
    assert failed == {"b": "RuntimeError: launch failed"}
    assert [*found] == ["a"]
    assert len(found["a"].samples_ms) == 4
    turns["b"] = 0
    with pytest.raises(RuntimeError, match="launch failed"):
        timing.interleave({n: replay(n) for n in turns}, **how)


@pytest.mark.parametrize("op", CASES)
def test_cuda_checks_the_kernels_it_times(op: str) -> None:
    cut = numerics.check_shape(op, Shape(64, 1024), CUDA)
    assert cut.M <= 16384
    if op in ("layer_norm", "add_layer_norm", "gelu_mlp"):
        assert cut.M > 4096  # their "large" rows
    if op == "linear_cross_entropy":
        assert chunk_rows(cut.M, cut.Vp, 4) < cut.M
    if op == "causal_attention":
        assert (cut.B, cut.T) == (4, 1023)
    assert numerics.check_shape(op, Shape(64, 1024), torch.device("cpu")).M <= 512
    assert numerics.check_shape(op, TINY, CUDA) == TINY


def test_all_three_runs_see_the_same_output_gradients() -> None:
    # With the gradients of each run drawn anew, those of float64 would not be rounded to bf16.
    inputs = {"x": torch.randn(64).bfloat16(), "factor": 2.0}
    scaled = lambda x, factor: x * factor  # noqa: E731
    found = numerics.compare_runs(scaled, scaled, scaled, inputs, rows=64)
    assert [(c.name, c.ours, c.eager) for c in found] == [("y", 0.0, 0.0), ("dx", 0.0, 0.0)]


def test_tf32_is_asked_for_and_given_back(capsys: pytest.CaptureFixture) -> None:
    seen = []

    def attention(qkv: Tensor, n_head: int) -> Tensor:
        flash = torch.backends.cuda.flash_sdp_enabled()
        seen.append((torch.get_float32_matmul_precision(), flash))
        return EAGER.causal_attention(qkv, n_head)

    before, cpu = torch.get_float32_matmul_precision(), torch.device("cpu")
    for name in ("tf32", "fp32"):
        with numerics.precision(name) as dtype:
            found = numerics.check_op(attention, "causal_attention", TINY, dtype, cpu)
        assert all(c.holds for c in found)
        assert torch.get_float32_matmul_precision() == before
    # Plain attention must multiply in TF32 as well, which torch's fused kernels never do.
    assert seen == [("high", False), ("highest", True)]
    assert numerics.main(["--dtype", "tf32"]) == 0
    assert "tf32 left out: only a GPU multiplies in it" in capsys.readouterr().out


def test_numerics_of_a_gpu(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows of `python -m tests.numerics` there: results, reruns, and an op that fails."""
    monkeypatch.setattr(numerics, "GPU_SHAPES", (TINY,))
    monkeypatch.setattr(numerics, "RERUN_SHAPE", TINY)
    monkeypatch.setattr(numerics, "NUM_RERUNS", 2)
    argv = ["--op", "layer_norm", "--dtype", "bf16", "--commit", "0" * 40]
    argv += ["--out", str(tmp_path / "x.json")]
    assert numerics.main(argv) == 0
    rows = record.load(tmp_path / "x.json").rows("checks")
    assert {row.check for row in rows} == {"numerics bf16", "same bits bf16"}
    assert "layer_norm B=2 T=4 C=64 H=1 dweight" in {row.what for row in rows}
    assert not any(row.doubt for row in rows)
    # A bit that moves, and an error, are in doubt and make it fail.
    moves = iter([1.0] * 3 + [1.0, 1.0, 1.0 + 2**-7])
    wrong = lambda **inputs: inputs["x"] * next(moves)  # noqa: E731
    assert numerics.reruns_that_differ(wrong, "layer_norm", torch.bfloat16, CUDA) == 0
    assert numerics.reruns_that_differ(wrong, "layer_norm", torch.bfloat16, CUDA) == 1
    monkeypatch.setattr(numerics, "check_op", lambda *_: 1 / 0)
    assert numerics.main(argv) == 1
    failed = [row for row in record.load(tmp_path / "x.json").rows("checks") if row.doubt]
    assert [row.doubt for row in failed] == ["ZeroDivisionError: division by zero"]


def builds(**choices: Any) -> dict[str, contestants.Build]:
    known = contestants.known_providers(CUDA)
    ours = contestants._ours(dtype="bf16", **choices)
    return {"compile bf16": known["compile bf16"], "ours bf16": ours}


def assert_step_rows(pretended: Pretended, known: dict[str, contestants.Build]) -> None:
    rows = [*step.measure_cuda(known, SETUP, CUDA, 0.0)]
    assert [row.provider for row in rows] == ["compile bf16", "ours bf16", "ours bf16"]
    compiled, first, ours = rows
    assert not any(row.doubt for row in rows)
    assert len(pretended.graphs) == 1  # ours was timed as it trains
    # The twin stood before and after ours: what counts is the mean.
    assert ours.rival_again_ms
    twin = (compiled.ms + ours.rival_again_ms) / 2
    assert ours.over["compile bf16"] == pytest.approx(twin / ours.ms)
    [_, shown] = step.with_ratios({"compile bf16": compiled, "ours bf16": ours})
    assert shown.over == ours.over
    [_, shown] = step.with_ratios({"compile bf16": compiled, "ours bf16": first})
    assert shown.over["compile bf16"] == pytest.approx(compiled.ms / first.ms)


def test_a_step_and_its_compiled_twin(pretended: Pretended) -> None:
    assert_step_rows(pretended, builds(ops="eager", optimizer="torch"))


@pytest.mark.slow  # every kernel of twenty steps interpreted
def test_a_step_of_triton_ops_and_its_compiled_twin(pretended: Pretended) -> None:
    assert_step_rows(pretended, builds())


def test_a_contestant_that_fails_is_a_row(pretended: Pretended) -> None:
    def raising(error: Exception) -> contestants.Build:
        def build(*_: Any) -> contestants.Contestant:
            raise error

        return build

    known = builds(ops="eager", optimizer="torch")
    plain = contestants.known_providers(CUDA)["eager bf16"]
    known |= {"compile bf16": raising(AssertionError("inductor: no\nmore")), "eager bf16": plain}
    rows: dict[str, StepRow] = {
        row.provider: row for row in step.measure_cuda(known, SETUP, CUDA, 0.0)
    }
    assert rows["compile bf16"].doubt == "AssertionError: inductor: no"
    # Nothing came before it that it could agree with; what was measured is in the file.
    assert rows["ours bf16"].doubt == rows["eager bf16"].doubt == step.NO_REFERENCE
    assert rows["ours bf16"].ms > 0
    text = step_table([*rows.values()])
    assert f"ours bf16, eager bf16: not shown: {step.NO_REFERENCE}" in text
    assert "|" not in text
    known["compile bf16"] = raising(RuntimeError(FATAL))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(step.measure_cuda(known, SETUP, CUDA, 0.0))


def test_optimizer_rows(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(optimizer, "CHECK_STEPS", 1)
    results = record.Results(torch.device("cpu"), tmp_path, "c" * 40)
    assert optimizer.run("test", CUDA, results, 0.0) == 0
    rows = results.rows("optimizer")
    assert [(row.dtype, row.provider) for row in rows] == [
        ("fp32", "torch"), ("fp32", "triton"), ("bf16 copies", "torch"), ("bf16 copies", "triton")
    ]  # fmt: skip
    assert all(row.timed == "graph" for row in rows)
    assert all(row.over["torch"] > 0 for row in rows if row.provider == "triton")

    class Wrong(optimizer.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("nan"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("no such GPU")

    for kind, doubt in ((Wrong, "weights differ by nan"), (refuse, "ValueError: no such GPU")):
        monkeypatch.setitem(optimizer.CLASSES, "triton", kind)  # pyright: ignore[reportArgumentType]
        theirs, ours = optimizer.measure("test", False, CUDA, 0.0)
        assert not theirs.doubt
        assert ours.doubt.startswith(doubt)


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

    @contextmanager
    def profiler(activities: Any) -> Iterator[Any]:  # torch's needs a CUDA build
        graphs.append(len(pretended.graphs))
        events = [SimpleNamespace(key=key, self_device_time_total=us, count=2,
                                  is_user_annotation=note, device_type=DeviceType.CUDA)
                  for key, us, note in names]  # fmt: skip
        yield SimpleNamespace(export_chrome_trace=str, key_averages=lambda: events)
        graphs.append(len(pretended.graphs))

    monkeypatch.setattr(profile, "profile", profiler)
    known = builds(ops="eager", optimizer="torch")
    monkeypatch.setattr(contestants, "known_providers", lambda *_: known)
    rows, times = profile.trace_step("ours bf16", SETUP, CUDA, 2, tmp_path / "trace.json")
    assert graphs == [1, 1]
    found = {row.kind: row for row in rows}
    assert {*found} == {"GEMM", "attention", "idle"}
    assert found["attention"].ms == pytest.approx(0.15)
    assert found["attention"].names[0].startswith("cudnn_generated_fort_native_sdpa")
    assert times[0][0] == "nvjet_tst_128x256"
    assert "| attention" in profile.profile_table(rows)
