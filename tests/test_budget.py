"""The prediction of a step: it has every part, adds them up, and is near what was measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import budget
from bench.cases import CASES, Shape
from bench.plan_run import PAPER

LARGE = Shape(64, 1024)


def test_every_part_is_there_and_the_step_is_their_sum() -> None:
    *parts, step = budget.lines("H100", LARGE, {})
    assert {line[0] for line in parts} >= CASES.keys() - {"layer_norm"}
    for column, digits in ((7, 0.06), (8, 0.06)):
        total = sum(int(line[1]) * float(line[column]) for line in parts)
        assert total == pytest.approx(float(step[column]), abs=digits)
    for line in parts:
        assert 0 < float(line[7]) <= float(line[8]), line[0]


def test_it_stands_beside_what_an_h100_took() -> None:
    """No part is off by more than a sixth, though nothing is fitted."""
    found = {line[0]: line for line in budget.lines("H100", LARGE, {})}
    assert found["step"][9] == "122.1"
    compared = [line for line in found.values() if line[9]]
    assert len(compared) >= 6
    for line in compared:
        assert float(line[8]) == pytest.approx(float(line[9]), rel=1 / 6), line[0]


def test_a_card_without_results_has_its_data_sheet() -> None:
    assert len(PAPER) == 9  # as docs/performance.md says
    for card in PAPER.keys() - {"H100"}:
        assert "of the data sheet" in budget.rates_of(card)[1]
        assert not any(line[9] for line in budget.lines(card, Shape(16, 64), {}))


@pytest.mark.slow  # compiles eight kernels
@pytest.mark.parametrize("shape", ["b64t1024", "b16t64"])
def test_registers_are_those_of_the_compiled_kernels(shape: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.budget", "--shape", shape]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a prediction" in done.stdout.splitlines()[0]
    assert done.stdout.count(" x") >= 8
