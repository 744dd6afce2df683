"""The timer of the bench and of the measurement before a run.

A contestant is a list of calls that do the same work on different buffers. On CUDA the calls are
captured into one graph, and a sample is the device-event time of one replay divided by the number
of calls, so the host is not timed. On the CPU a sample is their wall time. Contestants take turns
(A B A B ...), and a ratio is the median over neighbouring samples: a machine that slows down
half-way slows both.
"""

import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]

L2_MULTIPLE = 4  # size of one rotation's data over L2's, so that no call finds its own data there
CPU_CACHE_BYTES = 32 << 20  # last-level cache of one group of cores, on most machines of today
MAX_SETS = 64
MIN_GAIN = 1.02  # a smaller gain may be a loss on another day, so it is ignored
MIN_GRAPH_CALLS = 100  # for short calls: they share a graph's start of some microseconds
SHORT_CALL_BYTES = 16 << 20
SPIN_SECONDS = 0.2  # work before measuring: an idle GPU's clock takes that long to rise
SPIN_SIZE = 2048
# What CUDA says when its context is lost, after which every later call of the process fails.
FATAL = (
    "illegal memory access",
    "illegal instruction",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
)


@dataclass(frozen=True)
class Timing:
    """Samples of one contestant, in milliseconds of one call.

    `mode` is "graph" (CUDA graph replay), "launches" (CUDA, kernels launched one by one because
    capture was refused: the host may be in the figure) or "host" (wall time).
    """

    samples_ms: Sequence[float]  # in the order they were taken
    mode: str = "host"

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        q1, q3 = np.quantile(self.samples_ms, (0.25, 0.75)).tolist()
        return q1, q3

    @property
    def cov(self) -> float:
        """Standard deviation over mean; 0 for one sample."""
        if len(self.samples_ms) < 2:
            return 0.0
        return statistics.stdev(self.samples_ms) / statistics.fmean(self.samples_ms)

    @property
    def figures(self) -> dict[str, Any]:
        """What a row of `bench.record` keeps of it."""
        q1, q3 = self.quartiles_ms
        spread = {"q1_ms": q1, "q3_ms": q3, "cov": self.cov}
        return {"ms": self.median_ms, **spread, "rounds": len(self.samples_ms)}


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median of the ratios of samples taken in turn."""
    return _ratios(slow, fast).median_ms


def gains(slow: Timing, fast: Timing) -> bool:
    """Whether `fast` is worth a change: faster by MIN_GAIN, and in at least three turns of four."""
    ratios = _ratios(slow, fast)
    return ratios.quartiles_ms[0] > 1.0 and ratios.median_ms >= MIN_GAIN


def _ratios(slow: Timing, fast: Timing) -> Timing:
    return Timing([a / b for a, b in zip(slow.samples_ms, fast.samples_ms, strict=False)])


def is_fatal(error: BaseException) -> bool:
    """Whether the CUDA context is lost, so that all that follows in this process fails too."""
    # The end of a capture hides what went wrong in it: look at what led to the error, too.
    said = "".join(traceback.format_exception(error, limit=0)).lower()
    return any(text in said for text in FATAL)


def reason_of(error: BaseException) -> str:
    """One line for a row: "out of memory", or the type and the first line of the message."""
    if _is_short(error):
        return "out of memory"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"[:160]


def note_failure(failed: dict[str, str] | None, name: str, error: Exception) -> None:
    """Record why a contestant failed; raise it without `failed`, or if the context is lost."""
    if failed is None or is_fatal(error):
        raise error
    failed[name] = reason_of(error)


def _is_short(error: BaseException) -> bool:
    return any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))


@dataclass(frozen=True)
class Replay:
    """Something that can be rerun and returns how long one call took."""

    once: Callable[[], float]  # ms per call
    mode: str


def host_replay(*calls: Call) -> Replay:
    """Wall time of one pass over the calls, divided by their number."""

    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e3 / len(calls)

    return Replay(once, "host")


def num_sets(set_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs to rotate, so that a rotation is several times the cache."""
    cuda = device.type == "cuda"
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if cuda else CPU_CACHE_BYTES
    return max(1, min(MAX_SETS, math.ceil(L2_MULTIPLE * l2 / max(set_bytes, 1))))


