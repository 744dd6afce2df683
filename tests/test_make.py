"""What the Makefile hands to Python: the words a person wrote, whatever stands in them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Forked, python

ROOT = Path(__file__).parents[1]
STUB = "#!/bin/sh\nprintf '%s\\0' \"$@\"\n"
# A space, both quotes, what a shell and what make expand, a leading dash, a comment, a line break.
NAMES = ["DATA", "OUT", "PRESET", "STEPS", "MODEL", "PROMPT"]
OTHERS = {"OP", "MACHINE", "ARGS", "MFLAGS", "INIT", "TASKS"}
AWKWARD = ["my text.txt", """say "hi" $5, it's $(HOME) `id` $$ \\""", "*", "a#b", "ROMEO:\nJULIET:"]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of the Makefile alone, set up, with a Python that prints its arguments."""
    folder = tmp_path / "a checkout"
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))
    python.write_text(STUB, encoding="utf-8")
    python.chmod(0o755)
    (folder / ".venv" / ".setup").touch()
    (folder / ".venv" / ".setup-dev").touch()
    return folder


def make(checkout: Path, *words: str, **environ: str) -> list[str]:
    """The arguments that Python gets."""
    done = run(checkout, *words, **environ)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


def run(checkout: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    # A `make` around this test must not hand its own variables down.
    given = {k: v for k, v in os.environ.items() if k not in OTHERS.union(NAMES)}
    environ = {k: v for k, v in given.items() if not k.startswith("MAKE")} | environ
    how = {"cwd": checkout, "env": environ, "capture_output": True, "encoding": "utf-8"}
    return subprocess.run(["make", "--silent", *words], check=False, **how)


@pytest.mark.parametrize("value", AWKWARD)
def test_a_value_arrives_as_it_was_written(checkout: Path, value: str) -> None:
    flags = ["--preset", value, "--data", value, "--steps", value, "--out", value]
    given = [f"{name}={value}" for name in NAMES]
    assert make(checkout, "train", *given) == ["train.py", *flags]
    assert make(checkout, "doctor", *given) == ["train.py", "--explain", *flags]
    assert make(checkout, "tune", *given) == ["train.py", "--tune", "only", *flags]
    tuned = ["--preset", "finetune", "--init", value, *flags]
    assert make(checkout, "finetune", f"INIT={value}", *given) == ["train.py", *tuned]
    sample = ["-m", "model.generate", "--model", value, "--prompt", value]
    assert make(checkout, "sample", *given) == sample
    assert make(checkout, "sample", MODEL=value, PROMPT=value) == sample  # from the environment
    assert make(checkout, "demo", *given) == ["-m", "demo.app", "--model", value]
    assert make(checkout, "mutants", f"OP={value}") == ["-m", "tests.mutants", "--op", value]


PIP = """#!/bin/sh
case "$*" in
    "-m pip"*"+cu126"*) echo "$@" >> called; exit {code} ;;
    "-m pip"*) echo "$@" >> called ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize(
    ("card", "found", "installed", "said"),
    [
        ("NVIDIA H100 80GB HBM3, 580.65.06, 9.0", True, [""], ""),
        ("Tesla V100-SXM2-16GB, 580.65, 7.0", True, ["+cu126"],
         "setup: Tesla V100-SXM2-16GB (sm_70, driver 580): torch==2.13.0+cu126 fits, cu130 needs "
         "sm_75 to sm_129; if pip does not find it"),
        ("NVIDIA A100-SXM4-80GB, 535.104.05, 8.0", False, ["+cu126", ""],
         "cu130 needs driver 580 or newer; if pip does not find it, torch==2.13.0 follows"),
        ("NVIDIA A100, 580.1, 8.0\\nTesla P100, 580.1, 6.0", True, ["+cu126"],
         "setup: NVIDIA A100 (sm_80, driver 580) and Tesla P100 (sm_60, driver 580): torch==2.13.0"
         "+cu126 fits, cu130 needs sm_75 to sm_129"),
        ("Tesla T4, 470.2, 7.5\\nTesla T4, 470.2, 7.5", True, [""],
         "setup: Tesla T4 (sm_75, driver 470): no build of torch==2.13.0 fits, cu130 needs driver "
         "580 or newer, cu126 needs driver 525 or newer; the CPU will be"),
        ("NVIDIA B200, 570.2, 10.0", True, [""], "cu126 needs sm_50 to sm_90; the CPU"),
        ("Failed to initialize NVML", True, [""], ""),
        ("NVIDIA \\377 H100, 535.65.06, 9.0 \\r", True, ["+cu126"], "(sm_90, driver 535)"),
    ],
)  # fmt: skip
def test_setup_installs_the_torch_that_fits_the_card(
    checkout: Path, card: str, found: bool, installed: list[str], said: str
) -> None:
    python, smi = checkout / ".venv" / "bin" / "python", checkout / "bin" / "nvidia-smi"
    (checkout / ".venv" / ".setup").unlink()
    for path, text in (
        (python, PIP.format(code=int(not found), python=sys.executable)),
        (smi, f"#!/bin/sh\nprintf '{card}\\n'\n"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    (checkout / "training").mkdir()
    for name in ("__init__.py", "torch_build.py"):
        shutil.copy(ROOT / "training" / name, checkout / "training" / name)
    done = run(checkout, "setup", PATH=f"{smi.parent}:{os.environ['PATH']}")
    assert done.returncode == 0
    *first, rest = (checkout / "called").read_text().splitlines()
    assert [line.partition(" torch==2.13.0")[2] for line in first] == installed
    assert rest.endswith(" -r requirements.txt")
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)


def test_nothing_given_is_nothing_passed(checkout: Path) -> None:
    assert make(checkout, "train") == ["train.py"]
    assert make(checkout, "train", "DATA=", "OUT=") == ["train.py"]
    assert make(checkout, "finetune")[1:] == ["--preset", "finetune", "--init", "gpt2"]
    assert make(checkout, "sample") == ["-m", "model.generate", "--prompt", ""]


def test_a_missing_model_is_said_before_anything_is_installed(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@" >> called\nexit 1\n', encoding="utf-8")
    done = run(checkout, "eval")
    assert done.returncode != 0
    assert "MODEL: must name a model folder" in done.stderr
    assert not (checkout / "called").exists()


def test_args_are_several_words_quoted_as_in_a_shell(checkout: Path) -> None:
    words = ["--seed", "2", "--out", "a b", "$5"]
    assert make(checkout, "train", """ARGS=--seed 2 --out "a b" '$5'""") == ["train.py", *words]


def test_tests_of_one_op_and_of_another_machine(checkout: Path) -> None:
    words = make(checkout, "test", "OP=layer_norm", "MACHINE=fp32", "ARGS=-x")
    assert words[-6:] == ["--machine", "fp32", "tests/test_layer_norm.py", "-x", "-m", "not slow"]
    command = "-m", "pytest", *make(checkout, "test", "OP=foo")[-3:]
    said, code = Forked(python, *command, cwd=ROOT, environment=os.environ).communicate(300)
    assert (code, said.strip().count("\n")) == (4, 0)
    assert "no such file: tests/test_foo.py; the ops are layer_norm, add_layer_norm, " in said


def test_help_names_every_target(checkout: Path) -> None:
    done = run(checkout, "help")
    phony = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].partition("\n.DEFAULT")[0]
    named = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    headings = [line for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert headings[:3] == ["set up", "train and try", "test"]
    assert done.stdout.index("train and try") < done.stdout.index("  finetune ")
    assert {*phony.replace("\\", "").split()} - named == {"setup-dev"}


def test_a_commit_is_checked_by_the_versions_of_make_check() -> None:
    pins = (ROOT / "requirements-dev.txt").read_text().split()
    (ruff,) = (pin for pin in pins if pin.startswith("ruff=="))
    assert (ROOT / ".pre-commit-config.yaml").read_text().count(f"[{ruff}]") == 2
