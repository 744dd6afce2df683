import pytest
import torch

from kernels import EAGER
from kernels import layer_norm as module
from kernels._launch import cdiv
from kernels.layer_norm import MAX_C, layer_norm_fwd, safe_launch
from tests import checks

SHAPES = [
    pytest.param((3, 5, 48), id="C=48-demo-model"),
    pytest.param((1, 64), id="C=64-power-of-two-single-row"),
    pytest.param((7, 50), id="C=50-ragged"),
    pytest.param((5, 1), id="C=1-variance-is-zero"),
    pytest.param((3, 257), id="C=257-one-past-a-chunk"),
    pytest.param((29, 768), id="C=768-prime-rows-and-a-second-turn-of-the-loop"),
    pytest.param((2, 1024), id="C=1024-widest-row-of-one-warp"),
    pytest.param((0, 48), id="M=0"),
]


def ours(x, weight, bias):
    return module.layer_norm(x, weight, bias)


def eager(x, weight, bias):
    return EAGER.layer_norm(x, weight, bias)


def plain(x, weight, bias):
    """The formula itself, so that the oracle is not code under test."""
    centered = x - x.mean(-1, keepdim=True)
    rstd = (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centered * rstd * weight + bias


def inputs(shape, device, dtype=torch.float32, weights=None, mean=0.0, std=1.0):
    C = shape[-1]
    return {
        "x": (torch.randn(shape, device=device) * std + mean).to(dtype),
        "weight": (1 + torch.randn(C, device=device)).to(weights or dtype),
        "bias": torch.randn(C, device=device).to(weights or dtype),
    }


def rounding(h, weight):
    """What rounding may leave of the gradient of h where its terms cancel, as they do at C = 1."""
    if not h.numel():
        return 0.0
    rstd = (h.double().var(-1, correction=0) + 1e-5).rsqrt()
    largest = 4 * weight.abs().max().item() * rstd.max().item()
    return torch.finfo(h.dtype).eps * largest


def check(args):
    rows = max(args["x"].shape[:-1].numel(), 1)
    atol = {"dx": rounding(args["x"], args["weight"])}
    checks.assert_twice_eager(ours, eager, plain, args, rows=rows, atol=atol)


@pytest.mark.parametrize("dtype", checks.DTYPES[::2])  # fp16 is launched as bf16 is
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_twice_eager(shape, dtype, device):
    check(inputs(shape, device, dtype))


@pytest.mark.parametrize("dtype", checks.DTYPES[::2])
def test_widest_row(dtype, device):
    checks.assert_twice_eager(ours, eager, plain, inputs((2, MAX_C), device, dtype), rows=2)


def test_low_precision_input_with_fp32_weights(device):
    args = inputs((13, 48), device, torch.bfloat16, weights=torch.float32)
    checks.assert_twice_eager(ours, eager, plain, args, rows=13)


@checks.sweep(
    M=checks.sizes(0, 35, 1, 32, 33), C=checks.sizes(1, 260, 1, 256, 257), dtype=checks.dtypes()
)
def test_any_shape(device, M, C, dtype):
    check(inputs((M, C), device, dtype))


@pytest.mark.parametrize("C", [768, 130], ids=["C=768", "C=130-padding-as-wide-as-the-row"])
def test_rows_far_from_zero_keep_fp32_accuracy(device, C):
    """PyTorch is off by 1e-3 here. With the second mean y is right, and the gradients, which read
    the mean as one float, are no further off than PyTorch's."""
    args = inputs((13, C), device, mean=1e3, std=1e-2)
    exact = plain(**{n: t.double() for n, t in args.items()})
    assert (ours(**args) - exact).abs().max() < 2e-6 * exact.abs().max()
    checks.assert_twice_eager(ours, eager, plain, args)
    stats = layer_norm_fwd(args["x"], None, args["weight"], args["bias"], 1e-5, torch.float32)[2]
    half_ulp = 2.0**-15  # of a mean between 512 and 1024; one mean alone is off by several
    assert (stats[0] - args["x"].double().mean(-1)).abs().max() <= 1.05 * half_ulp


@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        pytest.param(torch.float16, 100.0, 1.0, id="float16"),
        pytest.param(torch.bfloat16, 8.0, 0.25, id="bfloat16"),
    ],
)
def test_rows_far_from_zero_in_16_bits(device, dtype, mean, std):
    args = inputs((13, 768), device, dtype, mean=mean, std=std)
    checks.assert_twice_eager(ours, eager, plain, args, rows=13)


