"""What the tests of check, measurement and choice share: a small run and its children."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import EAGER, OPS, Ops
from model import GPTConfig
from model.config import MODELS
from training import child, trials, verify
from training.machines import Machine
from training.plan import Choices, Plan, make_plan
from training.recipes import Recipe

# Narrow, with a small vocabulary: the interpreter takes a minute for 50,257 words.
CONFIG = GPTConfig(block_size=16, vocab_size=250, n_layer=1, n_head=1, n_embd=64)
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 90, has_bf16=True, memory_bytes=80 << 30)
CPU = Machine("cpu", "a CPU", num_threads=2, interpreted=True, memory_bytes=8 << 30)
RECIPE = Recipe("smoke", 1e-3, 1e-4, warmup_steps=2, max_steps=3, batch_size=3, block_size=16)
# A child as a run starts it, but with that vocabulary, and bf16 that rounds as on hardware.
REAL_CHILD = (
    sys.executable,
    "-c",
    """
from tests import interpreter, tuned
from training import child, timing, trials

interpreter.install()
tuned.MODELS["smoke"] = tuned.CONFIG
timing.MAX_SETS = 2
child.serve(trials.answer)
""",
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A small "smoke", a cache of its own, and undo what a run switches on."""
    monkeypatch.setitem(MODELS, "smoke", CONFIG)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verify, "nvidia_smi", lambda *_: {"driver_version": "580.1"})
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore


def plan_of(machine: Machine = CPU, recipe: Recipe = RECIPE, **asked: Any) -> Plan:
    return make_plan(recipe, machine, Choices(**{"dtype": "fp32", "compile": False, **asked}))


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = [None] * count

    def one(i: int) -> None:
        found[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,), name=str(i)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


class Crew(child.Crew):
    """Answers in this process, which alone has the pretended device."""

    def share(self, tasks: Any, *_: Any) -> Any:
        return [trials.answer(task) for task in tasks]

    def ask(self, task: Any, *_: Any) -> dict[str, Any]:
        return trials.answer(task)


def of_triton(**changed: Callable[..., Any]) -> Ops:
    """Eager ops in place of Triton's, which take seconds per step in the interpreter."""
    calls = {name: partial(getattr(EAGER, name)) for name in OPS}
    return Ops(**{**calls, **changed})
