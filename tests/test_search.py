"""The search for launch rows: what it tries, what it survives, and which rows it finds."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import OPS, _launch, causal_attention, gelu_mlp, layer_norm
from kernels._launch import Key, Launch, candidates_for, launch_for, read_rows
from kernels._op import INTERPRETED
from model import GPTConfig
from model.config import MODELS
from tests import tuned
from tests.pretend_cuda import Pretended
from tests.tuned import CPU, H100, RECIPE
from training import choose, search, timing, trials
from training.distributed import ALONE
from training.plan import Choices, Plan, make_plan
from training.recipes import Recipe
from training.search import PERSISTENT, candidates, row_text
from training.step import start_process

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="pretends a GPU; needs the interpreter")
NORM = "layer_norm.fwd"
# At D = 128 in fp32 the loops of attention begin at T = 17.
SHORT = replace(RECIPE, batch_size=1)
LOOPS, TINY = replace(SHORT, block_size=18), replace(SHORT, block_size=4, model="smoke,n_embd=64")
LARGE = {name: gelu_mlp.launch_key(name, 65536, "16-bit", 90) for name in ("up", "down")}
for name in ("fwd", "dq", "dkdv"):
    LARGE[name] = causal_attention.launch_key(name, "16-bit", 64, 1024, 90)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(block_size=18, vocab_size=250, n_layer=1, n_head=1, n_embd=128)
    monkeypatch.setitem(MODELS, "smoke", config)
    trials.calls_by_kernels.cache_clear()


def plan_of(**asked: Any) -> Plan:
    return tuned.plan_of(CPU, LOOPS, **{"ops": "triton", **asked})


def listed(op: str, recipe: Recipe, plan: Plan) -> list[tuple[Key, Launch]]:
    return trials.answer(partial(trials.list_launches, op, recipe, plan))["launches"]


def has(found: list[Launch], **wanted: Any) -> bool:
    """Whether one has all these block sizes and fields."""
    return any(wanted.items() <= (vars(c) | dict(c.blocks)).items() for c in found)


def can_run(key: Key, launch: Launch) -> bool:
    """Whether blocks of attention divide one another as its loops need them."""
    blocks = dict(launch.blocks)
    if not key.kernel.startswith("causal_attention") or not {"BLOCK_M", "BLOCK_N"} <= blocks.keys():
        return True
    down = blocks["BLOCK_M"] % blocks["BLOCK_N"], blocks["BLOCK_N"] % blocks["BLOCK_M"]
    return down["dkdv" in key.kernel] == 0


def test_a_candidate_reaches_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces the present row for a trial only, and gives the same results."""
    launched: list[Launch] = []
    kwargs = Launch.kwargs
    monkeypatch.setattr(Launch, "kwargs", lambda self: (launched.append(self), kwargs(self))[1])
    plan, seen, now, candidate = plan_of(), set(), None, None
    for recipe, ops in ((TINY, OPS), (LOOPS, ["causal_attention"])):
        for op in ops:
            for key, now in listed(op, recipe, plan):
                if key.kernel in seen:
                    continue
                candidate = next(x for x in candidates(key.kernel, now) if can_run(key, x))
                launched.clear()
                task = partial(trials.try_launches, op, key.kernel, [candidate], {}, recipe, plan)
                assert trials.answer(task) == {}
                assert candidate in launched
                seen.add(key.kernel)
            launched.clear()
            trials.calls_by_kernels(op, recipe, plan, False)[0][0]()
            assert now in launched
            assert candidate not in launched
    rows = "embedding.fwd", "embedding.sums", "linear_cross_entropy.rows"
    attention = (f"causal_attention.{k}" for k in ("fwd", "dq", "dkdv", "short"))
    assert seen >= {*PERSISTENT, NORM, *rows, *attention, *search.BRIEF}


def test_other_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    [(_, now), *_] = listed("layer_norm", TINY, plan)
    monkeypatch.setattr(trials, "same", lambda ours, theirs: False)
    task = partial(trials.try_launches, "layer_norm", NORM, [now], {}, TINY, plan)
    found = trials.answer(task)
    assert found == {"error": "ValueError: results differ from the present row's"}
    monkeypatch.undo()
    x = torch.tensor([1.0, 2.0])
    assert trials.same([x], [x * (1 + 1e-7)])
    assert not trials.same([x], [x * 1.001])
    assert not trials.same([x], [x * float("nan")])


@pytest.mark.parametrize(
    "key", [*LARGE.values(), gelu_mlp.launch_key("up", 64, "tf32", 80)], ids=str
)
def test_known_rows_come_first_and_no_two_launch_alike(key: Key) -> None:
    now = launch_for(key)
    found = candidates(key.kernel, now)
    known = [x for x in search.known_launches(now)[1:] if x in found]
    assert found[: len(dict.fromkeys(known))] == [*dict.fromkeys(known)]
    assert now not in found
    assert 0 < len({*found}) == len(found) <= search.MAX_CANDIDATES


