"""Generation with a KV cache.

One step for R rows of which row r has seen n_r tokens:

    first step, and after a slide    prefill: all positions at once through the model's own ops,
                                     keys and values kept; logits of the last position
    every other step                 decode: one position per row against the kept keys

Decode reads every weight once for R tokens, so it is bound by weight bytes (fp32 124M: 0.5 GB a
step) and uses plain matmuls; the caches add 2 * L * C * n_r values a row. On CUDA the decode
step is one captured graph over the whole window, since its launches would outlast its work.

The window is the context the model was trained at, unless said otherwise: positions beyond it
never had a gradient. When a row outgrows it, the last half is kept and prefilled again from
position 0. The uncached path follows the same rule and recomputes everything every step: it is
the reference, not an alternative.

Sampling draws one number per row and step from a stream that depends on the seed, the sample
number and the prompt alone, so a prompt gives the same text whatever else is in the batch (up to
rounding: a matmul over another number of rows may differ in the last bit).

    python -m model.generate --prompt "ROMEO:" --temperature 0.8 --top-k 50
    python -m model.generate --model runs/smoke --prompt - --num-samples 3 < prompt.txt
"""

import codecs
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.edge import check_int, exits, is_real, one_line, quoted
from model.gpt import GPT, Block

if TYPE_CHECKING:
    import tiktoken

