"""Other machines to run the tests as: `pytest --machine bf16`, or the environment's TEST_MACHINE.

A machine replaces what `training.plan.detect` returns of a CPU. Its folder goes first in
PYTHONPATH, where Python imports this file at every start, so that processes which tests start
believe it too, those of torchrun included, and the product needs no switch for it.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

MACHINES: dict[str, dict[str, Any]] = {
    "bf16": {"has_bf16": True},
    "fp32": {"has_bf16": False},
    "one-thread": {"num_threads": 1},
    "no-compiler": {"missing_tools": ("g++",)},
    "no-triton": {"has_triton": False},
}


def pretend(plan: Any, name: str) -> None:
    """From now on `plan.detect` describes the named machine where it would describe a CPU."""
    real: Callable[..., Any] = plan.detect
    if hasattr(real, "__wrapped__"):
        return
    if name == "one-thread":
        sys.modules["torch"].set_num_threads(1)

    @functools.wraps(real)
    def detect(device: str = "auto") -> Any:
        machine = real(device)
        return replace(machine, **MACHINES[name]) if machine.device == "cpu" else machine

    plan.detect = detect


class _Finder(importlib.abc.MetaPathFinder):
    """Lets `pretend` at training.plan once it has been imported."""

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "training.plan":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_pretend(module: Any) -> None:
                execute(module)
                pretend(module, os.environ["TEST_MACHINE"])

            spec.loader.exec_module = execute_and_pretend
        return spec


def install() -> None:
    """Make this process, and those it starts, see the machine that TEST_MACHINE names."""
    if os.environ.get("TEST_MACHINE"):
        sys.meta_path.insert(0, _Finder())


install()
