"""Runs of train.py, timed from outside: `python -m bench.recipe seed`, or `drift`.

seed    The Shakespeare recipe with cold caches, for a few steps, as only the start differs; then
        with warm caches, until its loss is below the target.
drift   500 steps of one seed with eager ops, with Triton ops and with compiled eager ops: how far
        the losses drift apart. What compiling alone does shows how much is rounding.

Without `--data` they read this project's own source.
"""

import hashlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench import cli, record
from bench.record import CheckRow, Row, SeedRow
from training import child
from training.data import SHAKESPEARE_SHA256
from training.recipes import PRESETS
from training.verdicts import Run, read_run, read_samples

PRESET = "shakespeare-124m"
DRIFT_STEPS = 500
DRIFT_FLAGS = f"--steps {DRIFT_STEPS} --batch-size 16 --block-size 256 --grad-accum-steps 1"
RUNS = {  # what train.py is given beside the preset
    "seed": {"cold": "--steps 100", "warm": ""},
    "drift": {
        "eager": f"{DRIFT_FLAGS} --target-loss 0 --ops eager --no-compile",
        "ours": f"{DRIFT_FLAGS} --target-loss 0 --ops triton --no-compile",
        "compiled": f"{DRIFT_FLAGS} --target-loss 0 --ops eager --compile",
    },
}
CURVE_EVERY = 25
DRIFT_FACTOR = 3.0  # times as far as compiled eager ops drift from eager ops
MIN_DRIFT = 0.01

Trained = tuple[Run, child.Ended]  # what a run's folder holds, and how the process ended


def text_of(data: Path | None) -> str:
    """Name of the text; the report looks for "tiny Shakespeare"."""
    if data is None:
        return "this project's source"
    is_shakespeare = hashlib.sha256(data.read_bytes()).hexdigest() == SHAKESPEARE_SHA256
    return "tiny Shakespeare" if is_shakespeare else data.stem


def train(data: Path | None, out: Path, flags: str, limit_s: float, caches: str) -> Trained:
    """Run train.py in a fresh process, with its compilers' caches in the folder `caches`."""
    texts = [str(data)] if data else sorted(map(str, record.ROOT.glob("*/*.py")))
    flags = f"--preset {PRESET} --save-every 0 --resume never {flags}"
    command = [sys.executable, "train.py", "--out", str(out), *flags.split(), "--data", *texts]
    env = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
    ended = child.run(command, limit_s, os.environ | env)
    print(ended.text[-4000:], flush=True)
    return read_run(out), ended


def losses_of(run: Run) -> list[float]:
    return [step["loss"] for step in run.steps]


def curve_of(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, loss) of every CURVE_EVERY steps, and of the last."""
    steps = {*range(0, len(losses), CURVE_EVERY), len(losses) - 1}
    return [(i, losses[i]) for i in sorted(steps) if i >= 0]


def seed_row(folder: Path, run: Run, ended: child.Ended, text: str, cache: str) -> SeedRow:
    """The row of a run, whether it finished or not."""
    losses = losses_of(run)
    plan = next((x for x in ended.text.splitlines() if x.startswith("plan: ")), "plan: not said")
    result = f"loss {losses[-1]:.3f} after {len(losses)} steps" if losses else "no step"
    result += f", {ended.why}" if ended.why else ""
    first_step_s = run.summary.get("first_step_s")
    rates = [step["tokens_per_s"] for step in run.steps[5:] or run.steps]
    return SeedRow(
        text=text,
        cache=cache,
        plan=plan.removeprefix("plan: "),
        result=result,
        doubt="" if losses else result,
        steps=len(losses),
        reached=min(losses, default=math.inf) < PRESETS[PRESET].target_loss,
        tokens_per_s=statistics.median(rates) if rates else None,
        first_step_s=first_step_s,
        seconds=first_step_s and first_step_s + sum(step["ms"] for step in run.steps[1:]) / 1e3,
        curve=curve_of(losses),
        samples=[{"prompt": prompt, "text": text} for prompt, text in read_samples(folder)],
    )


def drift(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference between the two running means over 20 steps."""
    over = min(20, len(a), len(b))
    means = [[statistics.fmean(x[i : i + over]) for i in range(len(x) - over + 1)] for x in (a, b)]
    return max(abs(x - y) for x, y in zip(*means, strict=False))


def drift_row(runs: Mapping[str, Trained], text: str) -> CheckRow:
    """Compare ours with eager. If there is a compiled run, the bound is a multiple of its drift."""
    losses = {name: losses_of(run) for name, (run, _) in runs.items()}
    why = {name: ended.why or "no step" * (not losses[name]) for name, (_, ended) in runs.items()}
    doubt = next((f"{name}: {why[name]}" for name in ("eager", "ours") if why[name]), "")
    said = ", ".join(f"{name} {x[-1]:.3f}" for name, x in losses.items() if x)
    if not doubt:
        found, bound = drift(losses["eager"], losses["ours"]), MIN_DRIFT
        if yardstick := losses.get("compiled"):
            bound = max(MIN_DRIFT, DRIFT_FACTOR * drift(losses["eager"], yardstick))
        said = f"drift {found:.4f}, bound {bound:.4f}; last {said}"
        doubt = said if found > bound else ""
    what = f"triton against eager, {DRIFT_STEPS} steps, {text}, GPT-2 124M, B=16 T=256"
    return CheckRow(check="losses", what=what, found=said, doubt=doubt)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.recipe", __doc__)
    parser.add_argument("what", choices=[*RUNS])
    parser.add_argument("--data", type=cli.file, help="text or uint16 token file to train on")
    parser.add_argument("--minutes", type=cli.amount, default=10.0, help="for all runs together")
    cli.add_output(parser)
    args = parser.parse_args(argv)
    device = torch.device(cli.devices()[-1])
    results, text = record.open_result(device, args.out, args.commit), text_of(args.data)
    end = time.monotonic() + 60 * args.minutes
    runs: dict[str, Trained] = {}
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as scratch, child.ended_by_signals():
        for name, flags in RUNS[args.what].items():
            folder = Path(scratch) / name
            runs[name] = train(args.data, folder, flags, end - time.monotonic(), scratch)
            if args.what == "seed":
                rows[name] = seed_row(folder, *runs[name], text, name)
                results.add("seed", rows[name])
            elif len(runs) > 1:  # already without the compiled run, in case that one fails
                rows["drift"] = drift_row(runs, text)
                results.add("checks", rows["drift"])
    return int(any(row.doubt for row in rows.values()))


if __name__ == "__main__":
    cli.run(main)
