"""Everything the bench can say about this machine, in under ten minutes: `make bench`.

python -m bench                     limits, step table, op tables, resources, estimates
python -m bench --op layer_norm     that op alone
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import ops, record, report, step, timing
from bench.cases import CASES, find_case, find_shape


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


def run_ops(results: record.Results, names: Sequence[str], shapes: Sequence[str], seconds: float):
    """The op bench in a process of its own, under pytest-benchmark."""
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-q", "--no-header", "-p"]
    command += ["no:cacheprovider", "--benchmark-only", "--benchmark-quiet"]
    command += ["--benchmark-columns=median", "--out", str(results.path), "--seconds", str(seconds)]
    command += ["--commit", results.data["commit"]]  # HEAD may move while this runs
    command += [f"--op={name}" for name in names] + [f"--shape={name}" for name in shapes]
    with tempfile.TemporaryDirectory() as folder:
        command += [f"--benchmark-json={os.environ.get('BENCH_JSON', folder + '/ops.json')}"]
        out = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False)
    if out.returncode not in (0, 5):  # 5: no test selected
        print(out.stdout[-4000:], out.stderr[-2000:])
    results.data = record.load(results.path) | {"command": record.command_line()}
    results.write()
    rows = [row for row in results.rows("ops") if not names or row["op"] in names]
    for label in dict.fromkeys(row["shape"] for row in rows):
        these = [row for row in rows if row["shape"] == label and "skip" not in row]
        if these:
            print(f"\n{label}, {these[0]['dtype']}\n")
            print(ops_explained(these))
    for why in dict.fromkeys(f"{r['provider']}: {r['skip']}" for r in rows if "skip" in r):
        if " has no " not in why:  # a provider that does not do an op needs no line
            print(f"not timed: {why}")
    return out.returncode


def resources() -> None:
    """The compile-only table for Hopper; the interpreter's switch would hide the compiler."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.resources", "--arch", "90"]
    print("sm_90 (H100, H200); `make resources` compiles for every architecture\n", flush=True)
    subprocess.run(command, cwd=record.ROOT, env=env, check=False)


def ops_explained(rows: Sequence[dict]) -> str:
    return ops.ops_table(sorted(rows, key=lambda row: [*CASES].index(row["op"])))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--op", action="append", default=[], help=f"of {', '.join(CASES)}")
    parser.add_argument("--shape", action="append", default=[], help="b<B>t<T>")
    parser.add_argument("--seconds", type=float, help="budget per op and mode")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    for name in args.op:
        find_case(name)
    for name in args.shape:
        find_shape(name)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    results = record.Results(device, args.out)
    heading("This machine")
    print(report.source_line(results.data))
    limits = timing.limits(device)
    results.put("limits", limits)
    kind = "bf16" if cuda else "fp32"
    print(
        f"copy {limits['copy_gbs']:,.4g} GB/s, {kind} matmul {limits['matmul_tflops']:,.3g} "
        f"TFLOP/s, with K=768 {limits['matmul_k768_tflops']:,.3g}: what the rows are held against"
    )

    if not args.op:
        heading("Whole training step")
        print("forward, backward, clip, AdamW; tokens/s is what a user sees. ! : noisy samples")
        for setup in step_setups(device, args.shape):
            step.run(step.default_providers(device), setup, device, results, seconds=8.0)

    heading("Each op alone")
    if not cuda:
        print(
            "Triton has no CPU target, so `ours` is this project's plain-PyTorch op here, what\n"
            "`--ops eager` runs. of limit: the time that the measured copy and matmul rates\n"
            "allow, over the time taken."
        )
    code = run_ops(results, args.op, args.shape, args.seconds or (4.0 if cuda else 3.0))

    if not args.op and not cuda:
        heading("What each kernel takes of a GPU (compiled here, not run)")
        resources()
        heading("What a GPU could reach at most (estimate)")
        print(report.roofline_block([]))
        heading("What was measured on a GPU")
        print(report.step_block(record.load_all(), "cuda"))
        print()
        print(report.public_block(record.load_all()))
    print(f"\nwrote {os.path.relpath(results.path)}")
    return code


def step_setups(device: torch.device, shapes: Sequence[str]) -> list[step.Setup]:
    if shapes:
        return [step.Setup("124m", find_shape(name)) for name in shapes]
    if device.type == "cuda":
        return [
            step.Setup("124m", find_shape("b64t1024")),
            step.Setup("124m", find_shape("b16t64"), accum=4),
        ]
    return [step.Setup("124m", find_shape("b4t64"))]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(str(error))
