"""Train a GPT-2 from a text file. The only trainer; it reads top to bottom.

Three commands:
    python train.py                                  the recipe for this machine
    python train.py --preset smoke --data my.txt     seconds, to try a flag
    python train.py --preset shakespeare-124m        GPT-2 124M until it knows its text by heart
"""

import contextlib
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from model import GPT
from model.flops import mfu
from model.generate import Sampling, generate_text
from model.tokenizer import decode, get_encoding
from training import checkpoint, distributed, metrics, resume
from training.baselines import ngram_losses
from training.checkpoint import Checkpoint
from training.data import DataLoaderLite, Prefetcher, Tokens, load_corpus
from training.distributed import ALONE, World, refuse_mismatch, share
from training.evaluate import eval_pieces, evaluate_tokens
from training.guard import Guard, GuardConfig
from training.metrics import RunLog
from training.optim import configure_adamw
from training.plan import Plan, detect, make_plan
from training.recipes import PUBLISHED_LOSS, Recipe, find_preset
from training.report import report_run
from training.resume import Progress
from training.signals import EXIT_RESUMABLE, StopRequest

NUM_SAMPLES = 4
PROMPT_TOKENS = 8
SAMPLE_TOKENS = 120
DEFAULT_PRESET = {"cpu": "shakespeare-cpu", "cuda": "shakespeare-124m"}
MAX_REPORT_TOKENS = 25_000_000  # about 100 MB of text searched for what the samples recite
MAX_VAL_TOKENS = 10_485_760  # of the last evaluation; a long corpus has more than it can tell apart


