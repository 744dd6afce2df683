"""Runs that survive: the short form of `make torture`, and the parts one by one."""

import json
import os
import random
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import train
from model import GPT, hf
from tests.faults import Small, disturb, flip_bytes, wait_for
from training import checkpoint, folder, state
from training.checkpoint import Checkpoint, CheckpointError, Writer, newest_good
from training.guard import Guard
from training.metrics import RunLog, read_metrics
from training.optim import AdamW, configure_adamw
from training.plan import Choices, Machine, make_plan
from training.recipes import Recipe
from training.signals import EXIT_AT_ONCE

MODEL = "smoke,n_embd=16,n_head=1"  # whose checkpoints are 10 MB, 50,257 tokens being what they are


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run that was left alone, and what it ended with."""
    run = Small(tmp_path_factory.mktemp("faults"), flags=("--model", MODEL))
    code, output = run.finish("calm")
    assert code == 0, output
    return run, run.result("calm")


@pytest.mark.parametrize(("how", "kills"), [(signal.SIGKILL, 2), (signal.SIGTERM, 1)])
def test_disturbed_run_ends_bitwise_like_the_undisturbed_one(small, how, kills):
    run, want = small
    struck = disturb(run, how.name, kills, how, random.Random(3))
    assert struck["all"] == kills
    got = run.result(how.name)
    assert got[1] == want[1]  # losses and norms of every step
    assert got[0] == want[0]  # weights, moments, generators, guard window


@pytest.mark.slow
def test_compiled_run_resumes_bitwise(tmp_path):
    run = Small(tmp_path, steps=8, compile=True)
    code, output = run.finish("calm")
    assert code == 0, output
    struck = disturb(run, "killed", 1, signal.SIGKILL, random.Random(5))
    assert struck["all"] == 1
    assert run.result("killed") == run.result("calm")


@pytest.mark.slow
def test_bf16_run_resumes_bitwise(tmp_path):
    run = Small(tmp_path, steps=4, flags=("--dtype", "bf16"))
    code, output = run.finish("calm")
    assert code == 0, output
    disturb(run, "killed", 1, signal.SIGTERM, random.Random(5))
    assert run.result("killed") == run.result("calm")


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_run_on_a_gpu_resumes_bitwise(tmp_path, compile):
    """By the plan of a GPU: Triton ops and AdamW, bf16 working copies, one CUDA graph."""
    flags = ("--device", "cuda", "--tune", "off")  # beside other tests, times are noise
    run = Small(tmp_path, steps=10, flags=flags, compile=compile)
    code, output = run.finish("calm")
    assert code == 0, output
    assert "one CUDA graph" in output
    assert "cannot be captured" not in output
    for how in (signal.SIGKILL, signal.SIGTERM):
        struck = disturb(run, how.name, 1, how, random.Random(5))
        assert struck["all"] == 1
        assert run.result(how.name) == run.result("calm")


def test_every_checkpoint_is_a_model_folder(small, tmp_path):
    run, _ = small
    folder = run.checkpoints("calm") / f"step-{run.steps:08d}"
    from_run, ours = GPT.from_pretrained(run.folder / "calm"), GPT.from_pretrained(folder)
    assert ours.trained_context == 32
    for name, value in from_run.state_dict().items():
        # A checkpoint has all positions, a model those that were trained.
        assert torch.equal(ours.state_dict()[name][: len(value)], value), name
    hf.main(["export", str(folder), "--out", str(tmp_path / "exported")])
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    still = ("--init", str(folder), "--max-lr", "0", "--min-lr", "0", "--steps", "1")
    assert in_process(replace(run, flags=()), "tuned", *still) == 0
    tuned = GPT.from_pretrained(run.folder / "tuned")
    assert torch.equal(tuned.transformer.wte.weight, ours.transformer.wte.weight)


def test_a_resumed_fine_tuning_keeps_the_positions_it_came_with(small):
    run, _ = small
    now = checkpoint.read(run.checkpoints("calm") / f"step-{run.steps:08d}")
    recipe = Recipe(model=MODEL, block_size=32)
    model = GPT(recipe.model_config)
    model.trained_context = 32
    tuned = replace(now, config={**now.config, "trained_context": 48, "fine_tuned_context": 32})
    train.restore(tuned, model, configure_adamw(model, recipe), None)
    assert (model.trained_context, model.fine_tuned_context) == (48, 32)
    odd = replace(now, config={**now.config, "trained_context": "all"})
    with pytest.raises(CheckpointError, match="trained_context must be a whole number"):
        train.restore(odd, model, configure_adamw(model, recipe), None)


def test_each_rank_goes_on_with_the_generator_of_its_own_gpu(small, monkeypatch):
    """Rank 0 saves its own: it has drawn nothing on the others' GPUs."""
    run, _ = small
    now = checkpoint.read(run.checkpoints("calm") / f"step-{run.steps:08d}")
    mine, given = now.tensors["rng"]["cpu"].clone(), []
    both = {"cuda0": mine, "cuda1": mine.clone()}
    now = replace(now, tensors={**now.tensors, "rng": now.tensors["rng"] | both})
    for key in ("cuda0?", "cuda1?"):
        monkeypatch.setitem(state._GENERATORS, key, state._GENERATORS["cpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: mine)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [*both.values()])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *what: given.append(what))
    recipe = Recipe(model=MODEL, block_size=32)
    model = GPT(recipe.model_config)
    made = model, configure_adamw(model, recipe), None
    progress = train.restore(now, *made)
    assert [len(what) for what in given] == [1]  # without a device: the current one
    assert given[0][0] is mine
    plan = make_plan(recipe, Machine("cpu", "a CPU"), Choices(ops="eager"))
    saved = state.capture(progress, *made, recipe, plan, "00")
    assert saved.tensors["rng"].keys() == {"cpu", "cuda0"}


def test_changed_recipe_is_refused_with_both_values(small, capsys):
    run, _ = small
    shutil.copytree(run.folder / "calm", run.folder / "changed")
    assert in_process(run, "changed", "--max-lr", "0.002") == 2
    output = capsys.readouterr().err
    assert "with another recipe or text: max_lr was 0.001, now 0.002" in output
    assert "--override" in output
    assert output.count("\n") == 1


def test_second_process_on_a_run_folder_is_refused(small):
    run, _ = small
    (run.folder / "busy").mkdir()
    with folder.opened(run.folder / "busy", None, print):
        code, output = run.finish("busy")
    assert code == 2
    assert f"in use by process {os.getpid()}" in output
    assert not (run.folder / "busy" / "metrics.jsonl").exists()


def test_second_interrupt_stops_at_once(small):
    run, _ = small
    process = run.start("twice", "--grad-accum-steps", "400")  # a step that takes long
    assert wait_for(process, "file", run.folder / "twice" / "config.json", 0.5)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    while "SIGINT" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == EXIT_AT_ONCE


def sample_checkpoint(step: int, best: int | None = None) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(7, 5, generator=generator)},
        "rng": {"cpu": torch.ones(3)},
    }
    return Checkpoint(step, tensors, {"progress": {"step": step}}, best=best)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    saved = sample_checkpoint(3)
    back = checkpoint.read(checkpoint.write(tmp_path, saved))
    assert back.step == 3
    assert back.state == saved.state
    assert torch.equal(back.tensors["model"]["w"], saved.tensors["model"]["w"])
    # Nothing that could run code when read.
    assert {p.suffix for p in (tmp_path / "step-00000003").iterdir()} == {".safetensors", ".json"}


