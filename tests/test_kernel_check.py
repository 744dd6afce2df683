"""The check before a run notices each kind of fault, in each op."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import EAGER, OPS
from kernels._op import INTERPRETED
from model import GPT
from model.config import MODELS
from tests.tuned import CONFIG, CPU, RECIPE, plan_of
from tests.tuned import small as small
from training import trials, verify
from training.plan import Choices, make_plan
from training.recipes import Recipe

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")


class Scaled(torch.autograd.Function):
    """Right values, wrong gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # pyright: ignore
        return 1.01 * dy


def with_nan(y: Tensor) -> Tensor:
    lane = torch.zeros_like(y)
    lane.view(-1)[7] = float("nan")
    return y + lane


def detached(y: Tensor) -> Tensor:
    return y.detach() + 0 * y.sum().requires_grad_()


calls: list[int] = []


def once_different(y: Tensor) -> Tensor:
    calls.append(len(calls))
    return y * (1 + 2**-22 * (len(calls) == 3))


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "wrong by 1%": (lambda y: 1.01 * y, "y: error"),
    "NaN in one lane": (with_nan, "y: error nan"),
    "right forward, wrong gradient": (Scaled.apply, "dqkv: error"),
    "wrong at the run's shape alone": (lambda y: y * (1.01 if y.shape[:2] == (3, 16) else 1), "y:"),
    "memory that nobody wrote to": (lambda y: y + 0 * torch.empty_like(y), "y: error nan"),
    "another dtype": (lambda y: y.double(), "y: must be (3, 16, 64), torch.float32"),
    "other bits now and then": (once_different, "y: other bits when it is run again"),
}  # fmt: skip


def planted(monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any], *names: str) -> None:
    """Replace Triton's ops by eager ones with a fault."""

    def wrong(name: str) -> Any:
        return lambda *args, **kwargs: fault(getattr(EAGER, name)(*args, **kwargs))

    ops = replace(EAGER, **{name: wrong(name) for name in names})
    monkeypatch.setattr(trials, "parse_ops", lambda _: ops)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trials.NUM_RERUNS, "cpu", 2)
    calls.clear()
    fault, said = FAULTS[name]
    planted(monkeypatch, fault, "causal_attention")
    assert trials.check("causal_attention", RECIPE, plan_of()).startswith(said)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_eager_ops_pass_and_a_hundredth_is_noticed_in_each(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "EXACT_BYTES", 1)  # row by row
    monkeypatch.setitem(trials.NUM_RERUNS, "cpu", 1)
    recipe = RECIPE
    plan = make_plan(recipe, CPU, Choices(dtype=dtype, ops="eager"))  # pyright: ignore
    both: dict[str, Callable[[Any], Any]] = dict.fromkeys(
        ("add_layer_norm", "embedding"),
        lambda out: ((1.01 * out[0], *out[1:]), (Scaled.apply(out[0]), *out[1:])),
    )
    for op in OPS:
        planted(monkeypatch, lambda y: y)
        assert trials.check(op, recipe, plan) == ""
        for which, name in enumerate(("y", "d")):
            fault = both.get(op, lambda y: (1.01 * y, Scaled.apply(y)))
            planted(monkeypatch, lambda y, fault=fault, which=which: fault(y)[which], op)
            said = trials.check(op, recipe, plan)
            assert "over budget" in said, (op, name)
            assert said[0] in (name, "l", "d"), said


@pytest.mark.slow  # half a minute in the interpreter
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_our_own_kernels_pass(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trials.NUM_RERUNS, "cpu", 1)
    choices = Choices(ops="triton", optimizer="triton", dtype=dtype)  # pyright: ignore
    plan = replace(make_plan(RECIPE, CPU, choices), working_copies=dtype == "bf16")
    assert verify.checked_names(plan) == (*OPS, "adamw")
    for name in verify.checked_names(plan):
        assert trials.check(name, RECIPE, plan) == "", name


def test_what_float64_says_does_not_depend_on_how_the_batch_is_cut() -> None:
    recipe, plan = replace(RECIPE, batch_size=5), replace(plan_of(), micro_batch_size=5)
    for op in OPS:
        *_, exact = trials._runs_of(op, recipe, plan)
        fn, tensors, douts, _ = exact.args  # pyright: ignore
        whole, cut = (trials.exact_values(fn, tensors, douts, n) for n in (5, 2))
        assert whole.keys() == cut.keys()
        for key, value in whole.items():
            torch.testing.assert_close(cut[key], value, rtol=1e-12, atol=1e-14, msg=f"{op} {key}")


def test_float64_takes_one_head_and_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 heads at T = 8192, the scores alone take 6.4 GB; the logits of such a row 3.3 GB."""
    monkeypatch.setitem(MODELS, "smoke", replace(CONFIG, n_head=2))
    monkeypatch.setattr(trials, "EXACT_BYTES", 8 * 256 * 5 * 6)  # logits of six tokens
    eager, cross_entropy, seen = EAGER.causal_attention, F.cross_entropy, []

    def attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
        seen.append((qkv.dtype, n_head))
        return eager(qkv, n_head, dropout_p)

    def loss(logits: Tensor, *rest: Any) -> Tensor:
        seen.append((logits.dtype, len(logits)))
        return cross_entropy(logits, *rest)

    monkeypatch.setattr(trials, "EAGER", replace(EAGER, causal_attention=attention))
    monkeypatch.setattr(F, "cross_entropy", loss)
    for name, most in (("causal_attention", 1), ("linear_cross_entropy", 6)):
        ours, _, exact = trials._runs_of(name, RECIPE, plan_of(ops="eager"))
        seen.clear()
        want = exact()
        assert {dtype for dtype, _ in seen} == {torch.float64}
        assert max(count for _, count in seen) == most
        assert want.keys() == ours().keys()


@pytest.mark.parametrize("fault", ["", "moment", "copy", "norm"])
def test_adamw_is_checked_likewise(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configure = trials.configure_adamw

    def ours(model: GPT, recipe: Recipe, kind: str) -> Any:
        optimizer = configure(model, recipe, "torch")
        step, clip = optimizer.step, optimizer.clip

        def spoilt(closure: Any = None, skip: Any = None) -> None:
            step()
            with torch.no_grad():
                if fault == "moment":
                    optimizer.state[next(model.parameters())]["exp_avg_sq"][1] *= 1.01
                if fault == "copy":
                    next(iter(optimizer.copies.values()))[3] *= 1.02

        if kind == "triton":
            optimizer.step = spoilt
            optimizer.clip = lambda max_norm: clip(max_norm) * (1.0001 if fault == "norm" else 1)
        return optimizer

    monkeypatch.setattr(trials, "configure_adamw", ours)
    plan = replace(plan_of(dtype="bf16"), working_copies=True)
    said = {"moment": "weights: error", "copy": "copies: error", "norm": "norm: error"}
    assert trials.check("adamw", RECIPE, plan).startswith(said.get(fault, ""))
    assert bool(fault) == bool(trials.check("adamw", RECIPE, plan))


def test_a_child_says_what_an_op_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    task = partial(trials.check_op, "gelu_mlp", RECIPE, plan_of())
    planted(monkeypatch, fails, "gelu_mlp")
    with pytest.raises(SystemExit, match=r"^RuntimeError: CUDA error: an illegal memory access"):
        trials.answer(task)
    planted(monkeypatch, lambda _: short(), "gelu_mlp")
    assert trials.answer(task) == {"error": "full"}


def short() -> Any:
    raise torch.OutOfMemoryError("full")
