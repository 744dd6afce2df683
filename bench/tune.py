"""Propose launch rows: `python -m bench.tune --op gelu_mlp --shape b64t1024` on a GPU.

    python -m bench.tune --list --arch 90      # what would be tried; needs no GPU
    python -m bench.tune --minutes 5           # every kernel at two shapes

For each kernel of an op the launch it would take is replaced by candidates: those of [candidates]
and of other rows of launches.toml with the same blocks, then the present one with one thing
changed, then two, and so on. Nothing runs here. Children build candidates side by side, on small
inputs of the same specialisation, so that Triton's cache on disk has them; then one child alone
checks the results and times. A candidate that kills its child or hangs costs itself and no other.
The fastest few are timed against the present row in turns, and a gain above 2% that is
larger than the noise is proposed, unless it costs at another shape of the run that the row would
serve.

What is printed is a line for [measured] in kernels/launches.toml; `make resources` compiles it.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import cli, ops, record
from bench.cases import CASES, Shape, make_inputs
from bench.rows import TuneRow
from kernels import causal_attention, gelu_mlp, layer_norm, linear_cross_entropy
from kernels._launch import Key, Launch, family, launch_for, math_of, replaced, rows
from training import child, timing

FINALISTS = 3
FINAL = {"rounds": 20, "seconds": 5.0}  # the last turns; four launches rarely need the time
QUICK = {"rounds": 5, "seconds": 0.3, "warmup": 1}
MAX_CANDIDATES = 200  # of a kernel at a shape
BATCH = 4  # candidates of each child before those that came back are timed
TASK_LIMIT_S = 60.0  # one candidate; a build takes 1 to 3 s, several at once longer
SMALL_T = 256  # tokens of a sequence a build runs on: more than the short attention kernels take

# By name: case and direction that run it. Of the head "both": "fwd" is a build without gradients.
KERNELS = {
    "gelu_mlp.up": ("gelu_mlp", "fwd"),
    "gelu_mlp.down": ("gelu_mlp", "bwd"),
    "linear_cross_entropy.rows": ("linear_cross_entropy", "both"),
    "layer_norm.fwd": ("add_layer_norm", "fwd"),
    "layer_norm.bwd": ("add_layer_norm", "bwd"),
    "causal_attention.fwd": ("causal_attention", "fwd"),
    "causal_attention.dq": ("causal_attention", "bwd"),
    "causal_attention.dkdv": ("causal_attention", "bwd"),
    "causal_attention.short": ("causal_attention", "both"),  # one launch for both directions
}
PERSISTENT = ("gelu_mlp.up", "gelu_mlp.down", "layer_norm.bwd")  # as many programs as a row says


def key_at(name: str, shape: Shape, dtype: torch.dtype, arch: int) -> Key | None:
    """The key that the op asks with; None where it runs another kernel."""
    op, _, kernel = name.partition(".")
    how, D = math_of(dtype), shape.C // shape.H
    if op == "gelu_mlp":
        return gelu_mlp.launch_key(kernel, shape.M, how, arch)
    if op == "linear_cross_entropy":
        return linear_cross_entropy.launch_key(kernel, dtype, arch)
    if op == "layer_norm":  # the residual stream of the case is fp32
        return layer_norm.launch_key(kernel, shape.M, shape.C, torch.float32, arch)
    directions = {"fwd": ("fwd",), "short": ("fwd", "bwd")}.get(kernel, ("bwd",))
    longest = max(causal_attention.short_t(d, dtype.itemsize, D, arch) for d in directions)
    if (longest >= shape.T) != (kernel == "short"):
        return None
    return causal_attention.launch_key(kernel, how, D, shape.T, arch)


def safe_at(name: str, C: int, arch: int) -> Launch | None:
    """Its launch where no row serves."""
    return layer_norm.safe_launch(name[-3:], C, 4) if name[:10] == "layer_norm" else None


def known_launches(name: str, present: Launch, arch: int) -> list[Launch]:
    """The present launch, and those of rows with its blocks or of other widths."""
    found = [launch for layer in reversed(rows()) for key, launch in layer.items() if key.arch != 0]
    found += filter(None, (safe_at(name, 2**k, arch) for k in range(7, 14)))
    names = dict(present.blocks).keys()
    return [present, *(x for x in found if names and dict(x.blocks).keys() == names)]


def axes_of(name: str, present: Launch, arch: int) -> list[list[dict[str, Any]]]:
    """What can be changed of a launch: to the values of known ones, and to those beside its own."""
    known, now = known_launches(name, present, arch), vars(present) | dict(present.blocks)
    values: dict[str, set[int]] = {
        block: {dict(launch.blocks)[block] for launch in known} | {size // 2, size * 2} - {0}
        for block, size in present.blocks
    }
    values["num_warps"] = {launch.num_warps for launch in known} | {4, 8}
    stages = {launch.num_stages for launch in known}
    if len(stages) > 1:  # else it has no loop to pipeline
        values["num_stages"] = stages | {present.num_stages + 1, max(1, present.num_stages - 1)}
    axes = [[{k: v} for v in sorted(found - {now[k]})] for k, found in values.items()]
    limit, programs = present.maxnreg or 0, present.programs_per_sm
    limits = {(launch.maxnreg or 0, launch.programs_per_sm) for launch in known} | {(0, 1)}
    if name in PERSISTENT:
        limits |= {(limit, programs + 1), (0, programs)}
    pairs = sorted(limits - {(limit, programs)})
    return [*axes, [{"maxnreg": regs or None, "programs_per_sm": n} for regs, n in pairs]]


def changed(launch: Launch, change: dict[str, Any]) -> Launch:
    """The launch with some block sizes and fields replaced and all others kept."""
    blocks = tuple((name, change.get(name, size)) for name, size in launch.blocks)
    fields = {name: value for name, value in change.items() if name not in dict(blocks)}
    return replace(launch, blocks=blocks, **fields)


def candidates(name: str, present: Launch, arch: int) -> list[Launch]:
    """What to try, the most promising first; no two of them launch alike."""
    points = itertools.product(*([{}, *axis] for axis in axes_of(name, present, arch)))
    nearest = sorted(points, key=lambda point: sum(map(bool, point)))
    near = (changed(present, {k: v for c in point for k, v in c.items()}) for point in nearest)
    found = {}
    for launch in (*known_launches(name, present, arch), *near):
        programs = launch.programs_per_sm if name in PERSISTENT else 0
        found.setdefault((*launch.kwargs().items(), programs), launch)
    return [*found.values()][1 : 1 + MAX_CANDIDATES]  # the first is the present one


class Trial:
    """An op at one shape, ready to run with any launch of one of its kernels."""

    def __init__(
        self, name: str, shape: Shape, dtype: torch.dtype, device: torch.device, sets: int | None
    ):
        op, mode = KERNELS[name]
        case, self.name, cuda = CASES[op], name, device.type == "cuda"
        fn = ops.find_provider("ours", op, device)
        self.set_bytes = int(case.bytes(shape, dtype.itemsize, mode))
        sets = sets or (timing.num_sets(self.set_bytes, device) if cuda else 1)
        self.stream = timing.capture_stream() if cuda else None
        self.pool: Any = torch.cuda.graph_pool_handle() if cuda else None  # graphs run in turn
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type] # None: no stream to enter
            torch.manual_seed(0)
            inputs = [make_inputs(case, shape, dtype, device, seed) for seed in range(sets)]
            self.calls = [ops.make_call(fn, case, mode, of_set) for of_set in inputs]
        self.want, asked = self.run_with(None)
        self.asked = asked[-1] if asked else None

    def run_with(self, launch: Launch | None) -> tuple[list[Tensor], list[tuple[Key, Launch]]]:
        """Results of one run, and what was asked for meanwhile."""
        with torch.cuda.stream(self.stream), replaced(self.name, launch) as asked:  # type: ignore[arg-type]
            return [t.detach().clone() for t in self.calls[0]() if isinstance(t, Tensor)], asked

    def check(self, launch: Launch) -> None:
        """Run once; ValueError if the results are not those of the present row."""
        found, _ = self.run_with(launch)
        with torch.cuda.stream(self.stream):  # type: ignore[arg-type] # where both were written
            if not same(found, self.want):
                raise ValueError("results differ from the present row's")

    def replay(self, launch: Launch) -> timing.Replay:
        """The op with this launch, checked and ready to be timed."""
        self.check(launch)

        def run(call: timing.Call) -> Any:
            with replaced(self.name, launch):
                return call()

        calls = [partial(run, call) for call in self.calls]
        if self.stream:
            return timing.device_replay(calls, self.set_bytes, self.pool)
        return timing.host_replay(*calls)


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Equal up to rounding of the dtype; summation order differs between tiles."""
    return all(
        ((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-6)).item()
        <= 8 * torch.finfo(b.dtype).eps  # false for NaN too
        for a, b in zip(ours, theirs, strict=True)
    )


