"""Whether one op of ours, or our AdamW, computes on this device what plain PyTorch does.

An op gets arguments of the shapes and dtypes that the model passes, filled with noise. Its values
and every gradient must hold the rule of training/numerics.py, on memory that reads as NaN until it
is written to. Then it runs again several times, and no bit may change.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from kernels import EAGER, Ops, parse_ops
from model import GPT
from training import numerics
from training.numerics import Values, default_douts, precision, values_and_grads
from training.optim import configure_adamw
from training.plan import Plan
from training.recipes import Recipe
from training.step import autocast, start_process, working_copies

NUM_RERUNS = {"cuda": 20, "cpu": 0}  # the interpreter is slow, and runs programs one by one
NUM_LAYERS = 2  # of the model whose tensors are taken; further layers have the same shapes
EXACT_BYTES = 1 << 30  # of float64 at once: a batch that needs more is cut into parts
Runs = tuple[Callable[[], Values], ...]  # by our kernels, by plain PyTorch, in float64


def check(name: str, recipe: Recipe, plan: Plan) -> str:
    """What is wrong with an op, or "adamw", here: its first bad result; "" if there is none."""
    start_process(plan, recipe.seed)
    make = _updates if name == "adamw" else partial(_runs_of, name)
    run_ours, run_eager, run_exact = make(recipe, plan)
    with poisoned():
        ours = run_ours()
    eager = run_eager()
    for key, value in eager.items():
        if key not in ours or (ours[key].shape, ours[key].dtype) != (value.shape, value.dtype):
            return f"{key}: there is none that is {tuple(value.shape)}, {value.dtype}"
    C = recipe.model_config.n_embd
    terms = {
        "gelu_mlp": 4 * C,
        "causal_attention": recipe.block_size,
        "linear_cross_entropy": recipe.model_config.vocab_size,
        "adamw": 64,  # of the norm's partial sums; all other results follow from the norm
    }
    found = numerics.compare(
        ours,
        eager,
        run_exact(),
        reduced=(*numerics.REDUCED, "norm"),
        rows=plan.micro_batch_size * recipe.block_size,
        terms=terms.get(name, C),
        products=numerics.TF32_PRODUCTS.get(name, 0) if _in_tf32(plan) else 0,
        spread=True,
    )
    if wrong := [str(each) for each in found if not each.holds]:
        return wrong[0]
    if reruns := NUM_RERUNS[plan.device]:
        first = run_ours()  # not the poisoned run: poison makes torch choose other algorithms
        for _ in range(reruns):
            again = run_ours()
            if changed := [key for key in first if not torch.equal(first[key], again[key])]:
                return f"{changed[0]}: other bits when it is run again"
    return ""


def _in_tf32(plan: Plan) -> bool:
    return plan.dtype == "fp32" and plan.device == "cuda"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what torch.empty and its relatives return reads as NaN until it is written to."""
    before = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore


def _model(recipe: Recipe, plan: Plan, ops: Ops = EAGER) -> GPT:
    """The run's model with fewer layers; the same weights at every call."""
    torch.manual_seed(recipe.seed)
    config = recipe.model_config
    residual = torch.bfloat16 if plan.residual == "bf16" else None
    with torch.device(plan.device):
        return GPT(replace(config, n_layer=min(config.n_layer, NUM_LAYERS)), ops, residual)


