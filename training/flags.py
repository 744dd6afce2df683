"""The flags of train.py, their checks, and how they are read back from a config.json."""

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from model import hf
from model.edge import is_int, quoted
from model.files import read_regular
from training import documents, schema
from training.machines import has_gpu
from training.plan import Choices, Switch
from training.recipes import ABOUT, FINETUNE, Recipe, find_preset, spell_model

# Flags that say where a run is stored or how it was resumed, not what it trains.
_OF_ONE_RUN = ("out", "resume", "override", "cooldown", "explain", "config")
LIST = "list"  # the value of a bare --preset
DEFAULT_PRESET = {"cpu": "shakespeare-cpu", "cuda": "shakespeare-124m"}
_LEAST = {"eval_every": -1, "save_every": -1, "keep_last": 1, "rank_timeout": 1}
_LEAST |= dict.fromkeys(("sample_every", "hellaswag_every", "log_every"), 0)
_WHOLE = schema.Must("a whole number", is_int)  # Config.check and Recipe know the bounds
# An older spelling of the three-state flags.
_SWITCHES = [field.name.replace("_", "-") for field in fields(Choices) if field.type == Switch]
_OFF = {f"--no-{name}": f"--{name}=off" for name in _SWITCHES}


@dataclass(frozen=True)
class Config:
    """Train a GPT-2 from a text file.

    The recipe (--preset) says what is trained. Each of its fields is a flag, shown below with its
    value in the chosen preset. The plan (--device, and --ops and all flags
    below it) says how the recipe runs.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str
    """Name of the recipe; --preset without a name lists them."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Run folder or its config.json: repeat that run. Other flags override its settings."""
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Text, code, JSONL, Parquet or Arrow files, folders or patterns of them, or token shards.
    Default: input.txt if it exists, else tiny Shakespeare."""
    val: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ...")] = ()
    """Validation text, as for --data. Default: the last part of the text (--val-fraction)."""
    text_column: str = documents.KEY
    """JSONL field or table column that holds the text."""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Run folder. Default: runs/PRESET, or runs/TEXT if a Shakespeare recipe has another text,
    numbered if that one holds a finished run."""
    init: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Fine-tune: start from the weights of a GPT-2 folder, a run folder, a safetensors file, or a
    model on the Hugging Face hub (gpt2, distilgpt2, owner/name, owner/name@revision). This also
    sets --model. A run that resumes takes its checkpoint's weights."""
    dropout: float | None = None
    """Dropout probability, in place of the model's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    choices: Annotated[Choices, tyro.conf.arg(name="")] = field(default_factory=Choices)
    explain: bool = False
    """Do not train: measure this machine, try ten steps, say what limits them and what helps."""
    eval_every: int = -1
    """Steps between evaluations; 0: only at the end; -1: ten per run, but at least
    100 steps apart unless --keep best or --patience needs them."""
    sample_every: int = 0
    """Steps between samples, written to samples.txt and metrics.jsonl; 0: only at the end."""
    hellaswag: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Path of hellaswag_val.jsonl: score the model on it at the end."""
    hellaswag_every: int = 0
    """Steps between HellaSwag scores during the run; 0: only at the end."""
    save_every: int = -1
    """Steps between checkpoints; 0: only on a signal, and at the end of a run of several
    ranks; -1: four per run. --keep best also saves each best one."""
    keep_last: int = 2
    """Newest checkpoints to keep, besides the one with the best validation loss."""
    resume: str = "auto"
    """auto: resume from the run folder's newest good checkpoint, or start afresh if there is
    none; never: start afresh; or the path of a checkpoint or run folder."""
    cooldown: bool = False
    """Start the final decay of a wsd run from its newest checkpoint, or from --resume; it lasts
    --decay-fraction of all steps."""
    override: bool = False
    """Resume even if the recipe or the data differs from the saved one."""
    log_every: int = 0
    """Steps between printed lines; 0: about a hundred lines per run."""
    log_to: Annotated[str, tyro.conf.arg(aliases=["--log"])] = ""
    """Where to send curves besides metrics.jsonl: any of tensorboard,wandb,trackio,csv; the first
    three need the package of that name. Use --log-to under torchrun, which has its own --log."""
    rank_timeout: int = 600
    """Seconds that a rank waits for the others in a step before the job ends."""

    def check(self) -> None:
        """Raise ValueError for a value out of range.

        Not in __post_init__, because tyro prints an error raised there in a box of several lines.
        """
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"config: {name} must be at least {least}, got {value}")
        if self.hellaswag_every and not self.hellaswag:
            raise ValueError("config: --hellaswag-every needs --hellaswag FILE")
        for name, value in {**vars(self.choices), **vars(self)}.items():
            if (value == "" and name != "log_to") or (isinstance(value, tuple) and "" in value):
                flag = name.replace("_", "-")
                raise ValueError(f"config: --{flag} is empty; give a value, or leave it out")
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
        if self.preset == "fineweb-124m" and not (self.data or self.explain):
            raise ValueError(
                "data: fineweb-124m needs --data FOLDER of token shards: `.venv/bin/hf download "
                "HuggingFaceFW/fineweb-edu --repo-type dataset --include 'sample/10BT/*' "
                "--local-dir fineweb`, then `.venv/bin/python -m training.prepare "
                "fineweb/sample/10BT --out FOLDER --val-tokens 100000000`"
            )

    @property
    def loggers(self) -> list[str]:
        return [*filter(None, self.log_to.split(","))]

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
        """Whether to evaluate after `step` steps; `last` says that no step follows.

        Weights of --init are evaluated before the first step. `finish` evaluates after the last
        one, so here the last weights are evaluated only to compare them with the best.
        """
        due = is_due(self.eval_interval, step) or (step == 0 and self.init is not None)
        validates = bool(self.val) or self.recipe.val_fraction > 0
        return validates and (self.recipe.keep == "best" if last else due)

    def saves_before(self, step: int) -> bool:
        return is_due(self.save_interval, step)


