"""The edge to the outside: checked values, quoted text, and how a command ends."""

import codecs
import io
import numbers
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def printable(text: object) -> str:
    """`text` with control characters spelled out, except line ends.

    A name in a stranger's file could otherwise move the cursor or recolour the terminal.
    """
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


def one_line(text: object, limit: int = 1000) -> str:
    """`text` on one printable line of at most `limit` characters."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def quoted(value: object) -> str:
    """A value from a file, short enough for a message."""
    large = isinstance(value, int) and value.bit_length() > 256
    if large or (isinstance(value, dict | list) and value):
        return f"a long {type(value).__name__}"
    return one_line(repr(value), 80)


def read_utf8(what: str, data: bytes, offset: int = 0) -> str:
    """`data` as text, without the byte order mark that some editors put first.

    Raises:
        ValueError: names the first byte that is not UTF-8 in `what`, where `data` begins at offset.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start}; convert it, e.g. iconv -t UTF-8"
        ) from None
    return text if offset else text.removeprefix("\ufeff")


def read_stdin(command: str, limit: int) -> bytes:
    """What is piped into a command. A line reports a byte order mark at its beginning.

    Raises:
        ValueError: standard input is closed, or has more than `limit` bytes.
    """
    if sys.stdin is None:
        raise ValueError(f"{command}: - reads standard input, which is closed")
    raw = sys.stdin.buffer.read(limit + 1)
    if len(raw) > limit:
        raise ValueError(f"{command}: stdin has more than {limit:,} bytes")
    if raw.startswith(codecs.BOM_UTF8):
        print(
            f"{command}: the byte order mark at the beginning of stdin is left out", file=sys.stderr
        )
    return raw


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError that names no file, such as one of read or write."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            error.filename = str(path)
        raise


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_int(where: str, name: str, value: Any, least: int, most: int) -> None:
    """Raise ValueError unless `value` is a whole number in [least, most]."""
    if not (is_int(value) and least <= value <= most):
        raise ValueError(
            f"{where}: {name} must be a whole number from {least:,} to {most:,}, "
            f"got {quoted(value)}"
        )


def hold_streams() -> None:
    """Open the null device for each standard stream that is closed.

    Otherwise the next opened file would get the stream's number, and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before Python began
            null = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 # until the end
            setattr(sys, name, null)


@contextmanager
def exits() -> Iterator[None]:
    """Bad input, or a full GPU, becomes one line and exit code 2, Ctrl-C becomes 130.

    A lost reader is no error.
    """
    hold_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the console may lack a character
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        line = one_line(error)
        if isinstance(error, RuntimeError):
            if "out of memory" not in line:
                raise
            line = str(error).partition("\n")[0] + "; --device cpu does without"
        try:
            sys.stdout.flush()
        except OSError:  # the rest of the buffer must go nowhere, or Python complains when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)
