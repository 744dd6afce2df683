"""The folder of a run: who holds it, what a stranger's may hold, what becomes of an earlier run."""

import errno
import fcntl
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import train
from tests.faults import ROOT
from training import checkpoint, folder
from training.checkpoint import Checkpoint, CheckpointError, Writer
from training.data import SHAKESPEARE_SHA256, Corpus
from training.recipes import find_preset
from training.shards import TokenShards


def open_once(path: Path, saved: Checkpoint | None = None) -> list[str]:
    """Open and close a run folder; what was said."""
    lines: list[str] = []
    with folder.opened(path, saved, lines.append):
        pass
    return lines


def write_checkpoint(run: Path, step: int) -> Checkpoint:
    saved = Checkpoint(step, {"model": {"w": torch.full((2,), float(step))}}, {})
    return checkpoint.read(checkpoint.write(run / "checkpoints", saved))


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "from training.folder import opened; import os; from pathlib import Path\n"
        f"with opened(Path({str(tmp_path)!r}), None, print): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, timeout=600)
    assert (tmp_path / "run.lock").read_text().strip().isdigit()
    assert open_once(tmp_path) == []


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        folder.opened(tmp_path, None, print),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()}"),
        folder.opened(tmp_path, None, print),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (line,) = open_once(tmp_path)
    assert "this file system has no locks" in line
    assert "a second process" in line


# ---- a stranger's folder

LED_AWAY = """run.lock stopped metrics.jsonl config.json samples.txt summary.json loss.png
    report.html checkpoints model tensorboard model/config.json model/model.safetensors
    checkpoints/step-00000004 checkpoints/.writing-step-00000008-1"""


@pytest.mark.parametrize("name", shlex.split(LED_AWAY))
@pytest.mark.parametrize("kind", ["file", "folder", "nothing", "pipe"])
def test_a_folder_that_leads_elsewhere_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    away, entry = tmp_path / "away", tmp_path / "run" / name
    entry.parent.mkdir(parents=True)
    if kind == "folder":
        away.mkdir()
    elif kind == "file":
        away.write_text("mine")
    os.mkfifo(entry) if kind == "pipe" else entry.symlink_to(away)
    with pytest.raises(ValueError, match=f"{name} is a link, a pipe or"):
        open_once(tmp_path / "run")
    assert entry.is_symlink() != (kind == "pipe")  # and there as it was
    assert kind != "file" or away.read_text() == "mine"
    assert kind != "folder" or not any(away.iterdir())


def test_what_is_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "stopped", "corpus.txt", "report.html"):
        (tmp_path / "a" / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"{name} is a link, a pipe or of another kind"):
            open_once(tmp_path / "a")
        (tmp_path / "a" / name).rmdir()
    (tmp_path / "a" / "model").touch()
    with pytest.raises(ValueError, match="model is a link, a pipe or of another kind"):
        open_once(tmp_path / "a")


def test_a_run_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert open_once(tmp_path / "run") == []
    assert (tmp_path / "disk" / "run.lock").is_file()


# ---- an earlier run


def test_a_fresh_start_moves_an_earlier_run_aside(tmp_path: Path) -> None:
    for n in (1, 2):
        write_checkpoint(tmp_path, n)
        for name in ("metrics.jsonl", "config.json", "notes.md"):
            (tmp_path / name).write_text(f"{name} {n}")
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        (line,) = open_once(tmp_path)
        assert "checkpoints, model, metrics.jsonl, config.json of an earlier run moved to" in line
        aside = tmp_path / f"earlier-{n}"
        assert [p.name[-1] for p in checkpoint.paths(aside / "checkpoints")] == [str(n)]
        assert (aside / "metrics.jsonl").read_text() == f"metrics.jsonl {n}"
        assert (aside / "model" / "config.json").is_file()
    kept = {"earlier-1", "earlier-2", "notes.md", "run.lock"}
    assert {p.name for p in tmp_path.iterdir()} == kept
    assert open_once(tmp_path) == []


def test_going_on_from_an_older_checkpoint_moves_the_newer_ones_aside(tmp_path: Path) -> None:
    steps = [write_checkpoint(tmp_path, step) for step in (4, 8, 12)]
    (tmp_path / "metrics.jsonl").write_text("lines")
    (line,) = open_once(tmp_path, steps[1])
    assert "step-00000012 of an earlier run" in line
    assert [p.name[-2:] for p in checkpoint.paths(tmp_path / "checkpoints")] == ["04", "08"]
    assert (tmp_path / "earlier-1" / "checkpoints" / "step-00000012" / "state.json").is_file()
    assert (tmp_path / "metrics.jsonl").read_text() == "lines"
    assert open_once(tmp_path, steps[1]) == []


def test_going_on_from_elsewhere_moves_what_is_here_aside(tmp_path: Path) -> None:
    elsewhere = write_checkpoint(tmp_path / "a", 4)
    write_checkpoint(tmp_path / "b", 8)
    (line,) = open_once(tmp_path / "b", elsewhere)
    assert "checkpoints of an earlier run" in line
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert checkpoint.read(tmp_path / "a" / "checkpoints" / "step-00000004").step == 4


