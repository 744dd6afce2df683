from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.func import functional_call

from kernels import EAGER, TRITON, parse_ops
from kernels import embedding as module
from kernels._op import INTERPRETED
from model import GPT, GPTConfig
from tests import checks

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
REDUCED = ("dwte", "dwpe", "dweight", "dbias")
# tables, stream
STREAMS = [
    pytest.param((F32, F32), id="float32"),
    pytest.param((F16, F16), id="float16"),
    pytest.param((BF16, BF16), id="bfloat16"),
    pytest.param((F32, BF16), id="bfloat16-stream"),
]
# In the interpreter a block is 4 rows of 512 columns.
SHAPES = [
    pytest.param((1, 1, 64, 2), id="one-token"),
    pytest.param((2, 33, 48, 1), id="one-id-in-every-block-and-carried-thrice"),
    pytest.param((3, 3, 257, 500), id="C=257-nearly-all-different"),
    pytest.param((1, 9, 768, 3), id="C=768-two-blocks-of-columns"),
    pytest.param((0, 5, 48, 7), id="B=0"),
]


def ours(idx, wte, wpe, weight, bias, residual_dtype=None):
    return module.embedding(idx, wte, wpe, weight, bias, residual_dtype=residual_dtype)


def eager(idx, wte, wpe, weight, bias, residual_dtype=None):
    return EAGER.embedding(idx, wte, wpe, weight, bias, residual_dtype=residual_dtype)


def plain(idx, wte, wpe, weight, bias, residual_dtype=None):
    """The formula itself, the rows of a token by a product, so that no code under test is used."""
    onehot = (idx[..., None] == torch.arange(len(wte), device=idx.device)).to(wte.dtype)
    h = onehot @ wte + wpe
    centered = h - h.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centered * rstd * weight + bias, h, 1.0 * wte


def inputs(shape, device, tables=F32, weights=F32):
    B, T, C, Vp = shape
    return {
        "idx": torch.randint(Vp, (B, T), device=device),
        "wte": torch.randn(Vp, C, device=device).to(tables),
        "wpe": torch.randn(T, C, device=device).to(tables),
        "weight": (1 + torch.randn(C, device=device)).to(weights),
        "bias": torch.randn(C, device=device).to(weights),
    }


def check(args, stream=F32):
    way, rows = partial(partial, residual_dtype=stream), max(args["idx"].numel(), 1)
    checks.assert_twice_eager(way(ours), way(eager), way(plain), args, reduced=REDUCED, rows=rows)


@pytest.mark.parametrize("dtypes", STREAMS)
def test_no_worse_than_twice_eager(dtypes, device):
    tables, stream = dtypes
    check(inputs((3, 5, 48, 7), device, tables), stream)


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape, device):
    check(inputs(shape, device))


@checks.sweep(
    B=checks.sizes(1, 3),
    T=checks.sizes(1, 13, 1, 4),
    C=checks.sizes(2, 140, 64),
    Vp=checks.sizes(1, 40, 1, 2),
    tables=checks.dtypes(),
)
def test_any_shape(device, B, T, C, Vp, tables):
    check(inputs((B, T, C, Vp), device, tables), tables)


TOKENS = {
    "all-different": range(64),
    "all-equal": [0] * 64,
    "one-across-blocks": [3] * 5 + [0] * 3 + [7] * 55 + [5],
}


@pytest.mark.parametrize("tokens", TOKENS)
def test_rows_of_a_token_are_added_whatever_block_they_are_in(device, tokens):
    """Exactly: sums of small integers."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    idx = torch.tensor([*TOKENS[tokens]])[order].view(2, 32).to(device)
    dh = torch.randint(-9, 9, (2, 32, 48), device=device).float()
    dtied = torch.randint(-9, 9, (70, 48), device=device).float()
    before = dtied.clone()
    dwte, dwpe = module.embedding_bwd(idx, dh, dtied)
    assert torch.equal(dwte, before.index_add(0, idx.flatten(), dh.flatten(0, 1)))
    assert torch.equal(dwpe, dh.sum(0))
    assert torch.equal(dtied, before), "somebody else may hold the head's gradient"


def test_autocast_gives_16_bit_activations_and_an_fp32_stream(device):
    args = inputs((2, 5, 48, 11), device)
    with torch.autocast(device, BF16):
        got, low = checks.values_and_grads(ours, args), checks.values_and_grads(eager, args)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in low.items()}
    assert got["y0"].dtype == BF16
    assert got["y1"].dtype == got["dwte"].dtype == F32
    torch.testing.assert_close(got["y0"], low["y0"], rtol=2**-7, atol=1e-3)
    assert torch.equal(got["y1"], low["y1"])
    torch.testing.assert_close(got["dwte"], low["dwte"], rtol=1e-4, atol=1e-5)


def test_what_holds_of_every_op(device):
    checks.assert_usual("embedding", ours, inputs((3, 11, 48, 5), device))


def test_nothing_runs_beside_the_launches(device):
    """But for the sort, the copy of the head's gradient, and the sum over the batch."""
    looking = "lt ge index __or__ bitwise_or"  # for bad ids
    allow = [f"aten::{name}" for name in f"sort _to_copy sum {looking}".split()]
    args = inputs((2, 9, 48, 5), device)
    checks.assert_only_launches(ours, args, allow)
    names = checks.dispatched_ops(ours, args)
    assert [names.count(f"fgpt::{op}") for op in ("embedding_fwd", "embedding_bwd")] == [1, 1]


def test_registration(device):
    for tables in (F32, BF16):
        idx, wte, *rest = inputs((2, 5, 48, 7), device, tables).values()
        args = idx, wte, *rest, 1e-5, BF16, F32
        torch.library.opcheck(torch.ops.fgpt.embedding_fwd.default, args)
        _, h, _ = torch.ops.fgpt.embedding_fwd(*args)
        torch.library.opcheck(torch.ops.fgpt.embedding_bwd.default, (idx, h, wte))


