"""Stop requests from outside: finish the step, save, leave with a code a scheduler can read.

SIGTERM (preemption), SIGINT (a person) and SIGUSR1 (Slurm's early warning) only set a flag. The
loop polls it after each step, and evaluation, sampling and the first compiled step poll it too,
so the answer never takes longer than one of those pieces. A second SIGINT stops at once.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

# sysexits.h EX_TEMPFAIL: not done, run the same command again.
EXIT_RESUMABLE = 75
EXIT_AT_ONCE = 130  # 128 + SIGINT, what a shell reports for an interrupted program

_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # SIGUSR1 does not exist on Windows


class StopRequest:
    """Context manager that turns signals into a flag, and restores the handlers on exit.

    Args:
        say: Receives one line per signal.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            # Not sys.exit: an interrupt inside a compiled step or a C call must not be swallowed.
            os.write(2, b"\nstopped at once; the last checkpoint stays\n")
            os._exit(EXIT_AT_ONCE)
        self.signal = signal.Signals(number).name
        again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
        self.say(f"{self.signal}: finishing the step, then saving{again}")
