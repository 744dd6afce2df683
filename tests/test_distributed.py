"""Real torchrun jobs on the CPU: any number of ranks sees the same batches and losses."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import train
from model import GPT
from tests.forked import Forked, python
from training import checkpoint, distributed
from training.data import load_corpus
from training.distributed import World, refuse_mismatch, share
from training.plan import Choices, detect, make_plan
from training.prepare import Config, prepare
from training.recipes import Recipe
from training.signals import EXIT_RESUMABLE

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--preset smoke --steps 8 --batch-size 2 --block-size 32 --grad-accum-steps 4 --eval-every 3 "
    "--save-every 2 --no-compile --device cpu --dtype fp32"
).split()
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    words = np.random.default_rng(0).choice(["to", "be", "or", "not", "that", "is"], 3000)
    (folder / "text.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


def job(folder: Path, out: str, ranks: int, *flags: str, restarts: int = 0) -> list[str]:
    launcher = "-m torch.distributed.run --standalone".split() if ranks > 1 else []
    if ranks > 1:
        launcher += [f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
    files = ["--data", str(folder / "text.txt"), "--out", str(folder / out)]
    return [*launcher, str(ROOT / "train.py"), *FLAGS, *files, *flags]


def start(command: list[str], more: dict[str, str] | None = None, cwd: Path = ROOT) -> Forked:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
    return Forked(python, *command, cwd=cwd, environment=environment)


def finish(command: list[str]) -> tuple[int, str]:
    output, code = start(command).communicate(TIMEOUT_S)
    return code, output


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


def signal_rank(process: Forked, folder: Path, out: str, rank: int, number: int) -> None:
    """Send a signal to one rank after the second checkpoint was written."""
    end = time.monotonic() + TIMEOUT_S
    while len(checkpoint.paths(folder / out / "checkpoints")) < 2:
        assert process.poll() is None, process.communicate(TIMEOUT_S)[0]
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
    process = start(job(text, "two", 2, "--shard", "optimizer"))
    signal_rank(process, text, "two", 1, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=TIMEOUT_S)
    print(f"the job ended {time.monotonic() - killed:.1f} s after its rank")
    assert process.returncode != 0
    assert "rank      : 1" in output  # torchrun's report of the first failure
    assert "Signal 9" in output
    assert "[rank0]: Traceback" not in output  # a lost rank is one line
    code, output = finish(job(text, "two", 1))
    assert code == 0, output
    assert "resume:" in output
    assert_equal_runs(metrics(text, "two"), alone)


@pytest.mark.slow
@linux_only
def test_torchrun_restarts_a_job_from_its_checkpoint(text, alone):
    process = start(job(text, "again", 2, "--shard", "optimizer", restarts=3))
    signal_rank(process, text, "again", 1, signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert "resume:" in output
    assert_equal_runs(metrics(text, "again"), alone)


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(text, alone, shard):
    out = f"asked-{shard}"
    process = start(job(text, out, 2, "--shard", shard))
    signal_rank(process, text, out, 1, signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert "another rank: stopped after" in output  # rank 0 prints this; the signal went to rank 1
    assert f"exitcode  : {EXIT_RESUMABLE}" in output
    code, output = finish(job(text, out, 4, "--shard", shard))
    assert code == 0, output
    assert "resume:" in output
    assert_equal_runs(metrics(text, out), alone)


ASKED_AT_THE_END = """
import os, signal, sys
import train
from training import distributed, run

evaluate_tokens = run.evaluate_tokens

def evaluate(*arguments, **keywords):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate_tokens(*arguments, **keywords)

