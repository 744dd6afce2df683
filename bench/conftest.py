"""Options of `pytest bench/`, which `make bench` runs under pytest-benchmark."""

import argparse

import pytest
import torch

from bench import record


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--op", action="append", default=[], help="an op of bench.cases")
    group.addoption("--shape", action="append", default=[], help="b<B>t<T>")
    group.addoption("--provider", action="append", default=[], help="one of bench.ops.PROVIDERS")
    group.addoption("--seconds", type=float, default=4.0, help="budget of one op and mode")
    group.addoption("--commit", help="what is measured, if not HEAD")
    group.addoption("--out", default=str(record.RESULTS), help="result file or folder")


@pytest.fixture(scope="session")
def bench_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def bench_options(request: pytest.FixtureRequest) -> argparse.Namespace:
    return request.config.option
