"""Everything a GPU should settle, in three commands that survive being cut off.

    python -m bench.gpu --out DIR --only check     are the kernels right, does every part run
    python -m bench.gpu --out DIR --only tune      each op beside its rivals; better launch rows
    python -m bench.gpu --out DIR --only final     the whole step, the recipe, the comparisons
    python -m bench.gpu --out DIR --only numerics,seed --data input.txt --minutes 4

A part is a list of commands with limits, each in a process of its own, so that an illegal access or
a hang in one costs only that one; time one leaves is shared among those after it. Nothing is timed
while parts that only check run side by side. Rows go to DIR/result.json as a command
ends, what it says to DIR/log.txt; the tables of the report come last.

Nothing is downloaded; torch, triton, numpy, tyro and pytest are needed, and what else is missing
costs its own rows only. `--data` is a text or uint16 token file; without one the training parts
read this project's own source.

    numerics   every op in fp32, TF32, fp16, bf16 against float64, and 50 times the same bits
    tests      the tests of the ops, the optimizer and the step, natively
    sanitizer  compute-sanitizer on every op, and on a planted overrun that it must find
    resume     runs killed and resumed on the device, bitwise
    profile    where a step's time goes; writes DIR/trace.json.gz
    generate   tokens per second of the 124M model
    ops        each op beside its rivals, with the machine's limits
    tune       `make tune`; the answer is DIR/tune.json, its launch rows are in DIR/log.txt
    step       the whole step beside plain PyTorch, and with one thing at a time switched back
    seed       train.py on the Shakespeare recipe until its loss is below 0.09, cold and warm caches
    drift      500 steps, Triton ops against eager ops, same seed
    optimizer  clip and AdamW alone, ours beside torch's
    sweep      each op over sizes, for the plots
"""

import gzip
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch

from bench import cli, record, report
from bench.cases import CASES
from bench.rows import CheckRow, Row
from tests import numerics
from training import child

GROUPS = {
    "check": ("numerics", "tests", "sanitizer", "resume", "profile", "generate"),
    "tune": ("ops", "tune"),
    "final": ("step", "seed", "drift", "optimizer", "sweep"),
}
PARTS = [name for group in GROUPS.values() for name in group]
# They check and time nothing, so they run beside each other.
BESIDE = ("numerics", "tests", "sanitizer", "resume")
MIN_S = 15.0
SANITIZER_ERROR = 99  # exit code compute-sanitizer is told to use
OP_TESTS = [f"tests/test_{name}.py" for name in (*CASES, "adamw", "backends")]
GPU_TESTS = ["tests/test_step.py", "tests/test_generate.py", "tests/test_timing.py"]


@dataclass(frozen=True)
class Command:
    """One process of a part.

    Args:
        part: Whose.
        seconds: What it takes on an H100 or H200 and 16 cores: an estimate until it has run there,
            and the weight of its share of the time.
        argv: "{minutes}" becomes the limit, "{out}" the file for its rows.
        read: What to make of how it ended, where it writes no rows itself.
    """

    part: str
    seconds: float
    argv: Sequence[str]
    read: Callable[[child.Ended], CheckRow] | None = None


@dataclass(frozen=True)
class Job:
    """What the parts are given: where results go, the text, the commit, a folder for the while."""

    out: Path
    data: Path | None
    commit: str
    scratch: Path

    def rows(self, module: str, *flags: str) -> list[str]:
        """A command that writes rows of its own."""
        return [sys.executable, "-m", module, *flags, "--out", "{out}", "--commit", self.commit]


