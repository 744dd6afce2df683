"""AdamW's state sharded over the ranks (ZeRO-1): one rank updates each parameter.

Only that rank has the moments, and the fp32 weight if the model works with a bf16 copy; the others
receive the new weight or copy. All have the whole gradient, so clip and update equal those of one
rank to the last bit. A step sends an additional (n - 1) / n of the weights or copies.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import GPT
from training.distributed import World, wait
from training.plan import Plan

if TYPE_CHECKING:
    from training.optim import AdamW

Copies = Mapping[nn.Parameter, Tensor]  # bf16 working copies, by parameter


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, (), fp32."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Replicas:
    """Every rank has all and updates all; classes that shard something override methods.

    Attributes:
        others: The parameters that this rank does not update.
        rows: What a step computes with in place of sharded parameters, by parameter; see
            training/full_shard.py.
        released: Whether weights are missing, until `gather`.
        outside: As in training/averaging.py.
    """

    others: Sequence[nn.Parameter] = ()
    rows: Mapping[nn.Parameter, Any] = {}
    released = False
    outside: Callable[[Callable[[], None]], None] = staticmethod(lambda work: work())

    def owns(self, parameter: nn.Parameter) -> bool:
        return True

    def part(self, parameter: nn.Parameter, value: Tensor) -> Tensor | None:
        """What this rank keeps of a moment or a step count."""
        return value if self.owns(parameter) else None

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Norm of all gradients together, sharded ones included."""
        return total_norm(parameters)

    def take_gradients(self) -> None:
        """After the backward: move the gradients to the model's parameters."""

    def exchange(self, copies: Copies) -> None:
        """After the update: send every rank what its model reads of each parameter."""

    def release(self, copies: Copies) -> None:
        """Before a step: free the weights that this rank can do without."""

    def gather(self, copies: Copies) -> None:
        """Bring released weights back, so that the model is whole for its readers."""

    def to_first(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """The whole moments on rank 0. All ranks must call it."""
        return moments


class Shard(Replicas):
    """Each parameter is owned by one rank.

    Args:
        parameters: Of the model; on every rank the same in the same order.
        world: More than one rank.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World):
        self.rank, self.owner, load = world.rank, dict[nn.Parameter, int](), [0] * world.size
        # The largest first, to the rank that has least: loads differ by at most one matrix.
        for p in sorted(parameters, key=lambda p: -p.numel()):
            rank = load.index(min(load))
            self.owner[p] = rank
            load[rank] += p.numel()
        self.others = [p for p in self.owner if not self.owns(p)]

    def owns(self, parameter: nn.Parameter) -> bool:
        return self.owner[parameter] == self.rank

    def exchange(self, copies: Copies) -> None:
        read = [(copies.get(p, p).detach(), rank) for p, rank in self.owner.items()]
        self.outside(lambda: wait(dist.broadcast(t, rank, async_op=True) for t, rank in read))

    def release(self, copies: Copies) -> None:
        self.released = bool(copies)
        for p in copies:
            if not self.owns(p):
                p.untyped_storage().resize_(0)

    def gather(self, copies: Copies) -> None:
        for p in copies:
            p.untyped_storage().resize_(p.nbytes)
        wait(dist.broadcast(p.detach(), self.owner[p], async_op=True) for p in copies)
        self.released = False

    def to_first(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> dict[str, Tensor]:
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
    """Give each rank the weights of rank 0, and its shard of what the plan shards."""
    if world.size > 1:
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)
    if plan.shard == "full":
        from training.full_shard import FullShard  # FSDP2 takes a while to import

        optimizer.shard = FullShard(model, plan, world)
    elif plan.shard == "optimizer":
        optimizer.shard = Shard(model.parameters(), world)
