"""Text out of tokens, the command line of generation, and what both refuse."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig, generate
from model.decoder import Decoder, generate_tokens
from model.find import latest_model
from model.sampling import Sampling
from model.text import Piece, _pieces, _RowText, stream_text
from model.tokenizer import get_encoding
from tests.test_generate import GREEDY, random_model
from tests.weights import generate_text


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


@pytest.fixture(scope="module")
def text_model() -> GPT:
    """GPT-2's vocabulary, so texts can be made; random weights give all kinds of bytes."""
    return random_model(GPTConfig(block_size=48, n_layer=1, n_head=2, n_embd=16))


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
    assert [*pieces] == [Piece(0, "x", 2)]


def test_text_is_the_decoded_tokens(text_model: GPT):
    encoding = get_encoding()
    sampling = Sampling(max_new_tokens=120, temperature=1.5, seed=4)
    prompts = ["First Citizen:\n", "", "caf\u00e9 \U0001f600", "<|endoftext|>a<|endoftext|>b"]
    texts = generate_text(text_model, prompts, sampling)
    ids = [encoding.encode(p, allowed_special="all") or [encoding.eot_token] for p in prompts]
    rows = generate_tokens(text_model, ids, sampling)
    ends = [[*row, encoding.eot_token].index(encoding.eot_token) for row in rows]
    tokens = [row[:end] for row, end in zip(rows, ends, strict=True)]
    assert texts == [encoding.decode(row, errors="replace") for row in tokens]
    assert any("\ufffd" in text for text in texts)  # the hard case did occur
    pieces = [*stream_text(text_model, prompts[:1], sampling)]
    assert "".join(p.text for p in pieces) == texts[0]
    assert len(pieces) > 50
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


FINE = {"temperature": (0.5, 1e300, 2**64), "top_p": (0.5,)}


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "max_new_tokens", "seed"])
def test_settings_out_of_range_are_refused(name: str):
    for value in ODD:
        if value in FINE.get(name, ()):
            Sampling(**{name: value})
        else:
            with pytest.raises(ValueError, match=f"^generate: {name} must be"):
                Sampling(**{name: value})
    for stop in (("a", ""), "abc", ("",)):
        with pytest.raises(ValueError, match="generate: stop must be a tuple of strings"):
            Sampling(stop=stop)  # type: ignore[arg-type]


def test_bad_calls(model: GPT, text_model: GPT):
    with pytest.raises(ValueError, match="prompt 2 has no token"):
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


# ---- the command line

ROOT = Path(__file__).resolve().parents[1]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text_model: GPT) -> Path:
    """A working folder with runs/first/model in it."""
    root = tmp_path_factory.mktemp("cwd")
    text_model.save_pretrained(root / "runs" / "first" / "model")
    return root


