"""How the next token is chosen: settings, and a draw from the resulting distribution."""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from model.edge import check_int, is_real, quoted

MAX_NEW_TOKENS = 1_000_000  # per text; a typing error must not run for years
GREEDY_BELOW = 1e-6  # a temperature so low that the largest fp32 logit always wins


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: Tokens to add to each prompt.
        temperature: Divides the logits; 0: always the most likely token.
        top_k: Sample from the k most likely tokens only; 0: off.
        top_p: Sample from the fewest most likely tokens that reach this probability; 1: off.
        seed: The same seed, prompt and sample number give the same text.
        stop: A text ends before the first of these strings.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_int("generate", "max_new_tokens", self.max_new_tokens, 0, MAX_NEW_TOKENS)
        check_int("generate", "top_k", self.top_k, 0, 2**63 - 1)
        check_int("generate", "seed", self.seed, 0, 2**64 - 1)
        temperature, top_p = self.temperature, self.top_p
        if not (is_real(temperature) and 0 <= temperature <= sys.float_info.max):
            raise ValueError(
                f"generate: temperature must be finite and >= 0 (0 is greedy), "
                f"got {quoted(temperature)}"
            )
        if not (is_real(top_p) and 0 < top_p <= 1):
            raise ValueError(f"generate: top_p must be in (0, 1], got {quoted(top_p)}")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError("generate: stop must be a tuple of strings that are not empty")


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """Choose one token per row by inverting the cumulative distribution.

    top_k is applied before top_p, as in transformers.

    Args:
        logits: (R, V).
        draws: (R,) fp64, uniform in [0, 1).

    Returns:
        (R,) int64.
    """
    if sampling.temperature < GREEDY_BELOW:
        return logits.argmax(dim=-1)
    z, order = logits.float(), None
    if sampling.top_k:
        z, order = z.topk(min(sampling.top_k, z.shape[-1]), dim=-1)
    elif sampling.top_p < 1:
        z, order = z.sort(dim=-1, descending=True)
    # fp64: over 50k terms an fp32 sum would round small probabilities away, and a logit divided by
    # a small temperature would overflow.
    probs = torch.softmax(z.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probs.cumsum(dim=-1)
    # First index whose cumulative exceeds the draw. A draw of nearly 1 must not give an index past
    # the end.
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1 if order is not None else z.shape[-1] - 1
    target = draws[:, None] * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True).clamp(max=last)
    return (choice if order is None else order.gather(-1, choice))[:, 0]
