"""bench.gpu: its commands parse, their rows are kept, and their output is judged rightly."""

import importlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from bench import cli, contestants, gpu, recipe, record
from bench.cases import CASES
from kernels._op import INTERPRETED
from model import MODELS, GPTConfig
from tests import sanitize
from tests.pretend_cuda import pretend_cuda
from training import child, flags
from training.verdicts import Run

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def job(tmp_path: Path) -> gpu.Job:
    (tmp_path / "scratch").mkdir()
    return gpu.Job(tmp_path, None, "0" * 40, tmp_path / "scratch")


class Parsed(Exception):
    """Carries what a command's parser understood, in place of running the command."""


def parse(self: cli.Parser, argv: Sequence[str], *_: Any) -> Any:
    raise Parsed(super(cli.Parser, self).parse_known_args(argv))


def test_every_command_is_understood(job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.Parser, "parse_known_args", parse)
    providers = contestants.known_providers(CUDA)
    values = {"minutes": "0.1", "out": "x.json"}
    seen = set()
    for command in gpu.commands(job):
        argv = [p.format(**values) if p.startswith("{") else p for p in command.argv]
        if argv[1] == "train.py":
            assert flags.parse(argv[2:]).choices.tune == "only"
            continue
        at = argv.index("-m")
        module, rest = argv[at + 1], argv[at + 2 :]
        if module == "pytest":
            assert all((record.ROOT / name).is_file() for name in rest if name.endswith(".py"))
            continue
        if module == "tests.sanitize":
            assert rest[0] in (sanitize.PLANTED, *CASES, "adamw")
            continue
        if "cuda" in rest:  # which is no choice without a GPU
            rest[rest.index("cuda")] = "cpu"
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main(rest)
        options, unknown = parsed.value.args[0]
        assert not unknown
        if found := getattr(options, "provider", None):
            assert {*([found] if isinstance(found, str) else found)} <= {*providers}
        seen.add(module)
    bench = {f"bench.{name}" for name in ("generate", "ops", "profile", "recipe", "step")}
    assert seen == bench | {"tests.numerics"}


def test_each_call_holds_what_it_is_meant_to_hold(job: gpu.Job) -> None:
    todo = [*gpu.commands(job)]
    assert [*dict.fromkeys(command.part for command in todo)] == gpu.PARTS
    for group in gpu.GROUPS:
        wanted = gpu.parse_only(group)
        seconds = [c.seconds for c in todo if c.part in wanted and c.part not in gpu.BESIDE]
        beside = [c.seconds for c in todo if c.part in wanted and c.part in gpu.BESIDE]
        assert sum(seconds) + max(beside, default=0) <= 8.5 * 60
    assert gpu.parse_only("seed,check") == [*gpu.GROUPS["check"], "seed"]


@pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU")
@pytest.mark.parametrize(
    ("cores", "gib", "count"), [(16, 79, 14), (32, 24, 4), (128, 32, 6), (2, 79, 2)]
)
def test_no_more_processes_than_the_card_has_room_for(
    cores: int, gib: int, count: int, job: gpu.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretend_cuda():
        monkeypatch.setattr(gpu, "num_cores", lambda: cores)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gib << 30, 80 << 30))
        assert gpu.at_once() == count
    found = [c.argv for c in gpu.commands(job._replace(at_once=count)) if "-n" in c.argv]
    assert {argv[argv.index("-n") + 1] for argv in found} == {str(max(2, count - 2))}


WRITES = """
import sys, torch
from pathlib import Path
from bench import record
results = record.open_result(torch.device("cpu"), Path(sys.argv[1]), "0" * 40)
results.add("checks", record.CheckRow(check="numerics bf16", what=sys.argv[2], doubt=sys.argv[3]))
raise SystemExit(int(bool(sys.argv[3])))
"""


