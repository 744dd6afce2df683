"""Child processes answer, end together with what they started, and say why they ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from training import child

CHILD = """
import os, sys, time
from training import child

def answer(task):
    print("said by a library")
    if task == "die":
        sys.exit("no such device")
    if task == "hang":
        time.sleep(600)
    if task == "pid":
        return os.getpid()
    return [task]

child.serve(answer)
"""
COMMAND = [sys.executable, "-c", CHILD]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 300
    while is_alive(pid):
        assert time.monotonic() < deadline, f"{pid} lives on"
        time.sleep(0.05)


def test_a_child_answers_and_ends_with_its_input() -> None:
    process = child.Child(COMMAND)
    assert process.ask("pid", 60) == process.process.pid != os.getpid()
    assert [process.ask(task, 60) for task in ("a", {"b": 1.5})] == [["a"], [{"b": 1.5}]]
    assert process.end() == "it ended with 0: said by a library"
    with pytest.raises(child.ChildDied, match="has ended before"):
        process.ask("a", 60)


def test_a_child_that_dies_or_hangs_says_why() -> None:
    died = partial(pytest.raises, child.ChildDied)
    with died(match=r"^it ended with 1: no such device$"):
        child.Child(COMMAND).ask("die", 60)
    process = child.Child(COMMAND)
    assert process.ask("a", 60) == ["a"]  # it has started
    with died(match=r"^no answer in 1 s: said by a library$"):
        process.ask("hang", 1)
    wait_until_gone(process.process.pid)
    with died(match=r"^it ended with 3: it printed nothing$"):
        child.Child([sys.executable, "-c", "raise SystemExit(3)"]).ask("a", 60)


def test_ctrl_c_ends_the_child_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(limit_s: float) -> bool:
        raise KeyboardInterrupt

    process = child.Child(COMMAND)
    monkeypatch.setattr(process._pipe, "poll", interrupt)
    with pytest.raises(KeyboardInterrupt):
        process.ask("hang", 60)
    assert not is_alive(process.process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_crew_ends_with_its_process(number: int) -> None:
    """Ctrl-C and a kill, while each of two children has a task that never ends, and one waits."""
    code = (
        "import signal, sys\nfrom training import child\n"
        # A shell starts what is in the background with this signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with child.Crew([sys.executable, '-c', sys.argv[1]], 2) as crew:\n"
        "    print('ready', flush=True)\n    crew.share(['hang'] * 3, 500)\n"
    )
    command = [sys.executable, "-c", code, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=child.ROOT) as process:
        try:
            children = started_by(process)
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
    for pid in children:
        wait_until_gone(int(pid))


def started_by(process: subprocess.Popen[str]) -> list[str]:
    """The ids of two processes that a process has started."""
    assert process.stdout
    process.stdout.readline()
    children: list[str] = []
    listed = Path(f"/proc/{process.pid}/task")
    deadline = time.monotonic() + 300
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = " ".join(path.read_text() for path in listed.glob("*/children")).split()
    assert len(children) == 2
    return children


def test_a_process_that_outlasts_its_time_ends_with_what_it_started() -> None:
    script = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(600)']); print(p.pid, flush=True); time.sleep(600)"
    )
    ended = child.run([sys.executable, "-c", script], 3.0)
    assert (ended.code, ended.why) == (None, "timed out")
    wait_until_gone(int(ended.text))
    failed = child.run([sys.executable, "-c", "print('x'); raise SystemExit('no')"], 60)
    assert failed.why == "exit 1: no"
    assert child.run([sys.executable, "-c", ""], 60).why == ""


def test_what_a_signal_ends() -> None:
    """A signal ends the processes that all threads have started, then this process."""
    code = (
        "import sys, threading\nfrom training import child\n"
        "run = [sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True, "
        'file=open(2, "w")); time.sleep(600)\']\n'
        "with child.ended_by_signals():\n"
        "    threads = [threading.Thread(target=lambda: child.run(run, 500)) for _ in range(2)]\n"
        "    [t.start() for t in threads]\n    print('ready', flush=True)\n"
        "    [t.join() for t in threads]\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=child.ROOT
    ) as process:
        children = started_by(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    for pid in children:
        wait_until_gone(int(pid))


def test_a_crew_ends_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes a while to give back a GPU, and `make tune` has a dozen of them."""
    both = threading.Barrier(2, timeout=5)
    monkeypatch.setattr(child.Child, "end", lambda _: both.wait())
    with child.Crew([], 3) as crew:
        crew.children[:2] = [object.__new__(child.Child) for _ in range(2)]
