"""What the bench can say about this machine, in under ten minutes: `make bench`.

python -m bench                         limits, step table, op tables
python -m bench --op layer_norm         that op alone
python -m bench --benchmark-compare     the ops beside those of the run before this one
"""

import os
from collections.abc import Sequence

import torch

from bench import cli, ops, record, step
from bench.cases import CASES, CPU_SHAPES, Shape
from bench.contestants import Setup, default_providers
from bench.tables import source_line


def heading(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench", __doc__)
    parser.add_argument("--op", action="append", choices=[*CASES], default=[])
    parser.add_argument("--shape", action="append", type=cli.shape, default=[], help="b<B>t<T>")
    parser.add_argument("--seconds", type=cli.amount, default=3.0, help="of an op and a mode")
    parser.add_argument("--minutes", type=cli.amount, default=4.0, help="of the step's table")
    cli.add_output(parser)
    args, rest = cli.parse_with_benchmark(parser, argv)
    cuda = torch.cuda.is_available()
    device = torch.device(cli.devices()[-1])
    setups = [Setup("124m", shape) for shape in args.shape or (() if cuda else CPU_SHAPES)]
    setups = setups or [Setup("124m", Shape(64, 1024)), Setup("124m", Shape(16, 64), accum=4)]
    for setup in setups:
        setup.check_memory(device)
    wanted = [f"--op={op}" for op in args.op] + [f"--shape=b{s.B}t{s.T}" for s in args.shape]
    each_op = ops.Job(ops.make_parser().parse_args([*wanted, f"--seconds={args.seconds}"]), device)

    results = record.open_result(device, args.out, args.commit)
    heading("This machine")
    print(source_line(results))
    limits = results.about["limits"] = record.limits(device)
    print(
        f"copy {limits['copy_gbs']:,.4g} GB/s, {'bf16' if cuda else 'fp32'} matmul "
        f"{limits['matmul_tflops']:,.3g} TFLOP/s, with K=768 {limits['matmul_k768_tflops']:,.3g}: "
        "what the rows are held against"
    )
    if not args.op:
        heading("Whole training step")
        print("forward, backward, clip, AdamW; tokens/s is what a user sees. ! : noisy samples")
        names, budget = default_providers(device), {"seconds": 8.0, "minutes": args.minutes}
        for setup in setups:
            step.run(names, setup, device, results, **budget)

    heading("Each op alone")
    if not cuda:
        print(
            "Triton has no CPU target, so `ours` is this project's plain-PyTorch op here, what\n"
            "`--ops eager` runs. of limit: the time that the measured copy and matmul rates\n"
            "allow, over the time taken."
        )
    code = each_op.run(results, rest)
    print(f"\nwrote {os.path.relpath(results.path)}; docs/results.md has what a GPU measured")
    return code


if __name__ == "__main__":
    cli.run(main)