def test_a_model_folder_that_would_be_refused_at_the_end_is_refused_now(tmp_path: Path) -> None:
    saved = write_checkpoint(tmp_path, 4)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"model must be .* an earlier export.*'notes\.txt'"):
        open_once(tmp_path, saved)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_files_that_no_run_wrote_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model, config\.json, which no run wrote"):
        open_once(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    assert not (tmp_path / "earlier-1").exists()


def test_a_checkpoint_that_was_being_replaced_is_found_and_put_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    here = tmp_path / "checkpoints"
    (here / "step-00000004").rename(here / ".writing-replaced-step-00000004")
    saved = checkpoint.newest_good(here, print)
    assert saved is not None
    assert open_once(tmp_path, saved) == []
    assert [p.name for p in here.iterdir()] == ["step-00000004"]


# ---- a file system that lacks a call


def sample(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.ones(3)}}, {})


def write_three(path: Path) -> list[str]:
    lines: list[str] = []
    writer = Writer(path, 2, lines.append)
    for step in (1, 2, 3):
        writer.submit(sample, step)
    writer.submit(sample, 3)  # as after a rollback
    writer.finish()
    Writer(path / "none", 2, print).finish()  # nothing was to be written
    assert [p.name for p in sorted(path.iterdir())] == ["step-00000002", "step-00000003"]
    assert checkpoint.read(path / "step-00000003").step == 3
    return lines


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EACCES])
@pytest.mark.parametrize("of", ["folders", "files"])
def test_without_fsync_checkpoints_are_written_and_it_is_said_once(
    tmp_path: Path, monkeypatch, number: int, of: str
) -> None:
    fsync = os.fsync

    def refuse(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (of == "folders"):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    (line,) = write_three(tmp_path)
    assert "this file system does not fsync" in line
    assert "a power cut may" in line


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EXDEV, errno.EPERM])
def test_without_rename_checkpoints_are_copied(tmp_path: Path, monkeypatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "rename", refuse)
    (line,) = write_three(tmp_path)
    assert "this file system does not rename folders" in line


def test_a_disk_error_is_not_mistaken_for_a_missing_call(tmp_path: Path, monkeypatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    lines: list[str] = []
    monkeypatch.setattr(os, "fsync", refuse)
    writer = Writer(tmp_path, 2, lines.append)
    writer.submit(sample, 1)
    with pytest.raises(
        CheckpointError, match=r"none could be written: step 1 .*output error: '.*s'"
    ):
        writer.finish()
    assert "training goes on, last good one: none" in lines[0]
    assert not list(tmp_path.iterdir())


# ---- the same through train.py


def run_here(text: Path, out: Path, *flags: str) -> int:
    command = "--preset smoke --model smoke,n_embd=16,n_head=1 --device cpu --no-compile"
    return train.main([*command.split(), "--data", str(text), "--out", str(out), *flags])


def test_a_run_that_could_save_nothing_does_not_end_as_if_it_had(
    text: Path, tmp_path: Path, monkeypatch, capsys, brief
) -> None:
    def full(path: Path, data: bytes, say: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_file", full)
    assert run_here(text, tmp_path / "run", "--steps", "2") == 1
    err = capsys.readouterr().err
    assert "checkpoint: none could be written: step 2 could not be written" in err
    assert "No space left on device" in err
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()  # all that can be is there


def test_a_restart_of_a_job_that_was_asked_to_stop_leaves_at_once(
    text: Path, tmp_path: Path, monkeypatch, brief
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "stopped").touch()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run_here(text, run, "--steps", "2") == 75
    assert not (run / "metrics.jsonl").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # a new job goes on
    assert run_here(text, run, "--steps", "2") == 0
    assert not (run / "stopped").exists()


def test_a_strangers_folder_and_a_bad_checkpoint_are_one_line(
    text: Path, tmp_path: Path, capsys
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(victim)
    assert run_here(text, tmp_path / "run") == 2
    assert run_here(text, tmp_path / "new", "--resume", str(victim)) == 2
    assert run_here(text, tmp_path / "new", "--resume", str(tmp_path / "absent")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["train.py", "run"],
        ["train.py", f"checkpoint {victim}"],
        ["train.py", f"checkpoint {tmp_path / 'absent'}"],
    ]
    assert victim.read_text() == "mine"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("preset", "corpus", "sha256", "name"),
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
    preset: str, corpus: str, sha256: str, name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no runs
    text = Corpus(TokenShards([]), corpus, sha256)
    assert folder.name(None, preset, text) == Path("runs", name)
    assert folder.name("there", preset, text) == Path("there")


def test_full_disk_is_seen_before_training(text: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    usage = Mock(side_effect=OSError(38, "Function not implemented"))
    monkeypatch.setattr(folder.shutil, "disk_usage", usage)
    folder.make(tmp_path / "not counted", find_preset("smoke"))
    usage.side_effect = lambda _: Mock(total=1 << 30, free=4096)
    assert run_here(text, tmp_path / "new" / "run") == 2
    assert "4,096 bytes free, the model alone needs" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