def test_autocast_gives_16_bit_activations_and_fp32_gradients(device):
    args = inputs((5, 48), device)
    with torch.autocast(device, torch.bfloat16):
        got, low = checks.values_and_grads(ours, args), checks.values_and_grads(eager, args)
    assert got["y"].dtype == low["y"].dtype == torch.bfloat16
    assert got["dx"].dtype == low["dx"].dtype == torch.float32
    # Rounded once from fp32, so within an ulp of bf16 of each other; the gradients are fp32 maths.
    torch.testing.assert_close(got["y"], low["y"], rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(got["dx"], low["dx"], rtol=1e-4, atol=1e-5)


def test_what_holds_of_every_op(device):
    checks.assert_usual("layer_norm", ours, inputs((61, 48), device))


def test_nothing_runs_beside_the_launches(device):
    checks.assert_only_launches(ours, inputs((9, 48), device))
    assert checks.dispatched_ops(ours, inputs((9, 48), device)).count("fgpt::layer_norm_bwd") == 1


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_registration(device, dtype):
    args = inputs((3, 5, 48), device, dtype, weights=torch.float32)
    x, weight, bias = args.values()
    torch.library.opcheck(
        torch.ops.fgpt.layer_norm_fwd.default, (x, None, weight, bias, 1e-5, torch.bfloat16)
    )
    dy, _, stats = layer_norm_fwd(x, None, weight, bias, 1e-5, torch.bfloat16)
    torch.library.opcheck(
        torch.ops.fgpt.layer_norm_bwd.default, (dy, None, x, weight, stats, dtype)
    )


def test_compiled_once_for_any_number_of_rows(device):
    more = [inputs((M, 48), device) for M in (2, 61)]
    checks.assert_compiled_equals_eager(ours, inputs((5, 48), device), also=more, dynamic=True)


def test_frozen_tensors_get_no_gradient(device):
    args = inputs((5, 48), device)
    every = checks.values_and_grads(ours, args)
    only_x = checks.values_and_grads(ours, args, frozen=("weight", "bias"))
    only_bias = checks.values_and_grads(ours, args, frozen=("x", "weight"))
    assert only_x.keys() == {"y", "dx"}
    assert torch.equal(only_x["dx"], every["dx"])
    assert torch.equal(only_bias["dbias"], every["dbias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"weight": torch.ones(50)},
            r"weight must be \(48,\), float32 or .*; got \(50,\)",
            id="width",
        ),
        pytest.param(
            {"x": torch.randn(4, 96)[:, ::2]},
            r"must be contiguous, got strides \(96, 2\)",
            id="strided",
        ),
        pytest.param({"x": torch.randn(4, 48).t()[:, :0]}, r"got x \(48, 0\)", id="no-columns"),
        pytest.param(
            {"x": torch.empty(0, MAX_C + 1)}, rf"1 to {MAX_C} elements.*eager backend", id="wide"
        ),
        pytest.param({"x": torch.tensor(1.0)}, r"got x \(\)", id="scalar"),
        pytest.param(
            {"x": torch.randn(4, 48).double()}, "x must be .* got .* torch.float64", id="dtype"
        ),
        pytest.param(
            {"bias": torch.zeros(48).half()},
            "bias must be .*, float32, .* torch.float16",
            id="mixed-weights",
        ),
        pytest.param(
            {"weight": torch.ones(48, device="meta")},
            "weight must be .* got .*, on meta",
            id="device",
        ),
    ],
)
def test_bad_input_names_both_values(device, change, message):
    args = inputs((4, 48), device)
    args |= {n: t if t.is_meta else checks.on_device(t, device) for n, t in change.items()}
    with pytest.raises(ValueError, match=f"^layer_norm: .*{message}"):
        ours(**args)


def test_off_the_gpu_is_refused():
    args = inputs((4, 48), "meta")
    with pytest.raises(ValueError, match=r"needs a CUDA tensor, got one on meta.*TRITON_INTERPRET"):
        ours(**args)


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 128), (torch.bfloat16, 256)])
@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_every_width_has_a_safe_launch(kernel, dtype, chunk):
    """Registers bounded, few idle lanes, none at 768."""
    for C in range(1, MAX_C + 1):
        launch = safe_launch(kernel, C, dtype.itemsize)
        blocks = dict(launch.blocks)
        covered = blocks["BLOCK_C"] * cdiv(C, blocks["BLOCK_C"])
        lane_elements = blocks["ROWS"] * covered / (32 * launch.num_warps)
        assert chunk >= C or covered < 2 * C, f"C={C}: {covered} lanes"
        assert launch.num_warps <= 8
        assert lane_elements <= (24 if kernel == "bwd" and C <= 8 * 768 else 32), (
            f"C={C}: {lane_elements} elements a lane"
        )
    expected = {"ROWS": 4, "BLOCK_C": chunk}
    assert dict(safe_launch(kernel, 768, dtype.itemsize).blocks) == expected


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    """The last rows lie past what a 32-bit offset reaches."""
    M, C = 2**31 // 768 + 1000, 768
    x = torch.zeros(M, C, device=device, dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, C, device=device)
    weight, bias = torch.ones(C, device=device), torch.zeros(C, device=device)
    assert torch.equal(ours(x, weight, bias)[-5:], ours(x[-5:], weight, bias))
