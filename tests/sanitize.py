"""What compute-sanitizer is given: `compute-sanitizer --tool memcheck python -m tests.sanitize OP`.

Small launches of every row of an op, or of AdamW; and "planted", a store past the end of a tensor,
so that a sanitizer that finds nothing is found out.
"""

# Launches take a constexpr as an int, which the triton stubs do not know.
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl

from bench import cli, ops
from bench.cases import CASES, Shape, make_inputs
from kernels import linear_cross_entropy
from model import GPT, MODELS
from training.optim import configure_adamw
from training.recipes import Recipe
from training.step import working_copies

V = 9000  # a whole block of the head's columns and one that V cuts; 50,257 takes minutes here
# The last has the launch rows of 4,096 rows and more.
SHAPES = (Shape(1, 17, V=V), Shape(2, 64, V=V), Shape(1, 200, V=V), Shape(4, 1024, 64, 1, V))
PLANTED = "planted"


@triton.jit
def _overrun_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)


def sanitize(op: str, device: torch.device) -> None:
    if op == PLANTED:
        _overrun_kernel[(1,)](torch.empty(64, device=device), BLOCK=4096)
    elif op == "adamw":
        model = GPT(MODELS["smoke"]).to(device)
        copies, parameters = working_copies(model), dict(model.named_parameters())
        optimizer = configure_adamw(model, Recipe(), "triton")
        optimizer.attach_working({parameters[name]: copies[name] for name in copies})
        for leaf in (parameters | copies).values():
            leaf.grad = torch.randn_like(leaf)
        optimizer.clip(1.0)
        optimizer.step()
    else:
        linear_cross_entropy.CHUNK_BYTES = 4 << 20  # several chunks, as at full size
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                inputs = make_inputs(CASES[op], shape, dtype, device)
                ops.make_call(ops.find_provider("ours", op, device), CASES[op], "both", inputs)()
    torch.cuda.synchronize()


def main() -> None:
    parser = cli.Parser("tests.sanitize", __doc__)
    parser.add_argument("op", choices=[PLANTED, *CASES, "adamw"])
    sanitize(parser.parse_args().op, torch.device("cuda"))


if __name__ == "__main__":
    cli.run(main)
