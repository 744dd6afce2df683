"""Whatever becomes of the console, and whenever a signal comes, a run goes on or is saved."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from training import console
from training.console import surviving
from training.metrics import RunLog
from training.signals import StopRequest

pytestmark = pytest.mark.usefixtures("heard")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def pipe():
    """A pipe's reading end, and a stream to write to."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        yield reading, stream
    os.close(reading)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_the_console_cannot_encode_is_escaped(encoding, tmp_path, monkeypatch):
    with (tmp_path / "log").open("w", encoding=encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with surviving():
            print("snow \u2603, a byte that is not UTF-8 \udce9")
    written = (tmp_path / "log").read_bytes()
    assert b"\\udce9" in written
    assert (b"\\u2603" in written) == (encoding != "utf-8")


def test_a_reader_that_goes_away_is_said_once_and_ends_nothing(pipe, monkeypatch, capfd):
    reading, stream = pipe
    monkeypatch.setattr(sys, "stdout", stream)
    with surviving():
        print("one")
        with open(os.devnull, encoding="utf-8") as null:
            os.dup2(null.fileno(), reading)  # nobody holds the pipe's reading end
        print("two")
        print("three")
    print("and after it", file=stream, flush=True)  # as the interpreter does at its end
    assert capfd.readouterr().err.count("standard output is lost") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_log_ends_nothing(monkeypatch, capfd):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with surviving():
            print("one")
    assert "No space left" in capfd.readouterr().err


def test_closed_streams_are_no_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has them after `>&- 2>&-`
    monkeypatch.setattr(sys, "stderr", None)
    with surviving():
        print("to nobody")
        print("to nobody", file=sys.stderr)
        sys.stdout.flush()
    print("to nobody still")


def test_all_is_written_to_a_reader_that_takes_its_time(pipe, monkeypatch):
    reading, stream = pipe
    monkeypatch.setattr(sys, "stdout", stream)
    got = []

    def read() -> None:
        while not got or got[-1]:
            got.append(os.read(reading, 100))

    reader = threading.Thread(target=read)
    with surviving():
        reader.start()
        for i in range(5000):
            print(f"line {i:40d}")
    stream.close()
    reader.join()
    assert b"".join(got).splitlines() == [b"line %40d" % i for i in range(5000)]


def test_nobody_reads_and_the_run_is_to_stop(pipe, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", pipe[1])
    monkeypatch.setattr(console, "PATIENCE_S", 0.3)
    hurried = threading.Event()
    with surviving(hurried.is_set):
        threading.Timer(0.2, hurried.set).start()
        # More than a pipe holds, of several threads at once, as a signal's line is.
        threads = [threading.Thread(target=print, args=("x" * 200_000,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert capfd.readouterr().err.count("nobody reads it") == 1


def test_a_signal_in_the_middle_of_a_print(monkeypatch):
    """A handler that prints there raises "reentrant call", or waits for itself."""

    class Pipe(io.RawIOBase):
        written = b""

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            if not self.written:
                self.written += bytes(data)
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
                    os.kill(os.getpid(), number)
            self.written += bytes(data)
            return len(data)

    raw = Pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw), "utf-8"))
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(lambda line: print(line, flush=True)) as stop:
        print("a line", flush=True)
    assert stop.signal == "SIGINT"
    deadline = time.monotonic() + 20.0
    while raw.written.count(b"stopping as soon as") < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert raw.written.count(b"stopping as soon as") == 4
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_at_the_end_is_said_before_the_end():
    said: list[str] = []

    def say(line: str) -> None:
        time.sleep(0.2)
        said.append(line)

    with StopRequest(say):
        os.kill(os.getpid(), signal.SIGTERM)
    assert said == ["SIGTERM: stopping as soon as the run is saved"]


def test_nohup_is_obeyed(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(print) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_name_is_printed_as_it_is(terminal, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    log = RunLog(tmp_path, 3, 100, lambda _: None)
    log.say("--out /runs/a:cat:b[bold]c")
    assert "--out /runs/a:cat:b[bold]c" in capsys.readouterr().out


ENDS = """
import sys
from edge import exits  # the file alone: the package imports torch, which is of no matter here
with exits():
    print("to whom it may concern")
    if sys.argv[1:]:
        raise ValueError("a reason")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirected", "argument", "code", "error"),
    [
        (">/dev/full", "", 2, "error: [Errno 28] No space left on device\n"),
        (">/dev/full", "bad", 2, "error: a reason\n"),
        (">&-", "", 0, ""),
        (">&-", "bad", 2, "error: a reason\n"),
        (">&- 2>&- <&-", "bad", 2, ""),
        ("| true", "", 0, ""),
    ],
)
def test_a_command_ends_in_one_line_whatever_becomes_of_its_output(
    redirected, argument, code, error
):
    script = f'{{ sleep 0.2; "$0" -c "$1" {argument}; }} {redirected}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, sys.executable, ENDS]
    done = subprocess.run(command, cwd=ROOT / "model", capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", error)
