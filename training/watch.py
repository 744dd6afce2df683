"""What the late values of the steps done mean for the next one: go on, stop, be done, go back.

A step's values are read after the next has been queued (training/metrics.py), so what is decided
here comes one step late, and on all ranks at the same step.
"""

from training.guard import Guard
from training.metrics import RunLog
from training.resume import RunFailed
from training.signals import StopRequest


class Watch:
    """Reads the log's records in order and keeps what follows from them.

    Args:
        log: Gives the records, and takes the guard's verdicts as events.
        guard: None where every step counts, and one that is not finite ends the run.
        stop: Of this process.
        target_loss: A training loss below it is the end; 0 is off.
        alone: There are no other ranks. With others a stop request travels with the loss, so that
            all leave at the same step.
    """

    def __init__(
        self, log: RunLog, guard: Guard | None, stop: StopRequest, target_loss: float, alone: bool
    ):
        self.log, self.guard, self.stop = log, guard, stop
        self.target_loss, self.alone = target_loss, alone
        self.stopping = bool(stop)  # the run is to save and leave
        self.reached: int | None = None  # first step whose loss was below the target

    def catch_up(self, wait: bool) -> str | None:
        """Read what is known of the steps done; with `wait` of the newest too, which may still run.

        Returns:
            "rollback" or "give_up" where the guard says so; the caller goes back then.

        Raises:
            RunFailed: a loss or gradient norm is not finite and there is no guard.
        """
        self.stopping |= bool(self.stop) and self.alone
        for record in self.log.read(wait or self.stopping):
            self.stopping |= record.stop
            if self.guard is None and not record.finite:
                raise RunFailed(
                    f"step {record.step}: the loss is {record.loss}, the gradient norm "
                    f"{record.grad_norm}, and without a guard nothing undoes that; a lower "
                    "--max-lr, more --warmup-steps or --guard may help"
                )
            if self.reached is None and record.loss < self.target_loss:
                self.reached = record.step
            action = self.guard.observe(record.bad, record.position) if self.guard else "ok"
            if action != "ok":
                late = {"loss": record.loss, "grad_norm": record.grad_norm}
                self.log.event(action, step=record.step, **late)
            if action in ("rollback", "give_up"):
                return action
        return None
