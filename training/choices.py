"""What a person may decide instead of the plan."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Choices:
    """What a person may decide instead of the plan; each field is a flag of train.py."""

    ops: str = "auto"
    """auto, eager, triton, or one with exceptions: triton,layer_norm=eager."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 is autocast with fp32 weights; auto takes it where the hardware multiplies bf16."""
    compile: Annotated[bool | None, tyro.conf.arg(aliases=["--no-compile"], metavar="")] = None
    """torch.compile the model, or do not. Default: where it can and where it pays."""
    compile_scope: Literal["auto", "model", "blocks"] = "auto"
    """Compile the model as one graph, or one block that all layers share: starts sooner."""
    micro_batch_size: int = 0
    """Rows of a physical batch; 0 is as many of a step's rows as fit on a GPU, the recipe's
    batch_size on a CPU."""
    optimizer: Literal["auto", "torch", "triton"] = "auto"
    """Whose fused AdamW: PyTorch's or ours."""
    working_copies: Annotated[
        bool | None, tyro.conf.arg(aliases=["--no-working-copies"], metavar="")
    ] = None
    """bf16 copies of the fp32 weights, written by the optimizer, so that no micro-batch casts
    them. Default: with bf16 on one device."""
    cuda_graph: Annotated[bool | None, tyro.conf.arg(aliases=["--no-cuda-graph"], metavar="")] = (
        None
    )
    """Replay the whole step as one CUDA graph. Default: on one GPU."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the residual stream under bf16. bf16 changes the numerics."""
