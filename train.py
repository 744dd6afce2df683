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

import argparse
import contextlib
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from model import GPT, hf
from model.edge import one_line
from training import (
    checkpoint,
    console,
    distributed,
    documents,
    folder,
    hellaswag,
    loggers,
    resume,
    signals,
)
from training.choose import take_fastest
from training.data import Corpus, load_corpus
from training.distributed import ALONE, World, hash_weights, refuse_mismatch, share
from training.ending import finish, take_best, write_samples
from training.explain import explain, probe_steps
from training.flags import from_config
from training.guard import Guard, GuardConfig
from training.machines import has_gpu
from training.metrics import RunLog
from training.optim import configure_adamw
from training.plan import Choices, Machine, Plan, detect, make_plan
from training.recipes import ABOUT, FINETUNE, Recipe, find_preset, spell_model
from training.resume import Progress, RunFailed
from training.run import Run, data_loader
from training.sharding import Shard
from training.signals import EXIT_RESUMABLE, Stopped, StopRequest
from training.step import Outcome, TrainStep, start_process
from training.verify import compare_first_batch, settle
from training.watch import Watch

LIST = "list"  # in place of a recipe
DEFAULT_PRESET = {"cpu": "shakespeare-cpu", "cuda": "shakespeare-124m"}


@dataclass(frozen=True)
class Config:
    """Train a GPT-2 from a text file.

    The recipe (--preset) says what is trained; each of its fields is a flag, shown below with the
    value it has in the chosen preset. The plan (--device, then --ops and all
    below it) says how it runs.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str
    """Recipe, that is what is trained; alone it lists them."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """config.json of a run, to make it again; other flags on the line overrule it."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Text, code, JSONL, Parquet, Arrow, folders and patterns of them, or a token file or folder.
    Default: input.txt if it is there, else tiny Shakespeare."""
    val: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Validation text, of the same kinds; without it --val-fraction of the text, at its end."""
    text_column: str = documents.KEY
    """Field of a JSONL object, or column of a table, that holds the text."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Run folder. Default: runs/PRESET, or runs/TEXT where a Shakespeare recipe has another text,
    with a number once that one holds a finished run."""
    init: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Fine-tune: start from the weights of a GPT-2 folder, a run folder, a safetensors file, or a
    model of the Hugging Face hub (gpt2, distilgpt2, owner/name, owner/name@revision). They decide
    --model too. A checkpoint to resume from comes first."""
    dropout: float | None = None
    """Probability of dropout, instead of the model's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    explain: bool = False
    """Measure this machine, try ten steps, say what limits them and what to change; no training."""
    eval_every: int = -1
    """Steps between evaluations; 0 is only at the end, -1 ten times a run, and not under 100 where
    no --keep and no --patience depend on them."""
    sample_every: int = 0
    """Steps between samples during the run, into samples.txt and the log; 0 is only at the end."""
    hellaswag: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """hellaswag_val.jsonl: score the model on it at the end."""
    hellaswag_every: int = 0
    """Steps between scores on --hellaswag during the run; 0 is only at the end."""
    save_every: int = -1
    """Steps between checkpoints; 0 is only at the end, -1 four times a run. --keep best saves what
    it needs besides."""
    keep_last: int = 2
    """Checkpoints to keep, beside the one with the best validation loss."""
    resume: str = "auto"
    """auto goes on from the newest good checkpoint of the run folder and starts afresh where there
    is none; never starts afresh; else the path of a checkpoint or a run folder."""
    cooldown: bool = False
    """Go on from a checkpoint of a wsd run, the newest or the one of --resume, with its decay in
    --decay-fraction of all steps, and end there."""
    override: bool = False
    """Resume although the recipe or the data is not the one that was saved."""
    log_every: int = 0
    """Steps between printed lines; 0 is about a hundred lines a run."""
    log_to: Annotated[str, tyro.conf.arg(aliases=["--log"])] = ""
    """Where curves go beside metrics.jsonl, of tensorboard,wandb,trackio,csv; the first three need
    the package of that name. torchrun takes --log for one of its own flags."""
    tensorboard: bool = False
    """The same as --log-to tensorboard."""
    rank_timeout: int = 600
    """Seconds that one of several ranks waits for the others in a step before the job ends."""

    def check(self) -> None:
        """Raise ValueError for a value out of range.

        Not in __post_init__: tyro would print what is raised there as a box of several lines.
        """
        bounds = {
            "eval_every": -1,
            "save_every": -1,
            "sample_every": 0,
            "hellaswag_every": 0,
            "log_every": 0,
            "keep_last": 1,
            "rank_timeout": 1,
        }
        for name, least in bounds.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"config: {name} must be at least {least}, got {value}")
        if self.hellaswag_every and not self.hellaswag:
            raise ValueError("config: --hellaswag-every needs --hellaswag FILE")
        paths = {"out": (self.out,), "init": (self.init,), "resume": (self.resume,)}
        for name, values in {**paths, "data": self.data, "val": self.val}.items():
            if "" in values:
                raise ValueError(f"config: --{name} is empty; name a path, or leave it out")
        if self.cooldown and self.resume == "never":
            raise ValueError(
                "config: --cooldown goes on from a checkpoint; leave --resume never out"
            )
        keep, patience = self.recipe.keep, self.recipe.patience
        if (keep == "best" or patience) and not (self.val or self.recipe.val_fraction):
            raise ValueError(
                f"config: keep {keep} with patience {patience} needs a validation text; give a "
                "--val-fraction above 0 or --val FILE, or --keep last --patience 0"
            )
        if self.preset == FINETUNE and not (self.init or self.explain):
            raise ValueError(
                f"init: the recipe {FINETUNE} starts from weights; add --init gpt2, or a folder"
            )

    @property
    def loggers(self) -> list[str]:
        return [*filter(None, self.log_to.split(",")), *["tensorboard"] * self.tensorboard]

    @property
    def eval_interval(self) -> int:
        least = 1 if self.recipe.keep == "best" or self.recipe.patience else 100
        tenth = max(least, math.ceil(self.recipe.max_steps / 10))
        return self.eval_every if self.eval_every >= 0 else tenth

    @property
    def save_interval(self) -> int:
        return self.save_every if self.save_every >= 0 else math.ceil(self.recipe.max_steps / 4)

    @property
    def saves(self) -> bool:
        return self.save_interval > 0 or self.recipe.keep == "best"

    def evaluates_before(self, step: int, last: bool) -> bool:
        """Given weights as they come, too; the last ones here only to be compared with the best."""
        due = _due(self.eval_interval, step) or (step == 0 and self.init is not None)
        validates = bool(self.val) or self.recipe.val_fraction > 0
        return validates and (self.recipe.keep == "best" if last else due)

    def saves_before(self, step: int) -> bool:
        return _due(self.save_interval, step)


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def look(cfg: Config, world: World = ALONE) -> tuple[Machine, Plan, Corpus]:
    """What training and --explain begin with: this machine, the plan for it, the text."""
    cfg.check()
    machine = detect(cfg.device)
    # Who shares its GPU with others has the rest do as little at once.
    least = min(world.gather("memory", machine.memory_bytes))
    machine = replace(machine, memory_bytes=least)
    plan = share(make_plan(cfg.recipe, machine, cfg.choices, world.size), cfg.recipe, world)
    if cfg.preset == "fineweb-124m" and not (cfg.data or cfg.explain):
        raise ValueError(
            "data: fineweb-124m needs --data FOLDER of token shards: `hf download "
            "HuggingFaceFW/fineweb-edu --repo-type dataset --include 'sample/10BT/*' --local-dir "
            "fineweb`, then `python -m training.prepare fineweb/sample/10BT --out FOLDER "
            "--val-tokens 100000000`"
        )
    texts = (cfg.text_column, cfg.val)
    return machine, plan, world.in_turn("tokens", lambda: load_corpus(cfg.data, world.say, *texts))


