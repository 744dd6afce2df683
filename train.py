"""Train a GPT-2 from a text file. This is the only trainer; it reads top to bottom.

Three commands:
    python train.py                                  the recipe for this machine
    python train.py --preset smoke --data my.txt     takes seconds, to try out a flag
    python train.py --preset shakespeare-124m        GPT-2 124M until it has memorised its text
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until there is a run to save, Ctrl-C ends the process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model import GPT, hf
from model.edge import one_line
from training import console, distributed, folder, hellaswag, loggers, resume, signals
from training.checkpoint import CheckpointError, Writer
from training.choose import take_fastest
from training.data import Corpus, load_corpus
from training.distributed import ALONE, World, hash_weights, refuse_mismatch, share
from training.ending import finish, leave, sample
from training.explain import explain
from training.flags import Config, is_due, parse
from training.guard import Guard
from training.optim import configure_adamw
from training.plan import Choices, Machine, Plan, detect, make_plan
from training.resume import RunFailed
from training.run import Run, data_loader
from training.sharding import share_out
from training.signals import EXIT_RESUMABLE, Stopped, StopRequest
from training.state import Progress, capture, optimizer_tensors, restore
from training.step import Outcome, TrainStep, start_process
from training.verify import compare_first_batch, settle
from training.watch import Watch


def look(cfg: Config, world: World = ALONE) -> tuple[Machine, Plan, Corpus]:
    """Describe this machine, make a first plan for it and load the text."""
    machine = detect(cfg.device)
    # Others may use some of the GPUs: the rank with the least free memory decides for all.
    machine = replace(machine, memory_bytes=min(world.gather("memory", machine.memory_bytes)))
    plan = share(make_plan(cfg.recipe, machine, cfg.choices, world.size), cfg.recipe, world)
    load = partial(load_corpus, cfg.data, world.say, cfg.text_column, cfg.val)
    return machine, plan, world.in_turn("tokens", load)


def settled(cfg: Config, machine: Machine, world: World, kept: Mapping[str, Any]) -> Plan:
    """This rank's plan. On a GPU its kernels are checked and its ops are the fastest.

    `kept` has the choices of the checkpoint that the run resumes from.
    """

    def make(choices: Choices) -> Plan:
        plan = make_plan(cfg.recipe, machine, choices.or_else(kept), world.size)
        plan = replace(plan, launches=kept.get("launches", ""))
        return share(plan, cfg.recipe, world)

    plan = settle(make, cfg.choices, cfg.recipe, machine, world)
    return plan if kept else take_fastest(make, cfg.choices, plan, cfg.recipe, machine, world)


def prepare(cfg: Config, world: World = ALONE) -> Run:
    """Check everything that a user can get wrong, then make the run folder.

    Raises:
        ValueError, OSError: one line that names the value and the way out.
    """
    loggers.check_loggers(cfg.loggers)
    machine, plan, corpus = look(cfg, world)
    items = hellaswag.read_items(cfg.hellaswag) if cfg.hellaswag else []
    train_tokens, val_tokens = corpus.split(cfg.recipe.val_fraction)
    recipe = cfg.recipe.reading(len(train_tokens))
    cfg = replace(cfg, recipe=recipe)
    data_loader(recipe, plan, train_tokens, world)  # raises if the text is too short for a step
    out = Path(world.first("out", lambda: str(folder.name(cfg.out, cfg.preset, corpus))))
    expected = (recipe, corpus.sha256, cfg.override, cfg.cooldown)
    saved = resume.find(cfg.resume, out, world, *expected)
    kept, notes = resume.adopt(saved, cfg.choices, recipe, machine)
    plan = settled(cfg, machine, world, kept)
    same = asdict(recipe) | asdict(plan) | {"notes": (), "data": corpus.sha256}
    refuse_mismatch(world, "facts", same | {"torch": torch.__version__})
    source = hf.find_model(cfg.init) if cfg.init else ""
    initial = GPT.from_pretrained(source) if source else None
    if initial and world.size > 1:  # otherwise all would silently use rank 0's
        refuse_mismatch(world, "weights", {f"--init {cfg.init}": hash_weights(initial)})
    if saved:
        notes = resume.check_recipe(saved, *expected) + notes + resume.check_plan(saved, plan)
        world.say("\n".join([f"resume: {saved.path}, {saved.step} steps done", *notes]))
    world.first("folder", lambda: folder.make(out, recipe))
    return Run(
        preset=cfg.preset,
        recipe=resume.cool_down(saved, recipe) if cfg.cooldown and saved else recipe,
        plan=plan,
        world=world,
        out=out,
        flags={name: value for name, value in asdict(cfg).items() if name != "recipe"},
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        corpus={
            "name": corpus.name,
            "sha256": corpus.sha256,
            "train_tokens": len(train_tokens),
            "val_tokens": len(val_tokens),
        },
        saved=saved,
        initial=initial,
        source=str(source),
        items=items,
    )


def train(cfg: Config, run: Run, stop: StopRequest) -> int:
    """Train, evaluate, sample and save. Returns the exit code."""
    recipe, plan, world = run.recipe, run.plan, run.world
    start_process(plan, recipe.seed)
    model = run.build_model()
    optimizer = configure_adamw(model, recipe, plan.optimizer)
    share_out(optimizer, model, plan, world)
    guard = Guard(plan.device) if recipe.guard else None
    progress = restore(run.saved, model, optimizer, guard) if run.saved else Progress()
    first_rows = partial(run.first_rows, progress)
    plan = run.plan = compare_first_batch(model, plan, first_rows, cfg.choices.ops, world)
    log = run.open_log(progress, cfg.log_every, cfg.loggers)
    take_step = TrainStep(model, optimizer, recipe, plan, world, log.say)
    batches = run.open_batches(progress)
    run.write_config(model)
    writer = Writer(run.out / "checkpoints", cfg.keep_last, log.say)
    # Of several ranks a signal may reach one, which cannot save alone: saving does not wait for it.
    saves_at_end = cfg.saves or world.size > 1
    watch = Watch(log, guard, stop, recipe.target_loss, alone=world.size == 1)

    def save_checkpoint(metrics_bytes: int | None = None) -> None:
        if progress.step > recipe.max_steps:  # resumed with fewer steps: nothing was done
            return
        take_step.gather()
        if not world.is_main:
            optimizer_tensors(model, optimizer)  # sends this rank's part to rank 0
            return
        with log.aside():
            progress.position = batches.position
            progress.metrics_bytes = metrics_bytes or log.num_bytes
            how = recipe, take_step.plan, run.corpus["sha256"]
            writer.submit(capture, progress, model, optimizer, guard, *how)
        log.event("checkpoint", step=progress.step)

    def evaluate() -> None:
        take_step.gather()
        with log.aside():
            val_loss = run.validate(model, run.val_tokens, plan.eval_tokens)
        if math.isfinite(val_loss):  # otherwise the next step's loss shows it
            progress.evaluations.append((progress.step, val_loss))
        log.event("eval", step=progress.step, val_loss=val_loss)
        given = f" of {cfg.init} before training" if cfg.init and progress.step == 0 else ""
        log.say(f"step {progress.step:5d} | validation loss {val_loss:.4f}{given}")

    def step() -> Outcome:  # a GPU captures it as one graph after a few steps
        loss = take_step.accumulate()  # forward and backward of each micro-batch
        grad_norm = optimizer.clip(recipe.grad_clip)
        bad = guard.judge(loss, grad_norm) if guard else None
        optimizer.step(skip=take_step.skip(bad))  # a bad step changes nothing
        optimizer.zero_grad()
        return Outcome(loss, grad_norm, bad, take_step.asked_to_stop)

    with log, writer, contextlib.closing(batches):
        while True:
            done = progress.step >= recipe.max_steps or 0 < recipe.patience <= progress.stale
            save, due = cfg.saves_before(progress.step), cfg.evaluates_before(progress.step, done)
            action = watch.catch_up(wait=due or save or done)  # on the step before
            if guard and action:
                writer.wait()
                world.barrier()
                take_step.gather()
                progress = resume.roll_back(run, action, guard, log, model, optimizer)
                batches.seek(progress.position, progress.skips)
                continue

            done |= watch.reached is not None
            known = progress.step in dict(progress.evaluations)
            if cfg.evaluates_before(progress.step, done) and not (known or watch.stopping):
                evaluate()
                save |= progress.best == progress.step and cfg.saves
                done |= 0 < recipe.patience <= progress.stale
            if save or watch.stopping or (done and saves_at_end):
                save_checkpoint()  # before scores and samples, which a resumed run repeats
            if watch.stopping:
                writer.finish()
                world.barrier()
                return leave(run, progress.step, writer, log, stop)
            if done:
                break
            if is_due(cfg.hellaswag_every, progress.step):
                take_step.gather()
                run.score_hellaswag(model, log, progress.step, stop)
            if is_due(cfg.sample_every, progress.step):
                take_step.gather()
                sample(run, model, log, progress.step)

            lr = recipe.learning_rate(progress.step)
            outcome = take_step.run(step, batches.next_batch(), lr, bool(stop))
            log.step(progress.step, lr, batches.position, *outcome)
            progress.step += 1
        log.finish()
        take_step.gather()
        writer.wait()  # it may be writing the best weights, which `finish` reads
        metrics_bytes = log.num_bytes  # a resumed run logs the rest again
        try:
            finish(run, model, log, progress, watch.reached, stop)
        except Stopped:  # other ranks may not know of the signal
            if not saves_at_end:
                save_checkpoint(metrics_bytes)
            return leave(run, progress.step, writer, log, stop)
        writer.finish()
    if stop:  # too late: everything is written
        world.say(f"{stop.signal}: the run is complete")
    return 0


def explain_plan(cfg: Config) -> int:
    """Say how fast this machine can train the recipe, and what would make it faster."""
    machine, plan, corpus = look(cfg)
    tokens, _ = corpus.split(cfg.recipe.val_fraction)
    cfg = replace(cfg, recipe=cfg.recipe.reading(len(tokens)))
    plan = settled(cfg, machine, ALONE, {})
    if cfg.choices.tune == "only":
        return 0
    start_process(plan, cfg.recipe.seed)
    explain(cfg.recipe, plan, machine, tokens)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, 1 if the run failed, 2 for bad input, or 75 if a signal stopped the run."""
    world, stop = ALONE, StopRequest()
    with contextlib.ExitStack() as held:
        left = "a run goes on without it, and its metrics.jsonl has every step"
        held.enter_context(console.surviving(lambda: bool(stop), left))
        try:
            world = held.enter_context(distributed.meet())
            with world.in_one_voice():
                cfg = parse(sys.argv[1:] if arguments is None else arguments)
            cfg.check()
            world.connect(cfg.device, cfg.rank_timeout)
            if cfg.explain or cfg.choices.tune == "only":
                return explain_plan(cfg)
            run = prepare(cfg, world)
            cfg = replace(cfg, recipe=run.recipe)  # its steps may come from --epochs or --cooldown
            restarted = any(world.gather("restarted", distributed.is_restart()))
            opened = folder.opened(run.out, run.saved, world.say, restarted)
            if world.first("stopped", lambda: held.enter_context(opened)):
                return EXIT_RESUMABLE
        except (ValueError, OSError, RunFailed) as error:
            world.complain(f"train.py: {one_line(error)}")
            return 1 if isinstance(error, RunFailed) else 2
        stop.say = world.say
        held.enter_context(stop)
        world.say(run.introduce())
        try:
            return train(cfg, run, stop)
        except (ValueError, OSError, RuntimeError) as error:
            line, way_out = one_line(error), "the same command goes on from its newest checkpoint"
            if isinstance(error, OSError):  # a full disk, a file system that went away
                line = one_line(f"{error}; what {run.out} holds stays, and {way_out}")
            elif not isinstance(error, RunFailed | CheckpointError | torch.OutOfMemoryError):
                if not (isinstance(error, RuntimeError) and distributed.is_peers_fault(error)):
                    raise
                lost = f"distributed: rank {world.rank} lost the others"
                line = f"{lost}: {one_line(error, 160)}; {way_out}"
            print(f"train.py: {line}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    exit_code = main()
    signals.ignore()
    distributed.end_process(exit_code)
