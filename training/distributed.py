"""Several processes train one run: what torchrun starts, seen as a rank and a world size.

The rows of a step are divided among the ranks in order, so 1, 2 or 8 ranks train on the same global
batches; training/averaging.py averages their gradients. Without torchrun everything here is a world
of one and touches no process group.
"""

import gc
import hashlib
import io
import json
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.edge import printable
from training.machines import has_gpu
from training.plan import Plan, step_bytes
from training.recipes import Recipe

# Before the first step a rank that hangs ends the job after this long. torchrun sees at once when a
# rank dies.
TIMEOUT = timedelta(minutes=10)
CONNECT = timedelta(minutes=1)  # for the ranks to find each other
POLL_S = 0.1
FAILED = "failed"  # key in the store: a rank has said why the job ends
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process and its peers.

    Args:
        rank: Of this process; rank 0 is the one that writes.
        size: Number of processes.
        local_rank: Rank on this machine; picks the GPU.
        store: Where the ranks agree on what to do before they train, in JSON; None for one alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error the peers may be gone: waiting for them would hang.
        if kind is None and dist.is_initialized():
            gc.collect()  # NCCL waits forever for a graph that holds its collectives
            dist.destroy_process_group()

    def connect(self, device: str, patience_s: float) -> None:
        """Make the process group, in which a rank waits `patience_s` seconds for the others.

        Raises:
            ValueError: there is no GPU for this rank.
        """
        if self.store is None:
            return
        backend, device_id = "gloo", None
        if device != "cpu" and has_gpu():
            if self.local_rank >= (count := torch.cuda.device_count()):
                raise ValueError(
                    f"distributed: rank {self.rank} is process {self.local_rank + 1} of its "
                    f"machine, which has {count} GPUs; lower --nproc-per-node"
                )
            torch.cuda.set_device(self.local_rank)
            backend, device_id = "nccl", torch.device("cuda", self.local_rank)

        def give_up() -> None:
            who = f"rank {self.rank} of {self.size} could not connect to the others"
            print(f"train.py: distributed: {who} in {limit_s:.0f} s", file=sys.stderr, flush=True)
            os._exit(2)

        # No exception ends a wait of gloo's for a dead rank, so a watchdog ends the process.
        limit_s = CONNECT.total_seconds()
        watchdog = threading.Timer(limit_s, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            dist.init_process_group(
                backend,
                timeout=timedelta(seconds=min(patience_s, 1e8)),  # its largest value
                world_size=self.size,
                rank=self.rank,
                store=dist.PrefixStore("groups", self.store),
                device_id=device_id,  # makes NCCL connect here and now
            )
        finally:
            watchdog.cancel()

    def say(self, line: str) -> None:
        """Print on rank 0 only."""
        if self.is_main:
            print(printable(line), flush=True)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, key: str, value: Any, patient: bool = False) -> list[Any]:
        """`value` of every rank, in their order. Each call needs a key of its own."""
        if self.store is None:
            return [value]
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [self._await(f"{key}/{rank}", patient) for rank in range(self.size)]

    def first(self, key: str, choose: Callable[[], Any]) -> Any:
        """What `choose` returns on rank 0. Each call needs a key of its own."""
        if not self.is_main:
            return self._await(key)
        value = choose()
        if self.store is not None:
            self.store.set(key, json.dumps(value))
        return value

    def send(self, key: str, groups: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Rank 0's groups of named tensors, on every rank; they are on the CPU there and here."""
        if self.size == 1:
            return groups
        mine = [
            (group, name, str(tensor.dtype).removeprefix("torch."), [*tensor.shape])
            for group, named in groups.items()
            for name, tensor in named.items()
        ]
        names, forms = self.first(key, lambda: ([*groups], mine))
        received: dict[str, dict[str, Tensor]] = {group: {} for group in names}
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        for group, name, dtype, shape in forms:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            if self.is_main:
                tensor.copy_(groups[group][name])
            dist.broadcast(tensor, 0)
            received[group][name] = tensor.cpu()
        return received

    def in_turn(self, key: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0, then on the others, without a limit of time."""
        if not self.is_main:
            self._await(f"{key}/0", patient=True)
        result = work()
        self.gather(key, True, patient=True)  # a rank on another host may have as much to do
        return result

    def _await(self, key: str, patient: bool = False) -> Any:
        """The value of `key`, once a rank has set it.

        It polls, because one long wait would not notice that another rank has failed.
        """
        assert self.store is not None
        limit_s = TIMEOUT.total_seconds()
        end = time.monotonic() + limit_s
        try:
            while not self.store.check([key]):
                if self.store.check([FAILED]):
                    raise OSError("distributed: another rank failed")
                if time.monotonic() > end and not patient:
                    raise OSError(f"distributed: no {key!r} from another rank in {limit_s:.0f} s")
                time.sleep(POLL_S)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise OSError(f"distributed: rank 0 is gone ({error})") from None

    def complain(self, line: str) -> None:
        """Print why the job ends; only the first rank that complains prints."""
        if self.store is None:
            print(line, file=sys.stderr)
            return
        with suppress(RuntimeError):  # the store has ended with rank 0
            if self.store.add("complaints", 1) == 1:
                print(line, file=sys.stderr, flush=True)
                self.store.set(FAILED, "true")
            # The store may live in rank 0's process, which must outlast the other complaints.
            end = time.monotonic() + 100 * POLL_S
            while self.is_main and time.monotonic() < end:
                if self.store.add("complaints", 0) == self.size:
                    break
                time.sleep(POLL_S)

    @contextmanager
    def in_one_voice(self) -> Iterator[None]:
        """Have one rank print what all would print before a SystemExit, such as wrong flags."""
        if self.size == 1:
            yield
            return
        said = io.StringIO()
        try:
            with redirect_stdout(said), redirect_stderr(said):
                yield
        except SystemExit:
            self.complain(said.getvalue().rstrip())
            raise

    def mean(self, total: float, weight: float, device: str) -> float:
        """Sum of `total` over the ranks, divided by the sum of `weight`."""
        if self.size == 1:
            return total / weight
        sums = torch.tensor([total, weight], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return (sums[0] / sums[1]).item()


ALONE = World()


def meet() -> World:
    """The job that torchrun started, or a world of one; `connect` comes next.

    Raises:
        ValueError: what torchrun sets in the environment is incomplete or not a number.
        OSError: the ranks do not find each other.
    """
    size = _environment("WORLD_SIZE", "1", 1 << 20)
    if size <= 1:
        return ALONE
    rank, local_rank = _environment("RANK", None, size), _environment("LOCAL_RANK", "0", size)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=CONNECT))
        store.set_timeout(TIMEOUT)
        prefix = _draw_prefix(store, rank, size)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(f"distributed: the ranks did not meet at {where}: {error}") from None
    return World(rank, size, local_rank, dist.PrefixStore(prefix, store))


def _draw_prefix(store: dist.Store, rank: int, size: int) -> str:
    """Agree on a prefix for the keys of this attempt, which rank 0 draws.

    torchrun keeps one store for all restarts, and a living rank must not read what a dead one
    left there. Its count of restarts cannot be the prefix, because each node counts its own
    failures. So each rank asks under a fresh name, and rank 0 answers until all have the prefix.

    Raises:
        RuntimeError: not all are here within CONNECT.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"asks/{rank}", name)
        store.wait([name], CONNECT)
        prefix = store.get(name).decode()
        store.set(f"{prefix}/{rank}", "")
        return prefix
    limit_s, missing = CONNECT.total_seconds(), set(range(1, size))
    end = time.monotonic() + limit_s
    while missing:
        for other in [*missing]:
            if store.check([f"{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set(store.get(f"asks/{other}").decode(), name)
        if missing and time.monotonic() > end:
            absent = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"no sign of rank {absent} in {limit_s:.0f} s")
        time.sleep(POLL_S)
    return name


def wait(works: Iterable[dist.Work | None]) -> None:
    """Start all these collectives, then wait for them."""
    for work in list(works):
        assert work is not None
        work.wait()


def is_peers_fault(error: RuntimeError) -> bool:
    """Whether a collective failed, rather than something that this rank does by itself.

    The place where it was raised decides, because not all of gloo's messages name gloo.
    """
    frames = traceback.extract_tb(error.__traceback__)[-2:]  # torch may add one of its own
    waits = (str(Path(dist.__file__).parent), __file__)
    raised_there = any(frame.filename.startswith(waits) for frame in frames)
    return isinstance(error, dist.DistError) or "gloo" in str(error) or raised_there


def is_restart() -> bool:
    """Whether torchrun has started this process before: a rank failed, or was asked to stop."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _environment(name: str, default: str | None, below: int) -> int:
    value = os.environ.get(name, default)
    if value is None or not (value.isdecimal() and int(value) < below):
        raise ValueError(
            f"distributed: {name} must be a whole number below {below}, got {value!r}; torchrun "
            "sets it, and without torchrun WORLD_SIZE is not set either"
        )
    return int(value)


def end_process(code: int) -> NoReturn:
    """Exit; one of several ranks skips the interpreter's teardown.

    Threads of gloo and autograd may still release Python objects. Python kills a thread that asks
    for its lock during the teardown, and C++ then calls std::terminate. So a finished rank died of
    SIGABRT once in some twenty jobs of four ranks on two cores.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def share(plan: Plan, recipe: Recipe, world: World) -> Plan:
    """The part of `plan` that one rank does; ValueError if the rows do not divide evenly."""
    if world.size == 1:
        return plan
    if recipe.rows_per_step % world.size:
        raise ValueError(
            f"distributed: {recipe.rows_per_step} rows per step (batch_size {recipe.batch_size} x "
            f"grad_accum_steps {recipe.grad_accum_steps}) do not divide among {world.size} ranks; "
            "change --batch-size or --nproc-per-node"
        )
    rows = recipe.rows_per_step // world.size
    micro = max(d for d in range(1, plan.micro_batch_size + 1) if rows % d == 0)
    plan = replace(plan, micro_batch_size=micro, num_micro_batches=rows // micro)
    return replace(plan, memory_bytes=step_bytes(plan, recipe, world.size))


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of the parameters of a model on the CPU."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def refuse_mismatch(world: World, key: str, facts: dict[str, Any]) -> None:
    """Raise ValueError on every rank if one is about to do something different from rank 0.

    The message names the ranks and the `facts` that differ.
    """
    everyone = world.gather(key, facts)
    wrong = [
        f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 {value!r}"
        for rank, theirs in enumerate(everyone)
        for name, value in everyone[0].items()
        if theirs.get(name) != value
    ]
    if wrong:
        raise ValueError(f"distributed: the ranks differ: {'; '.join(wrong[:4])}")
