"""Processes without the seconds that it takes to import torch: forks of one that has imported it.

The server of `multiprocessing` imports what is not ours, once for a test process. What it forks
imports ours, in an environment and a folder of its own, and can be signalled and killed.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "triton.language", "hypothesis", "pytest", "tyro", "rich.console"]
)


class Forked:
    """`target(*args)` in a process of its own, as `subprocess.Popen` would have it.

    Args:
        target: A function of a module.
        cwd: Where it runs.
        environment: All of its environment, OMP_NUM_THREADS included.
    """

    def __init__(
        self, target: Callable[..., Any], *args: Any, cwd: Path, environment: Mapping[str, str]
    ) -> None:
        reading, writing = _CONTEXT.Pipe(duplex=False)
        given = (writing, str(cwd), dict(environment), target, args)
        self._process = _CONTEXT.Process(target=_begin, args=given, daemon=True)
        self._process.start()
        writing.close()
        self.stdout = os.fdopen(os.dup(reading.fileno()), encoding="utf-8", errors="replace")
        reading.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return code

    def communicate(self, timeout: float) -> tuple[str, int]:
        """All that it prints, and its exit code; it is killed if it takes longer."""
        end = threading.Timer(timeout, self.kill)
        end.start()
        with self.stdout:
            printed = self.stdout.read()
        code = self.wait(timeout)
        end.cancel()
        return printed, code


def hear() -> None:
    """Signals that were ignored when the tests began, as by nohup or with &, do what they do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _begin(
    out: Connection,
    cwd: str,
    environment: dict[str, str],
    target: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    for number in (1, 2):
        os.dup2(out.fileno(), number)
    out.close()
    hear()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    target(*args)


def python(*command: str) -> None:
    """`python SCRIPT ...` or `python -m MODULE ...`, in a forked process."""
    if command[0] == "-m":
        sys.argv = [*command[1:]]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*command]
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
