"""The timer: taking turns, CUDA graphs, contestants that do not fit, and errors."""

import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import record
from kernels._op import INTERPRETED
from tests.pretend_cuda import Pretended
from training import timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FATAL = "CUDA error: an illegal memory access was encountered"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")


def test_a_sleep_is_measured():
    calls = {"short": [partial(time.sleep, 0.005)], "long": [partial(time.sleep, 0.015)]}
    found = timing.time_calls(calls, CPU, rounds=10, warmup=1)
    # A sleep is never shorter than asked; a busy machine makes it longer.
    assert 5.0 <= min(found["short"].samples_ms) < min(found["long"].samples_ms)
    assert 15.0 <= min(found["long"].samples_ms) < 150.0
    assert timing.ratio(found["long"], found["short"]) > 1.0


@pytest.mark.gpu
def test_a_copy_of_known_bytes_is_measured():
    device = torch.device("cuda")
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    found = timing.time_calls({"": [lambda: target.copy_(source)]}, device, 1 << 31)[""]
    gbs = 2 * 4 * (1 << 28) / found.median_ms / 1e6
    assert found.mode == "graph"
    assert 0.5 < gbs / record.limits(device)["copy_gbs"] < 1.1


def test_turns_are_taken_until_the_budget_or_an_error_ends_them():
    order: list[str] = []
    fails: list[int] = []  # the turns at which the second one fails

    def once(name: str) -> float:
        order.append(name)
        if name == "b" and order.count("b") in fails:
            raise RuntimeError("launch failed")
        return {"a": 1.0, "b": 2.0}[name]

    replays = {name: timing.Replay(partial(once, name), "host") for name in "ab"}
    found = timing.interleave(replays, rounds=4, seconds=60.0, warmup=1)
    assert order == ["a", "b"] * 5
    assert found["a"].samples_ms == (1.0,) * 4
    found = timing.interleave(replays, rounds=50, seconds=0.0, min_rounds=3)
    assert len(found["a"].samples_ms) == 3
    failed: dict[str, str] = {}
    late = time.monotonic() - 1.0
    assert timing.interleave(replays, warmup=0, until=late, failed=failed) == {}
    assert failed == dict.fromkeys("ab", "no time left")
    failed.clear()
    order.clear()
    fails.append(3)
    found = timing.interleave(replays, rounds=4, warmup=1, failed=failed)
    assert failed == {"b": "RuntimeError: launch failed"}
    assert {name: len(of.samples_ms) for name, of in found.items()} == {"a": 4}
    order.clear()
    with pytest.raises(RuntimeError, match="launch failed"):
        timing.interleave(replays, rounds=4, warmup=1)


def test_ratio_is_paired():
    # Both become three times slower half-way; the ratio of neighbouring samples stays.
    slow, fast = timing.Timing([2, 2, 6, 6, 6]), timing.Timing([1, 1, 3, 3, 3])
    assert timing.ratio(slow, fast) == 2.0
    steady = timing.Timing([1.0, 1.01, 1.02])
    assert steady.median_ms == 1.01
    assert steady.quartiles_ms == pytest.approx((1.005, 1.015))


def test_errors_are_fatal_or_have_one_line() -> None:
    assert timing.is_fatal(RuntimeError(FATAL))
    assert not timing.is_fatal(RuntimeError("CUDA error: operation not permitted"))
    hidden = RuntimeError("the capture failed")
    hidden.__context__ = RuntimeError(FATAL)
    assert timing.is_fatal(hidden)
    hidden.__context__ = inner = RuntimeError("another")
    inner.__cause__ = hidden  # Triton's interpreter makes such cycles
    assert not timing.is_fatal(hidden)
    assert timing.reason_of(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "out of memory"
    assert timing.reason_of(KeyError()) == "KeyError: no message"
    assert timing.reason_of(RuntimeError("\n first\nsecond")) == "RuntimeError: first"


@interpreted
def test_calls_that_can_be_captured_are_one_graph(pretended: Pretended) -> None:
    x, seen = torch.zeros(2), []

    def call(i: int) -> Tensor:
        seen.append(i)
        return x[i].add_(1)

    found = timing.device_replay([partial(call, 0), partial(call, 1)], set_bytes=1 << 30)
    assert (found.mode, len(pretended.graphs), seen[-2:]) == ("graph", 1, [0, 1])
    count, before = len(seen), x.clone()
    assert found.once() > 0
    assert torch.equal(x, before + 1)
    assert len(seen) == count  # a replay does not call it


@interpreted
def test_calls_that_cannot_be_captured_are_launched(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former stream is current again, whatever ended the capture."""

    def refused() -> None:  # like a wait that the debug mode does not notice
        if torch.cuda.is_current_stream_capturing():
            torch.ones(()).item()

    def short() -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory")

    before = torch.cuda.current_stream()
    found = timing.device_replay([refused])
    assert torch.cuda.current_stream() is before
    assert found.mode == "launches"
    assert found.once() > 0
    # Timing launches instead would measure something else.
    with pytest.raises(torch.OutOfMemoryError):
        timing.device_replay([short])
    assert torch.cuda.current_stream() is before
    # A call that is known to wait for the device is not captured at all.
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: pytest.fail("tried to capture"))
    found = timing.device_replay([lambda: torch.ones(2).sum().item()])
    assert found.mode == "launches"
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() is before


@interpreted
def test_what_does_not_fit_is_left_out_and_the_rest_share_a_pool(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, Any]] = []
    real = timing.device_replay
    calls = {name: lambda: torch.zeros(1) for name in ("large", "small", "huge")}

    def replay(found: Any, set_bytes: int, pool: Any) -> timing.Replay:
        built.append((next(name for name in calls if calls[name] is found[0]), pool))
        return real(found, set_bytes, pool)

    monkeypatch.setattr(timing, "device_replay", replay)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", iter(range(9)).__next__)
    failed: dict[str, str] = {}
    needs = {"large": 40 << 30, "small": 1 << 30, "huge": 90 << 30}
    each = {name: [call] for name, call in calls.items()}
    found = timing.time_calls(each, CUDA, needs=needs, failed=failed, rounds=1, seconds=0.0)
    assert failed == {"huge": "out of memory"}
    assert built == [("small", 0), ("large", 0)]
    assert [*found] == ["large", "small"]