def small(shape: Shape) -> Shape:
    """A small one for which Triton compiles the same: it asks whether B * T and T divide by 16."""
    T = shape.T if shape.T <= SMALL_T else SMALL_T + shape.T % 16
    return replace(shape, B=math.gcd(shape.B, 16) if T % 16 else 1, T=T)


def describe(launch: Launch) -> dict[str, Any]:
    """Every field, as JSON holds it; `launch_of` reads it back."""
    return asdict(launch) | {"blocks": dict(launch.blocks)}


def launch_of(described: dict[str, Any]) -> Launch:
    return Launch(**{**described, "blocks": tuple(described["blocks"].items())})


def answer_on(device: torch.device) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A child's side: build one launch, time some in turns, or say what the present one is."""
    held: dict[str, Trial] = {}  # one at a time

    def answer(task: dict[str, Any]) -> dict[str, Any]:
        if not task:
            return {}
        (name, shape, dtype), sets = task["where"], 1 if "build" in task else None
        where = json.dumps([task["where"], sets])
        try:
            if where not in held:
                held.clear()
                held[where] = Trial(name, Shape(**shape), getattr(torch, dtype), device, sets)
            trial = held[where]
            if "build" in task:
                return trial.check(launch_of(task["build"])) or {}
            if "time" not in task:
                return {"asked": trial.asked and [asdict(trial.asked[0]), describe(trial.asked[1])]}
            replays = {str(i): trial.replay(launch_of(x)) for i, x in enumerate(task["time"])}
            if device.type == "cuda":
                timing.spin(device)  # building has left it idle, and its clock low
            timed = timing.interleave(replays, **task["how"])
            return {"samples_ms": [[*timed[i].samples_ms] for i in replays]}
        except Exception as error:  # out of resources, a compiler error, wrong numbers
            if timing.is_fatal(error):
                raise  # the error stays with the device: the child's end is the answer
            return {"error": timing.reason_of(error)}

    return answer


