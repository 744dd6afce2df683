"""How a run ends: last evaluation, weights, samples, summary and report."""

import math
import shlex
from collections.abc import Callable

import numpy as np
import torch

from model import GPT
from model.edge import one_line
from model.sampling import Sampling
from model.text import stream_text
from model.tokenizer import END_OF_TEXT, EOT, decode, get_encoding
from training import metrics
from training.checkpoint import Writer
from training.environment import seconds_since_start
from training.folder import CHECKPOINTS, STOPPED
from training.metrics import RunLog
from training.ngrams import ngram_losses
from training.report import DECODE_TOKENS, report_run
from training.resume import RunFailed
from training.run import Run
from training.signals import EXIT_RESUMABLE, StopRequest
from training.state import Progress
from training.verdicts import spell_epochs

NUM_SAMPLES = 4
PROMPT_TOKENS = 8
SAMPLE_TOKENS = 120
MAX_VAL_TOKENS = 10_485_760  # for the last evaluation; more would not change the digits shown


def _take_best(run: Run, model: GPT, say: Callable[[str], None], progress: Progress) -> int:
    """Put the weights that the run keeps into `model`; returns the step they are of."""
    best, last, world = progress.best, progress.step, run.world
    if run.recipe.keep == "last" or best is None or best == last:
        return last
    weights, lost = {}, ""
    if world.is_main:
        try:
            folder = run.out / CHECKPOINTS / f"step-{best:08d}"
            weights = GPT.from_pretrained(folder).state_dict()
        except (OSError, ValueError) as error:
            lost = one_line(error)
    if lost := world.first("best", lambda: lost):
        say(f"keep: the weights of step {best}, the best, are lost; model/ holds the last: {lost}")
        return last
    model.load_state_dict(world.send("best tensors", {"model": weights})["model"])
    if best == 0 and run.contexts:
        model.trained_context, model.fine_tuned_context = run.contexts
    worse = "training made them worse" if best == 0 else f"those of step {last} are worse"
    say(f"keep: model/ holds the weights of step {best}, whose validation loss was best; {worse}")
    return best


def finish(
    run: Run, model: GPT, log: RunLog, progress: Progress, reached: int | None, stop: StopRequest
) -> None:
    """Evaluate the weights that the run keeps; write them, samples, summary and report.

    Args:
        run, model, log, progress: After the last step.
        reached: The step whose loss fell below the recipe's target, if one did.
        stop: Checked now and then; raises Stopped.
    """
    kept = _take_best(run, model, log.say, progress)
    score = run.score_hellaswag(model, log, kept, stop) if run.items else None
    recipe, out, num_steps = run.recipe, run.out, progress.step
    train_s = sum(r.ms for r in log.records) / 1000.0
    tokens_seen = num_steps * recipe.tokens_per_step
    val_loss, bits_per_byte, baselines = None, None, {}
    scored, validates = run.val_tokens, len(run.val_tokens) > 1
    if not validates:  # one row shows whether the model is usable after the last update
        scored = run.train_tokens[: recipe.block_size + 1]
    loss = run.validate(model, scored, MAX_VAL_TOKENS, stop.check)
    if validates:
        val_loss = loss
        log.event("eval" if kept == num_steps else "kept", step=kept, val_loss=val_loss)
    if not math.isfinite(loss):
        raise RunFailed(
            f"step {kept}: after it the loss is {loss}; a lower --max-lr or more "
            "--warmup-steps may help, with --resume never"
        )
    if not run.world.is_main:
        return
    if val_loss is not None:
        scored = np.asarray(scored[:MAX_VAL_TOKENS])
        counted = np.asarray(run.train_tokens[:MAX_VAL_TOKENS])
        baselines = ngram_losses(counted, scored, model.config.vocab_size)
        part = scored[:DECODE_TOKENS]
        num_bytes = len(get_encoding().decode_bytes(part[part != EOT].tolist()))
        bits_per_byte = val_loss * len(part) / (math.log(2) * (num_bytes or math.inf))
        beside = "".join(f", {name} model {loss:.4f}" for name, loss in baselines.items())
        log.say(f"validation loss {val_loss:.4f} nats per token{beside}")
    stop.check()
    model.save_pretrained(out / "model")
    model.residual_dtype = None  # as in a model that is loaded from model/
    write_samples(run, model, log.say, stop.check)
    losses = (r.loss for r in reversed(log.records) if r.finite and r.step < kept)
    summary = {
        "final_step": num_steps,
        "reached_target_at": reached,
        "saved_after_step": kept - 1,
        "train_loss": next(losses, None),
        "val_loss": val_loss,
        "val_bits_per_byte": bits_per_byte,
        "hellaswag": score,
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
        "device": run.plan.device_name,
    }
    metrics.write_json(out / "summary.json", summary)
    report_run(out, run.train_tokens, log.say)
    log.say(
        f"done: {num_steps} steps, {tokens_seen:,} tokens, {spell_epochs(summary['epochs'])}, "
        f"{summary['tokens_per_s']:,.0f} tok/s, {summary['wall_s']:.0f} s in all; "
        f"try it: make sample MODEL={shlex.quote(str(out))}"
    )


def write_samples(
    run: Run, model: GPT, say: Callable[[str], None], poll: Callable[[], None] = lambda: None
) -> list[tuple[str, str]]:
    """Write samples.txt, continuations of a few words of held-out text, and print the first.

    Returns:
        (prompt, continuation) of each.

    Raises:
        ValueError: the model's logits are not finite.
    """
    text = run.val_tokens
    if len(text) <= PROMPT_TOKENS * NUM_SAMPLES:
        text = run.train_tokens
    starts = np.linspace(0, len(text) - PROMPT_TOKENS, NUM_SAMPLES + 1, dtype=int)[:-1]
    words = (decode(np.asarray(text[i : i + PROMPT_TOKENS])) for i in starts)
    # All of one document, and different, or their samples would be the same.
    prompts = [*dict.fromkeys(each.rpartition(END_OF_TEXT)[2] for each in words)]
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=run.recipe.seed)
    answers = [""] * len(prompts)
    for piece in stream_text(model, prompts, sampling):
        answers[piece.row] += piece.text
        poll()
    with (run.out / "samples.txt").open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(f"[prompt] {prompt}\n[model]{answer}\n\n")
    say(f"sample: {prompts[0]}|{answers[0]}")
    return [*zip(prompts, answers, strict=True)]


def sample(run: Run, model: GPT, log: RunLog, step: int) -> None:
    """Write and log samples during the run."""
    if not run.world.is_main:
        return
    try:
        with log.aside(), torch.compiler.set_stance("force_eager"):
            texts = write_samples(run, model, log.say)
        log.event("samples", step=step, texts=texts)
    except ValueError as error:  # if it matters, the next step's loss shows it
        log.say(f"step {step:5d} | {error}")


def leave(run: Run, step: int, writer: Writer, log: RunLog, stop: StopRequest) -> int:
    """Say how to resume, once the checkpoint is on disk."""
    writer.finish()
    if run.world.size > 1 and run.world.is_main:
        (run.out / STOPPED).touch()  # torchrun takes the exit code for a failure and restarts
    log.event("stopped", step=step, signal=stop.signal)
    log.say(
        f"{stop.signal or 'another rank'}: stopped after {step} steps, last good checkpoint: step "
        f"{writer.last_good}; the same command with --out {shlex.quote(str(run.out))} goes on"
    )
    return EXIT_RESUMABLE
