"""One training step, whole: forward, backward, clip, AdamW; ours beside plain PyTorch.

    python -m bench.step                              # the table for this machine
    python -m bench.step --shape b64t1024 --ablation
    python -m bench.step --against nanogpt ~/nanoGPT/model.py
    python -m bench.step --batch-sweep 4,8,16,32,64 --length-sweep 256,512,1024,2048

Every contestant (`bench.contestants`) starts from the same weights and sees the same tokens. Its
loss on the first step and after the warm-up, and its first gradient norm, must agree with the first
contestant's, or its row is in doubt.

How they are timed, and how many at once on a CPU, is in `bench.turns`.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import cli, record
from bench.cases import CPU_SHAPES, GPU_SHAPES, Shape
from bench.contestants import (
    Setup,
    default_providers,
    find_providers,
    known_providers,
    load_nanogpt,
)  # fmt: skip
from bench.rows import StepRow
from bench.tables import step_table
from bench.turns import Runner, Turns, Worker, is_rival, measure_cuda, work
from model import MODELS
from training.child import ChildDied
from training.plan import detect

FIRST_STEP_LIMIT_S = 180.0


def with_ratios(rows: Mapping[str, StepRow]) -> list[StepRow]:
    """The rows, each with its ratio to every rival that has a time.

    Two that took turns have their ratio; two of different groups get it by way of the contestant
    whom both took turns with, and where there is none, it is that of their medians.
    """
    timed = {name: row for name, row in rows.items() if not row.doubt}

    def ratio(row: StepRow, rival: StepRow) -> float:
        if row is rival:
            return 1.0
        if rival.provider in row.over:
            return row.over[rival.provider]
        if row.provider in rival.over:
            return 1 / rival.over[row.provider]
        for common in row.over.keys() & rival.over.keys():
            return row.over[common] / rival.over[common]
        return rival.ms / row.ms

    rivals = [row for name, row in timed.items() if is_rival(name)]
    found = {name: {other.provider: ratio(row, other) for other in rivals}
             for name, row in timed.items()}  # fmt: skip
    return [replace(row, over=found.get(name, {})) for name, row in rows.items()]


def measure(
    names: Sequence[str], setup: Setup, device: torch.device, *, seconds: float = 10.0,
    minutes: float = 30.0, nanogpt: Path | None = None,
) -> Iterator[StepRow]:  # fmt: skip
    """Rows of the named contestants as they come; one that fails has a row that says why.

    Raises:
        ValueError: an unknown contestant; the message names the known ones.
    """
    builds = find_providers(names, device, nanogpt)
    if device.type == "cuda":
        return measure_cuda(builds, setup, device, seconds)

    def start(name: str, limit_s: float) -> Runner:
        return Worker(name, setup, "cpu", nanogpt, limit_s)

    return Turns(setup, start, seconds, time.monotonic() + 60 * minutes).measure(names)


def first_step(
    name: str, setup: Setup, device: torch.device, limit_s: float = FIRST_STEP_LIMIT_S
) -> Iterator[StepRow]:
    """Seconds from nothing compiled to the end of the first step: empty caches, then full ones.

    In processes of their own. first_step_s leaves imports and model building out; process_start_s
    is everything since the process began, drawing the initial weights on the CPU included.
    """
    with tempfile.TemporaryDirectory() as caches:
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
        for cache in ("cold", "warm"):
            row = StepRow(**setup.identity, provider=name, cache=cache)
            try:
                with Worker(name, setup, device.type, None, limit_s, env) as worker:
                    yield replace(row, first_step_s=worker.prepared.first_step_s,
                                  process_start_s=worker.prepared.process_start_s)  # fmt: skip
            except ChildDied as why:
                yield replace(row, doubt=str(why))
                return


def run(
    names: Sequence[str],
    setup: Setup,
    device: torch.device,
    results: record.Results,
    *,
    section: str = "step",
    **how: Any,
) -> list[StepRow]:
    """Measure, write each row as it comes and all ratios at the end, print the table."""
    rows: dict[str, StepRow] = {}
    print(f"\nTraining step, GPT-2 {setup.model}, {setup.shape.label}, accum {setup.accum}")
    if device.type == "cpu" and not detect("cpu").has_bf16:
        print("bf16 left out: this CPU multiplies faster in fp32")
    for row in measure(names, setup, device, **how):
        results.add(section, row)
        rows[row.provider] = row
    found = with_ratios(rows)
    results.add(section, *found)
    print(step_table(found), flush=True)
    return found


def sizes(text: str) -> list[int]:
    """Comma-separated counts."""
    return [cli.count(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.step", __doc__)
    has_gpu = torch.cuda.is_available()
    devices = ["cpu", *(["cuda"] if has_gpu else [])]
    parser.add_argument("--device", default=devices[-1], choices=devices)
    parser.add_argument("--model", default="124m", choices=[*MODELS])
    parser.add_argument("--shape", type=cli.shape, help="b<B>t<T>; default b64t1024 on a GPU, "
                        "b4t64 on a CPU")  # fmt: skip
    parser.add_argument("--accum", type=cli.count, default=1, help="micro-batches a step")
    parser.add_argument("--provider", action="append", help="repeat for several")
    parser.add_argument("--seconds", type=cli.amount, default=10.0, help="budget per contestant")
    parser.add_argument("--minutes", type=cli.amount, default=30.0, help="of a table, on a CPU")
    parser.add_argument("--ablation", action="store_true", help="each op and choice back, in turn")
    parser.add_argument("--batch-sweep", type=sizes, default=[], help="B,B,... at the shape's T")
    parser.add_argument("--length-sweep", type=sizes, default=[],
                        help="T,T,... at the shape's tokens")  # fmt: skip
    parser.add_argument("--against", nargs=2, metavar=("nanogpt", "PATH"))
    parser.add_argument("--first-step", action="store_true", help="cold and warm, in new processes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=cli.path, default=record.RESULTS)
    parser.add_argument("--commit", help="what is measured, where git is not at hand")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    usual = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    shape = args.shape or usual[0]
    setup = Setup(args.model, shape, args.accum)
    nanogpt = None
    if args.against:
        kind, path = args.against
        if kind != "nanogpt":
            raise ValueError(f"bench: --against knows nanogpt, got {kind!r}")
        nanogpt = Path(path)
        load_nanogpt(nanogpt)  # fail before minutes of measuring
    if args.worker:
        work(args.worker, setup, device, nanogpt)
        return
    if args.ablation and device.type != "cuda":
        raise ValueError("bench: --ablation switches Triton ops off one by one; it needs a GPU")
    names = args.provider or default_providers(device, nanogpt is not None)
    find_providers(names, device, nanogpt)  # refuses the unknown
    setups = [setup, *(Setup(args.model, Shape(B, shape.T)) for B in args.batch_sweep)]
    setups += [Setup(args.model, Shape(max(1, shape.M // T), T)) for T in args.length_sweep]
    for each in setups:
        each.check_memory(device)
    results = record.Results(device, args.out, args.commit)
    for each in dict.fromkeys(setups):
        run(names, each, device, results, seconds=args.seconds, minutes=args.minutes,
            nanogpt=nanogpt)  # fmt: skip
    if args.ablation:
        ours = [name for name in known_providers(device) if name.startswith("ours bf16")]
        run(ours, setup, device, results, section="ablation", seconds=args.seconds)
    for name in names if args.first_step else ():
        for row in first_step(name, setup, device):
            results.add("first_step", row)
            said = row.doubt or f"{row.process_start_s:.1f} s"
            print(f"first step, {row.cache} caches, {name}: {said}")
    print(f"wrote {os.path.relpath(results.path)}")


if __name__ == "__main__":
    cli.run(main)
