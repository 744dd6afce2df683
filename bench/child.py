"""The one way in which the bench runs other processes.

`run` takes a command to its end or to its limit. A `Child` lives on: it answers each line of JSON
with one of its own, and its side of that is `serve`. Each process gets a session of its own, so
that whatever it started ends with it, and each says why it is gone: what it printed last.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]
START_LIMIT_S = 120.0  # until the first answer: a child imports torch and opens the device


@dataclass(frozen=True)
class Ended:
    """A process that has ended; `code` is None where it was cut off."""

    code: int | None
    text: str

    @property
    def why(self) -> str:
        """How it ended, in words; empty where it ended well."""
        if self.code == 0:
            return ""
        if self.code is None:
            return "cut off"
        return f"exit {self.code}: {last_line(self.text)}"


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip()[-200:] for line in reversed(text.splitlines()) if line.strip()),
                "nothing said")  # fmt: skip


def run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command in the checkout; `text` is what it wrote to both of its outputs."""
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        _RUNNING.add(process.pid)
        try:
            text, _ = process.communicate(timeout=max(1.0, limit_s))
            return Ended(process.returncode, text)
        except subprocess.TimeoutExpired:
            end_session(process.pid)
            text, _ = process.communicate()
            return Ended(None, text)
        finally:
            end_session(process.pid)
            _RUNNING.discard(process.pid)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C end what `run` has started, in all threads, and this process."""

    def stop(signum: int, frame: object) -> None:
        for pid in [*_RUNNING]:
            end_session(pid)
        raise SystemExit(128 + signum)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_RUNNING: set[int] = set()  # sessions of `run`


def end_session(pid: int) -> None:
    """Kill whatever is left of a process and of all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class ChildDied(Exception):
    """There is no answer; the message says why, in one line.

    Attributes:
        is_short: It died for want of memory: killed by the system, or refused by the allocator.
    """

    @property
    def is_short(self) -> bool:
        return "ended with -9" in str(self) or "allocate memory" in str(self)


class Child:
    """A process that answers; a context manager.

    Args:
        command: Whose side is `serve`.
        limit_s: Within which it must have said its first word.
        cwd, env: As of subprocess.

    Attributes:
        first: Its first word.

    Raises:
        ChildDied: it ended, or took too long, before its first word.
    """

    def __init__(
        self, command: Sequence[str], limit_s: float = START_LIMIT_S, cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 # `end` closes it
        self._at_work = True
        self.process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, bufsize=0, start_new_session=True,
        )  # fmt: skip
        self.first = self._answer(limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, task: Any, limit_s: float) -> Any:
        """The answer to a task.

        Raises:
            ChildDied: it ended or took too long; it is gone then.
        """
        if self._errors.closed:
            raise ChildDied("it has ended before")
        assert self.process.stdin is not None
        self._at_work = True
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> Any:
        assert self.process.stdout is not None
        said, end = b"", time.monotonic() + limit_s
        while not said.endswith(b"\n"):
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                raise ChildDied(self.end(f"no answer in {limit_s:.0f} s"))
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5)  # so that the exit code is its own
                raise ChildDied(self.end("it closed its output"))
            said += part
        self._at_work = False
        return json.loads(said)

    def end(self, why: str = "") -> str:
        """End it; returns why it is gone: its exit code, or `why` if it lived, and its last words.

        A child at rest ends by itself when its input closes; one at work is killed.
        """
        if self._errors.closed:
            return why
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        code = self.process.poll()
        self.process.stdin.close()
        if not self._at_work:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        end_session(self.process.pid)
        self.process.wait()
        self.process.stdout.close()
        self._errors.seek(0)
        words = last_line(self._errors.read().decode(errors="replace"))
        self._errors.close()
        return f"{why if code is None else f'it ended with {code}'}: {words}"


def serve(prepare: Callable[[], tuple[Any, Callable[[Any], Any]]]) -> None:
    """A child's side: the first word and the function that answers, then a line for each line.

    Standard output is for answers alone; what kernels and libraries print goes with the errors.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    first, answer = prepare()
    print(json.dumps(first), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)
