"""One process, one rule: with a CUDA device the kernels run natively, without one interpreted."""

import os
import random
import re
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.machine import sitecustomize as machines

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, at the first `import triton`
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # `poison` asks for determinism
os.environ.pop("PYTHONIOENCODING", None)  # a test that means one sets it itself
os.environ.pop("PYTHONUNBUFFERED", None)
os.environ.pop("FORCE_COLOR", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that a test starts
    torch.set_num_threads(1)
elif "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)  # the tensors are small; more threads only wait for one another

from kernels import OPS, _launch
from kernels._op import INTERPRETED
from tests import pretend_cuda
from training import timing

if INTERPRETED:
    from tests import interpreter

    interpreter.install()

PLANS = re.compile(r"\bimport train\b|train\.py|tests\.faults|\bdetect\b|make_plan|evaluate")
WORKER_BYTES = 3 << 30  # of a test process and those it starts
# Those that take longest begin first, so that no worker is left with one when the others are done.
LONGEST = ("step", "demo", "resume", "train", "causal_attention", "distributed", "endings")


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "plan as another machine would; default: this one"
    parser.addoption("--machine", choices=[*machines.MACHINES], help=what)


def pytest_configure(config: pytest.Config) -> None:
    if name := config.getoption("--machine"):
        folder = str(Path(machines.__file__).parent)
        earlier = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, earlier)])
        os.environ["TEST_MACHINE"] = name
        machines.install()
    if config.option.markexpr == "gpu" and not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu: torch sees no CUDA device")
    for file in config.args:  # `make test OP=...` names one
        if file.endswith(".py") and not Path(file).exists():
            ops = ", ".join(OPS)
            raise pytest.UsageError(f"no such file: {file}; the ops are {ops} and adamw")
    config.option.loadscopereorder = False  # xdist would go by the number of tests


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """As another machine only files that train, resume, evaluate or plan: the rest is the same."""
    if not config.getoption("--machine") or not collection_path.match("test_*.py"):
        return None
    return None if PLANS.search(collection_path.read_text(encoding="utf-8")) else True


@pytest.hookimpl(optionalhook=True)  # tests/matrix.py has no xdist
def pytest_xdist_auto_num_workers() -> int:
    """One per core as far as memory goes; on a GPU one process, which has it to itself."""
    if torch.cuda.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores or 1, 8, memory // WORKER_BYTES))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and not config.option.markexpr:
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
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore (a run unsets it)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def cuda_as_it_was() -> Iterator[None]:
    """What a test replaces inside `pretend_cuda` monkeypatch puts back after it: the pretence."""
    functions = {name: value for name, value in vars(torch.cuda).items() if callable(value)}
    yield
    for name, function in functions.items():
        setattr(torch.cuda, name, function)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator["pretend_cuda.Pretended"]:
    """A pretended GPU on which the timer is soon done: few calls, few samples."""
    if not INTERPRETED:
        pytest.skip("pretends a GPU; needs the interpreter")
    small = {"MAX_SETS": 1, "MIN_GRAPH_CALLS": 1, "SPIN_SIZE": 8, "SPIN_SECONDS": 0.0}
    for name, value in small.items():
        monkeypatch.setattr(timing, name, value)
    monkeypatch.setattr(timing, "interleave", partial(timing.interleave, warmup=0, min_rounds=1))
    # Not of this device, and later of no pretended one.
    known = (timing.capture_stream, _launch._capability)
    for function in known:
        function.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a few elements, threads only wait for one another
    with pretend_cuda.pretend_cuda() as pretended:
        yield pretended
    torch.set_num_threads(threads)
    for function in known:
        function.cache_clear()


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals that the tests were started without, as by nohup or with &, are heard again."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    forked.hear()
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough to tokenise and evaluate in no time, large enough for a validation part."""
    path = tmp_path_factory.mktemp("text") / "input.txt"
    words = (
        "the king said to his people that no man shall want for bread while I have bread to give"
    )
    words = words.split()
    lines = (" ".join(words[i * k % len(words)] for k in range(12)) for i in range(150))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with few words and, where nobody reads it, without a report."""
    monkeypatch.setattr("training.ending.SAMPLE_TOKENS", 4)
    monkeypatch.setattr("training.ending.report_run", lambda *_: None)