def settled(cfg: Config, machine: Machine, world: World, kept: Mapping[str, Any]) -> Plan:
    """What this rank does: on a GPU with kernels that were checked, of what is fastest there.

    Args:
        kept: Choices of the checkpoint that the run goes on from.
    """

    def make(choices: Choices) -> Plan:
        plan = make_plan(cfg.recipe, machine, choices.or_else(kept), world.size)
        return share(plan, cfg.recipe, world)

    plan = settle(make, cfg.choices, cfg.recipe, machine, world)
    if kept:
        return plan
    return take_fastest(make, cfg.choices, plan, cfg.recipe, machine, world)


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
    title = folder.title(cfg.preset, corpus.name, corpus.sha256)
    out = Path(world.first("out", lambda: str(folder.name(cfg.out, title))))
    how = (recipe, corpus.sha256, cfg.override, cfg.cooldown)
    saved = resume.find(cfg.resume, out, world, *how)
    kept, notes = resume.adopt(saved, cfg.choices, recipe, machine)
    plan = settled(cfg, machine, world, kept)
    same = {"recipe": asdict(recipe), "plan": asdict(plan) | {"notes": ()},
            "data": corpus.sha256, "torch": torch.__version__}  # fmt: skip
    refuse_mismatch(world, "facts", same)
    source = hf.find_model(cfg.init) if cfg.init else ""
    initial = GPT.from_pretrained(source) if source else None
    if initial and world.size > 1:  # rank 0's would be taken by all, in silence
        refuse_mismatch(world, "weights", {f"--init {cfg.init}": hash_weights(initial)})
    if saved is not None:
        notes = resume.check_recipe(saved, *how) + notes
        notes += resume.check_rate(saved, recipe) + resume.check_plan(saved, plan)
        world.say("\n".join([f"resume: {saved.path}, {saved.step} steps done", *notes]))
    world.first("folder", lambda: folder.make(out, recipe))
    if cfg.cooldown and saved:
        recipe = resume.cool_down(saved, recipe)
    facts = {"name": corpus.name, "sha256": corpus.sha256, "train_tokens": len(parts[0]),
             "val_tokens": len(parts[1])}  # fmt: skip
    flags = {k: v for k, v in asdict(cfg).items() if k != "recipe"}
    return Run(cfg.preset, recipe, plan, world, out, flags, *parts, facts, saved, initial,
               str(source), items)  # fmt: skip


