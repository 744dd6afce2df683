"""The launch rows: each key of each op finds one, each row is found, a bad row is refused."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from kernels import _launch, adamw, causal_attention, embedding, gelu_mlp, linear_cross_entropy
from kernels._launch import ANY, Key, Launch, candidates_for, launch_for, read_rows, replaced
from kernels.layer_norm import launch_key

ARCHS = (0, 80, 86, 87, 89, 90, 100, 103, 120, 121, 999)
MATHS = ("16-bit", "tf32", "ieee")
TRITONS = ("3.6", "3.7", "3.8", "3.9", "4.0")


def keys(arch: int) -> list[Key]:
    """Every key the ops can ask with on a chip, at the sizes that rows tell apart."""
    found = []
    for math in MATHS:
        for M in (1, 1024, 65536):
            found += [gelu_mlp.launch_key(k, M, math, arch) for k in ("up", "down")]
        for D in causal_attention.HEAD_DIMS:
            for T in (1, 32, 64, 65, 128, 1024, 4096):
                for kernel in ("fwd", "dq", "dkdv", "short"):
                    found.append(causal_attention.launch_key(kernel, math, D, T, arch))
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in ("rows", "scale"):
            found.append(linear_cross_entropy.launch_key(kernel, dtype, arch))
        found.append(embedding.launch_key("sums", 768, dtype, arch))
    found += [adamw.launch_key(k, arch) for k in ("step", "norm", "clip", "advance")]
    return [*found, Key("layer_norm.sum", "fp32", "C=768", arch)]


def test_every_key_of_every_op_finds_a_row_and_every_row_is_found():
    asked = {replace(key, triton=t) for arch in ARCHS for key in keys(arch) for t in TRITONS}
    for key in asked:
        assert launch_for(key)
    # Where no row serves it, a formula does.
    for arch, C, kernel in product(ARCHS, (768, 8192), ("fwd", "bwd")):
        norm = launch_key(kernel, 65536, C, torch.float32, arch)
        both = norm, embedding.launch_key("fwd", C, torch.float32, arch)
        asked |= {replace(key, triton=t) for key in both for t in TRITONS}
    for layer in _launch.rows():
        idle = [str(row) for row in layer if not any(row.serves(key) for key in asked)]
        assert not idle, "no op asks for these rows, or `keys` above does not know its keys"


def test_a_family_shares_its_rows_in_every_op():
    """sm_103 is sm_100 to every kernel, and sm_121 is sm_120."""
    for member, first in ((103, 100), (121, 120)):
        for key in keys(member):
            assert launch_for(key) == launch_for(replace(key, arch=first)), key
    # Not by falling back to the rows of every arch.
    rows = linear_cross_entropy.launch_key("rows", torch.bfloat16, 103)
    assert launch_for(rows) != launch_for(replace(rows, arch=999))


def test_precision_is_read_at_each_call():
    """The setting is a property of the process, not of the import or of the compiled graph."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert _launch.math_of(torch.float32) == "tf32"
        assert _launch.math_of(torch.bfloat16) == "16-bit"
        torch.set_float32_matmul_precision("highest")
        assert _launch.math_of(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


TEXT = """
[sources]
seen = "a test"
[measured]
op = [
    ["a", "16-bit", "even large", 90, "3.7", {B = 512}, 8, 3, 0, 1, "h100.json 2026-01-02: 1.5 -> 1.25 ms"],
]
[compiled]
op = [
    ["any", "any", "any", "any", "any", {B = 1}, 1, 1, 0, 1, "seen"],
    ["any", "16-bit", "any", "any", "any", {B = 2}, 1, 1, 0, 1, "seen"],
    ["any", "16-bit", "even", "any", "any", {B = 4}, 1, 1, 0, 1, "seen"],
    ["a", "16-bit", "even", "any", "any", {B = 8}, 1, 1, 0, 1, "seen"],
    ["any", "any", "any", 90, "any", {B = 16}, 1, 1, 0, 1, "seen"],
    ["any", "16-bit", "even", 100, "any", {B = 32}, 1, 1, 168, 3, "seen"],
    ["any", "16-bit", "even", 100, "3.9", {B = 64}, 1, 1, 0, 1, "seen"],
]
[candidates]
other = [
    ["any", "ieee", "any", "any", "any", {B = 1024}, 1, 1, 0, 1, "seen"],
    ["any", "ieee", "even", "any", "any", {B = 2048}, 1, 1, 0, 1, "seen"],
]
"""  # noqa: E501 # a row is a line


@pytest.fixture
def rows(monkeypatch):
    layers = read_rows(TEXT)
    monkeypatch.setattr(_launch, "rows", lambda: layers)
    _launch._row_for.cache_clear()
    yield
    _launch._row_for.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "math", "size", "arch", "triton", "block"),
    [
        ("b", "ieee", "odd", 80, "3.7", 1),  # the row for everything
        ("b", "16-bit", "odd", 80, "3.7", 2),
        ("b", "16-bit", "even small", 80, "3.7", 4),  # fewer words than the key has
        ("a", "16-bit", "even small", 80, "3.7", 8),
        ("a", "16-bit", "even small", 90, "3.7", 16),  # the chip says more than math and size
        ("a", "16-bit", "even large", 90, "3.7", 512),  # measured
        ("a", "16-bit", "even large", 90, "3.8", 16),  # with another triton
        ("b", "16-bit", "even large", 90, "3.7", 16),
        ("b", "16-bit", "even large", 103, "3.7", 32),
        ("b", "16-bit", "even large", 103, "3.9", 64),
        ("b", "16-bit", "evening", 80, "3.7", 2),  # words, not letters
    ],
)
def test_the_most_specific_row_serves(kernel, math, size, arch, triton, block, rows):
    assert launch_for(Key(f"op.{kernel}", math, size, arch, triton)).blocks == (("B", block),)


