"""What a run reports: a line and a JSON object per step.

Device values are read one step late. On CUDA the copy to pinned memory is queued behind the step
and awaited only after the next step is queued, so the GPU never waits for Python.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.text import Text
from torch import Tensor

from model.edge import printable
from model.files import write_atomically
from training.environment import seconds_since_start
from training.loggers import Loggers
from training.schema import Mismatch, check, of

MAX_LOG_BYTES = 1 << 30  # some 5 million steps
NOT_WRITTEN = ("bad", "position", "stop")  # fields of a record that metrics.jsonl leaves out


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; metrics.jsonl has all fields but the last three."""

    step: int  # counted from 0
    loss: float  # mean over the micro-batches, nats per token, before the update
    lr: float
    grad_norm: float  # before clipping
    ms: float
    tokens_per_s: float
    mfu: float | None  # in [0, 1]; None on a device whose peak is not known
    bad: bool = False  # the guard skipped the update
    position: int = 0  # rows drawn after the step's batches
    stop: bool = False  # a rank was asked to stop

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def line(self) -> str:
        mfu = "" if self.mfu is None else f" | mfu {100 * self.mfu:.1f}%"
        return (
            f"step {self.step:5d} | loss {self.loss:7.4f} | lr {self.lr:.2e} | norm "
            f"{self.grad_norm:7.3f} | {self.ms:7.1f} ms | {self.tokens_per_s:9,.0f} tok/s{mfu}"
        )


_NULLABLE = dict.fromkeys(("loss", "grad_norm"), of(float | None))  # null stands for NaN
_STEP = {k: v for k, v in (of(StepRecord) | _NULLABLE).items() if k not in NOT_WRITTEN}


class RunLog:
    """Writes the steps and events of a run; a context manager.

    Args:
        folder: Run folder; metrics.jsonl is written there, one object per line.
        max_steps, tokens_per_step: Of the recipe.
        mfu: Tokens per second to model flops utilisation, or None where the peak is unknown.
        log_every: Print every so many steps; metrics.jsonl has every step.
        loggers: Names of training/loggers.py that get the curves too.
        steps_done: Before this process. If metrics.jsonl lacks some, a line says so.
        keep_bytes: Length of metrics.jsonl at the checkpoint that the run resumes from. What a
            killed process wrote after it is dropped. 0 starts a new file.
        quiet: Write and print nothing; for every rank but the first.
        config: Recipe and plan, for the loggers.

    Attributes:
        records: One for each step so far, including those before a resume.
        first_step_s: From the start of the process to the end of its first step.
    """

    first_step_s: float | None = None

    def __init__(
        self,
        folder: Path,
        max_steps: int,
        tokens_per_step: int,
        mfu: Callable[[float], float | None],
        log_every: int = 1,
        loggers: Sequence[str] = (),
        steps_done: int = 0,
        keep_bytes: int = 0,
        quiet: bool = False,
        config: dict[str, Any] | None = None,
    ):
        self.tokens_per_step, self.mfu, self.log_every = tokens_per_step, mfu, log_every
        self.quiet = quiet
        path = Path(os.devnull) if quiet else folder / "metrics.jsonl"
        _cut_back(path, keep_bytes)
        self.records = _read_records(path, steps_done)
        self._file = path.open("ab", buffering=0)  # a failed line is not tried again later
        self._broken = False  # a line of metrics.jsonl is missing or incomplete
        self._pending: tuple[Any, ...] | None = None
        self._unread: list[StepRecord] = []
        self._bar = Progress(transient=True, disable=quiet or not sys.stdout.isatty())
        self._task = self._bar.add_task("training", total=max_steps)
        loggers = () if quiet else loggers
        self._loggers = Loggers(loggers, folder, config or {}, steps_done, self.say)
        if lost := steps_done - len(self.records):
            self.say(
                f"metrics.jsonl: {lost} of the {steps_done} steps done are missing in it or "
                "damaged; the curve has a gap there, and the run goes on"
            )

    def __enter__(self) -> "RunLog":
        self._bar.start()
        self._mark: Any = time.perf_counter()  # the pending step's beginning: seconds, or an event
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        self._bar.stop()
        if kind is not None:
            self.event("failed", reason=str(error))
        self._file.close()
        self._loggers.close()

    def say(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.quiet:
            return
        if self._bar.disable:
            print(printable(line), flush=True)
        else:
            self._bar.console.print(Text(printable(line)), soft_wrap=True)

    def step(
        self,
        step: int,
        lr: float,
        position: int,
        loss: Tensor,
        grad_norm: Tensor,
        bad: Tensor | None = None,
        stop: Tensor | None = None,
    ) -> None:
        """Take the device values of `step`, each (); the previous step becomes readable."""
        self.finish()
        no = torch.zeros_like(loss)
        bad, stop = (no if bad is None else bad), (no if stop is None else stop)
        values = torch.stack([loss, grad_norm, bad, stop]).float()
        done: Any = time.perf_counter()
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)  # into pinned memory
            done = torch.cuda.Event(enable_timing=True)
            done.record()
        self._pending = (step, lr, position, values, done)

    def read(self, wait: bool = False) -> list[StepRecord]:
        """Unread records; the newest step may still be running, and `wait` awaits it."""
        if wait:
            self.finish()
        unread, self._unread = self._unread, []
        return unread

    def finish(self) -> None:
        """Wait for the pending step and report it."""
        if self._pending is None:
            return
        step, lr, position, values, done = self._pending
        self._pending = None
        begun, self._mark = self._mark, done
        now = done
        if not isinstance(done, float):
            done.synchronize()
            now = time.perf_counter()
        # Two events give the device's own time; the host learns of an end late and irregularly.
        seconds = now - begun if isinstance(begun, float) else begun.elapsed_time(done) / 1000.0
        loss, grad_norm, bad, stop = values.tolist()
        self.first_step_s = self.first_step_s or seconds_since_start()
        tokens_per_s = self.tokens_per_step / seconds
        speed = (1000.0 * seconds, tokens_per_s, self.mfu(tokens_per_s))
        record = StepRecord(step, loss, lr, grad_norm, *speed, bool(bad), position, bool(stop))
        self.records.append(record)
        self._unread.append(record)
        self._write({k: v for k, v in asdict(record).items() if k not in NOT_WRITTEN})
        self._bar.update(self._task, completed=step + 1, description=f"loss {loss:.4f}")
        if step % self.log_every == 0:
            self.say(record.line())

    def event(self, name: str, **values: Any) -> None:
        """Write an object that is not a step, e.g. an evaluation."""
        self._write({"event": name, **values})

    def rewind(self, step: int) -> None:
        """Forget the pending step and the records from `step` on; the file keeps its lines."""
        self._pending = None
        self._unread.clear()
        while self.records and self.records[-1].step >= step:
            self.records.pop()

    @property
    def num_bytes(self) -> int:
        """Length of metrics.jsonl so far."""
        return os.fstat(self._file.fileno()).st_size

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Exclude the time spent inside from the steps' times."""
        self.finish()
        yield
        self._mark = time.perf_counter()

    def _write(self, values: dict[str, Any]) -> None:
        """Append a line, and tell the loggers; a full disk costs the log, not the run."""
        line = ("\n" if self._broken else "") + to_json(values) + "\n"
        try:
            if self._file.write(line.encode()) != len(line):
                raise OSError("No space left for a whole line")
        except OSError as error:
            if not self._broken:
                self.say(f"metrics.jsonl: cannot be written ({error}); the run goes on")
            self._broken = True
        self._loggers.log(values)