@pytest.fixture
def command(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """The command in this process and that folder: exit code, output, standard error."""
    monkeypatch.chdir(runs)

    def call(*args: str, stdin: bytes | None = b"") -> tuple[int, str, str]:
        text = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        code = 0
        try:
            generate.main([*args])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_command_line_streams_a_prompt_from_stdin(runs: Path, text_model: GPT):
    """One real process; the other paths of the command are called in this one."""
    flags = ["--prompt", "-", "--max-new-tokens", "20", "--seed", "3"]
    command = [sys.executable, "-m", "model.generate", *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=runs, input=b"First:\n", env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    sampling = Sampling(max_new_tokens=20, seed=3)
    expected = generate_text(text_model, ["First:\n"], sampling)[0]
    assert done.stdout.decode() == f"First:\n{expected}\n"
    assert b"20 tokens" in done.stderr


def test_command_line_batch(command: Command):
    args = ["--prompt", "One", "Two", "--num-samples", "2", "--max-new-tokens", "5"]
    code, out, _ = command(*args)
    assert code == 0
    assert [out.count(f"--- {i} of 4\n{p}") for i, p in ((1, "One"), (3, "Two"))] == [1, 1]


REFUSED = {
    "--temperature=-1": "temperature must be finite and >= 0",
    "--top-p=0": "top_p must be in (0, 1]",
    "--model=nowhere": "no such file or folder: nowhere",
    "--window=4000": "window must be a whole number from 2 to 48, got 4000",
    "--model=": "the path is empty",
    "--max-new-tokens=1000000000000": "max_new_tokens must be a whole number from 0 to 1",
    "--num-samples=1000000000": "num_samples must be a whole number from 1 to 4,096",
    "--prompt=-": "stdin is not UTF-8: byte 0xff at offset 2",
    "--prompt=\udcff": "U+DCFF is half of a surrogate pair: the text is not UTF-8",
}


def test_command_line_bad_input(command: Command):
    for flag, message in REFUSED.items():
        code, out, err = command(flag, stdin=b"ab\xffcd")
        assert (code, out, err.count("\n")) == (2, "", 1), flag
        assert err.startswith("error: ")
        assert message in err


NUMBERS = ("max-new-tokens", "num-samples", "window", "seed", "top-k", "top-p", "temperature")


def test_odd_values_of_numeric_flags_are_taken_or_refused(command: Command):
    """No value ends in a traceback or runs for ever."""
    for name in NUMBERS:
        for value in ("0", "-1", "nan", "inf", "1e300", str(2**64), "", "abc"):
            args = [] if name == "max-new-tokens" else ["--max-new-tokens", "1"]
            code, out, err = command(*args, f"--{name}={value}")
            assert code in (0, 2), (name, value, err)
            if code == 2:
                assert (out, "Traceback" in err) == ("", False)


def test_a_byte_order_mark_on_stdin_is_left_out(command: Command):
    args = ["--prompt", "-", "--max-new-tokens", "3"]
    said = [command(*args, stdin=text) for text in (b"One", b"\xef\xbb\xbfOne")]
    assert said[0][:2] == said[1][:2]
    assert "the byte order mark at the beginning of stdin is left out" in said[1][2]


def test_hostile_text_on_stdin(command: Command):
    """The command ends with text, or with one line and code 2."""
    for text, expected in (
        (b" " * 999_999 + b"\0\x1b[2J\x7f\n" * 999, 0),
        (b"\xed\xa0\xbd", 2),
        (b"x" * (generate.MAX_PROMPT_BYTES + 1), 2),
        (None, 2),  # closed
    ):
        code, _, err = command("--prompt", "-", "--max-new-tokens", "1", stdin=text)
        assert code == expected, err


def test_logits_that_are_not_finite_are_refused(command: Command, monkeypatch):
    """By the library, streaming or not, and by the command, which prints no token."""
    model = random_model(GPTConfig(block_size=48, n_layer=1, n_head=2, n_embd=16))
    for bad in (torch.nan, torch.inf, -torch.inf):
        with torch.no_grad():
            model.transformer.ln_f.bias.fill_(bad)
        for temperature in (0.0, 1.0):
            sampling = Sampling(max_new_tokens=2, temperature=temperature)
            with pytest.raises(ValueError, match="logits are not finite"):
                generate_tokens(model, [[1], [2, 3]], sampling)
            with pytest.raises(ValueError, match="logits are not finite"):
                generate_text(model, ["a"], sampling)
    monkeypatch.setattr(GPT, "from_pretrained", lambda _: model)
    code, _, err = command("--prompt", "a")
    assert code == 2
    assert err.startswith("error: generate: the model's logits are not finite")


def test_a_gpu_that_others_have_filled_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'")

    monkeypatch.setattr(GPT, "to", full)
    code, _, err = command("--prompt", "a")
    assert (code, err) == (2, "error: CUDA error: out of memory; --device cpu does without\n")


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


def test_the_newest_model_is_taken_or_training_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    code, _, err = command()
    assert code == 2
    assert "make train" in err
    for i, name in enumerate(("b", "a")):
        file = Path("runs") / name / "model" / "model.safetensors"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(i))
        os.utime(file, (1_000_000 + i, 1_000_000 + i))
    assert latest_model() == Path("runs/a/model")