def test_commands_run_and_their_rows_are_kept(job: gpu.Job) -> None:
    def python(code: str, *more: str) -> list[str]:
        return [sys.executable, "-c", code, *more]

    hang = "print('compiling', flush=True); import time; time.sleep(600)"
    todo = [
        gpu.Command("numerics", 1, python(WRITES, "{out}", "a", "")),
        gpu.Command("numerics", 1, python(WRITES, "{out}", "b", "error 3, allowed 2")),
        gpu.Command("resume", 1, python("print('3 passed')"), partial(gpu.read_tests, "of x")),
        gpu.Command(
            "sanitizer", 1, ["no-such-program", "-m", "x"], partial(gpu.read_sanitizer, "m", "y")
        ),
        gpu.Command("ops", 1, python("raise SystemExit('no such GPU')")),
        gpu.Command("tune", 1e-9, python(hang)),
    ]
    results = record.open_result(CPU, job.out / "result.json", job.commit)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(gpu, "MIN_S", 3.0)
    gpu.run_all(job, todo[:5], 5.0, results)
    gpu.run_all(job, todo[5:], 0.05, results)
    monkey.undo()
    found = record.load(results.path).rows("checks")
    doubts = {(row.check, row.what): row.doubt for row in found}
    assert doubts == {
        ("numerics bf16", "a"): "",
        ("numerics bf16", "b"): "error 3, allowed 2",  # it says itself why it ended with 1
        ("tests", "of x"): "",
        ("m", "y"): "exit 127: no-such-program is not installed",
        ("ends well", "ops: "): "exit 1: no such GPU",
        ("ends well", "tune: "): "timed out",
    }
    log = (job.out / "log.txt").read_text()
    assert "3 passed" in log
    assert "compiling" in log
    assert not list(job.scratch.iterdir())


@pytest.mark.parametrize(
    ("op", "code", "text", "doubt"),
    [
        ("planted", gpu.SANITIZER_ERROR, "", ""),
        ("planted", 0, "", "NOT FOUND"),
        ("layer_norm", 0, "", ""),
        ("layer_norm", gpu.SANITIZER_ERROR, "x is not supported", "ERRORS"),
        ("layer_norm", 1, "Device not supported", "not supported"),
        ("layer_norm", 1, "what\n", "exit 1: what"),
        ("planted", None, "", "timed out"),
    ],
)
def test_sanitizer_verdicts(op: str, code: int | None, text: str, doubt: str) -> None:
    assert gpu.read_sanitizer("memcheck", op, child.Ended(code, text)).doubt == doubt


def test_failed_tests_are_named() -> None:
    text = "tests/test_x.py::a PASSED\nFAILED tests/test_x.py::b - boom\n1 failed, 1 passed in 2s\n"
    row = gpu.read_tests("of the ops", child.Ended(1, text))
    assert row.doubt == "exit 1: 1 failed, 1 passed in 2s; FAILED tests/test_x.py::b - boom"


@pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU")
@pytest.mark.parametrize("op", [*CASES, "adamw"])
def test_what_the_sanitizer_runs(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import linear_cross_entropy

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", linear_cross_entropy.CHUNK_BYTES)
    tiny = GPTConfig(block_size=8, vocab_size=250, n_layer=1, n_head=1, n_embd=64)
    monkeypatch.setitem(MODELS, "smoke", tiny)
    monkeypatch.setattr(sanitize, "SHAPES", (sanitize.Shape(1, 3, C=64, H=1, V=100),))
    launched: list[str] = []
    with pretend_cuda():
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: launched.append(op))
        sanitize.sanitize(op, CUDA)
    assert launched


RUN_TRAIN = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
losses = [5.0, 1.0, 0.05]
with (out / "metrics.jsonl").open("w") as f:
    for i, loss in enumerate(losses):
        f.write(json.dumps({"step": i, "loss": loss, "ms": 1000.0, "tokens_per_s": 4096}) + "\\n")
    f.write(json.dumps({"event": "eval"}) + "\\n")
print("plan: cuda, one CUDA graph")
if "--steps" in sys.argv and "cold" in str(out):
    sys.exit(1)