def child_command(device: torch.device) -> list[str]:
    return [sys.executable, "-m", "bench.tune", "--child", device.type]


def search(
    crew: child.Crew, name: str, shape: Shape, dtype: torch.dtype, source: str, end: float,
    limit: int | None = None, others: Sequence[Shape] = (),
) -> TuneRow | str:  # fmt: skip
    """Try candidates until time or they run out: what was found, or in words why nothing was.

    Args:
        source: Where the result will stand, and its date.
        others: Shapes at which a winner must not cost; they ask for the same row.
    """

    kind = str(dtype).removeprefix("torch.")

    def task(at: Shape, **what: Any) -> dict[str, Any]:
        return {"where": [name, asdict(at), kind], **what}

    def timed(at: Shape, launches: Sequence[Launch], how: dict[str, Any]) -> dict[str, Any]:
        return crew.ask(task(at, time=[*map(describe, launches)], how=how))

    now = crew.ask(task(shape))
    if not now.get("asked"):
        return now.get("error", "nothing to tune, the op does not run this kernel here")
    key, present = now["asked"][0], launch_of(now["asked"][1])
    todo = candidates(name, present, key["arch"])[:limit]
    fastest: list[tuple[float, int]] = []
    failures: list[str] = []
    tried, size = 0, BATCH * len(crew.children)
    for start in range(0, len(todo), size):
        batch = todo[start : start + size]
        tasks = [task(small(shape), build=describe(launch)) for launch in batch]
        for i, answer in enumerate(crew.share(tasks, end), start):
            if answer is None or time.monotonic() > end:
                continue
            tried += 1
            answer = answer or timed(shape, [todo[i]], QUICK)
            if "error" in answer:
                failures.append(answer["error"])
            else:
                fastest.append((statistics.median(answer["samples_ms"][0]), i))
    finalists = [present, *(todo[i] for _, i in sorted(fastest)[:FINALISTS])]
    turns = timed(shape, finalists, FINAL)
    taken = [timing.Timing(of) for of in turns.get("samples_ms", [[1.0]])]  # or nothing is faster
    gains = [timing.ratio(taken[0], theirs) for theirs in taken]
    winner = max(range(len(gains)), key=lambda i: gains[i])
    best, gain = finalists[winner], gains[winner]
    pairs = zip(taken[0].samples_ms, taken[winner].samples_ms, strict=True)
    low, high = timing.Timing([a / b for a, b in pairs]).quartiles_ms
    verdict = f"x{gain:.3f} ({low:.3f} to {high:.3f})"
    propose = best != present and timing.gains(taken[0], taken[winner])
    for other in others if propose else ():
        found = timed(other, [present, best], FINAL).get("samples_ms")
        there = timing.ratio(*map(timing.Timing, found)) if found else 0.0
        verdict += f", x{there:.3f} at {other.label}"
        propose = propose and there >= 1 / timing.MIN_GAIN
    text = f"{tried} of {len(todo)} tried, {len(failures)} failed"
    text += f" ({failures[0]})" if failures else ""
    text += f"; {'propose' if propose else 'keep'}: {verdict}"
    figures = f"{taken[0].median_ms:.4g} -> {taken[winner].median_ms:.4g} ms, {shape.label}"
    return TuneRow(
        kernel=name, shape=shape.label, dtype=kind, gain=gain,
        present=describe(present), best=describe(best), propose=propose,
        doubt=turns.get("error", ""),
        more={"text": text, "row": row_text(key, best, f"{source}: {figures}")},
    )  # fmt: skip


