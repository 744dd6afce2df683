"""What pytest-benchmark runs for `bench.ops`: one entry per op, shape, mode and provider.

All providers of an op are sampled in turn the first time one of them is asked for;
pytest-benchmark then reads those samples through a clock that moves by exactly what was measured,
so its statistics are of device time on CUDA.
"""

from collections.abc import Callable
from typing import Any

import pytest


class RecordedClock:
    """A clock in seconds that only `advance` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedClock()


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, measured: Callable[[], Any], provider: str) -> None:
    if (found := measured()) is None:
        pytest.skip("no time left")
    row, timing = (by_name.get(provider) for by_name in found)
    if row.doubt and provider == "ours":
        pytest.fail(row.doubt, pytrace=False)
    if row.doubt:
        pytest.skip(f"{provider}: {row.doubt}")
    benchmark.group = f"{row.op} {row.mode} {row.shape}"
    benchmark.extra_info |= row.values()
    samples = iter(timing.samples_ms)
    benchmark.pedantic(lambda: CLOCK.advance(next(samples) / 1e3), rounds=row.rounds)
