"""Training end to end: what a run leaves behind, that it repeats, and what it refuses."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from model import GPT, GPTConfig
from tests.forked import Forked, python
from training import checkpoint, ending, folder, loggers, metrics
from training.data import SHAKESPEARE_SHA256
from training.distributed import ALONE
from training.evaluate import evaluate_tokens
from training.metrics import RunLog
from training.plan import Machine, detect, make_plan
from training.recipes import ABOUT, PRESETS, Recipe, find_preset
from training.resume import find

ROOT = Path(train.__file__).parent
CPU = Machine(device="cpu", name="a CPU", num_threads=2)
# Runs a command and adds the most memory that it or what it started had, in KiB.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def not_interpreted() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess:
    """`python train.py ...`, and its peak memory in the last line."""
    return subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT,
        env=not_interpreted(),
        capture_output=True,
        text=True,
        timeout=900,  # of seconds, on a machine that does nothing else
        check=False,
    )


def run_forked(*arguments: str | Path, **environ: str) -> str:
    """The same in a forked process, to its end; what it printed."""
    command = [str(ROOT / "train.py"), *map(str, arguments)]
    process = Forked(python, *command, cwd=ROOT, environment=not_interpreted() | environ)
    printed, code = process.communicate(900)
    assert code == 0, printed
    return printed


def events(run: Path) -> tuple[list[dict], list[dict]]:
    """Step objects and the others."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "event" not in x], [x for x in lines if "event" in x]


