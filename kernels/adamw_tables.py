"""What the kernels of adamw.py find their tensors by: a table of addresses and a list of chunks.

Both are made on the host and sent only when they change: most steps find every tensor where the
step before had it.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._launch import cdiv
from ._op import check_device, check_tensor
from .adamw import ALIGNED, ALIGNMENT, BF16_GRAD, CHUNK, FIELDS, LR, NUMEL, adamw_norm, adamw_step

FP32, FP32_OR_BF16 = (torch.float32,), (torch.float32, torch.bfloat16)


class Slot(NamedTuple):
    """One parameter of a step. All on one device, contiguous, of the parameter's shape.

    Args:
        name: For messages.
        param: fp32.
        grad: fp32 or bf16.
        exp_avg, exp_avg_sq: fp32.
        step: (), fp32, steps done.
        working: bf16 copy of `param` to keep up, or None.
        lr: A number, or a () fp32 tensor on the device, read when the kernel runs.
        betas, eps, weight_decay: As in torch.optim.AdamW.
    """

    name: str
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    working: Tensor | None
    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Upload:
    """A small host tensor on the device, sent only when its content is not what was sent last.

    A CUDA graph that holds the copy reads the pinned buffer at every replay. So what a capture has
    used, host buffer and device tensor, is kept and never written again; and as pinned memory
    cannot safely be allocated during a capture, one spare buffer waits for it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.key: Any = None
        self.sent = torch.empty(0)
        self.captured: tuple[Any, Tensor] | None = None  # of the capture that is running
        self.kept: list[Tensor] = []
        self.spare = torch.empty(0)

    def put(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """The device tensor of `make()`, which is a function of `key`; never waits."""
        capturing = _is_capturing(self.device)
        if key == self.key:
            if capturing:
                self.kept.append(self.sent)
            return self.sent  # never rewritten: each upload is a tensor of its own
        if capturing:
            if self.captured is None or self.captured[0] != key:
                self.captured = key, self._put_captured(make())
            return self.captured[1]
        self.captured = None  # of a capture that failed, if at all
        host = make()
        if self.device.type == "cuda":
            host = host.pin_memory()  # back to torch's pool, which waits for the copy by an event
            if self.spare.shape != host.shape:
                self.spare = torch.empty_like(host, pin_memory=True)
        self.key, self.sent = key, host.to(self.device, non_blocking=True)
        return self.sent

    def _put_captured(self, host: Tensor) -> Tensor:
        spare, self.spare = self.spare, torch.empty(0)
        if spare.shape != host.shape:
            spare = torch.empty_like(host, pin_memory=self.device.type == "cuda")
        spare.copy_(host)
        sent = spare.to(self.device, non_blocking=True)
        self.kept += [spare, sent]
        return sent

    def end(self) -> None:
        """The step is over: another capture must send for itself."""
        self.captured = None


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
        """Norm of all gradients together, which are read once and left as they are.

        Args:
            slots: The parameters that have a gradient.
            max_norm: What `adamw` is to clip to; 0 or infinity for a coefficient of 1.

        Returns:
            norm and clip coefficient, each (), fp32, new tensors. Two launches.

        Raises:
            ValueError: a tensor has another dtype, shape, layout or device than `Slot` says.
        """
        if not max_norm >= 0:
            raise ValueError(f"adamw: max_norm must be 0 or more, got {max_norm}")
        table, chunks = self._load(slots)
        tensors = [slot.grad for slot in slots]
        out = adamw_norm(table, chunks, max_norm if math.isfinite(max_norm) else 0.0, tensors)
        return out[0], out[1]

    def adamw(
        self, slots: Sequence[Slot], clip: Tensor | None = None, found_inf: Tensor | None = None
    ) -> None:
        """One step of all parameters, in place. Two launches.

        Args:
            slots: The parameters that have a gradient.
            clip: (), fp32, factor of every gradient; None is 1.
            found_inf: (), fp32; where it is not 0 nothing is written. None is 0.

        Raises:
            ValueError: a tensor has another dtype, shape, layout or device than `Slot` says.
        """
        table, chunks = self._load(slots)
        self._addresses.end()
        self._chunks.end()
        written = [t for s in slots for t in (s.param, s.exp_avg, s.exp_avg_sq, s.step)]
        working = [s.working for s in slots if s.working is not None]
        rates = [s.lr for s in slots if isinstance(s.lr, Tensor)]
        clip = self._one if clip is None else clip
        found_inf = self._zero if found_inf is None else found_inf
        check_tensor("adamw", "found_inf", found_inf, (), self.device, FP32)
        read = [*(s.grad for s in slots), *rates]
        adamw_step(table, chunks, clip, found_inf, written + working, read)
        # Autograd cannot see the writes; a graph that saved a parameter must not be used again.
        torch.autograd.graph.increment_version([*(s.param for s in slots), *working])

    def _load(self, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
        whole = tuple(_integers(slot) for slot in slots)
        numbers = tuple(_numbers(slot) for slot in slots)

        def make_table() -> Tensor:
            for slot in slots:
                _check(slot, self.device)
            integers = torch.tensor(whole, dtype=torch.int64).view(-1, LR.value)
            floats = torch.tensor(numbers, dtype=torch.float64).view(-1, FIELDS.value - LR.value)
            return torch.cat([integers, floats.view(torch.int64)], dim=1)

        sizes = tuple(row[NUMEL.value] for row in whole)

        def make_chunks() -> Tensor:
            pairs = [(i, c) for i, size in enumerate(sizes) for c in range(cdiv(size, CHUNK))]
            return torch.tensor(pairs, dtype=torch.int32).view(len(pairs), 2)

        table = self._addresses.put((whole, numbers), make_table)
        return table, self._chunks.put(sizes, make_chunks)


def _integers(slot: Slot) -> tuple[int, ...]:
    """The first columns of a row. What may change from step to step is checked here."""
    grad, device = slot.grad, slot.param.device
    check_tensor("adamw", f"gradient of {slot.name}", grad, slot.param.shape, device, FP32_OR_BF16)
    tensors = slot.param, grad, slot.exp_avg, slot.exp_avg_sq, slot.working
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    flags = BF16_GRAD.value if grad.dtype == torch.bfloat16 else 0
    if all(address % ALIGNMENT == 0 for address in addresses):
        flags |= ALIGNED.value
    lr = slot.lr.data_ptr() if isinstance(slot.lr, Tensor) else 0
    return *addresses, slot.step.data_ptr(), lr, slot.param.numel(), flags


@cache
def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _numbers(slot: Slot) -> tuple[float, ...]:
    """The last columns of a row."""
    beta1, beta2 = slot.betas
    lr = 0.0 if isinstance(slot.lr, Tensor) else slot.lr
    return lr, slot.weight_decay, beta1, beta2, _log(beta1), _log(beta2), slot.eps


def _check(slot: Slot, device: torch.device) -> None:
    """Raise ValueError for what the kernels would misread."""
    for what, tensor, dtypes in (
        ("param", slot.param, FP32),
        ("exp_avg", slot.exp_avg, FP32),
        ("exp_avg_sq", slot.exp_avg_sq, FP32),
        ("step", slot.step, FP32),
        ("working copy", slot.working, (torch.bfloat16,)),
        ("lr", slot.lr, FP32),
    ):
        if isinstance(tensor, Tensor):
            shape = () if what in ("step", "lr") else slot.param.shape
            check_tensor("adamw", f"{what} of {slot.name}", tensor, shape, device, dtypes)
