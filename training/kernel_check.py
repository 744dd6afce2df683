"""Whether one kernel computes on this device what plain PyTorch does, or AdamW.

An op gets the arguments that the model itself passes, in shape and dtype, filled with noise. Its
values and every gradient are held to the rule of training/numerics.py, on memory that reads as NaN
until it is written to; then they are computed again and again, and no bit may change.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from kernels import EAGER, Ops, parse_ops
from model import GPT
from training.numerics import (
    REDUCED,
    Values,
    compare,
    default_douts,
    precision,
    tf32_products,
    values_and_grads,
)  # fmt: skip
from training.optim import configure_adamw
from training.plan import Plan
from training.recipes import Recipe
from training.step import autocast, start_process, working_copies

NUM_RERUNS = {"cuda": 20, "cpu": 0}  # the interpreter is slow, and runs programs one by one
NUM_LAYERS = 2  # of the model whose tensors are taken; more have the same shapes
EXACT_BYTES = 1 << 30  # of float64 at once: a batch that needs more is taken some rows at a time


def check(name: str, recipe: Recipe, plan: Plan) -> str:
    """Why a kernel is wrong here, by the first of its results that is; empty if none is."""
    start_process(plan, recipe.seed)
    make = _updates if name == "adamw" else partial(_runs_of, name)
    ours_by, eager_by, exact_by = make(recipe, plan)
    with poisoned():
        ours = ours_by()
    eager = eager_by()
    for key, value in eager.items():
        if key not in ours or (ours[key].shape, ours[key].dtype) != (value.shape, value.dtype):
            return f"{key}: there is none that is {tuple(value.shape)}, {value.dtype}"
    rows, config = plan.micro_batch_size * recipe.block_size, recipe.model_config
    terms = {"gelu_mlp": 4 * config.n_embd, "causal_attention": recipe.block_size,
             "linear_cross_entropy": config.vocab_size,
             "adamw": 64}  # fmt: skip # the norm's sums in a row: all follows from it
    how: dict[str, Any] = {
        "reduced": (*REDUCED, "norm"),
        "rows": rows,
        "terms": terms.get(name, config.n_embd),
    }
    if _in_tf32(plan):
        with precision("tf32"):
            how["products"] = tf32_products(name)
    exact = exact_by()
    for spread in (False, True):
        for found in compare(ours, eager, exact, spread=spread, **how):
            if not found.holds:
                return str(found)
    first = None  # poison makes torch choose other algorithms: those runs are not compared
    for _ in range(NUM_RERUNS[plan.device] + 1 if NUM_RERUNS[plan.device] else 0):
        again = ours_by()
        first = first or again
        if changed := [key for key in first if not torch.equal(first[key], again[key])]:
            return f"{changed[0]}: other bits when it is run again"
    return ""


def _in_tf32(plan: Plan) -> bool:
    return plan.dtype == "fp32" and plan.device == "cuda"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what `empty` and its relatives return reads as NaN until it is written to."""
    strict, warn = (torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled())  # fmt: skip
    fill = torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # pyright: ignore


def _model(recipe: Recipe, plan: Plan, ops: Ops = EAGER) -> GPT:
    """The run's model, shallower; the same at every call."""
    torch.manual_seed(recipe.seed)
    config = recipe.model_config
    residual = torch.bfloat16 if plan.residual == "bf16" else None
    with torch.device(plan.device):
        return GPT(replace(config, n_layer=min(config.n_layer, NUM_LAYERS)), ops, residual)


