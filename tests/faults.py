"""Kills, signals and damage against small real runs: `make torture`, and its parts for the tests.

Every disturbed run must end with the weights, optimizer state and logged losses of the undisturbed
one, bit for bit. The run begins a second epoch, accumulates four micro-batches and has the guard
on. The last line printed has the figures.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.forked import Forked, python
from training import checkpoint
from training.checkpoint import CheckpointError
from training.signals import EXIT_RESUMABLE

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0


@dataclass
class Small:
    """A run small enough to be killed often: seconds, yet with every part of a real one.

    Args:
        folder: Where the text and the runs go.
        steps: Optimizer steps; 4 micro-batches of 2 x 32 tokens each.
        save_every: Steps between checkpoints.
        flags: More flags for train.py.
        compile: torch.compile the model.
    """

    folder: Path
    steps: int = 14
    save_every: int = 2
    flags: tuple[str, ...] = ()
    compile: bool = False
    environment: dict[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})

    def __post_init__(self) -> None:
        draw = random.Random(0)
        words = ["king", "queen", "the", "of", "and", "sword", "night", "thou", "art", "\n"]
        # About 1,900 training tokens: 59 rows an epoch, 8 rows a step, so step 8 wraps.
        text = " ".join(draw.choice(words) for _ in range(2100))
        (self.folder / "text.txt").write_text(text, encoding="utf-8")

    def command(self, out: str, *flags: str) -> list[str]:
        text, folder = str(self.folder / "text.txt"), str(self.folder / out)
        words = f"""--preset smoke --device cpu --steps {self.steps} --batch-size 2 --block-size 32
            --grad-accum-steps 4 --eval-every 5 --save-every {self.save_every}
            --compile={"on" if self.compile else "off"}"""
        fixed = [str(ROOT / "train.py"), "--data", text, "--out", folder, *words.split()]
        return [*fixed, *self.flags, *flags]

    def start(self, out: str, *flags: str) -> Forked:
        environment = {**os.environ, **self.environment}
        command = self.command(out, *flags)
        return Forked(python, *command, cwd=self.folder, environment=environment)

    def finish(self, out: str, *flags: str) -> tuple[int, str]:
        output, code = self.start(out, *flags).communicate(TIMEOUT_S)
        return code, output

    def checkpoints(self, out: str) -> Path:
        return self.folder / out / "checkpoints"

    def result(self, out: str) -> tuple[dict[str, bytes], list[tuple[int, float, float]]]:
        """Tensors of the final checkpoint as bytes, and (step, loss, norm) of every step."""
        saved = checkpoint.read(self.checkpoints(out) / f"step-{self.steps:08d}")
        tensors = {
            f"{group}/{name}": t.numpy().tobytes()
            for group, named in saved.tensors.items()
            for name, t in named.items()
        }
        lines = (self.folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return tensors, [(r["step"], r["loss"], r["grad_norm"]) for r in rows if "event" not in r]


def wait_for(process: Forked, moment: str, folder: Path, after_s: float) -> bool:
    """Wait until a moment of the run; False when the process ended before it.

    Args:
        process: The run.
        moment: "any" (after_s after its first checkpoint began), "writing" (a checkpoint is being
            written), "second" (two checkpoints are done) or "file" (`folder` is a file and there).
        folder: Its checkpoint folder.
        after_s: Further wait, so that the instant is random.
    """
    end = time.monotonic() + TIMEOUT_S
    reached = False
    writes_seen = 0
    was_writing = False
    while process.poll() is None and time.monotonic() < end:
        names = os.listdir(folder) if folder.is_dir() else []
        writing = any(n.startswith(".writing-") for n in names)
        writes_seen += writing and not was_writing
        was_writing = writing
        done = sum(n.startswith("step-") for n in names)
        if moment == "writing":
            # A write other than the first half of the time, so that something is there to go on.
            reached = writing and writes_seen >= (1 if after_s < 0.005 else 2)
        elif moment == "second":
            reached = done >= 2 and writes_seen >= 1  # in this process, not in the one before
        elif moment == "file":
            reached = folder.is_file()
        else:
            reached = writes_seen >= 1
        if reached:
            break
        time.sleep(0.0005)
    if reached:
        time.sleep(after_s)
    return process.poll() is None


def disturb(run: Small, out: str, kills: int, how: int, draw: random.Random) -> dict[str, int]:
    """Start `out`, disturb it `kills` times, resuming each time, then let it end.

    Returns:
        "all" kills that struck, those inside a checkpoint write, and those after the second
        checkpoint; a kill can be both.

    Raises:
        AssertionError: an exit code is not the documented one.
    """
    struck = {"all": 0, "writing": 0, "second": 0}
    moments = ["writing", "second", "any"]
    for i in range(3 * kills):
        if struck["all"] == kills:
            break
        moment = moments[i % 3]
        process = run.start(out)
        span = 0.01 if moment == "writing" else 0.7
        alive = wait_for(process, moment, run.checkpoints(out), draw.uniform(0, span))
        in_write = any(p.name.startswith(".writing-") for p in run.checkpoints(out).glob(".*"))
        after_second = len(checkpoint.paths(run.checkpoints(out))) >= 2
        if alive:
            process.send_signal(how)
        output, _ = process.communicate(TIMEOUT_S)
        if process.returncode == 0:
            break  # it ended before the moment came
        began = "recipe:" in output
        expected = EXIT_RESUMABLE if how == signal.SIGTERM and began else -how
        assert process.returncode == expected, f"exit {process.returncode}: {output[-2000:]}"
        if not began:
            continue  # still importing: nothing of ours was running yet, so it does not count
        struck["all"] += 1
        struck["writing"] += in_write
        struck["second"] += after_second
    code, output = run.finish(out)
    assert code == 0, output[-2000:]
    return struck


def flip_bytes(folder: Path, flips: int, draw: random.Random) -> int:
    """Flip one bit of one byte, `flips` times, each undone; returns how many were detected."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    sizes = [p.stat().st_size for p in files]
    detected = 0
    for i in range(flips):
        # Every file in turn: by size alone the manifest would never be hit.
        path = files[i % len(files)]
        at = draw.randrange(sizes[i % len(files)])
        with path.open("r+b") as f:
            f.seek(at)
            old = f.read(1)
            f.seek(at)
            f.write(bytes([old[0] ^ (1 << draw.randrange(8))]))
        try:
            checkpoint.read(folder)
        except CheckpointError:
            detected += 1
        with path.open("r+b") as f:
            f.seek(at)
            f.write(old)
    checkpoint.read(folder)  # and whole again
    return detected


