"""Stop requests from outside: finish the step, save, exit with a code a scheduler can read.

SIGTERM (preemption), SIGINT (a person), SIGHUP (the terminal is gone) and SIGUSR1 (Slurm's early
warning) set a flag. The loop checks it between steps, the last evaluation between batches, the
samples between tokens. So a stop takes no longer than a step, an evaluation during the run or, at
the start, compiling. A second SIGINT stops at once.
"""

import _thread
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

# sysexits.h EX_TEMPFAIL: not done, run the same command again.
EXIT_RESUMABLE = 75
EXIT_AT_ONCE = 130  # 128 + SIGINT, what a shell reports for an interrupted program

PATIENCE_S = 1.0  # for a line that is not said yet when the run is at its end
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(Exception):
    """A stop request came while there was no step to finish."""


class StopRequest:
    """Context manager that turns signals into a flag and restores the handlers on exit.

    `say` receives one line per signal.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.say = say
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._unsaid: list[str] = []

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Stopped if the flag is set."""
        if self:
            raise Stopped

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            # Under nohup SIGHUP is ignored on purpose.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        deadline = time.monotonic() + PATIENCE_S
        while self._unsaid and time.monotonic() < deadline:
            time.sleep(0.01)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            # Not sys.exit: an interrupt inside a compiled step or a C call must not be swallowed.
            os._exit(EXIT_AT_ONCE)
        self.signal = signal.Signals(number).name
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        line = f"{self.signal}: stopping as soon as the run is saved{again}"
        # The handler may have interrupted a print, or the start of a thread. So it neither prints
        # nor starts a threading.Thread, which would wait for a lock held by what it interrupted.
        with suppress(RuntimeError):  # there are too many threads
            self._unsaid.append(line)
            _thread.start_new_thread(self._announce, (line,))

    def _announce(self, line: str) -> None:
        try:
            self.say(line)
        finally:
            self._unsaid.remove(line)


def ignore() -> None:
    """Let the process end by itself: its work is done and its exit code decided."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
