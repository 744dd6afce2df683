"""Everything that only a GPU can answer, in three commands, each of which keeps its results.

    python -m bench.gpu --out DIR --only check     whether kernels are right and every part runs
    python -m bench.gpu --out DIR --only tune      each op against its rivals; better launch rows
    python -m bench.gpu --out DIR --only final     the whole step, the recipe, the comparisons
    python -m bench.gpu --out DIR --only numerics,seed --data input.txt --minutes 4

Each command of a part is a process with a time limit, so an illegal access or a hang costs only
that one; its unused time goes to those after it. When it ends, its rows go to DIR/result.json and
its output to DIR/log.txt. The tables of the report come last. Nothing is downloaded.
Without `--data` the training parts read this project's own source.

    numerics   every op in fp32, TF32, fp16, bf16 against float64, and 50 reruns for equal bits
    tests      the tests of the ops, the optimizer and the step, natively
    sanitizer  compute-sanitizer on every op, and on a planted overrun that it must find
    resume     runs killed and resumed on the device, compared bitwise
    profile    where a step's time goes; writes DIR/trace.json.gz
    generate   tokens per second of the 124M model
    ops        each op against its rivals, with the machine's limits
    tune       `make tune`; the answer is DIR/tune.json, its launch rows are in DIR/log.txt
    step       the whole step against plain PyTorch, and an ablation
    seed       train.py on the Shakespeare recipe until its loss is below 0.09, cold and warm caches
    drift      500 steps, Triton ops against eager ops, same seed
"""

import gzip
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from bench import cli, record, report
from bench.cases import CASES
from bench.record import CheckRow, Row
from tests import numerics
from training import child
from training.machines import num_cores

GROUPS = {
    "check": ("numerics", "tests", "sanitizer", "resume", "profile", "generate"),
    "tune": ("ops", "tune"),
    "final": ("step", "seed", "drift"),
}
PARTS = [name for group in GROUPS.values() for name in group]
# These time nothing, so they run at once, before the rest.
BESIDE = ("numerics", "tests", "sanitizer", "resume")
MIN_S = 15.0
GIB_EACH = 5  # of the card for a process, which is small, or for the test workers that it starts
SANITIZER_ERROR = 99  # exit code of compute-sanitizer on an error
OP_TESTS = " ".join(f"tests/test_{name}.py" for name in (*CASES, "adamw", "backends"))
GPU_TESTS = "tests/test_capture.py tests/test_generate.py tests/test_timing.py"


class Command(NamedTuple):
    """One process of a part."""

    part: str
    seconds: float  # about, on an H100 and 16 cores; its share of the time is in proportion
    argv: Sequence[str]  # "{minutes}" becomes the limit, "{out}" the file for its rows
    read: Callable[[child.Ended], CheckRow] | None = None  # if it writes no rows itself


class Job(NamedTuple):
    """What every command may need to know."""

    out: Path  # where results go
    data: Path | None
    commit: str
    scratch: Path  # a temporary folder
    at_once: int = 2  # processes