@pytest.fixture(scope="module")
def twice(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One small run, made by two processes.

    On one thread: while the machine is busy, several wait at each operation for one another.
    """
    folder = tmp_path_factory.mktemp("runs")
    runs = [folder / "a", folder / "b"]
    flags = ("--preset", "smoke", "--data", text, "--eval-every", "6", "--save-every", "0",
             "--batch-size", "1", "--grad-accum-steps", "2")  # fmt: skip
    done = run_process(*flags, "--out", runs[0])
    assert done.returncode == 0, done.stderr
    (runs[0] / "stdout.txt").write_text(done.stdout)
    run_forked(*flags, "--out", runs[1])
    return runs


def test_run_folder(twice: list[Path]) -> None:
    run = twice[0]
    steps, others = events(run)
    assert [s["step"] for s in steps] == list(range(20))
    assert {*steps[0]} == {"step", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "mfu"}
    assert abs(steps[0]["loss"] - math.log(50257)) < 0.3
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert steps[0]["mfu"] is None  # no GPU whose peak is known
    assert [e["step"] for e in others if e["event"] == "eval"] == [6, 12, 18, 20]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_step"] == 20
    assert summary["tokens_seen"] == 20 * 2 * 64
    assert summary["epochs"] == summary["tokens_seen"] / summary["corpus_tokens"]
    assert summary["trained_context"] == 64
    assert summary["model_bytes"] == (run / "model" / "model.safetensors").stat().st_size
    assert summary["wall_s"] > summary["train_s"] > 0
    assert steps[0]["ms"] / 1e3 < summary["first_step_s"] < summary["wall_s"]
    assert summary["baselines"]["bigram"] < summary["baselines"]["unigram"]
    assert summary["train_loss"] == steps[-1]["loss"]

    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["name"] == "smoke"
    assert config["recipe"]["grad_accum_steps"] == 2
    assert (config["plan"]["ops"], config["plan"]["compile"]) == ("eager", False)
    assert config["versions"]["torch"] == torch.__version__
    assert config["data"]["train_tokens"] == summary["corpus_tokens"]
    assert {"git_commit", "git_dirty", "device", "platform"} <= config.keys()

    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "samples.txt").read_text(encoding="utf-8")) > 500
    printed = (run / "stdout.txt").read_text()
    assert "step    19 | loss" in printed
    assert "mfu" not in printed
    assert "ops eager: no GPU" in printed
    said = re.findall(r"about ([\d.]+) GiB for a step, beside the ([\d.]+) to ([\d.]+) of", printed)
    step, least, most = map(float, said[0])
    peak = int(printed.split()[-1]) / 2**20
    assert 0.6 * (step + least) < peak < 1.5 * (step + most)
    assert "bigram" in printed
    assert "\x1b" not in printed  # plain lines where there is no terminal


def test_saved_model_is_the_trained_one(twice: list[Path], text: Path) -> None:
    model = GPT.from_pretrained(twice[0])
    assert model.trained_context == 64
    _, val = train.load_corpus([text]).split(0.1)
    summary, config = (
        json.loads((twice[0] / f"{name}.json").read_text()) for name in ("summary", "config")
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=config["plan"]["dtype"] == "bf16"):
        loss = evaluate_tokens(model, np.asarray(val))
    assert loss == pytest.approx(summary["val_loss"], rel=1e-5)


def test_runs_repeat_bitwise_in_fresh_processes(twice: list[Path]) -> None:
    (steps_a, _), (steps_b, _) = (events(run) for run in twice)
    for a, b in zip(steps_a, steps_b, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
    assert_same_weights(*twice)
    assert (twice[0] / "samples.txt").read_text() == (twice[1] / "samples.txt").read_text()


@pytest.mark.slow  # test_step.py has the quick form: compiled steps equal the plain loop
def test_compiled_runs_repeat_bitwise(text: Path, tmp_path: Path) -> None:
    if missing := detect("cpu").missing_tools:
        pytest.skip(f"torch.compile needs {missing}")
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        printed = run_forked(
            "--preset", "smoke", "--model", "smoke,n_layer=1", "--data", text, "--out", out,
            "--steps", "3", "--compile", "--save-every", "0",
            OMP_NUM_THREADS="2", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
        )  # fmt: skip
        assert ", compiled (blocks), " in printed
    assert [s["loss"] for s in events(runs[0])[0]] == [s["loss"] for s in events(runs[1])[0]]
    assert_same_weights(*runs)


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end with few words and, where nobody reads it, without a report."""
    monkeypatch.setattr(ending, "SAMPLE_TOKENS", 4)
    monkeypatch.setattr(ending, "report_run", lambda *_: None)


def run_here(text: Path, out: Path, *arguments: str) -> dict:
    """A run in this process; returns its summary."""
    fixed = ["--preset", "smoke", "--data", str(text), "--out", str(out), "--save-every", "0"]
    assert train.main([*fixed, *arguments]) == 0
    return json.loads((out / "summary.json").read_text())


def test_stop_rule_comes_one_step_late(text: Path, tmp_path: Path) -> None:
    summary = run_here(text, tmp_path / "a", "--target-loss", "10.7", "--val-fraction", "0")
    steps, others = events(tmp_path / "a")
    first = next(s["step"] for s in steps if s["loss"] < 10.7)
    assert 0 < first < 19
    assert summary["reached_target_at"] == first
    assert summary["final_step"] == len(steps) == first + 2  # one further update
    assert summary["saved_after_step"] == first + 1
    assert summary["val_loss"] is None  # no validation part, so no evaluation
    assert not others


def test_accumulation_is_a_larger_batch(text: Path, tmp_path: Path) -> None:
    shared = ("--steps", "3", "--eval-every", "0", "--order", "sequential", "--dtype", "fp32")
    run_here(text, tmp_path / "a", *shared, "--batch-size", "4")
    run_here(text, tmp_path / "b", *shared, "--batch-size", "2", "--grad-accum-steps", "2")
    a, b = (events(tmp_path / run)[0] for run in "ab")
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_values_are_read_a_step_late(tmp_path: Path) -> None:
    with RunLog(tmp_path, 3, 100, lambda tokens_per_s: tokens_per_s / 1e9) as log:
        one = torch.tensor(1.0)
        log.step(0, 1e-3, 0, one * 5, one)
        assert list(log.read()) == []  # still running, for all that is known
        log.step(1, 1e-3, 0, one * 4, one)
        (first,) = log.read()
        assert (first.step, first.loss) == (0, 5.0)
        (last,) = log.read(wait=True)
        assert (last.step, last.loss) == (1, 4.0)
        assert last.mfu == last.tokens_per_s / 1e9
        assert list(log.read(wait=True)) == []
    assert [s["step"] for s in events(tmp_path)[0]] == [0, 1]


def test_time_aside_belongs_to_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    with RunLog(tmp_path, 3, 100, lambda _: None) as log:
        for step in range(3):
            now[0] += 2.0
            log.step(step, 1e-3, 0, torch.tensor(1.0), torch.tensor(1.0))
            with log.aside():
                now[0] += 100.0
    assert [s["ms"] for s in events(tmp_path)[0]] == [2000.0, 2000.0, 2000.0]


# ---- the flags


def test_every_recipe_field_is_a_flag_with_the_preset_as_default() -> None:
    for two in (
        ["--preset=smoke", "--preset", "shakespeare-124m"],
        ["--preset", "smoke", "--preset=shakespeare-124m"],
    ):
        assert (train.parse(two).preset, train.parse(two).recipe.model) == (two[-1][-16:], "124m")
    cfg = train.parse(["--preset", "shakespeare-124m", "--steps", "7", "--seed=3", "--no-compile"])
    assert (cfg.recipe.max_steps, cfg.recipe.seed, cfg.choices.compile) == (7, 3, False)
    assert (cfg.recipe.horizon_steps, cfg.recipe.model) == (200_000, "124m")
    assert train.parse(["--preset=smoke", "--max-steps", "9", "--compile"]).choices.compile is True
    for flags, wanted in ((["--compile", "on", "--steps", "9"], True), (["--compile=off"], False),
                          (["--compile", "auto"], None), ([], None), (["--no-compile"], False),
                          (["--no-compile", "--compile"], True)):  # fmt: skip
        assert train.parse(["--preset=smoke", *flags]).choices.compile is wanted
    asked = train.parse(["--preset=smoke", "--working-copies", "off", "--no-cuda-graph"]).choices
    assert (asked.working_copies, asked.cuda_graph) == (False, False)
    with pytest.raises(SystemExit, match="2"):
        train.parse(["--preset=smoke", "--compile", "maybe"])
    fields = {"max_lr": "0.5", "min_lr": "0.25", "warmup_steps": "3", "horizon_steps": "4",
              "max_steps": "5", "batch_size": "6", "block_size": "7", "grad_accum_steps": "8",
              "weight_decay": "0.5", "beta1": "0.25", "beta2": "0.5", "eps": "0.125",
              "grad_clip": "2.0", "target_loss": "1.5", "val_fraction": "0.5",
              "order": "sequential", "seed": "11", "model": "mini"}  # fmt: skip
    flags = [x for name, v in fields.items() for x in ("--" + name.replace("_", "-"), v)]
    recipe = train.parse(["--preset", "smoke", *flags]).recipe
    assert {name: str(getattr(recipe, name)) for name in fields} == fields
    assert train.parse([]).preset == "shakespeare-cpu" or torch.cuda.is_available()


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    *(f.name for f in fields(Recipe) if f.type in (int, float) or f.name == "max_steps"),
    "eval_every", "save_every", "log_every", "keep_last", "micro_batch_size",
])  # fmt: skip
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


