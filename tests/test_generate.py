"""Generation: cached against uncached, sampling against plain formulas, text out of tokens."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from kernels._op import INTERPRETED
from model import GPT, GPTConfig, generate
from model.decoder import Decoder, generate_tokens
from model.find import latest_model
from model.sampling import Sampling, sample
from model.text import Piece, _pieces, _RowText, generate_text, stream_text
from model.tokenizer import get_encoding
from tests.pretend_cuda import pretend_cuda

CONFIG = GPTConfig(block_size=64, vocab_size=197, n_layer=3, n_head=4, n_embd=64)
GREEDY = Sampling(max_new_tokens=200, temperature=0.0)


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


@pytest.fixture(scope="module")
def text_model() -> GPT:
    """GPT-2's vocabulary, so texts can be made; random weights give all kinds of bytes."""
    return random_model(GPTConfig(block_size=48, n_layer=1, n_head=2, n_embd=16))


def plain_greedy(model: GPT, prompt: list[int], num: int, window: int) -> list[int]:
    """The rule, written once more: whole model, whole row, every step."""
    context, new = list(prompt)[-window:], []
    model.eval()
    for _ in range(num):
        if len(context) > window:
            context = context[-(window // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([context]))[0, -1]
        new.append(int(logits.argmax()))
        context.append(new[-1])
    return new


# ---- tokens


@pytest.mark.parametrize("window", [64, 17, 2])
def test_cached_greedy_equals_uncached_past_the_window(model: GPT, window: int):
    """200 tokens: three slides at 64; an odd window; and the smallest, which slides every step."""
    prompt = [5, 90, 3]
    expected = plain_greedy(model, prompt, 200, window)
    assert len({*expected}) > 2  # a constant output would prove little
    assert generate_tokens(model, [prompt], GREEDY, window=window) == [expected]
    assert generate_tokens(model, [prompt], GREEDY, window=window, use_cache=False) == [expected]


def test_batch_of_different_lengths_equals_each_alone(model: GPT):
    """Rows of 1, 30, 63 and 64 tokens slide at different steps; one longer than the window."""
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(CONFIG.vocab_size, (n,), generator=generator).tolist()
        for n in (1, 30, 63, 64, 100)
    ]
    batch = generate_tokens(model, prompts, GREEDY)
    for prompt, new in zip(prompts, batch, strict=True):
        assert new == plain_greedy(model, prompt, 200, 64)


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
    assert generate_tokens(model, prompts[:1], sampling, use_cache=False)[0] == batch[0]


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
    cached = generate_tokens(model, prompts, GREEDY)
    assert cached == generate_tokens(model, prompts, GREEDY, use_cache=False)


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


def test_under_autocast_the_cache_has_the_dtype_of_the_keys(model: GPT):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        decoder = Decoder(model, [[5, 90, 3], [1] * 60], GREEDY)
        cached = [decoder.step() for _ in range(8)]  # the second row slides meanwhile
        assert decoder.cache.kv is not None
        assert decoder.cache.kv.dtype == torch.bfloat16
        first = Decoder(model, [[5, 90, 3], [1] * 60], GREEDY, use_cache=False).step()
    assert cached[0] == first


def test_a_bf16_row_on_the_cpu_multiplies_vectors(model: GPT):
    """A product of matrices would pack every weight again for each token."""
    half = random_model().bfloat16().eval()
    cached, uncached = (Decoder(half, [[5, 90, 3]], GREEDY, use_cache=c) for c in (True, False))
    cached.step()
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        found = cached._decode()
    uncached.contexts = cached.contexts
    with torch.inference_mode():
        want = uncached._uncached_logits()
    torch.testing.assert_close(found, want, atol=0.02, rtol=0.02)
    calls = {event.key for event in recorded.key_averages()}
    assert "aten::addmv" in calls
    assert not calls & {"aten::addmm", "aten::mm", "aten::linear"}


def test_default_window_is_the_trained_context():
    model = random_model()
    model.trained_context = 8
    prompt = [5, 90, 3]
    assert generate_tokens(model, [prompt], GREEDY) == [plain_greedy(model, prompt, 200, 8)]
    assert generate_tokens(model, [prompt], GREEDY) != [plain_greedy(model, prompt, 200, 64)]


def test_copies_of_weights_follow_training():
    """One row on the CPU decodes from turned copies; they must not outlive an optimizer step."""
    model, prompt = random_model(), [5, 90, 3]
    before = generate_tokens(model, [prompt], GREEDY)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.mul_(-1)  # type: ignore[union-attr]
    after = generate_tokens(model, [prompt], GREEDY)
    assert after == [plain_greedy(model, prompt, 200, 64)]
    assert after != before
    model.double()
    assert generate_tokens(model, [prompt], GREEDY) == [plain_greedy(model, prompt, 200, 64)]


def test_stop_token_ends_a_row_and_mode_is_restored(model: GPT):
    free = generate_tokens(model, [[5, 90, 3], [2]], GREEDY)
    stop = free[0][7]
    model.train()
    rows = generate_tokens(model, [[5, 90, 3], [2]], GREEDY, stop_token=stop)
    assert model.training
    for row, whole in zip(rows, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    assert len(rows[0]) <= 7


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
    decoder = Decoder(model, [[1, 2]], GREEDY)  # made before the model is told, as for a stream
    assert [decoder.step()[0] for _ in range(len(tokens[0]))] == tokens[0]


def test_blocks_compiled_for_training_are_not_run():
    """A prompt of another length at every prefill would have them compiled again and again."""
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
    """Ties, which bf16 logits have often, included; so are logits at the ends of fp32."""
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


# ---- text


def feed_bytes(raw: bytes, stop: tuple[str, ...]) -> list[str]:
    """Byte by byte, so that every way to cut a character in two occurs."""
    row = _RowText(stop)
    pieces = []
    for byte in raw:
        pieces.append(row.feed(bytes([byte])))
        if row.done:
            return pieces
    return [*pieces, row.feed(b"", final=True)]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    text=st.text(alphabet="ab\n\u00e9\u65e5\U0001f600", max_size=30),
    stop=st.lists(st.text(alphabet="ab\n\u00e9\U0001f600", min_size=1, max_size=4), max_size=3),
)
def test_stream_cuts_no_character_and_hides_stop_strings(text: str, stop: list[str]):
    # Streaming stops at the stop string that is complete first; of those the leftmost start.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    first = min(ends)[0] if ends else None
    cut = min(at for end, at in ends if end == first) if ends else len(text)
    pieces = feed_bytes(text.encode(), tuple(stop))
    assert "".join(pieces) == text[:cut]
    shown = ""
    for piece in pieces:
        shown += piece
        assert text.startswith(shown)  # never a replacement character, never taken back


def test_incomplete_character_at_the_end_becomes_one_mark():
    assert "".join(feed_bytes("a\U0001f600".encode()[:-1], ())) == "a\ufffd"
    assert feed_bytes(b"a\xffb", ()) == ["a", "\ufffd", "b", ""]


def test_end_of_text_ends_a_row_and_gives_out_what_was_held():
    tokens = [*get_encoding().encode_ordinary("x"), get_encoding().eot_token]
    decoder = Mock(sampling=GREEDY, step=Mock(side_effect=[[token] for token in tokens]))
    pieces = _pieces(decoder, [_RowText(("xyz",))])  # x might become the stop string
    assert [*pieces] == [Piece(0, "x", 2, True)]


def test_text_is_the_decoded_tokens(text_model: GPT):
    encoding = get_encoding()
    sampling = Sampling(max_new_tokens=120, temperature=1.5, seed=4)
    prompts = ["First Citizen:\n", "", "caf\u00e9 \U0001f600"]
    texts = generate_text(text_model, prompts, sampling)
    ids = [encoding.encode_ordinary(p) or [encoding.eot_token] for p in prompts]
    tokens = generate_tokens(text_model, ids, sampling, stop_token=encoding.eot_token)
    assert texts == [encoding.decode(row, errors="replace") for row in tokens]
    assert any("\ufffd" in text for text in texts)  # the hard case did occur
    pieces = [*stream_text(text_model, prompts[:1], sampling)]
    assert "".join(p.text for p in pieces) == texts[0]
    assert len(pieces) > 50
    assert [p.done for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].num_tokens == len(tokens[0])


def test_stop_string_in_a_model_text(text_model: GPT):
    sampling = Sampling(max_new_tokens=60, seed=1)
    whole = generate_text(text_model, ["a"], sampling)[0]
    stop = whole[20:24]
    cut = generate_text(text_model, ["a"], replace(sampling, stop=(stop,)))[0]
    assert cut == whole[: whole.index(stop)]


def test_tokens_beyond_the_encoding_are_never_chosen():
    """A model imported with a padded vocabulary of 50304 has logits for ids that are no tokens."""
    model = random_model(GPTConfig(16, 50304, 1, 1, 8))
    with torch.no_grad():
        model.transformer.wte.weight[50257:] *= 1000
    sampling = Sampling(max_new_tokens=20, temperature=0.0)
    assert max(generate_tokens(model, [[1]], sampling)[0]) >= 50257
    generate_text(model, ["a"], sampling)  # such an id has no bytes: would raise


def test_long_prompt_is_cropped_left_with_a_line(text_model: GPT):
    encoding, sampling = get_encoding(), Sampling(max_new_tokens=10, temperature=0.0)
    lines: list[str] = []
    long = "one two three four five six seven eight nine ten " * 10
    text = generate_text(text_model, ["hi", long], sampling, notify=lines.append)[1]
    ids = encoding.encode_ordinary(long)
    assert lines == [
        f"prompt 2 has {len(ids)} tokens, the window holds 48: only its last 48 are read"
    ]
    expected = generate_tokens(text_model, [ids[-48:]], sampling)
    assert text == encoding.decode(expected[0], errors="replace")


# ---- bad input


ODD: list[Any] = [-1, 0.5, True, None, "", "abc", "1", [], math.nan, math.inf, 1e300, 2**64]
ODD.append(10**5000)


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("temperature", (0.5, 1e300, 2**64)),
        ("top_p", (0.5,)),
        ("top_k", ()),
        ("max_new_tokens", ()),
        ("seed", ()),
    ],
)
def test_settings_out_of_range_are_refused(name: str, fine: tuple[float, ...]):
    for value in ODD:
        if value in fine:
            Sampling(**{name: value})
        else:
            with pytest.raises(ValueError, match=f"^generate: {name} must be"):
                Sampling(**{name: value})
    for stop in (("a", ""), "abc", ("",)):
        with pytest.raises(ValueError, match="generate: stop must be a tuple of strings"):
            Sampling(stop=stop)  # type: ignore[arg-type]