def train(cfg: Config, run: Run, stop: StopRequest) -> int:
    """Train, evaluate, sample, save. Returns the exit code."""
    recipe, plan, world = run.recipe, run.plan, run.world
    start_process(plan, recipe.seed)
    model = run.build_model()
    optimizer = configure_adamw(model, recipe, plan.optimizer)
    if plan.shard == "optimizer":
        optimizer.shard = Shard(model.parameters(), world)
    guard = Guard(GuardConfig(), torch.device(plan.device)) if recipe.guard else None
    progress = resume.restore(run.saved, model, optimizer, guard) if run.saved else Progress()
    rows = partial(run.first_rows, progress)
    plan = run.plan = compare_first_batch(model, plan, rows, cfg.choices.ops, world)
    log = run.open_log(progress, cfg.log_every, cfg.loggers)
    take_step = TrainStep(model, optimizer, recipe, plan, world, log.say)
    batches = run.open_batches(progress)
    run.write_config(model)
    writer = checkpoint.Writer(run.out / "checkpoints", cfg.keep_last, log.say)
    saves_at_end = cfg.saves or optimizer.shard is not None  # which all ranks are needed for
    watch = Watch(log, guard, stop, recipe.target_loss, alone=world.size == 1)

    def save_checkpoint() -> None:
        if progress.step > recipe.max_steps:  # beyond: nothing was done
            return
        if not world.is_main:
            resume.optimizer_tensors(model, optimizer)  # what this rank alone has, it sends
            return
        with log.aside():
            progress.position, progress.metrics_bytes = batches.position, log.num_bytes
            cost = writer.submit(resume.capture, progress, model, optimizer, guard, recipe, plan,
                                 run.corpus["sha256"])  # fmt: skip
        log.event("checkpoint", step=progress.step, **cost)

    def evaluate() -> None:
        with log.aside(), take_step.autocast():
            val_loss = run.validate(model, run.val_tokens, plan.eval_tokens)
        if math.isfinite(val_loss):  # else the next step's loss tells
            progress.evaluations.append((progress.step, val_loss))
        log.event("eval", step=progress.step, val_loss=val_loss)
        given = f" of {cfg.init} as it came" if cfg.init and progress.step == 0 else ""
        log.say(f"step {progress.step:5d} | validation loss {val_loss:.4f}{given}")

    def score_hellaswag(done: int) -> None:
        with log.aside(), take_step.autocast():
            share = run.score_hellaswag(model, lambda: bool(stop))
        if not stop:  # else it has seen a part of them
            log.event("hellaswag", step=done, hellaswag=share)
            right = round(share * len(run.items))
            log.say(f"step {done:5d} | {hellaswag.line(right, len(run.items))}")

    def sample() -> None:
        if not world.is_main:
            return
        try:
            with log.aside(), torch.compiler.set_stance("force_eager"):
                texts = write_samples(run, model, log.say)
            log.event("samples", step=progress.step, texts=texts)
        except ValueError as error:  # as for an evaluation, the next step's loss tells
            log.say(f"step {progress.step:5d} | {error}")

    def step() -> Outcome:  # called launch by launch at first; on one GPU then a captured graph
        loss = take_step.accumulate()  # forward and backward of each micro-batch
        loss, asked_to_stop = world.mean_loss(loss, bool(stop))
        grad_norm = optimizer.clip(recipe.grad_clip)
        bad = guard.judge(loss, grad_norm) if guard else None
        optimizer.step(skip=take_step.skip(bad))  # nothing changes where the step is bad
        optimizer.zero_grad()
        return Outcome(loss, grad_norm, bad, asked_to_stop)

    with log, writer, contextlib.closing(batches):
        while True:
            done = progress.step >= recipe.max_steps or 0 < recipe.patience <= progress.stale
            save, due = cfg.saves_before(progress.step), cfg.evaluates_before(progress.step, done)
            action = watch.catch_up(wait=due or save or done)  # the values of the step before
            if guard and action:
                writer.wait()
                world.barrier()
                progress = resume.roll_back(
                    run.out, world, action, guard, log, model, optimizer, recipe.rows_per_step
                )
                batches.seek(progress.position, progress.skips)
                continue

            done |= watch.reached is not None
            known = progress.step in dict(progress.evaluations)
            if cfg.evaluates_before(progress.step, done) and not (known or watch.stopping):
                evaluate()
                save |= progress.best == progress.step and cfg.saves
                done |= 0 < recipe.patience <= progress.stale
            if _due(cfg.hellaswag_every, progress.step) and not (watch.stopping or done):
                score_hellaswag(progress.step)
            if _due(cfg.sample_every, progress.step) and not (watch.stopping or done):
                sample()
            if save or watch.stopping or (done and saves_at_end):
                save_checkpoint()
            if watch.stopping:
                writer.finish()
                world.barrier()
                return leave(run, progress.step, writer, log, stop)
            if done:
                break

            lr = recipe.learning_rate(progress.step)
            outcome = take_step.run(step, batches, lr)
            log.step(progress.step, lr, batches.position, *outcome)
            progress.step += 1
        log.finish()
        writer.wait()  # the weights to keep may be on their way to the disk
        kept = take_best(run, model, log.say, progress)
        if run.items:
            score_hellaswag(kept)
        try:
            finish(run, model, log, progress, kept, watch.reached, take_step.autocast, stop.check)
        except Stopped:  # on this rank; each leaves by itself
            if not saves_at_end:
                save_checkpoint()
            return leave(run, progress.step, writer, log, stop)
        writer.finish()
    if stop:  # it came after the last step; everything is written
        world.say(f"{stop.signal}: the run is complete")
    return 0


