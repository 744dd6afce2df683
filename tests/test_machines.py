"""`pytest --machine NAME`: the plan of another machine, here and in processes that tests start."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import matrix
from tests.machine.sitecustomize import MACHINES, pretend
from training.plan import Machine

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_is_what_its_name_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    plan: Any = SimpleNamespace()
    plan.detect = lambda device="auto": Machine(
        "cuda" if device == "cuda" else "cpu", "real", num_threads=7, has_bf16=name == "fp32"
    )
    pretend(plan, name)
    pretend(plan, name)  # as where both the environment and an option ask for it
    seen = plan.detect("cpu")
    assert {key: getattr(seen, key) for key in MACHINES[name]} == MACHINES[name]
    assert seen != Machine("cpu", "real", num_threads=7, has_bf16=name == "fp32")
    assert plan.detect("cuda").num_threads == 7
    assert threads == ([1] if name == "one-thread" else [])


def test_a_process_that_a_test_starts_is_on_that_machine() -> None:
    code = "import training.plan; print(training.plan.detect('cpu').missing_tools)"
    path = [str(ROOT / "tests" / "machine"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {"PYTHONPATH": os.pathsep.join(path), "TEST_MACHINE": "no-compiler"}
    command = [sys.executable, "-c", code]
    said = subprocess.check_output(command, cwd=ROOT, text=True, env={**os.environ, **environ})
    assert said == "('g++',)\n"


def test_a_row_of_the_matrix_that_could_not_be_tried_is_red(capsys):
    assert matrix.main(["9.9/2.11.0/3.6.0"]) == 1
    assert "RED, there is no python9.9 here" in capsys.readouterr().out
    assert matrix.main(["9.9/2.11.0/3.6.0", "--skip-missing"]) == 0
    assert "skipped, there is no python9.9 here" in capsys.readouterr().out