def test_every_flipped_byte_is_detected(tmp_path):
    folder = checkpoint.write(tmp_path, sample_checkpoint(1))
    assert flip_bytes(folder, 200, random.Random(0)) == 200


def truncate(path):
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1])


def half_delete(path):
    (path / "rng.safetensors").unlink()


def make_foreign(path):
    (path / "manifest.json").write_text('{"format": "another"}')


def empty(path):
    for file in path.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [truncate, half_delete, make_foreign, empty])
def test_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, damage):
    checkpoint.write(tmp_path, sample_checkpoint(1))
    damage(checkpoint.write(tmp_path, sample_checkpoint(2)))
    lines: list[str] = []
    found = newest_good(tmp_path, lines.append)
    assert found is not None
    assert found.step == 1
    assert len(lines) == 1
    assert "step-00000002" in lines[0]


def test_checkpoints_that_may_not_be_listed_are_no_fresh_start(tmp_path, monkeypatch):
    def refuse(path="."):
        raise PermissionError(13, "Permission denied", str(path))

    checkpoint.write(tmp_path, sample_checkpoint(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refuse)
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError):
            newest_good(tmp_path, print)
    assert newest_good(tmp_path / "none", print) is None


def test_full_disk_keeps_the_old_checkpoint_and_says_so_each_time(tmp_path, monkeypatch):
    lines: list[str] = []
    writer = Writer(tmp_path, 1, lines.append)
    writer.submit(sample_checkpoint, 1)
    writer.wait()

    def full(path, data, say):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_file", full)
    for step in (2, 3):
        writer.submit(sample_checkpoint, step)
    writer.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert len(lines) == 2
    assert all("training goes on, last good one: step 1" in line for line in lines)


