"""What a training step needs: rows, weights and copies, at the same addresses every time.

The step itself is a function of the caller (train.py): accumulate, clip, judge, optimizer.step. All
it touches stays on the device: learning rate, step count, clip factor and the guard's verdict are
device scalars. So on a GPU the whole function is recorded as one CUDA graph, which later steps
replay. Warm-up steps, and steps that could not be captured, call the function itself.

On several ranks the graph holds the collectives, as torch documents it for NCCL. Where they cannot
be captured, they run between graphs of the rest, and gradients travel after the backward.

Under bf16 the model can be called with bf16 copies of the fp32 weights, which autocast would
otherwise cast in every micro-batch; the optimizer writes the copies. A copy's gradient is what
autocast would have computed before casting it up, so the numerics are those of plain autocast.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kernels._launch import lay_over
from model import GPT
from training.averaging import Averaging
from training.distributed import ALONE, World
from training.numerics import DTYPES
from training.optim import AdamW, is_hidden_matrix
from training.plan import Plan
from training.recipes import Recipe

# Steps taken before the capture. They compile the kernels and allocate memory.
NUM_WARMUP = 3
# fp16's loss scale, as in torch.amp.GradScaler: halved where gradients overflow, doubled after so
# many steps without overflow. Gradients of 0 never overflow, so there is an upper limit too.
FIRST_SCALE, GROWTH_STEPS, MOST_SCALE = 2.0**16, 2000, 2.0**127


class Outcome(NamedTuple):
    """Device values of one step, each (); read them after the next step has been queued."""

    loss: Tensor  # mean over the step's rows, before the update
    grad_norm: Tensor  # before clipping
    bad: Tensor | None = None  # 1 if the guard skipped the update; None without a guard
    asked_to_stop: Tensor | None = None  # above 0 if a rank was asked to stop


Step = Callable[[], Outcome]


class TrainStep:
    """Runs the steps of a plan; owns the input buffers, the learning rate and the graph.

    Args:
        model: On the plan's device.
        optimizer: Made by `configure_adamw` for the model.
        recipe, plan: What to train, and how. `self.plan` has smaller micro-batches once memory
            has run out, and no graph once a capture has failed.
        world: The ranks. If there are several, only a capture that runs out of memory halves the
            micro-batches.
        say: Receives a line when the step does not run as planned.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: AdamW,
        recipe: Recipe,
        plan: Plan,
        world: World = ALONE,
        say: Callable[[str], None] = print,
    ):
        self.model, self.optimizer, self.recipe, self.plan = model, optimizer, recipe, plan
        self.world, self.say = world, say
        device = torch.device(plan.device)
        rows = plan.micro_batch_size * plan.num_micro_batches
        self.idx = torch.zeros((rows, recipe.block_size), dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.idx)
        self.lr = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        self.copies = working_copies(model) if plan.working_copies else {}
        parameters = dict(model.named_parameters())
        optimizer.attach_working({parameters[name]: copy for name, copy in self.copies.items()})
        self.averaging = self.asked_to_stop = self.overflow = self.outcome = None
        self.stop = torch.zeros((), device=device)
        self.share = torch.tensor(1 / world.size, device=device)  # this rank's part of the mean
        if world.size > 1:
            dtype = DTYPES[plan.reduce_dtype]
            self.averaging = Averaging(model.parameters(), optimizer, dtype)
            self.averaging.outside = optimizer.shard.outside = lambda work: self.cut(work)
        self.worker = getattr(optimizer.shard, "twin", model)  # the module that computes
        self.worker.use(model.ops)
        self.worker.transformer.recompute = plan.recompute
        if plan.dtype != "fp16":
            optimizer.loss_scale = None
        elif optimizer.loss_scale is None:
            optimizer.loss_scale = torch.tensor([FIRST_SCALE, 0.0], device=device)
        self.forward = self._build_forward()
        # The captured step: one graph, or several and what runs between them.
        self.graph: list[Callable[[], None]] = []
        self.cut: Callable[[Callable[[], None]], None] = _call  # runs what goes between graphs
        self.num_captures = 0
        self.stream = torch.cuda.Stream() if plan.cuda_graph else None
        self.warm_steps = 0  # since the start, or since the micro-batches were halved

    def run(
        self, step: Step, rows: tuple[Tensor, Tensor], lr: float, stop: bool = False
    ) -> Outcome:
        """Take one step.

        Args:
            step: Calls `accumulate` and updates the weights. It reads no device value on the host
                and moves no tensor that outlives it.
            rows: Inputs and targets of the step, (rows, T) int64 each.
            lr: Learning rate of the update.
            stop: This rank was asked to stop, which all ranks learn in `asked_to_stop`.

        Raises:
            torch.OutOfMemoryError: not even one row fits.
        """
        self.idx.copy_(rows[0], non_blocking=True)
        self.targets.copy_(rows[1], non_blocking=True)
        self.lr.fill_(lr)
        self.stop.fill_(float(stop))
        self.optimizer.shard.release(self.optimizer.copies)
        if self.plan.cuda_graph and not self.graph and self.warm_steps >= NUM_WARMUP:
            self._capture(step)
        if self.graph:
            for part in self.graph:
                part()
            if self.averaging:
                # NCCL's watchdog ends a rank that waits too long for the others, but it cannot see
                # into a graph. So one collective runs outside.
                torch.distributed.all_reduce(self.stop)
        else:
            self.warm_steps += 1
            if self.stream:  # the capture's: autograd remembers the stream of the first backward
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    self.outcome = step()
                torch.cuda.current_stream().wait_stream(self.stream)
            else:
                self.outcome = step()
        assert self.outcome is not None
        return self.outcome

    def gather(self) -> None:
        """Give each rank all weights if it holds only a part. Call this before reading the model.

        The weights take the memory of the captured step, so a later step is captured anew.
        """
        if self.optimizer.shard.released:
            self.graph, self.warm_steps = [], min(self.warm_steps, NUM_WARMUP - 1)
            self.optimizer.set_up()
            self.optimizer.shard.gather(self.optimizer.copies)

    def accumulate(self) -> Tensor:
        """Run forward and backward of each micro-batch, so that `.grad` is the mean over the step.

        Returns:
            The mean loss over the rows of all ranks, (), fp32.
        """
        while True:
            try:
                loss = self._micro_batches()
                self._unscale()
                self.optimizer.make_state()  # here, because halving makes room for it
                return loss
            except torch.OutOfMemoryError as error:
                capturing = self.stream is not None and torch.cuda.is_current_stream_capturing()
                if capturing or self.world.size > 1:
                    raise
                if self.plan.micro_batch_size == 1:
                    kept = 16 * sum(p.numel() for p in self.model.parameters()) / 2**30
                    raise torch.OutOfMemoryError(
                        "memory: not even one row at a time fits, and weights, gradients and "
                        f"moments take {kept:.2f} GiB of it; take a smaller --model or --block-size"
                    ) from error
            # Outside the handler: the exception's frames hold the activations.
            self.optimizer.zero_grad(set_to_none=True)
            self._halve()

    def _micro_batches(self) -> Tensor:
        num_micro, scale = self.plan.num_micro_batches, self.optimizer.loss_scale
        seed = self.share if scale is None else scale[0] * self.share
        loss = torch.zeros((), device=self.idx.device)
        micro_batches = zip(self.idx.chunk(num_micro), self.targets.chunk(num_micro), strict=True)
        for i, (idx, targets) in enumerate(micro_batches):
            if self.averaging:
                self.averaging.begin(last=i == num_micro - 1)
            with autocast(self.plan):
                micro_loss = self.forward(idx, targets) / num_micro
            micro_loss.backward(seed)
            if num_micro > 1:
                self.optimizer.fold_working_gradients()
            loss += micro_loss.detach()
        if self.averaging:
            loss, self.asked_to_stop = self.averaging.finish(torch.stack([loss, self.stop]))
            loss = loss / self.world.size
            self.optimizer.shard.take_gradients()
        return loss

    def _unscale(self) -> None:
        """Divide the gradients by fp16's loss scale, and let the scale fall or grow.

        Gradients that overflow at a scale of 1 or more become 0, and `skip` leaves the update out;
        the guard does not count this as a bad step. Below a scale of 1 it does: there the gradients
        stay as they are.
        """
        if (state := self.optimizer.loss_scale) is None:
            return
        scale, steps = state.unbind()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, 1 / scale)
        lost = ~torch.nn.utils.get_total_norm(grads).isfinite() & (scale >= 1)
        for grad in grads:
            grad.masked_fill_(lost, 0.0)
        grows = steps + 1 >= GROWTH_STEPS
        factor = torch.where(lost, 0.5, torch.where(grows, 2.0, 1.0))
        steps = torch.where(lost | grows, 0.0, steps + 1)
        state.copy_(torch.stack([(scale * factor).clamp(max=MOST_SCALE), steps]))
        self.overflow = lost.float()

    def skip(self, bad: Tensor | None) -> Tensor | None:
        """1 if the update is left out, because the step is bad or its gradients overflowed."""
        if bad is None or self.overflow is None:
            return self.overflow if bad is None else bad
        return torch.maximum(bad, self.overflow)

    def _halve(self) -> None:
        """Take half as many rows at once, or the next smaller number that divides the step's."""
        gc.collect()
        if self.idx.is_cuda:
            torch.cuda.empty_cache()
        rows, before = len(self.idx), self.plan.micro_batch_size
        micro = next(d for d in range(before // 2, 0, -1) if rows % d == 0)
        self.plan = replace(self.plan, micro_batch_size=micro, num_micro_batches=rows // micro)
        self.warm_steps = 0
        self.say(f"memory: {before} rows at once do not fit, going on with {micro}; same rows")

    def _build_forward(self) -> Callable[[Tensor, Tensor], Tensor]:
        def forward(idx: Tensor, targets: Tensor) -> Tensor:
            if self.copies:
                return functional_call(self.worker, self.copies, (idx, targets))
            return self.worker(idx, targets)

        if not self.plan.compile:
            return forward
        if self.plan.compile_scope == "model":
            return torch.compile(forward if self.copies else self.worker, dynamic=False)
        for block in self.worker.transformer.h:
            block.compile(dynamic=False)
        return forward

    def _capture(self, step: Step) -> None:
        """Record the step as a graph without executing it, or say why not, on all ranks alike."""
        self.num_captures += 1
        answers = self.world.gather(f"capture {self.num_captures}", self._record(step))
        if not (failed := [answer for answer in answers if answer]):
            return
        self.graph, reason = [], failed[0]["reason"]
        self.optimizer.set_up()  # so another try comes after a step without capture
        self.warm_steps = NUM_WARMUP - 1
        if any(failure["short"] for failure in failed) and self.plan.micro_batch_size > 1:
            self._halve()  # a graph has its own memory pool, so the warm-up may have fitted
        elif self.averaging and self.averaging.overlaps:
            self.averaging.overlaps = False
            self.say(f"cuda graph: not with the collectives ({reason}); trying all but them")
        else:
            if self.averaging:
                self.averaging.overlaps = True
            self.say(f"cuda graph: the step cannot be captured ({reason}); going on without")
            self.plan = replace(self.plan, cuda_graph=False)

    def _record(self, step: Step) -> dict[str, Any] | None:
        """Capture the step. Returns what failed, if anything, and whether it was memory."""
        before, pool = torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
        parts: list[Callable[[], None]] = []
        try:
            with contextlib.ExitStack() as capture:

                def begin() -> None:
                    graph = torch.cuda.CUDAGraph()
                    parts.append(graph.replay)
                    # The thread that reads ahead may pin memory meanwhile, hence thread_local.
                    recording = torch.cuda.graph(graph, pool, self.stream, "thread_local")
                    capture.enter_context(recording)

                def cut(work: Callable[[], None]) -> None:
                    capture.close()
                    parts.append(work)
                    begin()

                begin()
                if self.averaging and not self.averaging.overlaps:
                    self.cut = cut
                self.outcome = step()
            self.graph = parts
            return None
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch does not if ending the capture raises
            # That error hides the one inside the capture. Keep its text alone: the exception would
            # keep its frames alive, and with them the activations, until after `_halve`.
            reason = str(error.__context__ or error).strip().splitlines()[0]
            short = any("out of memory" in str(e) for e in (error, error.__context__))
        finally:
            self.cut = _call
        self.optimizer.zero_grad(set_to_none=True)
        parts.clear()
        _abandon(pool)
        return {"reason": reason, "short": short}


def _call(work: Callable[[], None]) -> None:
    work()


def _abandon(pool: Any) -> None:
    """Close the memory pool of a failed capture, which torch 2.11 leaves open.

    While it is open, freed memory is not given back, running out of memory is not retried, and the
    default generator refuses to draw.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except (AttributeError, RuntimeError):  # a torch without this function, or one that closed it
        return
    torch._C._cuda_releasePool(device, pool)
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros((), device="cuda")  # a capture that succeeds frees the generator


def autocast(plan: Plan) -> AbstractContextManager[Any]:
    """Context for a forward in the plan's dtype."""
    if plan.dtype == "fp32":
        return nullcontext()
    return torch.autocast(plan.device, DTYPES[plan.dtype])


def start_process(plan: Plan, seed: int) -> None:
    """Set seeds, launch rows and matmul precision; make CPU runs repeat to the last bit."""
    torch.manual_seed(seed)
    lay_over(plan.launches)
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
    else:
        # With several threads, the compiled embedding's backward adds its rows in any order.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor, by mallopt(3).

    Otherwise glibc returns every block over 32 MB to the system, and each step takes page faults to
    get its logits and gradients back. On two cores of a Zen 3 these cost 6% of the CPU time of a
    compiled step of shakespeare-cpu (44,000 faults, 16 with this) and 44% of an eager one (299,000
    faults, 3,100 with this).
    """
    m_mmap_max, m_trim_threshold = -4, -1
    with contextlib.suppress(AttributeError, OSError, TypeError):  # musl, macOS, Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def working_copies(model: nn.Module) -> dict[str, Tensor]:
    """bf16 leaves, by name, that copy the weights autocast would cast: the matrices of the blocks.

    The embedding has no copy: it is read in fp32, and linear_cross_entropy casts it for the head.
    """
    return {
        name: parameter.detach().to(torch.bfloat16).requires_grad_()
        for name, parameter in model.named_parameters()
        if is_hidden_matrix(name, parameter)
    }
