"""Everything a GPU should settle, in three commands that survive being cut off.

    python -m bench.gpu --out DIR --only check     are the kernels right, does every part run
    python -m bench.gpu --out DIR --only tune      each op beside its rivals; better launch rows
    python -m bench.gpu --out DIR --only final     the whole step, the recipe, the comparisons
    python -m bench.gpu --out DIR --only numerics,seed --data input.txt --minutes 4

Each part runs in a process of its own with its share of the time, so that an illegal access or a
hang in one costs only that one; time a part leaves is shared among those after it. Nothing is timed
while parts that only check run side by side. Rows go to DIR/result.json as a part ends, the output
of the parts to DIR/log.txt; a short table comes last. `python -m bench.report --merge` makes one
file of several calls on one kind of device.

Nothing is downloaded; torch, triton, numpy, tyro and pytest are needed, and what else is missing
costs its own rows only. `--data` is a text or uint16 token file; without one the training parts
read this project's own source.

    numerics   every op in fp32, TF32, fp16, bf16 against float64, and 50 times the same bits
    tests      the tests of the ops, the optimizer and the step, natively
    sanitizer  compute-sanitizer on every op, and on a planted overrun that it must find
    resume     runs killed and resumed on the device, bitwise
    profile    where a step's time goes; writes DIR/trace.json.gz
    generate   tokens a second of the 124M model
    ops        each op beside its rivals, with the machine's limits
    tune       proposals for the launch tables
    step       the whole step beside plain PyTorch, and with one thing at a time switched back
    seed       train.py on the Shakespeare recipe until its loss is below 0.09, cold and warm caches
    train      500 steps, Triton ops against eager ops, same seed
    optimizer  clip and AdamW alone, ours beside torch's
    sweep      each op over sizes, for the plots
"""

import argparse
import gzip
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import baseline, ops, record, step, timing
from bench.cases import CASES, GPU_SHAPES, Shape, find_shape, make_inputs
from kernels import Ops, parse_ops
from model import GPT, MODELS
from tests import numerics
from training.data import SHAKESPEARE_SHA256, load_corpus
from training.metrics import read_metrics


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Args:
        group: Which of the three calls it belongs to.
        seconds: What it takes on an H100 or H200 and 16 cores: an estimate until it has run there,
            and the weight of its share of the time.
        beside: It checks and times nothing, so it runs beside its neighbours.
    """

    group: str
    seconds: float
    beside: bool = False


# In the order of running; within a call what matters most comes first.
PARTS: dict[str, Part] = {
    "numerics": Part("check", 120, beside=True),
    "tests": Part("check", 240, beside=True),
    "sanitizer": Part("check", 240, beside=True),
    "resume": Part("check", 150, beside=True),
    "profile": Part("check", 100),
    "generate": Part("check", 40),
    "ops": Part("tune", 200),
    "tune": Part("tune", 290),
    "step": Part("final", 180),
    "seed": Part("final", 170),
    "train": Part("final", 100),
    "optimizer": Part("final", 20),
    "sweep": Part("final", 40),
}
MIN_PART_S = 15.0
TRAIN_STEPS = 500
TRAIN_SHAPE = Shape(16, 256)
SEED_TARGET_LOSS = 0.09
COLD_STEPS = 100  # of the seed recipe with cold caches: the start is what differs
CURVE_EVERY = 25
NUM_RERUNS = 50
PROMPT = [*range(1000, 1016)]
SANITIZER_ERROR = 99  # exit code compute-sanitizer is told to use
# Losses of two right implementations drift apart as rounding grows; the yardstick is how far
# compiled eager ops drift from eager ops.
DRIFT_FACTOR = 3.0
MIN_DRIFT = 0.01
# What is most likely to fail on hardware first: the recipe's short rows and narrow heads, then
# rows cut by a tile, one token, the large launch rows, several chunks of the loss, wide heads.
NUMERICS_SHAPES = (
    Shape(16, 64), Shape(2, 64, C=384), Shape(3, 17), Shape(1, 1), Shape(64, 1024),
    Shape(2, 200, H=6),
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a part is given."""

    device: torch.device
    results: record.Results
    out: Path
    data: Path | None
    deadline: float  # time.monotonic()

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Ended:
    """A process that has ended; `code` is None where it was cut off."""

    code: int | None
    text: str


