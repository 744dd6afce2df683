"""A run: what was checked before it began, and the objects made from that.

Its folder holds config.json, metrics.jsonl, checkpoints/, and at the end model/, samples.txt,
loss.png, summary.json and report.html.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPT
from training import hellaswag, metrics
from training.checkpoint import Checkpoint
from training.data import DataLoaderLite, Prefetcher, Tokens
from training.distributed import World
from training.environment import environment
from training.evaluate import eval_pieces, evaluate_tokens
from training.machines import mfu
from training.metrics import RunLog
from training.plan import Plan
from training.recipes import FINETUNE, Recipe
from training.signals import StopRequest
from training.state import Progress
from training.step import autocast


@dataclass
class Run:
    """What a run consists of."""

    preset: str  # name of the recipe
    recipe: Recipe
    plan: Plan
    world: World
    out: Path  # the run folder
    flags: dict[str, Any]  # for config.json
    train_tokens: Tokens
    val_tokens: Tokens
    corpus: dict[str, Any]  # its name, hash and counts
    saved: Checkpoint | None = None  # the checkpoint to resume from
    initial: GPT | None = None  # the model to start from, until `build_model` has its weights
    source: str = ""  # where that was found
    items: Sequence[hellaswag.Item] = ()  # HellaSwag items to score the model on
    contexts: tuple[int, int | None] | None = None  # trained and fine-tuned context of `initial`

    def introduce(self) -> str:
        """The first lines that a run prints: what is trained, from which weights, and how."""
        recipe, model = self.recipe, self.initial
        lines = [
            f"recipe: {self.preset}, model {recipe.model}, {recipe.tokens_per_step:,} tokens per "
            f"step, {recipe.max_steps:,} steps, {len(self.train_tokens):,} training tokens"
            + (", Muon for the blocks' matrices" if recipe.muon else "")
        ]
        if model and not self.saved:
            lines.append(
                f"init: {self.flags['init']}, {model.num_parameters():,} parameters, trained at "
                f"{model.trained_context} positions, from {self.source}"
            )
        if model and self.preset != FINETUNE:
            lines.append(
                f"init: the recipe {self.preset} trains from scratch, up to a learning rate of "
                f"{recipe.max_lr:.1e}; --preset {FINETUNE} is made for trained weights"
            )
        return "\n".join([*lines, "\n  ".join([self.plan.describe(recipe.muon), *self.plan.notes])])

    def build_model(self) -> GPT:
        """The model before any step, on the plan's device."""
        recipe, plan = self.recipe, self.plan
        residual_dtype = torch.bfloat16 if plan.residual == "bf16" else None
        model = GPT(recipe.model_config, plan.op_set, residual_dtype)
        model.trained_context = recipe.block_size
        if self.initial is not None:
            model.load_state_dict(self.initial.state_dict())
            self.contexts = self.initial.trained_context, self.initial.fine_tuned_context
            model.fine_tuned_context = recipe.block_size
            model.trained_context = max(recipe.block_size, self.initial.trained_context)
            self.initial = None
        return model.to(plan.device)

    def open_batches(self, progress: Progress) -> Prefetcher:
        """This rank's rows of each step after `progress`."""
        loader = data_loader(self.recipe, self.plan, self.train_tokens, self.world, progress)
        return Prefetcher(loader, self.plan.device)

    def first_rows(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step's first micro-batch, (rows, T) on the CPU."""
        loader = data_loader(self.recipe, self.plan, self.train_tokens, self.world, progress)
        idx, targets = loader.next_batch()
        return idx[: self.plan.micro_batch_size], targets[: self.plan.micro_batch_size]

    def open_log(self, progress: Progress, log_every: int, loggers: Sequence[str]) -> RunLog:
        """The run's log, truncated to the steps of `progress`."""
        recipe, plan = self.recipe, self.plan

        def utilisation(tokens_per_s: float) -> float | None:
            return mfu(recipe.model_config, recipe.block_size, tokens_per_s, plan.device_name)

        how = recipe.max_steps, recipe.tokens_per_step, utilisation
        every = log_every or math.ceil(recipe.max_steps / 100)
        done = progress.step, progress.metrics_bytes
        config = {"preset": self.preset, **asdict(recipe), **asdict(plan)}
        return RunLog(self.out, *how, every, loggers, *done, not self.world.is_main, config)

    def write_config(self, model: GPT) -> None:
        """Write config.json on rank 0: recipe, plan and flags, and what they run on."""
        if not self.world.is_main:
            return
        values = {
            "recipe": {"name": self.preset, **asdict(self.recipe)},
            "plan": asdict(self.plan),
            "flags": self.flags,
            "init": self.source or None,
            "data": self.corpus,
            "parameters": model.num_parameters(),
            "device": self.plan.device_name,
            **environment(),
        }
        metrics.write_json(self.out / "config.json", values)

    def validate(
        self, model: GPT, scored: Tokens, max_tokens: int, poll: Callable[[], None] = lambda: None
    ) -> float:
        """Loss in nats per token, by all ranks together.

        Args:
            model: The model.
            scored: The tokens to predict, at least 2.
            max_tokens: Of a longer text this many are scored, spread over it.
            poll: Called between batches; may raise to end it.
        """
        total, weight, T = 0.0, 0, self.recipe.block_size
        pieces = eval_pieces(len(scored), max_tokens, T, self.world.size)
        # Compiled blocks are for training; without gradients they would be compiled again.
        with autocast(self.plan), torch.compiler.set_stance("force_eager"):
            for first, last in pieces[self.world.rank :: self.world.size]:
                tokens = np.asarray(scored[first:last])
                total += evaluate_tokens(model, tokens, window=T, poll=poll) * (len(tokens) - 1)
                weight += len(tokens) - 1
        return self.world.mean(total, weight, self.plan.device)

    def score_hellaswag(self, model: GPT, log: RunLog, done: int, stop: StopRequest) -> float:
        """Log and return the accuracy on `items` after `done` steps, by all ranks together."""
        mine, T = self.items[self.world.rank :: self.world.size], self.recipe.block_size
        with log.aside(), autocast(self.plan), torch.compiler.set_stance("force_eager"):
            right, seen = hellaswag.count_right(model, mine, T, lambda: bool(stop))
            share = self.world.mean(right, seen or 1e-9, self.plan.device)
        if not stop:  # otherwise some items were left out
            log.event("hellaswag", step=done, hellaswag=share)
            answered = round(share * len(self.items))
            log.say(f"step {done:5d} | {hellaswag.line(answered, len(self.items))}")
        return share


def data_loader(
    recipe: Recipe, plan: Plan, tokens: Tokens, world: World, progress: Progress | None = None
) -> DataLoaderLite:
    """Yields this rank's rows of a step, which the step splits into micro-batches.

    Raises:
        ValueError: the text is too short for them.
    """
    progress = progress or Progress()
    rows = plan.micro_batch_size * plan.num_micro_batches
    shape = rows, recipe.block_size, recipe.order, recipe.seed, recipe.batch_size
    ranks = world.rank, world.size
    return DataLoaderLite(tokens, *shape, *ranks, progress.position, progress.skips)
