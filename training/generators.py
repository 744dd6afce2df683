"""The process's random number generators, into a checkpoint and back."""

import torch
from torch import Tensor

from training import schema


def states() -> dict[str, Tensor]:
    """Generator states of the process: CPU, and every CUDA device in use."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _can_be_set(state: Tensor) -> bool:
    """Whether a generator takes it; those of devices that are not here are not tried."""
    try:
        if len(state) == len(_CPU_STATE):
            torch.Generator().set_state(state)
        elif torch.cuda.is_available():
            torch.Generator("cuda").set_state(state)
    except RuntimeError:
        return False
    return True


_CPU_STATE, _CUDA_STATE = torch.get_rng_state(), torch.empty(16, dtype=torch.uint8)
EXPECTED = {
    "cpu": schema.tensor(_CPU_STATE, 0, 255, also=_can_be_set),
    **{f"cuda{i}?": schema.tensor(_CUDA_STATE, 0, 255, also=_can_be_set) for i in range(256)},
}


def restore(saved: dict[str, Tensor]) -> None:
    """Restore what `states` returned; CUDA states of absent devices are left out."""
    torch.set_rng_state(saved["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in saved:
                torch.cuda.set_rng_state(saved[f"cuda{i}"], i)
