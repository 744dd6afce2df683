"""The tables through which kernels/adamw.py finds its tensors, and how they reach the device.

A row holds the addresses and numbers of one parameter. The bytes of all rows are also the key that
tells whether the table on the device is still current.
"""

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import cdiv
from ._op import check_device, check_tensor
from .adamw import ALIGNED, BF16_GRAD, CHUNK, FIELDS, adamw_norm, adamw_step

ALIGNMENT = 16  # bytes of the widest load; torch's allocations have it, views may not
FP32 = (torch.float32,)
ROW = struct.Struct("9q7d")  # in the order of the columns that kernels/adamw.py names


class Slot(NamedTuple):
    """One parameter of a step. Its tensors are contiguous and on one device."""

    name: str  # for messages
    param: Tensor  # fp32; the next three and `working` have its shape
    grad: Tensor  # fp32 or bf16
    exp_avg: Tensor  # fp32
    exp_avg_sq: Tensor  # fp32
    step: Tensor  # (), fp32, steps done
    working: Tensor | None  # a bf16 copy of `param` to update
    lr: float | Tensor  # a () fp32 tensor is read when the kernel runs
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def check(self, device: torch.device) -> None:
        """Raise ValueError for a tensor, other than the gradient, that kernels would misread."""
        shape = self.param.shape
        for what, tensor, size, dtypes in (
            ("param", self.param, shape, FP32),
            ("exp_avg", self.exp_avg, shape, FP32),
            ("exp_avg_sq", self.exp_avg_sq, shape, FP32),
            ("step", self.step, (), FP32),
            ("working copy", self.working, shape, (torch.bfloat16,)),
            ("lr", self.lr, (), FP32),
        ):
            if isinstance(tensor, Tensor):
                check_tensor("adamw", f"{what} of {self.name}", tensor, size, device, dtypes)

    def row(self) -> bytes:
        """Its row of the table. ValueError if the gradient, which may be new, does not fit."""
        dtypes, shape, name = (*FP32, torch.bfloat16), self.param.shape, f"gradient of {self.name}"
        check_tensor("adamw", name, self.grad, shape, self.param.device, dtypes)
        tensors = self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.working
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        flags = BF16_GRAD.value if self.grad.dtype == torch.bfloat16 else 0
        if all(address % ALIGNMENT == 0 for address in addresses):
            flags |= ALIGNED.value
        lr_address, lr = (self.lr.data_ptr(), 0.0) if isinstance(self.lr, Tensor) else (0, self.lr)
        integers = self.step.data_ptr(), lr_address, self.param.numel(), flags
        logs = (math.log(beta) if beta else -math.inf for beta in self.betas)
        return ROW.pack(*addresses, *integers, lr, self.weight_decay, *self.betas, *logs, self.eps)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Upload:
    """Copies a small host tensor to the device, but only when its content has changed.

    A CUDA graph that contains the copy reads the pinned buffer at every replay. So the host buffer
    and the device tensor of a capture are kept and never overwritten. Pinned memory cannot safely
    be allocated during a capture, so a spare buffer is always ready.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.key: Any = None
        self.sent = torch.empty(0)
        self.captured: dict[Any, Tensor] = {}  # sent in the capture that is running
        self.kept: list[Tensor] = []
        self.spare = torch.empty(0)

    def put(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The device tensor of `make()`, which is a function of `key`; never waits."""
        capturing = _is_capturing(self.device)
        if not capturing:
            self.captured.clear()  # left over if a capture failed
        if key == self.key:
            if capturing:
                self.kept.append(self.sent)
            return self.sent
        if capturing and key in self.captured:
            return self.captured[key]
        content, pin = make(), self.device.type == "cuda"
        if self.spare.shape != content.shape:
            self.spare = torch.empty_like(content, pin_memory=pin)
        host = self.spare.copy_(content)
        sent = host.to(self.device, non_blocking=True)
        if capturing:
            self.spare = torch.empty(0)
            self.captured[key] = sent
            self.kept += [host, sent]
        else:  # `host` goes back to torch's pool, which waits for the copy by an event
            self.spare = torch.empty_like(content, pin_memory=pin)
            self.key, self.sent = key, sent
        return sent

    def end(self) -> None:
        """Call this after each step, because the next capture must send its own copies."""
        self.captured.clear()


class Tables:
    """The address table and the chunk list of one set of parameters on `device`.

    Args:
        device: Of every tensor that will be in it; the only CUDA device in use, or the CPU under
            TRITON_INTERPRET=1.

    Raises:
        ValueError: the kernels do not run there.
    """

    def __init__(self, device: torch.device):
        check_device("adamw", torch.empty(0, device=device))
        self.device = device
        self._addresses, self._chunks = Upload(device), Upload(device)
        self._one, self._zero = torch.ones((), device=device), torch.zeros((), device=device)

    def grad_norm(self, slots: Sequence[Slot], max_norm: float) -> tuple[Tensor, Tensor]:
        """Norm of all gradients together, which are not changed, and the clip coefficient.

        Args:
            slots: The parameters that have a gradient.
            max_norm: What `adamw` is to clip to; 0 or infinity for a coefficient of 1.

        Returns:
            Two new tensors, each () and fp32.

        Raises:
            ValueError: a tensor is not as `Slot` says, or `max_norm` is negative.
        """
        if not max_norm >= 0:
            raise ValueError(f"adamw: max_norm must be 0 or more, got {max_norm}")
        max_norm = max_norm if math.isfinite(max_norm) else 0.0
        norm, clip = adamw_norm(*self._load(slots), max_norm, [slot.grad for slot in slots])
        return norm, clip

    def adamw(
        self, slots: Sequence[Slot], clip: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One step of all parameters, in place.

        Args:
            slots: The parameters that have a gradient.
            clip: (), fp32, factor of every gradient; None is 1.
            found_inf: (), fp32; if it is not 0, nothing is written. None is 0.

        Raises:
            ValueError: a tensor is not as described here or in `Slot`.
        """
        table, chunks = self._load(slots)
        self._addresses.end()
        self._chunks.end()
        clip = self._one if clip is None else clip
        found_inf = self._zero if found_inf is None else found_inf
        check_tensor("adamw", "found_inf", found_inf, (), self.device, FP32)
        state = [t for s in slots for t in (s.exp_avg, s.exp_avg_sq, s.step)]
        weights = [t for s in slots for t in (s.param, s.working) if t is not None]
        read = [t for s in slots for t in (s.grad, s.lr) if isinstance(t, Tensor)]
        adamw_step(table, chunks, clip, found_inf, state + weights, read)
        # Autograd cannot see the writes; a graph that saved a parameter must not be reused.
        torch.autograd.graph.increment_version(weights)

    def _load(self, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
        """Table and chunk list, on the device."""
        rows = b"".join(slot.row() for slot in slots)
        sizes = tuple(slot.param.numel() for slot in slots)

        def make_table() -> Tensor:
            for slot in slots:
                slot.check(self.device)
            words = [*struct.iter_unpack("q", rows)]
            return torch.tensor(words, dtype=torch.int64).view(-1, FIELDS.value)

        def make_chunks() -> Tensor:
            pairs = [(i, c) for i, size in enumerate(sizes) for c in range(cdiv(size, CHUNK.value))]
            return torch.tensor(pairs, dtype=torch.int32).view(-1, 2)

        return self._addresses.put(rows, make_table), self._chunks.put(sizes, make_chunks)
