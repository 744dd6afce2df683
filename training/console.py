"""What a run prints. Whatever becomes of the console, the run goes on without it.

A terminal is closed, a pipe loses its reader or is never read, a disk fills up under a log file,
cp1252 has no word for a sample: none of these is a reason to lose a run.
"""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from model.edge import hold_streams

PATIENCE_S = 5.0  # for a reader that does not read, once the run has been asked to stop


class _Survivor(io.RawIOBase):
    """Writes to a text stream until it takes nothing any more, then to nobody.

    Args:
        stream: Standard output or error as Python opened it.
        name: "stdout" or "stderr".
        hurried, what_is_left: See `surviving`.
    """

    def __init__(self, stream: TextIO, name: str, hurried: Callable[[], bool], what_is_left: str):
        self.stream, self.name, self.hurried = stream, name, hurried
        self.what_is_left, self.lost, self.number = what_is_left, False, None
        self.failure: Exception | None = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a test's capture
            self.number = stream.fileno()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return not self.lost and self.stream.isatty()

    def write(self, data: bytes) -> int:  # pyright: ignore
        if self.lost:
            return len(data)
        # In a thread, because a write to a full pipe cannot be given up by whoever is in it.
        thread = threading.Thread(target=self._send, args=(bytes(data),), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is at its end, or there are too many threads
            self._send(bytes(data))
        waited = 0.0
        while thread.is_alive() and not self.lost and waited <= PATIENCE_S:
            thread.join(0.1)
            waited += 0.1 * self.hurried()
        if self.failure or thread.is_alive():
            self._lose(self.failure or "nobody reads it")
        return len(data)

    def _send(self, data: bytes) -> None:
        try:
            if self.number is None:
                self.stream.write(data.decode(self.stream.encoding or "utf-8"))
                self.stream.flush()
            while data and self.number is not None:
                data = data[os.write(self.number, data) :]
        except (OSError, ValueError) as error:
            self.failure = error

    def _lose(self, reason: object) -> None:
        told, self.lost = self.lost, True  # of several threads that write the first says it
        if told:
            return
        if self.number is not None:  # what libraries print there may not fail either
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.number)
            os.close(null)
        if self.name == "stdout":
            print(f"standard output is lost ({reason}); {self.what_is_left}", file=sys.stderr)


@contextlib.contextmanager
def surviving(
    hurried: Callable[[], bool] = lambda: False, what_is_left: str = "the work goes on"
) -> Iterator[None]:
    """Standard output and error that never raise and never hold up a run that is to stop.

    Args:
        hurried: Whether the run was asked to stop.
        what_is_left: Said once nobody takes standard output any more.
    """
    hold_streams()
    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    for name, stream in before.items():
        stream.flush()
        raw = _Survivor(stream, name, hurried, what_is_left)
        wrapped = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, wrapped)
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
