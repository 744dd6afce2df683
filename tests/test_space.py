"""The folder of a Hugging Face Space: it runs by itself and holds nothing private."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.test_demo import SECRET, make_run

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from demo import space  # noqa: E402 - it imports gradio


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space") / "run"
    make_run(folder)
    return folder


# Runs a Space's app.py up to where it would serve; tells what the page would show.
START = """
import json, runpy, sys
import demo.app
built = []
build = demo.app.build
demo.app.build = lambda models: built.append(models) or build(models)
demo.app.launch = lambda page: None
runpy.run_path("app.py")
(models,) = built
panel, examples = demo.app.about(models)
*_, (texts, status) = demo.app.generate(models, "Recite", 0, 0, 1.0, 5, "0", 1)
modules = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps([demo.app.__file__, panel, examples, texts, status, modules]))
"""


def start_space(out: Path) -> list[Any]:
    command, env = [sys.executable, "-c", START], {**os.environ, "PYTHONPATH": ""}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_space_folder_runs_by_itself_and_holds_what_it_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """app.py starts in a process that sees only the folder and the installed packages."""
    out = tmp_path / "space"
    space.main([str(out), "--model", str(run), "--title", 'A "title":\nwith marks'])
    said = capsys.readouterr().out
    assert {line.split(":")[0] for line in said.splitlines()} >= {"weights/", "about.json"}
    front = (out / "README.md").read_text().split("---\n")[1]
    keys = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert keys["sdk"] == "gradio"
    assert keys["app_file"] == "app.py"
    assert keys["sdk_version"] == gr.__version__
    assert json.loads(keys["title"]) == 'A "title": with marks'
    pinned = (out / "requirements.txt").read_text().split()
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in pinned)
    assert "context of 64 tokens" in (out / "README.md").read_text()

    file, panel, examples, texts, status, modules = start_space(out)
    assert Path(file) == out / "demo" / "app.py"
    assert "a-test-recipe" in panel
    assert "<svg" in panel
    assert examples == ["Of my own text"]
    assert "Recite" in texts
    assert "verbatim" not in status
    assert not {"matplotlib", "playwright", "transformers"} & {*modules}
    assert {"torch", "rich", "tyro"} <= {line.split("==")[0] for line in pinned}

    files = [path for path in out.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in files:
        content = path.read_bytes()
        for private in (SECRET, str(tmp_path), str(run)):
            assert private.encode() not in content, path
    code = {"LICENSE", "README.md", "app.py", "requirements.txt"}
    assert {p.name for p in files if p.parent == out} == {".gitattributes", "about.json", *code}


def test_space_with_the_training_text_marks_what_is_recited(run: Path, tmp_path: Path):
    lines = space.write_space(tmp_path / "space", run, training_text=True)
    assert any("training text, " in line for line in lines)
    assert "marked" in (tmp_path / "space" / "README.md").read_text()
    assert (tmp_path / "space" / "weights" / "corpus.txt").read_text().startswith(SECRET)
    with pytest.raises(ValueError, match=r"no corpus.txt lies beside"):
        space.write_space(tmp_path / "other", run / "model" / "model.safetensors", "", True)
    assert not (tmp_path / "other").exists()


def test_space_refuses_what_it_cannot_fill(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """It prints one line and leaves every folder as it was."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "packages" / "demo").mkdir(parents=True)
    monkeypatch.setattr(space, "ROOT", tmp_path / "packages")
    (tmp_path / "link").symlink_to(tmp_path / "packages" / "demo")
    new = str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    weights = tmp_path / "empty" / "runs" / "newest" / "model"
    shutil.copytree(run / "model", weights)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path / "empty")
    for args, message in (
        ([str(tmp_path), "--model", str(run)], "must be a new or empty folder"),
        ([str(tmp_path / "file"), "--model", str(run)], "must be a new or empty folder"),
        (["", "--model", str(run)], "the path is empty"),  # not the working directory
        ([new, "--model", str(tmp_path / "none")], "no such file or folder"),
        ([new, "--model", str(tmp_path / "file")], "expected a folder or a .safetensors file"),
        ([str(tmp_path / "packages" / "demo" / "space"), "--model", str(run)], "must lie outside"),
        ([str(tmp_path / "link" / "space"), "--model", str(run)], "must lie outside"),
        ([str(weights / "sp")], "must lie outside of the model's folder"),
        ([str(weights / "a" / "sp"), "--model", str(weights)], "must lie outside of the model's"),
        ([], ""),
    ):
        with pytest.raises(SystemExit) as stop:
            space.main(args)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.lower().replace("\n", " "), args
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_half_way_leaves_nothing_of_a_space_and_no_link_leads_into_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    strange, secret, out = (tmp_path / name for name in ("strange", "secret.txt", "space"))
    secret.write_text(SECRET)
    shutil.copytree(run, strange)
    for name in ("summary.json", "config.json", "metrics.jsonl", "samples.txt", "corpus.txt"):
        (strange / name).unlink()
        (strange / name).symlink_to(secret)
    for error in (OSError("full"), KeyboardInterrupt()):
        before = sorted(tmp_path.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(space, "write_atomically", Mock(side_effect=error))
            with pytest.raises(type(error)):
                space.write_space(out, strange)
        assert sorted(tmp_path.iterdir()) == before
        out.mkdir(exist_ok=True)  # for the second error, and then for the success
    space.write_space(out, strange)
    assert (out / "app.py").is_file()
    assert sorted(tmp_path.iterdir()) == sorted([secret, out, strange])
    found = [p for p in out.rglob("*") if p.is_file()]
    assert not [p for p in found if p.is_symlink() or SECRET.encode() in p.read_bytes()]


def test_a_space_of_read_only_code_can_be_written_to(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Links in the code are left out: one could lead anywhere."""
    code, out = tmp_path / "code", tmp_path / "space"
    for name in space.SOURCES:
        (code / name / "inner" / "__pycache__").mkdir(parents=True)
        (code / name / "inner" / "__pycache__" / "a.pyc").touch()
        (code / name / "inner" / "a.py").touch()
        (code / name / "link").symlink_to(run)
        (code / name / "link.py").symlink_to(run / "config.json")
        (code / name / "inner").chmod(0o555)
        (code / name).chmod(0o555)
    (code / "LICENSE").touch()
    shutil.copy(space.ROOT / "requirements.txt", code)
    monkeypatch.setattr(space, "ROOT", code)
    space.write_space(out, run)
    for name in space.SOURCES:
        assert [*(out / name).rglob("*")] == [out / name / "inner", out / name / "inner" / "a.py"]
        assert all(p.stat().st_mode & 0o200 for p in (out / name, *(out / name).rglob("*")))
        for folder in (code / name, code / name / "inner"):  # so that it can be removed
            folder.chmod(0o755)