def is_due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _glance(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags that decide the defaults of other flags, as they were written."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset", nargs="?", const=LIST)
    for flag in ("--config", "--init", "--model", "--epochs"):
        first.add_argument(flag)
    first.add_argument("--steps", "--max-steps")
    try:
        return first.parse_known_args(arguments)[0]
    except argparse.ArgumentError:  # a value is missing; tyro says so
        return first.parse_args([])


def parse(arguments: Sequence[str]) -> Config:
    """Read the flags. The preset, --config and the initial weights decide the defaults."""
    # Many shells leave the ~ in --out=~/run and in make's OUT=~/run as it is.
    home = os.path.expanduser("~/")
    arguments = [re.sub("^(--[a-z-]+=|)~/", lambda found: found[1] + home, a) for a in arguments]
    given = _glance(arguments)
    if given.steps and given.epochs:
        raise ValueError(
            f"recipe: --steps {given.steps} and --epochs {given.epochs} both say when it ends; "
            "give one"
        )
    if given.preset == LIST:
        print("\n".join(f"  {name:18}{what}" for name, what in ABOUT.items()))
        raise SystemExit(0)
    before = read_config(given.config) if given.config is not None else None
    if given.preset is not None:
        preset = given.preset
    elif before:
        preset = before.preset
    else:
        preset = FINETUNE if given.init else DEFAULT_PRESET["cuda" if has_gpu() else "cpu"]
    recipe = find_preset(preset)
    default = before or Config(recipe=recipe, preset=preset)
    recipe, init = default.recipe, given.init or default.init
    if init:
        if given.model:
            raise ValueError(f"model: --init {init} decides the model; leave --model out")
        shape = replace(hf.read_config(init), dropout=recipe.model_config.dropout)
        T = min(recipe.block_size, shape.block_size)
        recipe = replace(recipe, model=spell_model(shape), block_size=T)
    if given.steps and recipe.epochs:
        recipe = replace(recipe, epochs=0.0)
    spelled = [_OFF.get(argument, argument) for argument in arguments]
    default = replace(default, recipe=recipe)
    cfg = tyro.cli(Config, args=spelled, default=default, config=(tyro.conf.OmitArgPrefixes,))
    for flag, paths in ("--data", cfg.data), ("--val", cfg.val):
        times = [argument.partition("=")[0] for argument in arguments].count(flag)
        if times > 1 or (times and not paths):
            raise ValueError(f"config: give {flag} once, all its paths after it, or leave it out")
    if cfg.dropout is not None:
        shape = replace(cfg.recipe.model_config, dropout=cfg.dropout)
        cfg = replace(cfg, recipe=replace(cfg.recipe, model=spell_model(shape)))
    return cfg


def read_config(path: str) -> Config:
    """The flags of an earlier run, to repeat it, without its folder and how it was resumed.

    Args:
        path: The run's config.json, or the folder that holds it.

    Raises:
        OSError: it cannot be read.
        ValueError: no run wrote it, or a value has the wrong type or is out of range.
    """
    if not path:  # Path("") would be the working directory
        raise ValueError("config: --config is empty; give a value, or leave it out")
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(read_regular(file))
        recipe, flags = dict(values["recipe"]), dict(values["flags"])
        preset, choices = recipe.pop("name"), flags.pop("choices", {})
        given = {**flags, **choices, **recipe, "preset": preset}
    except OSError as error:
        raise OSError(
            f"config: {path} must be a run folder or its config.json: {error.strerror or error}"
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"config: {file} must be the config.json of a run, with its recipe and flags"
        ) from None
    if given.get("optimizer") == "muon":  # how older versions spelled it
        given |= {"optimizer": "auto", "muon": True}
    if given.pop("tensorboard", False):  # an older flag
        given["log_to"] = f"{given.get('log_to', '')},tensorboard"
    for name in _OF_ONE_RUN:
        given.pop(name, None)
    must_be = schema.of(Config) | schema.of(Choices) | schema.of(Recipe)
    del must_be["recipe"], must_be["choices"]
    for name, value in given.items():
        if name not in must_be:
            raise ValueError(f"config: {file}: train.py has no flag {quoted(name)}")
        must = _WHOLE if must_be[name] is schema.COUNT else must_be[name]
        schema.check(f"config: {file}: {name}", value, must)
        given[name] = tuple(value) if isinstance(value, list) else value

    def part(kind: type) -> dict[str, Any]:
        return {field.name: given[field.name] for field in fields(kind) if field.name in given}

    return Config(recipe=Recipe(**part(Recipe)), choices=Choices(**part(Choices)), **part(Config))
