"""Generation token by token, with a KV cache.

One step for R rows, where row r has n_r tokens:

    first step, and after a slide    prefill: all positions at once; logits of the last one
    every other step                 decode: one position per row against the cached keys

Both run the model's own residual stream; its causal_attention also keeps the keys and values
(prefill) or reads them (decode).

Decode reads every weight once for R tokens, so it is bound by weight bytes (fp32 124M: 0.5 GB per
step) and uses plain matmuls; the caches add 2 * L * C * n_r values per row. On CUDA it is one
captured graph over the whole window, because its launches would take longer than its work.

The window is the context the model was trained with, unless the caller gives another: positions
beyond it never had a gradient. When a row outgrows it, the last half is kept and prefilled again
from position 0.

Each row draws one number per step from a stream that depends only on the seed, the sample number
and the prompt. So a prompt gives the same text whatever else is in the batch, up to rounding: a
matmul over another number of rows may differ in the last bit.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import EAGER, Ops
from model.edge import check_int, one_line
from model.gpt import GPT
from model.sampling import Sampling, sample

MAX_ROWS = 4096  # texts at once
MAX_TURNED_BYTES = 4 << 30  # transposed copies of a model's weights; fp32 774M needs 1.9 GB


def resolve_window(model: GPT, window: int | None) -> int:
    """The window to generate in: the trained context unless one is given."""
    window = max(model.trained_context, 2) if window is None else window
    check_int("generate", "window", window, 2, model.config.block_size)
    return window


class Cache:
    """Keys and values of every layer, for `num_rows` rows of at most `window` positions.

    `keep` and `attend` take the place of the model's causal_attention. The layers call them in
    turn, so each pass through the model begins with `start_prefill` or `start_decode`.
    """

    def __init__(self, model: GPT, num_rows: int, window: int):
        self.model, self.num_rows, self.window = model, num_rows, window
        self.kv: Tensor | None = None  # (layer, k or v, R, H, window, D)

    def start_prefill(self, rows: list[int]) -> None:
        """Call this before a pass over all positions of these rows."""
        self.layer, self.rows = 0, rows

    def start_decode(self, positions: Tensor | int, span: int) -> None:
        """Call this before a pass over one position of every row.

        Args:
            positions: (R,) int64, or the one position that all rows share (needs no mask).
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
        (B, S, _), config = qkv.shape, self.model.config
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
        new = qkv.view(B, S, 3, n_head, config.head_dim)[:, :, 1:].permute(2, 0, 3, 1, 4)
        self.kv[self.layer][:, self.rows, :, :S] = new
        self.layer += 1
        return EAGER.causal_attention(qkv, n_head, dropout_p)

    def attend(self, qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        """Attention of one new position per row to the cached ones, (R, 1, 3C) -> (R, 1, C)."""
        assert self.kv is not None
        q, k, v = qkv.view(self.num_rows, 3, n_head, -1).unbind(1)  # (R, H, D)
        keys, values = self.kv[self.layer].unbind(0)  # (R, H, window, D)
        self.layer += 1
        keys[self.every, :, self.positions] = k
        values[self.every, :, self.positions] = v
        keys, values = keys[:, :, : self.span], values[:, :, : self.span]
        y = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=self.mask)
        return y.reshape(self.num_rows, 1, -1)


