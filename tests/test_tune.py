"""bench.tune: what it tries, what it survives, and the row it proposes."""

import json
import math
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from bench import ops, record, tune
from bench.cases import Shape
from bench.rows import TuneRow
from bench.tune import KERNELS, candidates, describe, key_at, launch_of, row_text, safe_at
from kernels import TRITON, _launch, gelu_mlp
from kernels._launch import Launch, candidates_for, launch_for
from kernels._op import INTERPRETED
from tests.pretend_cuda import pretend_cuda
from training import child, timing

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
LARGE, SEED = Shape(64, 1024), Shape(16, 64)
NORM = "layer_norm.fwd"
by_name = pytest.mark.parametrize("name", KERNELS)


@pytest.fixture
def interpreted(monkeypatch):
    """`ours` as on a GPU: the Triton ops, here in the interpreter."""
    if not INTERPRETED:
        pytest.skip("kernels on CPU tensors")
    monkeypatch.setattr(ops, "parse_ops", lambda spec: TRITON)


def tiny(name, B=1):
    """A shape at which the kernel is asked: at D = 128 in fp32, loops begin at T = 17."""
    if name.startswith("causal_attention"):
        return Shape(B, 16 if name.endswith("short") else 18, C=128, H=1)
    return Shape(B, 4, C=64, H=2, V=256)


def present(name, shape=LARGE, arch=90, dtype=BF16):
    key = key_at(name, shape, dtype, arch)
    assert key is not None
    return launch_for(key, safe_at(name, shape.C, arch))


def has(found, **wanted):
    """Whether one has all these block sizes and fields."""
    return any(wanted.items() <= (vars(c) | dict(c.blocks)).items() for c in found)


@by_name
def test_a_candidate_reaches_every_kernel(name, monkeypatch, interpreted):
    """It is launched in place of the present row, gives the same results, and nothing stays."""
    launched = []
    kwargs = Launch.kwargs
    monkeypatch.setattr(Launch, "kwargs", lambda self: (launched.append(self), kwargs(self))[1])
    shape = tiny(name)
    trial = tune.Trial(name, shape, FP32, CPU, 1)
    assert trial.asked is not None
    key, now = trial.asked
    assert key == key_at(name, shape, FP32, 0)  # asked without a device: the same
    assert now == present(name, shape, 0, FP32)
    outer, inner = ("BLOCK_N", "BLOCK_M") if name.endswith("dkdv") else ("BLOCK_M", "BLOCK_N")
    candidate = next(
        c for c in candidates(name, now, 0)
        if "attention" not in name or "short" in name
        or dict(c.blocks)[outer] % dict(c.blocks)[inner] == 0
    )  # fmt: skip
    launched.clear()
    trial.check(candidate)
    assert candidate in launched
    launched.clear()
    trial.calls[0]()
    assert now in launched
    assert candidate not in launched


def test_kernels_that_do_not_run_are_not_asked(interpreted):
    for name, shape in (
        ("causal_attention.fwd", tiny("causal_attention.short")),
        ("causal_attention.short", tiny("causal_attention.fwd")),
    ):
        assert key_at(name, shape, FP32, 0) is None
        assert tune.Trial(name, shape, FP32, CPU, 1).asked is None


@by_name
@pytest.mark.parametrize("arch", [80, 90])
def test_known_rows_come_first_and_no_two_launch_alike(name, arch):
    shape = LARGE if key_at(name, LARGE, BF16, arch) else SEED
    now = present(name, shape, arch)
    found = candidates(name, now, arch)
    known = [x for x in tune.known_launches(name, now, arch)[1:] if x in found]
    assert found[: len(dict.fromkeys(known))] == [*dict.fromkeys(known)]
    assert now not in found
    assert 0 < len({*found}) == len(found) <= tune.MAX_CANDIDATES


def test_the_search_has_what_is_likely():
    for kernel in ("up", "down"):
        found = candidates(f"gelu_mlp.{kernel}", present(f"gelu_mlp.{kernel}"), 90)
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8}
        for stages in (3, 4):
            assert has(found[:2], **tile, num_stages=stages)  # of [candidates]
        assert {(128, 2), (None, 1), (168, 3)} <= {(c.maxnreg, c.programs_per_sm) for c in found}
    for kernel in ("fwd", "dq", "dkdv"):
        name = f"causal_attention.{kernel}"
        found = candidates(name, present(name), 90)
        assert {c.num_stages for c in found} >= {2, 3, 4}
        key = key_at(name, LARGE, BF16, 90)
        assert key
        assert {*candidates_for(key)} - {present(name)} <= {*found[:4]}
    for mode in ("fwd", "bwd"):
        found = candidates(f"layer_norm.{mode}", present(f"layer_norm.{mode}"), 90)
        assert {dict(c.blocks)["BLOCK_C"] for c in found} >= {128, 256, 512, 1024}
        assert len({c.programs_per_sm for c in found}) == (1 if mode == "fwd" else 3)


