"""One process, one rule: with a CUDA device the kernels run natively, without one interpreted."""

import os
import random
import warnings
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, at the first `import triton`
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `poison` asks for determinism

from kernels._op import INTERPRETED

if INTERPRETED:
    from tests import interpreter

    interpreter.install()

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)  # the tensors are small; more threads only wait for one another


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture
def device() -> str:
    """Where the kernels run: "cuda", or "cpu" under the interpreter."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory reads as NaN (integers: their maximum), so a missed element shows.

    torch fills what `empty` and its relatives return while deterministic algorithms are asked
    for; `warn_only` because nothing else about that mode is wanted.
    """
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