def leave(run: Run, step: int, writer: checkpoint.Writer, log: RunLog, stop: StopRequest) -> int:
    """Say how to go on; the checkpoint is on disk when this returns."""
    writer.finish()
    if run.world.size > 1 and run.world.is_main:
        (run.out / folder.STOPPED).touch()  # torchrun takes this for a failure and starts again
    log.event("stopped", step=step, signal=stop.signal)
    log.say(
        f"{stop.signal or 'another rank'}: stopped after {step} steps, last good checkpoint: step "
        f"{writer.last_good}; the same command with --out {shlex.quote(str(run.out))} goes on"
    )
    return EXIT_RESUMABLE


def _glance(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that others depend on, as they are written."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?", const=LIST)
    for flags in (["--config"], ["--init"], ["--model"], ["--epochs"],
                  ["--steps", "--max-steps"]):  # fmt: skip
        first.add_argument(*flags)
    try:
        return first.parse_known_args(arguments)[0]
    except argparse.ArgumentError:  # a value is missing, as tyro will say
        return first.parse_args([])


def parse(arguments: Sequence[str]) -> Config:
    """Read the flags; the preset and the weights to start from decide the defaults."""
    given = _glance(arguments)
    if given.steps and given.epochs:
        raise ValueError(
            f"recipe: --steps {given.steps} and --epochs {given.epochs} both say when it ends; "
            "give one"
        )
    if given.steps:
        arguments = [*arguments, "--epochs", "0"]  # in place of those of a recipe
    if given.config is not None:
        arguments = [*from_config(given.config), *arguments]
        given = _glance(arguments)
    preset = given.preset
    if preset == LIST:
        print("\n".join(f"  {name:18}{what}" for name, what in ABOUT.items()))
        raise SystemExit(0)
    if preset is None:
        preset = FINETUNE if given.init else DEFAULT_PRESET["cuda" if has_gpu() else "cpu"]
    recipe = find_preset(preset)
    if given.init:
        if given.model:
            raise ValueError(f"model: --init {given.init} decides the model; leave --model out")
        shape = replace(hf.read_config(given.init), dropout=recipe.model_config.dropout)
        T = min(recipe.block_size, shape.block_size)
        recipe = replace(recipe, model=spell_model(shape), block_size=T)
    off = {f"--no-{name}": f"--{name}=off" for name in ("compile", "working-copies", "cuda-graph")}
    spelled = [off.get(flag, flag) for flag in arguments]
    default = Config(recipe=recipe, preset=preset)
    cfg = tyro.cli(Config, args=spelled, default=default, config=(tyro.conf.OmitArgPrefixes,))
    if cfg.dropout is not None:
        shape = replace(cfg.recipe.model_config, dropout=cfg.dropout)
        cfg = replace(cfg, recipe=replace(cfg.recipe, model=spell_model(shape)))
    return cfg