def run_process(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Run to the end or to the limit; nothing it started outlives it."""
    with subprocess.Popen(
        command, cwd=record.ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        try:
            text, _ = process.communicate(timeout=max(1.0, seconds))
            return Ended(process.returncode, text)
        except subprocess.TimeoutExpired:
            end_session(process.pid)
            text, _ = process.communicate()
            return Ended(None, text)
        finally:
            end_session(process.pid)


def end_session(pid: int) -> None:
    """Kill whatever is left of a process and its children."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def fan_out(
    job: Job, commands: Mapping[str, Sequence[str]], env: Mapping[str, str] | None = None
) -> Iterator[tuple[str, Ended]]:
    """Run commands side by side; each with its result, as they end."""
    workers = max(2, (os.cpu_count() or 2) - 2)
    with ThreadPoolExecutor(workers) as pool:
        running = {
            pool.submit(lambda c=command: run_process(c, job.left_s, env)): name
            for name, command in commands.items()
        }
        for done in as_completed(running):
            yield running[done], done.result()


def child(name: str, job: Job, *more: str) -> list[str]:
    """Command of a process that does one task of a part and prints what it found."""
    return [sys.executable, "-m", "bench.gpu", "--child", name, "--out", str(job.out),
            "--seconds", f"{job.left_s:.0f}", *more]  # fmt: skip


def run_numerics(job: Job) -> None:
    """An op and a dtype in each process; the loss in one, since its float64 logits are large."""
    alone = "linear_cross_entropy"
    tasks = [f"numerics:{op}:{d}" for op in CASES if op != alone for d in numerics.DTYPES]
    tasks += [f"numerics:{alone}:{','.join(numerics.DTYPES)}"]
    for name, ended in fan_out(job, {task: child(task, job) for task in tasks}):
        rows = [line[4:] for line in ended.text.splitlines() if line.startswith("ROW ")]
        for row in rows:
            job.results.add("numerics", json.loads(row))
        if ended.code != 0:
            _, op, dtype = name.split(":")
            last = (ended.text.strip().splitlines() or ["nothing said"])[-1]
            why = "cut off" if ended.code is None else f"exit {ended.code}: {last}"
            row = {"op": op, "shape": "", "dtype": dtype, "result": "the process", "holds": False}
            job.results.add("numerics", row | {"error": why[:300]})
            print(f"==== {name}\n{ended.text[-3000:]}", flush=True)


