"""Train a GPT-2 from a text file. The only trainer; it reads top to bottom.

Three commands:
    python train.py                                  the recipe for this machine
    python train.py --preset smoke --data my.txt     seconds, to try a flag
    python train.py --preset shakespeare-124m        GPT-2 124M until it knows its text by heart
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until there is a run to save, Ctrl-C ends the process in silence, the imports below included.
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
    """What training and --explain begin with: this machine, the plan for it, the text."""
    cfg.check()
    machine = detect(cfg.device)
    # Who shares its GPU with others has the rest do as little at once.
    least = min(world.gather("memory", machine.memory_bytes))
    machine = replace(machine, memory_bytes=least)
    plan = share(make_plan(cfg.recipe, machine, cfg.choices, world.size), cfg.recipe, world)
    texts = (cfg.text_column, cfg.val)
    return machine, plan, world.in_turn("tokens", lambda: load_corpus(cfg.data, world.say, *texts))


def settled(cfg: Config, machine: Machine, world: World, kept: Mapping[str, Any]) -> Plan:
    """What this rank does: on a GPU with kernels that were checked, of what is fastest there.

    `kept` are choices of the checkpoint that the run goes on from.
    """

    def make(choices: Choices) -> Plan:
        plan = make_plan(cfg.recipe, machine, choices.or_else(kept), world.size)
        plan = replace(plan, launches=kept.get("launches", ""))
        return share(plan, cfg.recipe, world)

    plan = settle(make, cfg.choices, cfg.recipe, machine, world)
    return plan if kept else take_fastest(make, cfg.choices, plan, cfg.recipe, machine, world)


def prepare(cfg: Config, world: World = ALONE) -> Run:
    """Check everything a person can get wrong; the run folder comes last.

    Raises:
        ValueError, OSError: with a line that names the value and the way out.
    """
    loggers.check_loggers(cfg.loggers)
    recipe, (machine, plan, corpus) = cfg.recipe, look(cfg, world)
    items = hellaswag.read_items(cfg.hellaswag) if cfg.hellaswag else []
    parts = corpus.split(recipe.val_fraction)
    recipe = recipe.reading(len(parts[0]))
    cfg = replace(cfg, recipe=recipe)
    data_loader(recipe, plan, parts[0], world)  # raises where the text is too short for a batch
    out = Path(world.first("out", lambda: str(folder.name(cfg.out, cfg.preset, corpus))))
    how = (recipe, corpus.sha256, cfg.override, cfg.cooldown)
    saved = resume.find(cfg.resume, out, world, *how)
    kept, notes = resume.adopt(saved, cfg.choices, recipe, machine)
    plan = settled(cfg, machine, world, kept)
    same = {"recipe": asdict(recipe), "plan": asdict(plan) | {"notes": ()}, "data": corpus.sha256}
    refuse_mismatch(world, "facts", same | {"torch": torch.__version__})
    source = hf.find_model(cfg.init) if cfg.init else ""
    initial = GPT.from_pretrained(source) if source else None
    if initial and world.size > 1:  # rank 0's would be taken by all, in silence
        refuse_mismatch(world, "weights", {f"--init {cfg.init}": hash_weights(initial)})
    if saved is not None:
        notes = resume.check_recipe(saved, *how) + notes
        notes += resume.check_plan(saved, plan)
        world.say("\n".join([f"resume: {saved.path}, {saved.step} steps done", *notes]))
    world.first("folder", lambda: folder.make(out, recipe))
    if cfg.cooldown and saved:
        recipe = resume.cool_down(saved, recipe)
    counts = {"train_tokens": len(parts[0]), "val_tokens": len(parts[1])}
    facts = {"name": corpus.name, "sha256": corpus.sha256, **counts}
    flags = {k: v for k, v in asdict(cfg).items() if k != "recipe"}
    weights = initial, str(source)
    return Run(cfg.preset, recipe, plan, world, out, flags, *parts, facts, saved, *weights, items)


def train(cfg: Config, run: Run, stop: StopRequest) -> int:
    """Train, evaluate, sample, save. Returns the exit code."""
    recipe, plan, world = run.recipe, run.plan, run.world
    start_process(plan, recipe.seed)
    model = run.build_model()
    optimizer = configure_adamw(model, recipe, plan.optimizer)
    share_out(optimizer, model, plan, world)
    guard = Guard(plan.device) if recipe.guard else None
    progress = restore(run.saved, model, optimizer, guard) if run.saved else Progress()
    rows = partial(run.first_rows, progress)
    plan = run.plan = compare_first_batch(model, plan, rows, cfg.choices.ops, world)
    log = run.open_log(progress, cfg.log_every, cfg.loggers)
    take_step = TrainStep(model, optimizer, recipe, plan, world, log.say)
    batches = run.open_batches(progress)
    run.write_config(model)
    writer = Writer(run.out / "checkpoints", cfg.keep_last, log.say)
    saves_at_end = cfg.saves or plan.shard != "none"  # which all ranks are needed for
    watch = Watch(log, guard, stop, recipe.target_loss, alone=world.size == 1)

    def save_checkpoint() -> None:
        if progress.step > recipe.max_steps:  # beyond: nothing was done
            return
        take_step.gather()
        if not world.is_main:
            optimizer_tensors(model, optimizer)  # what this rank alone has, it sends
            return
        with log.aside():
            progress.position, progress.metrics_bytes = batches.position, log.num_bytes
            how = recipe, take_step.plan, run.corpus["sha256"]
            writer.submit(capture, progress, model, optimizer, guard, *how)
        log.event("checkpoint", step=progress.step)

    def evaluate() -> None:
        take_step.gather()
        with log.aside():
            val_loss = run.validate(model, run.val_tokens, plan.eval_tokens)
        if math.isfinite(val_loss):  # else the next step's loss tells
            progress.evaluations.append((progress.step, val_loss))
        log.event("eval", step=progress.step, val_loss=val_loss)
        given = f" of {cfg.init} as it came" if cfg.init and progress.step == 0 else ""
        log.say(f"step {progress.step:5d} | validation loss {val_loss:.4f}{given}")

    def step() -> Outcome:  # called launch by launch at first; on a GPU then a captured graph
        loss = take_step.accumulate()  # forward and backward of each micro-batch
        grad_norm = optimizer.clip(recipe.grad_clip)
        bad = guard.judge(loss, grad_norm) if guard else None
        optimizer.step(skip=take_step.skip(bad))  # nothing changes where the step is bad
        optimizer.zero_grad()
        return Outcome(loss, grad_norm, bad, take_step.asked_to_stop)

    with log, writer, contextlib.closing(batches):
        while True:
            done = progress.step >= recipe.max_steps or 0 < recipe.patience <= progress.stale
            save, due = cfg.saves_before(progress.step), cfg.evaluates_before(progress.step, done)
            action = watch.catch_up(wait=due or save or done)  # the values of the step before
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
                save_checkpoint()  # before what a resumed run does again
            if is_due(cfg.hellaswag_every, progress.step) and not (watch.stopping or done):
                take_step.gather()
                run.score_hellaswag(model, log, progress.step, stop)
            if is_due(cfg.sample_every, progress.step) and not (watch.stopping or done):
                take_step.gather()
                sample(run, model, log, progress.step)

            if watch.stopping:
                writer.finish()
                world.barrier()
                return leave(run, progress.step, writer, log, stop)
            if done:
                break

            lr = recipe.learning_rate(progress.step)
            outcome = take_step.run(step, batches.next_batch(), lr, bool(stop))
            log.step(progress.step, lr, batches.position, *outcome)
            progress.step += 1
        log.finish()
        take_step.gather()
        writer.wait()  # the weights to keep may be on their way to the disk
        try:
            finish(run, model, log, progress, watch.reached, stop)
        except Stopped:  # on this rank; each leaves by itself
            if not saves_at_end:
                save_checkpoint()
            return leave(run, progress.step, writer, log, stop)
        writer.finish()
    if stop:  # it came after the last step; everything is written
        world.say(f"{stop.signal}: the run is complete")
    return 0


def explain_plan(cfg: Config) -> int:
    """What this machine can do with the recipe, and what would make it faster."""
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
    """Exit code 2 for what was asked wrongly, 1 for a run that failed, 75 for one to go on with."""
    world, stop = ALONE, StopRequest()
    with contextlib.ExitStack() as held:
        left = "the run goes on without its printed log, metrics.jsonl has every step"
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
            cfg = replace(cfg, recipe=run.recipe)  # epochs and a cool-down decide its steps
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
