"""The op bench under pytest-benchmark: `pytest bench/ --benchmark-json F --benchmark-compare`.

One group per op, shape and mode, one entry per provider. All providers of a group are sampled in
turn the first time one of them is asked for; pytest-benchmark then reads those samples through a
clock that moves by exactly what was measured, so its statistics are of device time on CUDA.
"""

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import ops, record, timing
from bench.cases import Shape


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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    providers = options.provider or ops.default_providers(device)
    unknown = [name for name in providers if name not in ops.PROVIDERS]
    if unknown:
        known = ", ".join(ops.PROVIDERS)
        raise pytest.UsageError(f"bench: unknown provider {unknown[0]!r}; known: {known}")
    try:
        todo = list(ops.plan_measurements(device, options.op, options.shape))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    cases = [(*each, name) for each in todo for name in providers]
    names = [f"{op}-{mode}-{shape.label.replace(' ', '')}-{who}" for op, shape, mode, who in cases]
    metafunc.parametrize(("op", "shape", "mode", "provider"), cases, ids=names)


@pytest.fixture(scope="session")
def results(bench_device: torch.device, bench_options: argparse.Namespace) -> record.Results:
    results = record.Results(bench_device, Path(bench_options.out), bench_options.commit)
    results.put("limits", timing.limits(bench_device))
    return results


@pytest.fixture(scope="session")
def measured(
    bench_device: torch.device, bench_options: argparse.Namespace, results: record.Results
) -> Callable[..., Any]:
    @cache
    def measure(op: str, shape: Shape, mode: str) -> Any:
        rows, timed = ops.measure(
            op,
            shape,
            ops.default_dtype(bench_device),
            mode,
            bench_device,
            providers=bench_options.provider or ops.default_providers(bench_device),
            seconds=bench_options.seconds,
        )
        for row in rows:
            results.add("ops", row)
        return {row["provider"]: row for row in rows}, timed

    return measure


@pytest.mark.benchmark(timer=CLOCK)
def test_op(benchmark: Any, measured: Any, op: str, shape: Shape, mode: str, provider: str) -> None:
    rows, timed = measured(op, shape, mode)
    row = rows[provider]
    if "skip" in row:
        pytest.skip(f"{provider}: {row['skip']}")
    assert not row.get("red"), f"numerics of {op} are wrong, so it is not timed: {row['red']}"
    benchmark.group = f"{op} {mode} {shape.label}"
    benchmark.extra_info |= row
    samples = iter(timed[provider].samples_ms)
    benchmark.pedantic(lambda: CLOCK.advance(next(samples) / 1e3), rounds=row["rounds"])