def test_the_printed_text_is_a_row_that_gives_the_launch():
    best = Launch((("BLOCK_M", 64), ("BLOCK_N", 32)), 4, 3, maxnreg=168, programs_per_sm=3)
    for launch in (best, replace(best, maxnreg=None), Launch((), 8)):
        assert launch_of(json.loads(json.dumps(describe(launch)))) == launch
        key = gelu_mlp.launch_key("up", 65536, "16-bit", 103)
        pasted = row_text(asdict(key), launch, 'h100.json 2026-01-02: 1.5 -> 1.25 ms, B=1 "')
        measured, *_ = _launch.read_rows(f"[measured]\ngelu_mlp = [\n{pasted}\n]")
        [(found, read)] = measured.items()
        assert found.serves(key)
        assert read == launch
        assert read.source == 'h100.json 2026-01-02: 1.5 -> 1.25 ms, B=1 "'


class Crew(child.Crew):
    """One child, in this process; times by hand, 1 ms where none is given."""

    def __init__(self, ms=None):
        super().__init__([], 1, 1.0)
        self.ms, self.answer = ms or {}, tune.answer_on(CPU)

    def ask(self, task, who=0):
        if "time" not in task or not self.ms:
            return self.answer(task)
        shape = Shape(**task["where"][1]).label
        samples = [self.ms.get((shape, launch_of(x)), [1.0]) for x in task["time"]]
        return {"samples_ms": [(of * 8)[:8] for of in samples]}

    def share(self, tasks, until):
        return [self.ask(task) for task in tasks]  # a pretended device is of one thread


def searched(crew, name=NORM, shape=None, **how) -> TuneRow:
    row = tune.search(crew, name, shape or tiny(name), FP32, "a file", math.inf, **how)
    assert isinstance(row, TuneRow), row
    return row


@pytest.mark.slow
@by_name
def test_every_kernel_gets_a_row(name, interpreted):
    row = searched(Crew(), name, limit=2)
    assert "failed; " not in row.more["text"] or " 0 failed" in row.more["text"]
    assert launch_of(row.present) == present(name, tiny(name), 0, FP32)


def test_wrong_candidates_are_thrown_out(monkeypatch, interpreted):
    crew = Crew()
    monkeypatch.setattr(tune, "same", lambda ours, theirs: False)
    row = searched(crew, limit=2)
    why = "ValueError: results differ from the present row's"
    assert row.more["text"].startswith(f"2 of 2 tried, 2 failed ({why})")
    assert not row.propose
    assert row.best == row.present
    monkeypatch.undo()
    x = torch.tensor([1.0, 2.0])
    assert tune.same([x], [x * (1 + 1e-7)])
    assert not tune.same([x], [x * 1.001])
    assert not tune.same([x], [x * float("nan")])


def test_a_gain_is_proposed_where_it_costs_nowhere(interpreted):
    here, there = tiny(NORM), tiny(NORM, B=2)
    slower, _, good = candidates(NORM, present(NORM, here, 0, FP32), 0)[:3]
    ms = {(here.label, slower): [2.0], (here.label, good): [0.5]}

    def proposed(**how):
        return searched(Crew(ms), others=[there], **how)

    row = proposed()
    assert (row.propose, row.gain) == (True, 2.0)
    assert launch_of(row.best) == good
    assert row.more["text"].endswith("propose: x2.000 (2.000 to 2.000), x1.000 at B=2 T=4 C=64")
    assert '"a file: 1 -> 0.5 ms, B=1 T=4 C=64"' in row.more["row"]
    assert not proposed(limit=2).propose  # the good one is the third

    ms[there.label, good] = [1.1]
    row = proposed()
    assert not row.propose
    assert row.more["text"].endswith("keep: x2.000 (2.000 to 2.000), x0.909 at B=2 T=4 C=64")
    del ms[there.label, good]
    ms[here.label, good] = [0.7, 0.7, 1.3, 1.3]  # half of the turns are lost
    assert not proposed().propose
    ms[here.label, good] = [0.99]
    assert not proposed().propose


