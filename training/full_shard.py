"""FSDP2 with the blocks as units: the blocks' matrices are sharded by rows over the ranks.

Each rank has some rows of each matrix, with their gradient and moments. A block's matrices are
whole while it is computed, in bf16 under bf16. Vectors and embeddings stay whole on each rank,
vectors because a block reads the LayerNorm of the next one.

A twin of the model computes the steps. The model's own parameters are the rows that this rank
updates. After `gather` they are whole, so code that reads or writes a model needs no changes.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as Rows

from model import GPT
from training.distributed import World
from training.numerics import DTYPES
from training.optim import is_hidden_matrix
from training.plan import Plan
from training.sharding import Copies, Replicas, total_norm


class FullShard(Replicas):
    """Each rank has some rows of the blocks' matrices.

    Args:
        model: On the plan's device. The twin shares its other parameters.
        plan: Dtypes.
        world: More than one rank.

    Attributes:
        twin: What a step calls in place of the model.
        rows: For each parameter of the model, the twin's, which holds this rank's rows.
    """

    def __init__(self, model: GPT, plan: Plan, world: World):
        self.mesh = init_device_mesh(plan.device, (world.size,))
        with torch.device("meta"):
            self.twin = GPT(model.config, model.ops, model.residual_dtype)
        matrices = {n for n, p in model.named_parameters() if is_hidden_matrix(n, p)}
        how = {
            "mesh": self.mesh,
            "ignored_params": {p for n, p in self.twin.named_parameters() if n not in matrices},
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=None if plan.dtype == "fp32" else DTYPES[plan.dtype],
                reduce_dtype=DTYPES[plan.reduce_dtype],
                cast_forward_inputs=False,  # the residual stream stays fp32
            ),
        }
        for unit in (*self.twin.transformer.h, self.twin):
            module = fully_shard(unit, **how)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)  # a rank's loss is scaled already
            module.set_force_sum_reduction_for_comms(True)  # gloo needs it
        self.twin.to_empty(device=plan.device)
        self.rows = rows = dict[nn.Parameter, DTensor]()
        for name, parameter in model.named_parameters():
            owner, _, last = name.rpartition(".")
            twin = getattr(self.twin.get_submodule(owner), last)
            if isinstance(twin, DTensor):
                rows[parameter] = twin
            else:
                setattr(self.twin.get_submodule(owner), last, parameter)

    def part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's rows of a whole tensor."""
        if parameter not in self.rows or value.dim() < 2:
            return value
        value = value.to(self.rows[parameter].device)
        return distribute_tensor(value, self.mesh, [Rows(0)], src_data_rank=None).to_local()

    @torch.no_grad()
    def release(self, copies: Copies) -> None:
        if self.released:
            return
        for p, rows in self.rows.items():
            rows.to_local().copy_(self.part(p, p.detach()))
            p.data = rows.to_local()
        self.released = True

    def take_gradients(self) -> None:
        # FSDP2 may have moved the rows, so point the parameters at them again.
        for p, rows in self.rows.items():
            assert isinstance(rows.grad, DTensor)
            p.data, p.grad, rows.grad = rows.to_local().detach(), rows.grad.to_local(), None

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        square = total_norm(p for p in parameters if p in self.rows) ** 2
        dist.all_reduce(square)
        square += total_norm(p for p in parameters if p not in self.rows) ** 2
        return square.sqrt()

    @torch.no_grad()
    def gather(self, copies: Copies) -> None:
        for p, rows in self.rows.items():
            p.data = rows.full_tensor()
        self.released = False

    def to_first(self, parameter: nn.Parameter, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        if parameter in self.rows:
            how = {"shape": parameter.shape, "stride": parameter.stride()}
            for name in ("exp_avg", "exp_avg_sq"):
                rows = DTensor.from_local(moments[name], self.mesh, [Rows(0)], **how)
                moments = {**moments, name: rows.full_tensor()}
        if self.mesh.get_rank():
            return {}
        return {name: tensor.cpu() for name, tensor in moments.items()}
