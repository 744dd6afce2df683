"""Training end to end: what a run leaves behind, and that it repeats."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from model import GPT, GPTConfig
from model.tokenizer import END_OF_TEXT, decode
from tests.forked import Forked, python
from training import checkpoint, ending
from training.distributed import ALONE
from training.evaluate import evaluate_tokens
from training.plan import Machine, detect
from training.recipes import find_preset
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
    flags = ["--preset", "smoke", "--data", text, "--eval-every", "6", "--save-every", "0"]
    flags += ["--batch-size", "1", "--grad-accum-steps", "2"]
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
    said = re.findall(r"about ([\d.]+) GiB for a step, plus ([\d.]+) to ([\d.]+) for", printed)
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
    assert losses(steps_a) == losses(steps_b)
    assert_same_weights(*twice)
    assert (twice[0] / "samples.txt").read_text() == (twice[1] / "samples.txt").read_text()


@pytest.mark.slow  # test_step.py has the quick form: compiled steps equal the plain loop
def test_compiled_runs_repeat_bitwise(text: Path, tmp_path: Path) -> None:
    if missing := detect("cpu").missing_tools:
        pytest.skip(f"torch.compile needs {missing}")
    runs = [tmp_path / "a", tmp_path / "b"]
    for out in runs:
        printed = run_forked(
            *("--preset", "smoke", "--model", "smoke,n_layer=1", "--data", text, "--out", out),
            *("--steps", "3", "--compile", "--save-every", "0"),
            OMP_NUM_THREADS="2",
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
        )
        assert ", compiled (blocks), " in printed
    assert [s["loss"] for s in events(runs[0])[0]] == [s["loss"] for s in events(runs[1])[0]]
    assert_same_weights(*runs)


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def run_here(text: Path, out: Path, flags: str, *more: str | Path) -> dict:
    """A run in this process; returns its summary."""
    fixed = ["--preset", "smoke", "--data", text, "--out", out, "--save-every", "0"]
    assert train.main([*map(str, fixed), *flags.split(), *map(str, more)]) == 0
    return json.loads((out / "summary.json").read_text())


def losses(steps: list[dict]) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in steps]


def test_stop_rule_comes_one_step_late(text: Path, tmp_path: Path, brief) -> None:
    summary = run_here(text, tmp_path / "a", "--target-loss 10.7 --val-fraction 0")
    steps, others = events(tmp_path / "a")
    first = next(s["step"] for s in steps if s["loss"] < 10.7)
    assert 0 < first < 19
    assert summary["reached_target_at"] == first
    assert summary["final_step"] == len(steps) == first + 2  # one further update
    assert summary["saved_after_step"] == first + 1
    assert summary["val_loss"] is None  # no validation part, so no evaluation
    assert not others


def test_accumulation_is_a_larger_batch(text: Path, tmp_path: Path, brief) -> None:
    shared = "--steps 3 --eval-every 0 --order sequential --dtype fp32"
    run_here(text, tmp_path / "a", f"{shared} --batch-size 4")
    run_here(text, tmp_path / "b", f"{shared} --batch-size 2 --grad-accum-steps 2")
    a, b = (events(tmp_path / run)[0] for run in "ab")
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_finished_run_is_not_overwritten(text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = train.parse(["--preset", "smoke", "--data", str(text)])
    assert train.prepare(cfg).out == Path("runs/smoke")
    assert train.prepare(cfg).out == Path("runs/smoke")  # nothing finished there
    Path("runs/smoke/summary.json").write_text("{}")
    assert train.prepare(cfg).out == Path("runs/smoke-2")


def test_init_starts_from_given_weights(text: Path, tmp_path: Path, brief) -> None:
    torch.manual_seed(5)
    given = GPT(GPTConfig(block_size=96, n_layer=1, n_head=2, n_embd=32))
    given.save_pretrained(tmp_path / "given")
    for name, init in (("folder", "given"), ("file", "given/model.safetensors")):
        still = "--max-lr 0 --min-lr 0 --steps 1"
        run_here(text, tmp_path / name, still, "--init", tmp_path / init)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["recipe"]["model"].startswith("124m,block_size=96,n_layer=1")
        saved = load_file(tmp_path / name / "model" / "model.safetensors")
        for key, value in load_file(tmp_path / "given" / "model.safetensors").items():
            assert torch.equal(saved[key], value), key
    card = (tmp_path / "file" / "model" / "README.md").read_text()
    assert "a context of 96 tokens" in card  # which it was, before this run at 64
    assert "last training used a context of 64 tokens: positions 64 to 95" in card
    assert GPT.from_pretrained(tmp_path / "file").trained_context == 96


@pytest.mark.parametrize(
    ("values", "kept", "steps"),
    [
        ([5.0, 4.0, 4.5, 4.2, 1.0], 2, 6),  # patience ends it before the last
        ([5.0, 4.0, 4.5, 3.9, 3.8], 8, 8),  # the last is the best
    ],
)
def test_the_best_weights_are_kept(
    values: list[float], kept: int, steps: int, text: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(ending, "SAMPLE_TOKENS", 4)
    answers = iter([*values[: steps // 2 + 1], 4.4])  # and the whole text in the end
    monkeypatch.setattr(train.Run, "validate", lambda *_: next(answers))
    torch.manual_seed(5)
    given = tmp_path / "given"
    GPT(GPTConfig(block_size=96, n_layer=1, n_head=2, n_embd=16)).save_pretrained(given)
    flags = "--keep best --patience 2 --steps 8 --eval-every 2 --dtype fp32"
    summary = run_here(text, tmp_path / "run", flags, "--init", given)
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
    verdict = (tmp_path / "run" / "report.html").read_text()
    assert (f"model/ holds the weights of step {kept}" in verdict) == (kept < steps)
    assert "Overfitting" not in verdict


def test_samples_while_training_change_no_step(text: Path, tmp_path: Path, brief) -> None:
    flags = "--epochs 0.4 --dtype fp32 --batch-size 2 --sample-every 2 --log-every 9"
    run_here(
        text, tmp_path / "a", f"{flags} --model smoke,n_layer=1,n_embd=16,n_head=1,dropout=0.1"
    )
    steps, others = events(tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    saved = json.loads(config.read_text())
    rows = (saved["data"]["train_tokens"] - 1) // 64
    assert saved["recipe"]["max_steps"] == len(steps) == math.ceil(0.4 * rows / 2)
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


@pytest.mark.parametrize("document", ["Cat {} sat.", "cat"])
def test_marks_between_documents_are_no_text(document: str, tmp_path: Path, brief) -> None:
    """A model sees <|endoftext|> as one token, not as the characters that spell it."""
    documents = [document.format(i) for i in range(1000)]
    lines = (json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "cats.jsonl").write_text("".join(lines))
    summary = run_here(tmp_path / "cats.jsonl", tmp_path / "run", "--steps 1 --log-every 9")
    samples = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    prompts = re.findall(r"^\[prompt\] (.*)", samples, re.MULTILINE)
    assert len(prompts) == len({*prompts})  # equal ones would give equal samples
    assert len(prompts) == ending.NUM_SAMPLES or document == "cat"
    assert not any("endoftext" in prompt for prompt in prompts)
    _, val = train.load_corpus([tmp_path / "cats.jsonl"]).split(0.1)
    num_bytes = len(decode(np.asarray(val)).replace(END_OF_TEXT, ""))
    bits = summary["val_loss"] * len(val) / math.log(2)
    assert summary["val_bits_per_byte"] == pytest.approx(bits / num_bytes)


def test_muon_resumes_exactly_and_no_other_goes_on_from_it(
    text: Path, tmp_path: Path, brief, capsys
) -> None:
    flags = "--steps 4 --save-every 2 --dtype fp32 --batch-size 2 --model smoke,n_embd=16,n_head=1"
    run_here(text, tmp_path / "a", flags, "--muon")
    assert "training tokens, Muon for the blocks' matrices" in capsys.readouterr().out
    resume = ["--resume", str(tmp_path / "a" / "checkpoints" / "step-00000002")]
    run_here(text, tmp_path / "b", flags, *resume, "--muon")
    whole, rest = (losses(events(tmp_path / name)[0]) for name in "ab")
    assert rest == whole[2:]
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    fixed = ["--preset", "smoke", "--data", str(text), "--out", str(tmp_path / "c"), *flags.split()]
    assert train.main([*fixed, *resume]) == 2
    assert "muon was True, now False" in capsys.readouterr().err
    assert train.main([*fixed, *resume, "--override"]) == 2
    assert "neither of Muon and AdamW can go on" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    saved = checkpoint.read(Path(resume[1]))  # as those were that had Muon in the plan
    del saved.state["recipe"]["muon"]
    saved.state["plan"]["optimizer"] = "muon"
    older = str(checkpoint.write(tmp_path / "older", saved))
    recipe = train.parse([*fixed, "--muon"]).recipe
    sha256 = saved.state["recipe"]["data_sha256"]
    assert find(older, tmp_path / "c", ALONE, recipe, sha256) is not None


def test_a_wsd_run_cools_down_from_any_checkpoint(
    text: Path, tmp_path: Path, brief, capsys
) -> None:
    flags = "--schedule wsd --decay-fraction 0.25 --steps 12 --save-every 3 --keep-last 9"
    flags += " --dtype fp32 --model smoke,n_layer=1 --batch-size 2"
    run_here(text, tmp_path / "a", flags)
    middle = tmp_path / "a" / "checkpoints" / "step-00000006"
    cooled = run_here(text, tmp_path / "b", f"{flags} --cooldown", "--resume", middle)
    assert cooled["final_step"] == 8
    whole, cooled = (events(tmp_path / name)[0] for name in "ab")
    recipe = find_preset("smoke")
    assert [s["lr"] for s in whole][2:9] == [recipe.max_lr] * 7
    middle_lr = (recipe.max_lr + recipe.min_lr) / 2
    assert [s["lr"] for s in cooled] == pytest.approx([recipe.max_lr, middle_lr])
    assert losses(cooled[:1]) == losses(whole[6:7])
    # Killed in its decay, it goes on with that one.
    fixed = ["--preset=smoke", "--data", str(text), "--out", str(tmp_path / "b")]
    again = train.prepare(train.parse([*fixed, *flags.split(), "--cooldown"]))
    assert again.saved is not None
    assert (again.saved.step, again.recipe.max_steps) == (8, 8)
    assert "resume: the learning rate was" not in capsys.readouterr().out
