"""One training step, whole: forward, backward, clip, AdamW; ours beside plain PyTorch.

    python -m bench.step                              # the table for this machine
    python -m bench.step --shape b64t1024 --shape b8t1024 --ablation
    python -m bench.step --against nanogpt ~/nanoGPT/model.py

Every contestant (`bench.contestants`) starts from the same weights and sees the same tokens. Its
loss on the first step and after the warm-up, and its first gradient norm, must agree with the first
contestant's, or its row is in doubt.

How they are timed, and how many at once on a CPU, is in `bench.turns`.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import cli, record
from bench.cases import CPU_SHAPES, GPU_SHAPES
from bench.contestants import (
    Setup,
    default_providers,
    find_providers,
    known_providers,
    load_nanogpt,
)  # fmt: skip
from bench.rows import StepRow
from bench.tables import step_table
from bench.turns import Turns, Worker, measure_cuda, with_ratios, work
from model import MODELS
from training.plan import detect


def measure(
    names: Sequence[str], setup: Setup, device: torch.device, seconds: float, minutes: float,
    nanogpt: Path | None,
) -> Iterator[StepRow]:  # fmt: skip
    """Rows of the named contestants as they come; one that fails has a row that says why."""
    if device.type == "cuda":
        return measure_cuda(find_providers(names, device, nanogpt), setup, device, seconds)

    def start(name: str, limit_s: float) -> Worker:
        return Worker(name, setup, nanogpt, limit_s)

    return Turns(setup, start, seconds, time.monotonic() + 60 * minutes).measure(names)


def run(
    names: Sequence[str], setup: Setup, device: torch.device, results: record.Results, *,
    seconds: float, minutes: float, nanogpt: Path | None = None, section: str = "step",
) -> None:  # fmt: skip
    """Measure, write each row as it comes and all ratios at the end, print the table."""
    rows: dict[str, StepRow] = {}
    print(f"\nTraining step, GPT-2 {setup.model}, {setup.shape.label}, accum {setup.accum}")
    if device.type == "cpu" and not detect("cpu").has_bf16:
        print("bf16 left out: this CPU multiplies faster in fp32")
    for row in measure(names, setup, device, seconds, minutes, nanogpt):
        results.add(section, row)
        rows[row.provider] = row
    found = with_ratios(rows)
    results.add(section, *found)
    print(step_table(found), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.step", __doc__)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    add = parser.add_argument
    add("--device", default=devices[-1], choices=devices)
    add("--model", default="124m", choices=[*MODELS])
    add("--shape", action="append", type=cli.shape,
        help="b<B>t<T>, repeat for several; default b64t1024 on a GPU, b4t64 on a CPU")  # fmt: skip
    add("--accum", type=cli.count, default=1, help="micro-batches a step")
    add("--provider", action="append", help="repeat for several")
    add("--seconds", type=cli.amount, default=10.0, help="budget per contestant")
    add("--minutes", type=cli.amount, default=30.0, help="of a table, on a CPU")
    add("--ablation", action="store_true", help="each op and choice back, in turn")
    add("--against", nargs=2, metavar=("nanogpt", "PATH"))
    add("--worker", help=argparse.SUPPRESS)
    cli.add_output(parser)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shapes = args.shape or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)[:1]
    setups = [Setup(args.model, shape, args.accum) for shape in dict.fromkeys(shapes)]
    nanogpt = None
    if args.against:
        kind, path = args.against
        if kind != "nanogpt":
            raise ValueError(f"bench: --against knows nanogpt, got {kind!r}")
        nanogpt = Path(path)
        load_nanogpt(nanogpt)  # fail before minutes of measuring
    if args.worker:
        work(args.worker, setups[0], nanogpt)
        return
    if args.ablation and device.type != "cuda":
        raise ValueError("bench: --ablation switches Triton ops off one by one; it needs a GPU")
    names = args.provider or default_providers(device, nanogpt is not None)
    find_providers(names, device, nanogpt)  # refuses the unknown
    for setup in setups:
        setup.check_memory(device)
    results = record.Results(device, args.out, args.commit)
    budget = {"seconds": args.seconds, "minutes": args.minutes}
    for setup in setups:
        run(names, setup, device, results, nanogpt=nanogpt, **budget)
    if args.ablation:
        ours = [name for name in known_providers(device) if name.startswith("ours bf16")]
        run(ours, setups[0], device, results, section="ablation", **budget)
    print(f"wrote {os.path.relpath(results.path)}")


if __name__ == "__main__":
    cli.run(main)