def test_old_checkpoints_go_but_not_the_best(tmp_path):
    writer = Writer(tmp_path, 2, print)
    for step in range(1, 6):
        writer.submit(sample_checkpoint, step, 1)
    writer.wait()
    assert [p.name[-1] for p in checkpoint.paths(tmp_path)] == ["1", "4", "5"]


def judge(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def test_guard_finds_bad_steps_and_nothing_else():
    guard = Guard("cpu", window=8)
    assert not any(judge(guard, 5.0 + 0.1 * (i % 3)) for i in range(8))
    assert judge(guard, 30.0)
    assert judge(guard, float("nan"))
    assert judge(guard, 5.0, float("inf"))
    assert not judge(guard, 5.2)
    assert not judge(guard, 0.1)  # a fall is no spike
    assert guard.losses.isfinite().all()  # bad losses never enter the window


def test_guard_tolerates_the_noise_of_training():
    """4,000 losses around a falling mean, sigma 3%: no false alarm."""
    guard = Guard("cpu")
    generator = torch.Generator().manual_seed(0)
    noise = 1 + 0.03 * torch.randn(4000, generator=generator)
    bad = sum(judge(guard, float(n) * (3 + 7 * 0.999**i)) for i, n in enumerate(noise))
    assert bad == 0


def in_process(run: Small, out: str, *flags: str) -> int:
    """train.py in this process, so that a fault can be planted in it."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    try:
        return train.main(run.command(out, *flags)[1:])
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore


def plant_nan(monkeypatch, bad_calls):
    """NaN in the gradients of the given steps, counted by calls of the clipping."""
    calls = iter(range(10**6))
    clip = AdamW.clip

    def spoil_and_clip(self, max_norm):
        if next(calls) in bad_calls:
            self.clip_order[0].grad[0, 0] = float("nan")
        return clip(self, max_norm)

    monkeypatch.setattr(AdamW, "clip", spoil_and_clip)


def events(run: Small, out: str) -> list[str]:
    lines = (run.folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        e["event"]
        for e in map(json.loads, lines)
        if e.get("event") not in (None, "eval", "checkpoint")
    ]


def test_one_bad_gradient_is_skipped(small, monkeypatch):
    run, _ = small
    plant_nan(monkeypatch, {3})
    assert in_process(run, "nan", "--steps", "6", "--save-every", "0") == 0
    assert events(run, "nan") == ["skipped"]
    weights = GPT.from_pretrained(run.folder / "nan" / "model").state_dict()
    assert all(t.isfinite().all() for t in weights.values())


def test_bad_steps_in_a_row_roll_back_and_their_data_is_left_out(small, monkeypatch, capsys):
    run, _ = small
    plant_nan(monkeypatch, {5, 6, 7})
    assert in_process(run, "roll", "--steps", "10", "--save-every", "4") == 0
    line = ", leaving out the rows 40 to 47, 48 to 55, 56 to 63\n"
    assert line in capsys.readouterr().out
    assert events(run, "roll") == ["skipped", "skipped", "rollback", "rolled_back"]
    saved = checkpoint.read(run.checkpoints("roll") / "step-00000010")
    rows = 8
    assert saved.state["progress"]["skips"] == [[rows * s, rows * (s + 1)] for s in (5, 6, 7)]
    # Ten steps of data, and three more that were left out.
    assert saved.state["progress"]["position"] == rows * 13


def test_a_fresh_start_takes_nothing_from_an_older_run(small, monkeypatch, capsys):
    run, _ = small
    shutil.copytree(run.folder / "calm", run.folder / "afresh")
    plant_nan(monkeypatch, {1, 2, 3})
    flags = ("--resume", "never", "--steps", "6", "--save-every", "5")
    assert in_process(run, "afresh", *flags) == 1
    assert "there is no checkpoint to go back to" in capsys.readouterr().err
    assert not checkpoint.paths(run.checkpoints("afresh"))
    aside = checkpoint.paths(run.folder / "afresh" / "earlier-1" / "checkpoints")
    assert aside[-1].name == f"step-{run.steps:08d}"


def test_guard_gives_up_with_a_report(small, monkeypatch, capsys):
    run, _ = small
    plant_nan(monkeypatch, set(range(2, 100)))
    assert in_process(run, "lost", "--steps", "8", "--save-every", "2") == 1
    assert "no rollbacks are left (3 done)" in capsys.readouterr().err
    assert events(run, "lost").count("rolled_back") == 3


def test_checkpoint_of_another_model_is_refused(small):
    run, _ = small
    saved = checkpoint.read(run.checkpoints("calm") / f"step-{run.steps:08d}")
    model = GPT(Recipe(model=MODEL + ",n_layer=1", block_size=32).model_config)
    optimizer = configure_adamw(model, Recipe(model=MODEL, block_size=32))
    with pytest.raises(CheckpointError, match=r"unknown.*transformer\.h\.1"):
        train.restore(saved, model, optimizer, None)


def test_the_best_is_saved_when_found_and_kept_over_a_resume(small, monkeypatch):
    """No step is both evaluated and due to be saved, as in shakespeare-cpu."""
    run, _ = small
    losses = iter((5.0, 3.0, 4.0, 4.5, 4.4, 9.0, 9.0))
    monkeypatch.setattr(train.Run, "validate", lambda *_: next(losses))
    flags = ("--eval-every", "2", "--save-every", "5", "--keep-last", "1")
    assert in_process(run, "best", *flags, "--steps", "5") == 0  # 5.0, 3.0, and the last one
    assert in_process(run, "best", *flags, "--steps", "9", "--override") == 0
    assert [p.name[-1] for p in checkpoint.paths(run.checkpoints("best"))] == ["4", "9"]
    # Fewer steps than are done: nothing is left to do.
    assert in_process(run, "best", *flags, "--steps", "3", "--override") == 0


# ---- metrics.jsonl is never what a run depends on


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def garble(path):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = b"\0" * len(lines[1]), b'{"step": "two", "loss": []}\n'
    path.write_bytes(b"".join(lines))


DAMAGE = {
    "lost": (lambda p: p.unlink(), "4 of the 4 steps done are missing"),
    "empty": (lambda p: cut(p, 0), "4 of the 4"),
    "short by half a line": (lambda p: cut(p, p.stat().st_size // 2), "of the 4 steps done"),
    "damaged": (garble, "2 of the 4"),
    "of nulls": (lambda p: p.write_bytes(b"\0" * p.stat().st_size), "4 of the 4"),
    "no text": (lambda p: p.write_bytes(b"\xff\xfe" * 4000), "4 of the 4"),
    "nested": (lambda p: p.write_bytes(b"[" * 100_000), "4 of the 4"),
    "another kind": (lambda p: p.write_text('{"a": 1}\n' * 999), "4 of the 4"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_log_that_is_lost_or_damaged_is_said(tmp_path, capsys, what):
    path = tmp_path / "metrics.jsonl"
    one = torch.tensor(1.0)
    with RunLog(tmp_path, 6, 1, lambda _: None) as log:
        for step in range(4):
            log.step(step, 1e-3, 0, one, one)
        log.finish()
        kept = log.num_bytes
        log.step(4, 1e-3, 0, one, one)  # after the last checkpoint
    capsys.readouterr()
    damage, line = DAMAGE[what]
    damage(path)
    with RunLog(tmp_path, 6, 1, lambda _: None, steps_done=4, keep_bytes=kept) as log:
        for step in (4, 5):
            log.step(step, 1e-3, 0, one, one)
        log.finish()
    out = capsys.readouterr().out
    assert line in out
    assert "the run goes on" in out
    steps = [values["step"] for values in read_metrics(path)[0]]
    assert steps[-2:] == [4, 5]


def test_going_on_in_another_folder_and_without_a_log(small, capsys):
    run, _ = small
    flags = ("--override", "--steps", str(run.steps + 1), "--save-every", "0")
    source = ("--resume", str(run.folder / "calm"))
    assert in_process(run, "elsewhere", *flags, *source) == 0
    out = capsys.readouterr().out
    assert f"{run.steps} of the {run.steps} steps done are missing" in out
    summary = json.loads((run.folder / "elsewhere" / "summary.json").read_text())
    assert summary["final_step"] == run.steps + 1
    assert b"\0" not in (run.folder / "elsewhere" / "metrics.jsonl").read_bytes()