MAX_NEW_TOKENS = 1_000_000  # of a text; a typo in a number must not run for years
MAX_ROWS = 4096  # texts at once
MAX_PROMPT_BYTES = 16 << 20  # of standard input; only its end fits any window
GREEDY_BELOW = 1e-6  # a lower temperature tells apart what fp32 logits cannot: it is greedy
MAX_TURNED_BYTES = 4 << 30  # second copies of a model's weights; fp32 774M needs 1.9 GB


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: Tokens to add to each prompt.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only the k most likely tokens; 0 is off.
        top_p: Only the most likely tokens that together reach this probability; 1 is off.
        seed: Same seed, prompt and sample number: same text.
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
    """Choose one token a row by inverting the cumulative distribution.

    Args:
        logits: (R, V).
        draws: (R,), fp64, uniform in [0, 1).
        sampling: top_k is applied before top_p, as transformers does.

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
    # First index whose cumulative exceeds the draw; a draw of nearly 1 must not fall off the end.
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1 if order is not None else z.shape[-1] - 1
    target = draws[:, None] * cumulative[:, -1:]
    choice = (cumulative <= target).sum(dim=-1, keepdim=True).clamp(max=last)
    return (choice if order is None else order.gather(-1, choice))[:, 0]


def resolve_window(model: GPT, window: int | None) -> int:
    """The window to generate in: the trained context unless one is given."""
    window = max(model.trained_context, 2) if window is None else window
    check_int("generate", "window", window, 2, model.config.block_size)
    return window


class Decoder:
    """Token-level generation: every `step` gives one token for each row.

    Args:
        model: On any device; in eval mode (see `evaluating`).
        prompts: Token ids of each row, at least one each; cropped left to the window.
        sampling: How to choose.
        sample_numbers: Stream of draws each row uses; all 0 by default.
        window: Tokens a row may have before the last half is kept; None: the trained context.
        use_cache: False recomputes the whole row every step (the reference).
        vocab_size: Tokens at and above are never chosen; None: the model's vocabulary.

    Raises:
        ValueError: an empty row, an id outside the vocabulary, a bad window.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        sample_numbers: Sequence[int] | None = None,
        window: int | None = None,
        use_cache: bool = True,
        vocab_size: int | None = None,
    ):
        self.model = model
        self.sampling = sampling
        self.blocks = cast(list[Block], [*model.transformer.h])
        self.window = resolve_window(model, window)
        self.use_cache = use_cache
        self.vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
        self.device = model.transformer.wte.weight.device
        for r, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"generate: row {r} has no token to start from")
            if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
                raise ValueError(
                    f"generate: row {r} has a token outside the vocabulary of "
                    f"{model.config.vocab_size}: {min(prompt)} to {max(prompt)}"
                )
        self.contexts = [list(prompt)[-self.window :] for prompt in prompts]
        numbers = sample_numbers if sample_numbers is not None else [0] * len(prompts)
        # The prompt takes part, or an untrained model would answer every prompt alike.
        self.streams = [
            np.random.default_rng([sampling.seed, n, *prompt])
            for n, prompt in zip(numbers, prompts, strict=True)
        ]
        self.fresh = [*range(len(prompts))]  # rows whose keys are not in the cache
        self.cache: Tensor | None = None
        self.turned = _turned_weights(model) if use_cache and self._one_row_on_cpu() else {}
        self.graph: torch.cuda.CUDAGraph | None = None

    def _one_row_on_cpu(self) -> bool:
        return self.device.type == "cpu" and len(self.contexts) == 1

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, from a turned copy of the weight where there is one."""
        turned = self.turned.get(weight)
        if turned is None:
            return F.linear(x, weight, bias)
        return x @ turned if bias is None else torch.addmm(bias, x, turned)

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of every row.

        Raises:
            ValueError: the model's logits are not finite.
        """
        logits = self._cached_logits() if self.use_cache else self._uncached_logits()
        logits = logits[:, : self.vocab_size]
        draws = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64)
        tokens: list[int] = sample(logits, draws.to(logits.device), self.sampling).tolist()
        if not torch.isfinite(logits).all():
            raise ValueError(
                "generate: the model's logits are not finite, so no token can be chosen: its "
                "training failed, or its weights overflow in this dtype; try an earlier checkpoint"
            )
        for r, token in enumerate(tokens):
            context = self.contexts[r]
            context.append(token)
            if len(context) > self.window:
                del context[: len(context) - self.window // 2]
                self.fresh.append(r)
        return tokens

    # ---- without a cache

    def _uncached_logits(self) -> Tensor:
        """(R, V), each row alone and from scratch."""
        weight = self.model.transformer.wte.weight[: self.model.config.vocab_size]
        hidden = []
        for context in self.contexts:
            idx = torch.tensor([context], device=self.device)
            hidden.append(self.model.transformer(idx, self.model.residual_dtype)[:, -1])
        self.fresh.clear()
        return F.linear(torch.cat(hidden), weight)

    # ---- with a cache

    def _cached_logits(self) -> Tensor:
        rows, self.fresh = self.fresh, []
        if len(rows) == len(self.contexts):
            return self._prefill(rows)
        logits = self._decode()
        if rows:  # their entries above are meaningless: no keys of theirs were current
            logits[rows] = self._prefill(rows)
        return logits

    def _prefill(self, rows: list[int]) -> Tensor:
        """Logits (len(rows), V) at the end of these rows; their keys and values are kept.

        Rows are padded on the right, where a causal model cannot look, so each keeps positions
        from 0 and gives what it would give alone.
        """
        model, config = self.model, self.model.config
        contexts = [self.contexts[r] for r in rows]
        S = max(map(len, contexts))
        idx = torch.tensor([c + [0] * (S - len(c)) for c in contexts], device=self.device)
        residual = model.transformer.wte(idx) + model.transformer.wpe.weight[:S]
        if model.residual_dtype is not None:
            residual = residual.to(model.residual_dtype)
        ops, norms = model.ops, [*(block.ln_1 for block in self.blocks)]
        norms.append(model.transformer.ln_f)
        y = ops.layer_norm(residual, norms[0].weight, norms[0].bias, norms[0].eps)
        for layer, block in enumerate(self.blocks):
            qkv = block.attn.c_attn(y)  # (R, S, 3C)
            kv = qkv.view(len(rows), S, 3, config.n_head, config.head_dim)[:, :, 1:]
            if self.cache is None:
                # (layer, k or v, row, head, position, D) in the dtype of qkv, which autocast
                # decides; zeros, because masked positions are still multiplied and 0 * NaN is NaN
                shape = (config.n_layer, 2, len(self.contexts), config.n_head, self.window)
                try:
                    self.cache = torch.zeros(
                        *shape, config.head_dim, dtype=kv.dtype, device=self.device
                    )
                except RuntimeError as error:
                    raise ValueError(
                        f"generate: no memory for the keys and values of {len(self.contexts):,} "
                        f"texts; take fewer or a smaller window ({one_line(error, 160)})"
                    ) from None
            self.cache[layer][:, rows, :, :S] = kv.permute(2, 0, 3, 1, 4)
            branch = block.attn.c_proj(ops.causal_attention(qkv, config.n_head, 0.0))
            y, residual = ops.add_layer_norm(
                branch, residual, block.ln_2.weight, block.ln_2.bias, block.ln_2.eps
            )
            norm = norms[layer + 1]
            y, residual = ops.add_layer_norm(
                block.mlp(y), residual, norm.weight, norm.bias, norm.eps
            )
        ends = torch.tensor([len(c) - 1 for c in contexts], device=self.device)
        last = y[torch.arange(len(rows), device=self.device), ends]
        return F.linear(last, model.transformer.wte.weight[: config.vocab_size])

    def _decode(self) -> Tensor:
        """Logits (R, V) after the last token of every row."""
        # A row that has just slid may end past the cache; it is prefilled right after.
        positions = [min(len(c), self.window) - 1 for c in self.contexts]
        tokens = [c[-1] for c in self.contexts]
        if self.device.type == "cuda":
            return self._replay(tokens, positions)
        if len({*positions}) == 1:
            return self._decode_step(torch.tensor(tokens), positions[0], positions[0] + 1)
        return self._decode_step(torch.tensor(tokens), torch.tensor(positions), max(positions) + 1)

    def _decode_step(self, tokens: Tensor, positions: Tensor | int, span: int) -> Tensor:
        """One position for each row.

        Args:
            tokens: (R,) int64.
            positions: (R,) int64, or one position that all rows share (then nothing needs a mask).
            span: Cache positions to attend over; those past a row's own are masked.
        """
        model, config = self.model, self.model.config
        assert self.cache is not None
        R, C = len(self.contexts), config.n_embd
        rows, mask = slice(None), None
        residual = model.transformer.wte(tokens) + model.transformer.wpe.weight[positions]
        if isinstance(positions, Tensor):
            rows = torch.arange(R, device=self.device)
            columns = torch.arange(span, device=self.device)
            mask = (columns <= positions[:, None])[:, None, None]  # (R, 1, 1, span)
        if model.residual_dtype is not None:
            residual = residual.to(model.residual_dtype)
        for layer, block in enumerate(self.blocks):
            y = _norm(residual, block.ln_1)
            qkv = self._linear(y, block.attn.c_attn.weight, block.attn.c_attn.bias)
            qkv = qkv.view(R, 3, config.n_head, config.head_dim)
            keys, values = self.cache[layer].unbind(0)  # (R, H, window, D)
            keys[rows, :, positions] = qkv[:, 1]
            values[rows, :, positions] = qkv[:, 2]
            attended = F.scaled_dot_product_attention(
                qkv[:, 0].unsqueeze(2), keys[:, :, :span], values[:, :, :span], attn_mask=mask
            )
            residual = residual + block.attn.c_proj(attended.reshape(R, C))
            y = _norm(residual, block.ln_2)
            y = self._linear(y, block.mlp.c_fc.weight, block.mlp.c_fc.bias)
            residual = residual + block.mlp.c_proj(F.gelu(y, approximate="tanh"))
        y = _norm(residual, model.transformer.ln_f)
        return self._linear(y, model.transformer.wte.weight)[:, : config.vocab_size]

    def _replay(self, tokens: list[int], positions: list[int]) -> Tensor:
        """`_decode_step` over the whole window as a CUDA graph, captured at the first call."""
        state = torch.tensor([tokens, positions])
        if self.graph is None:
            self.inputs = state.to(self.device)
            # Warm up on a side stream, as capture demands. The extra runs store the same keys at
            # the same place as the real one, so they change nothing.
            side, graph = _side_stream(), torch.cuda.CUDAGraph()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._decode_step(self.inputs[0], self.inputs[1], self.window)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, stream=side):
                self.outputs = self._decode_step(self.inputs[0], self.inputs[1], self.window)
            self.graph = graph
        self.inputs.copy_(state)
        self.graph.replay()
        return self.outputs


