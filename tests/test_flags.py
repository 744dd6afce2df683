"""The flags of train.py: defaults, a config.json as flags again, and what is refused."""

import json
import os
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import train
from model import GPT, GPTConfig
from tests.forked import Forked, python
from training.plan import Choices, Machine, make_plan
from training.recipes import ABOUT, PRESETS, Recipe

ROOT = Path(train.__file__).parent
CPU = Machine(device="cpu", name="a CPU", num_threads=2)


def test_every_recipe_field_is_a_flag_with_the_preset_as_default() -> None:
    for two in ("--preset=smoke --preset ", "--preset smoke --preset="):
        cfg = train.parse(f"{two}shakespeare-124m".split())
        assert (cfg.preset, cfg.recipe.model) == ("shakespeare-124m", "124m")
    cfg = train.parse(["--preset", "shakespeare-124m", "--steps", "7", "--seed=3", "--no-compile"])
    assert (cfg.recipe.max_steps, cfg.recipe.seed, cfg.choices.compile) == (7, 3, False)
    assert (cfg.recipe.horizon_steps, cfg.recipe.model) == (200_000, "124m")
    assert train.parse(["--preset=smoke", "--max-steps", "9", "--compile"]).choices.compile is True
    spelled = {"--compile on": True, "--no-compile --compile": True, "--compile=off": False}
    spelled |= {"--no-compile": False, "--compile auto": None, "": None}
    for flags, wanted in spelled.items():
        assert train.parse(["--preset=smoke", *flags.split()]).choices.compile is wanted
    asked = train.parse(["--preset=smoke", "--working-copies", "off", "--no-cuda-graph"]).choices
    assert (asked.working_copies, asked.cuda_graph) == (False, False)
    assert train.parse(["--preset=smoke", "--no-recompute"]).choices.recompute is False
    with pytest.raises(SystemExit, match="2"):
        train.parse(["--preset=smoke", "--compile", "maybe"])
    given = """max_lr 0.5 min_lr 0.25 warmup_steps 3 horizon_steps 4 max_steps 5 batch_size 6
        block_size 7 grad_accum_steps 8 weight_decay 0.5 beta1 0.25 beta2 0.5 eps 0.125
        grad_clip 2.0 target_loss 1.5 val_fraction 0.5 order sequential seed 11 model mini"""
    fields = dict(zip(*[iter(given.split())] * 2, strict=True))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    recipe = train.parse(["--preset", "smoke", *flags]).recipe
    assert {name: str(getattr(recipe, name)) for name in fields} == fields
    assert train.parse([]).preset == "shakespeare-cpu" or torch.cuda.is_available()


NUMBERS = [f.name for f in fields(Recipe) if f.type in (int, float) or f.name == "max_steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*NUMBERS, "eval_every", "save_every", "log_every", "keep_last", "micro_batch_size"]
)
def test_any_number_is_taken_or_refused_by_name(name: str, capsys) -> None:
    flag, machine = "--" + name.replace("_", "-"), replace(CPU, memory_bytes=24 << 30)

    def answer(value: str) -> str:
        try:
            cfg = train.parse(["--preset", "smoke", flag, value])
            cfg.check()
            make_plan(cfg.recipe, machine, cfg.choices)
            return f"{name} {cfg.eval_interval} {cfg.save_interval} {cfg.recipe.learning_rate(3)}"
        except ValueError as error:
            return str(error).replace("memory: ", name)
        except SystemExit:
            return capsys.readouterr().err.replace(flag, name)

    for value in ("0", "-1", "nan", "inf", "1e300", "1e-300", str(2**64), "9" * 400, "", "abc"):
        assert name in answer(value), value


@pytest.mark.parametrize("words", [["--preset"], ["--preset", "list"], ["--steps=3", "--preset"]])
def test_the_recipes_list_themselves(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        train.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*ABOUT]
    assert {*ABOUT} == {*PRESETS}
    assert max(map(len, lines)) < 100


