"""AdamW's state dealt out over the ranks (ZeRO-1): each parameter is updated by one of them.

The owner alone has the moments, and the fp32 weight where the model works with a bf16 copy; the
others get what it made of the weight or the copy. All have the whole gradient, so clip and update
are those of one rank to the last bit. A step sends (n - 1) / n of the weights or copies more.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import World, wait


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

    def exchange(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """What the model reads of every parameter, as the owner has it."""
        read = [(copies.get(p, p).detach(), rank) for p, rank in self.owner.items()]
        self.outside(lambda: wait(dist.broadcast(t, rank, async_op=True) for t, rank in read))

    def release(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Free the fp32 weights that others own, of parameters with a copy."""
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
