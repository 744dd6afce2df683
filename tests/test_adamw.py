"""AdamW through our kernels, against torch's and against float64, called as the trainer does."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import adamw, adamw_tables
from kernels._op import INTERPRETED
from kernels.adamw_tables import Slot, Tables
from model import GPTConfig
from training import state as saving
from training.optim import AdamW, TritonAdamW

CHUNK = adamw.CHUNK.value
# One element, an odd few, a power of two, one past a block, a whole chunk and a ragged one.
SHAPES = ((1,), (7,), (16, 64), (5, 205), (CHUNK + 3,))
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
Shapes = tuple[tuple[int, ...], ...]
Make = Callable[[list[dict[str, Any]]], torch.optim.AdamW]


def make_parameters(device: str, shapes: Shapes = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in shapes]


def groups_of(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Decay on matrices, none on vectors, and one group whose betas and eps are its own."""
    return [
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": DECAY},
        {"params": [p for p in parameters if p.dim() == 1][1:], "weight_decay": 0.0},
        {"params": parameters[:1], "weight_decay": 0.3, "betas": (0.8, 0.999), "eps": 1e-5},
    ]


def ours(groups: list[dict[str, Any]]) -> TritonAdamW:
    return TritonAdamW(groups, lr=1e-3, betas=BETAS, eps=EPS)


def torchs(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, lr=1e-3, betas=BETAS, eps=EPS)


def plain(fused: bool) -> Make:
    return lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, eps=EPS, fused=fused)


def lr_of(step: int) -> float:
    return 1e-2 * min(1.0, (step + 1) / 10) * (1 - step / 200)


def gradients(step: int, parameters: list[nn.Parameter]) -> list[Tensor]:
    """A few zeros and a wide range of sizes, as gradients have."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for p in parameters:
        g = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 5 - 3)
        found.append(g.masked_fill(g.abs() < 1e-4, 0.0).to(p.device))
    return found


def clip_to(optimizer: torch.optim.AdamW, max_norm: float) -> Tensor:
    if isinstance(optimizer, AdamW):
        return optimizer.clip(max_norm)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, max_norm)


def run(
    optimizer: torch.optim.AdamW,
    parameters: list[nn.Parameter],
    steps: range,
    max_norm: float = 1.0,
) -> list[Tensor]:
    """The steps of a range: schedule, clip, update. Returns the norms."""
    norms = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr_of(step)
        for p, g in zip(parameters, gradients(step, parameters), strict=True):
            p.grad = g
        norms.append(clip_to(optimizer, max_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norms


def values(optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
    found = {f"{i}.param": p.detach().clone() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        found |= {f"{i}.{k}": v.detach().clone() for k, v in optimizer.state[p].items()}
    return found


def exact_run(steps: range, shapes: Shapes, max_norm: float = 1.0) -> dict[str, Tensor]:
    """The textbook in float64."""
    parameters = make_parameters("cpu", shapes)
    found = {}
    exact = [p.detach().double() for p in parameters]
    m, v = ([torch.zeros_like(p) for p in exact] for _ in range(2))
    settings = {p: group for group in groups_of(parameters) for p in group["params"]}
    for step in steps:
        grads = [g.double() for g in gradients(step, parameters)]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt().item()
        factor = min(1.0, max_norm / (norm + 1e-6))
        for i, p in enumerate(parameters):
            how = {"betas": BETAS, "eps": EPS, **settings[p]}
            lr, t = lr_of(step), step + 1
            (b1, b2), g = how["betas"], grads[i] * factor
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g * g
            update = m[i] / (1 - b1**t) / ((v[i] / (1 - b2**t)).sqrt() + how["eps"])
            exact[i] = exact[i] * (1 - lr * how["weight_decay"]) - lr * update
    for i, p in enumerate(exact):
        found |= {f"{i}.param": p, f"{i}.exp_avg": m[i], f"{i}.exp_avg_sq": v[i]}
    return found


def errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each tensor."""
    return {n: (got[n].cpu().double() - w).square().mean().sqrt().item() for n, w in want.items()}