@dataclass(frozen=True)
class Config:
    """Train a GPT-2 from a text file.

    The recipe (--preset) says what is trained; each of its fields is a flag, shown below with the
    value it has in the chosen preset. The plan (device, ops, dtype, compile) says how it runs.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str
    """Recipe: shakespeare-cpu, shakespeare-124m, fineweb-124m or smoke."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Text files, folders of .txt files, or a token file (.bin). Default: input.txt if it is
    there, else tiny Shakespeare."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Run folder. Default: runs/PRESET, with a number once that one holds a finished run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    ops: str = "auto"
    """auto, eager, triton, or one with exceptions: triton,layer_norm=eager."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 is autocast with fp32 weights; auto takes it where the hardware multiplies bf16."""
    compile: Annotated[bool | None, tyro.conf.arg(aliases=["--no-compile"], metavar="")] = None
    """torch.compile the model, or do not. Default: where it can and where it pays."""
    eval_every: int = -1
    """Steps between evaluations; 0 is only at the end, -1 ten times a run but not under 100."""
    save_every: int = -1
    """Steps between checkpoints; 0 is only at the end, -1 four times a run."""
    keep_last: int = 2
    """Checkpoints to keep, beside the one with the best validation loss."""
    resume: str = "auto"
    """auto goes on from the newest good checkpoint of the run folder and starts afresh where there
    is none; never starts afresh; else the path of a checkpoint or a run folder."""
    override: bool = False
    """Resume although the recipe or the data is not the one that was saved."""
    log_every: int = 0
    """Steps between printed lines; 0 is about a hundred lines a run."""
    tensorboard: bool = False
    """Also write TensorBoard events; needs the tensorboard package."""

    def check(self) -> None:
        """Raise ValueError for a value out of range.

        Not in __post_init__: tyro would print what is raised there as a box of several lines.
        """
        bounds = {"eval_every": -1, "save_every": -1, "log_every": 0, "keep_last": 1}
        for name, least in bounds.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"config: {name} must be at least {least}, got {value}")

    @property
    def eval_interval(self) -> int:
        tenth = max(100, math.ceil(self.recipe.max_steps / 10))
        return self.eval_every if self.eval_every >= 0 else tenth

    @property
    def save_interval(self) -> int:
        return self.save_every if self.save_every >= 0 else math.ceil(self.recipe.max_steps / 4)

    def evaluates_before(self, step: int) -> bool:
        return _due(self.eval_interval, step) and self.recipe.val_fraction > 0

    def saves_before(self, step: int) -> bool:
        return _due(self.save_interval, step)


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why and what may help."""


@dataclass
class Run:
    """All that has been checked before anything is written."""

    cfg: Config
    world: World
    plan: Plan
    out: Path
    train_tokens: Tokens
    val_tokens: Tokens
    corpus: dict[str, Any]
    saved: Checkpoint | None
    """Checkpoint to go on from; None starts afresh."""


def prepare(cfg: Config, world: World = ALONE) -> Run:
    """Check everything a person can get wrong; the run folder comes last.

    Raises:
        ValueError, OSError: with a line that names the value and the way out.
    """
    cfg.check()
    recipe = cfg.recipe
    plan = make_plan(recipe, detect(cfg.device), cfg.ops, cfg.dtype, cfg.compile)
    plan = share(plan, recipe, world)
    if cfg.tensorboard:
        metrics.check_tensorboard()
    if cfg.preset == "fineweb-124m" and not cfg.data:
        raise ValueError(
            "data: fineweb-124m needs --data FOLDER of token shards: download sample/10BT of "
            "huggingface.co/datasets/HuggingFaceFW/fineweb-edu, write its text column as .jsonl, "
            "and run `python -m training.prepare THOSE_FILES --out FOLDER`"
        )
    if not world.is_main:
        world.barrier()  # rank 0 fills the token cache
    corpus = load_corpus(cfg.data, world.say)
    if world.is_main:
        world.barrier()
    train_tokens, val_tokens = corpus.split(recipe.val_fraction)
    data_loader(recipe, plan, train_tokens, world)  # raises where the text is too short for a batch
    facts = {"name": corpus.name, "sha256": corpus.sha256, "train_tokens": len(train_tokens),
             "val_tokens": len(val_tokens)}  # fmt: skip
    refuse_mismatch(world, {"recipe": asdict(recipe), "plan": asdict(plan) | {"notes": ()},
                            "data": corpus.sha256, "torch": torch.__version__})  # fmt: skip
    out = world.first(lambda: open_run_folder(cfg))
    found = resume.find(cfg.resume, out, world.say)
    if found is not None:
        notes = resume.check_recipe(found[1], recipe, corpus.sha256, cfg.override)
        notes += resume.check_plan(found[1], plan)
        world.say("\n".join([f"resume: {found[0]}, {found[1].step} steps done", *notes]))
    return Run(cfg, world, plan, out, train_tokens, val_tokens, facts, found and found[1])


def data_loader(
    recipe: Recipe,
    plan: Plan,
    tokens: Tokens,
    world: World,
    progress: Progress | None = None,
) -> DataLoaderLite:
    progress = progress or Progress()
    return DataLoaderLite(tokens, plan.micro_batch_size, recipe.block_size, recipe.order,
                          recipe.seed, wrap_rows=recipe.batch_size, rank=world.rank,
                          world_size=world.size, position=progress.position,
                          skips=progress.skips)  # fmt: skip


def open_run_folder(cfg: Config) -> Path:
    """Make the folder and show that it takes what the run will write."""
    numbered = (Path("runs", cfg.preset + (f"-{n}" if n > 1 else "")) for n in range(1, 10**6))
    out = (
        Path(cfg.out) if cfg.out else next(p for p in numbered if not (p / "summary.json").exists())
    )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; --out names a folder")
    missing = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(b"\0" * 4096)
        needed = 4 * sum(p.numel() for p in abstract_model(cfg.recipe).parameters()) + (1 << 20)
        if (free := shutil.disk_usage(out).free) < needed:
            raise OSError(f"{free:,} bytes free, the model alone needs {needed:,}")
    except OSError as error:
        for folder in missing:
            if folder.exists():
                folder.rmdir()
        reason = error.strerror or error
        raise ValueError(f"out: cannot write to {out}: {reason}; choose another --out") from None
    return out


def abstract_model(recipe: Recipe) -> GPT:
    with torch.device("meta"):
        return GPT(recipe.model_config)


def train(run: Run, stop: StopRequest) -> int:
    """Train, evaluate, sample, save. Returns the exit code."""
    cfg, world, plan, recipe = run.cfg, run.world, run.plan, run.cfg.recipe
    start_numerics(plan, recipe.seed)
    model = GPT(recipe.model_config, plan.op_set)
    model.trained_context = recipe.block_size
    model.to(plan.device)
    parallel = world.wrap(model)
    forward = torch.compile(parallel) if plan.compile else parallel
    optimizer = configure_adamw(model, recipe)
    guard = Guard(GuardConfig(), torch.device(plan.device)) if recipe.guard else None
    progress = resume.restore(run.saved, model, optimizer, guard) if run.saved else Progress()
    loader = data_loader(recipe, plan, run.train_tokens, world, progress)
    batches = Prefetcher(loader, plan.device)
    autocast = (torch.autocast(plan.device, torch.bfloat16) if plan.dtype == "bf16"
                else nullcontext())  # fmt: skip
    if world.is_main:
        write_config(run, model)
    log = open_log(run, progress)
    writer = checkpoint.Writer(run.out / "checkpoints", cfg.keep_last, log.say)
    reached: int | None = None
    stopping = bool(stop)

    with log, writer, contextlib.closing(batches):
        while True:
            step = progress.step
            evaluate, save = cfg.evaluates_before(step), cfg.saves_before(step)
            stopping = stopping or (bool(stop) and world.size == 1)
            action = "ok"
            for record in log.read(wait=evaluate or save or stopping or step == recipe.max_steps):
                stopping |= record.stop  # several ranks agree through the late value
                if reached is None and record.loss < recipe.target_loss:
                    reached = record.step
                if guard and (action := guard.observe(record.bad, record.position)) != "ok":
                    log.event(action, step=record.step, loss=record.loss,
                              grad_norm=record.grad_norm)  # fmt: skip
                    if action != "skipped":
                        break
            if guard and action in ("rollback", "give_up"):
                progress = roll_back(run, action, guard, writer, log, model, optimizer)
                batches.seek(progress.position, progress.skips)
                continue

            done = reached is not None or step == recipe.max_steps
            if evaluate and not (stopping or done or step in dict(progress.evaluations)):
                with log.aside(), autocast:
                    val_loss = validate(run, model, plan.eval_tokens)
                writer.best = progress.evaluated(step, val_loss)
                log.event("eval", step=step, val_loss=val_loss)
                log.say(f"step {step:5d} | validation loss {val_loss:.4f}")
            if (save or stopping or (done and cfg.save_interval)) and world.is_main:
                with log.aside():
                    progress.position, progress.metrics_bytes = batches.position, log.num_bytes
                    cost = writer.submit(resume.capture, progress, model, optimizer, guard, recipe,
                                         plan, run.corpus["sha256"])  # fmt: skip
                log.event("checkpoint", step=step, **cost)
            if stopping:
                return leave(run, step, writer, log, stop)
            if done:
                log.finish()
                break

            lr = recipe.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=plan.device)
            for micro in range(plan.num_micro_batches):
                x, y = batches.next_batch()
                with world.accumulating(parallel, last=micro == plan.num_micro_batches - 1):
                    with autocast:
                        micro_loss = forward(x, y) / plan.num_micro_batches
                    micro_loss.backward()
                loss += micro_loss.detach()
            loss, asked_to_stop = world.mean_loss(loss, bool(stop))
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), recipe.grad_clip or math.inf
            )
            # Fused AdamW leaves everything as it is where found_inf is 1; no step waits for it.
            bad = guard.judge(loss, grad_norm) if guard else None
            optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.step(step, loss, grad_norm, lr, batches.position, bad, asked_to_stop)
            progress.step += 1
        return close(run, model, log, progress, reached, stop)


def open_log(run: Run, progress: Progress) -> RunLog:
    """The run's log, cut back to where `progress` stands."""
    recipe, plan = run.cfg.recipe, run.plan

    def utilisation(tokens_per_s: float) -> float | None:
        return mfu(recipe.model_config, recipe.block_size, tokens_per_s, plan.device_name)

    log_every = run.cfg.log_every or math.ceil(recipe.max_steps / 100)
    return RunLog(run.out, recipe.max_steps, recipe.tokens_per_step, utilisation, log_every,
                  run.cfg.tensorboard, progress.metrics_bytes,
                  quiet=not run.world.is_main)  # fmt: skip


