from collections import Counter

import pytest
import torch

from kernels import EAGER
from kernels import gelu_mlp as module
from kernels.gelu_mlp import gelu_mlp_down, gelu_mlp_up
from tests import checks

SHAPES = [
    pytest.param((17, 64), id="less-than-a-tile-of-rows"),
    pytest.param((67, 64), id="prime-rows"),
    pytest.param((2, 3, 192), id="C=192-no-power-of-two"),
    pytest.param((1, 64), id="single-row"),
    pytest.param((129, 128), id="one-row-past-a-tile"),
    pytest.param((0, 64), id="M=0"),
]
REDUCED = ("dw_fc", "db_fc", "dw_proj", "db_proj")


def ours(x, w_fc, b_fc, w_proj, b_proj):
    return module.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj)


def eager(x, w_fc, b_fc, w_proj, b_proj):
    return EAGER.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj)


def gelu(h):
    """The formula itself, so that the oracle is not code under test."""
    return 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))


def plain(x, w_fc, b_fc, w_proj, b_proj):
    return gelu(x @ w_fc.mT + b_fc) @ w_proj.mT + b_proj


def inputs(shape, device, dtype=torch.float32):
    C = shape[-1]
    return {
        "x": torch.randn(shape, device=device).to(dtype),
        "w_fc": (torch.randn(4 * C, C, device=device) / C**0.5).to(dtype),
        "b_fc": torch.randn(4 * C, device=device).to(dtype),
        "w_proj": (torch.randn(C, 4 * C, device=device) / (4 * C) ** 0.5).to(dtype),
        "b_proj": torch.randn(C, device=device).to(dtype),
    }


def check(args, products=0, op=ours):
    rows = max(args["x"].shape[:-1].numel(), 1)
    terms = args["w_proj"].shape[1]
    checks.assert_twice_eager(
        op, eager, plain, args, reduced=REDUCED, rows=rows, terms=terms, products=products
    )


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_twice_eager(shape, dtype, device):
    check(inputs(shape, device, dtype))


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_compiled_eager_no_worse_than_twice_eager(dtype, device):
    """Where a compiler sees it, a CPU's GELU is a sigmoid."""
    op = torch.compile(eager, backend="aot_eager", fullgraph=True)
    check(inputs((67, 64), device, dtype), op=op)


