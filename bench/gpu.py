"""Everything a GPU should settle, in one command that survives being cut off.

    python -m bench.gpu --out DIR --minutes 8
    python -m bench.gpu --out DIR --only numerics,ops,step --tokens shakespeare.bin

Each part runs in a process of its own with its share of the time, so that an illegal access or a
hang in one costs only that one; time a part leaves is shared among those after it. Rows are written
to DIR/result.json as they come, the output of the parts to DIR/log.txt. A short table comes last.
Nothing is downloaded and nothing but torch, triton, numpy and tyro is needed; what is missing costs
its own rows only. `--tokens` is a headerless uint16 token file; without one the training parts read
this project's own source as bytes.

    numerics   every op in fp32, fp16, bf16 against float64, on the device
    ops        each op beside its rivals, with the machine's limits
    step       the whole step beside plain PyTorch, ablation, first step cold and warm
    optimizer  clip and AdamW alone, ours beside torch's
    train      500 steps, Triton ops against eager ops, same seed
    seed       the Shakespeare recipe until its loss is below 0.09, cold and warm caches
    tune       proposals for the launch tables
    tests      the tests of the ops, the optimizer and the step, natively
    sanitizer  compute-sanitizer on every op, and on a planted overrun that it must find
    profile    where a step's time goes; writes DIR/trace.json.gz
    generate   tokens a second of the 124M model
    sweep      each op over sizes, for the plots
"""

import argparse
import contextlib
import gzip
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import baseline, ops, record, step, timing
from bench.cases import CASES, GPU_SHAPES, Shape, find_shape
from kernels import Ops, parse_ops
from model import GPT, MODELS
from training.data import DataLoaderLite, Prefetcher
from training.optim import configure_adamw
from training.plan import detect, make_plan
from training.recipes import PRESETS
from training.step import TrainStep, start_process

# Part -> weight of its share of the time; the order is that of importance and of running.
PARTS: dict[str, float] = {
    "numerics": 1.0,
    "ops": 3.0,
    "step": 3.0,
    "optimizer": 0.3,
    "train": 1.5,
    "seed": 1.5,
    "tune": 2.0,
    "tests": 1.5,
    "sanitizer": 1.0,
    "profile": 0.5,
    "generate": 0.5,
    "sweep": 1.5,
}
MIN_PART_S = 15.0
TRAIN_STEPS = 500
TRAIN_SHAPE = Shape(16, 256)
SEED_TARGET_LOSS = 0.09
SANITIZER_ERROR = 99  # exit code compute-sanitizer is told to use
# Losses of two right implementations drift apart as rounding grows; the yardstick is how far
# compiled eager ops drift from eager ops.
DRIFT_FACTOR = 3.0
MIN_DRIFT = 0.01


@dataclass(frozen=True)
class Job:
    """What a part is given."""

    device: torch.device
    results: record.Results
    out: Path
    tokens: Path | None
    deadline: float  # time.monotonic()

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()


def run_numerics(job: Job) -> None:
    shapes = (Shape(2, 64), Shape(3, 17), Shape(1, 1), Shape(1, 513))
    for dtype_name, dtype in (
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("fp16", torch.float16),
    ):
        for op in CASES:
            for shape in shapes:
                if job.left_s < 0:
                    return
                identity = {"op": op, "shape": shape.label, "dtype": dtype_name}
                try:
                    found = ops.check_numerics(op, shape, dtype, job.device)
                except Exception as error:
                    # A sticky CUDA error fails all that follows: say so and stop here.
                    row = {"result": "error", "holds": False, "error": str(error)[:300]}
                    job.results.add("numerics", identity | row)
                    if "CUDA" in str(error) or "illegal" in str(error):
                        raise
                    continue
                for c in found:
                    row = {"result": c.name, "ours": c.ours, "eager": c.eager, "budget": c.budget}
                    job.results.add("numerics", identity | row | {"holds": c.holds})


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
    for op, case in CASES.items():
        for shape in case.sweep:
            if job.left_s > 0:
                _measure_op(job, op, shape, "both", sweep=True)


def _measure_op(job: Job, op: str, shape: Shape, mode: str, **extra: Any) -> None:
    try:
        rows, _ = ops.measure(op, shape, torch.bfloat16, mode, job.device, seconds=2.0)
    except Exception as error:
        print(f"{op} {mode} {shape.label}: {type(error).__name__}: {error}", flush=True)
        if "CUDA" in str(error):
            raise
        return
    for row in rows:
        if " has no " not in row.get("skip", ""):
            job.results.add("ops", row | extra)
    print(ops.ops_table([row for row in rows if "skip" not in row]), flush=True)


