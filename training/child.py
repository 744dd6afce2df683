"""Starts other processes for the bench and for the check and measurement before a run.

`run` takes a command to its end or to its time limit. A `Child` stays and answers tasks, by `serve`
on its side; a `Crew` is several of these. Each process gets a session of its own, so that whatever
it started ends with it. A process that is gone has a reason: what it printed last.
"""

import contextlib
import math
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

ROOT = Path(__file__).parents[1]
PIPE = "CHILD_PIPE"  # names the file descriptor of a child's end
END_S = 5.0  # for a child to end by itself once its pipe is closed
_running: set[int] = set()  # sessions of `run`


@dataclass(frozen=True)
class Ended:
    """A process that has ended; `code` is None if it reached its time limit."""

    code: int | None
    text: str

    @property
    def why(self) -> str:
        """How it failed, in words; "" if it did not."""
        if self.code is None:
            return "timed out"
        return f"exit {self.code}: {last_line(self.text)}" if self.code else ""


def last_line(text: str) -> str:
    lines = [line.strip()[-200:] for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def _start(
    command: Sequence[str], env: Mapping[str, str], said: IO[bytes], *descriptors: int
) -> subprocess.Popen[bytes]:
    """A process in the checkout, with a session of its own, whose outputs both go to `said`."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**env, "PYTHONUNBUFFERED": "1"},  # so that its last words are not lost in a buffer
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=said,
        pass_fds=descriptors,
    )


def _text(said: IO[bytes]) -> str:
    said.seek(0)
    return said.read().decode(errors="replace")


def run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command in the checkout; `text` is what it wrote to both of its outputs."""
    with tempfile.TemporaryFile() as said:
        process = _start(command, env or os.environ, said)
        _running.add(process.pid)
        try:
            code = process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(process.pid)
            _running.discard(process.pid)
            process.wait()
        return Ended(code, _text(said))


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """In this context SIGTERM and Ctrl-C end this process and all that `run` started."""

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
    """A child gave no answer; the message says why in one line."""


class Child:
    """A process that runs `command`, whose side is `serve`, and answers tasks until `end`."""

    def __init__(self, command: Sequence[str]) -> None:
        self._pipe, theirs = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 # `end` closes it
        descriptor = theirs.fileno()
        env = {**os.environ, PIPE: str(descriptor)}
        self.process = _start(command, env, self._said, descriptor)
        theirs.close()

    def ask(self, task: Any, limit_s: float) -> Any:
        """The answer to a task; its start counts in the first one's time.

        Raises:
            ChildDied: the process ended or took too long; either way it is gone now.
        """
        if self._pipe.closed:
            raise ChildDied("it has ended before")
        why = ""
        try:
            self._pipe.send(task)
            if self._pipe.poll(limit_s):
                return self._pipe.recv()
            why = f"no answer in {limit_s:.0f} s"
        except KeyboardInterrupt:  # the child has a session of its own, so it got no signal
            self.end("interrupted")
            raise
        except (EOFError, ConnectionError):
            pass  # it ended
        raise ChildDied(self.end(why))

    def end(self, why: str = "") -> str:
        """End it. Returns why it is gone (its exit code, or `why`) and its last words."""
        if self._pipe.closed:
            return why
        self._pipe.close()
        if not why:  # an idle child now ends by itself, and a dead one has its exit code soon
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_S)
        code = self.process.poll()
        end_session(self.process.pid)
        self.process.wait()
        with self._said as said:
            return f"{why or f'it ended with {code}'}: {last_line(_text(said))}"


class Crew(contextlib.AbstractContextManager):
    """`count` children side by side. Each starts when first asked, and again if it has died."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self.command = command
        self.children: list[Child | None] = [None] * count

    def __exit__(self, *_: object) -> None:
        with ThreadPoolExecutor(len(self.children) or 1) as pool:
            for child in filter(None, self.children):
                pool.submit(child.end)

    def ask(self, task: Any, limit_s: float, who: int = 0) -> dict[str, Any]:
        """The answer of one child, or {"error": why there is none}."""
        if limit_s <= 0:
            return {"error": "no time left"}
        try:
            child = self.children[who] = self.children[who] or Child(self.command)
            return child.ask(task, limit_s)
        except ChildDied as why:
            self.children[who] = None
            return {"error": str(why)}

    def share(
        self, tasks: Sequence[Any], limit_s: float, until: float = math.inf
    ) -> list[dict[str, Any]]:
        """The answers in order, each by a child that was free; no task begins after `until`."""
        free: SimpleQueue[int] = SimpleQueue()
        for who in range(len(self.children)):
            free.put(who)

        def one(task: Any) -> dict[str, Any]:
            who = free.get()
            answer = self.ask(task, limit_s if time.monotonic() < until else 0.0, who)
            free.put(who)
            return answer

        with ThreadPoolExecutor(len(self.children)) as pool:
            answers = [pool.submit(one, task) for task in tasks]
            try:
                return [each.result() for each in answers]
            except BaseException:  # Ctrl-C; the threads end once the children are gone
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(each.done() for each in answers):
                    for child in filter(None, self.children):
                        end_session(child.process.pid)
                    time.sleep(0.01)
                raise


def serve(answer: Callable[[Any], Any]) -> None:
    """The child's side: answer each task until no more come."""
    pipe = Connection(int(os.environ[PIPE]))

    def end_with_parent() -> None:
        hang_up = select.poll()
        hang_up.register(pipe.fileno(), 0)
        hang_up.poll()
        time.sleep(END_S)
        end_session(os.getpid())  # it has not ended by itself, so it is at a task

    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError):
        while True:
            pipe.send(answer(pipe.recv()))
