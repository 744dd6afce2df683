"""AdamW as GPT-2 trainers use it: decay on matrices, none on biases and LayerNorms.

Two implementations with one state: torch's fused kernels, and ours, which need no pass that scales
the gradients and none that writes bf16 working copies, with which the trainer multiplies. Gradients
arrive at these, and the optimizer carries them to the fp32 masters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.recipes import Recipe
from training.sharding import Replicas


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter of a GPT is a matrix of its blocks, and no embedding or bias."""
    return parameter.dim() == 2 and ".h." in name


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) that also clips, and keeps bf16 working copies up to date.

    A step is `clip`, then `step`, then `zero_grad`; `clip` may be left out. As in torch, a
    parameter without a gradient is left alone and its own step count does not advance.

    Args:
        params: Parameters or groups of them, dense and fp32.
        options: Of torch.optim.AdamW. `lr`, there or in a group, may be a () fp32 tensor on the
            device, which the step reads there.

    Attributes:
        found_inf: (), fp32; where it is 1, `step` changes nothing. None is 0.
        loss_scale: (2,), fp32, for training/step.py under fp16: the scale, and steps since it fell
            or grew.
        shard: Which parameters this rank updates.
        copies: A bf16 leaf by parameter, which has its gradient and is written after each step.
        clip_order: Order in which torch's `clip` adds the norms up, which decides the last bit.
            None is that of the groups.
    """

    found_inf: Tensor | None = None
    loss_scale: Tensor | None = None
    clip_order: Sequence[nn.Parameter] | None = None

    def __init__(self, params: Iterable[Any], *options: Any, **named: Any):
        # Fused steps live on the device; torch wants "capturable" to capture them in a CUDA graph.
        super().__init__(params, *options, fused=True, capturable=True, **named)
        self._warned_capturable_if_run_uncaptured = True  # warm-up steps are, on purpose
        self.shard, self.copies = Replicas(), dict[nn.Parameter, Tensor]()
        self.set_up()

    def set_up(self) -> None:
        """Forget what a captured step was made of; the next capture follows a step without."""

    def attach_working(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Give these their parameters' values; `refresh_working` where others change those."""
        self.copies = dict(copies)
        self.refresh_working()

    @torch.no_grad()
    def refresh_working(self) -> None:
        """Write every working copy anew from its parameter, in place; not from a released one."""
        here = [(copy, p) for p, copy in self.copies.items() if p.untyped_storage().size()]
        if here:
            torch._foreach_copy_([copy for copy, _ in here], [p for _, p in here])

    @torch.no_grad()
    def fold_working_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Add the copies' gradients to the parameters' own, in fp32, and drop them.

        What accumulates over micro-batches does so here, not in bf16.

        Args:
            parameters: Those to look at; None is all.
        """
        sums, more = [], []
        for p in self.copies if parameters is None else parameters:
            copy = self.copies.get(p)
            if copy is None or copy.grad is None:
                continue
            if p.grad is None:
                p.grad = copy.grad.float()
            else:
                sums.append(p.grad)
                more.append(copy.grad)
            copy.grad = None
        if sums:
            torch._foreach_add_(sums, more)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients together to a norm of at most `max_norm`; no host read.

        Args:
            max_norm: 0 or infinity only measures.

        Returns:
            (), fp32, on the device: the norm before clipping. Not finite where a gradient is not.
        """
        self.fold_working_gradients()
        grouped = [p for group in self.param_groups for p in group["params"]]
        parameters = self.clip_order or grouped
        norm = self.shard.norm(parameters)
        if 0 < max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None, skip: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, and the working copies.

        Args:
            closure: Of torch's signature; None.
            skip: The new `found_inf`; None leaves the one there is.
        """
        assert closure is None
        if skip is not None:
            self.found_inf = skip
        for p in self.shard.others:
            p.grad = None
            if p in self.copies:
                self.copies[p].grad = None
        self._update()
        self.shard.exchange(self.copies)

    def _update(self) -> None:
        self.fold_working_gradients()
        super().step()
        self.refresh_working()

    @torch.no_grad()
    def make_state(self) -> None:
        """Give the parameters that this rank updates moments and a step count, all or none."""
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        for p in (p for group in self.param_groups for p in group["params"]):
            if not self.state.get(p) and self.shard.owns(p):
                fresh[p] = self._new_state(p)
        self.state.update(fresh)

    def _new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=p.device), **moments}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those of the working copies too."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None


class TritonAdamW(AdamW):
    """The same through `kernels/adamw.py`: four launches a step, however many tensors there are.

    `clip` leaves the gradients as they are and hands its coefficient to the next `step`, on the
    device; bf16 gradients of working copies are read where they are. A step captured in a CUDA
    graph reads lr tensors, step counts and `found_inf` anew at every replay; an lr that is a number
    stays what it was.

    Args:
        params, options: As in AdamW. All on one device: the current CUDA device, or the CPU under
            TRITON_INTERPRET=1.

    Raises:
        ValueError: the kernels do not run on the parameters' device.
    """

    def set_up(self) -> None:
        from kernels.adamw import Tables  # triton is not there on every machine

        self._step_supports_amp_scaling = False  # a GradScaler unscales by itself then
        device = self.param_groups[0]["params"][0].device
        self._tables = Tables(device)
        self._all_tables = Tables(device)  # of a norm that spans more than one rank's parameters
        self._coefficient: Tensor | None = None  # of the clip since the last step

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Measure the gradients; the next `step` scales them to a norm of at most `max_norm`.

        Arguments, result and errors are those of AdamW.clip. Call it once a step: gradients are not
        changed, so a second call replaces the first.
        """
        if self.shard.rows:
            return super().clip(max_norm)  # one launch has not all of a norm
        tables = self._all_tables if self.shard.others else self._tables
        norm, self._coefficient = tables.grad_norm(self._slots(), max_norm)
        return norm

    def _update(self) -> None:
        self._tables.adamw(self._slots(), self._coefficient, self.found_inf)
        self._coefficient = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and the coefficient of the clip that measured them."""
        super().zero_grad(set_to_none)
        self._coefficient = None

    def _slots(self) -> list[Any]:
        """What a kernel needs to know of each parameter with a gradient."""
        from kernels.adamw import Slot

        # A weight and its copy may both have a gradient; a kernel reads one, so it gets the sum.
        self.fold_working_gradients([p for p in self.copies if p.grad is not None])
        slots = []
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type == "cpu" != self._tables.device.type:
                lr = lr.item()  # a host value: reading it waits for nothing
            for j, p in enumerate(group["params"]):
                copy = self.copies.get(p)
                grad = p.grad if copy is None or copy.grad is None else copy.grad
                if grad is None:
                    continue
                rule = lr, group["betas"], group["eps"], group["weight_decay"]
                name = f"parameter {j} of group {i}"
                if not self.shard.owns(p):  # only its norm is wanted: no moments
                    slots.append(Slot(name, p, grad, p, p, p.new_zeros(()), None, *rule))
                    continue
                state = self.state[p] = self.state[p] or self._new_state(p)
                moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
                slots.append(Slot(name, p, grad, *moments, copy, *rule))
        return slots


class MuonAdamW(AdamW):
    """Muon for the matrices of the blocks, AdamW for all else, at one learning rate.

    Muon moves a matrix by its momentum made orthogonal (Jordan 2024; momentum 0.95, Nesterov, five
    Newton-Schulz iterations), scaled to the size of an AdamW update (Liu et al. 2025), so that the
    rate and decay of a recipe serve both. torch.optim.Muon reads its rate on the host, which no
    captured step can, and iterates in bf16, which takes most CPUs twenty times as long as fp32.

    Args:
        params, options: As in AdamW.
        matrices: Those of `params` that are Muon's.
    """

    def __init__(self, params: Iterable[Any], matrices: Iterable[nn.Parameter], **options: Any):
        super().__init__(params, **options)
        self._matrices = {*matrices}

    def _update(self) -> None:
        self.fold_working_gradients()
        for group in self.param_groups:
            lr = torch.as_tensor(group["lr"], device=group["params"][0].device)
            lr = lr if self.found_inf is None else lr * (1 - self.found_inf)
            for p in group["params"]:
                if p in self._matrices and p.grad is not None:
                    p.mul_(1 - lr * group["weight_decay"]).sub_(self._direction(p) * lr)
                    p.grad = None
        super()._update()

    def _new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        if p in self._matrices:
            return {"momentum_buffer": torch.zeros_like(p)}
        return super()._new_state(p)

    def _direction(self, p: nn.Parameter) -> Tensor:
        self.state[p] = self.state[p] or self._new_state(p)
        momentum, grad = self.state[p]["momentum_buffer"], cast(Tensor, p.grad)
        if self.found_inf is not None:
            grad = torch.where(self.found_inf > 0, momentum, grad)  # which leaves it as it was
        momentum.lerp_(grad, 0.05)
        x = grad.lerp(momentum, 0.95)
        x = x.bfloat16() if p.is_cuda else x
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(5):
            gram = x @ x.T
            power = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            x = torch.addmm(x, power, x, beta=3.4445)
        return (x.T if tall else x) * (0.2 * math.sqrt(max(p.shape)))


def configure_adamw(model: nn.Module, recipe: Recipe, fused: str = "torch") -> AdamW:
    """AdamW for a model, one pass over each parameter on CPU and CUDA alike.

    Parameters of two or more dimensions decay, the others do not. The tied embedding is one
    parameter and decays once. Padding rows of the embedding have weight and gradient 0, for which
    the update is exactly 0 / (0 + eps) = 0.

    Args:
        model: Its parameters are fp32.
        recipe: Learning rate, betas, eps, weight decay, and whether it is MuonAdamW.
        fused: Whose kernels: torch's, or ours ("triton"; a GPU, or TRITON_INTERPRET=1), which Muon
            does not take.

    Raises:
        ValueError: an unknown `fused`, or no GPU for "triton".
    """
    matrices = [p for name, p in model.named_parameters() if is_hidden_matrix(name, p)]
    classes = {"torch": AdamW, "triton": TritonAdamW}
    if fused not in classes:
        raise ValueError(f"adamw: fused must be one of {[*classes]}, got {fused!r}")
    make = partial(MuonAdamW, matrices=matrices) if recipe.muon else classes[fused]
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = recipe.beta1, recipe.beta2
    optimizer = make(groups, lr=recipe.learning_rate(0), betas=betas, eps=recipe.eps)
    optimizer.clip_order = parameters  # bitwise what clip_grad_norm_(model.parameters()) gives
    return optimizer