def model_inputs(recipe: Recipe, plan: Plan) -> dict[str, dict[str, Any]]:
    """The arguments of each op's first call in a forward of the run's model, by op.

    Activations are replaced by noise and vectors get some added: a fresh model's zeros would hide
    what a kernel does with them.
    """
    found: dict[str, dict[str, Any]] = {}

    def recorder(name: str) -> Callable[..., Any]:
        eager = getattr(EAGER, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found.setdefault(name, inspect.signature(eager).bind(*args, **kwargs).arguments)
            return eager(*args, **kwargs)

        return call

    model = _model(recipe, plan, Ops(**{f.name: recorder(f.name) for f in fields(Ops)}))
    model.eval()
    size = plan.micro_batch_size, recipe.block_size
    idx = torch.randint(recipe.model_config.vocab_size, size, device=plan.device)
    copies = working_copies(model) if plan.working_copies else {}
    with torch.no_grad(), autocast(plan):
        functional_call(model, copies, (idx, idx.roll(-1, 1)))
        # The model calls layer_norm only where it has dropout; this one has none.
        norm = {**found["add_layer_norm"]}
        norm["x"] = norm.pop("residual")
        found.setdefault("layer_norm", norm)
        for arguments in found.values():
            for key, value in arguments.items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() != 2:
                    noise = torch.randn_like(value)
                    arguments[key] = noise if value.dim() > 2 else value + 0.1 * noise
    return found


def _runs_of(name: str, recipe: Recipe, plan: Plan) -> Runs:
    """The runs of an op, all on the same numbers."""
    inputs = model_inputs(recipe, plan)[name]
    with torch.no_grad(), autocast(plan):
        douts = default_douts(getattr(EAGER, name)(**inputs))

    def run(ops: Ops) -> Values:
        with autocast(plan), precision("tf32" if _in_tf32(plan) else plan.dtype):
            return values_and_grads(getattr(ops, name), inputs, douts)

    # The eager loss computes in fp32 whatever it is given.
    plain = _cross_entropy if name == "linear_cross_entropy" else getattr(EAGER, name)
    config, T = recipe.model_config, recipe.block_size
    width = {
        "causal_attention": config.n_head * T * 6,
        "linear_cross_entropy": config.padded_vocab_size * 5,
    }
    at_once = max(1, EXACT_BYTES // (8 * T * width.get(name, 40 * config.n_embd)))
    exact = partial(exact_values, plain, inputs, douts, at_once)
    return partial(run, parse_ops("triton")), partial(run, EAGER), exact


def _cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(x, weight)[..., :vocab_size]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def exact_values(
    fn: Callable[..., Any], inputs: Mapping[str, Any], douts: tuple[Tensor, ...], at_once: int
) -> Values:
    """`values_and_grads` in float64, computed from `at_once` rows of the batch at a time.

    A loss is the mean over the batch. Weights have no batch: their gradients are summed over the
    parts, and one that is an output too is the same in all. All else is concatenated.
    """
    tensors = {key: v for key, v in inputs.items() if isinstance(v, Tensor)}
    batch = {key for key, t in tensors.items() if t.dim() > 2 or not t.is_floating_point()}
    size = len(inputs[min(batch)])
    parts: dict[str, list[Tensor]] = {}
    for at in range(0, size, at_once):
        rows = slice(at, min(at + at_once, size))
        share = (rows.stop - at) / size
        cut = {key: t[rows] if key in batch else t for key, t in tensors.items()}
        cut = {key: t.double() if t.is_floating_point() else t for key, t in cut.items()}
        wanted = tuple(d.double() * share if d.dim() < 3 else d[rows].double() for d in douts)
        for key, value in values_and_grads(fn, {**inputs, **cut}, wanted).items():
            held = parts.setdefault(key, [])
            if key == "loss":
                value = value * share
            if held and (key == "loss" or key[1:] in tensors.keys() - batch):
                held[0] += value
            elif not held or value.dim() > 2:
                held.append(value)
    return {key: torch.cat(found) if len(found) > 1 else found[0] for key, found in parts.items()}


def _updates(recipe: Recipe, plan: Plan) -> Runs:
    """The runs of AdamW."""
    return tuple(partial(_update, recipe, plan, kind) for kind in ("triton", "torch", "exact"))


def _update(recipe: Recipe, plan: Plan, kind: str) -> Values:
    """Two clipped steps of AdamW on seeded gradients."""
    model, exact = _model(recipe, plan), kind == "exact"
    optimizer: Any = configure_adamw(model, recipe, "torch" if exact else kind)
    copies = working_copies(model) if plan.working_copies else {}
    leaves = {p: copies[name] for name, p in model.named_parameters() if name in copies}
    if exact:
        model.double()
    elif leaves:
        optimizer.attach_working(leaves)
    for group in optimizer.param_groups:
        group["lr"] = recipe.max_lr
    order = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.zeros(())
    for _ in range(2):
        for p in order:
            grad = 1e-3 * torch.randn(p.shape, device=p.device)
            if p in leaves:  # the float64 run sees the rounded gradient too
                grad = grad.to(leaves[p].dtype)
            leaf = leaves[p] if p in leaves and not exact else p
            leaf.grad = grad.to(leaf.dtype)
        norm = optimizer.clip(recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    found = {"norm": norm, "weights": _flat(order)}
    for moment in ("exp_avg", "exp_avg_sq"):
        found[moment] = _flat(optimizer.state[p][moment] for p in order)
    if leaves:
        found["copies"] = _flat(p if exact else leaves[p] for p in order if p in leaves)
    return found


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