(out / "summary.json").write_text(json.dumps({"first_step_s": 4.0, "wall_s": 9.0}))
text = "[prompt] To be\\n[model], or\\nnot\\n\\n[prompt] B\\n[model]c\\n\\n"
(out / "samples.txt").write_text(text)
"""


def test_the_recipe_reads_what_train_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the trainer, whose cold run fails after its steps."""
    (tmp_path / "stand_in.py").write_text(RUN_TRAIN)
    run = child.run
    monkeypatch.setattr(
        child, "run", lambda c, *rest: run([c[0], str(tmp_path / "stand_in.py"), *c[2:]], *rest)
    )
    argv = ["--out", str(tmp_path / "x.json"), "--commit", "0" * 40]
    assert recipe.main(["seed", *argv]) == 0
    assert recipe.main(["drift", *argv]) == 0
    result = record.load(tmp_path / "x.json")
    cold, warm = result.rows("seed")
    assert cold.result.startswith("loss 0.050 after 3 steps, exit 1")
    assert (cold.seconds, cold.reached) == (None, True)
    assert (warm.seconds, warm.first_step_s, warm.reached) == (6.0, 4.0, True)
    assert (warm.plan, warm.text) == ("cuda, one CUDA graph", "this project's source")
    assert warm.samples == [{"prompt": "To be", "text": ", or\nnot"}, {"prompt": "B", "text": "c"}]
    [drift] = result.rows("checks")
    assert (drift.check, drift.doubt) == ("losses", "")
    assert drift.found.startswith("drift 0.0000, bound 0.0100; last eager 0.050")


def test_drift_is_of_running_means_and_bounded_by_what_compiling_does() -> None:
    flat, late = [1.0] * 30, [1.0] * 10 + [1.5] * 20
    assert recipe.drift(flat, late) == pytest.approx(0.5)
    assert recipe.curve_of([3.0, 2.0]) == [(0, 3.0), (1, 2.0)]
    assert recipe.curve_of([1.0] * 60)[-1] == (59, 1.0)

    def run(losses: list[float], code: int = 0) -> tuple[Run, child.Ended]:
        return Run({}, {}, [{"loss": x} for x in losses], [], []), child.Ended(code, "boom")

    runs = {"eager": run(flat), "ours": run(late)}
    assert recipe.drift_row(runs, "x").doubt.startswith("drift 0.5000, bound 0.0100")
    half = [1.0] * 10 + [1.25] * 20
    assert recipe.drift_row(runs | {"compiled": run(half)}, "x").doubt == ""
    assert recipe.drift_row(runs | {"ours": run([], 1)}, "x").doubt == "ours: exit 1: boom"


@pytest.mark.parametrize(
    "name", [(what, name) for what in recipe.RUNS for name in recipe.RUNS[what]]
)
def test_train_understands_its_flags(name: tuple[str, str]) -> None:
    flags = recipe.RUNS[name[0]][name[1]]
    cfg = train.parse(["--preset", recipe.PRESET, *flags.split()])
    if name[0] == "drift":
        assert (cfg.recipe.max_steps, cfg.recipe.target_loss) == (recipe.DRIFT_STEPS, 0)
        assert cfg.recipe.tokens_per_step == 16 * 256


@pytest.mark.slow
def test_the_recipe_on_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real trainer, whose run folder is read."""
    run = child.run
    (tmp_path / "text.txt").write_text("all the world's a stage and all the men and women " * 99)

    def small(command: list[str], *rest: Any) -> child.Ended:
        command = [part.replace("shakespeare-124m", "smoke") for part in command]
        small = ["--steps=3", "--device=cpu", "--block-size=32", "--batch-size=2"]
        return run([*command, *small], *rest)

    monkeypatch.setattr(child, "run", small)
    argv = ["seed", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "x.json")]
    recipe.main(argv)
    for row in record.load(tmp_path / "x.json").rows("seed"):
        assert (row.steps, row.reached, row.text) == (3, False, "text"), row
        assert row.first_step_s < row.seconds
        assert len(row.samples) > 0


def test_the_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("To be, or not to be")
    assert recipe.text_of(tmp_path / "a.txt") == "a"
    assert json.dumps(recipe.text_of(None)) == '"this project\'s source"'
