"""Run by tests/test_averaging.py, once for each rank: python -m tests.two_ranks RANK SIZE FOLDER.

Takes a few steps under every kind of plan, then the same steps on one rank alone. Captured steps
are recordings of tests/pretend_cuda.py. Rank 0 writes the results to FOLDER/answers.json.
"""

import functools
import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from model import GPT
from tests import pretend_cuda as pretend
from training.distributed import ALONE, World, share
from training.optim import configure_adamw
from training.plan import Choices, Machine, detect, make_plan
from training.recipes import Recipe
from training.sharding import share_out
from training.state import optimizer_tensors
from training.step import Outcome, TrainStep

MODEL = "smoke,n_embd=32,n_layer=2,n_head=2,block_size=16"
RECIPE = Recipe(model=MODEL, batch_size=2, grad_accum_steps=4, block_size=16)
CPU = Machine("cpu", "a CPU", num_threads=1, interpreted=True)
NUM_STEPS = 4


class Rows:
    """This rank's consecutive part of rows that all ranks draw alike."""

    def __init__(self, world: World):
        self.world, self.generator = world, torch.Generator().manual_seed(1)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        shape = RECIPE.rows_per_step, RECIPE.block_size + 1
        rows = torch.randint(0, 500, shape, generator=self.generator)
        rows = rows.chunk(self.world.size)[self.world.rank]
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def make_step(world: World, asked: Choices, said: list[str]) -> TrainStep:
    torch.manual_seed(RECIPE.seed + world.rank)  # all must take rank 0's weights
    machine = detect("cuda") if asked.cuda_graph else CPU
    plan = share(make_plan(RECIPE, machine, asked, world.size), RECIPE, world)
    model = GPT(replace(RECIPE.model_config, vocab_size=500))
    optimizer = configure_adamw(model, RECIPE, plan.optimizer)
    share_out(optimizer, model, plan, world)
    return TrainStep(model, optimizer, RECIPE, plan, world, said.append)


def run(
    world: World, asked: Choices, num_steps: int, said: list[str]
) -> tuple[list[Tensor], list[str], list[int]]:
    """Losses, norms, weights and moments; the order of events; bytes of weights and moments."""
    step, rows, seen, order = make_step(world, asked, said), Rows(world), [], []
    last = step.model.transformer.wpe.weight
    last.register_post_accumulate_grad_hook(lambda _: order.append("last gradient"))
    whole = dist.all_reduce

    def watched(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        order.append(f"all_reduce {tensor.numel()}")
        return whole(tensor, *rest, **options)

    def once() -> Outcome:
        loss = step.accumulate()
        norm = step.optimizer.clip(RECIPE.grad_clip)
        step.optimizer.step()
        step.optimizer.zero_grad()
        return Outcome(loss, norm, None, step.asked_to_stop)

    dist.all_reduce = watched  # pyright: ignore
    for i in range(num_steps):
        if i == NUM_STEPS + 1:  # as before an evaluation, which needs all weights
            step.gather()
        if i == num_steps - 1:
            order.append("last step")
        outcome = step.run(
            once, rows.next_batch(), 1e-3, stop=world.rank == 1 and i == num_steps - 1
        )
        seen += [outcome.loss.clone(), outcome.grad_norm.clone()]
        if outcome.asked_to_stop is not None:
            order.append(f"asked to stop: {outcome.asked_to_stop.item():g}")
    dist.all_reduce = whole  # pyright: ignore
    states = [value for state in step.optimizer.state.values() for value in state.values()]
    kept = [p.untyped_storage().size() for p in step.model.parameters()]
    kept = [sum(kept), sum(t.nbytes for t in states)]
    step.gather()
    moments = optimizer_tensors(step.model, step.optimizer)
    assert world.is_main or step.plan.shard == "none" or not moments  # only rank 0 keeps them
    weights = [p.detach() for p in step.model.parameters()]
    copies = [copy.detach() for copy in step.copies.values()]
    return [*seen, *weights, *copies, *moments.values()], order, kept


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    world = World(rank, size, rank, dist.FileStore(str(folder / "store"), size))
    world.connect("cpu", 120)
    plain = Choices(compile=False, micro_batch_size=4)  # 2 micro-batches alone, 1 on each rank
    bf16, sharded = replace(plain, dtype="bf16"), replace(plain, shard="optimizer")
    compiled = replace(bf16, compile=True, compile_scope="blocks")
    kinds = {
        "fp32": replace(plain, dtype="fp32"),
        "bf16": replace(bf16, micro_batch_size=2),
        "autocast": replace(bf16, micro_batch_size=2, working_copies=False),
        "sharded": replace(sharded, dtype="fp32", recompute=True),
        "full": replace(plain, dtype="fp32", shard="full"),
        "full, bf16": replace(bf16, shard="full", working_copies=False, recompute=True),
        "aot_eager": compiled,
        "bf16 sums": replace(compiled, reduce_dtype="bf16"),
    }
    with suppress(ImportError):  # no triton
        from tests import interpreter

        interpreter.install()
        ours = replace(sharded, dtype="bf16", ops="eager,embedding=triton", optimizer="triton")
        kinds["sharded, ours"] = ours
        on_gpu = replace(plain, cuda_graph=True, ops="eager", optimizer="torch")
        kinds["captured"] = replace(on_gpu, dtype="fp32")
        kinds["captured, sharded"] = replace(ours, cuda_graph=True)
        kinds["cut"] = replace(on_gpu, dtype="bf16", shard="optimizer")
    if sys.argv[4:] == ["inductor"]:
        model = replace(bf16, compile=True, compile_scope="model")
        kinds = {"model": model, "blocks": kinds["aot_eager"]}
    else:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    answers: dict[str, Any] = {}
    for kind, asked in kinds.items():
        torch.compiler.reset()
        said: list[str] = []
        num_steps = 2 * NUM_STEPS if asked.cuda_graph else NUM_STEPS
        with ExitStack() as pretended:
            if asked.cuda_graph:
                pretended.enter_context(pretend.pretend_cuda())
            if kind == "cut":
                refused = pretend.HOST_READS | {"allreduce_", "broadcast_"}
                pretended.enter_context(mock.patch.object(pretend, "HOST_READS", refused))
            together, order, num_bytes = run(world, asked, num_steps, said)
        kept = world.gather(f"{kind} bytes", num_bytes)
        torch.compiler.reset()
        if not world.is_main:
            continue
        alone, _, _ = run(ALONE, replace(asked, cuda_graph=None), num_steps, [])
        pairs = list(zip(together, alone, strict=True))
        answers[kind] = {
            "bitwise": all(torch.equal(a, b) for a, b in pairs),
            "error": max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
            "loss": [loss.item() for loss in together[: 2 * NUM_STEPS : 2]],
            "order": order,
            "bytes": kept,
            "said": said,
        }
    if world.is_main:
        (folder / "answers.json").write_text(json.dumps(answers))
    world.barrier()


if __name__ == "__main__":
    main()