def validate(run: Run, model: GPT, max_tokens: int) -> float:
    """Validation loss; the ranks share the work."""
    world, total, weight = run.world, 0.0, 0
    pieces = eval_pieces(len(run.val_tokens), max_tokens, run.cfg.recipe.block_size, world.size)
    for first, last in pieces[world.rank :: world.size]:
        tokens = np.asarray(run.val_tokens[first:last])
        total += evaluate_tokens(model, tokens) * (len(tokens) - 1)
        weight += len(tokens) - 1
    return world.mean(total, weight, run.plan.device)


def leave(run: Run, step: int, writer: checkpoint.Writer, log: RunLog, stop: StopRequest) -> int:
    """Say how to go on; the checkpoint is on disk when this returns."""
    writer.wait()
    run.world.barrier()
    log.event("stopped", step=step, signal=stop.signal)
    log.say(
        f"{stop.signal or 'another rank'}: stopped after {step} steps, last good checkpoint: step "
        f"{writer.last_good}; the same command with --out {run.out} goes on"
    )
    return EXIT_RESUMABLE


def roll_back(
    run: Run,
    action: str,
    guard: Guard,
    writer: checkpoint.Writer,
    log: RunLog,
    model: GPT,
    optimizer: torch.optim.AdamW,
) -> Progress:
    """Back to the last good checkpoint, with the data of the bad steps left out from now on.

    Raises:
        RunFailed: no rollbacks are left, or there is nothing to go back to.
    """
    writer.wait()
    run.world.barrier()
    found = checkpoint.newest_good(run.out / "checkpoints", log.say)
    if action == "give_up" or found is None:
        why = "there is no checkpoint to go back to" if found is None else "no rollbacks are left"
        raise RunFailed(
            f"guard: {guard.in_a_row} bad steps in a row up to step {log.records[-1].step} and "
            f"{why} ({guard.rollbacks} done); {run.out}/metrics.jsonl has every event. A lower "
            "--max-lr or another --seed may help"
        )
    rollbacks, skipped = guard.rollbacks + 1, guard.skipped
    rows = run.cfg.recipe.rows_per_step
    ranges = [(end - rows, end) for end in guard.positions]
    progress = resume.restore(found[1], model, optimizer, guard)
    guard.rollbacks, guard.skipped = rollbacks, skipped
    progress.skips += [r for r in ranges if r not in progress.skips]
    log.rewind(progress.step)
    log.event("rolled_back", to_step=progress.step, skips=ranges, rollbacks=rollbacks)
    log.say(f"guard: back to step {progress.step}, leaving out the rows {ranges}")
    return progress