def test_a_row_becomes_a_launch(rows):
    launch = launch_for(Key("op.b", "16-bit", "even", 100, "3.7"))
    assert launch == Launch((("B", 32),), 1, 1, maxnreg=168, programs_per_sm=3)
    options = {"num_warps": 1, "num_stages": 1, "maxnreg": 168, "enable_fp_fusion": True}
    assert launch.kwargs() == {"B": 32, **options}
    assert launch.source == "a test"
    assert launch_for(Key("op.a", "16-bit", "even large", 90, "3.7")).source.startswith("h100.json")


def test_without_a_row_the_safe_launch_or_an_error(rows):
    safe = Launch((("B", 7),), 4)
    assert launch_for(Key("other.a", "ieee", "any", 80), safe) == safe
    key = Key("other.a", "ieee", "any", 80)
    with pytest.raises(LookupError, match=r"launch rows: none for other\.a, ieee, any, sm_80"):
        launch_for(key)
    assert [dict(launch.blocks) for launch in candidates_for(key)] == [{"B": 1024}]


GOOD = '["a", "ieee", "any", 90, "any", {B = 2}, 1, 1, 0, 1, "seen"]'


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (GOOD.replace(', "seen"', ""), "a row has 11 columns"),
        (GOOD.replace("{B = 2}", "{B = 96}"), "B must be a power of two, got 96"),
        (GOOD.replace("{B = 2}", "64"), "blocks must be such as {BLOCK_M = 64}, got 64"),
        (GOOD.replace("{B = 2}, 1", "{B = 2}, 3"), "warps must be a power of two, got 3"),
        (GOOD.replace("1, 1, 0", "1, 0, 0"), "stages must be a number of at least 1, got 0"),
        (GOOD.replace("1, 1, 0", "1, 1, -1"), "registers must be a number of at least 0, got -1"),
        (GOOD.replace("90", "103"), "its family's first, got 103"),
        (GOOD.replace("90", '"sm_90"'), "arch must be a number such as 90"),
        (GOOD.replace('"ieee"', "16"), "math must be a word or 'any', got 16"),
        (GOOD.replace('"seen"', '""'), "source must say where the row comes from"),
        (f"{GOOD}, {GOOD}", "there is another row with this key"),
    ],
)
def test_a_bad_row_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=r"^launch rows: compiled, op, \[") as caught:
        read_rows(f'[sources]\nseen = "x"\n[compiled]\nop = [{row}]')
    assert message in str(caught.value)
    read_rows(f"[compiled]\nop = [{GOOD}]")


def test_a_measured_row_names_what_was_measured():
    with pytest.raises(ValueError, match=f"measured, op, .*not at {ANY!r}"):
        read_rows(f"[measured]\nop = [{GOOD}]")
    with pytest.raises(ValueError, match="unknown table 'measurd'"):
        read_rows(f"[measurd]\nop = [{GOOD}]")


def test_a_trial_replaces_one_kernel_and_ends(rows):
    key, other = (Key(f"op.{k}", "ieee", "odd", 80) for k in "ab")
    present, trial = launch_for(key), Launch((("B", 7),), 4)
    with replaced("op.a", trial) as asked:
        assert launch_for(key) == trial
        assert launch_for(other) == present
        with replaced() as inner:
            assert launch_for(key) == present
        assert launch_for(key) == trial
    assert launch_for(key) == present
    assert asked == [(key, trial), (other, present), (key, trial)]
    assert inner == [(key, present)]