def device_replay(
    calls: Sequence[Call], set_bytes: int = SHORT_CALL_BYTES, pool: Any = None
) -> Replay:
    """One CUDA graph of all calls, short ones several times; launches if capture is refused.

    The caller must have created whatever the calls differentiate on `capture_stream()`: autograd
    runs a backward on the stream of its forward.

    Args:
        calls: The same work, each on buffers of its own. The capture keeps the results of one
            rotation alive, so that outputs rotate too.
        set_bytes: Bytes one call moves; decides whether a call is short.
        pool: Memory pool of the graph, shared with graphs that never run at the same time.
    """
    stream = capture_stream()
    repeats = -(-MIN_GRAPH_CALLS // len(calls)) if set_bytes < SHORT_CALL_BYTES else 1
    count = repeats * len(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for call in (*calls[:2], *calls[:2]):  # compile, create handles, fill the allocator
            call()
    torch.cuda.synchronize()
    graph = _capture(calls, count, stream, pool)

    def once() -> float:
        with torch.cuda.stream(stream):
            start.record()
            if graph is not None:
                graph.replay()
            else:
                for i in range(count):
                    calls[i % len(calls)]()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    return Replay(once, "launches" if graph is None else "graph")


def _capture(
    calls: Sequence[Call], count: int, stream: "torch.cuda.Stream", pool: Any
) -> "torch.cuda.CUDAGraph | None":
    """`count` calls as one graph; None where they cannot be captured.

    A call that waits for the device, as some third-party losses do, is found before the capture:
    up to torch 2.11 a capture that is refused half-way spoils the process. Its stream stays
    current, the default generator refuses to draw, and the allocator gives no memory back.
    """
    graph, held = torch.cuda.CUDAGraph(), [None] * len(calls)
    current, debug_mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.set_sync_debug_mode(debug_mode)
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for i in range(count):
                held[i % len(calls)] = calls[i % len(calls)]()
        return graph
    except RuntimeError as error:
        if _is_short(error) or is_fatal(error):
            raise
    finally:
        torch.cuda.set_sync_debug_mode(debug_mode)
        torch.cuda.set_stream(current)  # torch.cuda.graph does not if ending the capture raises
    torch.cuda.synchronize()
    return None


@cache
def capture_stream() -> "torch.cuda.Stream":
    """The side stream of every capture: the default stream cannot be captured."""
    return torch.cuda.Stream()


def interleave(
    replays: Mapping[str, Replay],
    *,
    rounds: int = 30,
    seconds: float = 10.0,
    warmup: int = 2,
    min_rounds: int = 3,
    until: float = math.inf,
    failed: dict[str, str] | None = None,
) -> dict[str, Timing]:
    """Sample all contestants in turn, A B A B.

    Args:
        replays: What to time, by name.
        rounds, seconds: At most so many samples each; no round begins after so many seconds.
        warmup, min_rounds: Rounds thrown away first, and rounds taken whatever they cost.
        until: Of time.monotonic(); after it not even those begin.
        failed: Receives why a contestant dropped out; without it the first error is raised.
    """
    samples: dict[str, list[float]] = {name: [] for name in replays}
    deadline = math.inf
    for done in range(-warmup, rounds):
        if done == 0:
            deadline = min(until, time.monotonic() + seconds)
        if time.monotonic() > (deadline if done >= min_rounds else until):
            break
        for name in [*samples]:
            try:
                ms = replays[name].once()
            except Exception as error:
                note_failure(failed, name, error)
                del samples[name]
                continue
            if done >= 0:
                samples[name].append(ms)
    if failed is not None:
        failed |= {name: "no time left" for name, found in samples.items() if not found}
    return {
        name: Timing(tuple(found), replays[name].mode) for name, found in samples.items() if found
    }


def time_calls(
    contestants: Mapping[str, Sequence[Call]],
    device: torch.device,
    set_bytes: int = SHORT_CALL_BYTES,
    *,
    needs: Mapping[str, int] | None = None,
    failed: dict[str, str] | None = None,
    **how: Any,
) -> dict[str, Timing]:
    """`interleave` with the replay that fits the device.

    Args:
        contestants: Calls by name, as `device_replay` wants them.
        set_bytes: As there.
        needs: Bytes of device memory a contestant takes while it runs, beside its inputs; one that
            does not fit is not tried.
        failed, how: As in `interleave`.
    """
    if device.type != "cuda":
        replays = {name: host_replay(*calls) for name, calls in contestants.items()}
        return interleave(replays, failed=failed, **how)
    replays, needs = {}, needs or {}
    # The graphs run in turn and nobody reads what they leave behind, so they share one pool as
    # large as the largest needs. With a pool each, eager and compiled losses pass 80 GB. The
    # largest is built last, so that it is the one that may have to do without.
    pool: Any = torch.cuda.graph_pool_handle()
    for name in sorted(contestants, key=lambda name: needs.get(name, 0)):
        try:
            _check_room(needs.get(name, 0))
            replays[name] = device_replay(contestants[name], set_bytes, pool)
        except Exception as error:
            note_failure(failed, name, error)
        if name not in replays or replays[name].mode != "graph":
            pool = torch.cuda.graph_pool_handle()  # a broken capture may have left the old one open
    spin(device)
    ordered = {name: replays[name] for name in contestants if name in replays}
    return interleave(ordered, failed=failed, **how)


def _check_room(need: int) -> None:
    if not need:
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if need > free:
        raise torch.OutOfMemoryError(
            f"timing: needs {need / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} are free"
        )


def spin(device: torch.device) -> None:
    """Keep the GPU busy until its clock has risen."""
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(SPIN_SIZE, SPIN_SIZE, generator=generator, device=device).to(torch.bfloat16)
    out = torch.empty_like(a)
    end = time.perf_counter() + SPIN_SECONDS
    while time.perf_counter() < end:
        for _ in range(16):
            torch.mm(a, a, out=out)
        torch.cuda.synchronize(device)
