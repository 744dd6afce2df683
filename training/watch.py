"""Decides from the values of finished steps: go on, stop, finish or roll back.

A step's values are read after the next step has been queued (training/metrics.py), so a decision
comes one step late, and on all ranks at the same step.
"""

from training.guard import Guard
from training.metrics import RunLog
from training.resume import RunFailed
from training.signals import StopRequest


class Watch:
    """Reads the log's records in order and decides.

    Args:
        log: Yields the records, and logs the guard's verdicts as events.
        guard: Without one, a loss that is not finite ends the run.
        stop: The stop request of this process.
        target_loss: The run is done after a training loss below it; 0 is off.
        alone: There are no other ranks. Otherwise stop requests travel with the loss, so that all
            ranks leave at the same step.
    """

    def __init__(
        self, log: RunLog, guard: Guard | None, stop: StopRequest, target_loss: float, alone: bool
    ):
        self.log, self.guard, self.stop = log, guard, stop
        self.target_loss, self.alone = target_loss, alone
        self.stopping = False  # the run must save and leave
        self.reached: int | None = None  # first step with a loss below the target

    def catch_up(self, wait: bool) -> str | None:
        """Read the records of finished steps; with `wait` also of the running one.

        Returns:
            "rollback" or "give_up" if the guard says so and the caller must roll back; else None.

        Raises:
            RunFailed: a loss or gradient norm is not finite and there is no guard.
        """
        self.stopping |= bool(self.stop) and self.alone
        for record in self.log.read(wait or self.stopping):
            self.stopping |= record.stop
            if self.guard is None and not record.finite:
                raise RunFailed(
                    f"step {record.step}: the loss is {record.loss}, the gradient norm "
                    f"{record.grad_norm}, which nothing undoes without a guard; a lower "
                    "--max-lr, more --warmup-steps or --guard may help"
                )
            if self.reached is None and record.loss < self.target_loss:
                self.reached = record.step
            action = self.guard.observe(record.bad, record.position) if self.guard else "ok"
            if action != "ok":
                values = {"loss": record.loss, "grad_norm": record.grad_norm}
                self.log.event(action, step=record.step, **values)
            if action in ("rollback", "give_up"):
                return action
        return None