def test_the_search_has_what_is_likely() -> None:
    for kernel in ("up", "down"):
        found = candidates(f"gelu_mlp.{kernel}", launch_for(LARGE[kernel]))
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8}
        for stages in (3, 4):
            assert has(found[:2], **tile, num_stages=stages)  # of [candidates]
        assert {(128, 2), (None, 1), (168, 3)} <= {(c.maxnreg, c.programs_per_sm) for c in found}
    for kernel in ("fwd", "dq", "dkdv"):
        found = candidates(f"causal_attention.{kernel}", launch_for(LARGE[kernel]))
        assert {c.num_stages for c in found} >= {2, 3, 4}
        waiting = {*candidates_for(LARGE[kernel])} - {launch_for(LARGE[kernel])}
        assert waiting <= {*found[:4]}
    for mode in ("fwd", "bwd"):
        found = candidates(f"layer_norm.{mode}", layer_norm.safe_launch(mode, 768, 4))
        assert len({dict(c.blocks)["BLOCK_C"] for c in found}) >= 2
        assert mode == "fwd" or len({c.programs_per_sm for c in found}) >= 3


def test_a_row_is_one_of_the_file_and_serves_once_laid_over() -> None:
    best = Launch((("BLOCK_M", 64), ("BLOCK_N", 32)), 4, 3, maxnreg=168, programs_per_sm=3)
    key = gelu_mlp.launch_key("up", 65536, "16-bit", 103)
    present = launch_for(key)
    for launch in (best, replace(best, maxnreg=None), Launch((), 8)):
        row = row_text(key, launch, 'a card, 2026-01-02: 1.5 -> 1.25 ms, B=1 "')
        text = f"[measured]\ngelu_mlp = [\n{row}\n]"
        [(found, read)] = read_rows(text)[0].items()
        assert found.serves(key)
        assert (read, read.source) == (launch, 'a card, 2026-01-02: 1.5 -> 1.25 ms, B=1 "')
        start_process(plan_of(), 0)
        start_process(replace(plan_of(), launches=text), 0)
        assert launch_for(key) == launch
    start_process(plan_of(), 0)
    assert launch_for(key) == present
    with pytest.raises(ValueError, match=r"^launch rows: measured, gelu_mlp"):
        _launch.lay_over("[measured]\ngelu_mlp = [[1]]")
    assert launch_for(key) == present


class Crew(tuned.Crew):
    """Answers with the times in `ms`, or 1 ms for other launches."""

    ms: dict[Launch, list[float]] = {}  # noqa: RUF012
    tried: list[Launch] = []  # noqa: RUF012

    def ask(self, task: Any, *_: Any) -> dict[str, Any]:
        if task.func is trials.try_launches and task.args[3]:
            launches: Any = task.args[2]
            self.tried.extend(launches)
            return {"ms": [(self.ms.get(x, [1.0]) * 8)[:8] for x in launches]}
        return trials.answer(task)

    def share(self, tasks: Any, limit_s: float, until: float = math.inf) -> list[Any]:
        late = {"error": "no time left"}
        return [self.ask(task) if time.monotonic() < until else late for task in tasks]


def test_the_fastest_meet_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.child, "Crew", Crew)
    monkeypatch.setattr(search, "MAX_CANDIDATES", 3)
    plan = plan_of(ops="eager,layer_norm=triton")
    recipe = TINY
    [(key, now), *_] = listed("layer_norm", recipe, plan)
    slower, _, good = candidates(NORM, now)
    Crew.ms, Crew.tried = {slower: [2.0], good: [0.5]}, []

    def rows() -> str:
        ms = search.time_launches(recipe, plan, CPU, 600.0)
        assert {*ms} == {NORM, "layer_norm.bwd"}
        assert next(iter(ms[NORM].values())) == [1.0] * 8  # the present one
        assert len(ms[NORM]) == 4
        return choose.launch_rows(ms)

    text = rows()
    assert read_rows(text)[0][key] == good
    [row] = [line for line in text.splitlines() if "fwd" in line]
    assert '"a CPU, 20' in row
    assert ', B=1 T=4: layer_norm 1 -> 0.5 ms"],' in row
    # It loses half of the turns; the gain is too small; it cannot be timed.
    for few in ([0.7, 0.7, 1.3, 1.3], [0.99], [math.nan]):
        Crew.ms = {good: few}
        assert rows() == ""
    Crew.tried.clear()
    ms = search.time_launches(recipe, plan, CPU, -1.0)  # no time: only the present rows
    assert [[*of.values()] for of in ms.values()] == [[[1.0] * 8]] * 2


