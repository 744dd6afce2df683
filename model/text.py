"""A model's text as it is generated: prompts to tokens, tokens to whole characters."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from model import tokenizer
from model.decoder import Decoder, resolve_window
from model.gpt import GPT
from model.sampling import Sampling


class Piece(NamedTuple):
    """New text of one row: whole characters, and never the start of a stop string."""

    row: int
    text: str
    num_tokens: int  # of this row so far


class _RowText:
    """Turns the bytes of one row into text that can be shown."""

    def __init__(self, stop: tuple[str, ...]):
        self.stop, self.done = stop, False
        self.held = ""  # not shown yet: it might be the start of a stop string
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, final: bool = False) -> str:
        """The text that can be shown now; at the end an incomplete character becomes U+FFFD."""
        text = self.held + self.decoder.decode(data, final)
        ends = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if ends:
            self.held, self.done = "", True
            return text[: min(ends)]
        keep = 0
        if not final:
            starts = (s[:n] for s in self.stop for n in range(1, min(len(s), len(text) + 1)))
            keep = max((len(start) for start in starts if text.endswith(start)), default=0)
        self.held, self.done = text[len(text) - keep :], final
        return text[: len(text) - keep]


def stream_text(
    model: GPT,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    window: int | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[Piece]:
    """Generate text and yield it piece by piece; row = prompt * num_samples + sample.

    In a prompt <|endoftext|> is the token, and an empty prompt is that token. A row ends at that
    token, before a stop string, or after max_new_tokens.

    Args:
        notify: Gets a line for each prompt that was cropped to the window.

    Raises:
        ValueError: a bad window, prompt or number of samples, or a model of another vocabulary.
    """
    tokenizer.check_vocabulary("generate", model.config.vocab_size)
    limit = resolve_window(model, window)
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    for i, prompt_ids in enumerate(ids):
        if len(prompt_ids) > limit:
            notify(
                f"prompt {i + 1} has {len(prompt_ids)} tokens, the window holds {limit}: "
                f"only its last {limit} are read"
            )
    # A padded vocabulary has logits for ids that are no tokens.
    decoder = Decoder(model, ids, sampling, num_samples, limit, tokenizer.VOCAB_SIZE)
    return _pieces(decoder, [_RowText(sampling.stop) for _ in decoder.contexts])


def _pieces(decoder: Decoder, rows: list[_RowText]) -> Iterator[Piece]:
    """The loop of `stream_text`, separate so that `stream_text` itself can raise."""
    num, spell = 0, tokenizer.get_encoding().decode_single_token_bytes
    while num < decoder.sampling.max_new_tokens and not all(row.done for row in rows):
        num += 1
        for r, token in enumerate(decoder.step()):
            if not rows[r].done:
                end = token == tokenizer.EOT
                text = rows[r].feed(b"" if end else spell(token), end)
                if text or rows[r].done:
                    yield Piece(r, text, num)
    for r, row in enumerate(rows):
        if not row.done:
            yield Piece(r, row.feed(b"", final=True), num)