@cache
def _side_stream() -> torch.cuda.Stream:
    """One for all decoders: cuBLAS keeps a workspace of 32 MB for each stream it has seen."""
    return torch.cuda.Stream()


_turned: "WeakKeyDictionary[GPT, tuple[list[tuple[int, int]], dict[Tensor, Tensor]]]"
_turned = WeakKeyDictionary()


def _turned_weights(model: GPT) -> dict[Tensor, Tensor]:
    """(in, out) copies of the weights that a CPU multiplies faster by a single row that way.

    Those that widen a row: one row of C = 768 takes 4.2 in place of 5.5 ms for 57 MB of c_attn
    weights, 3.0 for 4.2 of c_fc, 10.2 for 14.2 for the head (2 Zen 3 cores, fp32, MKL); the other
    two gain nothing. Kept per model, and made again when training has changed a weight.
    """
    blocks = cast(list[Block], [*model.transformer.h])
    weights: list[Tensor] = [model.transformer.wte.weight]
    for block in blocks:
        weights += [block.attn.c_attn.weight, block.mlp.c_fc.weight]
    versions = [(w.data_ptr(), w._version) for w in weights]
    if sum(w.nbytes for w in weights) > MAX_TURNED_BYTES:
        return {}
    known = _turned.get(model)
    if known is None or known[0] != versions:
        known = (versions, {w: w.detach().t().contiguous() for w in weights})
        _turned[model] = known
    return known[1]


