"""Generation: the cache against the whole model, sampling against plain formulas."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from kernels import EAGER
from kernels._op import INTERPRETED
from model import GPT, GPTConfig
from model.decoder import Decoder, generate_tokens
from model.sampling import Sampling, sample
from tests.pretend_cuda import pretend_cuda

CONFIG = GPTConfig(block_size=64, vocab_size=197, n_layer=3, n_head=4, n_embd=64)
NUM = 130
GREEDY = Sampling(max_new_tokens=NUM, temperature=0.0)
ONE = replace(GREEDY, max_new_tokens=1)


def random_model(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    """Weights three times as wide as at init, so that one token rarely wins every step."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.06)
        model.transformer.wte.weight[config.vocab_size :].zero_()
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


def plain_tokens(model: GPT, prompt: list[int], sampling: Sampling, window: int) -> list[int]:
    """The same rule without a cache: the whole model on the whole row at every step."""
    context, new = list(prompt)[-window:], []
    stream = np.random.default_rng([sampling.seed, 0, *prompt])
    model.eval()
    for _ in range(sampling.max_new_tokens):
        if len(context) > window:
            context = context[-(window // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([context], device=model.transformer.wte.weight.device))
        draw = torch.tensor([stream.random()], dtype=torch.float64, device=logits.device)
        new.append(int(sample(logits[:, -1], draw, sampling)))
        context.append(new[-1])
    return new


# ---- tokens


@pytest.mark.parametrize("window", [64, 17, 2])
def test_greedy_equals_the_whole_model_past_the_window(model: GPT, window: int):
    """130 tokens: three slides at 64; an odd window; and the smallest, which slides every step."""
    prompt = [5, 90, 3]
    expected = plain_tokens(model, prompt, GREEDY, window)
    assert len({*expected}) > 2  # a constant output would prove little
    assert generate_tokens(model, [prompt], GREEDY, window=window) == [expected]


def test_batch_of_different_lengths_equals_each_alone(model: GPT):
    """Rows of 1, 30, 63 and 64 tokens slide at different steps; one longer than the window."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist()
        for n in (1, 30, 63, 64, 100)
    ]
    batch = generate_tokens(model, prompts, GREEDY)
    for prompt, new in zip(prompts, batch, strict=True):
        assert new == plain_tokens(model, prompt, GREEDY, 64)


def test_sampling_is_the_same_whatever_the_batch(model: GPT):
    sampling = Sampling(max_new_tokens=100, temperature=1.0, top_k=40, top_p=0.95, seed=11)
    prompts = [[7, 8, 9], [1], [50] * 40]
    batch = generate_tokens(model, prompts, sampling, num_samples=2)
    for i, prompt in enumerate(prompts):
        assert generate_tokens(model, [prompt], sampling, num_samples=2) == batch[2 * i : 2 * i + 2]
        assert batch[2 * i] != batch[2 * i + 1]  # samples of one prompt differ
    assert generate_tokens(model, prompts[:1], sampling)[0] == batch[0]
    other = generate_tokens(model, prompts[:1], replace(sampling, seed=12))
    assert other[0] != batch[0]
    shorter = generate_tokens(model, prompts[:1], replace(sampling, max_new_tokens=30))
    assert shorter[0] == batch[0][:30]
    assert plain_tokens(model, prompts[0], sampling, 64) == batch[0]


def test_masked_decode_over_the_whole_window_equals_the_short_one(model: GPT):
    """What a CUDA graph captures, run without one: tensor positions, all of the window."""
    model.eval()
    decoders = [Decoder(model, [[3, 4, 5], [6, 7, 8]], GREEDY) for _ in range(2)]
    for decoder in decoders:
        decoder.step()
    tokens = torch.tensor([9, 10])
    with torch.inference_mode():
        short = decoders[0]._decode_step(tokens, 3, 4)
        masked = decoders[1]._decode_step(tokens, torch.tensor([3, 3]), 64)
    assert (short - masked).abs().max() < 1e-5
    assert (short[0] - short[1]).abs().max() > 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_decode_on_cuda():
    model = random_model().cuda()
    prompts = [[5, 90, 3], [1] * 60]
    plain = [plain_tokens(model, prompt, GREEDY, 64) for prompt in prompts]
    assert generate_tokens(model, prompts, GREEDY) == plain


@pytest.mark.skipif(not INTERPRETED, reason="ops on CPU tensors")
def test_graph_decode_by_the_rules_of_cuda():
    """Replays of one captured step choose the tokens of the same steps run one by one."""
    model = random_model()
    prompts = [[5, 90, 3], [1] * 60]  # the second row slides, so both kinds of step occur
    with pretend_cuda() as pretended:
        decoders = [Decoder(model.eval(), prompts, GREEDY) for _ in range(2)]
        for decoder in decoders:
            decoder.device = torch.device("cuda")
        plain = decoders[1]
        plain._replay = lambda tokens, positions: plain._decode_step(
            torch.tensor(tokens), torch.tensor(positions), plain.window
        )
        replayed, one_by_one = ([d.step() for _ in range(24)] for d in decoders)
    assert replayed == one_by_one
    assert len(pretended.graphs) == 1


@pytest.mark.skipif(not INTERPRETED, reason="ops on CPU tensors")
def test_two_threads_do_not_capture_at_once(monkeypatch: pytest.MonkeyPatch):
    """The page serves two visitors at once; what one runs must not get into the other's graph."""
    inside: list[int] = []
    most: list[int] = []
    modes: list[str] = []
    model = random_model().eval()
    decoders = [Decoder(model, [[5, 90, 3]], GREEDY) for _ in range(2)]
    for decoder in decoders:
        decoder.step()

    def decode_step(tokens: torch.Tensor, *_: Any) -> torch.Tensor:
        inside.append(0)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return tokens

    @contextmanager
    def graph(*_: Any, capture_error_mode: str = "global", **__: Any) -> Iterator[None]:
        modes.append(capture_error_mode)
        yield

    with pretend_cuda(), ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda _: None)
        monkeypatch.setattr(Decoder, "_decode_step", lambda _, *args: decode_step(*args))
        assert len([*pool.map(lambda decoder: decoder._replay([7], [3]), decoders)]) == 2
    assert max(most) == 1
    # And what another thread does meanwhile, such as to pin memory, must not end the capture.
    assert modes == ["thread_local"] * 2


def test_under_autocast_the_cache_has_the_dtype_of_the_keys(model: GPT):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(model, [[5, 90, 3], [1] * 60], GREEDY)
        cached = [decoder.step() for _ in range(8)]  # the second row slides meanwhile
        assert decoder.cache.kv is not None
        assert decoder.cache.kv.dtype == torch.bfloat16
        first = [plain_tokens(model, prompt, ONE, 64)[0] for prompt in ([5, 90, 3], [1] * 60)]
    assert cached[0] == first


def test_a_bf16_row_on_the_cpu_multiplies_vectors(model: GPT):
    """A product of matrices would pack every weight again for each token."""
    half = random_model().bfloat16().eval()
    decoder = Decoder(half, [[5, 90, 3]], GREEDY)
    decoder.step()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        found = decoder._decode()
    with torch.inference_mode():
        want = half(torch.tensor(decoder.contexts))[:, -1]
    torch.testing.assert_close(found, want, atol=0.02, rtol=0.02)
    calls = {event.key for event in recorded.key_averages()}
    assert "aten::addmv" in calls
    assert not calls & {"aten::addmm", "aten::mm", "aten::linear"}


def test_ops_that_a_run_has_chosen_need_not_take_the_dtype_of_its_samples(model: GPT):
    """PyTorch's flash attention and cuDNN's take no fp32 on a GPU, and samples are in fp32."""

    def attention(qkv: torch.Tensor, *_: Any) -> torch.Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    want = generate_tokens(model, [[5, 90, 3]], ONE)
    model.use(replace(EAGER, causal_attention=attention))
    try:
        assert generate_tokens(model, [[5, 90, 3]], ONE) == want
    finally:
        model.use(EAGER)


def test_default_window_is_the_trained_context():
    model = random_model()
    model.trained_context = 8
    prompt = [5, 90, 3]
    assert generate_tokens(model, [prompt], GREEDY) == [plain_tokens(model, prompt, GREEDY, 8)]
    assert generate_tokens(model, [prompt], GREEDY) != [plain_tokens(model, prompt, GREEDY, 64)]


def test_copies_of_weights_follow_training():
    """One row on the CPU decodes from turned copies; they must not outlive an optimizer step."""
    model, prompt = random_model(), [5, 90, 3]
    before = generate_tokens(model, [prompt], GREEDY)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.mul_(-1)  # type: ignore[union-attr]
    after = generate_tokens(model, [prompt], GREEDY)
    assert after == [plain_tokens(model, prompt, GREEDY, 64)]
    assert after != before
    model.double()
    assert generate_tokens(model, [prompt], GREEDY) == [plain_tokens(model, prompt, GREEDY, 64)]


def test_prompts_do_not_share_their_draws(model: GPT):
    """With a temperature that leaves nothing of the model, only the draws are seen."""
    sampling = Sampling(max_new_tokens=50, temperature=1e6)
    first, second = generate_tokens(model, [[1, 2], [2, 1]], sampling)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


def test_dropout_is_off_while_generating():
    model = random_model(replace(CONFIG, dropout=0.5)).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokens = generate_tokens(model, [[1, 2]], GREEDY)
    assert tokens == generate_tokens(model, [[1, 2]], GREEDY)
    assert model.training
    decoder = Decoder(model, [[1, 2]], GREEDY)  # the model is still in training mode
    assert [decoder.step()[0] for _ in range(len(tokens[0]))] == tokens[0]


def test_blocks_compiled_for_training_are_not_run():
    """Every prefill has another length, so they would be compiled again and again."""
    model = random_model()
    expected = generate_tokens(model, [[5, 90, 3]], GREEDY, window=17)

    def refuse(*_: object) -> None:
        raise AssertionError("compiled")

    for block in model.transformer.h:
        block.compile(backend=refuse)
    assert generate_tokens(model, [[5, 90, 3]], GREEDY, window=17) == expected


# ---- the choice of a token


def plain_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """temperature, then top-k, then top-p, in Python floats."""
    scaled = [z / sampling.temperature for z in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    top = max(scaled)
    weights = {i: math.exp(scaled[i] - top) for i in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for i in order:
        if mass >= sampling.top_p:
            break
        kept[i] = weights[i] / total
        mass += kept[i]
    return [kept.get(i, 0.0) / mass for i in range(len(logits))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=7),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1.3, top_k=20, top_p=0.8),
        Sampling(temperature=1.0, top_k=1000),  # more than there are
        Sampling(temperature=1.0, top_p=1e-9),  # the most likely token always stays
    ],
)
def test_sample_inverts_the_distribution(sampling: Sampling):
    """With draws on an even grid each token's share of the results is its probability."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2
    num = 20_000
    draws = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    chosen = sample(logits.expand(num, -1), draws, sampling)
    share = torch.bincount(chosen, minlength=50).double() / num
    expected = torch.tensor(plain_distribution(logits.tolist(), sampling), dtype=torch.float64)
    assert (share - expected).abs().max() < 1.5 / num
    assert not share[expected == 0].any()


def test_sample_at_the_ends():
    logits = torch.tensor([[0.0, 5.0, -torch.inf, 1.0]])
    almost_one = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_k=3), Sampling(top_p=0.9), Sampling(top_k=4)):
        assert sample(logits, almost_one, sampling).item() != 2
        assert sample(logits, torch.zeros(1, dtype=torch.float64), sampling).item() in (0, 1)
    assert sample(logits, almost_one, Sampling(temperature=0.0)).item() == 1
    # u * total may round up to total; a draw of 1, which the generator never makes, stands for it.
    one = torch.ones(1, dtype=torch.float64)
    assert sample(logits, one, Sampling(top_k=3)).item() == 0
    assert sample(logits, one, Sampling()).item() == 3


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 1e-46, 5e-324])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 2**62}])
def test_a_tiny_temperature_is_no_different_from_0(temperature: float, more: dict):
    """Also with ties, which bf16 logits often have, and with logits at the ends of fp32."""
    logits = torch.tensor([[1.0, 4.0, 4.0, -3e38], [3e38, 1.0, -3e38, 3e38]])
    draws = torch.tensor([0.0, 0.99], dtype=torch.float64)
    greedy = sample(logits, draws, Sampling(temperature=0.0, **more))
    assert greedy.tolist() == [1, 0]
    assert torch.equal(sample(logits, draws, Sampling(temperature=temperature, **more)), greedy)
    # The smallest that is not greedy divides without a NaN.
    assert sample(logits[:, :2], draws, Sampling(temperature=1e-6, **more)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e300, 1.7e308])
@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1 - 2**-53, 1.0])
def test_settings_at_their_ends_choose_a_token_there_is(temperature: float, top_p: float):
    logits = torch.tensor([[0.0, 5.0, -torch.inf, 1.0], [3e38, -3e38, -torch.inf, 0.0]])
    for draw in (0.0, 0.5, 1 - 2.0**-53):
        draws = torch.full((2,), draw, dtype=torch.float64)
        chosen = sample(logits, draws, Sampling(temperature=temperature, top_p=top_p))
        assert not (chosen == 2).any()
        if top_p < 1e-9:
            assert chosen.tolist() == [1, 0]
