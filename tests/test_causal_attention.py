"""Attention against the formula written out: explicit scores, explicit mask, explicit softmax."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import EAGER, TRITON, Ops, causal_attention, parse_ops
from kernels._launch import replaced, rows
from tests import checks

# (B, T, H, D). T: 1, ragged in one tile, both sides of a tile, of one-tile heads, and of blocks.
SHAPES = [
    pytest.param((2, 1, 3, 16), id="T=1"),
    pytest.param((2, 17, 2, 16), id="T=17-D=16"),
    pytest.param((1, 63, 3, 32), id="T=63-D=32"),
    pytest.param((2, 64, 2, 64), id="T=64-D=64"),
    pytest.param((1, 65, 2, 64), id="T=65-D=64"),
    pytest.param((1, 65, 1, 128), id="T=65-D=128-loops-in-16-bit"),
    pytest.param((1, 127, 2, 32), id="T=127-D=32"),
    pytest.param((2, 128, 1, 64), id="T=128-D=64"),
    pytest.param((1, 129, 2, 64), id="T=129-D=64-one-row-past-a-block"),
    pytest.param((1, 200, 2, 16), id="T=200-D=16-cut-block"),
    pytest.param((1, 256, 1, 128), id="T=256-D=128-whole-blocks"),
]


def plain(qkv: Tensor, n_head: int) -> Tensor:
    """The formula itself, so that the oracle is not code under test."""
    T, D = qkv.shape[1], qkv.shape[2] // (3 * n_head)
    q, k, v = (t.unflatten(2, (n_head, D)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    later = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    scores = (q @ k.mT / D**0.5).masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def ours(n_head: int):
    return lambda qkv: TRITON.causal_attention(qkv, n_head)


def sdpa(qkv: Tensor, n_head: int) -> Tensor:
    """PyTorch's own, which EAGER is not everywhere."""
    q, k, v = (t.unflatten(2, (n_head, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def assert_right(qkv: Tensor, n_head: int, products: int = 0, ops: Ops = TRITON) -> None:
    # Of one token dq and dk are 0, eager to the bit; ours are what rounding leaves of dP - delta,
    # a sum of D products, times k or q.
    alone = qkv.shape[1] == 1
    scale = (qkv.shape[2] / (3 * n_head)) ** 0.5 * qkv.abs().max().item() ** 2
    checks.assert_twice_eager(
        lambda qkv: ops.causal_attention(qkv, n_head),
        lambda qkv: sdpa(qkv, n_head),
        lambda qkv: plain(qkv, n_head),
        {"qkv": qkv},
        products=products,
        atol=torch.finfo(qkv.dtype).eps * scale if alone else None,
    )


def packed(B: int, T: int, H: int, D: int, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(B, T, 3 * H * D, device=device).to(dtype)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    """y and dqkv no worse than twice the error SDPA makes in the same dtype."""
    qkv = packed(*shape, dtype=dtype, device=device)
    assert_right(qkv, shape[2])
    assert_right(qkv, shape[2], ops=EAGER)


def test_sdpa_asked_for_is_sdpa(device):
    """Where the eager op makes products of its own, too."""
    op = parse_ops("eager,causal_attention=sdpa-flash").causal_attention
    args = {"qkv": packed(1, 17, 2, 16, torch.bfloat16, device)}
    names = checks.dispatched_ops(lambda qkv: op(qkv, 2), args)
    assert any("scaled_dot_product_flash_attention" in name for name in names), names


@pytest.mark.parametrize(("T", "dtype"), [(1023, torch.float32), (1100, torch.bfloat16)])
def test_long_sequences(T, dtype, device):
    """Many blocks in each loop, the last one cut."""
    assert_right(packed(1, T, 1, 32, dtype, device), 1)


@pytest.mark.parametrize("T", [1, 64, 300])
def test_tf32_loses_what_its_operands_do(T, device):
    qkv = packed(1, T, 2, 64, device=device)
    checks.assert_within_tf32(
        "causal_attention", device, lambda products: assert_right(qkv, 2, products)
    )


@checks.sweep(
    B=checks.sizes(1, 2),
    T=checks.sizes(1, 150, 16, 17, 64, 65, 128, 129),
    H=checks.sizes(1, 3),
    D=checks.sizes(0, 3),
    dtype=checks.dtypes(),
)
def test_any_shape(B, T, H, D, dtype, device):
    assert_right(packed(B, T, H, (16, 32, 64, 16)[D], dtype, device), H)


@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv"])
def test_every_block_shape_of_the_table(kernel, device):
    """The rows of other head dims and dtypes, run at D = 16 with T past two of their blocks."""
    qkv = packed(1, 300, 1, 16, torch.float32, device)
    want = checks.values_and_grads(lambda qkv: plain(qkv, 1), {"qkv": qkv.double()})
    name = f"causal_attention.{kernel}"
    known = [row for layer in rows() for row in layer.items()]
    tried = {launch.blocks: launch for key, launch in known if key.kernel == name}
    for launch in tried.values():
        with replaced(name, launch) as asked:
            got = checks.values_and_grads(ours(1), {"qkv": qkv})
        assert asked
        for key in want:
            torch.testing.assert_close(
                got[key].double(), want[key], rtol=0, atol=2e-6, msg=f"{launch.blocks} {key}"
            )
    assert len(tried) >= 3


@pytest.mark.parametrize("T", [40, 200])
def test_a_later_token_never_changes_an_earlier_output(T, device):
    qkv = packed(1, T, 2, 16, device=device)
    y = TRITON.causal_attention(qkv, 2)
    for t in (1, 16, 33, T - 1):
        changed = qkv.clone()
        changed[:, t:] = 1e4
        assert torch.equal(TRITON.causal_attention(changed, 2)[:, :t], y[:, :t]), f"token {t}"


@pytest.mark.parametrize("T", [40, 200])
def test_large_scores(T, device):
    """Scores of +-80 and more: softmax is one key, sums stay finite, gradients stay right."""
    qkv = packed(1, T, 1, 16, device=device)
    qkv[..., :32] *= 5
    scores = qkv[0, :, :16] @ qkv[0, :, 16:32].T / 4
    assert scores.abs().max() > 80
    assert_right(qkv, 1)


@pytest.mark.parametrize("T", [40, 150])
class TestContract:
    """One-tile heads and the loops; what every op owes the model and the compiler."""

    def test_what_holds_of_every_op(self, T, device):
        args = {"qkv": packed(1, T, 2, 16, device=device)}
        checks.assert_usual("causal_attention", ours(2), args)

    def test_nothing_but_launches_and_empties(self, T, device):
        """No split, transpose, cat, copy or cast, in forward, in backward or inside the ops."""
        args = {"qkv": packed(1, T, 2, 16, device=device)}
        checks.assert_only_launches(ours(2), args)
        assert checks.largest_allocation(ours(2), args) == args["qkv"].numel()

    def test_registration(self, T, device):
        qkv = packed(1, T, 2, 16, device=device)
        forward: Any = causal_attention.causal_attention_fwd
        backward: Any = causal_attention.causal_attention_bwd
        torch.library.opcheck(forward, (qkv, 2))
        y, lse = forward(qkv, 2)
        torch.library.opcheck(backward, (y, qkv, y, lse, 2))

    def test_compiled_equals_eager(self, T, device):
        args = {"qkv": packed(1, T, 2, 16, device=device)}
        checks.assert_compiled_equals_eager(ours(2), args)


def test_one_graph_serves_every_length(device):
    """T is symbolic, on both sides of the one-tile limit, values and gradients."""
    first, *also = ({"qkv": packed(2, T, 2, 16, device=device)} for T in (130, 20, 77))
    checks.assert_compiled_equals_eager(ours(2), first, also=also, dynamic=True)


def test_lse_is_saved_in_base_two(device):
    qkv = packed(1, 150, 2, 16, device=device)
    q, k, _ = qkv.double().unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    later = torch.ones(150, 150, dtype=torch.bool, device=device).triu(1)
    want = (q @ k.mT / 4).masked_fill(later, float("-inf")).logsumexp(-1) / torch.tensor(2.0).log()
    _, lse = causal_attention.causal_attention_fwd(qkv, 2)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5, 96), (2, 0, 96)])
def test_empty_input_gives_empty_output_and_gradient(shape, device):
    qkv = torch.randn(shape, device=device, requires_grad=True)
    y = TRITON.causal_attention(qkv, 2)
    assert y.shape == (*shape[:2], 32)
    (dqkv,) = torch.autograd.grad(y.sum(), qkv)
    assert dqkv.shape == shape


def test_autocast_casts_qkv(device):
    qkv = packed(1, 20, 2, 16, device=device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = TRITON.causal_attention(qkv, 2)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, TRITON.causal_attention(qkv.bfloat16(), 2))
    (dqkv,) = torch.autograd.grad(y.float().square().sum(), qkv)
    assert dqkv.dtype == torch.float32


def test_bad_input_gives_the_written_error(device):
    def refuses(match: str, *args: Any) -> None:
        with pytest.raises(ValueError, match=match):
            TRITON.causal_attention(*args)

    x = torch.randn(2, 8, 96, device=device)
    refuses(r"multiple of 3 \* n_head = 15, got \(2, 8, 96\)", x, 5)
    refuses(r"must be \(B, T, 3C\)", x[0], 2)
    refuses(r"multiple of 3 \* n_head = 0", x, 0)
    refuses(r"a head dim of .*got 8; use --ops triton,causal_attention=eager", x, 4)
    refuses(r"dropout 0, got 0.1; use --ops triton,causal_attention=eager", x, 2, 0.1)
    refuses(r"contiguous, got strides \(768, 1, 8\)", x.mT.contiguous().mT, 2)
    refuses(r"contiguous", torch.randn(2, 8, 192, device=device)[..., ::2], 2)
    refuses(r"must be .*float32 or float16 or bfloat16, .*torch.float64", x.double(), 2)
