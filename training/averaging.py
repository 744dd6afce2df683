"""Gradients averaged over the ranks while the backward still computes others.

A hook on each leaf starts the all-reduce of a matrix's gradient as soon as it is there, in place
and in fp32; the vectors travel together at the end. DistributedDataParallel of torch knows only the
parameters of a module, and gradients here may arrive at bf16 working copies, whose fp32 sum over
the micro-batches is what has to travel. Nothing is wrapped: the model is compiled as it is alone.

Bytes on the wire, by rank and step: 2 (n - 1) / n of the fp32 gradients, as any ring moves them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.optim import AdamW


class Averaging:
    """Averages the gradients of each step's last micro-batch, and what came before it.

    Args:
        parameters: All that have gradients, in the model's order. They become rank 0's.
        copies: The leaf at which a parameter's gradient arrives, where that is not itself.
        optimizer: Carries gradients from the copies to the parameters.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        copies: Mapping[nn.Parameter, Tensor],
        optimizer: AdamW,
    ):
        parameters, self.optimizer = list(parameters), optimizer
        # About as a backward reaches them. Each rank keeps to it: they wait for one another.
        self.matrices = [p for p in reversed(parameters) if p.dim() >= 2]
        self.vectors = [p for p in parameters if p.dim() < 2]
        self.arrived: set[nn.Parameter] | None = None  # None where gradients stay here
        self.under_way: list[Any] = []
        for p in parameters:
            dist.broadcast(p.detach(), 0)
        for p in self.matrices:
            copies.get(p, p).register_post_accumulate_grad_hook(lambda _, p=p: self._arrive(p))

    def begin(self) -> None:
        """The backward that comes next is the step's last."""
        self.arrived, self.under_way = set(), []

    def _arrive(self, parameter: nn.Parameter) -> None:
        if self.arrived is None:
            return
        self.optimizer.fold_working_gradients([parameter])
        self.arrived.add(parameter)
        for p in self.matrices[len(self.under_way) :]:
            if p not in self.arrived:
                break
            assert p.grad is not None
            self.under_way.append(dist.all_reduce(p.grad, async_op=True))

    def finish(self) -> None:
        """Wait until all gradients are the sum over the ranks."""
        assert len(self.under_way) == len(self.matrices), "a matrix without a gradient"
        gradients = [p.grad for p in self.vectors if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)]
        )
        for work in self.under_way:
            work.wait()
        self.arrived = None