def test_compiled_eager_stays_in_float64(device):
    args = inputs((5, 64), device, torch.float64)
    op = torch.compile(eager, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(op(**args), eager(**args), rtol=1e-12, atol=1e-12)


@checks.sweep(M=checks.sizes(0, 70, 1, 32, 33), widths=checks.sizes(1, 2), dtype=checks.dtypes())
def test_any_shape(device, M, widths, dtype):
    check(inputs((M, 64 * widths), device, dtype))


@pytest.mark.parametrize("shape", [(1, 192), (129, 192)])
def test_tf32_loses_what_its_operands_do(shape, device):
    args = inputs(shape, device)
    checks.assert_within_tf32("gelu_mlp", device, lambda products: check(args, products))


def test_gelu_and_its_derivative_to_fp32_accuracy(device):
    """One row of weights picks h itself, tails and saturation included: no NaN, no lost digits."""
    h = torch.cat([torch.linspace(-30, 30, 2001), torch.tensor([-1e4, -0.0, 1e4])]).to(device)
    x = torch.zeros(h.numel(), 64, device=device)
    x[:, 0] = h
    w_fc = torch.zeros(256, 64, device=device)
    w_fc[:, 0] = 1
    g, d = gelu_mlp_up(x, w_fc, torch.zeros(256, device=device), True)
    exact = h.double().requires_grad_()
    want = gelu(exact)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    scale = h.double().abs().clamp(min=1)
    # A GPU's reciprocal root is off by 2^-22.9 at most, twice that squared, and 2^e by 2^-22.
    bound = 3e-7 if device == "cpu" else 6e-7
    assert ((g - want.detach()[:, None]).abs() / scale[:, None]).max() < bound
    assert (d - slope[:, None]).abs().max() < 1e-6


def test_column_sums_add_unrounded_rows(device):
    """db_fc adds what the accumulator holds, over several rows of tiles, not the stored dh."""
    M, C = 129, 64
    dy, w_proj = (torch.randn(s, device=device).bfloat16() for s in ((M, C), (C, 4 * C)))
    d = torch.randn(M, 4 * C, device=device).bfloat16()
    dh, sums = gelu_mlp_down(dy, w_proj, d)
    exact = dy.double() @ w_proj.double() * d.double()
    assert sums.dtype == torch.float32
    error, of_stored = (sums - exact.sum(0)).abs().max(), (dh.double() - exact).sum(0).abs().max()
    assert error < 1e-2 * of_stored


def test_an_infinite_last_row_stays_in_its_place(device):
    """It is repeated to fill its tile: no other row may show it, and no sum may hide it."""
    dy = torch.zeros(33, 64, device=device)
    dy[-1] = float("inf")
    w_proj = torch.ones(64, 256, device=device)
    dh, sums = gelu_mlp_down(dy, w_proj, torch.ones(33, 256, device=device))
    assert torch.equal(dh, dy[:, :1].expand_as(dh))
    assert not sums.isfinite().any()


def test_what_holds_of_every_op(device):
    checks.assert_usual("gelu_mlp", ours, inputs((67, 64), device))


@pytest.mark.parametrize("save_d", [True, False])
def test_registration_up(save_d, device):
    args = inputs((17, 64), device)
    torch.library.opcheck(
        torch.ops.fgpt.gelu_mlp_up.default, (args["x"], args["w_fc"], args["b_fc"], save_d)
    )


def test_registration_down(device):
    # bf16: in fp32 the dtype of the column sums could not be wrong
    dy, w_proj, d = (
        torch.randn(s, device=device).bfloat16() for s in ((17, 64), (64, 256), (17, 256))
    )
    torch.library.opcheck(torch.ops.fgpt.gelu_mlp_down.default, (dy, w_proj, d))


def test_compiled_equals_eager(device):
    checks.assert_compiled_equals_eager(ours, inputs((3, 5, 64), device))


def test_one_graph_for_any_number_of_rows(device):
    args = inputs((5, 64), device)
    also = [{**args, "x": torch.randn(M, 64, device=device)} for M in (2, 33)]
    checks.assert_compiled_equals_eager(ours, args, dynamic=True, also=also)


def test_backward_is_one_launch_and_three_gemms(device):
    ops = Counter(checks.dispatched_ops(ours, inputs((17, 64), device)))
    assert ops["fgpt::gelu_mlp_up"] == ops["fgpt::gelu_mlp_down"] == 1
    assert ops["aten::addmm"] == 1
    assert ops["aten::mm"] == 3
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy", "aten::gelu"} & ops.keys()


def test_no_grad_keeps_nothing(device, monkeypatch):
    args = {n: t.requires_grad_() for n, t in inputs((17, 64), device).items()}
    kept = []
    monkeypatch.setattr(module, "gelu_mlp_up", lambda *a: kept.append(a[3]) or gelu_mlp_up(*a))
    ours(**args)
    with torch.no_grad():
        ours(**args)
    assert kept == [True, False]


@pytest.mark.parametrize("frozen", [("x", "w_fc", "b_fc"), ("w_proj", "b_proj"), ("w_fc",)])
def test_gradients_with_frozen_inputs(frozen, device):
    args = inputs((17, 64), device)
    checks.assert_twice_eager(ours, eager, plain, args, reduced=REDUCED, rows=17, frozen=frozen)


def test_autocast_casts_like_eager_and_returns_fp32_gradients(device):
    args = inputs((17, 64), device)

    def cast(fn):
        def run(**tensors):
            with torch.autocast(device, dtype=torch.bfloat16):
                return fn(**tensors)

        return run

    got = checks.values_and_grads(cast(ours), args)
    assert got["y"].dtype == torch.bfloat16
    assert all(got[f"d{name}"].dtype == torch.float32 for name in args)
    checks.assert_twice_eager(
        cast(ours), cast(eager), plain, args, reduced=REDUCED, rows=17, atol=2**-8
    )


def test_low_precision_input_with_fp32_biases(device):
    args = inputs((17, 64), device, torch.bfloat16)
    args |= {"b_fc": args["b_fc"].float(), "b_proj": args["b_proj"].float()}
    got = checks.values_and_grads(ours, args)
    want = checks.values_and_grads(plain, {n: t.double() for n, t in args.items()})
    for grad in (got["db_fc"], got["db_proj"]):
        assert grad.dtype == torch.float32
        assert not torch.equal(grad, grad.bfloat16().float()), "rounded to bf16 on the way"
    for name, exact in want.items():
        assert (got[name] - exact).abs().max() < 2**-6 * exact.abs().max(), name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("w_fc", lambda t: t[:-1], r"w_fc must be \(256, 64\), float32, .*got \(255, 64\)"),
        ("w_proj", lambda t: t.mT.contiguous(), r"w_proj must be \(64, 256\).*got \(256, 64\)"),
        ("b_fc", lambda t: t[:8], r"b_fc must be \(256,\).*got \(8,\)"),
        ("b_proj", lambda t: t[:8], r"b_proj must be \(64,\).*got \(8,\)"),
        ("w_fc", lambda t: t.bfloat16(), "w_fc must be .*float32, .*got .*torch.bfloat16"),
        ("w_proj", lambda t: t.half(), "w_proj must be .*float32, .*got .*torch.float16"),
        ("b_fc", lambda t: t.half(), "b_fc must be .*float32, .*torch.float16"),
        ("x", lambda t: t.double(), "x must be .*float32 or float16 or bfloat16, .*torch.float64"),
        ("x", lambda t: t.repeat(1, 2)[:, ::2], r"x must be contiguous, got strides \(128, 2\)"),
        ("w_fc", lambda t: t.mT.contiguous().mT, r"w_fc must be contiguous, .* \(1, 256\)"),
        ("x", lambda t: t[0, 0], r"C must be a multiple of 64, got x \(\)"),
        ("x", lambda t: t[:, :48], r"C must be a multiple of 64, got x \(5, 48\); use --ops tri"),
    ],
)
def test_bad_input_is_named(name, change, message, device):
    args = inputs((5, 64), device)
    with pytest.raises(ValueError, match=f"gelu_mlp: {message}"):
        ours(**{**args, name: change(args[name])})