def test_bad_calls(model: GPT, text_model: GPT):
    with pytest.raises(ValueError, match="row 1 has no token"):
        generate_tokens(model, [[1], []], GREEDY)
    with pytest.raises(ValueError, match="outside the vocabulary of 197: 5 to 197"):
        generate_tokens(model, [[197, 5]], GREEDY)
    for odd in (65, 1, *ODD):
        with pytest.raises(ValueError, match="window must be a whole number from 2 to 64, got"):
            Decoder(model, [[1]], GREEDY, window=odd or -1)
    for odd in (0, 4097, 10**9, *ODD):
        for call in (generate_text, stream_text):
            with pytest.raises(ValueError, match="num_samples must be a whole number from 1 to 4"):
                call(text_model, ["a"], GREEDY, num_samples=odd)
    with pytest.raises(ValueError, match=r"needs 1 to 4,096 prompts .* got 0"):
        generate_tokens(model, [], GREEDY)
    with pytest.raises(ValueError, match=r"needs 1 to 4,096 prompts .* got 5,000"):
        generate_tokens(model, [[1]] * 5000, GREEDY)
    with pytest.raises(ValueError, match="the model has 197 tokens"):
        generate_text(model, ["a"], GREEDY)
    assert generate_tokens(model, [[1]], Sampling(max_new_tokens=0)) == [[]]