def test_a_finished_run_is_not_overwritten(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = train.parse(["--preset", "smoke", "--data", str(text)])
    assert train.prepare(cfg).out == Path("runs/smoke")
    assert train.prepare(cfg).out == Path("runs/smoke")  # nothing finished there
    Path("runs/smoke/summary.json").write_text("{}")
    assert train.prepare(cfg).out == Path("runs/smoke-2")


@pytest.mark.parametrize(
    ("preset", "corpus", "sha256", "title"),
    [
        ("shakespeare-cpu", "tiny Shakespeare", SHAKESPEARE_SHA256, "shakespeare-cpu"),
        ("shakespeare-cpu", "my/input.txt", SHAKESPEARE_SHA256, "shakespeare-cpu"),
        ("shakespeare-cpu", "pydoc_data.topics", "0", "pydoc_data"),
        ("shakespeare-124m", "/a/my own text.txt and 2 more", "0", "my-own-text"),
        ("shakespeare-cpu", "../..", "0", "shakespeare-cpu"),
        ("smoke", "my.txt", "0", "smoke"),
    ],
)
def test_a_run_is_called_after_its_text_and_not_after_shakespeare(
    preset: str, corpus: str, sha256: str, title: str
) -> None:
    assert folder.title(preset, corpus, sha256) == title


@pytest.mark.parametrize("words", [["--preset"], ["--preset", "list"], ["--steps=3", "--preset"]])
def test_the_recipes_list_themselves(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        train.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*ABOUT]
    assert {*ABOUT} == {*PRESETS}
    assert max(map(len, lines)) < 100


def test_init_starts_from_given_weights(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    given = GPT(GPTConfig(block_size=96, n_layer=1, n_head=2, n_embd=32))
    given.save_pretrained(tmp_path / "given")
    still = ["--max-lr", "0", "--min-lr", "0", "--steps", "1"]
    for name, init in (("folder", "given"), ("file", "given/model.safetensors")):
        run_here(text, tmp_path / name, "--init", str(tmp_path / init), *still)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["recipe"]["model"].startswith("124m,block_size=96,n_layer=1")
        saved = load_file(tmp_path / name / "model" / "model.safetensors")
        for key, value in load_file(tmp_path / "given" / "model.safetensors").items():
            assert torch.equal(saved[key], value), key
    card = (tmp_path / "file" / "model" / "README.md").read_text()
    assert "a context of 96 tokens" in card  # which it was, before this run at 64
    assert "last training was at 64 tokens: positions from 64 to 95" in card
    assert GPT.from_pretrained(tmp_path / "file").trained_context == 96


@pytest.mark.parametrize(
    ("losses", "kept", "steps"),
    [
        ([5.0, 4.0, 4.5, 4.2, 1.0], 2, 6),  # patience ends it before the last
        ([5.0, 4.0, 4.5, 3.9, 3.8], 8, 8),  # the last is the best
    ],
)
def test_the_best_weights_are_kept(
    losses: list[float], kept: int, steps: int, text: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(ending, "SAMPLE_TOKENS", 4)
    answers = iter([*losses[: steps // 2 + 1], 4.4])  # and the whole text in the end
    monkeypatch.setattr(train.Run, "validate", lambda *_: next(answers))
    torch.manual_seed(5)
    GPT(GPTConfig(block_size=96, n_layer=1, n_head=2, n_embd=16)).save_pretrained(
        tmp_path / "given"
    )
    summary = run_here(text, tmp_path / "run", "--init", str(tmp_path / "given"), "--keep", "best",
                       "--patience=2", "--steps=8", "--eval-every=2", "--dtype=fp32")  # fmt: skip
    assert (summary["saved_after_step"], summary["final_step"]) == (kept - 1, steps)
    records, others = events(tmp_path / "run")
    assert summary["train_loss"] == records[kept - 1]["loss"]
    at_end = [(e["event"], e["step"]) for e in others if e.get("val_loss") == 4.4]
    assert at_end == [("eval" if kept == steps else "kept", kept)]
    at = {n: tmp_path / "run" / "checkpoints" / f"step-{n:08d}" for n in (kept, steps)}
    saved, best, last = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run" / "model", at[kept], at[steps])
    )
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(saved[name], best[name])
    assert torch.equal(saved[name], last[name]) == (kept == steps)
    verdict = (tmp_path / "run" / "report.json").read_text()
    assert (f"model/ holds the weights of step {kept}" in verdict) == (kept < steps)
    assert "Overfitting" not in verdict


def test_samples_while_training_change_no_step(text: Path, tmp_path: Path, brief) -> None:
    flags = [
        "--epochs=0.4",
        "--dtype=fp32",
        "--model=smoke,n_layer=1,n_embd=16,n_head=1,dropout=0.1",
        "--batch-size=2",
    ]
    run_here(text, tmp_path / "a", *flags, "--sample-every", "2", "--log-every", "9")
    steps, others = events(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    saved = json.loads(config.read_text())
    assert saved["recipe"]["max_steps"] == len(steps) == math.ceil(
        0.4 * ((saved["data"]["train_tokens"] - 1) // 64) / 2)  # fmt: skip
    taken = [e for e in others if e["event"] == "samples"]
    assert [e["step"] for e in taken] == [2, 4]
    assert len(taken[0]["texts"]) == ending.NUM_SAMPLES
    assert len({str(e["texts"]) for e in taken}) == 2
    # Its own config.json makes it again, but for what is given beside it.
    again = ["--config", str(config), "--out", str(tmp_path / "b"), "--sample-every", "0"]
    assert train.main(again) == 0
    repeated, others = events(tmp_path / "b")
    assert [s["loss"] for s in repeated] == [s["loss"] for s in steps]
    assert not [e for e in others if e["event"] == "samples"]


def test_a_config_is_the_flags_it_was_made_of(tmp_path: Path) -> None:
    flags = ["--preset=shakespeare-cpu", "--data", "a", "b c", "--max-lr=0.01", "--no-guard",
             "--seed=7", "--dropout=0.25", "--ops=eager", "--no-compile", "--cuda-graph", "on",
             "--out=x", "--micro-batch-size=2", "--eval-every=9", "--resume=never",
             "--steps=12"]  # fmt: skip
    cfg = train.parse(flags)
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
    flat["choices"]["optimizer"] = "auto"
    wrong = {"muon": None, "seed": True, "max_lr": "a", "schedule": "b", "ops": 3, "compile": 1}
    for name, value in {**wrong, "eval_every": None, "keep_last": 2.5}.items():
        parts = [{**part} for part in (recipe, flat["choices"], flat)]
        next(part for part in parts if name in part or name == "muon")[name] = value
        flags_then = {**parts[2], "choices": parts[1]}
        file.write_text(json.dumps({"recipe": parts[0], "flags": flags_then}))
        with pytest.raises(ValueError, match=f"^config: {file}: {name} must be .*, got "):
            train.parse(["--config", str(file)])


def test_muon_resumes_exactly_and_no_other_goes_on_from_it(
    text: Path, tmp_path: Path, brief, capsys
) -> None:
    flags = ["--steps=4", "--save-every=2", "--dtype=fp32", "--batch-size=2",
             "--model=smoke,n_embd=16,n_head=1"]  # fmt: skip
    run_here(text, tmp_path / "a", *flags, "--muon")
    assert "training tokens, Muon for the blocks' matrices" in capsys.readouterr().out
    resume = ["--resume", str(tmp_path / "a" / "checkpoints" / "step-00000002")]
    run_here(text, tmp_path / "b", *flags, *resume, "--muon")
    whole, rest = (events(tmp_path / name)[0] for name in "ab")
    assert [(s["loss"], s["grad_norm"]) for s in rest] == [
        (s["loss"], s["grad_norm"]) for s in whole[2:]]  # fmt: skip
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    fixed = ["--preset", "smoke", "--data", str(text), "--out", str(tmp_path / "c")]
    assert train.main([*fixed, *flags, *resume]) == 2
    assert "muon was True, now False" in capsys.readouterr().err
    assert train.main([*fixed, *flags, *resume, "--override"]) == 2
    assert "neither of Muon and AdamW can go on" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    saved = checkpoint.read(Path(resume[1]))  # as those were that had Muon in the plan
    del saved.state["recipe"]["muon"]
    saved.state["plan"]["optimizer"] = "muon"
    older = str(checkpoint.write(tmp_path / "older", saved))
    recipe = train.parse([*fixed, *flags, "--muon"]).recipe
    sha256 = saved.state["recipe"]["data_sha256"]
    assert find(older, tmp_path / "c", ALONE, recipe, sha256) is not None


def test_a_wsd_run_cools_down_from_any_checkpoint(
    text: Path, tmp_path: Path, brief, capsys
) -> None:
    flags = [
        "--schedule=wsd",
        "--decay-fraction=0.25",
        "--steps=12",
        "--save-every=3",
        "--keep-last=9",
        "--dtype=fp32",
        "--model=smoke,n_layer=1",
        "--batch-size=2",
    ]
    run_here(text, tmp_path / "a", *flags)
    middle = tmp_path / "a" / "checkpoints" / "step-00000006"
    cool = [*flags, "--resume", str(middle), "--cooldown"]
    assert run_here(text, tmp_path / "b", *cool)["final_step"] == 8
    whole, cooled = (events(tmp_path / name)[0] for name in "ab")
    recipe = find_preset("smoke")
    assert [s["lr"] for s in whole][2:9] == [recipe.max_lr] * 7
    middle_lr = (recipe.max_lr + recipe.min_lr) / 2
    assert [s["lr"] for s in cooled] == pytest.approx([recipe.max_lr, middle_lr])
    assert cooled[0]["loss"] == whole[6]["loss"]
    assert cooled[0]["grad_norm"] == whole[6]["grad_norm"]
    # Killed in its decay, it goes on with that one.
    cfg = train.parse(["--preset=smoke", "--data", str(text), *flags, "--cooldown",
                       "--out", str(tmp_path / "b")])  # fmt: skip
    again = train.prepare(cfg)
    assert again.saved is not None
    assert (again.saved.step, again.recipe.max_steps) == (8, 8)
    assert "resume: the learning rate was" not in capsys.readouterr().out


# Flags => what is said of them.
BAD = """
--init {tmp}/folder => {tmp}/folder
--init x --model tiny => --init x decides the model
--init {tmp}/given --block-size 99 => 16 positions, got 99
--preset finetune => finetune starts from weights; add --init gpt2
--dropout 1 => model: dropout must be in [0, 1), got 1.0
--config {tmp}/folder => folder must be a run folder or its config.json:
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
--out '' => --out is empty
--init= => --init is empty
--resume '' => --resume is empty
--hellaswag '' => --hellaswag is empty
--text-column '' => --text-column is empty
--tune-file '' => --tune-file is empty
--config {tmp}/sly.json => data must be a plain value
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
    (tmp_path / "foreign.bin").write_bytes(b"\0\0" * 1000)
    (tmp_path / "foreign.json").write_text('{"encoding": "cl100k_base"}')
    for name, given in (("sly", {"data": ["a.txt", "--out=elsewhere"]}), ("help", {"help": True})):
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


def test_full_disk_is_seen_before_training(text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = namedtuple("usage", "total used free")(1 << 30, 1 << 30, 4096)
    where = "training.folder.shutil.disk_usage"
    monkeypatch.setattr(where, Mock(side_effect=OSError(38, "Function not implemented")))
    folder.make(tmp_path / "not counted", find_preset("smoke"))
    monkeypatch.setattr(where, lambda _: usage)
    out = tmp_path / "new" / "run"
    assert train.main(["--preset", "smoke", "--data", str(text), "--out", str(out)]) == 2
    assert "4,096 bytes free, the model alone needs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_tensorboard_asked_for_but_absent(text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _: None)
    arguments = ["--preset", "smoke", "--data", str(text), "--out", str(tmp_path / "x")]
    assert train.main([*arguments, "--tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_command_line_ends_in_exit_codes() -> None:
    done = run_process("--preset", "smok")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)  # the peak
    assert done.stderr.startswith("train.py: preset: unknown recipe 'smok'")
    assert "Traceback" not in done.stderr