@pytest.mark.parametrize(
    ("device", "cores", "gib", "count"),
    [("cpu", 128, 8, 1), ("cuda", 16, 80, 14), ("cuda", 128, 24, 8), ("cuda", 2, 1, 1)],
)
def test_a_card_has_room_for_the_children(
    device: str, cores: int, gib: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a CUDA context; beside all of them one times an op at the run's shapes."""
    counts: list[int] = []

    def crew(_: Any, count: int) -> Any:
        counts.append(count)
        return nullcontext(SimpleNamespace(ask=lambda *_: {}))

    monkeypatch.setattr(search.child, "Crew", crew)
    monkeypatch.setattr(search, "num_cores", lambda: cores)
    plan = replace(plan_of(ops="eager,layer_norm=triton"), device=device)
    search.time_launches(RECIPE, plan, replace(CPU, memory_bytes=gib << 30), 600.0)
    assert counts == [count]


@pytest.mark.parametrize("size", [(64, 1024), (16, 64), (3, 17), (16, 17), (32, 1000)])
def test_a_small_shape_compiles_alike(size: tuple[int, int]) -> None:
    """Triton specialises on multiples of 16; attention's kernel depends on T."""
    recipe = replace(RECIPE, block_size=size[1], model="smoke,block_size=1024")
    plan = replace(plan_of(), micro_batch_size=size[0])
    less, fewer = search.small(recipe, plan)
    (B, T), (b, t) = size, (fewer.micro_batch_size, less.block_size)
    assert b * t <= 16 * search.SMALL_T + 256
    assert (b * t % 16 == 0, t % 16 == 0) == (B * T % 16 == 0, T % 16 == 0)
    longest = causal_attention.short_t(2, 64, 90)
    assert (t <= longest) == (longest >= T)


def test_launches_are_timed_on_a_pretended_gpu(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(make_plan(SHORT, H100, Choices(ops="triton", dtype="fp32")), micro_batch_size=1)
    compared_on: list[Any] = []
    same = trials.same

    def compare(*results: Any) -> bool:
        compared_on.append(pretended.current)
        return same(*results)

    monkeypatch.setattr(trials, "same", compare)
    [(_, now), *_] = listed("layer_norm", SHORT, plan)
    launches = [now, candidates(NORM, now)[0]]
    how = {"rounds": 2, "seconds": 600.0}
    found = trials.answer(
        partial(trials.try_launches, "layer_norm", NORM, launches, how, SHORT, plan)
    )
    # Another stream would read the results while they are still being written.
    assert {*map(id, compared_on)} == {id(timing.capture_stream())}
    assert pretended.current is not timing.capture_stream()
    assert [len(ms) for ms in found["ms"]] == [2, 2]
    assert len(pretended.graphs) == 2


def test_make_tune_finds_checks_keeps_and_lays_over_a_row_on_a_pretended_gpu(
    pretended, monkeypatch, capsys, tmp_path
):
    """The whole way from the kernels that a run launches to the rows its step then uses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(search.child, "Crew", Crew)
    monkeypatch.setattr(search, "MAX_CANDIDATES", 1)
    monkeypatch.setitem(trials.NUM_RERUNS, "cuda", 0)
    steps: list[dict[str, Plan]] = []

    def time_steps(plans: dict[str, Plan], *_: Any) -> Any:
        steps.append(plans)
        return {name: [1.0] * 4 for name in plans}, {}

    monkeypatch.setattr(choose, "_time_steps", time_steps)
    asked = Choices(ops="eager,layer_norm=triton", optimizer="torch", dtype="fp32", tune="only")

    def make(choices: Choices) -> Plan:
        return make_plan(TINY, H100, choices)

    [(key, now), *_] = listed("layer_norm", TINY, make(asked))
    [best] = candidates(NORM, now)
    Crew.ms, Crew.tried = {best: [0.5]}, []
    found = choose.take_fastest(make, asked, make(asked), TINY, H100, ALONE)
    again = replace(asked, tune="auto")
    later = choose.take_fastest(make, again, make(again), TINY, H100, ALONE)
    start_process(later, 0)
    assert launch_for(key) == best
    start_process(make(asked), 0)
    assert launch_for(key, now) == now  # no row serves it
    said = capsys.readouterr().out
    # The two kernels have the same present row.
    rows = {key: best, replace(key, kernel="layer_norm.bwd"): best}
    assert read_rows(found.launches)[0] == rows
    assert found.launches in said
    assert "kernels: 1 ops checked on NVIDIA H100 80GB HBM3 in " in said
    assert steps[0][choose.COMMITTED].launches == ""
    assert steps[0][choose.AS_CHOSEN].launches == found.launches == later.launches