def run_cli(cwd: Path, *args: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    root = Path(__file__).resolve().parents[1]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r});"
        "from model.generate import main; main(sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, input=stdin, capture_output=True, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_model: GPT) -> Path:
    """A working folder with runs/first/model in it."""
    root = tmp_path_factory.mktemp("cwd")
    text_model.save_pretrained(root / "runs" / "first" / "model")
    return root


def test_command_line_streams_a_prompt_from_stdin(runs: Path, text_model: GPT):
    """One real process; the other paths of the command are called in this one."""
    done = run_cli(
        runs, "--prompt", "-", "--max-new-tokens", "20", "--seed", "3", stdin=b"First:\n"
    )
    assert done.returncode == 0, done.stderr
    sampling = Sampling(max_new_tokens=20, seed=3)
    expected = generate_text(text_model, ["First:\n"], sampling)[0]
    assert done.stdout.decode() == f"First:\n{expected}\n"
    assert b"20 tokens" in done.stderr


def call_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cwd: Path, *args: str
) -> tuple[int, str, str]:
    monkeypatch.chdir(cwd)
    code = 0
    try:
        generate.main([*args])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_command_line_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
):
    args = ["--prompt", "One", "Two", "--num-samples", "2", "--max-new-tokens", "5"]
    code, out, _ = call_main(monkeypatch, capsys, runs, *args)
    assert code == 0
    assert [out.count(f"--- {i} of 4\n{p}") for i, p in ((1, "One"), (3, "Two"))] == [1, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and >= 0"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
        (["--model", "nowhere"], "no such file or folder: nowhere"),
        (["--window", "4000"], "window must be a whole number from 2 to 48, got 4000"),
        (["--model", ""], "the path is empty"),
        (
            ["--max-new-tokens", "1000000000000"],
            "max_new_tokens must be a whole number from 0 to 1",
        ),
        (["--num-samples", "1000000000"], "num_samples must be a whole number from 1 to 4,096"),
        (["--prompt", "-"], "stdin is not UTF-8: byte 0xff at offset 2"),
        (["--prompt", "\udcff"], "U+DCFF is half of a surrogate pair: the text is not UTF-8"),
    ],
)
def test_command_line_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: Path,
    args: list[str],
    message: str,
):
    stdin = io.TextIOWrapper(io.BytesIO(b"ab\xffcd"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = call_main(monkeypatch, capsys, runs, *args)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize(
    "name", ["max-new-tokens", "num-samples", "window", "seed", "top-k", "top-p", "temperature"]
)
def test_odd_values_of_numeric_flags_are_taken_or_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
):
    """None ends in a traceback or runs for ever."""
    for value in ("0", "-1", "nan", "inf", "1e300", str(2**64), "", "abc"):
        args = [] if name == "max-new-tokens" else ["--max-new-tokens", "1"]
        code, out, err = call_main(monkeypatch, capsys, runs, *args, f"--{name}={value}")
        assert code in (0, 2), (name, value, err)
        if code == 2:
            assert (out, "Traceback" in err) == ("", False)


def test_a_byte_order_mark_on_stdin_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
):
    said = []
    for text in (b"One", b"\xef\xbb\xbfOne"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        said.append(call_main(monkeypatch, capsys, runs, "--prompt", "-", "--max-new-tokens", "3"))
    assert said[0][:2] == said[1][:2]
    assert "the byte order mark at the beginning of stdin is left out" in said[1][2]


def test_hostile_text_on_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], runs: Path
):
    """None of it ends the process otherwise than with text or with one line."""
    texts = {
        b" " * 999_999 + b"\0\x1b[2J\x7f\n" * 999: 0,
        b"\xed\xa0\xbd": 2,
        b"x" * (generate.MAX_PROMPT_BYTES + 1): 2,
    }
    for text, expected in texts.items():
        stdin = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = call_main(
            monkeypatch, capsys, runs, "--prompt", "-", "--max-new-tokens", "1"
        )
        assert code == expected, (text[:20], err)
    monkeypatch.setattr(sys, "stdin", None)
    assert call_main(monkeypatch, capsys, runs, "--prompt", "-")[0] == 2


