"""LM head + loss: against float64, against torch, and what it may allocate, launch and accept."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import EAGER, TRITON
from kernels import linear_cross_entropy as lce
from kernels._launch import Launch, replaced
from tests import checks

IGNORED = -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """64 rows of 160 fp32 logits at once: most tests cross a chunk and end in a ragged one."""
    monkeypatch.setattr(lce, "CHUNK_BYTES", 64 * 160 * 4)


def plain(
    x: Tensor, weight: Tensor, targets: Tensor, V: int, ignore_index: int = IGNORED
) -> Tensor:
    """The formula itself, so that the oracle is not code under test."""
    x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    counted = targets != ignore_index
    z = (x @ weight.T)[counted, :V]
    z = z - z.max(dim=1, keepdim=True).values.detach()
    target_z = z.gather(1, targets[counted][:, None])[:, 0]
    return (z.exp().sum(dim=1).log() - target_z).sum() / counted.sum()


def torch_loss(x: Tensor, weight: Tensor, targets: Tensor, V: int, ignore_index: int = IGNORED):
    """What a PyTorch user writes; logits in x's dtype, softmax in fp32."""
    z = F.linear(x, weight)[..., :V].float()
    return F.cross_entropy(z.reshape(-1, V), targets.reshape(-1), ignore_index=ignore_index)


def bind(fn, targets: Tensor, V: int, ignore_index: int = IGNORED):
    return lambda x, weight: fn(x, weight, targets, V, ignore_index)


def draw(M: int, C: int, Vp: int, V: int, dtype: torch.dtype, device: str, scale: float = 1.0):
    """x and weight whose logits have standard deviation `scale`; random targets."""
    x = torch.randn(M, C, device=device).to(dtype)
    weight = (torch.randn(Vp, C, device=device) * (scale / C**0.5)).to(dtype)
    return {"x": x, "weight": weight}, torch.randint(0, V, (M,), device=device)


def assert_twice(
    args: dict[str, Tensor],
    targets: Tensor,
    V: int,
    *,
    ignore_index: int = IGNORED,
    eager: Callable[..., Tensor] = EAGER.linear_cross_entropy,
    dout: Tensor | None = None,
):
    ours, low, exact = (
        bind(fn, targets, V, ignore_index) for fn in (TRITON.linear_cross_entropy, eager, plain)
    )
    checks.assert_twice_eager(ours, low, exact, args, rows=len(targets), dout=dout)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(
    ("M", "C", "Vp", "V"),
    [
        pytest.param(1, 16, 160, 150, id="one-row"),
        pytest.param(64, 64, 128, 128, id="pow2-no-padding"),
        pytest.param(67, 48, 160, 150, id="ragged-last-chunk"),
        pytest.param(131, 37, 323, 257, id="prime"),
        pytest.param(67, 48, 323, 50, id="odd-Vp-and-much-padding"),
        pytest.param(5, 16, 1664, 1610, id="blocks-and-one-that-V-cuts"),
        pytest.param(5, 16, 1603, 1024, id="blocks-and-one-of-padding"),
        pytest.param(3, 16, 1, 1, id="one-word"),
    ],
)
def test_matches_float64(M, C, Vp, V, dtype, device):
    args, targets = draw(M, C, Vp, V, dtype, device)
    assert_twice(args, targets, V)


@checks.sweep(
    M=checks.sizes(1, 80, 63, 64, 65),
    C=checks.sizes(1, 80, 16, 64),
    V=checks.sizes(1, 140, 511, 512, 513, 1024),
    padding=checks.sizes(0, 70),
    ignored=checks.sizes(0, 3),
    dtype=checks.dtypes(),
)
def test_any_shape(M, C, V, padding, ignored, dtype, device):
    torch.manual_seed(0)
    args, targets = draw(M, C, V + padding, V, dtype, device)
    targets[: min(ignored, M - 1)] = IGNORED
    assert_twice(args, targets, V)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("scale", [40.0, 150.0, 1e4])
def test_large_logits_match_torch(scale, dtype, device):
    """The gradient's probabilities must sum to one over the logits as rounded."""
    args, targets = draw(67, 48, 160, 150, dtype, device, scale=scale / 3)
    assert 0.8 * scale < plain_max(args) < 2 * scale
    assert_twice(args, targets, 150, eager=torch_loss)


