"""Stop requests from outside: finish the step, save, leave with a code a scheduler can read.

SIGTERM (preemption), SIGINT (a person), SIGHUP (the terminal is gone) and SIGUSR1 (Slurm's early
warning) set a flag. The loop looks at it between steps, the last evaluation and the samples between
batches and tokens, so the answer takes no longer than a step, an evaluation during the run or, at
the start, compiling. A second SIGINT stops at once.
"""

import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# sysexits.h EX_TEMPFAIL: not done, run the same command again.
EXIT_RESUMABLE = 75
EXIT_AT_ONCE = 130  # 128 + SIGINT, what a shell reports for an interrupted program

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Stopped(Exception):
    """A stop request came where there is no step to finish first."""


class StopRequest:
    """Context manager that turns signals into a flag, and restores the handlers on exit.

    `say` receives one line per signal, from a thread: a handler may run in the middle of a print,
    and what it waits for may be what it interrupted.
    """

    def __init__(self, say: Callable[[str], None] = print):
        self.say = say
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._came: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # may be used in a handler
        self._thread = threading.Thread(target=self._announce, name="signals", daemon=True)

    def __bool__(self) -> bool:
        return self.signal is not None

    def check(self) -> None:
        """Raise Stopped where the flag is set."""
        if self:
            raise Stopped

    def __enter__(self) -> "StopRequest":
        self._thread.start()
        for number in _SIGNALS:
            # nohup has SIGHUP ignored, and means it.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._came.put(None)
        self._thread.join(timeout=1.0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            # Not sys.exit: an interrupt inside a compiled step or a C call must not be swallowed.
            os._exit(EXIT_AT_ONCE)
        self.signal = signal.Signals(number).name
        self._came.put(self.signal)

    def _announce(self) -> None:
        while (name := self._came.get()) is not None:
            again = "; press Ctrl-C again to stop at once" if name == "SIGINT" else ""
            self.say(f"{name}: stopping as soon as the run is saved{again}")


def ignore() -> None:
    """Let the process end by itself: its work is done and its exit code decided."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