def _cut_back(path: Path, keep_bytes: int) -> None:
    """Drop what follows `keep_bytes`. If no line ends there it is another file and stays whole."""
    if path.is_file() and path.stat().st_size > MAX_LOG_BYTES:
        path.rename(path.with_name("metrics-too-long.jsonl"))  # it may not fit into memory
    if not path.is_file():
        return
    data = path.read_bytes()
    if keep_bytes == 0 or data[keep_bytes - 1 : keep_bytes] == b"\n":
        os.truncate(path, keep_bytes)
    elif data and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")  # the next line must not be glued to the half of one


def _read_records(path: Path, steps_done: int) -> list[StepRecord]:
    records = []
    for values in read_metrics(path)[0]:
        with suppress(Mismatch):
            check("metrics.jsonl", values, _STEP)
            values |= {name: math.nan for name in _NULLABLE if values[name] is None}
            records.append(StepRecord(**values))
    return [record for record in records if record.step < steps_done]


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], ...]:
    """Read the steps, evaluations and other events of a metrics.jsonl.

    After a rollback or a resume steps are repeated; they and the evaluations after them then
    replace the earlier ones. A missing file counts as empty, and a damaged line is left out.
    """
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []

    def drop(rows: list[dict[str, Any]], step: int) -> None:
        while rows and rows[-1]["step"] >= step:
            rows.pop()

    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
            name = values.get("event")
            at = values.get("to_step" if name == "rolled_back" else "step")
        except (ValueError, AttributeError, RecursionError):
            continue  # no JSON, or no object
        rows = steps if name is None else evaluations if name == "eval" else events
        if name in (None, "eval", "rolled_back"):
            if type(at) is not int:
                continue
            drop(evaluations, at if name == "eval" else at + 1)  # step 5's comes before step 5
        if name in (None, "rolled_back"):
            drop(steps, at)
            if events and events[-1].get("event") == "failed":
                events.pop()  # the run has gone on since
        rows.append(values)
    return steps, evaluations, events


def to_json(values: Any, indent: int | None = None) -> str:
    """JSON, with null for a number that is not finite, which JSON cannot express."""
    finite = json.loads(json.dumps(values), parse_constant=lambda _: None)
    return json.dumps(finite, indent=indent)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write it whole or not at all, for readers and on a full disk."""
    write_atomically(path, to_json(values, indent=2) + "\n")
