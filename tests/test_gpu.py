"""bench.gpu: its parts run to their end on a pretended GPU, its processes and verdicts for real."""

import dataclasses
import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import gpu, record, step, timing
from bench.cases import CASES, Shape
from kernels._op import INTERPRETED
from model import GPTConfig
from tests import numerics
from tests.pretend_cuda import pretend_cuda

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU")
CUDA = torch.device("cuda")
TINY = GPTConfig(block_size=32, vocab_size=250, n_layer=1, n_head=1, n_embd=16)


def make_job(out: Path, device: torch.device = CUDA, seconds: float = 600.0) -> gpu.Job:
    results = record.Results(device, out / "result.json", "0" * 40)
    return gpu.Job(device, results, out, None, time.monotonic() + seconds)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[gpu.Job]:
    """A pretended GPU on which every model is tiny and every shape small."""
    for name in [*step.MODELS]:
        monkeypatch.setitem(step.MODELS, name, TINY)
    small = partial(Shape, C=16, H=1, V=250)
    monkeypatch.setattr(gpu, "NUMERICS_SHAPES", (small(2, 3),))
    monkeypatch.setattr(gpu, "NUM_RERUNS", 1)
    monkeypatch.setattr(gpu, "Shape", lambda *size, **_: small(1, min(size[1], 8)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for a few elements, threads only wait for one another
    with pretend_cuda():
        yield make_job(tmp_path)
    torch.set_num_threads(threads)


def here(job: gpu.Job, commands: dict[str, list[str]], env: Any = None):
    """What `fan_out` does, without processes: numerics prints its rows."""
    for name in commands:
        _, op, dtypes = name.split(":")
        rows = gpu.check_numerics(op, dtypes, job.device)
        yield name, gpu.Ended(0, "".join(f"ROW {json.dumps(row)}\n" for row in rows))


@interpreted_only
def test_numerics_part(job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "fan_out", here)
    monkeypatch.setattr(numerics, "DTYPES", {"bf16": torch.bfloat16})
    gpu.run_numerics(job)
    rows = job.results.rows("numerics")
    assert {(r["op"], r["dtype"]) for r in rows} == {(o, d) for o in CASES for d in numerics.DTYPES}
    assert all(row["holds"] for row in rows), [row for row in rows if not row["holds"]]
    assert sum(row["result"] == "1 reruns" for row in rows) == len(CASES)


@interpreted_only
def test_reruns_see_a_bit_that_moves(job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter([1.0, 1.0, 1.0 + 2**-20])
    monkeypatch.setattr(gpu.ops, "find_provider", lambda *_: lambda **args: args["x"] * next(steps))
    assert gpu.reruns_that_differ("layer_norm", Shape(1, 2, C=16), "fp32", CUDA, 2) == 1


def fail_in(name: str, ended: gpu.Ended):
    def run(job: gpu.Job, commands: dict[str, list[str]], env: Any = None):
        yield from ((n, ended if n == name else gpu.Ended(0, "")) for n in commands)

    return run


@interpreted_only
def test_a_process_that_dies_is_a_red_row(job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = gpu.Ended(-11, "CUDA error: an illegal memory access was encountered\n")
    monkeypatch.setattr(gpu, "fan_out", fail_in("numerics:gelu_mlp:bf16", ended))
    gpu.run_numerics(job)
    [row] = job.results.rows("numerics")
    assert (row["op"], row["dtype"], row["holds"]) == ("gelu_mlp", "bf16", False)
    assert "illegal memory access" in row["error"]
    assert "RED gelu_mlp" in gpu.summary(job.results.data)


def test_ops_and_sweep_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured, in which order; how is in tests/test_bench_gpu.py."""
    asked: list[tuple[str, str, str]] = []

    def measure(
        op: str, shape: Shape, dtype: Any, mode: str, device: Any, providers: Any, **_: Any
    ):
        asked.append((op, shape.label, mode))
        row = {"op": op, "shape": shape.label, "dtype": "bf16", "mode": mode}
        figures = {"ms": 1.0, "cov": 0.0, "noisy": False, "gbs": 1.0, "of_limit": 0.5}
        return [row | {"provider": "ours"} | figures,
                row | {"provider": "liger", "skip": f"liger has no {op}"}], {}  # fmt: skip

    monkeypatch.setattr(gpu.ops, "measure", measure)
    monkeypatch.setattr(timing, "limits", lambda device: {"copy_gbs": 1.0})
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_ops(job)
    assert {(op, mode) for op, _, mode in asked} == {(o, m) for o in CASES for m in CASES[o].modes}
    assert {label for _, label, _ in asked[: len(CASES)]} == {"B=64 T=1024"}
    assert len(job.results.rows("ops")) == len(asked)  # a rival that cannot do an op has no row
    gpu.run_sweep(job)
    swept = [row for row in job.results.rows("ops") if row.get("sweep")]
    assert {row["op"] for row in swept} == {*CASES}
    assert "op layer_norm both: 1.000 ms" in gpu.summary(job.results.data)


def test_step_part_takes_what_matters_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which contestants at which sizes; how they are timed is in tests/test_bench_gpu.py."""
    asked: list[tuple[str, str, int, tuple[str, ...]]] = []

    def run(names: Any, setup: step.Setup, device: Any, results: Any, *, section: str, **_: Any):
        asked.append((section, setup.shape.label, setup.accum, tuple(names)))

    monkeypatch.setattr(step, "run", run)
    known = step.known_providers(CUDA)
    gpu.run_step(make_job(tmp_path, torch.device("cpu")))
    monkeypatch.setattr(step, "known_providers", lambda _: known)
    asked.clear()
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_step(job)
    twins = ("compile bf16", "ours bf16")
    assert asked[:3] == [("step", "B=64 T=1024", 1, twins), ("step", "B=16 T=64", 4, twins),
                         ("step", "B=64 T=64", 1, twins)]  # fmt: skip
    assert {name for *_, names in asked for name in names} <= {*known}
    [ablation] = [names for section, _, _, names in asked if section == "ablation"]
    assert {f"ours bf16, {op}=eager" for op in CASES} < {*ablation}
    asked.clear()
    gpu.run_step(dataclasses.replace(job, deadline=0.0))
    assert asked == []


@interpreted_only
def test_generate_part(job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from model import sampling

    real = sampling.Sampling
    monkeypatch.setattr(sampling, "Sampling", lambda temperature, **_: real(3, temperature))
    monkeypatch.setattr(gpu, "PROMPT", [1, 2, 3])
    gpu.run_generate(job)
    rows = job.results.rows("generate")
    assert len(rows) == 4
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert "generate 16 rows" in gpu.summary(job.results.data)


def test_profile_and_optimizer_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import optimizer, profile

    def trace_step(name: str, setup: step.Setup, device: Any, steps: int, trace: Path):
        trace.write_text(name)
        return [profile.KindRow("GEMM", 1.0, 0.5, 3)], [("a_kernel", 1.0, 3)]

    monkeypatch.setattr(profile, "trace_step", trace_step)
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_profile(job)
    assert {r["provider"] for r in job.results.rows("profile")} == {"ours bf16", "compile bf16"}
    assert gzip.decompress((tmp_path / "trace.json.gz").read_bytes()) == b"ours bf16"
    monkeypatch.setattr(optimizer, "run", lambda *_, **__: 1)
    with pytest.raises(RuntimeError, match="optimizer: "):
        gpu.run_optimizer(job)


@interpreted_only
def test_train_part(job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.run_train(job, 3, "124m", Shape(1, 8), "triton,linear_cross_entropy=eager")
    [row] = job.results.rows("train")
    assert row["kind"] == "drift"
    assert row["holds"], row
    assert {*row["losses"]} == {"eager", "ours", "compiled"}
    assert "within bound" in gpu.summary(job.results.data)


def test_drift_is_of_running_means() -> None:
    assert gpu.drift([1.0] * 30, [1.0] * 10 + [1.5] * 20) == pytest.approx(0.5)
    assert gpu.curve_of([3.0, 2.0]) == [(0, 3.0), (1, 2.0)]
    assert gpu.curve_of([1.0] * 60)[-1] == (59, 1.0)


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
if "--steps" in sys.argv:
    sys.exit(1)
(out / "summary.json").write_text(json.dumps({"first_step_s": 4.0, "wall_s": 9.0}))
text = "[prompt] To be\\n[model], or\\nnot\\n\\n[prompt] B\\n[model]c\\n\\n"
(out / "samples.txt").write_text(text)
"""


def test_seed_part_reads_what_train_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer is stood in for; the cold run fails after its steps, the warm one ends well."""
    script = tmp_path / "stand_in.py"
    script.write_text(RUN_TRAIN)
    run = gpu.run_process
    monkeypatch.setattr(
        gpu, "run_process",
        lambda c, *rest: run([c[0], str(script), *c[2:]], *rest),
    )  # fmt: skip
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_seed(job)
    cold, warm = job.results.rows("train")
    assert (cold["cache"], cold["verdict"]) == ("cold", "loss 0.050 after 3 steps, exit 1")
    assert "seconds" not in cold
    assert (warm["seconds"], warm["first_step_s"], warm["reached"]) == (6.0, 4.0, True)
    assert warm["provider"] == "cuda, one CUDA graph"
    assert warm["samples"] == [{"prompt": "To be", "text": ", or\nnot"}, {"prompt": "B",
                               "text": "c"}]  # fmt: skip
    assert (tmp_path / "seed-samples.txt").exists()
    assert "warm loss 0.050" in gpu.summary(job.results.data)


@pytest.mark.slow
def test_seed_part_on_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags it gives are flags the trainer has, and its run folder is the one that is read."""
    run = gpu.run_process

    def small(command: list[str], *rest: Any) -> gpu.Ended:
        command = [part.replace("shakespeare-124m", "smoke") for part in command]
        text = tmp_path / "text.txt"
        text.write_text("all the world's a stage and all the men and women merely players " * 99)
        at = command.index("--data")
        return run([*command[:at], "--data", str(text), "--steps", "3", "--device", "cpu",
                    "--block-size", "32", "--batch-size", "2"], *rest)  # fmt: skip

    monkeypatch.setattr(gpu, "run_process", small)
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_seed(job)
    for row in job.results.rows("train"):
        assert (row["steps"], row["reached"]) == (3, False), row
        assert row["first_step_s"] < row["seconds"] < row["wall_s"]
        assert len(row["samples"]) > 0
    assert {path.name for path in tmp_path.glob("seed-*")} == {
        "seed-loss.png", "seed-samples.txt", "seed-report.html"}  # fmt: skip


def test_tests_and_resume_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "tests/test_x.py::a PASSED\nFAILED tests/test_x.py::b - boom\n1 failed, 1 passed in 2s\n"
    commands: list[list[str]] = []

    def run(command: list[str], *_: Any) -> gpu.Ended:
        commands.append(command)
        return gpu.Ended(1 if "gpu" in command else 0, text)

    monkeypatch.setattr(gpu, "run_process", run)
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_tests(job)
    gpu.run_resume(job)
    assert job.results.data["tests"]["verdict"] == "exit 0; exit 1"
    assert job.results.data["tests"]["failed"] == ["FAILED tests/test_x.py::b - boom"] * 2
    assert job.results.data["resume"]["verdict"] == "exit 1"
    files = {part for command in commands for part in command if part.endswith(".py")}
    assert all((record.ROOT / name).is_file() for name in files)
    assert "FAILED tests/test_x.py::b" in gpu.summary(job.results.data)


def test_sanitizer_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: gpu.Job, commands: dict[str, list[str]], env: Any):
        assert env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        for name in commands:
            code = {"memcheck planted": gpu.SANITIZER_ERROR, "racecheck adamw": None}.get(name, 0)
            yield name, gpu.Ended(code, "")

    monkeypatch.setattr(gpu, "fan_out", run)
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "compute-sanitizer")
    job = make_job(tmp_path, torch.device("cpu"))
    gpu.run_sanitizer(job)
    verdicts = {(r["tool"], r["op"]): r["verdict"] for r in job.results.rows("sanitizer")}
    assert len(verdicts) == 1 + 2 * (len(CASES) + 1)
    assert verdicts["memcheck", "planted"] == "found, as it must be"
    assert verdicts["racecheck", "adamw"] == "cut off"
    assert verdicts["racecheck", "gelu_mlp"] == "clean"


@pytest.mark.parametrize(
    ("op", "code", "text", "verdict"),
    [
        ("planted", gpu.SANITIZER_ERROR, "", "found, as it must be"),
        ("planted", 0, "", "NOT FOUND"),
        ("layer_norm", gpu.SANITIZER_ERROR, "x is not supported", "ERRORS"),
        ("layer_norm", 1, "Device not supported", "not supported"),
        ("layer_norm", 1, "", "exit 1"),
        ("layer_norm", None, "", "cut off"),
    ],
)
def test_sanitizer_verdicts(op: str, code: int | None, text: str, verdict: str) -> None:
    assert gpu.sanitizer_verdict(op, code, text) == verdict


@interpreted_only
@pytest.mark.parametrize("op", [*CASES, "adamw"])
def test_what_the_sanitizer_runs(op: str, job: gpu.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import linear_cross_entropy

    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", linear_cross_entropy.CHUNK_BYTES)
    launched: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: launched.append(op))
    gpu.sanitize(op, CUDA)
    assert launched


def test_a_process_that_outlasts_its_time_ends_with_its_children(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    ended = gpu.run_process([sys.executable, "-c", script], 3.0)
    assert ended.code is None
    assert time.monotonic() - began < 30
    for _ in range(50):
        if not alive(int(ended.text)):
            return
        time.sleep(0.1)
    raise AssertionError("the child lives on")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_fan_out_gives_each_command_s_result(tmp_path: Path) -> None:
    job = make_job(tmp_path, torch.device("cpu"))
    commands = {str(i): [sys.executable, "-c", f"print({i}); exit({i})"] for i in range(3)}
    found = dict(gpu.fan_out(job, commands, dict(os.environ)))
    assert {name: (e.code, e.text.strip()) for name, e in found.items()} == {
        "0": (0, "0"), "1": (1, "1"), "2": (2, "2")}  # fmt: skip


def test_parts_share_the_time() -> None:
    names = gpu.parse_only("seed,check")
    slots = gpu.slots_of(names)
    beside = ["numerics", "tests", "sanitizer", "resume"]
    assert slots == [beside, ["profile"], ["generate"], ["seed"]]
    weights = [240, 100, 40, 170]
    assert gpu.share_s(slots, 550.0) == pytest.approx(550 * weights[0] / sum(weights))
    assert gpu.share_s(slots[3:], 200.0) == 200.0
    assert gpu.share_s(slots, 20.0) == gpu.MIN_PART_S
    assert {*gpu.RUN} == {*gpu.PARTS}
    for group in ("check", "tune", "final"):  # each call holds what it is meant to hold
        parts = gpu.slots_of(gpu.parse_only(group))
        assert sum(max(gpu.PARTS[n].seconds for n in slot) for slot in parts) <= 8.5 * 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "numerics,speed"], "unknown part 'speed'; known: check, final, tune, numerics"),
        (["--data", "nowhere.txt"], "--data nowhere.txt does not exist"),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--minutes", "nan"], "--minutes must be more than 0, got nan"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        gpu.main(["--out", str(tmp_path), *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="torch sees no GPU"):
        gpu.main(["--out", str(tmp_path)])


@interpreted_only
def test_parts_write_files_of_their_own_and_one_comes_of_them(
    job: gpu.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes are real; what they run is stood in for."""
    body = (
        "import sys, time; from bench import record; import torch; name = sys.argv[2];"
        "from tests.pretend_cuda import pretend_cuda\n"
        "with pretend_cuda():\n"
        "    import pathlib; out = pathlib.Path(sys.argv[4])\n"
        "    r = record.Results(torch.device('cuda'), out / f'part-{name}.json', '0' * 40)\n"
        "    r.add('sanitizer', {'tool': name, 'op': 'x', 'verdict': 'clean'})\n"
        "    if name == 'resume': time.sleep(60)\n"
        "    sys.exit(3 if name == 'sanitizer' else 0)\n"
    )
    real = gpu.subprocess.Popen

    def popen(command: list[str], **how: Any):
        if [*command[1:4]] != ["-m", "bench.gpu", "--child"]:  # git, nvidia-smi
            return real(command, **how)
        how["env"] = os.environ | {"TRITON_INTERPRET": "1"}
        return real([sys.executable, "-c", body, *command[3:]], **how)

    monkeypatch.setattr(gpu.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu, "MIN_PART_S", 1.0)
    monkeypatch.setitem(gpu.PARTS, "profile", gpu.Part("check", 1e-3))
    arguments = ["--out", str(job.out), "--commit", "0" * 40, "--minutes", "0.3", "--only",
                 "tests,sanitizer,resume,profile"]  # fmt: skip
    gpu.main(arguments)
    data = record.load(job.out / "result.json")
    assert {row["tool"] for row in data["sanitizer"]} >= {"tests", "sanitizer", "resume"}
    assert data["parts"]["tests"].startswith("done")
    assert data["parts"]["sanitizer"].startswith("exit 3")
    assert data["parts"]["resume"].startswith("cut off")
    assert not list(job.out.glob("part-*"))
    assert len(list(job.out.iterdir())) <= 8


def test_windows_begin_again_where_too_little_is_left() -> None:
    tokens = torch.arange(25)
    stream = gpu.windows(tokens, B=2, T=5)
    first, second, third = (next(stream) for _ in range(3))
    assert first[0].tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert torch.equal(first[1], first[0] + 1)
    assert second[0][0, 0] == 10
    assert torch.equal(third[0], first[0])


def test_token_ids_of_a_text_and_of_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("To be, or not to be: that is the question. " * 20)
    ids = gpu.token_ids(tmp_path / "a.txt")
    assert len(ids) > 100
    assert ids.max() > 255
    assert gpu.token_ids(None).dtype == np.uint8
    assert gpu.text_of(tmp_path / "a.txt") == "a"
    shared = record.ROOT.parent / "shared/data/input.txt"
    if shared.is_file():
        assert gpu.text_of(shared) == "tiny Shakespeare"