def start_numerics(plan: Plan, seed: int) -> None:
    """Seeds, and on the CPU runs that repeat to the last bit."""
    torch.manual_seed(seed)
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    else:
        # The compiled embedding backward adds its rows in any order at two threads and more.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


def write_config(run: Run, model: GPT) -> None:
    """config.json: the resolved recipe and plan, and what they ran on."""
    recipe = {"name": run.cfg.preset, **asdict(run.cfg.recipe)}
    plan = asdict(run.plan)
    flags = {k: v for k, v in asdict(run.cfg).items() if k != "recipe"}
    metrics.write_json(
        run.out / "config.json",
        {
            "recipe": recipe,
            "plan": plan,
            "flags": flags,
            "data": run.corpus,
            "parameters": model.num_parameters(),
            "device": run.plan.device_name,
            **metrics.environment(),
        },
    )


def close(
    run: Run, model: GPT, log: RunLog, progress: Progress, reached: int | None, stop: StopRequest
) -> int:
    """Last evaluation, weights, samples, curve, summary; in that order."""
    recipe, plan, out = run.cfg.recipe, run.plan, run.out
    train_s = sum(r.ms for r in log.records) / 1000.0
    num_steps = len(log.records)
    tokens_seen = num_steps * recipe.tokens_per_step
    val_loss, baselines, evaluations = None, {}, progress.evaluations
    if len(run.val_tokens) > 1:
        val_loss = validate(run, model, MAX_VAL_TOKENS)
        evaluations = [*progress.evaluations, (num_steps, val_loss)]
        log.event("eval", step=num_steps, val_loss=val_loss)
    if not run.world.is_main:
        return 0
    if val_loss is not None:
        counted, scored = (
            np.asarray(t[:MAX_VAL_TOKENS]) for t in (run.train_tokens, run.val_tokens)
        )
        baselines = ngram_losses(counted, scored, model.config.vocab_size)
        beside = ", ".join(f"{name} {loss:.4f}" for name, loss in baselines.items())
        log.say(f"validation loss {val_loss:.4f} nats per token (counting gives: {beside})")
    model.save_pretrained(out / "model")
    write_samples(run, model, log)
    published = PUBLISHED_LOSS if run.cfg.preset == "shakespeare-124m" else ()
    metrics.draw_loss_curve(out / "loss.png", log.records, evaluations, published, baselines)
    summary = {
        "final_step": num_steps,
        "reached_target_at": reached,
        "saved_after_step": num_steps - 1,
        "train_loss": log.records[-1].loss,
        "val_loss": val_loss,
        "baselines": baselines,
        "tokens_seen": tokens_seen,
        "corpus_tokens": len(run.train_tokens),
        "epochs": tokens_seen / len(run.train_tokens),
        "trained_context": recipe.block_size,
        "tokens_per_s": tokens_seen / train_s,
        "train_s": train_s,
        "wall_s": metrics.seconds_since_start(),
        "model_bytes": (out / "model" / "model.safetensors").stat().st_size,
        "device": plan.device_name,
    }
    metrics.write_json(out / "summary.json", summary)
    report_run(out, np.asarray(run.train_tokens[:MAX_REPORT_TOKENS]), log.say)
    log.say(
        f"done: {num_steps} steps, {tokens_seen:,} tokens, {summary['epochs']:.1f} epochs, "
        f"{summary['tokens_per_s']:,.0f} tok/s, {summary['wall_s']:.0f} s in all; see {out}"
    )
    if stop:  # it came after the last step; everything is written
        log.say(f"{stop.signal}: the run is complete")
    return 0


