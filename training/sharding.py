"""AdamW's state dealt out over the ranks (ZeRO-1): each parameter is updated by one of them.

The owner alone has the moments, and the fp32 weight where the model works with a bf16 copy; the
others get what it made of the weight or the copy. All have the whole gradient, so clip and update
are those of one rank to the last bit. A step sends (n - 1) / n of the weights or copies more.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import GPT
from training.distributed import World, wait
from training.plan import Plan

if TYPE_CHECKING:
    from training.optim import AdamW


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, (), fp32."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Shard:
    """Who owns which parameter.

    Args:
        parameters: Of the model; on every rank the same in the same order.
        world: More than one rank.

    Attributes:
        owner: Rank by parameter.
        others: The parameters that this rank does not own.
        released: Whether `release` has freed some of those.
        outside: As in training/averaging.py.
    """

    rows: Mapping[nn.Parameter, Tensor] = {}  # of matrices that are cut; see training/full_shard.py

    def __init__(self, parameters: Iterable[nn.Parameter], world: World):
        self.rank, self.owner, self.released = world.rank, {}, False
        self.outside: Callable[[Callable[[], None]], None] = lambda work: work()
        load = [0] * world.size
        # The largest first, each to whom has least: no more than one matrix apart.
        for p in sorted(parameters, key=lambda p: -p.numel()):
            rank = load.index(min(load))
            self.owner[p] = rank
            load[rank] += p.numel()
        self.others = [p for p, rank in self.owner.items() if rank != self.rank]

    def owns(self, parameter: nn.Parameter) -> bool:
        return self.owner[parameter] == self.rank

    def part(self, parameter: nn.Parameter, value: Tensor) -> Tensor | None:
        """What this rank keeps of a moment or a step count."""
        return value if self.owns(parameter) else None

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Of all gradients together, which are on each rank."""
        return total_norm(parameters)

    def take_gradients(self) -> None:
        """Nothing: they are at the parameters."""

    def exchange(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """What the model reads of every parameter, as the owner has it."""
        read = [(copies.get(p, p).detach(), rank) for p, rank in self.owner.items()]
        self.outside(lambda: wait(dist.broadcast(t, rank, async_op=True) for t, rank in read))

    def release(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Free the fp32 weights that others own, of parameters with a copy."""
        if self.released:
            return
        self.released = bool(copies)
        for p in copies:
            if not self.owns(p):
                p.untyped_storage().resize_(0)

    def gather(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Have them again: whoever looks at the model finds all its weights."""
        if not self.released:
            return
        for p in copies:
            p.untyped_storage().resize_(p.nbytes)
        wait(dist.broadcast(p.detach(), self.owner[p], async_op=True) for p in copies)
        self.released = False

    def to_first(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The owner's moments on rank 0's CPU; on the others {}. All take part."""
        owner = self.owner[parameter]
        if owner == 0:
            return moments if self.rank == 0 else {}
        shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        received = {}
        for name, shape in shapes.items():
            if self.rank == owner:
                dist.send(moments[name].to(parameter.device), 0)
            elif self.rank == 0:
                tensor = torch.empty(shape, device=parameter.device)
                dist.recv(tensor, owner)
                received[name] = tensor.cpu()
        return received


def share_out(optimizer: "AdamW", model: GPT, plan: Plan, world: World) -> None:
    """Give each rank its part of what the plan shares out."""
    if plan.shard == "full":
        from training.full_shard import FullShard  # FSDP2 takes a while to import

        optimizer.shard = FullShard(model, plan, world)
    elif plan.shard == "optimizer":
        optimizer.shard = Shard(model.parameters(), world)
