"""Generation token by token, with a KV cache.

One step for R rows of which row r has seen n_r tokens:

    first step, and after a slide    prefill: all positions at once; logits of the last one
    every other step                 decode: one position per row against the kept keys

Both are the model's own residual stream, run with an op set whose causal_attention also keeps
keys and values (prefill) or reads them (decode).

Decode reads every weight once for R tokens, so it is bound by weight bytes (fp32 124M: 0.5 GB a
step) and uses plain matmuls; the caches add 2 * L * C * n_r values per row. On CUDA the decode
step is one captured graph over the whole window, since its launches would outlast its work.

The window is the context the model was trained at, unless said otherwise: positions beyond it
never had a gradient. When a row outgrows it, the last half is kept and prefilled again from
position 0. The uncached path follows the same rule and recomputes everything every step: it is
the reference, not an alternative.

Sampling draws one number per row and step from a stream that depends on the seed, the sample
number and the prompt alone, so a prompt gives the same text whatever else is in the batch (up to
rounding: a matmul over another number of rows may differ in the last bit).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import EAGER, Ops
from model.edge import check_int, one_line
from model.gpt import GPT, Block
from model.sampling import Sampling, sample

MAX_ROWS = 4096  # texts at once
MAX_TURNED_BYTES = 4 << 30  # second copies of a model's weights; fp32 774M needs 1.9 GB


def resolve_window(model: GPT, window: int | None) -> int:
    """The window to generate in: the trained context unless one is given."""
    window = max(model.trained_context, 2) if window is None else window
    check_int("generate", "window", window, 2, model.config.block_size)
    return window


class Cache:
    """Keys and values of every layer, for R = num_rows rows of at most `window` positions.

    `keep` and `attend` take the place of causal_attention. The layers of a model call them in turn,
    so `start` comes before each pass.
    """

    def __init__(self, model: GPT, num_rows: int, window: int):
        self.model, self.num_rows, self.window = model, num_rows, window
        self.kv: Tensor | None = None  # (layer, k or v, R, H, window, D)

    def start(self, rows: list[int]) -> None:
        """Before a pass over all positions of `rows`, whose keys and values are to be kept."""
        self.layer, self.rows = 0, rows

    def start_decode(self, positions: Tensor | int, span: int) -> None:
        """Before a pass over one position of every row.

        Args:
            positions: (R,) int64, or one position that all rows share (then nothing needs a mask).
            span: Positions to attend over; those past a row's own are masked.
        """
        self.layer, self.positions, self.span = 0, positions, span
        self.mask, self.every = None, slice(None)
        if isinstance(positions, Tensor):
            columns = torch.arange(span, device=positions.device)
            self.mask = (columns <= positions[:, None])[:, None, None]  # (R, 1, 1, span)
            self.every = torch.arange(self.num_rows, device=positions.device)

    def keep(self, qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        """The model's attention, (len(rows), S, 3C) -> (len(rows), S, C)."""
        (B, S, C3), config = qkv.shape, self.model.config
        kv = qkv.view(B, S, 3, n_head, C3 // (3 * n_head))[:, :, 1:].permute(2, 0, 3, 1, 4)
        if self.kv is None:
            # In the dtype of qkv, which autocast decides. Zeros, because masked positions are still
            # multiplied, and 0 * NaN is NaN.
            shape = (config.n_layer, 2, self.num_rows, n_head, self.window, config.head_dim)
            try:
                self.kv = torch.zeros(shape, dtype=qkv.dtype, device=qkv.device)
            except RuntimeError as error:
                raise ValueError(
                    f"generate: no memory for the keys and values of {self.num_rows:,} texts; "
                    f"take fewer or a smaller window ({one_line(error, 160)})"
                ) from None
        self.kv[self.layer][:, self.rows, :, :S] = kv
        self.layer += 1
        return self.model.ops.causal_attention(qkv, n_head, dropout_p)

    def attend(self, qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        """Attention of one new position per row to those kept, (R, 1, 3C) -> (R, 1, C)."""
        assert self.kv is not None
        (R, _, C3), span = qkv.shape, self.span
        q, k, v = qkv.view(R, 3, n_head, C3 // (3 * n_head)).unbind(1)
        keys, values = self.kv[self.layer].unbind(0)  # (R, H, window, D)
        self.layer += 1
        keys[self.every, :, self.positions] = k
        values[self.every, :, self.positions] = v
        y = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys[:, :, :span], values[:, :, :span], attn_mask=self.mask
        )
        return y.reshape(R, 1, C3 // 3)


class _RowLinear(nn.Linear):
    """nn.Linear of one row as a matrix-vector product.

    In bf16 that reads the weight as it is, where a product of matrices packs it first: 15 in place
    of 22 ms for 113 MB of (3072, 768), one core of a Xeon with AMX; reading them takes 10.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmv(self.bias, self.weight, input.view(-1)).view(1, 1, -1)


def _row_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """gelu_mlp of one row."""
    h = F.gelu(torch.addmv(b_fc, w_fc, x.view(-1)), approximate="tanh")
    return torch.addmv(b_proj, w_proj, h).view(1, 1, -1)


M = TypeVar("M", bound=nn.Module)


def _with(module: M, ops: Ops, views: Mapping[Tensor, Tensor], linear: type = nn.Linear) -> M:
    """The module again, in eval mode, with other ops and some weights as views; all else is shared.

    Not copy.deepcopy, which takes 10 ms for 12 layers. What compiled blocks run is left behind.
    """
    twin = module.__new__(type(module))
    if type(module) is nn.Linear:
        twin.__class__ = linear
    twin.__dict__ = {**module.__dict__, "training": False, "_compiled_call_impl": None}
    twin._parameters = {name: views.get(p, p) for name, p in module._parameters.items()}  # type: ignore
    twin._modules = {
        name: m and _with(m, ops, views, linear) for name, m in module._modules.items()
    }
    if "ops" in twin.__dict__:
        twin.__dict__["ops"] = ops
    return twin


class Decoder:
    """Token-level generation: every `step` gives one token for each row.

    The model is on any device and in eval mode (see `evaluating`). Rows begin with the token ids of
    `prompts`, at least one each, cropped left to the window: the tokens a row may have before the
    last half is kept, by default the trained context.

    Args:
        sample_numbers: Stream of draws each row uses; all 0 by default.
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
        sample_numbers: Sequence[int] | None = None,
        window: int | None = None,
        use_cache: bool = True,
        *,
        vocab_size: int | None = None,
    ):
        self.model = model
        self.sampling = sampling
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
        # Rows whose keys are not in the cache: all at first, and a row that has just slid.
        self.uncached_rows = [*range(len(prompts))]
        self.cache = Cache(model, len(prompts), self.window)
        one_row_on_cpu = self.device.type == "cpu" and len(prompts) == 1
        wte = model.transformer.wte.weight
        self.one_bf16_row = one_row_on_cpu and wte.dtype == torch.bfloat16
        turn = use_cache and one_row_on_cpu and not self.one_bf16_row
        turned = _turned_weights(model) if turn else {}
        self.head = turned[wte] if turned else wte.t()  # (C, Vp)
        views = {w: copied.t() for w, copied in turned.items() if w is not wte}
        keep, attend = self.cache.keep, self.cache.attend
        stream = model.transformer
        self.prefill = _with(stream, replace(model.ops, causal_attention=keep), {})
        decoding = replace(EAGER, causal_attention=attend)
        if self.one_bf16_row:
            decoding = replace(decoding, gelu_mlp=_row_mlp)
        linear = _RowLinear if self.one_bf16_row else nn.Linear
        self.decode = _with(stream, decoding, views, linear)
        self.graph: torch.cuda.CUDAGraph | None = None

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
        if not torch.isfinite(logits.amax(dim=-1)).all():  # which a NaN anywhere makes NaN
            raise ValueError(
                "generate: the model's logits are not finite, so no token can be chosen: its "
                "training failed, or its weights overflow in this dtype; try an earlier checkpoint"
            )
        for r, token in enumerate(tokens):
            context = self.contexts[r]
            context.append(token)
            if len(context) > self.window:
                del context[: len(context) - self.window // 2]
                self.uncached_rows.append(r)
        return tokens

    # ---- without a cache

    def _uncached_logits(self) -> Tensor:
        """(R, V), each row alone and from scratch."""
        weight = self.model.transformer.wte.weight[: self.model.config.vocab_size]
        hidden = []
        for context in self.contexts:
            idx = torch.tensor([context], device=self.device)
            hidden.append(self.model.transformer(idx, self.model.residual_dtype)[0][:, -1])
        self.uncached_rows.clear()
        return F.linear(torch.cat(hidden), weight)

    # ---- with a cache

    def _cached_logits(self) -> Tensor:
        rows, self.uncached_rows = self.uncached_rows, []
        if len(rows) == len(self.contexts):
            return self._prefill(rows)
        logits = self._decode()
        if rows:  # decode gave them logits too, from keys of where they stood before they slid
            logits[rows] = self._prefill(rows)
        return logits

    def _prefill(self, rows: list[int]) -> Tensor:
        """Logits (len(rows), V) at the end of these rows; their keys and values are kept.

        Rows are padded on the right, where a causal model cannot look, so each keeps positions
        from 0 and gives what it would give alone.
        """
        model, contexts = self.model, [self.contexts[r] for r in rows]
        S = max(map(len, contexts))
        idx = torch.tensor([c + [0] * (S - len(c)) for c in contexts], device=self.device)
        self.cache.start(rows)
        y, _ = self.prefill(idx, model.residual_dtype)
        ends = torch.tensor([len(c) - 1 for c in contexts], device=self.device)
        last = y[torch.arange(len(rows), device=self.device), ends]
        return F.linear(last, model.transformer.wte.weight[: model.config.vocab_size])

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
        """Logits (R, V) of one position for each row; tokens (R,) int64, rest as in the cache."""
        self.cache.start_decode(positions, span)
        one = isinstance(positions, int)
        at = slice(positions, positions + 1) if one else positions[:, None]
        y, _ = self.decode(tokens[:, None], self.model.residual_dtype, at)
        z = torch.mv(self.head.t(), y[0, 0])[None] if self.one_bf16_row else y[:, 0] @ self.head
        return z[:, : self.model.config.vocab_size]

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


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """The model in eval mode inside, as it was after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def rows_of(prompts: Sequence[Sequence[int]], num_samples: int) -> tuple[list[Sequence[int]], list]:
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
) -> list[list[int]]:
    """New tokens of each row, row = prompt * num_samples + sample; the rest as for `Decoder`."""
    rows, numbers = rows_of(prompts, num_samples)
    with evaluating(model):
        decoder = Decoder(model, rows, sampling, numbers, window, use_cache)
        steps = [decoder.step() for _ in range(sampling.max_new_tokens)]
    return [[tokens[r] for tokens in steps] for r in range(len(rows))]
