"""The one way in which the bench, and the check of the kernels, run other processes.

`run` takes a command to its end or to its limit. A `Child` lives on and answers what it is asked;
its side of that is `serve`. Each process gets a session of its own, so that whatever it started
ends with it, and each says why it is gone: what it printed last.
"""

import contextlib
import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 120.0  # until the first word: a child imports torch and opens the device
PIPE = "CHILD_PIPE"  # names the file descriptor of a child's end
# Or its last words would be what was still buffered when it gave the reason.
IN_ORDER = {"PYTHONUNBUFFERED": "1"}
_running: set[int] = set()  # sessions of `run`


@dataclass(frozen=True)
class Ended:
    """A process that has ended; `code` is None where it was cut off."""

    code: int | None
    text: str

    @property
    def why(self) -> str:
        """How it ended, in words; empty where it ended well."""
        if self.code is None:
            return "cut off"
        return f"exit {self.code}: {last_line(self.text)}" if self.code else ""


def last_line(text: str) -> str:
    lines = [line.strip()[-200:] for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing said"


def _start(command: Sequence[str], env: Mapping[str, str], **how: Any) -> Any:
    """A process in the checkout, with a session of its own."""
    return subprocess.Popen(
        command, cwd=ROOT, env={**env, **IN_ORDER}, start_new_session=True, **how
    )


def run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command in the checkout; `text` is what it wrote to both of its outputs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with _start(command, env or os.environ, text=True, errors="replace", **pipes) as process:
        _running.add(process.pid)
        try:
            text, _ = process.communicate(timeout=max(1.0, limit_s))
            return Ended(process.returncode, text)
        except subprocess.TimeoutExpired:
            end_session(process.pid)
            text, _ = process.communicate()
            return Ended(None, text)
        finally:
            end_session(process.pid)
            _running.discard(process.pid)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end what `run` has started, in all threads, and this process."""

    def stop(signum: int, frame: object) -> None:
        for pid in [*_running]:
            end_session(pid)
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_session(pid: int) -> None:
    """Kill whatever is left of a process and of all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class ChildDied(Exception):
    """There is no answer; the message says why, in one line."""


class Child:
    """A process that answers; a context manager.

    Args:
        command: Whose side is `serve`.
        limit_s: Within which it must have said its first word, which is then in `first`.

    Raises:
        ChildDied: it ended, or took too long, before its first word.
    """

    def __init__(self, command: Sequence[str], limit_s: float = START_LIMIT_S) -> None:
        self._pipe, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 # `end` closes it
        env = {**os.environ, PIPE: str(theirs.fileno())}
        files = {"stdin": subprocess.DEVNULL, "stdout": self._said, "stderr": self._said}
        self.process = _start(command, env, pass_fds=[theirs.fileno()], **files)
        theirs.close()
        self.first = self._answer(limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, task: Any, limit_s: float) -> Any:
        """The answer to a task; ChildDied if it ended or took too long, and it is gone then."""
        if self._pipe.closed:
            raise ChildDied("it has ended before")
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(task)
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> Any:
        why = ""
        with contextlib.suppress(EOFError, ConnectionError):
            if self._pipe.poll(limit_s):
                return self._pipe.recv()
            why = f"no answer in {limit_s:.0f} s"
        raise ChildDied(self.end(why))

    def end(self, why: str = "") -> str:
        """End it; returns why it is gone, its exit code or what is given, and its last words."""
        if self._pipe.closed:
            return why
        self._pipe.close()
        if not why:  # at rest it ends by itself now, and what died has an exit code soon
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        code = self.process.poll()
        end_session(self.process.pid)
        self.process.wait()
        self._said.seek(0)
        words = last_line(self._said.read().decode(errors="replace"))
        self._said.close()
        return f"{why or f'it ended with {code}'}: {words}"


class Crew:
    """So many children that work side by side; each starts when first asked, and after it died."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self.command = command
        self.children: list[Child | None] = [None] * count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in filter(None, self.children):
            child.end()

    def ask(self, task: Any, limit_s: float, who: int = 0) -> dict[str, Any]:
        """The answer of one of them, start included; that there is none is one too, as "error"."""
        if limit_s <= 0:
            return {"error": "no time left"}
        end = time.monotonic() + limit_s
        try:
            child = self.children[who] = self.children[who] or Child(self.command, limit_s)
            return child.ask(task, max(0.0, end - time.monotonic()))
        except ChildDied as why:
            self.children[who] = None
            return {"error": str(why)}

    def share(
        self, tasks: Sequence[Any], limit_s: float, until: float = math.inf
    ) -> list[dict[str, Any]]:
        """The answers in order, from whoever was free; no task begins after `until`."""
        free: SimpleQueue[int] = SimpleQueue()
        for who in range(len(self.children)):
            free.put(who)

        def one(task: Any) -> dict[str, Any]:
            who = free.get()
            answer = self.ask(task, limit_s if time.monotonic() < until else 0.0, who)
            free.put(who)
            return answer

        with ThreadPoolExecutor(len(self.children)) as pool:
            return [*pool.map(one, tasks)]


def serve(first: Any, answer: Callable[[Any], Any]) -> None:
    """A child's side: its first word, then an answer for each task."""
    pipe = Connection(int(os.environ[PIPE]))
    pipe.send(first)
    with contextlib.suppress(EOFError):  # nobody asks any more
        while True:
            pipe.send(answer(pipe.recv()))
