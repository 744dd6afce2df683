"""A run: what was checked before it began, its folder, and how it ends.

The folder holds config.json, metrics.jsonl, checkpoints/, and at the end model/, samples.txt,
loss.png, summary.json and report.html.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import GPT
from model.sampling import Sampling
from model.text import stream_text
from model.tokenizer import decode, get_encoding
from training import metrics
from training.checkpoint import Checkpoint
from training.data import DataLoaderLite, Prefetcher, Tokens
from training.distributed import World
from training.environment import environment, seconds_since_start
from training.evaluate import eval_pieces, evaluate_tokens
from training.machines import mfu
from training.metrics import RunLog
from training.ngrams import ngram_losses
from training.plan import Plan
from training.recipes import Recipe
from training.report import DECODE_TOKENS, report_run
from training.resume import Progress, RunFailed

NUM_SAMPLES = 4
PROMPT_TOKENS = 8
SAMPLE_TOKENS = 120
MAX_VAL_TOKENS = 10_485_760  # of the last evaluation; a long corpus has more than it can tell apart


@dataclass
class Run:
    """What a run is made of; nothing in it changes once training has begun.

    Args:
        preset: Name of the recipe.
        recipe, plan, world: What is trained, how, and by how many.
        out: Run folder; it exists and can be written.
        flags: As given, for config.json.
        train_tokens, val_tokens: Both ends of the corpus.
        corpus: Its name, hash and counts.
        saved: Checkpoint to go on from; None starts afresh.
        initial: Model whose weights to start afresh from; None draws them.
    """

    preset: str
    recipe: Recipe
    plan: Plan
    world: World
    out: Path
    flags: dict[str, Any]
    train_tokens: Tokens
    val_tokens: Tokens
    corpus: dict[str, Any]
    saved: Checkpoint | None = None
    initial: GPT | None = None

    def build_model(self) -> GPT:
        """The model to start with, on the plan's device; a checkpoint is put into it later."""
        recipe, plan = self.recipe, self.plan
        residual_dtype = torch.bfloat16 if plan.residual == "bf16" else None
        model = GPT(recipe.model_config, plan.op_set, residual_dtype)
        model.trained_context = recipe.block_size
        if self.initial is not None:
            model.load_state_dict(self.initial.state_dict())
            model.fine_tuned_context = recipe.block_size
            model.trained_context = max(recipe.block_size, self.initial.trained_context)
        return model.to(plan.device)

    def open_batches(self, progress: Progress) -> Prefetcher:
        """The rows of each step from `progress` on, (rows of a step on this rank, T)."""
        loader = data_loader(self.recipe, self.plan, self.train_tokens, self.world, progress)
        return Prefetcher(loader, self.plan.device)

    def first_rows(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the next step's first micro-batch, (rows, T) on the CPU."""
        loader = data_loader(self.recipe, self.plan, self.train_tokens, self.world, progress)
        idx, targets = loader.next_batch()
        return idx[: self.plan.micro_batch_size], targets[: self.plan.micro_batch_size]

    def open_log(self, progress: Progress, log_every: int, tensorboard: bool) -> RunLog:
        """The run's log, cut back to where `progress` stands."""
        recipe, plan = self.recipe, self.plan

        def utilisation(tokens_per_s: float) -> float | None:
            return mfu(recipe.model_config, recipe.block_size, tokens_per_s, plan.device_name)

        return RunLog(self.out, recipe.max_steps, recipe.tokens_per_step, utilisation,
                      log_every or math.ceil(recipe.max_steps / 100), tensorboard, progress.step,
                      progress.metrics_bytes, quiet=not self.world.is_main)  # fmt: skip

    def write_config(self, model: GPT) -> None:
        """config.json: the resolved recipe and plan, and what they ran on. Rank 0 writes."""
        if not self.world.is_main:
            return
        values = {
            "recipe": {"name": self.preset, **asdict(self.recipe)},
            "plan": asdict(self.plan),
            "flags": self.flags,
            "data": self.corpus,
            "parameters": model.num_parameters(),
            "device": self.plan.device_name,
            **environment(),
        }
        metrics.write_json(self.out / "config.json", values)

    def validate(
        self,
        model: GPT,
        scored: Tokens,
        max_tokens: int,
        poll: Callable[[], None] = lambda: None,
    ) -> float:
        """Loss in nats per token; the ranks share the work.

        Args:
            model: The model.
            scored: What it is to predict, 2 tokens at least.
            max_tokens: Of longer texts as many, from all over them.
            poll: Called between batches; may raise to end it.
        """
        world, total, weight = self.world, 0.0, 0
        pieces = eval_pieces(len(scored), max_tokens, self.recipe.block_size, world.size)
        # The blocks of a plan may be compiled for training; a graph without gradients is another.
        with torch.compiler.set_stance("force_eager"):
            for first, last in pieces[world.rank :: world.size]:
                tokens = np.asarray(scored[first:last])
                loss = evaluate_tokens(model, tokens, window=self.recipe.block_size, poll=poll)
                total += loss * (len(tokens) - 1)
                weight += len(tokens) - 1
        return world.mean(total, weight, self.plan.device)


def data_loader(
    recipe: Recipe,
    plan: Plan,
    tokens: Tokens,
    world: World,
    progress: Progress | None = None,
) -> DataLoaderLite:
    """A step's rows at a time; the step cuts them into micro-batches."""
    progress = progress or Progress()
    return DataLoaderLite(tokens, plan.micro_batch_size * plan.num_micro_batches,
                          recipe.block_size, recipe.order, recipe.seed,
                          wrap_rows=recipe.batch_size, rank=world.rank, world_size=world.size,
                          position=progress.position, skips=progress.skips)  # fmt: skip


def finish(
    run: Run,
    model: GPT,
    log: RunLog,
    progress: Progress,
    reached: int | None,
    autocast: Callable[[], AbstractContextManager[Any]],
    poll: Callable[[], None],
) -> None:
    """Last evaluation, weights, samples, summary, report; in that order.

    Args:
        run, model, log, progress: After the last step.
        reached: Step whose loss fell below the recipe's target, if one did.
        autocast: Context of the evaluation, as of those during the run.
        poll: Raises where the run is to stop.
    """
    recipe, plan, out = run.recipe, run.plan, run.out
    train_s = sum(r.ms for r in log.records) / 1000.0
    num_steps = progress.step
    tokens_seen = num_steps * recipe.tokens_per_step
    val_loss, bits_per_byte, baselines = None, None, {}
    # Without a validation part a row tells whether the last update left a usable model.
    scored = (
        run.val_tokens if len(run.val_tokens) > 1 else run.train_tokens[: recipe.block_size + 1]
    )
    with autocast():
        loss = run.validate(model, scored, MAX_VAL_TOKENS, poll)
    if len(run.val_tokens) > 1:
        val_loss = loss
        log.event("eval", step=num_steps, val_loss=val_loss)
    if not math.isfinite(loss):
        raise RunFailed(
            f"step {num_steps}: after it the loss is {loss}; a lower --max-lr or more "
            "--warmup-steps may help, with --resume never"
        )
    if not run.world.is_main:
        return
    if val_loss is not None:
        counted, scored = (
            np.asarray(t[:MAX_VAL_TOKENS]) for t in (run.train_tokens, run.val_tokens)
        )
        baselines = ngram_losses(counted, scored, model.config.vocab_size)
        num_bytes = len(get_encoding().decode_bytes(scored[:DECODE_TOKENS].tolist()))
        bits_per_byte = val_loss * len(scored[:DECODE_TOKENS]) / (math.log(2) * num_bytes)
        beside = ", ".join(f"{name} {loss:.4f}" for name, loss in baselines.items())
        log.say(f"validation loss {val_loss:.4f} nats per token (counting gives: {beside})")
    poll()
    model.save_pretrained(out / "model")
    model.residual_dtype = None  # as whoever loads the saved model runs it
    _write_samples(run, model, log.say, poll)
    summary = {
        "final_step": num_steps,
        "reached_target_at": reached,
        "saved_after_step": num_steps - 1,
        "train_loss": next((r.loss for r in reversed(log.records) if r.finite), None),
        "val_loss": val_loss,
        "val_bits_per_byte": bits_per_byte,
        "baselines": baselines,
        "tokens_seen": tokens_seen,
        "corpus_tokens": len(run.train_tokens),
        "epochs": tokens_seen / len(run.train_tokens),
        "trained_context": recipe.block_size,
        "tokens_per_s": len(log.records) * recipe.tokens_per_step / (train_s or math.inf),
        "train_s": train_s,
        "first_step_s": log.first_step_s,
        "wall_s": seconds_since_start(),
        "model_bytes": (out / "model" / "model.safetensors").stat().st_size,
        "device": plan.device_name,
    }
    metrics.write_json(out / "summary.json", summary)
    report_run(out, run.train_tokens, log.say)
    log.say(
        f"done: {num_steps} steps, {tokens_seen:,} tokens, {summary['epochs']:.1f} epochs, "
        f"{summary['tokens_per_s']:,.0f} tok/s, {summary['wall_s']:.0f} s in all; see {out}"
    )


def _write_samples(
    run: Run, model: GPT, say: Callable[[str], None], poll: Callable[[], None]
) -> None:
    """samples.txt: continuations of a few words of held-out text, within the trained context."""
    text = run.val_tokens
    if len(text) <= PROMPT_TOKENS * NUM_SAMPLES:
        text = run.train_tokens
    starts = np.linspace(0, len(text) - PROMPT_TOKENS, NUM_SAMPLES + 1, dtype=int)[:-1]
    prompts = [decode(np.asarray(text[i : i + PROMPT_TOKENS])) for i in starts]
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=run.recipe.seed)
    answers = [""] * len(prompts)
    for piece in stream_text(model, get_encoding(), prompts, sampling):
        answers[piece.row] += piece.text
        poll()
    with (run.out / "samples.txt").open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(f"[prompt] {prompt}\n[model]{answer}\n\n")
    say(f"sample: {prompts[0]}|{answers[0]}")
