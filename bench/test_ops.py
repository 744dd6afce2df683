"""The op bench under pytest-benchmark: `python -m bench.ops`, or pytest with the same options.

One group per op, shape and mode, one entry per provider. All providers of a group are sampled in
turn the first time one of them is asked for; pytest-benchmark then reads those samples through a
clock that moves by exactly what was measured, so its statistics are of device time on CUDA.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from bench import ops
from bench.cases import Shape
from bench.conftest import DEVICE, NOT_TIMED, STARTED

FIGURES = ("ms", "q1_ms", "q3_ms", "cov", "rounds")  # what pytest-benchmark computes itself


class RecordedClock:
    """A clock in seconds that only `advance` moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedClock()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    try:
        todo = ops.plan_measurements(options, DEVICE)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    who = [(*each, name) for each in todo for name in ops.providers_of(options, DEVICE)
           if each[0] in ops.PROVIDERS[name]]  # fmt: skip
    kind = f"{options.dtype or ''}{'sweep' if options.sweep else ''}"
    names = [f"{op}-{mode}-{shape.label.replace(' ', '')}{kind}-{name}"
             for op, shape, mode, name in who]  # fmt: skip
    metafunc.parametrize(("op", "shape", "mode", "provider"), who, ids=names)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[..., Any]:
    options = pytestconfig.option

    @cache
    def measure(op: str, shape: Shape, mode: str) -> Any:
        if time.monotonic() - STARTED > 60 * options.minutes:
            pytest.skip("no time left")
        return ops.measure(
            op, shape, ops.dtype_of(options, DEVICE), mode, DEVICE,
            providers=ops.providers_of(options, DEVICE), seconds=options.seconds,
            sweep=options.sweep,
        )  # fmt: skip

    return measure


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, measured: Any, op: str, shape: Shape, mode: str, provider: str) -> None:
    rows, timed = measured(op, shape, mode)
    row = rows[provider]
    if row.doubt:
        NOT_TIMED.append(row)
        if provider == "ours":
            pytest.fail(row.doubt, pytrace=False)
        pytest.skip(f"{provider}: {row.doubt}")
    benchmark.group = f"{op} {mode} {shape.label}"
    benchmark.extra_info |= {k: v for k, v in row.values().items() if k not in FIGURES}
    samples = iter(timed[provider].samples_ms)
    benchmark.pedantic(lambda: CLOCK.advance(next(samples) / 1e3), rounds=row.rounds)
