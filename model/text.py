"""Text of a model as it is generated: prompts into tokens, tokens into whole characters."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from model import tokenizer
from model.decoder import Decoder, evaluating, resolve_window, rows_of
from model.gpt import GPT
from model.sampling import Sampling

if TYPE_CHECKING:
    import tiktoken


class Piece(NamedTuple):
    """New text of one row: whole characters only, and never the start of a stop string."""

    row: int
    text: str
    num_tokens: int  # of this row so far
    done: bool


@dataclass
class _RowText:
    """Turns the tokens of one row into text that can be shown at once."""

    encoding: "tiktoken.Encoding"
    stop: tuple[str, ...]
    num_tokens: int = 0
    done: bool = False
    held: str = ""  # might be the start of a stop string
    bytes_to_text: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def feed(self, token: int) -> str:
        self.num_tokens += 1
        if token == self.encoding.eot_token:
            return self.finish()
        text = self.bytes_to_text.decode(self.encoding.decode_single_token_bytes(token))
        return self._release(text, final=False)

    def finish(self) -> str:
        """The rest; a character the model left incomplete becomes U+FFFD."""
        if self.done:
            return ""
        text = self._release(self.bytes_to_text.decode(b"", final=True), final=True)
        self.done = True
        return text

    def _release(self, text: str, final: bool) -> str:
        text = self.held + text
        ends = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if ends:
            self.held, self.done = "", True
            return text[: min(ends)]
        keep = 0
        if not final:
            for s in self.stop:
                sizes = range(min(len(s) - 1, len(text)), 0, -1)
                keep = max(keep, next((n for n in sizes if text.endswith(s[:n])), 0))
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def encode_prompt(encoding: "tiktoken.Encoding", prompt: str) -> list[int]:
    """Token ids of a prompt; an empty one starts from <|endoftext|>.

    Raises:
        ValueError: the string holds a lone surrogate, which stands for a byte that is not UTF-8.
    """

    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"generate: the prompt is not UTF-8: character {error.start} is {prompt[error.start]!r}"
        ) from None
    return tokenizer.encode(prompt).tolist() or [encoding.eot_token]


def stream_text(
    model: GPT,
    encoding: "tiktoken.Encoding",
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    window: int | None = None,
    use_cache: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Iterator[Piece]:
    """Generate text and hand it out as it comes.

    A row ends at <|endoftext|>, before a stop string, or after max_new_tokens; its last piece
    has done=True.

    Args:
        model: The model; its vocabulary must hold the encoding's.
        encoding: GPT-2's (model.tokenizer.get_encoding).
        prompts: An empty one starts from <|endoftext|>.
        sampling: How to choose, and where to stop.
        num_samples: Rows per prompt; row = prompt * num_samples + sample.
        window: See `Decoder`.
        use_cache: See `Decoder`.
        notify: Gets a line for each prompt that had to be cropped.

    Raises:
        ValueError: a bad window, prompt or number of samples, or a model of another vocabulary.
    """
    if model.config.vocab_size < encoding.n_vocab:
        raise ValueError(
            f"generate: the model has {model.config.vocab_size} tokens, the encoding "
            f"{encoding.name!r} {encoding.n_vocab}"
        )
    limit = resolve_window(model, window)
    ids = [encode_prompt(encoding, prompt) for prompt in prompts]
    for i, prompt_ids in enumerate(ids):
        if len(prompt_ids) > limit and notify:
            notify(
                f"prompt {i + 1} has {len(prompt_ids)} tokens, the window holds {limit}: "
                f"only its last {limit} are read"
            )
    rows, numbers = rows_of(ids, num_samples)
    known = encoding.n_vocab  # a padded vocabulary has logits for ids that are no tokens
    decoder = Decoder(model, rows, sampling, numbers, limit, use_cache, vocab_size=known)
    return _pieces(decoder, [_RowText(encoding, sampling.stop) for _ in rows])


def _pieces(decoder: Decoder, texts: list[_RowText]) -> Iterator[Piece]:
    """The loop of `stream_text`, apart so that bad input raises at the call, not at first use."""
    with evaluating(decoder.model):
        for _ in range(decoder.sampling.max_new_tokens):
            for r, token in enumerate(decoder.step()):
                if texts[r].done:
                    continue
                piece = texts[r].feed(token)
                if piece or texts[r].done:
                    yield Piece(r, piece, texts[r].num_tokens, texts[r].done)
            if all(text.done for text in texts):
                return
    for r, text in enumerate(texts):
        if not text.done:
            yield Piece(r, text.finish(), text.num_tokens, True)


def generate_text(
    model: GPT,
    encoding: "tiktoken.Encoding",
    prompts: Sequence[str],
    sampling: Sampling,
    **more: Any,
) -> list[str]:
    """The continuation of each row, prompts not included; arguments as for `stream_text`."""
    texts: dict[int, str] = {}
    for piece in stream_text(model, encoding, prompts, sampling, **more):
        texts[piece.row] = texts.get(piece.row, "") + piece.text
    return [texts[r] for r in sorted(texts)]