def commands(job: Job) -> Iterator[Command]:
    """All commands in running order; in each group the most important come first."""

    def rows(part: str, seconds: float, line: str, *more: str) -> Command:
        """A module that writes rows itself."""
        argv = [sys.executable, "-m", *line.split(), *more]
        return Command(part, seconds, [*argv, "--out", "{out}", "--commit", job.commit])

    alone = "linear_cross_entropy"  # its float64 logits are large, so its dtypes take turns
    for op in CASES:
        for dtypes in [[*numerics.DTYPES]] if op == alone else [[d] for d in numerics.DTYPES]:
            flags = "".join(f" --dtype {dtype}" for dtype in dtypes)
            yield rows("numerics", 120, f"tests.numerics --op {op}{flags}")
    workers = max(2, job.at_once - 2)
    yield tests("tests", 240, "not slow", OP_TESTS, "of the ops", workers)
    yield tests("tests", 240, "gpu", GPU_TESTS, "of the rest", workers)
    sanitize = f"compute-sanitizer --error-exitcode {SANITIZER_ERROR} --target-processes all --tool"
    checks = [(tool, op) for tool in ("memcheck", "racecheck") for op in (*CASES, "adamw")]
    for tool, op in [("memcheck", "planted"), *checks]:
        argv = [*sanitize.split(), tool, sys.executable, "-m", "tests.sanitize", op]
        yield Command("sanitizer", 240, argv, partial(read_sanitizer, tool, op))
    yield tests("resume", 150, "gpu", "tests/test_resume.py", "exact resume", workers)
    for name in ("compile bf16", "ours bf16"):
        trace = str(job.scratch / "trace.json")
        yield rows("profile", 50, "bench.profile --steps 2", "--provider", name, "--trace", trace)
    for flags in ("bf16 --batch 1", "bf16 --batch 16", "fp32 --batch 1", "fp32 --batch 16"):
        line = f"bench.generate --model 124m --device cuda --rounds 2 --dtype {flags}"
        yield rows("generate", 10, line)
    for op in CASES:
        yield rows("ops", 35, f"bench.ops --op {op} --seconds 2 --minutes", "{minutes}")
    tune = "train.py --tune only --preset shakespeare-124m --batch-size 64 --block-size 1024"
    paths = ["--tune-file", str(job.out / "tune.json")]
    paths += ["--data", str(job.data or record.ROOT / "kernels")]
    yield Command("tune", 290, [sys.executable, *tune.split(), *paths], read_tune)
    twins = ["--provider", "compile bf16", "--provider", "ours bf16"]
    eager = ["--provider", "eager bf16", "--provider", "eager fp32"]
    for seconds, line, who in (
        (20, "--shape b64t1024", twins),
        (20, "--shape b16t64 --accum 4", twins),
        (20, "--shape b64t64", twins),
        (25, "--shape b64t1024", eager),
        (60, "--shape b64t1024 --ablation", []),
        (25, "--shape b8t1024 --shape b16t1024 --shape b32t1024", twins),
        (25, "--shape b256t256 --shape b32t2048 --shape b16t4096", twins),
    ):
        yield rows("step", seconds, f"bench.step --seconds 4 {line}", *who)
    text = ["--data", str(job.data)] if job.data else []
    for name, seconds in (("seed", 160), ("drift", 95)):
        yield rows(name, seconds, f"bench.recipe {name} --minutes", "{minutes}", *text)


def tests(part: str, seconds: float, marked: str, files: str, what: str, workers: int) -> Command:
    beside = ["-n", str(workers)] if find_spec("xdist") else []
    pytest = "-m pytest -v --tb=short -o addopts= -p no:cacheprovider -m"
    argv = [sys.executable, *pytest.split(), marked, *beside, *files.split()]
    return Command(part, seconds, argv, partial(read_tests, what))