def write_samples(run: Run, model: GPT, log: RunLog) -> None:
    """samples.txt: continuations of a few words of held-out text, within the trained context."""
    text = run.val_tokens if len(run.val_tokens) > PROMPT_TOKENS * NUM_SAMPLES else run.train_tokens
    starts = np.linspace(0, len(text) - PROMPT_TOKENS, NUM_SAMPLES + 1, dtype=int)[:-1]
    prompts = [decode(np.asarray(text[i : i + PROMPT_TOKENS])) for i in starts]
    sampling = Sampling(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=run.cfg.recipe.seed)
    answers = generate_text(model, get_encoding(), prompts, sampling)
    with (run.out / "samples.txt").open("w", encoding="utf-8") as file:
        for prompt, answer in zip(prompts, answers, strict=True):
            file.write(f"[prompt] {prompt}\n[model]{answer}\n\n")
    log.say(f"sample: {prompts[0]}|{answers[0]}")


def parse(arguments: Sequence[str]) -> Config:
    """Read the flags; the preset decides what their defaults are."""
    named = [value for flag, value in pairwise([*arguments, ""]) if flag == "--preset"]
    named += [flag.partition("=")[2] for flag in arguments if flag.startswith("--preset=")]
    preset = named[-1] if named else DEFAULT_PRESET["cuda" if torch.cuda.is_available() else "cpu"]
    # tyro wants a value after a flag of three states.
    values = {"--compile": ["True"], "--no-compile": ["False"]}
    spelled = [part for flag in arguments for part in (flag, *values.get(flag, ()))]
    default = Config(recipe=find_preset(preset), preset=preset)
    return tyro.cli(Config, args=spelled, default=default, config=(tyro.conf.OmitArgPrefixes,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 for what was asked wrongly, 1 for a run that failed, 75 for one to go on with."""
    with contextlib.ExitStack() as held:
        try:
            cfg = parse(sys.argv[1:] if arguments is None else arguments)
            world = held.enter_context(distributed.start(cfg.device))
            run = prepare(cfg, world)
            if world.is_main:
                held.enter_context(checkpoint.lock(run.out))
                checkpoint.clean(run.out / "checkpoints")
        except (ValueError, OSError) as error:
            print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        stop = held.enter_context(StopRequest(world.say))
        recipe = cfg.recipe
        world.say(
            f"recipe: {cfg.preset}, model {recipe.model}, {recipe.tokens_per_step:,} tokens a "
            f"step, {recipe.max_steps:,} steps, {len(run.train_tokens):,} training tokens"
        )
        world.say("\n  ".join([run.plan.describe(), *run.plan.notes]))
        try:
            return train(run, stop)
        except RunFailed as error:
            print(f"train.py: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
