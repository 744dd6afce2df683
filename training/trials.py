"""What child processes do on this device: check an op or time it, at the risk of a crash.

A task is a call of a function below with recipe and plan last. training/verify.py,
training/choose.py and training/search.py send them.

An op gets arguments of the shapes and dtypes that the model passes, filled with noise. In a check
its values and every gradient must meet the rule of training/numerics.py, on memory that reads as
NaN until it is written. Then the op is rerun several times, and no bit may change.
"""

import contextlib
import gc
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from kernels import EAGER, Ops, parse_ops
from kernels._launch import Launch, replaced
from model import GPT
from model.edge import one_line
from training import numerics, timing
from training.numerics import Values, default_douts, precision, values_and_grads
from training.optim import configure_adamw
from training.plan import Plan
from training.probe import probe_steps
from training.recipes import Recipe
from training.step import autocast, start_process, working_copies

SERVE = "from training import child, trials; child.serve(trials.answer)"
COMMAND = (sys.executable, "-c", SERVE)
ROUNDS = {"rounds": 15, "seconds": 1.5}  # for an op's backends, in turns
STEPS_S = 3.0  # for steps taken launch by launch, after those that are replayed
NUM_RERUNS = {"cuda": 20, "cpu": 0}  # the interpreter is slow, and runs programs one by one
NUM_LAYERS = 2  # layers of the model that gives the tensors; more would have the same shapes
EXACT_BYTES = 1 << 30  # float64 at once; a batch that needs more is split
Runs = tuple[Callable[[], Values], ...]  # by our kernels, by plain PyTorch, in float64


