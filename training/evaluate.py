"""Loss, perplexity and bits per byte of a model on any text.

The tokens are cut into consecutive rows of T, the window (by default the trained context). A row
predicts T tokens, each from those before it in its row. So every token but the first is predicted
exactly once, from T/2 others on average:

    loss = -1/N * sum log p(token | earlier tokens of the row)     nats per token, N = tokens - 1
    perplexity = exp(loss)
    bits per byte = loss * N / (ln 2 * bytes of those N tokens)    independent of the tokenizer

    python -m training.evaluate --model runs/shakespeare-cpu --text my.txt
    python -m training.evaluate --model runs/fineweb-124m --hellaswag hellaswag_val.jsonl
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import tyro

from model import GPT, tokenizer
from model.decoder import resolve_window
from model.edge import check_int, exits, read_stdin, read_utf8
from model.find import latest_model, usable_device
from model.gpt import evaluating
from training import hellaswag
from training.documents import find_inputs, is_jsonl, is_table, opened
from training.metrics import to_json
from training.shards import holds_tokens

PIECE_TOKENS = 1024  # a long text is read in pieces of this size
MAX_STDIN_BYTES = 1 << 30
BATCH_TOKENS = 4096  # per forward; more gains nothing on 2 cores and costs memory


def evaluate_tokens(
    model: GPT,
    tokens: np.ndarray,
    *,
    window: int | None = None,
    poll: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss of (N,) token ids, N >= 2, in nats per token, in rows of the window.

    The caller's autocast applies; the model's mode is restored. `poll` is called before each
    forward and may raise to end it.

    Raises:
        ValueError: fewer than two tokens, or a bad window.
    """
    T = resolve_window(model, window)
    if len(tokens) < 2:
        raise ValueError(f"evaluate: needs at least 2 tokens, got {len(tokens)}")
    num = len(tokens) - 1
    rows_at_once = max(1, BATCH_TOKENS // T)
    device = model.transformer.wte.weight.device
    # The sum stays on the device, so the host waits once and not for each batch.
    total = torch.zeros((), dtype=torch.float64, device=device)
    with evaluating(model), torch.no_grad():
        at = 0
        while at < num:
            poll()
            rows = min(rows_at_once, (num - at) // T)
            B, S = (rows, T) if rows else (1, num - at)  # the last row is shorter
            ids = torch.from_numpy(tokens[at : at + B * S + 1].astype(np.int64)).to(device)
            total += model(ids[:-1].view(B, S), ids[1:].view(B, S)).double() * (B * S)
            at += B * S
    return total.item() / num


def eval_pieces(num_tokens: int, max_tokens: int, T: int, shares: int) -> list[tuple[int, int]]:
    """[first, last) of the pieces that an evaluation reads; each predicts last - first - 1 tokens.

    A text with at most `max_tokens` to predict is read whole, in `shares` pieces of whole rows of
    T. Pieces of a longer one are spread evenly over its length, so that evaluations of different
    sizes see the same kind of text.
    """
    size = num_tokens - 1
    if size > max_tokens:
        piece = min(PIECE_TOKENS, max_tokens)
        starts = np.linspace(0, size - piece, max_tokens // piece, dtype=np.int64).tolist()
        return [(start, start + piece + 1) for start in starts]
    rows = -(-size // T)
    edges = [min(rows * i // shares * T, size) for i in range(shares + 1)]
    return [(first, last + 1) for first, last in itertools.pairwise(edges) if last > first]


def evaluate_text(
    model: GPT, text: bytes, *, window: int | None = None, max_tokens: int | None = None
) -> dict[str, float]:
    """Score UTF-8 text, or its first `max_tokens` tokens, without a byte order mark.

    Returns:
        loss in nats per token, perplexity, bits_per_byte, num_tokens and num_bytes that were
        predicted, and the window.

    Raises:
        ValueError: the text is not UTF-8 or too short, or the model has another vocabulary.
    """
    if max_tokens is not None:
        check_int("evaluate", "max_tokens", max_tokens, 2, 10**12)
    tokenizer.check_vocabulary("evaluate", model.config.vocab_size)
    tokens = tokenizer.encode(read_utf8("evaluate: the text", text))[:max_tokens]
    loss = evaluate_tokens(model, tokens, window=window)
    if not math.isfinite(loss):
        raise ValueError(f"evaluate: the loss is {loss}; the model's weights are not usable")
    num_bytes = len(tokenizer.get_encoding().decode_bytes(tokens[1:].tolist()))
    num = len(tokens) - 1
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # fp64 ends at exp(709)
        "bits_per_byte": loss * num / (math.log(2) * num_bytes),
        "num_tokens": num,
        "num_bytes": num_bytes,
        "window": resolve_window(model, window),
    }


@dataclass(frozen=True)
class Options:
    """Loss, perplexity and bits per byte of a model on a text, or its HellaSwag score."""

    text: str | None = None  # UTF-8 file; - reads stdin.
    hellaswag: str | None = None  # hellaswag_val.jsonl instead of a text.
    model: str | None = None  # Run, model folder or .safetensors file. Default: newest under runs/.
    window: int | None = None  # Tokens the model sees at once. Default: as many as in training.
    max_tokens: int | None = None  # Score at most this many tokens.
    max_items: int | None = None  # Score at most this many HellaSwag items.
    device: Literal["auto", "cpu", "cuda"] = "auto"  # Where to run.
    json: bool = False  # Print one JSON object.


def _run(options: Options) -> dict[str, Any]:
    if (options.text is None) == (options.hellaswag is None):
        raise ValueError("evaluate: name what to score, either --text FILE or --hellaswag FILE")
    if options.max_items is not None:
        check_int("evaluate", "max_items", options.max_items, 1, 10**9)
    device = usable_device("evaluate", options.device)
    path = latest_model() if options.model is None else options.model
    if options.hellaswag is not None:
        items = hellaswag.read_items(options.hellaswag, options.max_items)
        model = GPT.from_pretrained(path).to(device)
        right, seen = hellaswag.count_right(model, items, options.window)
        return {"model": str(path), "hellaswag": right / seen, "right": right, "items": seen}
    if options.text == "-":
        text = read_stdin("evaluate", MAX_STDIN_BYTES)
    else:
        files = find_inputs([options.text or ""])
        if len(files) > 1 or holds_tokens(files[0]) or is_jsonl(files[0]) or is_table(files[0]):
            raise ValueError(f"evaluate: --text must be one file of plain text, got {options.text}")
        with opened(files[0]) as (unpacked, _):
            text = unpacked.read()
    model = GPT.from_pretrained(path).to(device)
    result = evaluate_text(model, text, window=options.window, max_tokens=options.max_tokens)
    return {"model": str(path), "text": options.text, **result}


def main(args: list[str] | None = None) -> None:
    """`python -m training.evaluate`."""
    with exits():
        options = tyro.cli(Options, prog="python -m training.evaluate", args=args)
        result = _run(options)
        if options.json:
            print(to_json(result))
        elif options.hellaswag is not None:
            score = hellaswag.line(result["right"], result["items"])
            print(f"{score}, {result['model']}; published weights: {hellaswag.PUBLISHED}")
        else:
            print(
                "loss {loss:.4f} nats per token, perplexity {perplexity:.2f}, {bits_per_byte:.4f} "
                "bits per byte ({num_tokens:,} tokens, {num_bytes:,} bytes, window {window}, "
                "{model})".format(**result)
            )


if __name__ == "__main__":
    main()