CHILD = f"""
import os, time
from multiprocessing.connection import Connection
pipe = Connection(int(os.environ["{child.PIPE}"]))
pipe.send("ready")
while True:
    task = pipe.recv()
    if "die" in task: print("illegal access", flush=True); os._exit(3)
    if "hang" in task: time.sleep(600)
    pipe.send({{"error": "wrong"}} if "bad" in task else {{}})
"""


def test_a_child_that_dies_or_hangs_costs_only_its_candidate():
    with child.Crew([sys.executable, "-S", "-E", "-c", CHILD], 2, 10.0) as crew:
        tasks = ["a", "die", "b", "hang", "c", "bad", "d", "die", "e"]
        answers = crew.share(tasks, time.monotonic() + 600)
        assert crew.share(["f"], time.monotonic() - 1) == [None]  # no time left
        assert crew.ask("g") == {}
    died = {"error": "it ended with 3: illegal access"}
    late = {"error": "no answer in 10 s: nothing said"}
    assert answers == [{}, died, {}, late, {}, {"error": "wrong"}, {}, died, {}]


@pytest.mark.parametrize("shape", [LARGE, SEED, Shape(3, 17), Shape(16, 17), Shape(32, 1000)])
def test_a_small_shape_compiles_alike(shape):
    """Triton specialises on multiples of 16; attention's kernel depends on T."""
    found = tune.small(shape)
    assert found.M <= 16 * tune.SMALL_T + 256
    assert (found.M % 16 == 0, found.T % 16 == 0) == (shape.M % 16 == 0, shape.T % 16 == 0)
    for name in KERNELS:
        asked = [key_at(name, s, BF16, 90) is None for s in (found, shape)]
        assert asked[0] == asked[1]


def test_the_space_can_be_seen_without_a_gpu(capsys):
    tune.main(["--list", "--arch", "90"])
    lines = capsys.readouterr().out.splitlines()
    for shape in (LARGE, SEED):
        for name in KERNELS:
            [line] = [x for x in lines if x.startswith(f"{name} {shape.label}: ")]
            assert ("candidates" in line) == (key_at(name, shape, BF16, 90) is not None)
    tune.main(["--list", "--op", "gelu_mlp", "--shape", "b8t1024"])
    lines = capsys.readouterr().out.splitlines()
    assert "now  BLOCK_M 128 BLOCK_N 128" in lines[1]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is none here, only --list works"):
            tune.main([])


def test_a_run_on_a_pretended_gpu(tmp_path, monkeypatch, capsys, interpreted):
    """From the crew to the result file and the printed row."""
    monkeypatch.setattr(timing, "MIN_GRAPH_CALLS", 2)
    monkeypatch.setattr(timing, "num_sets", lambda *_: 1)
    monkeypatch.setattr(timing, "spin", lambda device: None)
    monkeypatch.setattr(tune, "FINAL", {"rounds": 2, "seconds": 1.0})
    monkeypatch.setattr(child, "Crew", lambda *_: Crew())
    _launch.arch.cache_clear()  # of no pretended device, neither before nor after
    same, compared_on = tune.same, []

    def compare(*results):
        compared_on.append(torch.cuda.current_stream())
        return same(*results)

    monkeypatch.setattr(tune, "same", compare)
    with pretend_cuda() as pretended:
        device = torch.device("cuda")
        results = record.Results(device, tmp_path, commit="c" * 40)
        names, shapes = [NORM, "causal_attention.fwd"], [Shape(1, 2, C=32, H=2)]
        monkeypatch.setattr(tune, "answer_on", lambda _, answer=tune.answer_on: answer(device))
        tune.run(names, shapes, device, results, seconds=60.0, limit=2)
        tune.run(names, shapes, device, results, seconds=60.0, deadline=0.0)
        # The results are still being written on their stream; another would read too early.
        assert compared_on
        assert pretended.current not in compared_on
    _launch.arch.cache_clear()
    [row] = record.load(results.path).rows("tune")
    assert (row.kernel, row.dtype) == (NORM, "bfloat16")
    assert launch_of(row.present) == present(NORM, shapes[0], 0)
    out = capsys.readouterr().out
    assert "causal_attention.fwd B=1 T=2 C=32: nothing to tune" in out
    assert "2 of 2 tried, 0 failed" in out
    assert "tune: no time for the last 2 of 2" in out