class _RowLinear(nn.Linear):
    """nn.Linear of one row as a matrix-vector product.

    In bf16 this reads the weight as it is; a matrix product would pack it first. For 24 weights of
    (3072, 768), 113 MB, it takes 15 ms instead of 22 on one core of a Xeon with AMX. Reading them
    alone takes 10.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmv(self.bias, self.weight, input.view(-1)).view(1, 1, -1)


def _row_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """gelu_mlp of one row, as matrix-vector products."""
    h = F.gelu(torch.addmv(b_fc, w_fc, x.view(-1)), approximate="tanh")
    return torch.addmv(b_proj, w_proj, h).view(1, 1, -1)


def _twin(
    module: nn.Module, ops: Ops, views: Mapping[Tensor, Tensor], linear: type[nn.Module]
) -> nn.Module:
    """`module` in eval mode, with other ops, views of some weights and a class for its nn.Linear.

    It shares everything else. Blocks compiled for training run uncompiled in it. copy.deepcopy
    would take 10 ms for 12 layers.
    """
    twin = module.__new__(linear if type(module) is nn.Linear else type(module))
    twin.__dict__ = {**module.__dict__, "training": False, "_compiled_call_impl": None}
    if "ops" in module.__dict__:
        twin.__dict__["ops"] = ops
    twin._parameters = {name: views.get(p, p) for name, p in module._parameters.items()}  # type: ignore
    twin._modules = {
        name: _twin(child, ops, views, linear) for name, child in module.named_children()
    }
    return twin


class Decoder:
    """Token-level generation: every `step` returns one token for each row.

    Row = prompt * num_samples + sample. The model may be on any device and in either mode; it
    generates without dropout.

    Args:
        prompts: Token ids, at least one each. Only the last `window` ids of a prompt are read.
        num_samples: Rows for each prompt.
        window: See the top of this file; None is the trained context.
        vocab_size: Tokens from this id on are never chosen; None is the model's vocabulary.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, too many rows, a bad window.
    """

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_samples: int = 1,
        window: int | None = None,
        vocab_size: int | None = None,
    ):
        self.model, self.sampling, self.vocab_size = model, sampling, vocab_size
        self.window = resolve_window(model, window)
        if not 1 <= len(prompts) <= MAX_ROWS:
            raise ValueError(
                f'generate: needs 1 to {MAX_ROWS:,} prompts (an empty one is ""), '
                f"got {len(prompts):,}"
            )
        check_int("generate", "num_samples", num_samples, 1, MAX_ROWS // len(prompts))
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"generate: prompt {i + 1} has no token to start from")
            if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
                raise ValueError(
                    f"generate: prompt {i + 1} has a token outside the vocabulary of "
                    f"{model.config.vocab_size}: {min(prompt)} to {max(prompt)}"
                )
        rows = [(prompt, number) for prompt in prompts for number in range(num_samples)]
        self.contexts = [list(prompt)[-self.window :] for prompt, _ in rows]
        # It includes the prompt, or an untrained model would answer every prompt alike.
        self.streams = [
            np.random.default_rng([sampling.seed, number, *prompt]) for prompt, number in rows
        ]
        # Rows whose keys are not in the cache: all at first, and later a row that has just slid.
        self.uncached_rows = [*range(len(rows))]
        self.cache = Cache(model, len(rows), self.window)
        stream, wte = model.transformer, model.transformer.wte.weight
        self.device = wte.device
        one_row_on_cpu = self.device.type == "cpu" and len(rows) == 1
        self.one_bf16_row = one_row_on_cpu and wte.dtype == torch.bfloat16
        decoding, linear = replace(EAGER, causal_attention=self.cache.attend), nn.Linear
        self.head, views = wte.t(), {}  # (C, Vp)
        if self.one_bf16_row:
            decoding, linear = replace(decoding, gelu_mlp=_row_mlp), _RowLinear
        elif one_row_on_cpu:
            self.head, views = _turned_weights(model)
        # Eager too: a run's own ops are chosen and checked for its dtype, and samples are in fp32.
        prefilling = replace(EAGER, causal_attention=self.cache.keep)
        self.prefill = _twin(stream, prefilling, {}, nn.Linear)
        self.decode = _twin(stream, decoding, views, linear)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def step(self) -> list[int]:
        """The next token of every row.

        Raises:
            ValueError: the model's logits are not finite.
        """
        rows, self.uncached_rows = self.uncached_rows, []
        if len(rows) == len(self.contexts):
            logits = self._prefill(rows)
        else:
            logits = self._decode()
            if rows:  # decode gave them logits too, but from the keys of before the slide
                logits[rows] = self._prefill(rows)
        logits = logits[:, : self.vocab_size]
        draws = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64)
        tokens: list[int] = sample(logits, draws.to(logits.device), self.sampling).tolist()
        if not torch.isfinite(logits.amax(dim=-1)).all():  # a NaN anywhere makes the maximum NaN
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

    def _prefill(self, rows: list[int]) -> Tensor:
        """Logits (len(rows), V) at the end of these rows; their keys and values are kept.

        Rows are padded on the right, where a causal model cannot look, so each keeps positions
        from 0 and gives what it would give alone.
        """
        model, contexts = self.model, [self.contexts[r] for r in rows]
        S = max(map(len, contexts))
        idx = torch.tensor([c + [0] * (S - len(c)) for c in contexts], device=self.device)
        self.cache.start_prefill(rows)
        y, _ = self.prefill(idx, model.residual_dtype)
        last = y[[*range(len(rows))], [len(c) - 1 for c in contexts]]
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
        """Logits (R, V) of one position for each row.

        Args:
            tokens: (R,) int64.
            positions, span: See `Cache.start_decode`.
        """
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
            with _capturing:
                self.graph = self._capture(state.to(self.device))
        self.inputs.copy_(state)
        self.graph.replay()
        return self.outputs

    def _capture(self, inputs: Tensor) -> torch.cuda.CUDAGraph:
        # Warm up on a side stream, as capture demands. The extra runs store the same keys at the
        # same place as the real one, so they change nothing.
        self.inputs, side, graph = inputs, _side_stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._decode_step(inputs[0], inputs[1], self.window)
        torch.cuda.current_stream().wait_stream(side)
        # Another thread may pin memory meanwhile, hence thread_local.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self.outputs = self._decode_step(inputs[0], inputs[1], self.window)
        return graph


_capturing = threading.Lock()  # a process captures one graph at a time, and all use one stream


@cache
def _side_stream() -> torch.cuda.Stream:
    """All decoders share one, because cuBLAS keeps a workspace of 32 MB for each stream it saw."""
    return torch.cuda.Stream()


_turned: WeakKeyDictionary[GPT, tuple[list, Tensor, dict[Tensor, Tensor]]] = WeakKeyDictionary()


def _turned_weights(model: GPT) -> tuple[Tensor, dict[Tensor, Tensor]]:
    """The head as (C, Vp), and transposed views of copies of some weights stored as (in, out).

    A CPU multiplies one row faster by a weight stored like this, if the result is wider than the
    row. For a row of C = 768 the c_attn weights (57 MB) take 4.2 ms instead of 5.5, c_fc 3.0
    instead of 4.2, the head 10.2 instead of 14.2 (2 Zen 3 cores, fp32, MKL). The other two gain
    nothing. The copies are kept per model, and renewed when training has changed a weight.
    """
    widening = ("wte.weight", "c_attn.weight", "c_fc.weight")
    wte, *weights = (p for name, p in model.named_parameters() if name.endswith(widening))
    if wte.nbytes + sum(w.nbytes for w in weights) > MAX_TURNED_BYTES:
        return wte.t(), {}
    versions = [(w.data_ptr(), w._version) for w in (wte, *weights)]
    if model not in _turned or _turned[model][0] != versions:
        views: dict[Tensor, Tensor] = {w: w.detach().t().contiguous().t() for w in weights}
        _turned[model] = versions, wte.detach().t().contiguous(), views
    return _turned[model][1:]


def generate_tokens(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    window: int | None = None,
) -> list[list[int]]:
    """New tokens of each row; arguments and errors as for `Decoder`."""
    decoder = Decoder(model, prompts, sampling, num_samples, window)
    steps = [decoder.step() for _ in range(sampling.max_new_tokens)]
    return [[tokens[r] for tokens in steps] for r in range(len(decoder.contexts))]
