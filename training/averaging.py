"""Gradients averaged over the ranks while the backward still computes others.

A hook on each leaf starts the all-reduce of a matrix's gradient as soon as it is there; vectors
and the loss travel together at the end. DistributedDataParallel of torch knows only the parameters
of a module, and gradients here may arrive at bf16 working copies, whose fp32 sum over the
micro-batches is what has to travel. Nothing is wrapped: the model is compiled as it is alone.

Bytes on the wire, by rank and step: 2 (n - 1) / n of the gradients, as any ring moves them, in fp32
or in bf16.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import wait
from training.optim import AdamW


class Averaging:
    """Averages the gradients of each step's last micro-batch, and what came before it.

    Args:
        parameters: All that have gradients, in the model's order.
        optimizer: Its working copies are there, and it carries their gradients to the parameters.
            Those of matrices that its shard has cut do not travel here.
        dtype: In which the matrices' gradients travel and are added up.

    Attributes:
        overlaps: Whether gradients travel before the backward has ended.
        outside: Calls a function, which a captured graph leaves out where `overlaps` is False.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: AdamW,
        dtype: torch.dtype,
    ):
        parameters, copies, self.optimizer = list(parameters), optimizer.copies, optimizer
        self.dtype, self.overlaps = dtype, True
        self.outside: Callable[[Callable[[], None]], None] = lambda work: work()
        # About as a backward reaches them. Each rank keeps to it: they wait for one another.
        self.matrices = [
            p for p in reversed(parameters) if p.dim() >= 2 and p not in optimizer.shard.rows
        ]
        self.vectors = [p for p in parameters if p.dim() < 2]
        self.arrived: set[nn.Parameter] | None = None  # None where gradients stay here
        self.sent: list[tuple[Tensor, Tensor]] = []  # gradients, and what travels of each
        self.under_way: list[Any] = []
        for p in self.matrices:
            copies.get(p, p).register_post_accumulate_grad_hook(lambda _, p=p: self._arrive(p))

    def begin(self, last: bool) -> None:
        """A backward comes next; gradients travel in the step's last."""
        self.arrived, self.sent, self.under_way = set() if last else None, [], []

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
        """Wait until all gradients are the sum over the ranks.

        Args:
            values: (N,), fp32, more to sum up.

        Returns:
            Their sums.
        """
        assert len(self.sent) == len(self.matrices), "a matrix without a gradient"
        gradients = [p.grad for p in self.vectors if p.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), values])
        late = [flat] if self.overlaps else [*(sum for _, sum in self.sent), flat]
        self.outside(lambda: wait(dist.all_reduce(sum, async_op=True) for sum in late))
        wait(self.under_way)
        parts = flat.split([gradient.numel() for gradient in gradients] + [len(values)])
        pairs = [(g, part.view_as(g)) for g, part in zip(gradients, parts, strict=False)]
        pairs += [(g, sum) for g, sum in self.sent if sum is not g]
        torch._foreach_copy_([g for g, _ in pairs], [sum for _, sum in pairs])
        self.begin(last=False)
        return parts[-1]
