"""Real torchrun jobs on the CPU: the same batches and losses whatever the number of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from training import checkpoint
from training.data import load_corpus
from training.distributed import World, share
from training.plan import Choices, detect, make_plan
from training.prepare import Config, prepare
from training.recipes import Recipe
from training.signals import EXIT_RESUMABLE

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--preset", "smoke", "--steps", "8", "--batch-size", "2", "--block-size", "32",
    "--grad-accum-steps", "4", "--eval-every", "3", "--save-every", "2", "--no-compile",
    "--device", "cpu", "--dtype", "fp32",
]  # fmt: skip
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is"], 3000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def job(folder: Path, out: str, ranks: int, *flags: str, restarts: int = 0) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
                     f"--max-restarts={restarts}"]  # fmt: skip
    return [*launcher, str(ROOT / "train.py"), *FLAGS, "--data", str(folder / "text.txt"),
            "--out", str(folder / out), *flags]  # fmt: skip


def start(command: list[str], more: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


def finish(command: list[str]) -> tuple[int, str]:
    process = start(command)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def metrics(folder: Path, out: str) -> tuple[np.ndarray, np.ndarray]:
    """(loss, grad norm) of every step, and the validation losses."""
    lines = (folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [(r["loss"], r["grad_norm"]) for r in rows if "event" not in r]
    return np.array(steps), np.array([r["val_loss"] for r in rows if r.get("event") == "eval"])


@pytest.fixture(scope="module")
def alone(text) -> tuple[np.ndarray, np.ndarray]:
    code, output = finish(job(text, "alone", 1))
    assert code == 0, output
    return metrics(text, "alone")


def assert_equal_runs(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-6)


def signal_rank(
    process: "subprocess.Popen[str]", folder: Path, out: str, rank: int, number: int
) -> None:
    """Send a signal to one rank once the second checkpoint is there."""
    end = time.monotonic() + TIMEOUT_S
    while len(checkpoint.paths(folder / out / "checkpoints")) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        mine = str(folder / out).encode() in command and b"torch.distributed.run" not in command
        if mine and f"RANK={rank}".encode() in environment:
            os.kill(int(entry.name), number)
            return
    raise AssertionError(f"rank {rank} not found")


linux_only = pytest.mark.skipif(not Path("/proc").exists(), reason="finds a rank through /proc")


@linux_only
def test_dead_rank_ends_the_job_and_one_rank_finishes_what_two_began(text, alone):
    process = start(job(text, "two", 2))
    signal_rank(process, text, "two", 1, signal.SIGKILL)
    died = time.monotonic()
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert time.monotonic() - died < 60
    assert process.returncode != 0
    assert "rank      : 1" in output  # torchrun's report of the first failure
    assert "Signal 9" in output
    code, output = finish(job(text, "two", 1))
    assert code == 0, output
    assert "resume:" in output
    assert_equal_runs(metrics(text, "two"), alone)


@pytest.mark.slow
@linux_only
def test_torchrun_restarts_a_job_from_its_checkpoint(text, alone):
    process = start(job(text, "again", 2, restarts=3))
    signal_rank(process, text, "again", 1, signal.SIGKILL)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert "Signal 9" in output or "exitcode: -9" in output, output
        pytest.skip("gloo: the restarted ranks did not connect to each other, see bench/LOG.md")
    assert process.returncode == 0, output
    assert "resume:" in output
    assert_equal_runs(metrics(text, "again"), alone)


@pytest.mark.slow
@linux_only
def test_a_signal_to_one_rank_stops_all_at_the_same_step(text, alone):
    process = start(job(text, "asked", 2))
    signal_rank(process, text, "asked", 1, signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert "another rank: stopped after" in output  # rank 0 says so, and it was not the one asked
    assert f"exitcode  : {EXIT_RESUMABLE}" in output
    code, output = finish(job(text, "asked", 2))
    assert code == 0, output
    assert "resume:" in output
    assert_equal_runs(metrics(text, "asked"), alone)


@pytest.mark.slow
def test_four_ranks(text, alone):
    code, output = finish(job(text, "four", 4))
    assert code == 0, output
    assert_equal_runs(metrics(text, "four"), alone)


def test_ranks_with_different_flags_are_refused(text):
    """Two ranks started by hand, one with another learning rate."""
    processes = []
    for rank, lr in enumerate(("0.001", "0.002")):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": "29611"}  # fmt: skip
        command = job(text, "mixed", 1, "--max-lr", lr)
        processes.append(start(command, environment))
    for process in processes:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 2, output
        assert "the ranks differ: rank 1 has recipe" in output
        assert "Traceback" not in output
    assert not (text / "mixed").exists()


@pytest.mark.parametrize(("size", "micro", "count"), [(1, 16, 4), (2, 16, 2), (8, 8, 1), (3, 0, 0)])
def test_a_step_is_dealt_out_evenly_or_refused(size, micro, count):
    recipe = Recipe(batch_size=16, grad_accum_steps=4)
    plan = make_plan(recipe, detect("cpu"), Choices(ops="eager", dtype="fp32", compile=False))
    if not micro:
        with pytest.raises(ValueError, match=r"64 rows a step .* cannot be dealt to 3 ranks"):
            share(plan, recipe, World(0, size))
        return
    shared = share(plan, recipe, World(0, size))
    assert (shared.micro_batch_size, shared.num_micro_batches) == (micro, count)


def test_a_folder_of_shards_is_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("so are they all, all honourable men. " * 200)
    prepare(Config((tmp_path / "a.txt",), tmp_path / "out", shard_tokens=500, val_tokens=300,
                   processes=1), quiet=True)  # fmt: skip
    corpus = load_corpus([tmp_path / "out"])
    train, val = corpus.split(0.1)
    assert len(val) == 300
    whole = np.concatenate([np.asarray(val[:]), np.asarray(train[:])])
    np.testing.assert_array_equal(whole[1:], load_corpus([tmp_path / "a.txt"]).tokens)