run.evaluate_tokens = evaluate
distributed.end_process(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_to_one_rank_in_the_last_evaluation_loses_no_step(text, tmp_path):
    """That rank cannot save, and the other one cannot go on."""
    (tmp_path / "asked.py").write_text(ASKED_AT_THE_END)
    flags = ("--save-every", "0", "--eval-every", "0")
    command = job(text, "end", 2, *flags)
    command[5] = str(tmp_path / "asked.py")
    process = start(command, {"PYTHONPATH": str(ROOT)})
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0
    code, output = finish(job(text, "end", 1, *flags))
    assert code == 0, output
    assert "step-00000008, 8 steps done" in output


@pytest.mark.slow
def test_a_checkpoint_of_cut_matrices_goes_on_with_any_number_of_ranks(text, alone):
    """Each job resumes from the last one's checkpoint; later checkpoints are deleted first."""
    for last, ranks in ((2, 2), (4, 1), (6, 4), (8, 1)):
        code, output = finish(job(text, "cut", ranks, "--shard", "full", "--keep-last", "9"))
        assert code == 0, output
        assert ("resume:" in output) == (last > 2)
        assert_equal_runs(metrics(text, "cut"), alone)
        for path in checkpoint.paths(text / "cut" / "checkpoints"):
            if int(path.name.rpartition("-")[2]) > last:
                shutil.rmtree(path)


@pytest.mark.slow
def test_four_ranks(text, alone):
    code, output = finish(job(text, "four", 4))
    assert code == 0, output
    assert_equal_runs(metrics(text, "four"), alone)


def test_ranks_that_share_no_disk_go_on_from_the_first_ones_checkpoint(text, alone, tmp_path):
    """The two ranks are started by hand, each in its own folder."""
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
        shutil.copy(text / "text.txt", home)
    shutil.copytree(text / "alone", homes[0] / "run")
    shutil.rmtree(homes[0] / "run" / "checkpoints" / "step-00000008")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        start(job(Path(), "run", 1), {"RANK": str(rank), **meeting}, cwd=home)
        for rank, home in enumerate(homes)
    ]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "resume: run/checkpoints/step-0000000" in outputs[0]
    assert outputs[1] == ""
    assert_equal_runs(metrics(homes[0], "run"), alone)
    assert not (homes[1] / "run").exists()


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """Do `work` on each rank, a thread with a common store; return what each returns or raises."""
    store = dist.HashStore()

    def one(rank: int) -> Any:
        try:
            return work(World(rank, size, rank, store))
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_ranks_that_differ_are_refused_on_every_rank():
    def compare(world: World) -> None:
        facts = {"max_lr": 0.001 * (1 + world.rank // 2), "torch": "2"}
        refuse_mismatch(world, "facts", facts)

    answers = in_threads(3, compare)
    assert {str(a) for a in answers} == {
        "distributed: the ranks differ: rank 2 has max_lr 0.002, rank 0 0.001"
    }


def test_ranks_that_start_from_other_weights_are_refused(text, tmp_path, monkeypatch):
    """One path may name other weights on each disk, and all ranks would take rank 0's."""
    flags = [*FLAGS, "--data", str(text / "text.txt"), "--out", str(tmp_path / "run")]
    cfg = replace(train.parse(flags), init="base")
    monkeypatch.setattr(train.hf, "find_model", str)
    same = GPT(cfg.recipe.model_config)
    models = iter([same, GPT(cfg.recipe.model_config)])
    monkeypatch.setattr(train.GPT, "from_pretrained", lambda _: next(models))
    for answer in in_threads(2, lambda world: train.prepare(cfg, world)):
        assert "has --init base" in str(answer)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(train.GPT, "from_pretrained", lambda _: same)
    runs = in_threads(2, lambda world: train.prepare(cfg, world))
    assert [run.initial for run in runs] == [same, same]


def test_a_group_without_tensors_is_sent_too(monkeypatch):
    """Such as the moments of a checkpoint from before the first step."""
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: tensor.fill_(3.0))
    groups = {"model": {"bias": torch.full((2,), 3.0)}, "optimizer": {}}
    for received in in_threads(2, lambda w: w.send("saved", groups if w.is_main else {})):
        assert received.keys() == groups.keys()
        assert received["optimizer"] == {}
        assert torch.equal(received["model"]["bias"], groups["model"]["bias"])


def test_ranks_wait_for_the_first_to_tokenise_but_not_for_one_that_hangs(monkeypatch):
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=0.05))
    done = []

    def tokenise(world: World) -> int:
        def work() -> int:
            time.sleep(0 if world.rank == 1 else 0.5)
            done.append(world.rank)
            return world.rank

        mine = world.in_turn("tokens", work)
        assert world.gather("here", "now") == ["now"] * 3  # rank 2 is late, too
        return mine

    assert in_threads(3, tokenise) == [0, 1, 2]
    assert done[0] == 0

    gave_up = threading.Event()

    def hang(world: World) -> str:
        try:
            return world.first("out", lambda: gave_up.wait(TIMEOUT_S) and "late")
        finally:
            gave_up.set()

    first, other = in_threads(2, hang)
    assert first == "late"
    assert "no 'out' from another rank" in str(other)