def commands(job: Job) -> Iterator[Command]:
    """All that can be run, in the order of running; in a call what matters most comes first."""
    alone = "linear_cross_entropy"  # its float64 logits are large: one dtype after the other
    for op in CASES:
        for dtypes in [[*numerics.DTYPES]] if op == alone else [[d] for d in numerics.DTYPES]:
            flags = [flag for dtype in dtypes for flag in ("--dtype", dtype)]
            yield Command("numerics", 120, job.rows("tests.numerics", "--op", op, *flags))
    yield Command("tests", 240, pytest("not slow", OP_TESTS), read_tests("tests", "of the ops"))
    yield Command("tests", 240, pytest("gpu", GPU_TESTS), read_tests("tests", "of the rest"))
    sanitized = [("memcheck", "planted")]
    sanitized += [(tool, op) for tool in ("memcheck", "racecheck") for op in (*CASES, "adamw")]
    for tool, op in sanitized:
        argv = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        argv += ["--target-processes", "all", sys.executable, "-m", "tests.sanitize", op]
        yield Command("sanitizer", 240, argv, read_sanitizer(tool, op))
    yield Command("resume", 150, pytest("gpu", ["tests/test_resume.py"]),
                  read_tests("exact resume", "bitwise"))  # fmt: skip
    for name in ("compile bf16", "ours bf16"):
        trace = job.scratch / "trace.json"
        yield Command("profile", 50, job.rows("bench.profile", "--provider", name, "--steps", "2",
                                              "--trace", str(trace)))  # fmt: skip
    for dtype in ("bf16", "fp32"):
        for batch in ("1", "16"):
            yield Command("generate", 10, job.rows(
                "bench.generate", "--model", "124m", "--device", "cuda", "--only", "cached",
                "--rounds", "2", "--dtype", dtype, "--batch", batch))  # fmt: skip
    limited = ["--minutes", "{minutes}"]
    for op in CASES:
        yield Command("ops", 35, job.rows("bench.ops", "--op", op, "--seconds", "2", *limited))
    text = ["--data", str(job.data or record.ROOT / "kernels")]
    yield Command("tune", 290, [
        sys.executable, "train.py", "--tune", "only", "--tune-file", str(job.out / "tune.json"),
        "--preset", "shakespeare-124m", "--batch-size", "64", "--block-size", "1024", *text,
    ], read_tune)  # fmt: skip
    twins = ["--provider", "compile bf16", "--provider", "ours bf16"]
    for seconds, flags in (
        (20, ["--shape", "b64t1024", *twins]),
        (20, ["--shape", "b16t64", "--accum", "4", *twins]),
        (20, ["--shape", "b64t64", *twins]),
        (25, ["--shape", "b64t1024", "--provider", "eager bf16", "--provider", "eager fp32"]),
        (60, ["--shape", "b64t1024", "--ablation", "--seconds", "2"]),
        (25, ["--shape", "b8t1024", "--shape", "b16t1024", "--shape", "b32t1024", *twins]),
        (25, ["--shape", "b256t256", "--shape", "b32t2048", "--shape", "b16t4096", *twins]),
    ):
        yield Command("step", seconds, job.rows("bench.step", "--seconds", "4", *flags))
    text = text if job.data else []
    for name, seconds in (("seed", 160), ("drift", 95)):
        flags = [*text, *limited, "--keep", str(job.out)]
        yield Command(name, seconds, job.rows("bench.recipe", name, *flags))
    yield Command("optimizer", 20, job.rows("bench.optimizer", "--seconds", "2"))
    for op in CASES:
        flags = ["--op", op, "--sweep", "--seconds", "1", *limited]
        yield Command("sweep", 6, job.rows("bench.ops", *flags))


def pytest(marked: str, files: Sequence[str]) -> list[str]:
    beside = ["-n", str(max(2, (os.cpu_count() or 2) - 4))] if find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-v", "--tb=short", "-o", "addopts=", "-p",
            "no:cacheprovider", *beside, "-m", marked, *files]  # fmt: skip


def read_tests(check: str, what: str) -> Callable[[child.Ended], CheckRow]:
    def read(ended: child.Ended) -> CheckRow:
        failed = [line for line in ended.text.splitlines() if line.startswith(("FAILED", "ERROR"))]
        doubt = "; ".join([ended.why, *failed][:12]) if ended.why else ""
        return CheckRow(check=check, what=what, found=child.last_line(ended.text), doubt=doubt)

    return read


def read_tune(ended: child.Ended) -> CheckRow:
    found = [line for line in ended.text.splitlines() if line.startswith("tune: ")]
    return CheckRow(check="make tune", what="times", found="".join(found[-1:]), doubt=ended.why)


def read_sanitizer(tool: str, op: str) -> Callable[[child.Ended], CheckRow]:
    def read(ended: child.Ended) -> CheckRow:
        doubt = ended.why
        if ended.code == SANITIZER_ERROR:
            doubt = "" if op == "planted" else "ERRORS"
        elif ended.code is not None and "not supported" in ended.text.lower():
            doubt = "not supported"
        elif op == "planted" and not doubt:
            doubt = "NOT FOUND"
        return CheckRow(check=tool, what=op, doubt=doubt)

    return read


def slots_of(todo: Sequence[Command]) -> list[list[Command]]:
    """Commands that run at the same time: neighbours that only check, and each other one alone."""
    slots: list[list[Command]] = []
    for beside, group in groupby(todo, key=lambda command: command.part in BESIDE):
        slot = [*group]
        slots += [slot] if beside else [[command] for command in slot]
    return slots


