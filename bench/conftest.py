"""Options of `bench/test_ops.py`, and what its result file says beside the statistics."""

import time
from typing import Any

import pytest
import torch

from bench import ops, record, timing
from bench.rows import OpRow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOT_TIMED: list[OpRow] = []
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    ops.add_arguments(group)
    group.addoption("--command", default="", help="what a reader types to run it again")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """Two runs are worth comparing where this is the same; it names no host."""
    about = record.environment(DEVICE)
    return {name: about[name] for name in ("device", "torch", "triton", "python")}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Environment, limits, and the rows without a time."""
    options = config.option
    about = record.environment(DEVICE, options.commit) | {"limits": timing.limits(DEVICE)}
    output_json["about"] = about | {"command": options.command or about["command"]}
    output_json["not_timed"] = [row.values() for row in NOT_TIMED]