def model_inputs(recipe: Recipe, plan: Plan) -> dict[str, dict[str, Any]]:
    """By op the arguments of its first call in a forward of the run's model.

    Activations are noise afterwards and vectors get some, or a fresh model's zeros would hide what
    a kernel does with them.
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
        # Of its own a model calls this one under dropout alone, and has none here.
        norm = {"x" if key == "residual" else key: value
                for key, value in found["add_layer_norm"].items() if key != "x"}  # fmt: skip
        found.setdefault("layer_norm", norm)
        for arguments in found.values():
            for key, value in arguments.items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() != 2:
                    noise = torch.randn_like(value)
                    arguments[key] = noise if value.dim() > 2 else value + 0.1 * noise
    return found


def _runs_of(name: str, recipe: Recipe, plan: Plan) -> tuple[Callable[[], Values], ...]:
    """An op by our kernels, by plain PyTorch, and in float64, all on the same numbers."""
    inputs = model_inputs(recipe, plan)[name]
    tensors = {key: v for key, v in inputs.items() if isinstance(v, Tensor)}
    rest = {key: v for key, v in inputs.items() if key not in tensors}
    with torch.no_grad(), autocast(plan):
        outputs = getattr(EAGER, name)(**inputs)
    douts = default_douts(outputs if isinstance(outputs, tuple) else (outputs,))

    def by(ops: Ops) -> Values:
        with autocast(plan), precision("tf32" if _in_tf32(plan) else plan.dtype):
            return values_and_grads(partial(getattr(ops, name), **rest), tensors, douts)

    # The eager loss is fp32 whatever it is given.
    plain = _cross_entropy if name == "linear_cross_entropy" else getattr(EAGER, name)
    config, T = recipe.model_config, recipe.block_size
    widest = {"causal_attention": 6 * config.n_head * T, "linear_cross_entropy":
              5 * config.padded_vocab_size}.get(name, 40 * config.n_embd)  # fmt: skip
    at_once = max(1, EXACT_BYTES // (8 * T * widest))
    exact = partial(exact_values, partial(plain, **rest), tensors, douts, at_once)
    return partial(by, parse_ops("triton")), partial(by, EAGER), exact


def _cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    logits = F.linear(x, weight)[..., :vocab_size]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def exact_values(
    fn: Callable[..., Any], tensors: Mapping[str, Tensor], douts: tuple[Tensor, ...], at_once: int
) -> Values:
    """What `values_and_grads` gives in float64, from so many rows of the batch at a time.

    A loss is the mean over the batch; weights, which have no batch, get the sum of what each part
    gives, and one that is an output too is the same in all; all else is put together again.
    """
    batch = {key for key, t in tensors.items() if t.dim() > 2 or not t.is_floating_point()}
    size = len(tensors[min(batch)])
    parts: dict[str, list[Tensor]] = {}
    for at in range(0, size, at_once):
        rows = slice(at, min(at + at_once, size))
        share = (rows.stop - at) / size
        cut = {key: t[rows] if key in batch else t for key, t in tensors.items()}
        cut = {key: t.double() if t.is_floating_point() else t for key, t in cut.items()}
        wanted = tuple(d.double() * share if d.dim() < 3 else d[rows].double() for d in douts)
        for key, value in values_and_grads(fn, cut, wanted).items():
            held = parts.setdefault(key, [])
            if key == "loss":
                value = value * share
            if held and (key == "loss" or key[1:] in tensors.keys() - batch):
                held[0] += value
            elif not held or value.dim() > 2:
                held.append(value)
    return {key: torch.cat(found) if len(found) > 1 else found[0] for key, found in parts.items()}


def _updates(recipe: Recipe, plan: Plan) -> tuple[Callable[[], Values], ...]:
    """Two clipped steps of AdamW by our kernels, by torch's fused ones, and in float64."""
    return tuple(partial(_update, recipe, plan, kind) for kind in ("triton", "torch", "exact"))


def _update(recipe: Recipe, plan: Plan, kind: str) -> Values:
    model = _model(recipe, plan)
    optimizer: Any = configure_adamw(model, recipe, "torch" if kind == "exact" else kind)
    copies = working_copies(model) if plan.working_copies else {}
    leaf = {p: copies.get(name, p) for name, p in model.named_parameters()}
    groups = [(group, group["params"]) for group in optimizer.param_groups]
    order = [p for _, parameters in groups for p in parameters]
    leaves = [leaf[p] for p in order]
    if kind == "exact":
        settings = ("lr", "betas", "eps", "weight_decay")
        doubles = iter([nn.Parameter(p.detach().double()) for p in order])
        optimizer = torch.optim.AdamW([
            {"params": [next(doubles) for _ in parameters], **{s: group[s] for s in settings}}
            for group, parameters in groups
        ])  # fmt: skip
        order = [p for group in optimizer.param_groups for p in group["params"]]
    elif copies:
        optimizer.attach_working({p: copy for p, copy in leaf.items() if copy is not p})
    for group in optimizer.param_groups:
        group["lr"] = recipe.max_lr
    norm = torch.zeros(())
    for _ in range(2):
        for p, source in zip(order, leaves, strict=True):
            grad = (1e-3 * torch.randn(p.shape, device=p.device)).to(source.dtype)
            if kind == "exact":
                p.grad = grad.double()
            else:
                source.grad = grad
        if kind == "exact":
            limit = recipe.grad_clip or float("inf")
            norm = nn.utils.clip_grad_norm_(order, limit)
        else:
            norm = optimizer.clip(recipe.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    found = {"norm": norm, "weights": _flat(order)}
    for moment in ("exp_avg", "exp_avg_sq"):
        found[moment] = _flat(optimizer.state[p][moment] for p in order)
    if copies:  # to the last bit what the weights are
        copied = [(p, s) for p, s in zip(order, leaves, strict=True) if s.dtype == torch.bfloat16]
        found["copies"] = _flat(p if kind == "exact" else s for p, s in copied)
    return found


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])
