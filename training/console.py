"""What a run prints. Whatever happens to the console, the run goes on without it.

A terminal is closed, a pipe loses its reader or is never read, the disk under a log file fills up,
cp1252 cannot encode a sample: none of these may end a run.
"""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator

from model.edge import hold_streams

PATIENCE_S = 5.0  # to wait for a reader that does not read, once the run must stop


class _Survivor(io.FileIO):
    """Writes to a file descriptor until that fails or takes too long; then says `farewell`."""

    def __init__(self, number: int, hurried: Callable[[], bool], farewell: str):
        super().__init__(number, "w", closefd=False)
        self.hurried, self.farewell, self.lost = hurried, farewell, False
        self.failure: Exception | None = None

    def write(self, data: bytes) -> int:  # pyright: ignore
        if self.lost:
            return len(data)
        # In another thread, because a write to a full pipe cannot be interrupted.
        thread = threading.Thread(target=self._send, args=(bytes(data),), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is at its end, or there are too many threads
            self._send(bytes(data))
        waited = 0.0
        while thread.is_alive() and not self.lost and waited <= PATIENCE_S:
            thread.join(0.1)
            waited += 0.1 * self.hurried()
        if (self.failure or thread.is_alive()) and not self.lost:  # no other thread reported it
            self.lost = True
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # what libraries print there may not fail either
            os.close(null)
            if self.farewell:
                reason = self.failure or "nobody reads it"
                print(f"standard output is lost ({reason}); {self.farewell}", file=sys.stderr)
        return len(data)

    def _send(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self.fileno(), data) :]
        except (OSError, ValueError) as error:  # a ValueError: it has been closed meanwhile
            self.failure = error


@contextlib.contextmanager
def surviving(
    hurried: Callable[[], bool] = lambda: False, what_is_left: str = "the work goes on"
) -> Iterator[None]:
    """Standard output and error that never raise, and never hold up a run that is to stop.

    Args:
        hurried: Whether the run was asked to stop.
        what_is_left: Said once when standard output cannot be written any more.
    """
    hold_streams()
    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    for name, stream in before.items():
        stream.flush()
        with contextlib.suppress(OSError, AttributeError):  # not a file: a notebook's stream
            farewell = what_is_left if name == "stdout" else ""
            raw = _Survivor(stream.fileno(), hurried, farewell)
            text = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True)
            setattr(sys, name, text)
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)
