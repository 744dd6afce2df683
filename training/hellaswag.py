"""HellaSwag as GPT-2's reproductions quote it: which of four endings does the model find likeliest?

An item is a context with several endings, one of them right. An ending is appended to the context
after a space, and its score is the mean loss of its own tokens. The model's answer is the
ending with the lowest score; guessing gives 25%. llm.c and build-nanogpt do the same; EleutherAI's
acc_norm divides by characters instead of tokens. The file is the public hellaswag_val.jsonl, 10,042
items (Zellers et al. 2019, github.com/rowanz/hellaswag), one JSON object per line with "ctx",
"endings" and "label".
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import GPT, tokenizer
from model.decoder import resolve_window
from model.gpt import evaluating
from training.documents import opened

BATCH_TOKENS = 4096  # per forward, padding included
# Scores of the published weights: all four by llm.c's dev/vislog.ipynb, 124M also by
# build-nanogpt's hellaswag.py, which prints 2,967 of 10,042.
PUBLISHED = "GPT-2's 124M 29.4 to 29.6%, 350M 37.5%, 774M 43.2%, 1558M 48.9%; guessing 25%"


class Item(NamedTuple):
    context: list[int]  # token ids
    endings: list[list[int]]
    label: int  # number of the right ending


def read_items(path: str | Path, max_items: int | None = None) -> list[Item]:
    """The first `max_items` items of a file, plain or compressed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not an item; names its number.
    """
    path, items = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"hellaswag: no such file: {path}")
    with opened(path) as (lines, _):
        for number, line in enumerate(lines, 1):
            if max_items is not None and len(items) == max_items:
                break
            try:
                items.append(_item(json.loads(line)))
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"hellaswag: {path}: line {number} is not an item ({error}); each line needs "
                    "'ctx', 'endings' and 'label', as in hellaswag_val.jsonl"
                ) from None
    if not items:
        raise ValueError(f"hellaswag: {path} holds no items")
    return items


def _item(values: Any) -> Item:
    context, endings, label = (values[name] for name in ("ctx", "endings", "label"))
    if not (isinstance(context, str) and isinstance(endings, list) and context and endings):
        raise ValueError("'ctx' must be text and 'endings' a list")
    number = int(str(label))  # Hugging Face's copy has it as text; in the test part it is empty
    if not 0 <= number < len(endings):
        raise ValueError(f"'label' must be from 0 to {len(endings) - 1}, got {number}")
    ids = [tokenizer.encode(f" {ending}").tolist() for ending in endings]
    return Item(tokenizer.encode(context).tolist(), ids, number)


def ending_losses(model: GPT, items: Sequence[Item], window: int) -> list[list[float]]:
    """Mean loss of each ending of each item, nats per token.

    A row longer than the window loses its beginning.
    """
    rows, scored = [], []
    for item in items:
        for ending in item.endings:
            rows.append(torch.tensor((item.context + ending)[-window - 1 :]))
            scored.append(torch.zeros_like(rows[-1]).bool())
            scored[-1][1:][-len(ending) :] = True  # nothing predicts the first token of a row
    idx, mine = (pad_sequence(part, batch_first=True) for part in (rows, scored))
    weight = model.transformer.wte.weight
    idx, mine = idx.to(weight.device), mine[:, 1:].to(weight.device)
    with evaluating(model), torch.no_grad():
        y, _ = model.transformer(idx[:, :-1], model.residual_dtype)
        logits = F.linear(y[mine], weight[: model.config.vocab_size])
        losses = F.cross_entropy(logits.float(), idx[:, 1:][mine], reduction="none")
    parts = losses.split(mine.sum(1).tolist())
    ends = iter(torch.stack([part.mean() for part in parts]).tolist())
    return [[next(ends) for _ in item.endings] for item in items]


def count_right(
    model: GPT,
    items: Sequence[Item],
    window: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[int, int]:
    """Number of correct answers, and of items seen.

    The caller's autocast applies. `stopped` is asked before each forward; True ends it early.
    """
    if not items:  # of several ranks, one may have none
        return 0, 0
    window = resolve_window(model, window)
    longest = max(len(item.context) + max(map(len, item.endings)) for item in items)
    at_once = max(1, BATCH_TOKENS // (len(items[0].endings) * min(window, longest)))
    right = seen = 0
    for first in range(0, len(items), at_once):
        if stopped():
            break
        batch = items[first : first + at_once]
        for item, losses in zip(batch, ending_losses(model, batch, window), strict=True):
            right += math.isfinite(sum(losses)) and losses.index(min(losses)) == item.label
        seen += len(batch)
    return right, seen


def line(right: int, seen: int) -> str:
    """Accuracy with its standard error."""
    share = right / seen
    error = math.sqrt(share * (1 - share) / seen)
    return f"HellaSwag {share:.2%} +- {error:.2%} ({right:,} of {seen:,})"
