"""Bad steps found on the device, skipped, and after too many of them undone.

A step is bad when its loss or gradient norm is not finite, or when the loss stands further above
the median of the last accepted losses than chance allows:

    z = 0.6745 * (loss - median) / MAD          bad if z > threshold and the window is half full

with MAD the median absolute deviation; 0.6745 makes it comparable to a standard deviation
(Iglewicz and Hoaglin 1993, who flag 3.5 for samples; one false alarm in 20,000 steps needs more).
The verdict is a device tensor that the optimizer reads, so no step waits for the host. The host
sees it one step late and decides about rolling back.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Relative floor of the MAD: the losses of a converged run differ by less than a spike matters.
_MAD_FLOOR = 0.01


def _nanmedian(x: Tensor) -> Tensor:
    """() of (N,): as `x.nanmedian()`, whose CUDA kernel reads a count on the host in some releases.

    Such a read waits for the step, and no CUDA graph can hold it.
    """
    middle = ((~x.isnan()).sum() - 1).clamp_min(0) // 2  # of two the lower; NaN sorts last
    return x.sort().values.gather(0, middle[None])[0]


@dataclass(frozen=True)
class GuardConfig:
    """When a step is bad and what happens then.

    Args:
        window: Accepted losses that a new one is compared with.
        threshold: Robust z-score above which a loss is a spike.
        patience: Bad steps in a row before the run rolls back (K).
        max_rollbacks: Rollbacks before the run gives up (R).
    """

    window: int = 128
    threshold: float = 8.0
    patience: int = 3
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name in ("window", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"guard: {name} must be at least 1, got {getattr(self, name)}")
        if not self.threshold > 0 or self.max_rollbacks < 0:
            raise ValueError(
                f"guard: threshold must be positive and max_rollbacks not negative, "
                f"got {self.threshold}, {self.max_rollbacks}"
            )


@dataclass
class Guard:
    """The window on the device and the counters on the host.

    `judge` runs inside the step; `observe` runs on the host with the late value.
    """

    config: GuardConfig
    device: torch.device
    losses: Tensor = field(init=False)  # (window,), fp32, accepted losses, oldest overwritten
    count: Tensor = field(init=False)  # (), int64, accepted losses so far
    in_a_row: int = 0
    skipped: int = 0
    rollbacks: int = 0
    positions: list[Any] = field(default_factory=list)  # rows drawn after each bad step of the row

    def __post_init__(self) -> None:
        self.losses = torch.full((self.config.window,), float("nan"), device=self.device)
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether this step is bad.

        Args:
            loss: (), the step's mean loss.
            grad_norm: (), before clipping.

        Returns:
            (), fp32, 1 for a bad step and 0 otherwise: what fused AdamW takes as `found_inf`.
        """
        loss = loss.detach().float()
        median = _nanmedian(self.losses)
        mad = _nanmedian((self.losses - median).abs())
        z = 0.6745 * (loss - median) / mad.clamp_min(_MAD_FLOOR * median.abs())
        # NaN compares false: an empty window never calls a spike.
        spike = (z > self.config.threshold) & (self.count >= (self.config.window + 1) // 2)
        bad = spike | ~loss.isfinite() | ~grad_norm.isfinite()
        slot = torch.arange(self.config.window, device=self.device)
        write = (slot == self.count % self.config.window) & ~bad
        self.losses.copy_(torch.where(write, loss, self.losses))
        self.count += (~bad).long()
        return bad.float()

    def observe(self, bad: bool, position: Any) -> str:
        """Count one step on the host.

        Args:
            bad: The late value of `judge`.
            position: Rows drawn after the step's batches.

        Returns:
            "ok", "skipped", "rollback" (patience is used up) or "give_up" (so are the rollbacks).
        """
        if not bad:
            self.in_a_row = 0
            self.positions.clear()
            return "ok"
        self.in_a_row += 1
        self.skipped += 1
        self.positions.append(position)
        if self.in_a_row < self.config.patience:
            return "skipped"
        return "rollback" if self.rollbacks < self.config.max_rollbacks else "give_up"

    def tensors(self) -> dict[str, Tensor]:
        """Device state for a checkpoint."""
        return {"losses": self.losses, "count": self.count}

    def state(self) -> dict[str, Any]:
        """Host state for a checkpoint (JSON values)."""
        return {
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "rollbacks": self.rollbacks,
            "positions": list(self.positions),
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore what `tensors` and `state` gave; addresses of the device tensors stay."""
        self.losses.copy_(tensors["losses"])
        self.count.copy_(tensors["count"])
        self.in_a_row, self.skipped = state["in_a_row"], state["skipped"]
        self.rollbacks, self.positions = state["rollbacks"], list(state["positions"])