def test_a_config_is_the_flags_it_was_made_of(tmp_path: Path) -> None:
    flags = """--preset=shakespeare-cpu --data a 'b c' --max-lr=0.01 --no-guard --seed=7 --out=x
        --dropout=0.25 --ops=eager --no-compile --cuda-graph on --recompute off --micro-batch-size=2
        --eval-every=9 --resume=never --steps=12"""
    cfg = train.parse(shlex.split(flags))
    flat = asdict(cfg)
    file = tmp_path / "config.json"
    recipe = {"name": cfg.preset, **flat.pop("recipe")}
    file.write_text(json.dumps({"recipe": recipe, "flags": flat}))
    for path in (file, tmp_path):
        again = train.parse(["--config", str(path)])
        assert again == replace(cfg, config=str(path), out=None, resume="auto")
    on_top = train.parse(["--config", str(file), "--preset=smoke", "--data", "d", "--epochs=2"])
    assert (on_top.preset, on_top.data, on_top.recipe.epochs) == ("smoke", ("d",), 2.0)
    assert on_top.recipe.max_lr == 0.01
    file.write_text(json.dumps({"recipe": recipe | {"epochs": 3.0}, "flags": flat}))
    assert train.parse(["--config", str(file)]).recipe.epochs == 3.0
    shorter = train.parse(["--config", str(file), "--steps", "5"]).recipe
    assert (shorter.epochs, shorter.max_steps) == (0.0, 5)
    assert recipe.pop("muon")  # a run from before recipes had that field, and this one its value
    file.write_text(json.dumps({"recipe": recipe, "flags": flat}))
    assert not train.parse(["--config", str(file)]).recipe.muon
    flat["choices"]["optimizer"] = "muon"  # as it was spelled then
    file.write_text(json.dumps({"recipe": recipe, "flags": flat}))
    older = train.parse(["--config", str(file)])
    assert (older.recipe.muon, older.choices.optimizer) == (True, "auto")
    for flag, loggers in ((True, ["csv", "tensorboard"]), (False, ["csv"])):  # a flag it had then
        then = {"recipe": recipe, "flags": flat | {"log_to": "csv", "tensorboard": flag}}
        file.write_text(json.dumps(then))
        assert train.parse(["--config", str(file)]).loggers == loggers
    flat["choices"]["optimizer"] = "auto"
    wrong = {"muon": None, "seed": True, "max_lr": "a", "schedule": "b", "ops": 3, "compile": 1}
    for name, value in {**wrong, "eval_every": None, "keep_last": 2.5}.items():
        parts = [{**part} for part in (recipe, flat["choices"], flat)]
        next(part for part in parts if name in part or name == "muon")[name] = value
        flags_then = {**parts[2], "choices": parts[1]}
        file.write_text(json.dumps({"recipe": parts[0], "flags": flags_then}))
        with pytest.raises(ValueError, match=f"^config: {file}: {name} must be .*, got "):
            train.parse(["--config", str(file)])


def test_no_flag_could_be_short_for_one_of_torchruns():
    """It would refuse the command, though the flag stands behind train.py."""
    theirs = [*get_args_parser()._option_string_actions]
    names = [field.name for of in (train.Config, Recipe, Choices) for field in fields(of)]
    for flag in (f"--{name.replace('_', '-')}" for name in names):
        assert not [other for other in theirs if other.startswith(flag)], flag