def test_an_earlier_attempt_answers_nobody(monkeypatch):
    """torchrun keeps its store over restarts, and its nodes may disagree about their number."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    here, order = threading.local(), threading.Event()
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}
    monkeypatch.setattr(distributed, "_environment", lambda name, *_: here.values[name])

    def attempt(rank: int, number: int) -> World:
        here.values = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": 0}
        if rank == number % 2:  # let each rank come first at times
            order.wait(TIMEOUT_S)
        order.set()
        return distributed.meet()

    seen = set()
    for number in range(4):
        order.clear()
        with ThreadPoolExecutor(2) as pool:
            first, other = pool.map(attempt, range(2), [number] * 2)
        first.first("checkpoint", lambda number=number: f"step {number}")
        assert other.first("checkpoint", str) == f"step {number}"
        seen.add(first.gather.__self__.store)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "CONNECT", timedelta(seconds=0.2))
    with pytest.raises(OSError, match=r"did not meet at host:1: no sign of rank 1 in 0 s"):
        attempt(0, 1)
    with pytest.raises(OSError, match=r"did not meet at host:1: .*timeout"):
        attempt(1, 0)


def test_a_rank_that_cannot_connect_ends_with_a_line(monkeypatch, capsys):
    """No exception ends the call in which gloo connects to an address that a dead rank left."""
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(distributed, "CONNECT", timedelta(seconds=0.1))
    monkeypatch.setattr(distributed.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: ended.wait(TIMEOUT_S))
    World(1, 2, 1, dist.HashStore()).connect("cpu", 60)
    assert codes == [2]
    line = "train.py: distributed: rank 1 of 2 could not connect to the others in 0 s\n"
    assert capsys.readouterr().err == line
    monkeypatch.setattr(distributed, "CONNECT", timedelta(seconds=TIMEOUT_S))
    World(1, 2, 1, dist.HashStore()).connect("cpu", 60)
    assert codes == [2]


DIES = """
import os, signal, sys
import torch
import torch.distributed as dist
from training import distributed