def full_disk(run: Small) -> str | None:
    """A run on a tmpfs too small for its checkpoints; None where mounting is not allowed."""
    mount = run.folder / "full"
    mount.mkdir()
    size = "size=75m"  # the model, one checkpoint (40 MB), not two
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", str(mount)], capture_output=True
    ).returncode:
        return None
    try:
        code, output = run.finish("full/run", "--keep-last", "2")
        assert code in (0, 1), output[-2000:]
        assert "training goes on" in output, output[-2000:]
        left = checkpoint.newest_good(mount / "run" / "checkpoints", print)
        assert left is not None, "the checkpoint written before the disk was full must stay"
        return f"warned {output.count('training goes on')} times, step {left.step} kept"
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def main(kills: int = 50, terms: int = 12, per_run: int = 6) -> int:
    draw = random.Random(int(os.environ.get("TORTURE_SEED", "0")))
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    start = time.monotonic()
    totals = {"all": 0, "writing": 0, "second": 0}
    runs = 0
    try:
        run = Small(folder)
        code, output = run.finish("calm")
        assert code == 0, output
        want = run.result("calm")
        detected = flip_bytes(run.checkpoints("calm") / f"step-{run.steps:08d}", 200, draw)
        print(f"byte flips detected: {detected} of 200", flush=True)
        disk = full_disk(run)
        print(f"full disk: {disk or 'not tried, mounting a tmpfs is not allowed here'}", flush=True)
        for how, wanted in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
            done = 0
            while done < wanted:
                out = f"run{runs}"
                struck = disturb(run, out, min(per_run, wanted - done), how, draw)
                assert run.result(out) == want, f"{out}: not bitwise the undisturbed run"
                done += struck["all"]
                if how == signal.SIGKILL:
                    totals = {k: totals[k] + struck[k] for k in totals}
                runs += 1
                shutil.rmtree(folder / out)
                print(f"{signal.Signals(how).name}: {done} of {wanted} survived", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"torture: {kills} SIGKILL ({totals['writing']} inside a checkpoint write, "
        f"{totals['second']} after the second checkpoint) and {terms} SIGTERM survived over "
        f"{runs} runs, final weights, optimizer and losses bitwise equal every time; "
        f"{detected} of 200 byte flips detected; {time.monotonic() - start:.0f} s"
    )
    return 0 if detected == 200 and totals["writing"] >= 10 <= totals["second"] else 1


if __name__ == "__main__":
    sys.exit(main())
