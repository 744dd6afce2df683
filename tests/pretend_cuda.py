"""A pretended CUDA device: code for a GPU runs to its end on CPU tensors.

Inside `pretend_cuda()` torch reports one H100, and "cuda" means the CPU wherever a tensor is made
or moved. Streams and events only tell the time; torch.compile returns what it is given. A CUDA
graph keeps the rules of a real one that a program can break:

- what a capture records it does not execute: what it changed is put back at its end;
- a replay runs the recorded operations again on the recorded tensors, and nothing else: a value
  that Python held at the capture stays what it was;
- reading a device value inside a capture raises what CUDA raises;
- memory that `empty` and its relatives give out in a capture holds NaN at every replay.

It says nothing about kernels, races between streams, or speed.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Work
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZES = {"multi_processor_count": 132, "total_memory": 80 << 30, "L2_cache_size": 1 << 20}
DEVICE = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, **SIZES)
REFUSED = "CUDA error: operation not permitted when stream is capturing"
# The last two by their CUDA kernels, which read a count on the host (nanmedian up to torch 2.8 or
# so), where no dispatch mode sees it.
HOST_READS = {*"_local_scalar_dense is_nonzero nonzero masked_select _unique2 equal".split()}
HOST_READS |= {"nanmedian", "repeat_interleave"}
EMPTY = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if _is_cuda(value) else value


class _Devices(TorchFunctionMode):
    """Every mention of a CUDA device in a call becomes the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:  # stays what it says: code asks it for its type
            return func(*args, **(kwargs or {}))
        kwargs = {k: _on_cpu(v) for k, v in (kwargs or {}).items() if k != "pin_memory"}
        return func(*(_on_cpu(a) for a in args), **kwargs)


@dataclass
class Recorded:
    """One operation of a capture."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]  # of memory of their own; views need no second run

    def replay(self) -> None:
        if self.name in EMPTY:
            for tensor in self.results:
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            return
        found = tree_leaves(self.func(*self.args, **self.kwargs))
        if self.is_collective:
            Work.unbox(found[-1]).wait()
            return
        fresh = [t for t in found if isinstance(t, Tensor)]
        for old, new in zip(self.results, fresh, strict=bool(self.results)):
            old.copy_(new)

    @property
    def is_collective(self) -> bool:
        return self.func.namespace == "c10d"

    @property
    def name(self) -> str:
        return self.func._schema.name.partition("::")[2]


class _Capture(TorchDispatchMode):
    """Records operations; keeps the first value of whatever they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Recorded] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = Recorded(func, args, kwargs, [])
        if operation.name in HOST_READS:
            raise RuntimeError(REFUSED)
        schema = func._schema
        if operation.is_collective:  # whose schemas do not say what they write
            self.overwritten += [(t, t.detach().clone()) for t in args[0]]
        for parameter, value in zip(schema.arguments, args, strict=False):
            self._keep(parameter, value)
        for parameter in schema.arguments:
            if parameter.name in kwargs:
                self._keep(parameter, kwargs[parameter.name])
        found = func(*args, **kwargs)
        if not func.is_view and all(r.alias_info is None for r in schema.returns):
            operation.results = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        if operation.name in EMPTY:
            operation.replay()
        if not func.is_view:
            self.operations.append(operation)
        return found

    def _keep(self, parameter: Any, value: Any) -> None:
        if parameter.alias_info is None or not parameter.alias_info.is_write:
            return
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.overwritten.append((tensor, tensor.detach().clone()))


class _NoSync(TorchDispatchMode):
    """Refuses what waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[2] in HOST_READS:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class CUDAGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[Recorded] = []

    def replay(self) -> None:
        assert self.operations, "replay of a graph that was never captured"
        # What was recorded are casts already.
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for operation in self.operations:
                operation.replay()


@dataclass
class Pretended:
    """What happened on the device.

    Args:
        capturing: Whether a capture is under way.
        graphs: Every captured graph.
        current: The current stream.
        no_sync: Entered while the sync debug mode is "error".
    """

    capturing: bool = False
    graphs: list[CUDAGraph] = field(default_factory=list)
    current: Any = None
    no_sync: "_NoSync | None" = None

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Stands in for torch.cuda.stream."""
        before, self.current = self.current, stream or self.current
        yield
        self.current = before

    def set_sync_debug_mode(self, mode: int | str) -> None:
        if self.no_sync:
            self.no_sync.__exit__(None, None, None)
        self.no_sync = _NoSync() if mode in (2, "error") else None
        if self.no_sync:
            self.no_sync.__enter__()

    @contextlib.contextmanager
    def graph(
        self, graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = ""
    ) -> Iterator[None]:
        """Stands in for torch.cuda.graph; as there, one that is refused leaves its stream on."""
        capture = _Capture()
        self.capturing = True
        before, self.current = self.current, stream
        try:
            with capture:
                yield
            self.current = before
        except BaseException as error:
            if REFUSED not in str(error):
                self.current = before
            raise
        finally:
            self.capturing = False
            with torch.no_grad():
                for tensor, value in reversed(capture.overwritten):
                    tensor.copy_(value)
        graph.operations = capture.operations
        self.graphs.append(graph)


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, later: "_Event") -> float:
        return max(1e-3, (later.at - self.at) * 1e3)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Pretended]:
    """Inside, there is one GPU as far as anyone can tell. Triton must be interpreted."""
    pretended = Pretended(current=_Stream())
    real_generator, precision = torch.Generator, torch.get_float32_matmul_precision()

    def uncompiled(model: Any = None, **_: Any) -> Any:
        return model if model is not None else (lambda function: function)

    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: DEVICE.name,
        "get_device_capability": lambda *_: (DEVICE.major, DEVICE.minor),
        "get_device_properties": lambda *_: DEVICE,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_allocated": lambda *_: 1 << 30,
        "max_memory_allocated": lambda *_: 2 << 30,
        "mem_get_info": lambda *_: (DEVICE.total_memory, DEVICE.total_memory),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "Event": _Event,
        "Stream": _Stream,
        "stream": pretended.stream,
        "current_stream": lambda *_: pretended.current,
        "set_stream": lambda stream: setattr(pretended, "current", stream),
        "set_sync_debug_mode": pretended.set_sync_debug_mode,
        "get_sync_debug_mode": lambda: 2 if pretended.no_sync else 0,
        "is_current_stream_capturing": lambda: pretended.capturing,
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": lambda: (0, 1),
        "graph": pretended.graph,
    }
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        *((torch.cuda, name, value) for name, value in cuda.items()),
        # Up to torch 2.11 it goes by `is_available`, and a parameter here has no `is_cuda`.
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None),
        (torch, "autocast", _Autocast),
        (torch, "compile", uncompiled),
        (torch.compiler, "reset", lambda: None),
        (torch, "Generator", lambda device="cpu": real_generator(_on_cpu(device))),
        (torch.Tensor, "pin_memory", lambda self, *_: self),
        (torch.nn.Module, "compile", lambda self, *_, **__: None),
    ]
    from kernels import adamw_tables

    replaced.append((adamw_tables, "_is_capturing", lambda _: pretended.capturing))
    with contextlib.ExitStack() as held:
        for owner, name, value in replaced:
            held.enter_context(mock.patch.object(owner, name, value))
        # Absent from a build without CUDA.
        held.enter_context(mock.patch.object(torch._C, "_cuda_clearCublasWorkspaces", create=True))
        held.callback(torch.set_float32_matmul_precision, precision)
        held.enter_context(_Devices())
        yield pretended
