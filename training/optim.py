"""AdamW as GPT-2 trainers use it: weight decay on matrices, none on biases and LayerNorms.

Two implementations share one state: torch's fused kernels, and ours, which scale the gradients and
write the bf16 working copies in the same pass as the update. The model multiplies with these copies
and their gradients arrive there; the optimizer moves them to the fp32 weights.
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
    """Whether a parameter of a GPT is a matrix of one of its blocks."""
    return parameter.dim() == 2 and ".h." in name


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) that also clips, and keeps bf16 working copies up to date.

    A step is `clip` (optional), `step`, `zero_grad`. As in torch, a parameter without a gradient is
    not touched, nor is its step count.

    Args:
        params: Parameters or groups of them, dense and fp32.
        options: As for torch.optim.AdamW. `lr`, there or in a group, may be a () fp32 tensor on
            the device, which the step reads there.

    Attributes:
        found_inf: (), fp32; if it is 1, `step` changes nothing. None stands for 0.
        loss_scale: (2,), fp32, fp16's scale and the steps since it changed; see training/step.py.
        shard: Which parameters this rank updates.
        copies: By parameter, a bf16 leaf that receives its gradient and is written after a step.
        clip_order: Order in which torch's `clip` adds the norms up, which decides the last bit;
            None is the order of the groups.
    """

    found_inf: Tensor | None = None
    loss_scale: Tensor | None = None
    clip_order: Sequence[nn.Parameter] | None = None

    def __init__(self, params: Iterable[Any], *options: Any, **named: Any):
        # torch captures a fused step in a CUDA graph only if it is marked "capturable".
        super().__init__(params, *options, fused=True, capturable=True, **named)
        self._warned_capturable_if_run_uncaptured = True  # no warning for the warm-up steps
        self.shard, self.copies = Replicas(), dict[nn.Parameter, Tensor]()
        self.set_up()

    def set_up(self) -> None:
        """Forget what a captured step used. An uncaptured step must come before the next."""

    def attach_working(self, copies: Mapping[nn.Parameter, Tensor]) -> None:
        """Take these as the working copies and give them their parameters' values."""
        self.copies = dict(copies)
        self.refresh_working()

    @torch.no_grad()
    def refresh_working(self) -> None:
        """Write the copies of all unreleased parameters, after others changed the values."""
        here = [(copy, p) for p, copy in self.copies.items() if p.untyped_storage().size()]
        if here:
            torch._foreach_copy_([copy for copy, _ in here], [p for _, p in here])

    @torch.no_grad()
    def fold_working_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Move the gradients of `parameters`' copies (None: of all) to the parameters, in fp32.

        Called after each micro-batch, so that gradients add up in fp32 and not in bf16.
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
        """Scale all gradients to a joint norm of at most `max_norm`, without a host read.

        Args:
            max_norm: With 0 or infinity nothing is scaled.

        Returns:
            (), fp32, on the device: the norm before clipping. Not finite if a gradient is not.
        """
        self.fold_working_gradients()
        parameters = self.clip_order or self._parameters()
        norm = self.shard.norm(parameters)
        if 0 < max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None, skip: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, and the working copies.

        Args:
            closure: Must be None; part of torch's signature.
            skip: The new `found_inf`, unless it is None.
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
        """Make moments and step counts for all parameters this rank updates, or for none."""
        owned = [p for p in self._parameters() if self.shard.owns(p)]
        self.state.update({p: self._new_state(p) for p in owned if not self.state.get(p)})

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _new_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        return {"step": torch.zeros((), device=p.device), **moments}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, including those of the working copies."""
        super().zero_grad(set_to_none)
        for copy in self.copies.values():
            copy.grad = None


class TritonAdamW(AdamW):
    """The same with `kernels/adamw.py`: four launches per step for any number of tensors.

    `clip` does not change the gradients but hands its coefficient to the next `step`, on the
    device. bf16 gradients of working copies are read where they are. A captured step reads lr
    tensors, step counts and `found_inf` at every replay; an lr that is a number stays the same.

    Args:
        params, options: As for AdamW. All on one device: the current CUDA device, or the CPU under
            TRITON_INTERPRET=1.

    Raises:
        ValueError: the kernels do not run on the parameters' device.
    """

    def set_up(self) -> None:
        from kernels.adamw_tables import Tables  # not every machine has triton

        self._step_supports_amp_scaling = False  # so a GradScaler unscales by itself
        device = self.param_groups[0]["params"][0].device
        self._tables = Tables(device)
        self._all_tables = Tables(device)  # for a norm over several ranks' parameters
        self._coefficient: Tensor | None = None  # from the clip since the last step

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Measure the gradients; the next `step` scales them to a norm of at most `max_norm`.

        Arguments and result are those of AdamW.clip. Gradients are not changed, so a second call
        replaces the first.
        """
        if self.shard.rows:
            return super().clip(max_norm)  # a launch sees only this rank's rows
        tables = self._all_tables if self.shard.others else self._tables
        norm, self._coefficient = tables.grad_norm(self._slots(), max_norm)
        return norm

    def _update(self) -> None:
        self._tables.adamw(self._slots(), self._coefficient, self.found_inf)
        self._coefficient = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, and the coefficient from the clip that measured them."""
        super().zero_grad(set_to_none)
        self._coefficient = None

    def _slots(self) -> list[Any]:
        """What the kernels need to know about each parameter that has a gradient."""
        from kernels.adamw_tables import Slot

        # A kernel reads one gradient: where a weight and its copy both have one, their sum.
        self.fold_working_gradients([p for p in self.copies if p.grad is not None])
        slots = []
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.device.type == "cpu" != self._tables.device.type:
                lr = lr.item()  # a host value, so this does not wait for the device
            for j, p in enumerate(group["params"]):
                copy = self.copies.get(p)
                grad = p.grad if copy is None or copy.grad is None else copy.grad
                if grad is None:
                    continue
                rule = lr, group["betas"], group["eps"], group["weight_decay"]
                name = f"parameter {j} of group {i}"
                if not self.shard.owns(p):  # for the norm alone, so without moments
                    slots.append(Slot(name, p, grad, p, p, p.new_zeros(()), None, *rule))
                    continue
                state = self.state[p] = self.state[p] or self._new_state(p)
                moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
                slots.append(Slot(name, p, grad, *moments, copy, *rule))
        return slots


class MuonAdamW(AdamW):
    """Muon for the matrices of the blocks, AdamW for all else, at one learning rate.

    Muon moves a matrix by its orthogonalised momentum (Jordan 2024; momentum 0.95, Nesterov, five
    Newton-Schulz iterations). Scaled to the size of an AdamW update (Liu et al. 2025), it shares
    AdamW's rate and decay. torch.optim.Muon reads its rate on the host, which a captured step
    cannot do. It also iterates in bf16, which takes most CPUs twenty times as long as fp32.

    Args:
        params, options: As for AdamW.
        matrices: The `params` that Muon updates.
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
            grad = torch.where(self.found_inf > 0, momentum, grad)  # leaves the momentum as it is
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
    """The optimizer of a recipe.

    Parameters of two or more dimensions decay, the others do not. The tied embedding is one
    parameter and decays once. Its padding rows have weight and gradient 0, for which the update is
    exactly 0 / (0 + eps) = 0.

    Args:
        model: Its parameters are fp32.
        recipe: Learning rate, betas, eps, weight decay, and whether Muon is used.
        fused: "torch" for torch's kernels; "triton" for ours, on a GPU or under TRITON_INTERPRET=1.
            With Muon they are always torch's.

    Raises:
        ValueError: an unknown `fused`, or no GPU for "triton".
    """
    classes = {"torch": AdamW, "triton": TritonAdamW}
    if fused not in classes:
        raise ValueError(f"adamw: fused must be one of {', '.join(classes)}, got {fused!r}")
    make: Any = classes[fused]
    if recipe.muon:
        matrices = [p for name, p in model.named_parameters() if is_hidden_matrix(name, p)]
        make = partial(MuonAdamW, matrices=matrices)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = recipe.beta1, recipe.beta2
    optimizer = make(groups, lr=recipe.learning_rate(0), betas=betas, eps=recipe.eps)
    optimizer.clip_order = parameters  # for the bits of clip_grad_norm_(model.parameters())
    return optimizer