def read_tests(what: str, ended: child.Ended) -> CheckRow:
    failed = [line for line in ended.text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    doubt = "; ".join([ended.why, *failed][:12]) if ended.why else ""
    return CheckRow(check="tests", what=what, found=child.last_line(ended.text), doubt=doubt)


def read_tune(ended: child.Ended) -> CheckRow:
    found = [line for line in ended.text.splitlines() if line.startswith("tune: ")]
    return CheckRow(check="make tune", what="times", found="".join(found[-1:]), doubt=ended.why)


def read_sanitizer(tool: str, op: str, ended: child.Ended) -> CheckRow:
    doubt = ended.why
    if ended.code == SANITIZER_ERROR:
        doubt = "" if op == "planted" else "ERRORS"
    elif ended.code is not None and "not supported" in ended.text.lower():
        doubt = "not supported"
    elif op == "planted" and not doubt:
        doubt = "NOT FOUND"
    return CheckRow(check=tool, what=op, doubt=doubt)


def at_once() -> int:
    """How many processes the cores and the card's memory have room for."""
    free, _ = torch.cuda.mem_get_info()
    return max(2, min(num_cores() - 2, (free >> 30) // GIB_EACH))


def run_command(command: Command, path: Path, until: float) -> child.Ended:
    if (limit_s := until - time.monotonic()) < MIN_S / 2:
        return child.Ended(None, "no time left\n")
    if shutil.which(command.argv[0]) is None:
        return child.Ended(127, f"{command.argv[0]} is not installed\n")
    values = {"minutes": f"{limit_s / 60:.2f}", "out": str(path)}
    argv = [part.format(**values) if part.startswith("{") else part for part in command.argv]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if command.part == "sanitizer":  # without a cache every tensor is an allocation of its own
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return child.run(argv, limit_s, env)


def take_rows(command: Command, ended: child.Ended, path: Path, results: record.Result) -> None:
    """Move a command's rows into the result file; a failure without a row in doubt gets one."""
    found: list[Row] = [command.read(ended)] if command.read else []
    results.add("checks", *found)
    if path.exists():
        written = record.load(path)
        results.join(written)
        path.unlink()
        found += [row for rows in written.sections.values() for row in rows]
    if ended.why and not any(row.doubt for row in found):
        flags = " ".join(part for part in command.argv[3:] if not part.startswith(("/", "{")))
        what = f"{command.part}: {flags}"[:120]
        results.add("checks", CheckRow(check="ends well", what=what, doubt=ended.why))
    results.write()


def run_all(job: Job, todo: Sequence[Command], minutes: float, results: record.Result) -> None:
    """Run every command within its share of the time: BESIDE at once, then one by one."""
    end = time.monotonic() + 60 * minutes
    slots = [[command for command in todo if command.part in BESIDE]]
    slots += [[command] for command in todo if command.part not in BESIDE]
    weights = [max((command.seconds for command in slot), default=0.0) for slot in slots]
    log = (job.out / "log.txt").open("a", encoding="utf-8")
    with log, ThreadPoolExecutor(job.at_once) as pool:
        for i, slot in enumerate(slots):
            began = time.monotonic()
            share = weights[i] / max(sum(weights[i:]), 1e-9)
            until = min(end, began + max(MIN_S, (end - began) * share))
            running = {}
            for j, command in enumerate(slot):
                path = job.scratch / f"{i}-{j}.json"
                running[pool.submit(run_command, command, path, until)] = command, path
            for done in as_completed(running):
                (command, path), ended = running[done], done.result()
                log.write(f"\n==== {command.part}: {' '.join(command.argv)}\n{ended.text}\n")
                log.flush()
                take_rows(command, ended, path, results)
                said = f"{command.part}: {ended.why or 'done'} ({time.monotonic() - began:.0f} s)"
                print(said, flush=True)


def parse_only(text: str) -> list[str]:
    """The parts that names of parts and groups stand for, in the order of running."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS and name not in GROUPS:
            raise ValueError(f"gpu: unknown part {name!r}; known: {', '.join([*GROUPS, *PARTS])}")
    wanted = {part for name in names for part in GROUPS.get(name, (name,))}
    return [part for part in PARTS if part in wanted]


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.gpu", __doc__)
    parser.add_argument("--out", type=cli.path, required=True, help="folder for the results")
    parser.add_argument("--only", default=",".join(PARTS), help="parts or groups, comma-separated")
    parser.add_argument("--minutes", type=cli.amount, default=8.5)
    parser.add_argument("--data", type=cli.file, help="text or uint16 token file to train on")
    parser.add_argument("--commit", help="the measured commit, if git does not know it")
    args = parser.parse_args(argv)
    names = parse_only(args.only)
    if not torch.cuda.is_available():
        raise ValueError("gpu: torch sees no GPU; `make bench` runs without one")
    commit = args.commit or record.git_state()[0]
    if commit == "unknown":
        raise ValueError("gpu: git does not know which commit this is; name it with --commit")
    out = args.out.resolve()
    results = record.open_result(torch.device("cuda"), out / "result.json", commit)
    results.write()
    try:
        with tempfile.TemporaryDirectory() as scratch, child.ended_by_signals():
            job = Job(out, args.data, commit, Path(scratch), at_once())
            todo = [command for command in commands(job) if command.part in names]
            run_all(job, todo, args.minutes, results)
            trace = Path(scratch) / "trace.json"
            if trace.exists():  # written by the last profile, which is ours
                (out / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes()))
    finally:
        print("\n" + report.page([results]), flush=True)


if __name__ == "__main__":
    cli.run(main)