# Flags => what is said of them.
BAD = """
--init {tmp}/folder => {tmp}/folder
--init x --model tiny => --init x decides the model
--init {tmp}/given --block-size 99 => 16 positions, got 99
--preset finetune => finetune starts from weights; add --init gpt2
--dropout 1 => model: dropout must be in [0, 1), got 1.0
--config {tmp}/folder => folder must be a run folder or its config.json:
--log-to csv,nothing => log: must be one of tensorboard, wandb, trackio, csv, got 'nothing'
--config {tmp}/pipe => pipe must be a run folder or its config.json: not a regular file
--config {tmp}/foreign.json => foreign.json must be the config.json of
--epochs 2 --steps 3 => --steps 3 and --epochs 2 both say when
--epochs 1e20 => max_steps must be at most
--epochs nan => epochs must be at least 0, got nan
--sample-every -1 => sample_every must be at least 0, got -1
--cooldown --schedule wsd => new/run: the folder holds none
--cooldown --resume never => leave --resume never out
--keep best --val-fraction 0 => keep best with patience 0 needs a valid
--patience -1 => patience must be at least 0, got -1
--data {tmp}/absent.txt => data: no such file: {tmp}/absent.txt
--data '\x1b[31mred' => no such file: \\x1b[31mred
--data '/**' => data: /** would read the whole disk
--data '/**/*.txt' => data: /**/*.txt would read the whole disk
--data {tmp}/pipe => data: {tmp}/pipe must be a file or a folder, not a pipe
--val {tmp}/pipe => data: {tmp}/pipe must be a file or a folder, not a pipe
--init {tmp}/pipe => pipe: not a regular file
--hellaswag {tmp}/pipe => hellaswag: no such file: {tmp}/pipe
--resume {tmp}/pipe => pipe
--tune on --tune-file {tmp}/pipe => pipe cannot be used: not a regular file; name another
--data {tmp}/empty.txt => data: {tmp}/empty.txt is empty
--data {tmp}/latin.txt => byte 0xe9 at offset 3
--data {tmp}/short.txt => validation needs at least 2 tokens, got 0
--data {tmp}/folder => data: no .txt, .md, code, .jsonl, .parquet or .arrow file in the folder
--data {tmp}/foreign.bin => vocabulary 'cl100k_base'
--block-size 65 => at most the model's 64 positions, got 65
--model smoke,n_head=3 => n_embd 64, n_head 3
--preset smok => unknown recipe 'smok'; did you mean 'smoke'?
--model 124 => unknown size '124'; did you mean '124m'?
--max-lr -1 => max_lr must be at least 0, got -1.0
--max-lr nan => max_lr must be at least 0, got nan
--steps -5 => max_steps must be at least 1, got -5
--val-fraction 1 => val_fraction must be in [0, 1), got 1.0
--out {tmp}/empty.txt => {tmp}/empty.txt is a file
--out {tmp}/empty.txt/x => cannot write to {tmp}/empty.txt/x
--out /proc/nowhere/x => out: cannot write to /proc/nowhere/x
--device cuda => torch sees no GPU; use --device cpu
--ops triton => ops: 'triton' needs a GPU; use --ops eager
--ops eager,gelu_mlp=triton => needs a GPU
--ops cuda => unknown backend 'cuda'
--ops eager,norm=eager => cannot read 'norm=eager'
--eval-every -2 => eval_every must be at least -1, got -2
--preset fineweb-124m => fineweb-124m needs --data FOLDER of token shards
--preset '' => preset: unknown recipe ''
--data '' => --data is empty
--data {tmp}/short.txt '' => --data is empty
--data --seed 1 => give --data once, all its paths after it
--val => give --val once, all its paths after it
--data {tmp}/short.txt --data={tmp}/latin.txt => give --data once, all its paths after it
--data ~/none.txt => no such file: /
--hellaswag=~/none.jsonl => no such file: /
--out '' => --out is empty
--init= => --init is empty
--resume '' => --resume is empty
--hellaswag '' => --hellaswag is empty
--text-column '' => --text-column is empty
--tune-file '' => --tune-file is empty
--config {tmp}/sly.json => data[0] must be a text
--config {tmp}/help.json => help.json: train.py has no flag 'help'
--config '' => --config is empty
--model '' => model: unknown size ''
--seed {2**64} => seed must be at most
--max-lr 1e300 => max_lr must be at most 1e+30, got 1e+300
--eps 0 => eps must be at least 1e-30, got 0.0
--steps {huge} => max_steps must be at most
--model smoke,n_embd=64000,n_layer=1000 => n_layer=1000 at T=64 needs about
--model smoke,n_embd={huge} => n_embd must be a whole number
--model smoke,n_layer=10000000 => n_layer must be a whole number
--micro-batch-size 1 --model smoke,n_embd=64000,n_layer=1000 => n_layer=1000 at T=64 needs about
--grad-accum-steps 1000000000 => the 4,000,000,000 rows of a step
--val-fraction 0.0005 => validation needs at least 2 tokens, got 0
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, text: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    for word, value in (("{tmp}", str(tmp_path)), ("{2**64}", str(2**64)), ("{huge}", "9" * 400)):
        case = case.replace(word, value)
    flags, message = case.split(" => ")
    arguments = shlex.split(flags)
    if {"cuda", "triton", "eager,gelu_mlp=triton"} & {*arguments}:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "foreign.bin").write_bytes(b"\0\0" * 1000)
    (tmp_path / "foreign.json").write_text('{"encoding": "cl100k_base"}')
    for name, given in (("sly", {"data": [{"a": "b"}]}), ("help", {"help": True})):
        config = {"recipe": {"name": "smoke"}, "flags": given}
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    if "given" in flags:
        GPT(GPTConfig(16, n_layer=1, n_head=1, n_embd=8)).save_pretrained("given")
    before = sorted(tmp_path.rglob("*"))
    for flag, value in (("--preset", "smoke"), ("--data", str(text)), ("--out", "new/run")):
        if flag not in arguments and ("fineweb-124m" not in arguments or flag != "--data"):
            arguments += [flag, value]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("train.py: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_ends_in_exit_codes() -> None:
    command = [str(ROOT / "train.py"), "--preset", "smok"]
    printed, code = Forked(python, *command, cwd=ROOT, environment=os.environ).communicate(900)
    assert (code, printed.count("\n")) == (2, 1)
    assert printed.startswith("train.py: preset: unknown recipe 'smok'")