def plain_max(args) -> float:
    return (args["x"].double() @ args["weight"].double().T).abs().max().item()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_confident_targets_match_torch(dtype, device):
    """p_target = 1 - 1e-5: the loss is the difference of two nearly equal numbers."""
    args, _ = draw(67, 48, 160, 150, dtype, device, scale=8.0)
    targets = torch.arange(67, device=device)
    args["x"] = (args["weight"][:67].float() * 0.45).to(dtype)  # x . w_t = 0.45 * 64 = 29
    assert_twice(args, targets, 150, eager=torch_loss)
    loss = TRITON.linear_cross_entropy(args["x"], args["weight"], targets, 150)
    assert 0 <= loss < 1e-2


@pytest.mark.parametrize("ignore_index", [IGNORED, 5, 2**40])
def test_ignored_rows_do_not_count(ignore_index, device):
    args, targets = draw(67, 48, 160, 150, torch.float32, device)
    targets[targets == 5] = 6
    targets[[0, 13, 63, 64, 66]] = ignore_index
    assert_twice(args, targets, 150, ignore_index=ignore_index, eager=torch_loss)
    loss = bind(TRITON.linear_cross_entropy, targets, 150, ignore_index)
    dx = checks.values_and_grads(loss, args)["dx"]
    assert (dx[targets == ignore_index] == 0).all()
    assert (dx[targets != ignore_index] != 0).any(dim=1).all()


def test_all_ignored_is_nan_with_zero_gradients_as_in_torch(device):
    args, targets = draw(67, 48, 160, 150, torch.float32, device)
    targets.fill_(IGNORED)
    for fn in (torch_loss, TRITON.linear_cross_entropy, EAGER.linear_cross_entropy):
        values = checks.values_and_grads(bind(fn, targets, 150), args)
        assert values["loss"].isnan()
        assert (values["dx"] == 0).all()
        assert (values["dweight"] == 0).all()


def test_no_rows(device):
    args, targets = draw(0, 48, 160, 150, torch.float32, device)
    values = checks.values_and_grads(bind(TRITON.linear_cross_entropy, targets, 150), args)
    assert values["loss"].isnan()
    assert values["dx"].shape == (0, 48)
    assert (values["dweight"] == 0).all()


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_padding_takes_no_part(dtype, device):
    """Huge padding rows of the weight change nothing, and their gradient is exactly 0."""
    args, targets = draw(67, 48, 323, 150, dtype, device)
    loss = bind(TRITON.linear_cross_entropy, targets, 150)
    want = checks.values_and_grads(loss, args)
    args["weight"][150:] = 1e4
    got = checks.values_and_grads(loss, args)
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    assert (got["dweight"][150:] == 0).all()


@pytest.mark.parametrize("block_m", [1, 4])
@pytest.mark.parametrize(
    ("Vp", "V"),
    [
        pytest.param(256, 256, id="whole-blocks"),
        pytest.param(323, 150, id="cut-after-two-and-three-of-padding"),
        pytest.param(128, 50, id="cut-before-one"),
    ],
)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_a_row_in_blocks(dtype, Vp, V, block_m, device):
    """Blocks of 64 columns, as GPT-2's row has six of 8192 and one that V cuts."""
    args, targets = draw(7, 48, Vp, V, dtype, device, scale=4.0)
    targets[3] = IGNORED
    small = Launch((("BLOCK_M", block_m), ("BLOCK_V", 64)), num_warps=1)
    with replaced("linear_cross_entropy.rows", small):
        assert_twice(args, targets, V)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen_input_changes_nothing_else(frozen, device):
    args, targets = draw(67, 48, 160, 150, torch.float32, device)
    loss = bind(TRITON.linear_cross_entropy, targets, 150)
    both = checks.values_and_grads(loss, args)
    one = checks.values_and_grads(loss, args, frozen=(frozen,))
    assert one.keys() == both.keys() - {f"d{frozen}"}
    assert all(torch.equal(one[name], both[name]) for name in one)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_loss_scaled_for_accumulation(dtype, device):
    """Scaling the loss by a power of two scales the gradients by it, to the bit."""
    args, targets = draw(64, 48, 160, 150, dtype, device)
    loss = bind(TRITON.linear_cross_entropy, targets, 150)
    full = checks.values_and_grads(loss, args, torch.ones((), device=device))
    eighth = checks.values_and_grads(loss, args, torch.full((), 0.125, device=device))
    tiny = torch.finfo(dtype).smallest_normal
    for name in ("dx", "dweight"):
        normal = eighth[name].abs() >= tiny
        assert normal.float().mean() > 0.5
        assert torch.equal(eighth[name][normal] * 8, full[name][normal])