def _norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    return F.layer_norm(
        x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps
    )


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """The model in eval mode inside, as it was after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _rows(prompts: Sequence[Sequence[int]], num_samples: int) -> tuple[list[Sequence[int]], list]:
    """Each prompt num_samples times, and the sample number of each row."""
    if not 1 <= len(prompts) <= MAX_ROWS:
        raise ValueError(
            f'generate: needs 1 to {MAX_ROWS:,} prompts (an empty one is ""), got {len(prompts):,}'
        )
    check_int("generate", "num_samples", num_samples, 1, MAX_ROWS // len(prompts))
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    return rows, [*range(num_samples)] * len(prompts)


def generate_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    window: int | None = None,
    use_cache: bool = True,
    stop_token: int | None = None,
) -> list[list[int]]:
    """New tokens of each row, prompts not included.

    Args:
        model: The model.
        prompts: Token ids, at least one each.
        sampling: How to choose; its stop strings are for text and play no part here.
        num_samples: Rows per prompt; row = prompt * num_samples + sample.
        window: See `Decoder`.
        use_cache: See `Decoder`.
        stop_token: A row ends before this token.
    """
    rows, numbers = _rows(prompts, num_samples)
    new: list[list[int]] = [[] for _ in rows]
    done = [False] * len(rows)
    with evaluating(model):
        decoder = Decoder(
            model, rows, sampling, sample_numbers=numbers, window=window, use_cache=use_cache
        )
        for _ in range(sampling.max_new_tokens):
            for r, token in enumerate(decoder.step()):
                done[r] = done[r] or token == stop_token
                if not done[r]:
                    new[r].append(token)
            if all(done):
                break
    return new


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
    from model import tokenizer

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
    rows, numbers = _rows(ids, num_samples)
    decoder = Decoder(
        model, rows, sampling, sample_numbers=numbers, window=window, use_cache=use_cache,
        vocab_size=encoding.n_vocab,
    )  # fmt: skip
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
    *,
    num_samples: int = 1,
    window: int | None = None,
    use_cache: bool = True,
    notify: Callable[[str], None] | None = None,
) -> list[str]:
    """The continuation of each row, prompts not included; see `stream_text`."""
    pieces = stream_text(
        model, encoding, prompts, sampling,
        num_samples=num_samples, window=window, use_cache=use_cache, notify=notify,
    )  # fmt: skip
    texts = [""] * (len(prompts) * num_samples)
    for piece in pieces:
        texts[piece.row] += piece.text
    return texts


# ---- command line


def latest_model(runs: str | Path = "runs") -> Path:
    """The model folder written last under `runs`.

    Raises:
        FileNotFoundError: there is none.
    """
    weights = [p for p in Path(runs).glob("*/model/model.safetensors") if p.is_file()]
    if not weights:
        raise FileNotFoundError(
            f"no model under {Path(runs)}/ yet: train one with `make train`, or name a folder "
            f"with --model"
        )
    return max(weights, key=lambda p: p.stat().st_mtime).parent


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("generate: --prompt - reads standard input, which is closed")
    raw = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(raw) > MAX_PROMPT_BYTES:
        raise ValueError(f"generate: stdin has more than {MAX_PROMPT_BYTES:,} bytes of prompt")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"generate: stdin is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        ) from None


@dataclass(frozen=True)
class Options:
    """Generate text with a trained model.

    Args:
        sampling: How the next token is chosen.
        model: Run, model folder or .safetensors file; without it the newest under runs/.
        prompt: Text to continue, several for a batch; - reads stdin; "" starts a document.
        num_samples: Texts for each prompt.
        window: Tokens the model sees at once; without it the context it was trained at.
        device: Where to run.
        dtype: Of weights and activations.
    """

    sampling: Sampling
    model: str | None = None
    prompt: tuple[str, ...] = ("",)
    num_samples: int = 1
    window: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"


def _run(options: Options) -> None:
    from model.tokenizer import get_encoding  # loading the vocabulary can wait for a valid command

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("generate: --device cuda, but torch sees no GPU here; use --device cpu")
    prompts = [_read_stdin() if p == "-" else p for p in options.prompt]
    path = latest_model() if options.model is None else options.model
    model = GPT.from_pretrained(path)
    model = model.to(device, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    pieces = stream_text(
        model, get_encoding(), prompts, options.sampling,
        num_samples=options.num_samples, window=options.window,
        notify=lambda line: print(f"note: {line}", file=sys.stderr),
    )  # fmt: skip
    num_rows = len(prompts) * options.num_samples
    texts, counts = [""] * num_rows, [0] * num_rows
    start = time.perf_counter()
    if num_rows == 1:
        print(prompts[0], end="", flush=True)
    for piece in pieces:
        texts[piece.row] += piece.text
        counts[piece.row] = piece.num_tokens
        if num_rows == 1:
            print(piece.text, end="", flush=True)
    elapsed = time.perf_counter() - start
    print()
    if num_rows > 1:
        for r, text in enumerate(texts):
            prompt = prompts[r // options.num_samples]
            print(f"--- {r + 1} of {num_rows}\n{prompt}{text}")
    print(
        f"{path}: {sum(counts)} tokens in {elapsed:.2f} s, "
        f"{sum(counts) / max(elapsed, 1e-9):.1f} tokens/s "
        f"on {device}",
        file=sys.stderr,
    )


def main(args: list[str] | None = None) -> None:
    """`python -m model.generate`."""
    import tyro

    with exits():
        _run(
            tyro.cli(tyro.conf.OmitArgPrefixes[Options], prog="python -m model.generate", args=args)
        )


if __name__ == "__main__":
    main()