def row_text(key: dict[str, Any], launch: Launch, source: str) -> str:
    """A line of launches.toml."""
    blocks = ", ".join(f"{name} = {size}" for name, size in launch.blocks)
    values = [
        key["kernel"].partition(".")[2], key["math"], key["size"], family(key["arch"]),
        key["triton"], launch.num_warps, launch.num_stages, launch.maxnreg or 0,
        launch.programs_per_sm, source,
    ]  # fmt: skip
    words = [json.dumps(value) for value in values]
    return f"[{', '.join([*words[:5], f'{{{blocks}}}', *words[5:]])}],"


def run(
    names: Sequence[str], shapes: Sequence[Shape], device: torch.device, results: record.Results,
    *, seconds: float, deadline: float = math.inf, dtype: torch.dtype = torch.bfloat16,
    limit: int | None = None, jobs: int = 1,
) -> None:  # fmt: skip
    """Every kernel at every shape, each row written and printed as it comes.

    A kernel at a shape has `seconds`, and its share of what is left until `deadline`; it tries
    `limit` candidates at most, and `jobs` children build them.
    """
    todo = [*itertools.product(shapes, names)]
    source = f"{os.path.relpath(results.path)} {results.about['date'].partition(' ')[0]}"
    with child.Crew(child_command(device), jobs, TASK_LIMIT_S) as crew:
        # They start here: on 16 cores that took all the time of the first kernel.
        crew.share([{}] * jobs, math.inf)
        for i, (shape, name) in enumerate(todo):
            left = deadline - time.monotonic()
            if left < 0:
                print(f"tune: no time for the last {len(todo) - i} of {len(todo)}", flush=True)
                return
            end = time.monotonic() + min(seconds, left / (len(todo) - i))
            mine = key_at(name, shape, dtype, 0)
            others = [s for s in shapes if s != shape and key_at(name, s, dtype, 0) == mine]
            found = search(crew, name, shape, dtype, source, end, limit, others)
            if isinstance(found, TuneRow):
                results.add("tune", found)
                row = f"\n{found.more['row']}" if found.propose else ""
                found = f"{found.doubt or found.more['text']}{row}"
            print(f"{name} {shape.label}: {found}", flush=True)


def list_space(names: Sequence[str], shapes: Sequence[Shape], arch: int) -> Iterator[str]:
    """What `run` would try on an arch, which need not be this machine's."""
    for shape, name in itertools.product(shapes, names):
        here = f"{name} {shape.label}"
        key = key_at(name, shape, torch.bfloat16, arch)
        if key is None:
            yield f"{here}: not asked on sm_{arch}"
            continue
        present = launch_for(key, safe_at(name, shape.C, arch))
        yield f"{here}: {len(candidates(name, present, arch))} candidates"
        yield f"    now  {_words(dict(present.blocks) | asdict(present))}"
        for axis in filter(None, axes_of(name, present, arch)):
            yield f"    or   {'; '.join(map(_words, axis))}"


def _words(change: dict[str, Any]) -> str:
    return " ".join(f"{k} {v}" for k, v in change.items() if k not in ("blocks", "source"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.tune", __doc__)
    known = list(dict.fromkeys(op for op, _ in KERNELS.values()))
    parser.add_argument("--op", action="append", default=[], choices=known)
    parser.add_argument("--shape", action="append", default=[], type=cli.shape, help="b<B>t<T>")
    parser.add_argument("--seconds", type=cli.amount, default=60.0, help="of a kernel and a shape")
    parser.add_argument("--minutes", type=cli.amount, help="of all, shared among the kernels")
    parser.add_argument("--limit", type=cli.count, help="candidates per kernel and shape, at most")
    parser.add_argument("--jobs", type=cli.count, default=max(1, (os.cpu_count() or 1) - 2),
                        help="children that build; default: cores less two")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="say what would be tried; needs no GPU")
    parser.add_argument("--arch", type=int, default=90, help="of --list; default: 90")
    cli.add_output(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child.serve("ready", answer_on(torch.device(args.child)))
        return
    names = [name for name, (op, _) in KERNELS.items() if not args.op or op in args.op]
    shapes = args.shape or [Shape(64, 1024), Shape(16, 64)]
    if args.list:
        print(*list_space(names, shapes, args.arch), sep="\n")
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "tune: launch rows are chosen by time on a GPU; there is none here, only --list works"
        )
    device = torch.device("cuda")
    end = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    run(
        names, shapes, device, record.Results(device, args.out, args.commit), deadline=end,
        seconds=math.inf if args.minutes else args.seconds, limit=args.limit, jobs=args.jobs,
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