def test_gradients_do_not_underflow_in_fp16(device, monkeypatch):
    """dz / N = 8e-6 would be subnormal, whatever the loss scale later brings back."""
    monkeypatch.setattr(lce, "CHUNK_BYTES", 64 * 2048 * 2)
    args, targets = draw(1, 16, 2048, 2048, torch.float16, device, scale=1e-3)
    args["x"] = args["x"].expand(64, -1).contiguous()
    targets = targets.expand(64).contiguous()
    dout = torch.full((), 65536.0, device=device)
    assert_twice(args, targets, 2048, eager=torch_loss, dout=dout)


def test_evaluation_computes_no_gradient(device, monkeypatch):
    kernel, flags = lce._linear_cross_entropy_rows_kernel, []

    class Watched:
        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                flags.append(kwargs["GRAD"])
                kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(lce, "_linear_cross_entropy_rows_kernel", Watched())
    args, targets = draw(5, 48, 160, 150, torch.float32, device)
    leaves = {name: t.requires_grad_() for name, t in args.items()}
    with torch.no_grad():
        TRITON.linear_cross_entropy(**leaves, targets=targets)
    TRITON.linear_cross_entropy(*(t.detach() for t in leaves.values()), targets)
    TRITON.linear_cross_entropy(**leaves, targets=targets)
    assert flags == [False, False, True]


def test_largest_allocation_is_one_chunk_of_logits(device):
    args, targets = draw(200, 16, 160, 150, torch.float32, device)
    loss = bind(TRITON.linear_cross_entropy, targets, 150)
    assert checks.largest_allocation(loss, args) == 64 * 160


def test_launches_and_three_gemms_alone(device):
    args, targets = draw(130, 48, 160, 150, torch.float32, device)
    loss = bind(TRITON.linear_cross_entropy, targets, 150)
    names = checks.dispatched_ops(loss, args)
    assert (names.count("aten::mm"), names.count("aten::addmm")) == (2 * 3, 3)  # of 3 chunks
    assert "aten::_local_scalar_dense" not in names  # a host sync