def check(name: str, recipe: Recipe, plan: Plan) -> str:
    """The first bad result of an op, or of "adamw", on this device; "" if there is none."""
    make = _updates if name == "adamw" else partial(_runs_of, name)
    run_ours, run_eager, run_exact = make(recipe, plan)
    with poisoned():
        ours = run_ours()
    eager = run_eager()
    for key, value in eager.items():
        if key not in ours or (ours[key].shape, ours[key].dtype) != (value.shape, value.dtype):
            return f"{key}: must be {tuple(value.shape)}, {value.dtype}"
    C = recipe.model_config.n_embd
    terms = {
        "gelu_mlp": 4 * C,
        "causal_attention": recipe.block_size,
        "linear_cross_entropy": recipe.model_config.vocab_size,
        "adamw": 64,  # the norm's partial sums; all other results follow from the norm
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
    """In this context, memory from torch.empty and the like reads as NaN until it is written."""
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
    """The runs of an op, all on the same inputs."""
    inputs, config, T = model_inputs(recipe, plan)[name], recipe.model_config, recipe.block_size
    if name == "linear_cross_entropy":  # so that float64 can cut between tokens
        T, (x, targets) = 1, (inputs["x"], inputs["targets"])
        inputs |= {"x": x.view(-1, 1, config.n_embd), "targets": targets.view(-1, 1)}
    with torch.no_grad(), autocast(plan):
        douts = default_douts(getattr(EAGER, name)(**inputs))

    def run(ops: Ops) -> Values:
        with autocast(plan), precision("tf32" if _in_tf32(plan) else plan.dtype):
            return values_and_grads(getattr(ops, name), inputs, douts)

    # The eager loss computes in fp32 whatever it is given.
    special = {
        "causal_attention": (_attention, T * 6),
        "linear_cross_entropy": (_cross_entropy, config.padded_vocab_size * 5),
    }
    plain, width = special.get(name, (getattr(EAGER, name), 40 * config.n_embd))
    at_once = max(1, EXACT_BYTES // (8 * T * width))
    exact = partial(exact_values, plain, inputs, douts, at_once)
    return partial(run, parse_ops("triton")), partial(run, EAGER), exact


def _attention(qkv: Tensor, n_head: int, dropout_p: float = 0.0) -> Tensor:
    """Head by head, in the backward too: of all heads (T, T) may not fit in float64."""
    heads = qkv.unflatten(2, (3, n_head, -1)).unbind(3)  # each (B, T, 3, D)
    how: Any = {"use_reentrant": False, "preserve_rng_state": False}
    one = partial(checkpoint, EAGER.causal_attention, **how)
    return torch.cat([one(head.flatten(2), 1, dropout_p) for head in heads], -1)


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


def check_op(name: str, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Check an op of ours, or AdamW, and say why it is wrong here, if it is."""
    return {"why": check(name, recipe, plan)}


def time_op(
    name: str, backends: Sequence[str], recipe: Recipe, plan: Plan, build: bool = False
) -> dict[str, Any]:
    """Samples of an op's forward and backward by backend, in ms, and why others have none.

    Args:
        name, backends: The op, and the backends that compute it.
        recipe, plan: Of the run, whose model passes arguments of these shapes.
        build: Only compile each backend, which children may do at the same time.
    """
    failed: dict[str, str] = {}
    contestants: dict[str, list[timing.Call]] = {}
    with _on_stream(plan):
        inputs, nbytes, num_sets = _inputs(name, recipe, plan)
        for backend in backends:
            try:
                fn = getattr(parse_ops(f"eager,{name}={backend}"), name)
                contestants[backend] = _calls(fn, inputs, plan, 1 if build else num_sets)
            except Exception as error:  # a backend that refuses the shape, a compiler error, ...
                timing.note_failure(failed, backend, error)
    if build:
        return {"failed": failed}
    device = torch.device(plan.device)
    found = timing.time_calls(contestants, device, nbytes, failed=failed, **ROUNDS)
    return {"ms": {key: _kept(of) for key, of in found.items()}, "failed": failed}


def _on_stream(plan: Plan) -> contextlib.AbstractContextManager[Any]:
    cuda = plan.device == "cuda"
    return torch.cuda.stream(timing.capture_stream()) if cuda else contextlib.nullcontext()


def _inputs(name: str, recipe: Recipe, plan: Plan) -> tuple[dict[str, Any], int, int]:
    """An op's arguments in the run's model, their bytes, and how many sets of them to rotate."""
    inputs = model_inputs(recipe, plan)[name]
    nbytes = sum(v.nbytes for v in inputs.values() if isinstance(v, Tensor))
    return inputs, nbytes, timing.num_sets(nbytes, torch.device(plan.device))


def _calls(
    fn: Callable[..., Any], inputs: dict[str, Any], plan: Plan, count: int
) -> list[timing.Call]:
    """`count` calls of forward and backward, each on its own copies of the inputs."""

    def forward(**arguments: Any) -> Any:
        with autocast(plan):
            return fn(**arguments)

    calls = [numerics.gradient_call(forward, inputs) for _ in range(count)]
    for call in calls:
        call()  # the first one draws output gradients, which no capture could record
    return calls


@lru_cache(maxsize=2)  # the op's calls at the run's shapes, and at small ones
def calls_by_kernels(
    name: str, recipe: Recipe, plan: Plan, rotate: bool
) -> tuple[list[timing.Call], list[Tensor], int]:
    """An op's calls by our kernels, the results of the first, and bytes of a call's inputs."""
    inputs, nbytes, num_sets = _inputs(name, recipe, plan)
    calls = _calls(getattr(parse_ops("triton"), name), inputs, plan, num_sets if rotate else 1)
    return calls, _results(calls[0]), nbytes


def _results(call: timing.Call) -> list[Tensor]:
    return [t.clone() for t in call().values()]


def list_launches(name: str, recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """(key, launch) of each kernel of an op at the run's shapes."""
    with _on_stream(plan), replaced() as asked:
        calls_by_kernels(name, recipe, plan, False)[0][0]()
    return {"launches": [*{key.kernel: (key, launch) for key, launch in asked}.values()]}


def try_launches(
    name: str,
    kernel: str,
    launches: Sequence[Launch],
    how: dict[str, Any],
    recipe: Recipe,
    plan: Plan,
) -> dict[str, Any]:
    """Samples of an op's forward and backward by launch of one of its kernels, in ms.

    Args:
        name, kernel, launches: The op, one of its kernels, and the launches to try.
        how: Arguments of timing.interleave; if empty, each launch only runs once.
        recipe, plan: Of the run.

    Raises:
        ValueError: the results are not those of the present row.
    """

    def launched(launch: Launch, call: Callable[[], Any]) -> Any:
        with replaced(kernel, launch):
            return call()

    with _on_stream(plan):
        calls, want, nbytes = calls_by_kernels(name, recipe, plan, bool(how))
        for launch in launches:
            if not same(launched(launch, partial(_results, calls[0])), want):
                raise ValueError("results differ from the present row's")
    if not how:
        return {}
    contestants = {
        str(i): [partial(launched, launch, call) for call in calls]
        for i, launch in enumerate(launches)
    }
    found = timing.time_calls(contestants, torch.device(plan.device), nbytes, **how)
    return {"ms": [_kept(found[i]) for i in contestants]}


def _kept(timed: timing.Timing) -> list[float]:
    """Samples to four digits, as a file keeps them."""
    return [float(f"{ms:.4g}") for ms in timed.samples_ms]


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal up to rounding of the dtype; the order of summation differs between tiles."""
    return all(
        ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        <= 8 * torch.finfo(b.dtype).eps  # false for NaN too
        for a, b in zip(ours, theirs, strict=True)
    )


def time_step(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Samples of the run's whole step by a plan, in ms."""
    torch.compiler.reset()  # or all plans would share one limit of recompilations
    gc.collect()  # the plan before is held by cycles, and both may not fit
    vocab, rows = recipe.model_config.vocab_size, 2 * recipe.rows_per_step
    tokens = np.random.default_rng(0).integers(vocab, size=rows * (recipe.block_size + 1))
    found = probe_steps(recipe, plan, tokens.astype(np.uint16), STEPS_S)
    return {"ms": _kept(timing.Timing([1e3 * s for s in found.seconds]))}


def answer(task: partial[dict[str, Any]]) -> dict[str, Any]:
    """The result of a task, or {"error": why there is none}."""
    recipe, plan = task.args[-2:]
    try:
        start_process(plan, recipe.seed)
        return task()
    except torch.OutOfMemoryError as error:
        return {"error": one_line(error, 200)}
    except Exception as error:
        if task.func is check_op or timing.is_fatal(error):
            # The device's context may be lost: the next task needs a process of its own.
            raise SystemExit(f"{type(error).__name__}: {one_line(error, 200)}") from error
        return {"error": timing.reason_of(error)}
    finally:
        if plan.device == "cuda":
            torch.cuda.empty_cache()
