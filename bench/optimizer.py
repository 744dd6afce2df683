"""The optimizer alone: clip and AdamW over every parameter of a GPT-2, ours beside torch's.

    python -m bench.optimizer                  the 124M model
    python -m bench.optimizer --model 350m

Once with fp32 gradients, once with bf16 working copies of the matrices, which bring bf16 gradients
and are rewritten in the step. The bytes of the floor are those of kernels/adamw.py: per parameter
28 for the step and 4 for the norm in fp32, 28 and 2 with a copy. After a few steps both must hold
the same weights, or no time of ours is shown (the file has it as unverified_ms). Needs a GPU; the
host is not timed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import baseline, record, timing
from bench.report import table
from model import GPT, MODELS
from training.optim import AdamW, TritonAdamW

CLASSES: dict[str, type[AdamW]] = {"torch": AdamW, "triton": TritonAdamW}
CHECK_STEPS = 5
TOLERANCE = 1e-5  # of a weight after CHECK_STEPS, absolute: one step moves it by 6e-4


def make_step(
    kind: str, model: str, working: bool, device: torch.device
) -> tuple[Callable[[], Tensor], list[nn.Parameter]]:
    """One optimizer step on fixed random gradients, and the parameters it updates."""
    torch.manual_seed(0)
    with torch.device(device):
        parameters = list(GPT(MODELS[model]).parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    lr = torch.full((), baseline.LEARNING_RATE, device=device)
    optimizer = CLASSES[kind](groups, lr, baseline.BETAS, weight_decay=baseline.WEIGHT_DECAY)
    copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in parameters if p.dim() >= 2}
    optimizer.attach_working(copies if working else {})
    generator = torch.Generator(device).manual_seed(1)
    # Norm 0.1, a clip coefficient of 1: torch's clip scales in place what comes again next time.
    grads = [1e-5 * torch.randn(p.shape, generator=generator, device=device) for p in parameters]
    leaves = [copies[p] if working and p in copies else p for p in parameters]
    grads = [g.to(leaf.dtype) for g, leaf in zip(grads, leaves, strict=True)]

    def step() -> Tensor:
        # Assigned anew: folding takes those of copies away.
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        norm = optimizer.clip(baseline.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    return step, parameters


def floor_bytes(parameters: Sequence[nn.Parameter], working: bool) -> int:
    """What clip and step read and write at the least."""
    return sum(p.numel() * (30 if working and p.dim() >= 2 else 32) for p in parameters)


def red_reason(weights: dict[str, list[nn.Parameter]]) -> str | None:
    """Why no time of ours may be shown; None where both hold the same weights."""
    if "torch" not in weights:
        return "nothing to hold it against: torch failed"
    pairs = zip(weights["torch"], weights["triton"], strict=True)
    apart = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
    return None if apart <= TOLERANCE else f"weights differ by {apart:.2g}, over {TOLERANCE}"


def measure(
    model: str, working: bool, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """A row for each implementation; one that fails has "skip", ours with other weights "red"."""
    identity = {"model": model, "working": working}
    steps: dict[str, Callable[[], Tensor]] = {}
    weights: dict[str, list[nn.Parameter]] = {}
    failed: dict[str, str] = {}
    for kind in CLASSES:
        try:
            step, parameters = make_step(kind, model, working, device)
            with torch.cuda.stream(timing.capture_stream()):
                for _ in range(CHECK_STEPS):
                    step()
            torch.cuda.synchronize(device)
            steps[kind], weights[kind] = step, parameters
        except Exception as error:
            timing.note_failure(failed, kind, error)
    red = red_reason(weights) if "triton" in weights else None
    nbytes = max((floor_bytes(each, working) for each in weights.values()), default=0)
    timed = timing.time_calls(
        {kind: [step] for kind, step in steps.items()}, device, nbytes,
        failed=failed, seconds=seconds,
    )  # fmt: skip
    limit = timing.limits(device)["copy_gbs"]
    rows: list[dict[str, Any]] = [
        {**identity, "who": kind, "skip": why} for kind, why in failed.items()
    ]
    for kind, found in timed.items():
        row = {**identity, "who": kind}
        if kind == "triton" and red:
            rows.append(row | {"red": red, "unverified_ms": found.median_ms})
            continue
        gbs = nbytes / found.median_ms / 1e6
        row |= {"ms": found.median_ms, "cov": found.cov, "mode": found.mode, "gbs": gbs}
        row |= {"of_limit": gbs / limit}
        if "torch" in timed:
            row["over_torch"] = timing.ratio(timed["torch"], found)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.optimizer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", choices=MODELS, default="124m")
    parser.add_argument("--seconds", type=float, default=5.0, help="budget of each table half")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.optimizer: needs a GPU; interpreted kernels have no speed to measure")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    return run(args.model, device, record.Results(device, args.out), args.seconds)


def run(model: str, device: torch.device, results: record.Results, seconds: float) -> int:
    """Measure, write the rows, print the table; 1 where one failed or the weights disagree."""
    rows: list[dict[str, Any]] = []
    for working in (False, True):
        rows += measure(model, working, device, seconds)
        results.put("optimizer", {"rows": rows})
    lines = []
    for row in rows:
        who = ["bf16, copies" if row["working"] else "fp32", row["who"]]
        if "ms" not in row:
            lines.append([*who, f"not shown: {row.get('red') or row['skip']}", *[""] * 4])
            continue
        over = f"{row['over_torch']:.2f}" if "over_torch" in row else ""
        lines.append([*who, f"{row['ms']:.3g}", f"{100 * row['cov']:.1f}%", f"{row['gbs']:,.0f}",
                      f"{100 * row['of_limit']:.0f}%", over])  # fmt: skip
    print(table(["gradients", "who", "ms", "spread", "GB/s", "of limit", "x torch"], lines))
    return 0 if all("ms" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