def explain_plan(cfg: Config) -> int:
    """What this machine can do with the recipe, and what would make it faster."""
    machine, plan, corpus = look(cfg)
    tokens, _ = corpus.split(cfg.recipe.val_fraction)
    cfg = replace(cfg, recipe=cfg.recipe.reading(len(tokens)))
    plan = settled(cfg, machine, ALONE, {})
    if cfg.choices.tune == "only":
        return 0
    start_process(plan, cfg.recipe.seed)
    explain(cfg.recipe, plan, machine, lambda s: probe_steps(cfg.recipe, plan, tokens, s), print)
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
        except (ValueError, OSError) as error:
            world.complain(f"train.py: {one_line(error)}")
            return 2
        except RunFailed as error:
            world.complain(f"train.py: {one_line(error)}")
            return 1
        stop.say = world.say
        held.enter_context(stop)
        world.say(run.introduce())
        try:
            return train(cfg, run, stop)
        except (RunFailed, checkpoint.CheckpointError, torch.OutOfMemoryError) as error:
            print(f"train.py: {one_line(error)}", file=sys.stderr)
            return 1
        except OSError as error:  # a full disk, a file system that went away
            way_out = "the same command goes on from its newest checkpoint"
            line = one_line(f"{error}; what {run.out} holds stays, and {way_out}")
            print(f"train.py: {line}", file=sys.stderr)
            return 1
        except RuntimeError as error:
            if not distributed.is_peers_fault(error):
                raise
            line = f"distributed: rank {world.rank} lost the others: {one_line(error, 160)}"
            way_out = "the same command goes on from its newest checkpoint"
            print(f"train.py: {line}; {way_out}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    exit_code = main()
    signals.ignore()
    distributed.end_process(exit_code)
