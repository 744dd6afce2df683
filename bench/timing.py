"""The one timer of the bench, and the machine's own limits in the same units.

What is timed is a list of calls that do the same work on different buffers. On CUDA they are
captured into one graph and a sample is the device-event time of one replay over its calls, so the
host is not timed. On the CPU a sample is the wall time of all calls over their number. Either way
several contestants take turns (A B A B ...), and ratios are medians of the ratios of neighbours: a
machine that slows down half-way slows both.
"""

import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Call = Callable[[], Any]

NOISY_COV = 0.05  # rows whose samples spread more than this are marked
L2_MULTIPLE = 4  # data of one rotation over the L2 size: what a call finds there is not its own
CPU_CACHE_BYTES = 32 << 20  # last-level cache of one group of cores, on most machines of today
MAX_SETS = 64
MIN_GRAPH_CALLS = 100  # of short calls in a graph: its start, some microseconds, is shared by them
SHORT_CALL_BYTES = 16 << 20


@dataclass(frozen=True)
class Timing:
    """Samples of one contestant, in milliseconds of one call.

    Args:
        samples_ms: In the order they were taken.
        mode: "graph" (CUDA graph replay), "launches" (CUDA, kernels launched one by one because
            capture was refused: the host may be in the figure) or "host" (wall time).
    """

    samples_ms: Sequence[float]
    mode: str = "host"

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        if len(self.samples_ms) < 2:
            return self.samples_ms[0], self.samples_ms[0]
        q1, _, q3 = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return q1, q3

    @property
    def cov(self) -> float:
        """Standard deviation over mean; 0 for one sample."""
        if len(self.samples_ms) < 2:
            return 0.0
        return statistics.stdev(self.samples_ms) / statistics.fmean(self.samples_ms)

    @property
    def noisy(self) -> bool:
        return self.cov > NOISY_COV


def ratio(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median of the ratios of samples taken in turn."""
    pairs = zip(slow.samples_ms, fast.samples_ms, strict=False)
    return statistics.median(a / b for a, b in pairs)


@dataclass(frozen=True)
class Replay:
    """Something that can be run again and tells how long one call took."""

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


def device_replay(calls: Sequence[Call], set_bytes: int = SHORT_CALL_BYTES) -> Replay:
    """One CUDA graph of all calls, over and over for short ones; launches if capture is refused.

    Args:
        calls: The same work, each on buffers of its own. Results of one rotation are kept alive
            during capture, so that outputs rotate too.
        set_bytes: Bytes one call moves; says whether a call is short.

    The caller must have created whatever the calls differentiate on `capture_stream()`: autograd
    runs a backward on the stream of its forward.
    """
    stream = capture_stream()
    repeats = -(-MIN_GRAPH_CALLS // len(calls)) if set_bytes < SHORT_CALL_BYTES else 1
    count = repeats * len(calls)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for call in (*calls[:2], *calls[:2]):  # compile, create handles, fill the allocator
            call()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    held: list[Any] = [None] * len(calls)
    try:
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                held[i % len(calls)] = calls[i % len(calls)]()
        mode = "graph"
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:  # a host read inside, as in some third-party losses
        mode = "launches"
        torch.cuda.synchronize()
    finally:
        held.clear()

    def once() -> float:
        with torch.cuda.stream(stream):
            start.record()
            if mode == "graph":
                graph.replay()
            else:
                for i in range(count):
                    calls[i % len(calls)]()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    return Replay(once, mode)


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
) -> dict[str, Timing]:
    """Sample all contestants in turn, A B A B.

    Args:
        replays: What to time, by name.
        rounds: Samples of each at most.
        seconds: Budget of the whole; once it is spent no further round begins.
        warmup: Rounds run and thrown away first.
        min_rounds: Rounds taken whatever they cost.
    """
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(warmup):
        for replay in replays.values():
            replay.once()
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= min_rounds and time.perf_counter() > deadline:
            break
        for name, replay in replays.items():
            samples[name].append(replay.once())
    return {name: Timing(tuple(samples[name]), replays[name].mode) for name in replays}


def time_calls(
    contestants: Mapping[str, Sequence[Call]],
    device: torch.device,
    set_bytes: int = SHORT_CALL_BYTES,
    **how: Any,
) -> dict[str, Timing]:
    """`interleave` with the replay that fits the device; `how` as there."""
    if device.type == "cuda":
        replays = {name: device_replay(calls, set_bytes) for name, calls in contestants.items()}
    else:
        replays = {name: host_replay(*calls) for name, calls in contestants.items()}
    return interleave(replays, **how)


@cache
def limits(device: torch.device) -> dict[str, float]:
    """What this machine reaches on random data: the ceilings rows are held against.

    Returns:
        copy_gbs: GB/s of a copy far larger than any cache, bytes read plus bytes written.
        matmul_tflops, matmul_k768_tflops: TFLOP/s of a large square matmul and of one with
            GPT-2's inner dimension 768; bf16 on CUDA, fp32 on the CPU.
        bf16_over_fp32: CPU only; rate of a small bf16 matmul over that of the fp32 one.
    """
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def best_ms(call: Call) -> float:
        # A ceiling is the fastest sample, not the median: noise only ever slows it.
        how = {"rounds": 10, "seconds": 2.0 if cuda else 0.5}
        return min(time_calls({"": [call]}, device, 1 << 30, **how)[""].samples_ms)

    def copy_gbs(count: int) -> float:
        source = randn(count)
        target = torch.empty_like(source)
        return 2 * count * dtype.itemsize / best_ms(lambda: target.copy_(source)) / 1e6

    def tflops(m: int, k: int, n: int, dtype: torch.dtype = dtype) -> float:
        a, b = randn(m, k, dtype=dtype), randn(k, n, dtype=dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        return 2 * m * k * n / best_ms(lambda: torch.mm(a, b, out=out)) / 1e9

    size = 8192 if cuda else 1024
    found = {
        "copy_gbs": copy_gbs(1 << 29 if cuda else 1 << 24),
        "matmul_tflops": tflops(size, size, size),
        "matmul_k768_tflops": tflops(65536 if cuda else 1024, 768, 3072),
    }
    if not cuda:
        small = 256
        found["bf16_over_fp32"] = tflops(small, small, small, torch.bfloat16) / tflops(
            small, small, small
        )
    return found


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is worth timing: always on CUDA, by measurement on a CPU.

    A CPU without AVX512-BF16 or AMX converts each value in software, which can be 50 times slower
    than fp32.
    """
    return device.type == "cuda" or limits(device)["bf16_over_fp32"] > 0.7


_SMI_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "mem_mhz",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "temperature.gpu": "temperature_c",
}


def gpu_state() -> dict[str, float]:
    """Clocks, power and temperature now; {} where nvidia-smi is missing or says nothing."""
    try:
        out = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    state = {}
    for name, text in zip(_SMI_FIELDS.values(), out.splitlines()[0].split(","), strict=False):
        try:
            state[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return state
