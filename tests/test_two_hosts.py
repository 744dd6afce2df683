"""Two hosts on one computer: network namespaces joined by a cable, each with a name and a folder.

What docs/guide.md says of several machines, over a real rendezvous: no disk is shared, the cable is
slow or pulled in the middle of a step.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from model import GPT
from tests.test_distributed import (
    FLAGS,
    ROOT,
    TIMEOUT_S,
    assert_equal_runs,
    finish,
    job,
    metrics,
    text,  # noqa: F401
)
from training import checkpoint
from training.recipes import find_preset

NAMES = "hosta", "hostb"
AS_HOST = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'


def ip(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@dataclass
class Host:
    """One end of the cable.

    Args:
        namespace: Of the network; `device` is its end of the cable.
        name: By which the other knows it, as `hosts` says.
        folder: Where its job runs; it has the text and nothing else.
    """

    namespace: str
    device: str
    name: str
    folder: Path
    hosts: Path

    def torchrun(self, *flags: str, restarts: int = 0) -> "subprocess.Popen[str]":
        two = "-m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d".split()
        launcher = [*two, f"--rdzv-endpoint={NAMES[0]}:29500", f"--max-restarts={restarts}"]
        host = ["ip", "netns", "exec", self.namespace, *"unshare --uts sh -c".split(), AS_HOST, "-"]
        host += [str(self.hosts), self.name, sys.executable]
        train = [str(ROOT / "train.py"), *FLAGS, "--data", "text.txt", "--out", "run", *flags]
        command, environment = [*host, *launcher, *train], {**os.environ, "OMP_NUM_THREADS": "1"}
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=environment, **how)

    def slow_down(self, rate: str) -> None:
        """Limit what it sends; at 50mbit the gradients of a step take two seconds."""
        limit = ["rate", rate, "burst", "64k", "latency", "1s"]
        add = ["qdisc", "add", "dev", self.device, "root", "tbf", *limit]
        assert subprocess.run(["tc", "-n", self.namespace, *add], check=False).returncode == 0

    def sent_bytes(self) -> int:
        path = f"/sys/class/net/{self.device}/statistics/tx_bytes"
        return int(ip("netns", "exec", self.namespace, "cat", path).stdout)


@pytest.fixture
def hosts(text: Path, tmp_path: Path) -> Iterator[tuple[Host, Host]]:  # noqa: F811
    names = [f"{name}-{os.getpid()}" for name in NAMES]
    devices = [f"cable{i}-{os.getpid()}" for i in (0, 1)]
    if ip("netns", "add", names[0]).returncode:
        pytest.skip("needs root and ip netns (iproute2) for network namespaces")
    try:
        assert ip("netns", "add", names[1]).returncode == 0
        cable = f"link add {devices[0]} netns {names[0]} type veth peer name {devices[1]} netns"
        made = ip(*cable.split(), names[1])
        assert made.returncode == 0, made.stderr
        (tmp_path / "hosts").write_text(
            f"127.0.0.1 localhost\n10.77.0.1 {NAMES[0]}\n10.77.0.2 {NAMES[1]}\n"
        )
        both = []
        for i, (name, device) in enumerate(zip(names, devices, strict=True)):
            ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", device)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "up")
            folder = tmp_path / NAMES[i]
            folder.mkdir()
            shutil.copy(text / "text.txt", folder)
            both.append(Host(name, device, NAMES[i], folder, tmp_path / "hosts"))
        yield both[0], both[1]
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture(scope="module")
def alone(text: Path) -> tuple[np.ndarray, np.ndarray]:  # noqa: F811
    code, output = finish(job(text, "alone", 1))
    assert code == 0, output
    return metrics(text, "alone")


def until(done: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + TIMEOUT_S
    while not done():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_slow_cable_loses_nothing_and_carries_what_a_ring_must(hosts, alone):
    first, other = hosts
    other.slow_down("100mbit")
    jobs = [host.torchrun() for host in hosts]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in jobs]
    assert [process.returncode for process in jobs] == [0, 0], outputs
    assert_equal_runs(metrics(first.folder, "run"), alone)
    assert sorted(path.name for path in other.folder.iterdir()) == ["text.txt"]
    with_padding = GPT(find_preset("smoke").model_config)
    gradients = sum(4 * p.numel() for p in with_padding.parameters())
    ring = 2 * (2 - 1) / 2 * gradients * len(alone[0])
    assert ring < other.sent_bytes() < 1.1 * ring  # headers, losses, the rendezvous


@pytest.mark.slow
def test_a_pulled_cable_ends_the_step_and_the_job_goes_on(hosts, alone):
    """Both resume from a checkpoint that only the first host has."""
    first, other = hosts
    other.slow_down("50mbit")  # the cable is pulled before the last step
    jobs = [host.torchrun("--rank-timeout", "15", restarts=2) for host in hosts]
    until(lambda: len(checkpoint.paths(first.folder / "run" / "checkpoints")) > 0, jobs[0])
    ip("-n", other.namespace, "link", "set", other.device, "down")
    time.sleep(25)
    ip("-n", other.namespace, "link", "set", other.device, "up")
    outputs = [process.communicate(timeout=2 * TIMEOUT_S)[0] for process in jobs]
    assert [process.returncode for process in jobs] == [0, 0], outputs
    for rank, output in enumerate(outputs):
        assert f"train.py: distributed: rank {rank} lost the others" in output
    assert "resume: run/checkpoints/step-0000000" in outputs[0]
    assert_equal_runs(metrics(first.folder, "run"), alone)
    assert sorted(path.name for path in other.folder.iterdir()) == ["text.txt"]
