"""What a person may decide instead of the plan."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro

_STATES = {"auto": None, "on": True, "off": False}


def _read_switch(words: list[str]) -> bool | None:
    word = words[0] if words else "on"  # the bare flag
    if word not in _STATES:
        raise ValueError(f"expected auto, on or off, got {word!r}")
    return _STATES[word]


# A flag of three states.
Switch = Annotated[bool | None, tyro.constructors.PrimitiveConstructorSpec(
    nargs=(0, 1), metavar="{auto,on,off}", instance_from_str=_read_switch,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [word for word, is_ in _STATES.items() if is_ is value],
)]  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What a person may decide instead of the plan; each field is a flag of train.py."""

    ops: str = "auto"
    """auto, triton, eager, compiled, or one with exceptions: triton,layer_norm=eager; for
    causal_attention sdpa-cudnn and sdpa-flash too."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """bf16 and fp16 are autocast with fp32 weights, fp16 with loss scaling; auto takes bf16 where
    the hardware multiplies it, and fp16 on a GPU that multiplies only that (T4, V100, 20xx)."""
    compile: Switch = None
    """torch.compile the model; auto does where it can and where it pays."""
    compile_scope: Literal["auto", "model", "blocks"] = "auto"
    """Compile the model as one graph, or one block that all layers share: starts sooner."""
    micro_batch_size: int = 0
    """Rows of a physical batch; 0 is as many of a step's rows as fit on a GPU, up to 4,096 tokens
    on a CPU."""
    optimizer: Literal["auto", "torch", "triton"] = "auto"
    """Whose fused AdamW: PyTorch's or ours."""
    working_copies: Switch = None
    """bf16 copies of the fp32 weights, written by the optimizer, so that no micro-batch casts
    them; auto has them with bf16."""
    cuda_graph: Switch = None
    """Replay the whole step as one CUDA graph; auto does on a GPU."""
    shard: Literal["auto", "none", "optimizer"] = "auto"
    """optimizer: several ranks share AdamW's state out; auto does where it does not fit."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which ranks add up the gradients of matrices. bf16 halves what travels, rounded."""
    recompute: Switch = None
    """Compute each block's forward again in the backward instead of keeping what it made: a third
    more arithmetic, the same bits, a fraction of the memory; auto where nothing else fits."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the residual stream under bf16. bf16 changes the numerics."""
    tune: Literal["auto", "on", "off", "only"] = "auto"
    """Time what the ops and the step can be made of, and take the fastest; auto does so on a GPU,
    once, and keeps the answer. on measures again, only does and ends there."""
    tune_file: str | None = None
    """Where that answer is kept. Default: the user's cache directory."""

    def or_else(self, values: Mapping[str, Any]) -> "Choices":
        """With these values where the choice is left open; what is no choice is left out."""
        ours = {k: v for k, v in values.items() if k in _OPEN and getattr(self, k) == _OPEN[k]}
        return replace(self, **ours)


_OPEN = vars(Choices())
