"""The optimizer alone: clip and AdamW over every parameter of a GPT-2, ours beside torch's.

    python -m bench.optimizer                  the 124M model
    python -m bench.optimizer --model 350m

Once with fp32 gradients, once with bf16 working copies of the matrices, which bring bf16 gradients
and are rewritten in the step. The bytes of the floor are those of kernels/adamw.py: per parameter
28 for the step and 4 for the norm in fp32, 28 and 2 with a copy. After a few steps both must hold
the same weights, or the row of ours is in doubt. Needs a GPU; the host is not timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bench import baseline, cli, record
from bench.ops import make_rows
from bench.rows import OpRow
from bench.tables import over, rows_table
from model import GPT, MODELS
from training import timing
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


def doubt_of(weights: dict[str, list[nn.Parameter]]) -> str:
    """Why no time of ours may be shown; empty where both hold the same weights."""
    if "triton" not in weights:
        return ""
    if "torch" not in weights:
        return "nothing to hold it against: torch failed"
    pairs = zip(weights["torch"], weights["triton"], strict=True)
    apart = torch.stack([(a - b).abs().max() for a, b in pairs]).max().item()
    return "" if apart <= TOLERANCE else f"weights differ by {apart:.2g}, over {TOLERANCE}"


def measure(model: str, working: bool, device: torch.device, seconds: float) -> list[OpRow]:
    """A row for each implementation; one that fails, or ours with other weights, is in doubt."""
    steps: dict[str, Sequence[Callable[[], Tensor]]] = {}
    weights: dict[str, list[nn.Parameter]] = {}
    failed: dict[str, str] = {}
    for kind in CLASSES:
        try:
            step, parameters = make_step(kind, model, working, device)
            with torch.cuda.stream(timing.capture_stream()):
                for _ in range(CHECK_STEPS):
                    step()
            torch.cuda.synchronize(device)
            steps[kind], weights[kind] = [step], parameters
        except Exception as error:
            timing.note_failure(failed, kind, error)
    # What clip and step read and write at the least.
    nbytes = sum(p.numel() * (30 if working and p.dim() >= 2 else 32)
                 for parameters in [*weights.values()][:1] for p in parameters)  # fmt: skip
    timed = timing.time_calls(steps, device, nbytes, failed=failed, seconds=seconds)
    rows = make_rows(
        [*CLASSES], timed, failed, ["torch"], nbytes,
        nbytes / record.limits(device)["copy_gbs"] / 1e6,
        op="optimizer", shape=model, dtype="bf16 copies" if working else "fp32", mode="step",
    )  # fmt: skip
    doubt = rows["triton"].doubt or doubt_of(weights)
    rows["triton"] = replace(rows["triton"], doubt=doubt)
    return [*rows.values()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.optimizer", __doc__)
    parser.add_argument("--model", choices=[*MODELS], default="124m")
    parser.add_argument("--seconds", type=cli.amount, default=5.0, help="of each table half")
    cli.add_output(parser)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("bench: needs a GPU; interpreted kernels have no speed to measure")
    device = torch.device("cuda")
    results = record.Results(device, args.out, args.commit)
    rows = [row for working in (False, True)
            for row in measure(args.model, working, device, args.seconds)]  # fmt: skip
    results.add("optimizer", *rows)
    print(rows_table(
        rows,
        {"gradients": lambda r: r.dtype, "who": lambda r: r.provider},
        {"ms": lambda r: f"{r.ms:.3g}", "spread": lambda r: r.spread,
         "GB/s": lambda r: f"{r.gbs:,.0f}", "of limit": lambda r: f"{r.of_limit:.0%}",
         "x torch": over("torch")},
    ))  # fmt: skip
    return int(any(row.doubt for row in rows))


if __name__ == "__main__":
    cli.run(main)
