import pytest
import torch

from kernels import EAGER
from kernels import layer_norm as module
from tests import checks
from tests.test_layer_norm import rounding

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

SHAPES = [
    pytest.param((1, 64), id="C=64-power-of-two-single-row"),
    pytest.param((3, 257), id="C=257-one-past-a-chunk"),
    pytest.param((29, 768), id="C=768-prime-rows-and-a-second-turn-of-the-loop"),
    pytest.param((0, 48), id="M=0"),
]
# x, residual, weights
STREAMS = [
    pytest.param((F32, F32, F32), id="float32"),
    pytest.param((F16, F16, F16), id="float16"),
    pytest.param((BF16, BF16, BF16), id="bfloat16"),
    pytest.param((BF16, F32, F32), id="autocast-stream"),
    pytest.param((BF16, BF16, F32), id="bfloat16-stream"),
    pytest.param((F32, BF16, F32), id="stream-narrower-than-x"),
]


def ours(x, residual, weight, bias):
    return module.add_layer_norm(x, residual, weight, bias)


def eager(x, residual, weight, bias):
    return EAGER.add_layer_norm(x, residual, weight, bias)


def plain(x, residual, weight, bias):
    h = residual + x
    centered = h - h.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centered * rstd * weight + bias, h


def inputs(shape, device, stream=(BF16, F32, F32), mean=0.0, std=1.0):
    x, residual, weights = stream
    C = shape[-1]
    return {
        "x": (torch.randn(shape, device=device) * std).to(x),
        "residual": (torch.randn(shape, device=device) * std + mean).to(residual),
        "weight": (1 + torch.randn(C, device=device)).to(weights),
        "bias": torch.randn(C, device=device).to(weights),
    }


def check(args):
    rows = max(args["x"].shape[:-1].numel(), 1)
    atol = rounding(args["x"].to(args["residual"].dtype) + args["residual"], args["weight"])
    checks.assert_twice_eager(
        ours, eager, plain, args, rows=rows, atol={"dx": atol, "dresidual": atol}
    )


@pytest.mark.parametrize("stream", STREAMS)
def test_no_worse_than_twice_eager(stream, device):
    check(inputs((3, 5, 48), device, stream))


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape, device):
    check(inputs(shape, device))


@checks.sweep(
    M=checks.sizes(0, 35, 1, 32, 33),
    C=checks.sizes(1, 260, 1, 256, 257),
    x=checks.dtypes(),
    residual=checks.dtypes(),
)
def test_any_shape(device, M, C, x, residual):
    args = inputs((M, C), device, (x, residual, F32))
    check(args)


def test_several_warps_a_row(device):
    checks.assert_twice_eager(ours, eager, plain, inputs((2, 6400), device), rows=2)


def test_the_sum_is_what_plain_pytorch_adds(device):
    for stream in ((BF16, F32, F32), (BF16, BF16, F32), (F16, F16, F32)):
        args = inputs((13, 48), device, stream)
        assert torch.equal(ours(**args)[1], eager(**args)[1])


def test_rows_far_from_zero_keep_fp32_accuracy(device):
    args = inputs((13, 768), device, (F32, F32, F32), mean=1e3, std=1e-2)
    args["x"].zero_()  # the norm is judged, not the rounding of the sum
    exact, _ = plain(**{n: t.double() for n, t in args.items()})
    assert (ours(**args)[0] - exact).abs().max() < 2e-6 * exact.abs().max()
    checks.assert_twice_eager(ours, eager, plain, args)


@pytest.mark.parametrize("stream", STREAMS[3:5])
def test_one_output_without_a_gradient(device, stream):
    """The last residual_out of a model is not used; a probe may use nothing else."""
    args = inputs((9, 48), device, stream)
    for index in (0, 1):
        checks.assert_twice_eager(
            lambda i=index, **a: ours(**a)[i],
            lambda i=index, **a: eager(**a)[i],
            lambda i=index, **a: plain(**a)[i],
            args,
            rows=9,
        )
    names = checks.dispatched_ops(lambda **a: ours(**a)[0], args)
    assert not [n for n in names if "zero" in n or "full" in n], "an absent gradient is filled in"


def test_one_gradient_tensor_serves_both_where_dtypes_agree(device):
    args = [t.requires_grad_() for t in inputs((9, 48), device, (BF16, BF16, F32)).values()]
    dx, dresidual = torch.autograd.grad(ours(*args)[0].sum(), args[:2])
    assert dx.data_ptr() == dresidual.data_ptr()


def test_autocast_keeps_the_stream_fp32(device):
    args = inputs((5, 48), device, (F32, F32, F32))
    with torch.autocast(device, BF16):
        got, low = checks.values_and_grads(ours, args), checks.values_and_grads(eager, args)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in low.items()}
    assert got["y0"].dtype == BF16
    assert got["y1"].dtype == got["dx"].dtype == got["dresidual"].dtype == F32
    torch.testing.assert_close(got["y0"], low["y0"], rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(got["dx"], low["dx"], rtol=1e-4, atol=1e-5)


def test_what_holds_of_every_op(device):
    checks.assert_usual("add_layer_norm", ours, inputs((61, 48), device))


@pytest.mark.parametrize("stream", STREAMS[3:5])
def test_nothing_runs_beside_the_launches(device, stream):
    checks.assert_only_launches(ours, inputs((9, 48), device, stream))


@pytest.mark.parametrize("stream", STREAMS[3:5])
def test_registration(device, stream):
    x, residual, weight, bias = inputs((3, 5, 48), device, stream).values()
    torch.library.opcheck(
        torch.ops.fgpt.layer_norm_fwd.default, (x, residual, weight, bias, 1e-5, x.dtype)
    )
    dy, h, stats = module.layer_norm_fwd(x, residual, weight, bias, 1e-5, x.dtype)
    for dresidual_out in (h, None):
        args = (dy, dresidual_out, h, weight, stats, x.dtype)
        torch.library.opcheck(torch.ops.fgpt.layer_norm_bwd.default, args)


def test_compiled_equals_eager_without_the_stream(device):
    checks.assert_compiled_equals_eager(lambda **a: ours(**a)[0], inputs((5, 48), device))


@pytest.mark.parametrize("stream", STREAMS[3:5])
def test_compiled_once_for_any_number_of_rows(device, stream):
    args, *more = (inputs((M, 48), device, stream) for M in (5, 2, 61))
    checks.assert_compiled_equals_eager(ours, args, also=more, dynamic=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"residual": torch.randn(4, 50)},
            r"residual must be \(4, 48\).*got \(4, 50\)",
            id="shape",
        ),
        pytest.param(
            {"residual": torch.randn(4, 96)[:, ::2]}, r"got strides \(96, 2\)", id="strided"
        ),
        pytest.param({"residual": torch.ones(4, 48).long()}, "torch.int64", id="dtype"),
        pytest.param(
            {"weight": torch.ones(50)}, r"weight must be \(48,\).*got \(50,\)", id="width"
        ),
        pytest.param({"x": torch.randn(4, 96)[:, ::2]}, r"must be contiguous", id="strided-x"),
    ],
)
def test_bad_input_names_both_values(device, change, message):
    args = inputs((4, 48), device) | {n: checks.on_device(t, device) for n, t in change.items()}
    with pytest.raises(ValueError, match=f"^add_layer_norm: .*{message}"):
        ours(**args)