world, attempt = distributed.meet(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
world.connect("cpu", 60)
dist.all_reduce(torch.ones(1))
if attempt < int(sys.argv[1]) and world.rank == attempt % 2:
    os.kill(os.getpid(), signal.SIGKILL if attempt % 3 else signal.SIGTERM)
dist.barrier()
"""


@pytest.mark.slow
@linux_only
def test_eight_restarts_in_a_row(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    command = [*job(tmp_path, "", 2, restarts=8)[:5], str(tmp_path / "dies.py"), "8"]
    process = start(command, {"PYTHONPATH": str(ROOT)})
    output, _ = process.communicate(timeout=8 * TIMEOUT_S)
    assert process.returncode == 0, output
    assert "could not connect" not in output


def test_wrong_flags_are_said_once(monkeypatch, capsys):
    store = dist.HashStore()
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "meet", lambda rank=rank: World(rank, 2, rank, store))
        with pytest.raises(SystemExit, match="2"):
            train.main(["--stepz", "3"])
    said = capsys.readouterr()
    assert (said.out, said.err.count("--stepz")) == ("", 1)


@pytest.mark.parametrize("bad", [0, 1], ids=["first rank", "another rank"])
def test_bad_data_is_one_line_from_one_rank(text, tmp_path, monkeypatch, capsys, bad):
    """The data of either rank may be bad."""
    store = dist.HashStore()
    monkeypatch.chdir(tmp_path)
    here = threading.local()
    monkeypatch.setattr(distributed, "meet", lambda: World(here.rank, 2, here.rank, store))
    monkeypatch.setattr(World, "connect", lambda *_: None)
    data = [str(text / "text.txt")] * 2
    data[bad] = "absent.txt"
    configs = [train.parse([*FLAGS, "--data", path, "--out", "run"]) for path in data]
    monkeypatch.setattr(train, "parse", lambda _: configs[here.rank])  # tyro is not thread-safe

    def one(rank: int) -> int:
        here.rank = rank
        return train.main([])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, range(2))) == [2, 2]
    assert capsys.readouterr().err == "train.py: data: no such file: absent.txt\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number below 1048576, got 'abc'"),
        ({"WORLD_SIZE": "-2"}, "got '-2'"),
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number below 2, got None; torchrun sets it"),
        ({"WORLD_SIZE": "2", "RANK": "two"}, "RANK must be a whole number below 2, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be a whole number below 2, got '2'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "x"}, "LOCAL_RANK must be a whole"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "the ranks did not meet at None:None"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"},
            "the ranks did not meet at localhost:99999: port must have value from 0 to 65535",
        ),
    ],
)
def test_what_torchrun_sets_is_checked(environment, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train.main(FLAGS) == 2
    error = capsys.readouterr().err
    assert line in error
    assert (error.startswith("train.py: distributed: "), error.count("\n")) == (True, 1)


@pytest.mark.parametrize(("size", "micro", "count"), [(1, 16, 4), (2, 16, 2), (8, 8, 1), (3, 0, 0)])
def test_a_step_is_dealt_out_evenly_or_refused(size, micro, count):
    recipe = Recipe(batch_size=16, grad_accum_steps=4)
    plan = make_plan(
        recipe,
        detect("cpu"),
        Choices(ops="eager", dtype="fp32", compile=False, micro_batch_size=16),
    )
    if not micro:
        with pytest.raises(ValueError, match=r"64 rows per step .* do not divide among 3 ranks"):
            share(plan, recipe, World(0, size))
        return
    shared = share(plan, recipe, World(0, size))
    assert (shared.micro_batch_size, shared.num_micro_batches) == (micro, count)
    assert (shared.memory_bytes < plan.memory_bytes) == (size > 1)  # the memory of one rank


def test_a_folder_of_shards_is_a_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("so are they all, all honourable men. " * 200)
    inputs, out = (str(tmp_path / "a.txt"),), str(tmp_path / "out")
    prepare(Config(inputs, out, shard_tokens=500, val_tokens=300))
    corpus = load_corpus([tmp_path / "out"])
    train, val = corpus.split(0.1)
    assert len(val) == 300
    whole = np.concatenate([np.asarray(val[:]), np.asarray(train[:])])
    np.testing.assert_array_equal(whole[1:], load_corpus([tmp_path / "a.txt"]).tokens)


def test_a_lost_rank_is_known_by_where_it_was_lost():
    """Not all of gloo's messages name gloo."""
    words = "Application timeout caused pair closure"
    for file, expected in ((dist.__file__, True), (__file__, False)):
        code = compile(f"raise RuntimeError({words!r})", file, "exec")
        with pytest.raises(RuntimeError) as lost:
            exec(code)
        assert distributed.is_peers_fault(lost.value) == expected
    work: Any = SimpleNamespace(wait=threading.Lock().release)  # raises from C, as a Work does
    with pytest.raises(RuntimeError) as lost:
        distributed.wait([work])
    assert distributed.is_peers_fault(lost.value)
