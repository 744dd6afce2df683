"""What the bench measures on this machine in under ten minutes: `make bench`.

python -m bench                         limits, step table, op tables
python -m bench --op layer_norm         that op alone; takes the other flags of bench.ops too
python -m bench --benchmark-compare     the ops, compared with the previous run
"""

import os
from collections.abc import Sequence

from bench import cli, ops, record, step
from bench.cases import CPU_SHAPES, Shape
from bench.contestants import Setup, default_providers
from bench.tables import source_line


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    job = ops.Job(argv, "bench", __doc__)
    options, device, cuda = job.options, job.device, job.device.type == "cuda"
    setups = [Setup("124m", shape) for shape in options.shape or (() if cuda else CPU_SHAPES)]
    setups = setups or [Setup("124m", Shape(64, 1024)), Setup("124m", Shape(16, 64), accum=4)]
    for setup in setups:
        setup.check_memory(device)
    results = record.open_result(device, options.out, options.commit)
    heading("This machine")
    print(source_line(results))
    limits = results.about["limits"] = record.limits(device)
    print(
        f"copy {limits['copy_gbs']:,.4g} GB/s, {'bf16' if cuda else 'fp32'} matmul "
        f"{limits['matmul_tflops']:,.3g} TFLOP/s, with K=768 {limits['matmul_k768_tflops']:,.3g}: "
        "the limits of the rows below. ! marks noisy samples"
    )
    if not options.op:
        heading("Whole training step")
        print("forward, backward, clip, AdamW")
        for setup in setups:
            names = default_providers(device)
            step.run(names, setup, device, results, seconds=8.0, minutes=4.0)
    heading("Each op alone")
    if not cuda:
        print("Triton has no CPU target, so `ours` is our plain-PyTorch op (`--ops eager`) here.")
    code = job.run(results)
    print(f"\nwrote {os.path.relpath(results.path)}; docs/results.md has what a GPU measured")
    return code


if __name__ == "__main__":
    cli.run(main)