def run_step(job: Job) -> None:
    torch.set_float32_matmul_precision("high")
    large = step.Setup("124m", find_shape("b64t1024"))
    seed = step.Setup("124m", find_shape("b16t64"), accum=4)
    merged = step.Setup("124m", Shape(64, 64))
    main = ["compile bf16", "ours bf16", "eager bf16", "eager fp32"]
    known = step.known_providers(job.device)
    ablation = [name for name in known if name.startswith("ours bf16")]
    todo: list[tuple[str, step.Setup, list[str]]] = [
        ("step", large, main),
        ("step", seed, main[:2]),
        ("step", merged, main[:2]),
        ("ablation", large, ablation),
        *(("step", step.Setup("124m", Shape(B, 1024)), main[:2]) for B in (8, 16, 32, 128)),
        *(("step", step.Setup("124m", Shape(65536 // T, T)), main[:2]) for T in (256, 2048, 4096)),
    ]
    for i, (section, setup, names) in enumerate(todo):
        if i == 3:  # after what matters most
            for name in ("ours bf16", "compile bf16"):
                for row in step.first_step(name, large, job.device):
                    job.results.add("first_step", row)
        if job.left_s > 0:
            try:
                step.run(names, setup, job.device, job.results, section=section, seconds=4.0)
            except Exception as error:
                print(f"{section} {setup}: {type(error).__name__}: {error}", flush=True)


def read_tokens(path: Path | None) -> np.ndarray:
    """Token ids; this project's source as bytes where no file is given."""
    if path is not None:
        return np.fromfile(path, dtype="<u2").astype(np.int64)
    files = sorted((record.ROOT / "kernels").glob("*.py")) + sorted(record.ROOT.glob("bench/*.py"))
    return np.frombuffer(b"".join(f.read_bytes() for f in files), dtype=np.uint8).astype(np.int64)


def text_of(path: Path | None) -> str:
    return path.stem if path else "this project's source as bytes"


def windows(tokens: torch.Tensor, B: int, T: int, micro_rows: int) -> Iterator[step.Batch]:
    """Batches of B rows in text order, as micro-batches of `micro_rows` rows would read them.

    A micro-batch takes micro_rows * T + 1 tokens; the next begins micro_rows * T later, and at the
    start of the text where fewer are left.
    """
    stride = micro_rows * T
    at = 0
    while True:
        parts = []
        for _ in range(B // micro_rows):
            if at + stride + 1 > len(tokens):
                at = 0
            parts.append(tokens[at : at + stride + 1])
            at += stride
        idx = torch.cat([p[:-1].view(micro_rows, T) for p in parts])
        targets = torch.cat([p[1:].view(micro_rows, T) for p in parts])
        yield idx, targets


def losses_of(
    op_set: Ops, job: Job, *, steps: int, compiled: bool, model: str, shape: Shape
) -> list[float]:
    """Losses of a bf16 run from fixed weights on the text, constant rate after 100 steps."""
    torch.manual_seed(1337)
    net = GPT(MODELS[model], op_set).to(job.device)
    call = torch.compile(net) if compiled else net
    optimizer = baseline.make_optimizer(net)
    tokens = torch.from_numpy(read_tokens(job.tokens)).to(job.device)
    losses = []
    for i, (idx, targets) in zip(
        range(steps), windows(tokens, shape.B, shape.T, shape.B), strict=False
    ):
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


def run_optimizer(job: Job) -> None:
    from bench import optimizer

    if optimizer.run("124m", job.device, job.results, seconds=2.0):
        raise RuntimeError("optimizer: the weights of ours and of torch's differ")


def run_train(
    job: Job,
    steps: int = TRAIN_STEPS,
    model: str = "124m",
    shape: Shape = TRAIN_SHAPE,
    ops_spec: str = "triton",
) -> None:
    how: dict[str, Any] = {"steps": steps, "model": model, "shape": shape}
    eager = losses_of(parse_ops("eager"), job, compiled=False, **how)
    ours = losses_of(parse_ops(ops_spec), job, compiled=False, **how)
    compiled = losses_of(parse_ops("eager"), job, compiled=True, **how)
    allowed = max(MIN_DRIFT, DRIFT_FACTOR * drift(eager, compiled))
    found = drift(eager, ours)
    verdict = "within" if found <= allowed else "OUTSIDE"
    job.results.add(
        "train",
        {
            "recipe": f"{steps} steps, {text_of(job.tokens)}, GPT-2 {model}, {shape.label}, bf16",
            "provider": f"{ops_spec} against eager",
            "verdict": f"drift {found:.4f} {verdict} bound {allowed:.4f}",
            "holds": found <= allowed,
            "drift": found,
            "bound": allowed,
            "losses": {
                name: [x[i] for i in range(0, steps, max(1, steps // 25))] + [x[-1]]
                for name, x in (("eager", eager), ("ours", ours), ("compiled", compiled))
            },
        },
    )


def run_seed(job: Job) -> None:
    """The recipe in a fresh process with empty caches, then with the caches it left."""
    with tempfile.TemporaryDirectory() as caches:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        for cache in ("cold", "warm"):
            command = [sys.executable, "-m", "bench.gpu", "--child", "seed-run", "--cache", cache]
            command += ["--out", str(job.out), "--seconds", str(job.left_s - 5)]
            command += ["--tokens", str(job.tokens)] if job.tokens else []
            command += ["--commit", job.results.data["commit"]]
            if code := subprocess.run(command, cwd=record.ROOT, env=env, check=False).returncode:
                print(f"seed: the process with {cache} caches ended with {code}", flush=True)
    job.results.data = record.load(job.results.path)


def run_seed_once(job: Job, cache: str) -> None:
    """The recipe by the plan of this machine; stops at the first loss under the target."""
    start = time.monotonic()
    recipe = PRESETS["shakespeare-124m"]
    plan = make_plan(recipe, detect("cuda"))
    start_process(plan, recipe.seed)
    model = GPT(recipe.model_config, plan.op_set).to(job.device)
    optimizer = configure_adamw(model, recipe, plan.optimizer)
    take_step = TrainStep(model, optimizer, recipe, plan)
    tokens = read_tokens(job.tokens).astype(np.uint16)
    loader = DataLoaderLite(tokens, recipe.rows_per_step, recipe.block_size, recipe.order,
                            wrap_rows=recipe.batch_size)  # fmt: skip
    losses: list[float] = []
    lagging: torch.Tensor | None = None
    first_s = 0.0
    with contextlib.closing(Prefetcher(loader, job.device)) as batches:
        for i in range(recipe.max_steps):
            loss = take_step(batches, recipe.learning_rate(i)).loss.clone()
            if lagging is not None:  # read a step late, so the host does not wait for this step
                losses.append(lagging.item())
            lagging = loss
            if i == 0:
                torch.cuda.synchronize()
                first_s = time.monotonic() - start
            if (losses and losses[-1] < recipe.target_loss) or job.left_s < 0:
                break
    assert lagging is not None
    losses.append(lagging.item())
    seconds = time.monotonic() - start
    reached = min(losses) < SEED_TARGET_LOSS
    rate = (len(losses) - 1) * recipe.tokens_per_step / (seconds - first_s)
    job.results.add(
        "train",
        {
            "recipe": f"{text_of(job.tokens)}, GPT-2 124M, 16x64x4, to loss < {SEED_TARGET_LOSS}",
            "provider": f"{plan.describe().removeprefix('plan: ')}, {cache} caches",
            "verdict": f"loss {losses[-1]:.3f} after {len(losses)} steps"
            + ("" if reached else " (cut off)"),
            "holds": reached,
            "seconds": seconds,
            "first_step_s": first_s,
            "tokens_per_s": rate,
            "curve": {
                i: losses[i] for i in (0, 100, 500, 1000, 1500, 2000, 3000, 4000) if i < len(losses)
            },
        },
    )


def run_tune(job: Job) -> None:
    from bench import tune

    shapes = [find_shape("b64t1024"), find_shape("b16t64")]
    each = job.left_s / (len(tune.KNOBS) * len(shapes))
    tune.run(tune.KNOBS, shapes, job.device, job.results, seconds=each, deadline=job.deadline)


def run_tests(job: Job) -> None:
    """The ops' tests as they stand, on the device; no interpreter."""
    names = [*CASES, "adamw", "step"]
    files = [f"tests/test_{n}.py" for n in names if (record.ROOT / f"tests/test_{n}.py").exists()]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--maxfail=20", "-p", "no:cacheprovider"]
    tail = ""
    try:
        out = subprocess.run(
            [*command, *files], cwd=record.ROOT, env=env, capture_output=True, text=True,
            timeout=max(MIN_PART_S, job.left_s), check=False,
        )  # fmt: skip
        tail, verdict = out.stdout[-6000:], f"exit {out.returncode}"
    except subprocess.TimeoutExpired as cut:
        tail = (cut.stdout or b"").decode()[-6000:]
        verdict = "cut off"
    print(tail, flush=True)
    last = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
    job.results.put("tests", {"verdict": verdict, "last_line": last[-200:], "files": len(files)})


def run_sanitizer(job: Job) -> None:
    """memcheck on every op and on the planted overrun, racecheck on the two with shared tiles."""
    if shutil.which("compute-sanitizer") is None:
        job.results.add("sanitizer", {"tool": "memcheck", "op": "all", "verdict": "not installed"})
        return
    todo = [("memcheck", "planted"), *(("memcheck", op) for op in CASES)]
    todo += [("racecheck", "causal_attention"), ("racecheck", "linear_cross_entropy")]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, op in todo:
        if job.left_s < 0:
            return
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        command += [sys.executable, "-m", "bench.gpu", "--child", f"sanitize:{op}"]
        command += ["--out", str(job.out)]
        try:
            out = subprocess.run(
                command, cwd=record.ROOT, env=env, capture_output=True, text=True,
                timeout=max(MIN_PART_S, job.left_s), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            job.results.add("sanitizer", {"tool": tool, "op": op, "verdict": "cut off"})
            continue
        text = out.stdout + out.stderr
        verdict = sanitizer_verdict(op, out.returncode, text)
        job.results.add("sanitizer", {"tool": tool, "op": op, "verdict": verdict})
        if verdict not in ("clean", "found, as it must be"):
            print(text[-3000:], flush=True)


def sanitizer_verdict(op: str, code: int, text: str) -> str:
    if "not supported" in text.lower():
        return "not supported"
    if code == SANITIZER_ERROR:
        return "found, as it must be" if op == "planted" else "ERRORS"
    if op == "planted":
        return "NOT FOUND"
    return "clean" if code == 0 else f"exit {code}"


def sanitize(op: str, device: torch.device) -> None:
    """What runs under compute-sanitizer: an op's smallest launches, or an overrun."""
    if op == "planted":  # so that a sanitizer that finds nothing is found out
        from bench import overrun

        overrun.run(device)
        return
    for shape in (Shape(1, 17), Shape(2, 64)):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = ops.make_inputs(CASES[op], shape, dtype, device)
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
    from model.generate import Sampling, generate_tokens

    torch.manual_seed(0)
    net = GPT(MODELS["124m"]).to(job.device).eval()
    prompt = [list(range(1000, 1016))]
    for count in (1, 16):
        sampling = Sampling(max_new_tokens=256, temperature=0.8)
        with torch.autocast("cuda", torch.bfloat16):
            generate_tokens(net, prompt * count, sampling)  # compiles and captures what there is
            torch.cuda.synchronize()
            start = time.perf_counter()
            generate_tokens(net, prompt * count, sampling)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        row = {"model": "124m", "provider": f"{count} rows of 256 new tokens, random weights"}
        job.results.add("generate", row | {"tokens_per_s": count * 256 / seconds})


RUN: dict[str, Callable[[Job], None]] = {
    "numerics": run_numerics,
    "ops": run_ops,
    "step": run_step,
    "optimizer": run_optimizer,
    "train": run_train,
    "seed": run_seed,
    "tune": run_tune,
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "profile": run_profile,
    "generate": run_generate,
    "sweep": run_sweep,
}


def shares(names: Sequence[str], left_s: float) -> float:
    """Seconds of the first of the parts still to run."""
    return max(MIN_PART_S, left_s * PARTS[names[0]] / sum(PARTS[name] for name in names))


def summary(data: dict[str, Any]) -> str:
    """The short table that comes last: one line a finding, reds first."""
    lines: list[str] = []
    numerics = data.get("numerics", [])
    if numerics:
        red = [r for r in numerics if not r["holds"]]
        lines.append(
            f"numerics: {len(numerics) - len(red)} of {len(numerics)} within twice eager's error"
        )
        lines += [
            f"  RED {r['op']} {r['shape']} {r['dtype']} {r['result']}: "
            + (r.get("error") or f"{r['ours']:.2e} over {r['budget']:.2e}")
            for r in red[:12]
        ]
    if "tests" in data:
        lines.append(f"tests: {data['tests']['verdict']}, {data['tests']['last_line']}")
    lines += [f"sanitizer {r['tool']} {r['op']}: {r['verdict']}" for r in data.get("sanitizer", [])]
    limits = data.get("limits")
    if limits:
        lines.append("limits: " + ", ".join(f"{k} {v:,.4g}" for k, v in limits.items()))
    throughput = find_shape("b64t1024").label
    for row in data.get("ops", []):
        if row["provider"] == "ours" and row["shape"] == throughput:
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
        lines.append(f"step {row['shape']} x{row['accum']} {row['provider']}: {rate}{over}")
    for row in data.get("first_step", []):
        lines.append(
            f"first step {row['cache']} {row['provider']}: {row.get('first_step_s', 'red')}"
        )
    for row in data.get("train", []):
        seconds = f", {row['seconds']:.1f} s" if "seconds" in row else ""
        lines.append(f"train {row['provider']}: {row['verdict']}{seconds}")
    for row in data.get("tune", []):
        if row["propose"]:
            lines.append(
                f"tune {row['kernel']} {row['shape']}: x{row['gain']:.3f} with {row['best']}"
            )
    for row in data.get("generate", []):
        lines.append(f"generate {row['provider']}: {row['tokens_per_s']:,.0f} tokens/s")
    lines += [f"part {name}: {verdict}" for name, verdict in data.get("parts", {}).items()]
    return "\n".join(lines)


def parse_only(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"gpu: unknown part {name!r}; known: {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]  # in the order of importance


def run_parts(args: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Every part in a child of its own; says of each how it ended."""
    end = time.monotonic() + 60 * args.minutes
    verdicts: dict[str, str] = {}
    child: subprocess.Popen[bytes] | None = None

    def stop(signum: int, frame: Any) -> None:
        if child is not None:
            os.killpg(child.pid, signal.SIGKILL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    with (args.out / "log.txt").open("ab") as log:
        for i, name in enumerate(names):
            left = end - time.monotonic()
            if left < MIN_PART_S:
                verdicts[name] = "no time left"
                continue
            limit = shares(names[i:], left)
            command = [sys.executable, "-m", "bench.gpu", "--child", name, "--out", str(args.out)]
            command += ["--seconds", f"{limit:.0f}"]
            command += ["--tokens", str(args.tokens)] if args.tokens else []
            command += ["--commit", args.commit] if args.commit else []
            log.write(f"\n==== {name}, {limit:.0f} s\n".encode())
            log.flush()
            began = time.monotonic()
            # A session of its own: a part's children end with it.
            child = subprocess.Popen(
                command, cwd=record.ROOT, stdout=log, stderr=log, start_new_session=True
            )
            try:
                # Parts look at the clock between rows; the grace is for the row they are in.
                code = child.wait(timeout=min(limit * 1.3 + 10, end - time.monotonic() + 10))
                verdicts[name] = "done" if code == 0 else f"exit {code}, see log.txt"
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                verdicts[name] = "cut off"
            verdicts[name] += f" ({time.monotonic() - began:.0f} s)"
            print(f"{name}: {verdicts[name]}", flush=True)
    return verdicts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder; at most 8 files are left")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tokens", type=Path, help="uint16 token file for train and seed")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = parse_only(args.only)
    if args.tokens and not args.tokens.is_file():
        raise ValueError(f"gpu: --tokens {args.tokens} does not exist")
    if not torch.cuda.is_available():
        raise ValueError("gpu: torch sees no GPU; `make bench` is what runs without one")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    deadline = time.monotonic() + args.seconds
    if args.child and args.child.startswith("sanitize:"):
        sanitize(args.child.partition(":")[2], device)
        return
    path = args.out / "result.json"
    if args.child:
        job = Job(
            device, record.Results(device, path, args.commit), args.out, args.tokens, deadline
        )
        try:
            if args.child == "seed-run":
                run_seed_once(job, args.cache)
            else:
                RUN[args.child](job)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    record.Results(device, path, args.commit).write()
    verdicts: dict[str, str] = {}
    try:
        verdicts = run_parts(args, names)
    finally:
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