def test_compiled_equals_eager(device):
    more = [inputs((B, 6, 48, 7), device) for B in (2, 5)]
    args = inputs((3, 6, 48, 7), device)
    checks.assert_compiled_equals_eager(ours, args, also=more, dynamic=True)


CONFIG = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=64)


def gradients(ops, device, *, steps=1, **changes):
    """Loss and gradients of the same model and rows by some ops."""
    torch.manual_seed(0)
    recompute = changes.pop("recompute", False)
    model = GPT(replace(CONFIG, **changes), ops).to(device)
    model.transformer.recompute = recompute
    loss = torch.zeros(())
    for _ in range(steps):
        idx = torch.randint(CONFIG.vocab_size, (3, 13), device=device)
        loss = model(idx, idx)
        loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


OURS = parse_ops("eager,embedding=triton")


@pytest.mark.parametrize("changes", [{}, {"steps": 2}, {"recompute": True}], ids=str)
def test_the_tied_table_gets_both_gradients(device, changes):
    want, got = (gradients(ops, device, **changes) for ops in (EAGER, OURS))
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6, msg=name)
    padding = got["transformer.wte.weight"][CONFIG.vocab_size :]
    assert not padding.any()


def test_the_table_is_accumulated_once_a_backward(device):
    """Which a hook that sends it to the other ranks relies on; and nothing adds two gradients."""
    model = GPT(replace(CONFIG, n_layer=1), TRITON).to(device)
    arrived = []
    wte = model.transformer.wte.weight
    wte.register_post_accumulate_grad_hook(lambda p: arrived.append(p.grad))
    idx = torch.randint(CONFIG.vocab_size, (2, 5), device=device)
    model(idx, idx).backward()
    assert [grad is wte.grad for grad in arrived] == [True]
    parameters = dict(model.named_parameters())
    names = checks.dispatched_ops(lambda **p: functional_call(model, p, (idx, idx)), parameters)
    assert not {"aten::add", "aten::add_", "aten::embedding_dense_backward"} & {*names}


def test_dropout_stands_between_the_sum_and_its_norm(device):
    """There it is the model's, and the norm an op by itself."""
    mixed = "eager,embedding=triton,layer_norm=triton"
    want, got = (gradients(parse_ops(ops), device, dropout=0.5) for ops in ("eager", mixed))
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6, msg=name)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="kernels on CPU tensors")


@pytest.mark.parametrize("token", [-1, 7])
@pytest.mark.parametrize("embedding", [pytest.param(ours, marks=interpreted), eager])
def test_a_token_outside_the_table_is_named(embedding, token):
    args = inputs((2, 4, 48, 7), "cpu")
    args["idx"][1, 2] = token
    with pytest.raises(ValueError, match=rf"^embedding: idx must be in \[0, 7\), got {token}$"):
        embedding(**args)


def test_where_looking_would_cost_a_sync_it_makes_its_row_nan(device, monkeypatch):
    monkeypatch.setattr(module, "check_ids", lambda *_: None)
    args = inputs((2, 4, 48, 7), device)
    for token in (-1, -(2**40), 7, 2**40):
        args["idx"][1, 2] = token
        y, h, tied = ours(**{n: t.requires_grad_(t.is_floating_point()) for n, t in args.items()})
        bad = torch.zeros(2, 4, dtype=torch.bool, device=device)
        bad[1, 2] = True
        assert torch.equal(y.isnan().all(-1), bad)
        assert torch.equal(h.isnan().any(-1), bad)
        total = y.sum() + h.sum() + tied.sum()
        dwte, dwpe = torch.autograd.grad(total, [args["wte"], args["wpe"]])
        assert dwte.isfinite().all(), "the rows of other tokens"
        assert torch.equal(dwpe.isnan().any(-1), bad[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"wte": torch.randn(48)}, r"wte must be \(Vp, C\).*got \(48,\)", id="table"),
        pytest.param({"idx": torch.zeros(8).long()}, r"idx must be \(B, T\), got \(8,\)", id="idx"),
        pytest.param({"idx": torch.zeros(2, 4).int()}, "idx must be .* got .*int32", id="int32"),
        pytest.param({"wpe": torch.randn(5, 48)}, r"be \(4, 48\).* got \(5, 48\)", id="positions"),
        pytest.param({"weight": torch.ones(50)}, r"be \(48,\).* got \(50,\)", id="width"),
        pytest.param({"wpe": torch.randn(4, 96)[:, ::2]}, r"contiguous.*\(96, 2\)", id="strided"),
        pytest.param({"wpe": torch.randn(4, 48).half()}, "wpe .*float32.* got .*float16", id="mix"),
        pytest.param({"wte": torch.randn(7, 48).double()}, "wte .*, torch.float64", id="dtype"),
        pytest.param({"bias": torch.ones(48, device="meta")}, "bias .* on meta", id="device"),
    ],
)
def test_bad_input_names_both_values(device, change, message):
    args = inputs((2, 4, 48, 7), device)
    args |= {n: t if t.is_meta else checks.on_device(t, device) for n, t in change.items()}
    with pytest.raises(ValueError, match=f"^embedding: .*{message}"):
        ours(**args)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    """The last rows lie past what a 32-bit offset reaches."""
    T, C = 1000, 768
    B = 2**31 // (T * C) + 1
    args = inputs((B, T, C, 50304), device, BF16)
    y, h, _ = ours(**args)
    last = ours(**args | {"idx": args["idx"][-1:]})
    assert torch.equal(y[-1:], last[0])
    assert torch.equal(h[-1:], last[1])