def check_numerics(op: str, dtypes: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Rows of one op: each result against float64, then the same bits again and again."""
    for dtype in dtypes.split(","):
        for shape in NUMERICS_SHAPES:
            cut = ops.check_shape(op, shape, device)
            heads = "" if cut.H == 12 else f" H={cut.H}"
            identity = {"op": op, "shape": cut.label + heads, "dtype": dtype}
            try:
                found = ops.check_numerics(op, shape, dtype, device)
            except Exception as error:
                row = {"result": "error", "holds": False, "error": str(error)[:300]}
                yield identity | row
                if timing.is_fatal(error):
                    raise
                continue
            for c in found:
                row = {"result": c.name, "ours": c.ours, "eager": c.eager, "budget": c.budget}
                yield identity | row | {"holds": c.holds}
        differing = reruns_that_differ(op, Shape(4, 1024), dtype, device)
        yield {
            "op": op, "shape": Shape(4, 1024).label, "dtype": dtype,
            "result": f"{NUM_RERUNS} reruns", "ours": differing, "eager": 0, "budget": 0,
            "holds": differing == 0,
        }  # fmt: skip


def reruns_that_differ(
    op: str, shape: Shape, dtype: str, device: torch.device, times: int = NUM_RERUNS
) -> int:
    """How many of some reruns give another bit; a race shows here before it shows in an error."""
    with numerics.precision(dtype) as known:
        inputs = make_inputs(CASES[op], shape, known, device)
        tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        rest = {k: v for k, v in inputs.items() if k not in tensors}
        ours = ops.find_provider("ours", op, device)

        def once() -> dict[str, Tensor]:
            return numerics.values_and_grads(lambda **args: ours(**args, **rest), tensors)

        first = once()
        again = (once() for _ in range(times))
        return sum(any(not torch.equal(first[k], found[k]) for k in first) for found in again)


def run_ops(job: Job) -> None:
    job.results.put("limits", timing.limits(job.device))
    # Throughput shape of every op first; within an op the direction that sums it up.
    for shape_name in GPU_SHAPES:
        for mode in ("both", "fwd", "bwd"):
            for op, case in CASES.items():
                if mode in case.modes and job.left_s > 0:
                    _measure_op(job, op, find_shape(shape_name), mode)


def run_sweep(job: Job) -> None:
    job.results.put("limits", timing.limits(job.device))
    # Compiling plain PyTorch anew for each size would take most of the time.
    providers = tuple(name for name in ops.PROVIDERS if name != "compile")
    for op, case in CASES.items():
        for shape in case.sweep:
            if job.left_s > 0:
                _measure_op(job, op, shape, "both", providers, sweep=True)


def _measure_op(
    job: Job, op: str, shape: Shape, mode: str, providers: Sequence[str] = ops.PROVIDERS,
    **extra: Any,
) -> None:  # fmt: skip
    rows, _ = ops.measure(
        op, shape, torch.bfloat16, mode, job.device, providers=providers, seconds=2.0
    )
    for row in rows:
        if " has no " not in row.get("skip", ""):
            job.results.add("ops", row | extra)
    print(ops.ops_table([row for row in rows if "skip" not in row]), flush=True)


def run_step(job: Job) -> None:
    large = step.Setup("124m", find_shape("b64t1024"))
    seed = step.Setup("124m", find_shape("b16t64"), accum=4)
    merged = step.Setup("124m", Shape(64, 64))
    twins = ["compile bf16", "ours bf16"]
    ablation = [name for name in step.known_providers(job.device) if name.startswith("ours bf16")]
    todo: list[tuple[str, step.Setup, list[str]]] = [
        ("step", large, twins),
        ("step", seed, twins),
        ("step", merged, twins),
        ("step", large, ["eager bf16", "eager fp32"]),
        ("ablation", large, ablation),
        *(("step", step.Setup("124m", Shape(B, 1024)), twins) for B in (8, 16, 32)),
        *(("step", step.Setup("124m", Shape(65536 // T, T)), twins) for T in (256, 2048, 4096)),
    ]
    for section, setup, names in todo:
        if job.left_s > 0:
            step.run(names, setup, job.device, job.results, section=section, seconds=4.0)


def token_ids(data: Path | None) -> np.ndarray:
    """The token ids of a text or token file; this project's source as bytes where none is given."""
    if data is not None:
        return np.asarray(load_corpus((str(data),)).tokens)
    files = sorted((record.ROOT / "kernels").glob("*.py")) + sorted(record.ROOT.glob("bench/*.py"))
    return np.frombuffer(b"".join(f.read_bytes() for f in files), dtype=np.uint8)


def text_of(data: Path | None) -> str:
    """What is trained on, in words; the report asks for tiny Shakespeare by name."""
    if data is None:
        return "this project's source"
    is_shakespeare = hashlib.sha256(data.read_bytes()).hexdigest() == SHAKESPEARE_SHA256
    return "tiny Shakespeare" if is_shakespeare else data.stem


def windows(tokens: Tensor, B: int, T: int) -> Iterator[step.Batch]:
    """Batches of B rows in text order; from the start again where fewer tokens are left."""
    stride, at = B * T, 0
    while True:
        if at + stride + 1 > len(tokens):
            at = 0
        part = tokens[at : at + stride + 1]
        yield part[:-1].view(B, T), part[1:].view(B, T)
        at += stride


def losses_of(
    op_set: Ops, job: Job, *, steps: int, compiled: bool, model: str, shape: Shape
) -> list[float]:
    """Losses of a bf16 run from fixed weights on the text, constant rate after 100 steps."""
    torch.manual_seed(1337)
    net = GPT(MODELS[model], op_set).to(job.device)
    call = torch.compile(net) if compiled else net
    optimizer = baseline.make_optimizer(net)
    tokens = torch.from_numpy(token_ids(job.data).astype(np.int64)).to(job.device)
    losses = []
    for i, (idx, targets) in zip(range(steps), windows(tokens, shape.B, shape.T), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = baseline.LEARNING_RATE * min(1.0, (i + 1) / 100)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.device.type == "cuda"):
            loss = call(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), baseline.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def drift(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference of the running means over 20 steps."""
    kernel = np.ones(min(20, len(a))) / min(20, len(a))
    smooth = [np.convolve(np.asarray(x), kernel, mode="valid") for x in (a, b)]
    return float(np.abs(smooth[0] - smooth[1]).max())


def run_train(
    job: Job,
    steps: int = TRAIN_STEPS,
    model: str = "124m",
    shape: Shape = TRAIN_SHAPE,
    ops_spec: str = "triton",
) -> None:
    """Ours against eager; the bound is what compiling alone does to the losses."""
    how: dict[str, Any] = {"steps": steps, "model": model, "shape": shape}
    losses = {"eager": losses_of(parse_ops("eager"), job, compiled=False, **how)}
    losses["ours"] = losses_of(parse_ops(ops_spec), job, compiled=False, **how)
    recipe = f"{steps} steps, {text_of(job.data)}, GPT-2 {model}, {shape.label}, bf16"
    allowed = MIN_DRIFT
    for yardstick in (False, True):
        if yardstick:  # a row stands already, should this not come to its end
            losses["compiled"] = losses_of(parse_ops("eager"), job, compiled=True, **how)
            allowed = max(MIN_DRIFT, DRIFT_FACTOR * drift(losses["eager"], losses["compiled"]))
        found = drift(losses["eager"], losses["ours"])
        verdict = "within" if found <= allowed else "OUTSIDE"
        row = {
            "kind": "drift", "recipe": recipe, "provider": f"{ops_spec} against eager",
            "verdict": f"drift {found:.4f} {verdict} bound {allowed:.4f}",
            "holds": found <= allowed, "drift": found, "bound": allowed,
            "losses": {name: curve_of(x) for name, x in losses.items()},
        }  # fmt: skip
        job.results.add("train", row)


def curve_of(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss) of every so many steps, and of the last."""
    steps = {*range(0, len(losses), CURVE_EVERY), len(losses) - 1}
    return [(i, losses[i]) for i in sorted(steps) if i >= 0]


def run_seed(job: Job) -> None:
    """`train.py` itself, in a fresh process: empty caches and few steps, then full ones to the end.

    The cold run differs in its start alone, so it is not taken to the end.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        for cache, flags in (("cold", ["--steps", str(COLD_STEPS)]), ("warm", [])):
            run = Path(folder) / cache
            command = [sys.executable, "train.py", "--preset", "shakespeare-124m", "--out",
                       str(run), "--save-every", "0", "--resume", "never", *flags]  # fmt: skip
            data = [str(job.data)] if job.data else sorted(map(str, record.ROOT.glob("*/*.py")))
            ended = run_process([*command, "--data", *data], job.left_s - 5, env)
            print(ended.text[-4000:], flush=True)
            row = seed_row(run, cache, ended)
            recipe = f"{text_of(job.data)}, GPT-2 124M, 16x64x4, to loss < {SEED_TARGET_LOSS}"
            job.results.add("train", {"kind": "seed", "recipe": recipe, "cache": cache, **row})
        for name in ("loss.png", "samples.txt", "report.html"):
            if (run / name).is_file():
                shutil.copy(run / name, job.out / f"seed-{name}")


def seed_row(run: Path, cache: str, ended: Ended) -> dict[str, Any]:
    """What a run folder says of a run, finished or not."""
    steps = read_metrics(run / "metrics.jsonl")[0]
    how = "cut off" if ended.code is None else f"exit {ended.code}"
    if not steps:
        return {"provider": "train.py", "verdict": f"no step, {how}", "reached": False, "red": how}
    plan = next((x for x in ended.text.splitlines() if x.startswith("plan: ")), "train.py")
    losses = [x["loss"] for x in steps]
    reached = min(losses) < SEED_TARGET_LOSS
    summary = run / "summary.json"
    facts = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    row: dict[str, Any] = {
        "provider": plan.removeprefix("plan: "),
        "verdict": f"loss {losses[-1]:.3f} after {len(losses)} steps"
        + ("" if ended.code == 0 else f", {how}"),
        "reached": reached, "steps": len(losses), "final_loss": losses[-1],
        "tokens_per_s": float(np.median([x["tokens_per_s"] for x in steps[5:] or steps])),
        "curve": curve_of(losses),
    }  # fmt: skip
    if facts:
        row |= {
            "first_step_s": facts["first_step_s"],
            "seconds": facts["first_step_s"] + sum(x["ms"] for x in steps[1:]) / 1e3,
            "wall_s": facts["wall_s"],
            "samples": read_samples(run / "samples.txt"),
        }
    return row


def read_samples(path: Path) -> list[dict[str, str]]:
    """Prompts and continuations of a run's samples.txt."""
    if not path.is_file():
        return []
    parts = ("\n" + path.read_text(encoding="utf-8")).split("\n[prompt] ")[1:]
    pairs = (part.partition("\n[model]")[::2] for part in parts)
    return [{"prompt": prompt, "text": text.strip("\n")} for prompt, text in pairs]


def run_optimizer(job: Job) -> None:
    from bench import optimizer

    if optimizer.run("124m", job.device, job.results, seconds=2.0):
        raise RuntimeError("optimizer: one failed, or the weights of ours and of torch's differ")


def run_tune(job: Job) -> None:
    from bench import tune

    shapes = [find_shape("b64t1024"), find_shape("b16t64")]
    each = job.left_s / (len(tune.KNOBS) * len(shapes))
    tune.run(tune.KNOBS, shapes, job.device, job.results, seconds=each, deadline=job.deadline)


OP_TESTS = [f"tests/test_{name}.py" for name in (*CASES, "adamw", "backends")]
GPU_TESTS = ["tests/test_step.py", "tests/test_generate.py", "tests/test_bench.py"]


def run_tests(job: Job) -> None:
    """The tests as they stand, on the device; no interpreter."""
    ended = [_pytest(job, OP_TESTS, "not slow"), _pytest(job, GPU_TESTS, "gpu")]
    failed = [line for e in ended for line in e.text.splitlines()
              if line.startswith(("FAILED", "ERROR"))]  # fmt: skip
    verdicts = ["cut off" if e.code is None else f"exit {e.code}" for e in ended]
    job.results.put(
        "tests",
        {
            "verdict": "; ".join(verdicts),
            "last_line": "; ".join(last_line(e.text) for e in ended),
            "failed": [line[:300] for line in failed[:40]],
        },
    )


def run_resume(job: Job) -> None:
    ended = _pytest(job, ["tests/test_resume.py"], "gpu")
    verdict = {0: "bitwise", None: "cut off"}.get(ended.code, f"exit {ended.code}")
    job.results.put("resume", {"verdict": verdict, "last_line": last_line(ended.text)})


def _pytest(job: Job, files: Sequence[str], marked: str) -> Ended:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") and len(files) > 1:
        command += ["-n", str(max(2, (os.cpu_count() or 2) - 4))]
    ended = run_process([*command, "-m", marked, *files], job.left_s, env)
    print(ended.text[-8000:], flush=True)
    return ended


def last_line(text: str) -> str:
    return next((x for x in reversed(text.splitlines()) if x.strip()), "nothing said")[-200:]


def run_sanitizer(job: Job) -> None:
    """memcheck and racecheck on every op and AdamW, memcheck on the planted overrun."""
    if shutil.which("compute-sanitizer") is None:
        job.results.add("sanitizer", {"tool": "memcheck", "op": "all", "verdict": "not installed"})
        return
    todo = [("memcheck", "planted")]
    todo += [(tool, op) for tool in ("memcheck", "racecheck") for op in (*CASES, "adamw")]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    how = ["--error-exitcode", str(SANITIZER_ERROR), "--target-processes", "all"]
    commands = {
        f"{tool} {op}": ["compute-sanitizer", "--tool", tool, *how, *child(f"sanitize:{op}", job)]
        for tool, op in todo
    }
    for name, ended in fan_out(job, commands, env):
        tool, op = name.split()
        verdict = sanitizer_verdict(op, ended.code, ended.text)
        job.results.add("sanitizer", {"tool": tool, "op": op, "verdict": verdict})
        if verdict not in ("clean", "found, as it must be"):
            print(f"==== {name}\n{ended.text[-3000:]}", flush=True)


def sanitizer_verdict(op: str, code: int | None, text: str) -> str:
    if code is None:
        return "cut off"
    if code == SANITIZER_ERROR:
        return "found, as it must be" if op == "planted" else "ERRORS"
    if "not supported" in text.lower():
        return "not supported"
    if op == "planted":
        return "NOT FOUND"
    return "clean" if code == 0 else f"exit {code}"


def sanitize(op: str, device: torch.device) -> None:
    """What runs under compute-sanitizer: small launches of every row of an op, or an overrun."""
    if op == "planted":  # so that a sanitizer that finds nothing is found out
        from bench import overrun

        overrun.run(device)
        return
    if op == "adamw":
        from bench import optimizer

        optimizer.make_step("triton", "smoke", True, device)[0]()
        torch.cuda.synchronize()
        return
    from kernels import linear_cross_entropy

    V = 1000  # the head's tiles are the same at 50,257, which takes minutes here
    linear_cross_entropy.CHUNK_BYTES = 128 * 1024 * 4  # several chunks, as at full size
    shapes = [Shape(1, 17, V=V), Shape(2, 64, V=V), Shape(1, 200, V=V), Shape(4, 1024, 64, 1, V)]
    for shape in shapes:  # the last has the launch rows of 4,096 rows and more
        for dtype in (torch.bfloat16, torch.float32):
            inputs = make_inputs(CASES[op], shape, dtype, device)
            ops.make_call(ops.find_provider("ours", op, device), CASES[op], "both", inputs)()
    torch.cuda.synchronize()


def run_profile(job: Job) -> None:
    from bench import profile

    torch.set_float32_matmul_precision("high")
    setup = step.Setup("124m", find_shape("b64t1024"))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ours bf16", "compile bf16"):
            trace = Path(folder) / "trace.json"
            rows, longest = profile.trace_step(name, setup, job.device, 2, trace)
            profile.save(job.results, name, setup, rows)
            print(name, profile.profile_table(rows), sep="\n")
            print(
                *(f"{ms:9.3f} ms {count:5d} x {key[:90]}" for key, ms, count in longest), sep="\n"
            )
            if name == "ours bf16":
                packed = gzip.compress(trace.read_bytes())
                if len(packed) < 8 << 20:
                    (job.out / "trace.json.gz").write_bytes(packed)


def run_generate(job: Job) -> None:
    from model.decoder import generate_tokens
    from model.sampling import Sampling

    sampling = Sampling(max_new_tokens=256, temperature=0.8)
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        net = GPT(MODELS["124m"]).to(job.device, dtype).eval()
        for count in (1, 16):
            generate_tokens(net, [PROMPT] * count, sampling)  # loads kernels, captures
            torch.cuda.synchronize()
            start = time.perf_counter()
            generate_tokens(net, [PROMPT] * count, sampling)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            name = str(dtype).removeprefix("torch.")
            provider = f"{count} rows of 256 new tokens, {name}, random weights"
            row = {"model": "124m", "provider": provider, "tokens_per_s": count * 256 / seconds}
            job.results.add("generate", row)


RUN: dict[str, Callable[[Job], None]] = {
    "numerics": run_numerics,
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "resume": run_resume,
    "profile": run_profile,
    "generate": run_generate,
    "ops": run_ops,
    "tune": run_tune,
    "step": run_step,
    "seed": run_seed,
    "train": run_train,
    "optimizer": run_optimizer,
    "sweep": run_sweep,
}


def slots_of(names: Sequence[str]) -> list[list[str]]:
    """Parts that run at the same time: neighbours that only check, and each other one alone."""
    slots: list[list[str]] = []
    for beside, group in groupby(names, key=lambda name: PARTS[name].beside):
        slot = [*group]
        slots += [slot] if beside else [[name] for name in slot]
    return slots


def share_s(slots: Sequence[Sequence[str]], left_s: float) -> float:
    """Seconds of the first of the slots still to run."""
    weights = [max(PARTS[name].seconds for name in slot) for slot in slots]
    return max(MIN_PART_S, left_s * weights[0] / sum(weights))


def summary(data: dict[str, Any]) -> str:
    """The short table that comes last: one line a finding, reds first."""
    lines: list[str] = []
    rows = data.get("numerics", [])
    if rows:
        red = [r for r in rows if not r["holds"]]
        lines.append(f"numerics: {len(rows) - len(red)} of {len(rows)} within twice eager's error")
        lines += [
            f"  RED {r['op']} {r['shape']} {r['dtype']} {r['result']}: "
            + (r.get("error") or f"{r['ours']:.2e} over {r['budget']:.2e}")
            for r in red[:12]
        ]
    if "tests" in data:
        lines.append(f"tests: {data['tests']['verdict']}, {data['tests']['last_line']}")
        lines += [f"  {line[:150]}" for line in data["tests"].get("failed", [])[:12]]
    if "resume" in data:
        lines.append(f"resume: {data['resume']['verdict']}")
    lines += [f"sanitizer {r['tool']} {r['op']}: {r['verdict']}" for r in data.get("sanitizer", [])]
    limits = data.get("limits")
    if limits:
        lines.append("limits: " + ", ".join(f"{k} {v:,.4g}" for k, v in limits.items()))
    throughput = find_shape("b64t1024").label
    for row in data.get("ops", []):
        if row["provider"] == "ours" and row["shape"] == throughput and not row.get("sweep"):
            if "ms" not in row:
                lines.append(f"op {row['op']} {row['mode']}: {row.get('red') or row.get('skip')}")
                continue
            over = f", x{row['over_compile']:.2f} compile" if "over_compile" in row else ""
            rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gbs']:,.0f} GB/s"
            lines.append(
                f"op {row['op']} {row['mode']}: {row['ms']:.3f} ms, {rate}, "
                f"{100 * row['of_limit']:.0f}% of limit{over}"
            )
    for row in data.get("step", []):
        rate = f"{row['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in row else row["red"]
        over = f", x{row['over_compile_bf16']:.2f} compile" if "over_compile_bf16" in row else ""
        peak = f", {row['peak_gib']:.1f} GiB" if row.get("peak_gib") else ""
        lines.append(f"step {row['shape']} x{row['accum']} {row['provider']}: {rate}{over}{peak}")
    for row in data.get("train", []):
        parts = [f"train {row.get('cache', '')} {row['verdict']}".replace("  ", " ")]
        parts += [f"{name} {row[name]:,.1f}" for name in ("seconds", "first_step_s", "tokens_per_s")
                  if name in row]  # fmt: skip
        lines.append(", ".join(parts))
    for row in data.get("tune", []):
        if row.get("propose"):
            lines.append(
                f"tune {row['kernel']} {row['shape']}: x{row['gain']:.3f} with {row['best']}"
            )
    for row in data.get("generate", []):
        lines.append(f"generate {row['provider']}: {row['tokens_per_s']:,.0f} tokens/s")
    lines += [f"part {name}: {verdict}" for name, verdict in data.get("parts", {}).items()]
    return "\n".join(lines)


def parse_only(text: str) -> list[str]:
    """Parts by name or by group, in the order of running."""
    groups = {part.group for part in PARTS.values()}
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PARTS and name not in groups:
            known = ", ".join([*sorted(groups), *PARTS])
            raise ValueError(f"gpu: unknown part {name!r}; known: {known}")
    return [name for name, part in PARTS.items() if name in names or part.group in names]


def part_file(out: Path, name: str) -> Path:
    """Where a part keeps its rows while it runs: parts side by side must not share a file."""
    return out / f"part-{name}.json"


def run_parts(args: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Every part in a child of its own; says of each how it ended."""
    end = time.monotonic() + 60 * args.minutes
    verdicts: dict[str, str] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}

    def stop(signum: int, frame: Any) -> None:
        for process in running.values():
            end_session(process.pid)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    slots = slots_of(names)
    with (args.out / "log.txt").open("ab") as log:
        for i, slot in enumerate(slots):
            left = end - time.monotonic()
            if left < MIN_PART_S:
                verdicts |= dict.fromkeys(slot, "no time left")
                continue
            limit = share_s(slots[i:], left)
            log.write(f"\n==== {', '.join(slot)}, {limit:.0f} s\n".encode())
            log.flush()
            began = time.monotonic()
            for name in slot:
                command = [sys.executable, "-m", "bench.gpu", "--child", name]
                command += ["--out", str(args.out), "--seconds", f"{limit:.0f}"]
                command += ["--data", str(args.data)] if args.data else []
                command += ["--commit", args.commit] if args.commit else []
                # A session of its own: what a part started ends with it.
                running[name] = subprocess.Popen(
                    command, cwd=record.ROOT, stdout=log, stderr=log, start_new_session=True
                )
            # Parts look at the clock between rows; the grace is for the row they are in.
            until = min(began + limit * 1.2 + 15, end + 10)
            for name in slot:
                process = running.pop(name)
                try:
                    code = process.wait(timeout=max(0.1, until - time.monotonic()))
                    verdict = "done" if code == 0 else f"exit {code}, see log.txt"
                except subprocess.TimeoutExpired:
                    verdict = "cut off"
                end_session(process.pid)
                process.wait()
                verdicts[name] = f"{verdict} ({time.monotonic() - began:.0f} s)"
                print(f"{name}: {verdicts[name]}", flush=True)
            take_rows(args.out, slot)
    return verdicts


def take_rows(out: Path, names: Sequence[str]) -> None:
    """Move the rows of parts that have ended into the result file."""
    files = [path for path in (part_file(out, name) for name in names) if path.exists()]
    if files:
        record.merge(files, out / "result.json")
    for path in files:
        path.unlink()


def do_child(args: argparse.Namespace, device: torch.device) -> None:
    """A part, or one task of a part."""
    kind, _, rest = args.child.partition(":")
    if kind == "sanitize":
        sanitize(rest, device)
        return
    if kind == "numerics" and rest:
        op, _, dtypes = rest.partition(":")
        for row in check_numerics(op, dtypes, device):
            print(f"ROW {json.dumps(row)}", flush=True)
        return
    deadline = time.monotonic() + args.seconds
    results = record.Results(device, part_file(args.out, kind), args.commit)
    results.write()
    RUN[kind](Job(device, results, args.out, args.data, deadline))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder; at most 8 files are left")
    parser.add_argument("--only", default=",".join(PARTS), help="parts or groups, comma-separated")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--data", type=Path, help="text or uint16 token file for train and seed")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = parse_only(args.only)
    if args.data and not args.data.is_file():
        raise ValueError(f"gpu: --data {args.data} does not exist")
    if not (args.minutes > 0 and math.isfinite(args.minutes)):
        raise ValueError(f"gpu: --minutes must be more than 0, got {args.minutes}")
    if not torch.cuda.is_available():
        raise ValueError("gpu: torch sees no GPU; `make bench` is what runs without one")
    if not (args.child or args.commit) and record.git_state()[0] == "unknown":
        raise ValueError("gpu: git is not at hand here; say what is measured with --commit")
    args.out = args.out.resolve()
    args.data = args.data and args.data.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    if args.child:
        try:
            do_child(args, device)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    path = args.out / "result.json"
    record.Results(device, path, args.commit).write()
    verdicts: dict[str, str] = {}
    try:
        verdicts = run_parts(args, names)
    finally:
        take_rows(args.out, names)
        data = record.load(path)
        data["command"] = record.command_line()
        data["parts"] = data.get("parts", {}) | verdicts
        path.write_text(record.dumps(data))
        print("\n" + summary(data), flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