def run_fresh(
    make: Make, device: str, steps: range, shapes: Shapes = SHAPES, **how: Any
) -> dict[str, Tensor]:
    parameters = make_parameters(device, shapes)
    optimizer = make(groups_of(parameters))
    run(optimizer, parameters, steps, **how)
    return values(optimizer, parameters)


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=1e-6, msg=name)


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


class NoHostRead(TorchDispatchMode):
    """Fails where a device value would be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::is_nonzero"), func
        return func(*args, **(kwargs or {}))


# 100 steps of all shapes would be most of a minute in the interpreter.
@pytest.mark.parametrize(("num_steps", "shapes"), [(100, ((1,), (7,), (5, 205))), (5, SHAPES)])
def test_no_further_from_float64_than_twice_torch(num_steps, shapes, device):
    steps = range(num_steps)
    got, want = run_fresh(ours, device, steps, shapes), exact_run(steps, shapes)
    low = [run_fresh(plain(fused), device, steps, shapes) for fused in (False, True)]
    mine, theirs = errors(got, want), [errors(each, want) for each in low]
    for name, value in want.items():
        ulp = 2.0**-23 * value.abs().max().item()  # a tensor of one element has one chance
        allowed = 2 * max(each[name] for each in theirs) + ulp
        assert mine[name] <= allowed, (name, mine[name], [each[name] for each in theirs])
    for kind in ("param", "exp_avg", "exp_avg_sq"):  # together, where chance evens out
        total, *others = (
            math.hypot(*(each[n] * want[n].numel() ** 0.5 for n in want if n.endswith(f".{kind}")))
            for each in (mine, *theirs)
        )
        assert total <= 2 * max(others), (kind, total, others)
    for i in range(len(shapes)):
        assert got[f"{i}.step"] == num_steps


def test_clip_that_is_not_reached_changes_nothing(device):
    """gradients are below 1e4 here; a clip of 1e6, of 0 and of infinity all leave them alone."""
    want = run_fresh(plain(True), device, range(2), max_norm=1e6)
    for max_norm in (1e6, 0.0, math.inf):
        assert_close(run_fresh(ours, device, range(2), max_norm=max_norm), want)


def test_norm_is_exact_and_repeats(device):
    parameters = make_parameters(device)
    optimizer = ours(groups_of(parameters))
    for p, g in zip(parameters, gradients(2, parameters), strict=True):
        p.grad = g
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    want = torch.stack(squares).sum().sqrt()
    first, again = optimizer.clip(1.0), optimizer.clip(0.0)
    assert first.shape == ()
    assert first.dtype == torch.float32
    torch.testing.assert_close(first.double(), want, rtol=3e-7, atol=0.0)
    assert torch.equal(first, again)
    for p, g in zip(parameters, gradients(2, parameters), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)  # clip leaves the gradients as they are


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, CHUNK + 2])
def test_norm_of_a_bad_gradient_is_not_finite(bad, where, device):
    p = nn.Parameter(torch.ones(CHUNK + 3, device=device))
    p.grad = torch.ones_like(p)
    p.grad[where] = bad
    optimizer = TritonAdamW([p])
    assert not optimizer.clip(1.0).isfinite()
    optimizer.step()  # without a verdict the harm is done, as in torch
    assert not p.isfinite().all()


def test_rerun_is_bitwise_equal(device):
    assert_same(run_fresh(ours, device, range(4)), run_fresh(ours, device, range(4)))


def test_found_inf_leaves_every_bit(device):
    parameters = make_parameters(device, SHAPES[2:])
    copies = {p: p.detach().bfloat16().requires_grad_() for p in parameters[:2]}
    optimizer = TritonAdamW(parameters)
    optimizer.attach_working(copies)
    for step in range(2):
        for p, g in zip(parameters, gradients(step, parameters), strict=True):
            leaf = copies.get(p, p)
            leaf.grad = g.to(leaf.dtype)
        before = values(optimizer, parameters)
        kept = [c.detach().clone() for c in copies.values()]
        optimizer.found_inf = torch.ones((), device=device)
        optimizer.clip(1.0)
        optimizer.step()
        after = values(optimizer, parameters)
        assert_same({name: after[name] for name in before}, before)
        for c, k in zip(copies.values(), kept, strict=True):
            assert torch.equal(c, k)
        optimizer.found_inf = torch.zeros((), device=device)
        optimizer.clip(1.0)
        optimizer.step()
        assert not torch.equal(parameters[0], before["0.param"])
        assert optimizer.state[parameters[0]]["step"] == step + 1


def test_working_copies_give_gradients_and_follow(device):
    """As torch does when bf16 gradients of copies are cast up and the copies rewritten."""
    results = []
    for make in (TritonAdamW, AdamW):
        parameters = make_parameters(device)
        # A copied matrix, a copied vector of two chunks; the others have fp32 gradients.
        copies = {p: p.detach().bfloat16().requires_grad_() for p in (parameters[2], parameters[4])}
        optimizer = make(groups_of(parameters), betas=BETAS)
        optimizer.attach_working(copies)
        norms = []
        for step in range(6):
            for p, g in zip(parameters, gradients(step, parameters), strict=True):
                leaf = copies.get(p, p)
                leaf.grad = g.to(leaf.dtype)
            if step == 3:  # as after several micro-batches
                optimizer.fold_working_gradients()
                assert copies[parameters[2]].grad is None
                copies[parameters[2]].grad = torch.ones_like(copies[parameters[2]])
            norms.append(optimizer.clip(1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(c.grad is None for c in copies.values())
            for p, c in copies.items():
                assert torch.equal(c, p.detach().bfloat16())
        results.append(values(optimizer, parameters) | {"norms": torch.stack(norms)})
    assert_close(results[0], results[1])


class Holder(nn.Module):
    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.all = nn.ParameterList(parameters)
        self.config = GPTConfig()
        self.trained_context, self.fine_tuned_context = 1, None


def test_checkpoints_restore_in_place(device):
    """As training/state.py does it: into live state, or before the first step."""
    parameters = make_parameters(device, SHAPES[:3])
    model, optimizer = Holder(parameters), ours(groups_of(parameters))
    run(optimizer, parameters, range(2))
    at = {n: t.data_ptr() for n, t in saving.optimizer_tensors(model, optimizer).items()}
    saved = {n: t.clone() for n, t in saving.optimizer_tensors(model, optimizer).items()}
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    run(optimizer, parameters, range(2, 4))
    want = values(optimizer, parameters)
    addresses = {n: t.data_ptr() for n, t in saving.optimizer_tensors(model, optimizer).items()}
    assert addresses == at

    def restore(target: Any, state: AdamW) -> None:
        checkpoint = saving.Checkpoint(
            2,
            {"model": weights, "optimizer": saved, "rng": {"cpu": torch.get_rng_state()}},
            {"progress": asdict(saving.Progress(step=2)), "recipe": {"max_steps": 4}, "plan": {}},
        )
        saving.restore(checkpoint, target, state, None)

    restore(model, optimizer)
    run(optimizer, parameters, range(2, 4))
    assert_same(values(optimizer, parameters), want)
    addresses = {n: t.data_ptr() for n, t in saving.optimizer_tensors(model, optimizer).items()}
    assert addresses == at

    fresh = make_parameters(device, SHAPES[:3])
    optimizer = ours(groups_of(fresh))
    restore(Holder(fresh), optimizer)
    run(optimizer, fresh, range(2, 4))
    assert_same(values(optimizer, fresh), want)


def test_a_parameter_without_a_gradient_waits(device):
    parameters = make_parameters(device, SHAPES[:3])
    optimizer = TritonAdamW(parameters)
    assert optimizer.clip(1.0) == 0.0
    optimizer.step()  # nobody has one
    assert not any(optimizer.state[p] for p in parameters)
    for step in range(3):
        for p, g in zip(parameters, gradients(step, parameters), strict=True):
            p.grad = None if p is parameters[0] and step == 1 else g
        before = parameters[0].detach().clone()
        optimizer.clip(1.0)
        optimizer.step()
        assert torch.equal(parameters[0], before) == (step == 1)
    assert [optimizer.state[p]["step"].item() for p in parameters] == [2, 3, 3]


def test_lr_tensor_is_read_on_the_device(device):
    """Same addresses, another rate: a CUDA graph would see it. Equal to the number."""
    want = run_fresh(ours, device, range(3))
    parameters = make_parameters(device)
    optimizer = ours(groups_of(parameters))
    lr = torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for step in range(3):
        lr.fill_(lr_of(step))
        for p, g in zip(parameters, gradients(step, parameters), strict=True):
            p.grad = g
        optimizer.clip(1.0)
        optimizer.step()
    assert_close(values(optimizer, parameters), want, rtol=1e-6)


def test_tables_are_sent_once_per_content(device):
    parameters = make_parameters(device, SHAPES[:3])
    optimizer = TritonAdamW(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    sent = []
    for _ in range(2):
        optimizer.clip(1.0)
        optimizer.step()
        sent.append((optimizer._tables._addresses.sent, optimizer._tables._chunks.sent))
    assert sent[0][0] is sent[1][0]
    first = parameters[0].grad
    parameters[0].grad = torch.ones_like(parameters[0])  # `first` is alive: another address
    optimizer.step()
    assert optimizer._tables._addresses.sent is not sent[1][0]
    assert optimizer._tables._chunks.sent is sent[1][1]
    assert first is not None


def test_what_a_graph_reads_is_never_written_again(monkeypatch):
    """A replayed copy reads the buffer it was captured with: each capture has its own, for good."""
    upload = adamw_tables.Upload(torch.device("cpu"))

    def put(number: int, capturing: bool) -> Tensor:
        monkeypatch.setattr(adamw_tables, "_is_capturing", lambda device: capturing)
        return upload.put(number, lambda: torch.full((3,), number))

    eager = put(1, False)
    assert put(1, True) is eager  # on the device already; kept for the graph
    assert any(kept is eager for kept in upload.kept)
    captured = put(2, True)
    assert put(2, True) is captured  # clip and step of one capture share a table
    upload.end()
    assert put(1, False) is eager  # the graph has not touched what eager steps use
    assert put(2, False) is not captured  # which nothing has filled before the first replay
    upload.end()
    again = put(3, True)
    upload.end()
    assert put(3, True) is not again
    put(4, False)
    failed = put(5, True)  # no `end`: the step broke off
    assert put(4, False) is upload.sent
    assert put(5, True) is not failed
    held = [int(kept[0]) for kept in upload.kept]
    assert sorted(set(held)) == [1, 2, 3, 5]
    assert torch.equal(captured, torch.full((3,), 2))
    assert torch.equal(again, torch.full((3,), 3))


def run_graph(graphed: bool) -> dict[str, Tensor]:
    """Six steps on a GPU; the first and the fourth never replayed, the fifth a bad one."""
    parameters = make_parameters("cuda")
    copies = {parameters[2]: parameters[2].detach().bfloat16().requires_grad_()}
    leaves = [copies.get(p, p) for p in parameters]
    optimizer = ours(groups_of(parameters))
    optimizer.attach_working(copies)
    lr, verdict = torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
    optimizer.found_inf = verdict
    for group in optimizer.param_groups:
        group["lr"] = lr
    static = [torch.zeros_like(leaf) for leaf in leaves]
    graph = torch.cuda.CUDAGraph()

    def update(grads: list[Tensor]) -> Tensor:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        norm = optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    norms, norm = [], lr
    for step in range(6):
        lr.fill_(lr_of(step))
        verdict.fill_(float(step == 4))
        pairs = zip(gradients(step, parameters), leaves, strict=True)
        grads = [g.to(leaf.dtype) for g, leaf in pairs]
        if step in (0, 3) or not graphed:
            norms.append(update(grads))
            continue
        torch._foreach_copy_(static, grads)
        if step == 1:
            with torch.cuda.graph(graph):
                norm = update(static)
        graph.replay()
        norms.append(norm.clone())
    return values(optimizer, parameters) | {"norms": torch.stack(norms)}


@pytest.mark.gpu
def test_a_captured_step_is_the_eager_step():
    assert_same(run_graph(True), run_graph(False))


def test_nothing_is_read_on_the_host(device):
    parameters = make_parameters(device, SHAPES[:3])
    optimizer = TritonAdamW(parameters)
    lr, optimizer.found_inf = torch.full((), 1e-3, device=device), torch.zeros((), device=device)
    optimizer.param_groups[0]["lr"] = lr
    for p in parameters:
        p.grad = torch.ones_like(p)
    with NoHostRead():
        for _ in range(2):
            optimizer.clip(1.0)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1e-3


def test_views_that_are_not_aligned_are_as_good(device):
    """A view at an odd element cannot take wide loads: same numbers by the narrow way."""
    flat = torch.randn(3 * CHUNK + 8, device=device)
    results = []
    for offset in (0, 1):
        p = nn.Parameter(flat.clone()[offset : offset + CHUNK])
        p.data.copy_(flat[:CHUNK])
        p.grad = torch.zeros(CHUNK + 8, device=device)[offset : offset + CHUNK]
        p.grad.copy_(flat[CHUNK : 2 * CHUNK])
        assert (p.data_ptr() % 16 == 0) == (offset == 0)
        optimizer = TritonAdamW([p])
        optimizer.clip(1.0)
        optimizer.step()
        results.append(values(optimizer, [p]))
    assert_same(results[1], results[0])


def test_autograd_notices_the_writes(device):
    p = nn.Parameter(torch.ones(4, device=device))
    optimizer = TritonAdamW([p])
    stale = (p * p).sum()
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def slot(**other: Any) -> Slot:
    p, g, m, v = (torch.ones(4, 4) for _ in range(4))
    return Slot("w", p, g, m, v, torch.zeros(()), None, 1e-3, BETAS, EPS, 0.0)._replace(**other)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"grad": torch.ones(4, 4).to_sparse()},
            "gradient of w must be contig.*, got torch.sparse",
        ),
        ({"grad": torch.ones(4, 4).half()}, "gradient of w must be .*float16"),
        ({"grad": torch.ones(4, 4, dtype=torch.complex64)}, "gradient of w .*complex64"),
        ({"grad": torch.ones(4, 3)}, r"gradient of w must be \(4, 4\), .*got \(4, 3\)"),
        ({"grad": torch.ones(4, 8)[:, ::2]}, "gradient of w must be contiguous, got strides"),
        ({"param": torch.ones(4, 4).half()}, "param of w must be .*float32.*got .*torch.float16"),
        ({"exp_avg": torch.ones(4, 4).double()}, "exp_avg of w must be .*got .*torch.float64"),
        ({"exp_avg_sq": torch.ones(4)}, r"exp_avg_sq of w must be .*\(4, 4\).*got .*\(4,\)"),
        ({"working": torch.ones(4, 4)}, "working copy of w must be .*bfloat16.*got .*float32"),
        ({"step": torch.zeros((), dtype=torch.int64)}, "step of w must be .*got .*torch.int64"),
        ({"lr": torch.zeros((), dtype=torch.float64)}, "lr of w must be .*got .*torch.float64"),
    ],
)
@pytest.mark.skipif(not INTERPRETED, reason="the tensors of the cases are on the CPU")
def test_bad_tensors_are_refused(other, message):
    tables = Tables(torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as caught:
            tables.adamw([slot(**other)])
        assert "\n" not in str(caught.value)


def test_a_bad_norm_and_verdict_are_refused(device):
    p = nn.Parameter(torch.ones(4, 4, device=device))
    optimizer = TritonAdamW([p])
    with pytest.raises(ValueError, match="max_norm must be 0 or more, got -1"):
        optimizer.clip(-1.0)
    p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.ones((), device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"found_inf must be \(\), float32"):
        optimizer.step()