def test_logits_that_are_not_finite_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: Path,
):
    """By the library, streaming or not, cached or not, and by the command; never a token."""
    model = random_model(GPTConfig(block_size=48, n_layer=1, n_head=2, n_embd=16))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(bad)
        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=2, temperature=temperature)
            for use_cache in (True, False):
                with pytest.raises(ValueError, match="logits are not finite"):
                    generate_tokens(model, [[1], [2, 3]], sampling, use_cache=use_cache)
            with pytest.raises(ValueError, match="logits are not finite"):
                generate_text(model, ["a"], sampling)
    monkeypatch.setattr(GPT, "from_pretrained", lambda _: model)
    code, _, err = call_main(monkeypatch, capsys, runs, "--prompt", "a")
    assert code == 2
    assert err.startswith("error: generate: the model's logits are not finite")


def test_a_console_that_lacks_a_character(monkeypatch: pytest.MonkeyPatch, runs: Path):
    monkeypatch.chdir(runs)
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    generate.main(["--prompt", "\u65e5", "--max-new-tokens", "1"])
    console.flush()
    assert console.buffer.getvalue().startswith(b"\\u65e5")  # type: ignore[attr-defined]


def test_a_reader_that_goes_away_is_no_fault(monkeypatch: pytest.MonkeyPatch, runs: Path):
    monkeypatch.chdir(runs)
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        generate.main(["--prompt", "a", "--max-new-tokens", "3"])


def test_command_line_without_any_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    code, _, err = call_main(monkeypatch, capsys, tmp_path)
    assert code == 2
    assert "make train" in err


def test_latest_model_is_the_newest(tmp_path: Path):
    for i, name in enumerate(("b", "a")):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(json.dumps(i))
        stamp = 1_000_000 + i
        os.utime(folder / "model.safetensors", (stamp, stamp))
    assert latest_model(tmp_path) == tmp_path / "a" / "model"
