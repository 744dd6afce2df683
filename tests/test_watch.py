"""What late values lead to, from records alone."""

from collections.abc import Iterator

import pytest

from model.files import write_atomically
from training.guard import Guard
from training.metrics import StepRecord
from training.resume import RunFailed
from training.signals import StopRequest
from training.watch import Watch


class Log:
    """Records to hand out, and the events taken."""

    def __init__(self, *records: StepRecord):
        self.records, self.events, self.waited = [*records], [], None

    def read(self, wait: bool = False) -> Iterator[StepRecord]:
        self.waited = wait
        while self.records:
            yield self.records.pop(0)

    def event(self, name: str, **values) -> None:
        self.events.append((name, values["step"]))


def record(step: int, loss: float = 2.0, norm: float = 1.0, **values) -> StepRecord:
    return StepRecord(step, loss, 1e-3, norm, 1.0, 1.0, None, **values)


def watch(*records: StepRecord, guarded: bool = True, target: float = 0.0, alone: bool = True):
    stop = StopRequest()
    guard = Guard("cpu") if guarded else None
    log = Log(*records)
    return Watch(log, guard, stop, target, alone), log, stop  # pyright: ignore


def test_the_first_loss_below_the_target_is_kept():
    seen, _, _ = watch(record(0, 3.0), record(1, 1.0), record(2, 2.0), record(3, 0.5), target=1.5)
    assert seen.catch_up(False) is None
    assert seen.reached == 1
    assert not seen.stopping


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"norm": float("inf")}])
def test_without_a_guard_a_step_that_is_not_finite_is_the_end(bad):
    seen, _, _ = watch(record(0), record(1, **bad), record(2), guarded=False)
    with pytest.raises(RunFailed, match=r"^step 1: "):
        seen.catch_up(False)


def test_the_guard_skips_then_goes_back_and_the_rest_is_left_unread():
    bad = [record(n, float("nan"), bad=True, position=8 * n) for n in (1, 2, 3)]
    seen, log, _ = watch(record(0), *bad, record(4))
    assert seen.catch_up(True) == "rollback"
    assert log.events == [("skipped", 1), ("skipped", 2), ("rollback", 3)]
    assert [r.step for r in log.records] == [4]


def test_alone_a_signal_stops_and_waits_for_the_newest_step():
    seen, log, stop = watch()
    stop.signal = "SIGTERM"
    seen.catch_up(False)
    assert (seen.stopping, log.waited) == (True, True)


def test_among_ranks_the_late_value_stops_all_at_one_step():
    seen, log, stop = watch(record(0), alone=False)
    stop.signal = "SIGTERM"
    seen.catch_up(False)
    assert (seen.stopping, log.waited) == (False, False)
    log.records.append(record(1, stop=True))
    seen.catch_up(False)
    assert seen.stopping


def test_among_ranks_a_signal_before_the_first_step_waits_for_it():
    stop = StopRequest()
    stop.signal = "SIGTERM"  # other ranks may not have it yet, and begin the step
    seen = Watch(Log(), None, stop, 0.0, alone=False)  # pyright: ignore
    seen.catch_up(False)
    assert not seen.stopping


def test_a_name_that_is_not_utf_8_ends_no_report(tmp_path):
    write_atomically(tmp_path / "report.html", "runs/caf\udce9")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == r"runs/caf\udce9"
