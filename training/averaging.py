"""Averages gradients over the ranks while the backward still computes others.

A hook on each leaf starts the all-reduce of a matrix's gradient as soon as it is ready; vectors and
the loss are reduced together at the end. torch's DistributedDataParallel knows only the parameters
of a module. Here gradients may arrive at bf16 working copies, and their fp32 sum over the
micro-batches must be reduced. Nothing is wrapped, so the model compiles as it does on one rank.

Each rank sends 2 (n - 1) / n times the gradients' bytes per step, as in any ring all-reduce.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import wait
from training.optim import AdamW


class Averaging:
    """Averages a step's gradients in the backward of its last micro-batch.

    Args:
        parameters: All that have gradients, in the model's order.
        optimizer: Has its working copies, and adds their gradients to those of the parameters.
            FSDP2 averages the matrices that the optimizer's shard has split.
        dtype: The matrices' gradients are sent and summed in it.

    Attributes:
        overlaps: Whether gradients are sent before the backward has ended.
        outside: Calls a function; if not `overlaps`, a captured graph leaves the call out.
    """

    overlaps = True
    outside: Callable[[Callable[[], None]], None] = staticmethod(lambda work: work())

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: AdamW, dtype: torch.dtype):
        parameters, copies = list(parameters), optimizer.copies
        self.optimizer, self.dtype = optimizer, dtype
        # Roughly the order of a backward. All ranks must keep to one order.
        self.matrices = [
            p for p in reversed(parameters) if p.dim() >= 2 and p not in optimizer.shard.rows
        ]
        self.vectors = [p for p in parameters if p.dim() < 2]
        self.begin(last=False)
        for p in self.matrices:
            copies.get(p, p).register_post_accumulate_grad_hook(lambda _, p=p: self._arrive(p))

    def begin(self, last: bool) -> None:
        """Call before each backward; the last one of a step sends the gradients."""
        self.arrived: set[nn.Parameter] | None = set() if last else None
        self.sent: list[tuple[Tensor, Tensor]] = []  # a gradient, and the tensor sent for it
        self.under_way: list[Any] = []

    def _arrive(self, parameter: nn.Parameter) -> None:
        if self.arrived is None:
            return
        self.arrived.add(parameter)
        for p in self.matrices[len(self.sent) :]:
            if p not in self.arrived:
                break
            copy = self.optimizer.copies.get(p)
            if copy is None or p.grad is not None or self.dtype != copy.dtype:
                self.optimizer.fold_working_gradients([p])
                copy = p
            assert copy.grad is not None
            self.sent.append((copy.grad, copy.grad.to(self.dtype)))
            if self.overlaps:
                self.under_way.append(dist.all_reduce(self.sent[-1][1], async_op=True))

    def finish(self, values: Tensor) -> Tensor:
        """Wait until each gradient is its sum over the ranks.

        Args:
            values: (N,), fp32, also to be summed.

        Returns:
            The sums of `values`.
        """
        assert len(self.sent) == len(self.matrices), "a matrix without a gradient"
        gradients = [p.grad for p in self.vectors if p.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), values])
        late = [flat] if self.overlaps else [*(total for _, total in self.sent), flat]
        self.outside(lambda: wait(dist.all_reduce(total, async_op=True) for total in late))
        wait(self.under_way)
        *parts, sums = flat.split([gradient.numel() for gradient in gradients] + [len(values)])
        pairs = [(g, part.view_as(g)) for g, part in zip(gradients, parts, strict=True)]
        pairs += [(g, total) for g, total in self.sent if total is not g]
        torch._foreach_copy_([g for g, _ in pairs], [total for _, total in pairs])
        self.begin(last=False)
        return sums
