"""AdamW's moments dealt out over the ranks (ZeRO-1): each parameter is updated by one of them.

The owner alone has the moments; the others get what it made of the parameter. All have the whole
gradient, so clip and update are those of one rank to the last bit. A step sends (n - 1) / n of the
fp32 weights more.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.distributed import World


class Shard:
    """Who owns which parameter.

    Args:
        parameters: Of the model; on every rank the same in the same order.
        world: More than one rank.

    Attributes:
        owner: Rank by parameter.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World):
        self.rank, self.owner = world.rank, {}
        load = [0] * world.size
        # The largest first, each to whom has least: no more than one matrix apart.
        for p in sorted(parameters, key=lambda p: -p.numel()):
            rank = load.index(min(load))
            self.owner[p] = rank
            load[rank] += p.numel()

    def owns(self, parameter: nn.Parameter) -> bool:
        return self.owner[parameter] == self.rank

    def keep_own_gradients(self) -> None:
        """Drop the gradients of what others update."""
        for p in self.owner:
            if not self.owns(p):
                p.grad = None

    @torch.no_grad()
    def exchange(self) -> None:
        """Every parameter as its owner has it."""
        works = [dist.broadcast(p, rank, async_op=True) for p, rank in self.owner.items()]
        for work in works:
            assert work is not None
            work.wait()

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
