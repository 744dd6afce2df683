"""Several processes, one run: what torchrun starts, seen as a rank and a world size.

Data parallelism through DistributedDataParallel. The recipe's rows of a step are dealt to the
ranks in order, so 1, 2 or 8 ranks train on the same global batches; gradients are averaged by
bucketed all-reduce that overlaps the last micro-batch's backward. Without torchrun everything
here is a world of one and touches no process group.
"""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.plan import Plan
from training.recipes import Recipe

# A rank that hangs (not dies: torchrun sees that at once) takes the job down after this long.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among all.

    Args:
        rank: Of this process, 0 is the one that writes.
        size: Processes.
        local_rank: On this machine; picks the GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the peers may be gone: waiting for them would hang.
        if self.size > 1 and kind is None:
            dist.destroy_process_group()

    def say(self, line: str) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(line, flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def first(self, choose: Callable[[], Any]) -> Any:
        """What `choose` returns on rank 0; an exception there is raised on every rank."""
        if self.size == 1:
            return choose()
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [choose()]
            except (ValueError, OSError) as error:
                answer = [error]
        dist.broadcast_object_list(answer)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, with its gradients averaged over the ranks after a backward."""
        if self.size == 1:
            return model
        # Not static_graph: with no_sync in its first step it dies on an internal assert.
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch: gradients travel with the last one only."""
        if isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def mean_loss(self, loss: Tensor, stop: bool) -> tuple[Tensor, Tensor]:
        """The loss over all ranks, and whether any rank was asked to stop, both on the device."""
        both = torch.stack([loss, torch.full_like(loss, float(stop))])
        if self.size > 1:
            dist.all_reduce(both)
            both[0] /= self.size
        return both[0], both[1]

    def mean(self, total: float, weight: float, device: str) -> float:
        """Sum of `total` over the ranks by the sum of `weight`."""
        if self.size == 1:
            return total / weight
        sums = torch.tensor([total, weight], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()


ALONE = World()


def start(device: str) -> World:
    """Join the job torchrun started, or be a world of one.

    Args:
        device: "cpu", "cuda" or "auto", as --device says.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]),
                  int(os.environ.get("LOCAL_RANK", "0")))  # fmt: skip
    on_cuda = device != "cpu" and torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=TIMEOUT)
    return world


def end_process(code: int) -> NoReturn:
    """Exit; as one of several ranks without the interpreter's teardown.

    Threads of gloo and autograd may still let go of Python objects. One that asks for the
    interpreter's lock during the teardown is killed, which C++ answers with std::terminate: a rank
    that had done its work died of SIGABRT once in some twenty jobs of four ranks on two cores.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def share(plan: Plan, recipe: Recipe, world: World) -> Plan:
    """The part of `plan` that one rank does: fewer rows, no graph, no working copies.

    DistributedDataParallel reduces the gradients of the parameters themselves, from hooks.

    Raises:
        ValueError: the recipe's rows cannot be dealt out evenly.
    """
    if world.size == 1:
        return plan
    if recipe.rows_per_step % world.size:
        raise ValueError(
            f"distributed: {recipe.rows_per_step} rows a step (batch_size {recipe.batch_size} x "
            f"grad_accum_steps {recipe.grad_accum_steps}) cannot be dealt to {world.size} ranks; "
            "change --batch-size or --nproc-per-node"
        )
    rows = recipe.rows_per_step // world.size
    micro = max(d for d in range(1, plan.micro_batch_size + 1) if rows % d == 0)
    return replace(plan, micro_batch_size=micro, num_micro_batches=rows // micro,
                   cuda_graph=False, working_copies=False)  # fmt: skip


def refuse_mismatch(world: World, facts: dict[str, Any]) -> None:
    """Compare what every rank is about to do with what rank 0 is.

    Raises:
        ValueError: on every rank, naming the ranks and fields that differ.
    """
    if world.size == 1:
        return
    everyone: list[dict[str, Any]] = [{} for _ in range(world.size)]
    dist.all_gather_object(everyone, facts)
    wrong = [
        f"rank {rank} has {key} {theirs.get(key)!r}, rank 0 {everyone[0].get(key)!r}"
        for rank, theirs in enumerate(everyone)
        for key in everyone[0]
        if theirs.get(key) != everyone[0][key]
    ]
    if wrong:
        raise ValueError(f"distributed: the ranks differ: {'; '.join(wrong[:4])}")
