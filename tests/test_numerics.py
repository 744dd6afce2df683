"""`make numerics`: the shapes it checks, what it compares, and what it says of a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import record
from bench.cases import CASES, Shape
from kernels import EAGER
from kernels.linear_cross_entropy import chunk_rows
from tests import numerics
from tests.pretend_cuda import Pretended
from training.numerics import default_douts

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Shape(2, 4, C=64, H=1, V=128)


@pytest.mark.parametrize("op", CASES)
def test_cuda_checks_the_kernels_it_times(op: str) -> None:
    cut = numerics.check_shape(op, Shape(64, 1024), CUDA)
    assert cut.M <= 16384
    if op in ("layer_norm", "add_layer_norm", "gelu_mlp"):
        assert cut.M > 4096  # their "large" rows
    if op == "linear_cross_entropy":
        assert chunk_rows(cut.M, cut.Vp, 4) < cut.M
    if op == "causal_attention":
        assert (cut.B, cut.T) == (4, 1023)
    assert numerics.check_shape(op, Shape(64, 1024), torch.device("cpu")).M <= 512
    assert numerics.check_shape(op, TINY, CUDA) == TINY


def test_all_three_runs_see_the_same_output_gradients() -> None:
    # With the gradients of each run drawn anew, those of float64 would not be rounded to bf16.
    inputs = {"x": torch.randn(64).bfloat16(), "factor": 2.0}
    scaled = lambda x, factor: x * factor  # noqa: E731
    found = numerics.compare_runs(scaled, scaled, scaled, inputs, rows=64)
    assert [(c.name, c.ours, c.eager) for c in found] == [("y", 0.0, 0.0), ("dx", 0.0, 0.0)]


def test_tf32_is_asked_for_and_given_back(capsys: pytest.CaptureFixture) -> None:
    seen = []

    def attention(qkv: Tensor, n_head: int) -> Tensor:
        flash = torch.backends.cuda.flash_sdp_enabled()
        seen.append((torch.get_float32_matmul_precision(), flash))
        return EAGER.causal_attention(qkv, n_head)

    before, cpu = torch.get_float32_matmul_precision(), torch.device("cpu")
    for name in ("tf32", "fp32"):
        with numerics.precision(name) as dtype:
            found = numerics.check_op(attention, "causal_attention", TINY, dtype, cpu)
        assert all(c.holds for c in found)
        assert torch.get_float32_matmul_precision() == before
    # Plain attention must multiply in TF32 as well, which torch's fused kernels never do.
    assert seen == [("high", False), ("highest", True)]
    assert numerics.main(["--dtype", "tf32"]) == 0
    assert "tf32 left out: only a GPU multiplies in it" in capsys.readouterr().out


def test_numerics_of_a_gpu(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows of `python -m tests.numerics` there: results, reruns, and an op that fails."""
    monkeypatch.setattr(numerics, "GPU_SHAPES", (TINY,))
    monkeypatch.setattr(numerics, "RERUN_SHAPE", TINY)
    monkeypatch.setattr(numerics, "NUM_RERUNS", 2)
    argv = ["--op", "layer_norm", "--dtype", "bf16", "--commit", "0" * 40]
    argv += ["--out", str(tmp_path / "x.json")]
    assert numerics.main(argv) == 0
    rows = record.load(tmp_path / "x.json").rows("checks")
    assert {row.check for row in rows} == {"numerics bf16", "same bits bf16"}
    assert "layer_norm B=2 T=4 C=64 H=1 dweight" in {row.what for row in rows}
    assert not any(row.doubt for row in rows)
    # A bit that moves, and an error, are in doubt and make it fail.
    moves = iter([1.0] * 3 + [1.0, 1.0, 1.0 + 2**-7])
    wrong = lambda **inputs: inputs["x"] * next(moves)  # noqa: E731
    assert numerics.reruns_that_differ(wrong, "layer_norm", torch.bfloat16, CUDA) == 0
    assert numerics.reruns_that_differ(wrong, "layer_norm", torch.bfloat16, CUDA) == 1
    monkeypatch.setattr(numerics, "check_op", lambda *_: 1 / 0)
    assert numerics.main(argv) == 1
    failed = [row for row in record.load(tmp_path / "x.json").rows("checks") if row.doubt]
    assert [row.doubt for row in failed] == ["ZeroDivisionError: division by zero"]


def test_output_gradients_are_drawn_where_the_outputs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 65,536 rows of 768 a CPU takes half a second, once for each backend that is timed."""
    devices, randn = [], torch.randn

    def recorded(*size: Any, device: Any = None, **how: Any) -> Tensor:
        devices.append(device)
        return randn(*size, device=device, **how)

    monkeypatch.setattr(torch, "randn", recorded)
    y, loss = default_douts((torch.empty(2, 3, dtype=torch.bfloat16), torch.empty(())))
    assert (y.shape, y.dtype, loss.item()) == ((2, 3), torch.bfloat16, 1.5)
    assert devices == [y.device]