def share_s(slots: Sequence[Sequence[Command]], left_s: float) -> float:
    """Seconds of the first of the slots still to run."""
    weights = [max(command.seconds for command in slot) for slot in slots]
    return max(MIN_S, left_s * weights[0] / sum(weights))


def run_command(command: Command, path: Path, until: float) -> child.Ended:
    if (limit_s := until - time.monotonic()) < MIN_S / 2:
        return child.Ended(None, "no time left\n")
    if shutil.which(command.argv[0]) is None:
        return child.Ended(127, f"{command.argv[0]} is not installed\n")
    values = {"minutes": f"{limit_s / 60:.2f}", "out": str(path)}
    argv = [part.format(**values) if part.startswith("{") else part for part in command.argv]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if command.part == "sanitizer":  # every tensor an allocation of its own, with ends to overrun
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return child.run(argv, limit_s, env)


def take_rows(command: Command, ended: child.Ended, path: Path, results: record.Results) -> None:
    """Move a command's rows into the result file; one that failed and says nothing gets a row."""
    found: list[Row] = [command.read(ended)] if command.read else []
    results.add("checks", *found)
    if path.exists():
        written = record.load(path)
        results.join(written)
        results.write(results.path)
        path.unlink()
        found += [row for rows in written.sections.values() for row in rows]
    if ended.why and not any(row.doubt for row in found):
        flags = " ".join(part for part in command.argv[3:] if not part.startswith(("/", "{")))
        what = f"{command.part}: {flags}"[:120]
        results.add("checks", CheckRow(check="ends well", what=what, doubt=ended.why))


def run_all(job: Job, todo: Sequence[Command], minutes: float, results: record.Results) -> None:
    """Every command within its share of the time."""
    end = time.monotonic() + 60 * minutes
    slots = slots_of(todo)
    workers = max(2, (os.cpu_count() or 2) - 2)
    with (
        (job.out / "log.txt").open("a", encoding="utf-8") as log,
        ThreadPoolExecutor(workers) as pool,
    ):
        for i, slot in enumerate(slots):
            began = time.monotonic()
            until = min(end, began + share_s(slots[i:], end - began))
            paths = [job.scratch / f"{i}-{j}.json" for j in range(len(slot))]
            running = {pool.submit(run_command, command, path, until): (command, path)
                       for command, path in zip(slot, paths, strict=True)}  # fmt: skip
            for done in as_completed(running):
                (command, path), ended = running[done], done.result()
                log.write(f"\n==== {command.part}: {' '.join(command.argv)}\n{ended.text}\n")
                log.flush()
                take_rows(command, ended, path, results)
                said = f"{command.part}: {ended.why or 'done'} ({time.monotonic() - began:.0f} s)"
                print(said, flush=True)


def parse_only(text: str) -> list[str]:
    """Parts by name or by group, in the order of running."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS and name not in GROUPS:
            raise ValueError(f"gpu: unknown part {name!r}; known: {', '.join([*GROUPS, *PARTS])}")
    wanted = {part for name in names for part in GROUPS.get(name, (name,))}
    return [part for part in PARTS if part in wanted]


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.gpu", __doc__)
    parser.add_argument("--out", type=cli.path, required=True, help="at most 8 files are left")
    parser.add_argument("--only", default=",".join(PARTS), help="parts or groups, comma-separated")
    parser.add_argument("--minutes", type=cli.amount, default=8.5)
    parser.add_argument("--data", type=cli.file, help="text or uint16 token file to train on")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    args = parser.parse_args(argv)
    names = parse_only(args.only)
    if not torch.cuda.is_available():
        raise ValueError("gpu: torch sees no GPU; `make bench` is what runs without one")
    commit = args.commit or record.git_state()[0]
    if commit == "unknown":
        raise ValueError("gpu: git is not at hand here; say what is measured with --commit")
    out = args.out.resolve()
    results = record.Results(torch.device("cuda"), out / "result.json", commit)
    results.write(results.path)
    try:
        with tempfile.TemporaryDirectory() as scratch, child.ended_by_signals():
            job = Job(out, args.data, commit, Path(scratch))
            todo = [command for command in commands(job) if command.part in names]
            run_all(job, todo, args.minutes, results)
            trace = Path(scratch) / "trace.json"
            if trace.exists():  # of the last profile, which is ours
                (out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
    finally:
        print("\n" + report.page([results]), flush=True)


if __name__ == "__main__":
    cli.run(main)