@pytest.mark.parametrize("M", [1, 100, 1024, 16384, 65536, 100_003])
def test_chunks_are_even_and_bounded(M, monkeypatch):
    monkeypatch.undo()
    rows = lce.chunk_rows(M, 50304, 2)
    assert 1 <= rows <= M
    assert rows * 50304 * 2 <= lce.CHUNK_BYTES
    assert -(-M // rows) == -(-M * 50304 * 2 // lce.CHUNK_BYTES)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_what_holds_of_every_op(dtype, device):
    """An evaluation gives the loss of training, among it."""
    args, targets = draw(67, 48, 160, 150, dtype, device)
    loss = bind(TRITON.linear_cross_entropy, targets, 150)
    checks.assert_usual("linear_cross_entropy", loss, args)


def test_registration(device):
    args, targets = draw(5, 48, 160, 150, torch.float32, device)
    for needs_dx, needs_dweight in ((True, True), (False, False)):
        torch.library.opcheck(
            torch.ops.fgpt.linear_cross_entropy_fwd.default,
            (args["x"], args["weight"], targets, 150, IGNORED, needs_dx, needs_dweight),
        )
    dloss = torch.ones((), device=device)
    torch.library.opcheck(
        torch.ops.fgpt.linear_cross_entropy_bwd.default,
        (args["x"], dloss, dloss.long(), torch.bfloat16),
    )


def test_compiles_without_graph_break(device):
    args, targets = draw(5, 48, 160, 150, torch.float32, device)
    checks.assert_compiled_equals_eager(bind(TRITON.linear_cross_entropy, targets, 150), args)


def test_compiled_graph_takes_any_number_of_rows(device):
    def loss(x, weight, targets):
        return TRITON.linear_cross_entropy(x, weight, targets, 150)

    drawn = [draw(M, 48, 160, 150, torch.float32, device) for M in (3, 66, 5)]
    first, *also = ({**args, "targets": targets} for args, targets in drawn)
    checks.assert_compiled_equals_eager(loss, first, also=also, dynamic=True)


def test_autocast_keeps_the_master_gradient_in_fp32(device):
    """x goes in as bf16; the fp32 weight's gradient must not pass through bf16."""
    args, targets = draw(67, 48, 160, 150, torch.float32, device)

    def loss(x, weight):
        with torch.autocast(device, torch.bfloat16):
            return TRITON.linear_cross_entropy(x, weight, targets, 150)

    got = checks.values_and_grads(loss, args)
    assert {name: t.dtype for name, t in got.items()} == dict.fromkeys(got, torch.float32)
    assert not torch.equal(got["dweight"], got["dweight"].bfloat16().float())
    rounded = {name: t.bfloat16() for name, t in args.items()}
    want = checks.values_and_grads(bind(TRITON.linear_cross_entropy, targets, 150), rounded)
    assert torch.equal(got["loss"], want["loss"])
    assert torch.equal(got["dx"], want["dx"].float())
    assert torch.equal(got["dweight"].bfloat16(), want["dweight"])


def test_leading_dimensions(device):
    args, targets = draw(66, 48, 160, 150, torch.float32, device)
    flat = checks.values_and_grads(bind(TRITON.linear_cross_entropy, targets, 150), args)
    args["x"] = args["x"].view(2, 33, 48)
    deep = checks.values_and_grads(
        bind(TRITON.linear_cross_entropy, targets.view(2, 33), 150), args
    )
    assert deep["dx"].shape == (2, 33, 48)
    assert torch.equal(deep["dx"].view(66, 48), flat["dx"])
    assert torch.equal(deep["loss"], flat["loss"])


@pytest.mark.parametrize("id_", [-1, 150, 159, 2**31, 2**40, -(2**33)])
def test_id_outside_the_vocabulary(id_, device, monkeypatch):
    """An error on the CPU; where that would cost a sync, NaN, and nothing read."""
    args, targets = draw(67, 48, 160, 150, torch.float32, device)
    targets[65] = id_
    if device == "cpu":
        for op in (TRITON, EAGER):
            with pytest.raises(ValueError, match=rf"in \[0, 150\) or ignore_index -100, got {id_}"):
                op.linear_cross_entropy(**args, targets=targets, vocab_size=150)
        monkeypatch.setattr(lce, "check_ids", lambda *_: None)
    values = checks.values_and_grads(bind(TRITON.linear_cross_entropy, targets, 150), args)
    assert values["loss"].isnan()
    assert values["dx"][65].isnan().all()
    assert values["dweight"][:150].isnan().all()
    assert (values["dweight"][150:] == 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, of the maximum of such a row
def test_logits_that_are_no_numbers_make_the_loss_none(device):
    """The maximum of a row leaves NaN out; what judges a step must see it all the same."""
    for value in (torch.nan, torch.inf):
        args, targets = draw(5, 48, 160, 150, torch.float32, device)
        args["x"][3, 0] = value
        values = checks.values_and_grads(bind(TRITON.linear_cross_entropy, targets, 150), args)
        assert values["loss"].isnan()
        assert values["dx"][3].isnan().all()


X, W, T = (4, 48), (160, 48), (4,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(160, 50)}, r"weight must be \(Vp, 48\).*got \(160, 50\)"),
        ({"weight": torch.tensor(1.0)}, r"weight must be \(Vp, 48\).*got \(\)"),
        ({"x": torch.tensor(1.0)}, r"weight must be \(Vp, 0\) to match x \(\)"),
        ({"targets": torch.zeros(5).long()}, r"targets must be \(4,\), int64.*\(5,\), torch.int64"),
        ({"targets": torch.zeros(4).int()}, r"targets must be \(4,\), int64.*torch.int32"),
        ({"vocab_size": 161}, r"vocab_size must be in \[1, 160\].*got 161"),
        ({"vocab_size": 0}, r"vocab_size must be in \[1, 160\].*got 0"),
        ({"x": torch.zeros(4, 96)[:, ::2]}, r"x must be contiguous, got strides \(96, 2\)"),
        ({"weight": torch.zeros(48, 160).T}, r"weight must be contiguous, got strides \(1, 160\)"),
        ({"x": torch.zeros(X).double()}, "x must be .*float32 or .*torch.float64"),
        ({"weight": torch.zeros(W).half()}, "weight must be .*float32, .*torch.float16"),
    ],
)
def test_bad_input_is_named(change, message, device):
    good = {"x": torch.zeros(X), "weight": torch.zeros(W), "targets": torch.zeros(T).long()}
    args = {
        n: checks.on_device(v, device) if isinstance(v, Tensor) else v
        for n, v in {**good, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        TRITON.linear_cross_entropy(**args)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_eager_matches_torch(dtype, compiled, device, monkeypatch):
    """EAGER is the yardstick above, so it is held to plain PyTorch itself, both its forms."""
    from kernels import reference

    monkeypatch.setattr(reference, "CHUNK_TOKENS", 64)
    args, targets = draw(131, 48, 160, 150, dtype, device)
    targets[[3, 130]] = IGNORED
    op = EAGER.linear_cross_entropy
    if compiled:
        op = torch.compile(op, backend="aot_eager", fullgraph=True, dynamic=False)
    ours, low, exact = (bind(fn, targets, 150) for fn in (op, torch_loss, plain))
    checks.assert_twice_eager(ours, low, exact, args, rows=131)
