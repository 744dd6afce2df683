"""Bad steps are found on the device and skipped; after too many of them the run rolls back.

A step is bad if its loss or gradient norm is not finite, or if its loss is further above the median
of the last accepted losses than chance allows:

    z = 0.6745 * (loss - median) / MAD          bad if z > THRESHOLD and the window is half full

with MAD the median absolute deviation; 0.6745 makes it comparable to a standard deviation
(Iglewicz and Hoaglin 1993, who use 3.5 for samples; one false alarm in 20,000 steps needs more).
The verdict is a device tensor that the optimizer reads, so no step waits for the host. The host
sees it one step late and decides whether to roll back.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from training.schema import COUNT, Must, count

WINDOW = 128  # accepted losses to compare a new one with
THRESHOLD = 8.0  # z above which a loss is a spike
PATIENCE = 3  # bad steps in a row before the run rolls back
MAX_ROLLBACKS = 3  # before it gives up
# Relative floor of the MAD, because the losses of a converged run hardly differ.
_MAD_FLOOR = 0.01
_ROWS = Must(
    f"the rows of at most {PATIENCE} bad steps",
    lambda v: isinstance(v, list) and len(v) <= PATIENCE and all(map(COUNT.holds, v)),
)


def _nanmedian(x: Tensor) -> Tensor:
    """`x.nanmedian()` of (N,) without reading a value on the host, as some releases of torch do.

    A CUDA graph cannot contain such a read.
    """
    middle = ((~x.isnan()).sum() - 1).clamp_min(0) // 2  # the lower of two; NaN sorts last
    return x.sort().values.gather(0, middle[None])[0]


@dataclass
class Counts:
    """What the host counts; part of a checkpoint's JSON."""

    in_a_row: Annotated[int, count(PATIENCE)] = 0
    skipped: int = 0
    rollbacks: Annotated[int, count(MAX_ROLLBACKS)] = 0
    # How many rows had been drawn after each of the bad steps in a row.
    positions: Annotated[list[int], _ROWS] = field(default_factory=list)


class Guard(Counts):
    """Judges the steps of a run: a window of losses on the device, counters on the host."""

    def __init__(self, device: torch.device | str, window: int = WINDOW):
        super().__init__()
        # Accepted losses, (window,), fp32, the oldest overwritten; and their number, (), int64.
        self.losses = torch.full((window,), float("nan"), device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Judge, as part of the step, whether this mean loss and gradient norm, each (), are bad.

        Returns:
            (), fp32, 1 for a bad step and 0 otherwise, as fused AdamW takes `found_inf`.
        """
        loss, window = loss.detach().float(), len(self.losses)
        median = _nanmedian(self.losses)
        mad = _nanmedian((self.losses - median).abs())
        z = 0.6745 * (loss - median) / mad.clamp_min(_MAD_FLOOR * median.abs())
        # An empty window gives NaN, which compares false.
        spike = (z > THRESHOLD) & (self.count >= (window + 1) // 2)
        bad = spike | ~loss.isfinite() | ~grad_norm.isfinite()
        slot = torch.arange(window, device=self.losses.device)
        write = (slot == self.count % window) & ~bad
        self.losses.copy_(torch.where(write, loss, self.losses))
        self.count += (~bad).long()
        return bad.float()

    def observe(self, bad: bool, position: int) -> str:
        """Count a step on the host: the value of `judge`, and the rows drawn up to and with it.

        Returns:
            "ok", "skipped", "rollback" (patience is used up) or "give_up" (so are the rollbacks).
        """
        if not bad:
            self.in_a_row, self.positions = 0, []
            return "ok"
        self.in_a_row += 1
        self.skipped += 1
        self.positions = [*self.positions, position]
        if self.in_a_row < PATIENCE:
            return "skipped"
        return "rollback" if self.rollbacks < MAX_ROLLBACKS else "give_up"

    def tensors(self) -> dict[str, Tensor]:
        """The device's part of a checkpoint."""
        return {"losses": self.losses, "count": self.count}
