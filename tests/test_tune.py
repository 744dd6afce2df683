"""bench.tune: what it tries, what it leaves out, what it survives, and the row it proposes."""

import json
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch

from bench import ops, record, timing, tune
from bench.cases import Shape, find_shape
from bench.tune import KNOBS, changed, find_knob, launch_of, plan, source_of, why_pruned
from kernels import TRITON, _launch, gelu_mlp
from kernels._launch import Launch
from kernels._op import INTERPRETED
from tests.pretend_cuda import pretend_cuda

CPU = torch.device("cpu")
LARGE, SEED = find_shape("b64t1024"), find_shape("b16t64")
ARCHS = (80, 86, 89, 90, 100, 103, 120)
by_label = pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.label)
NORM = find_knob("layer_norm.fwd")


@pytest.fixture
def interpreted(monkeypatch):
    """`ours` as on a GPU: the Triton ops, here in the interpreter."""
    if not INTERPRETED:
        pytest.skip("kernels on CPU tensors")
    monkeypatch.setattr(ops, "parse_ops", lambda spec: TRITON)


def tiny(knob, B=1):
    """A shape at which the knob's kernel is asked: at D = 128 in fp32, loops begin at T = 17."""
    if knob.op == "causal_attention":
        return Shape(B, 16 if knob.label.endswith("short") else 18, C=128, H=1)
    return Shape(B, 4, C=64, H=2, V=256)


def plan_on(knob, shape=LARGE, arch=90):
    return plan(knob, knob.launch(shape, 2, arch), shape, 2, arch)


def has(candidates, **wanted):
    """Whether one has all these block sizes and fields."""
    return any(wanted.items() <= (vars(c) | dict(c.blocks)).items() for c in candidates)


@by_label
def test_a_candidate_reaches_every_kernel(knob, monkeypatch, interpreted):
    """It is launched in place of the present row, and gives the same results."""
    launched = []
    kwargs = Launch.kwargs
    monkeypatch.setattr(Launch, "kwargs", lambda self: (launched.append(self), kwargs(self))[1])
    shape = tiny(knob)
    trial = tune.Trial(knob, shape, torch.float32, CPU)
    assert trial.present == knob.launch(shape, 4, arch=0)  # asked without a device: the same
    assert knob.asked(shape, 4, 0)
    candidate = plan(knob, trial.present, shape, 4, 0).candidates[0]
    assert trial.present in launched
    assert candidate not in launched
    launched.clear()
    trial.check(candidate)
    assert candidate in launched
    launched.clear()
    trial.calls[0]()
    assert trial.present in launched  # nothing stays patched
    assert candidate not in launched


def test_kernels_that_do_not_run_are_not_asked(interpreted):
    for label, shape in (
        ("causal_attention.fwd", tiny(find_knob("causal_attention.short"))),
        ("causal_attention.short", tiny(find_knob("causal_attention.fwd"))),
    ):
        assert not find_knob(label).asked(shape, 4, 0)
        with pytest.raises(tune.NotAsked, match="does not run this kernel at B=1"):
            tune.Trial(find_knob(label), shape, torch.float32, CPU)


@pytest.mark.parametrize("label", ["gelu_mlp.up", "gelu_mlp.down"])
def test_candidates_keep_the_register_limit_and_the_programs(label):
    present = find_knob(label).launch(LARGE, 2, 90)
    assert (present.maxnreg, present.programs_per_sm) == (128, 2)
    found = plan_on(find_knob(label)).candidates
    limits = {(c.maxnreg, c.programs_per_sm) for c in found}
    assert limits == {(128, 2), (None, 1), (168, 3), (None, 2)}
    tile = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8}
    assert has(found, **tile, num_stages=2, maxnreg=128, programs_per_sm=2)
    assert has(found, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3)
    assert all(dict(c.blocks)["GROUP_M"] == 8 for c in found)


def test_the_search_has_what_is_likely():
    logits = plan_on(find_knob("linear_cross_entropy.logits")).candidates
    for group in (8, 16):
        assert has(logits[:6], BLOCK_M=128, BLOCK_N=256, num_stages=3, GROUP_M=group)
        assert has(logits[:6], BLOCK_N=128, num_warps=8, num_stages=3, maxnreg=128, GROUP_M=group)
    assert find_knob("linear_cross_entropy.logits").mode == "both"  # GRAD=True, as trained
    for kernel in ("fwd", "dq", "dkdv"):
        found = plan_on(find_knob(f"causal_attention.{kernel}")).candidates
        assert {c.num_stages for c in found} == {2, 3, 4}
    short = plan_on(find_knob("causal_attention.short"), SEED)
    assert {c.num_warps for c in (short.present, *short.candidates)} == {4, 8}
    for mode in ("fwd", "bwd"):
        found = plan_on(find_knob(f"layer_norm.{mode}")).candidates
        assert {dict(c.blocks)["BLOCK_C"] for c in found} == {128, 256, 512, 1024}


@by_label
@pytest.mark.parametrize("arch", [80, 90])
def test_likely_candidates_come_first_and_none_twice(knob, arch):
    shape = LARGE if knob.asked(LARGE, 2, arch) else SEED
    found = plan_on(knob, shape, arch)
    axes = knob.axes(shape)

    def distance(launch):
        """Axes whose values are not the present row's."""
        fields = vars(launch) | dict(launch.blocks)
        before = vars(found.present) | dict(found.present.blocks)
        return sum(any(fields[k] != before[k] for k in axis[0]) for axis in axes)

    rest = [
        c
        for c in found.candidates
        if replace(c, source=found.present.source)
        not in {changed(found.present, change) for change in knob.first}
    ]
    assert [distance(c) for c in rest] == sorted(map(distance, rest))
    assert len({*found.candidates}) == len(found.candidates)
    assert found.present not in {replace(c, source=found.present.source) for c in found.candidates}
    assert 0 < len(found.candidates) < 300


@by_label
def test_pruning_spares_the_rows_in_use(knob):
    shapes = [LARGE, SEED, Shape(8, 4096), Shape(1, 16)]
    shapes += [Shape(4, 256, C=C, H=H) for C, H in ((768, 6), (768, 24), (768, 48), (1600, 25))]
    if knob.op == "add_layer_norm":
        shapes += [Shape(4, 256, C=C) for C in (64, 384, 1024, 6400, 8192)]
    for arch in ARCHS:
        for shape in shapes:
            for itemsize in (2, 4):
                if knob.asked(shape, itemsize, arch):
                    launch = knob.launch(shape, itemsize, arch)
                    why = why_pruned(knob, launch, shape, itemsize, arch)
                    assert why == "", f"{knob.label} {shape} {itemsize} sm_{arch}: {launch}"


def test_pruning_spares_every_row_of_the_gemms():
    for key, row in _launch.rows()[1].items():
        for label in ("gelu_mlp.up", "linear_cross_entropy.logits"):
            if key.arch and key.kernel in (label, label.partition(".")[0] + ".any"):
                arch = 120 if key.arch == "any" else int(key.arch)
                itemsize = 2 if key.math == "16-bit" else 4
                assert why_pruned(find_knob(label), row, LARGE, itemsize, arch) == "", key


@pytest.mark.parametrize(
    ("label", "change", "arch", "why"),
    [
        ("gelu_mlp.up", {"BLOCK_M": 256, "BLOCK_N": 256}, 90, "registers"),  # 256 sums a thread
        ("gelu_mlp.up", {"num_warps": 4}, 90, "registers"),  # 128 sums, a limit of 128
        # Two of 3 * (128 + 256) * 64 * 2 = 144 KB do not fit in 228 KB.
        ("gelu_mlp.up", {"BLOCK_N": 256, "maxnreg": 168}, 90, "no room for 2 programs on an SM"),
        ("gelu_mlp.up", {"BLOCK_N": 64, "maxnreg": 168, "programs_per_sm": 3}, 90,
         "no room for 3 programs on an SM"),  # registers: 3 * 256 * 168
        # 4 * (128 + 256) * 64 * 2 = 192 KB, one buffer less on sm_80 and 86.
        ("linear_cross_entropy.logits",
         {"BLOCK_N": 256, "num_stages": 4, "num_warps": 8}, 90, ""),
        ("linear_cross_entropy.logits",
         {"BLOCK_N": 256, "num_stages": 4, "num_warps": 8}, 80, ""),
        ("linear_cross_entropy.logits",
         {"BLOCK_N": 256, "num_stages": 4, "num_warps": 8, "BLOCK_M": 128, "BLOCK_K": 64}, 86,
         "shared memory"),
        ("causal_attention.fwd", {"BLOCK_M": 64, "BLOCK_N": 128}, 90,
         "BLOCK_N does not divide BLOCK_M"),
        ("causal_attention.dkdv", {"BLOCK_M": 128, "BLOCK_N": 64}, 90,
         "BLOCK_M does not divide BLOCK_N"),
        ("causal_attention.dkdv", {"num_warps": 4}, 90, "registers"),
        ("layer_norm.fwd", {"BLOCK_C": 512}, 90,
         "BLOCK_C is not 128 or 256 a warp of the row"),
        ("layer_norm.bwd", {"ROWS": 8}, 90, "registers"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_pruned(label, change, arch, why):
    knob = find_knob(label)
    launch = changed(knob.launch(LARGE, 2, arch), change)
    assert why_pruned(knob, launch, LARGE, 2, arch) == why


def test_the_pasted_text_is_a_row_that_gives_the_launch():
    best = Launch((("BLOCK_M", 64), ("BLOCK_N", 32)), 4, 3, maxnreg=168, programs_per_sm=3)
    for launch in (best, replace(best, maxnreg=None), Launch((), 8)):
        assert launch_of(json.loads(json.dumps(tune.describe(launch)))) == launch
        key = gelu_mlp.launch_key("up", 65536, 768, "16-bit", 103)
        row = {"best": tune.describe(launch), "key": asdict(key), "shape": 'B=1 "',
               "present_ms": 1.5, "best_ms": 1.25}  # fmt: skip
        pasted = source_of(row, "bench/results/h100.json 2026-01-02")
        measured, _ = _launch.read_rows(f"[measured]\ngelu_mlp = [\n{pasted}\n]")
        [(found, read)] = measured.items()
        assert found.serves(key)
        assert read == launch
        assert read.source == 'bench/results/h100.json 2026-01-02: 1.5 -> 1.25 ms, B=1 "'


@pytest.mark.slow
@by_label
def test_every_kernel_gets_a_row(knob, interpreted):
    row = tune.propose(knob, tiny(knob), torch.float32, CPU, limit=2, rounds=3)
    assert row["tried"] == min(2, row["candidates"])
    assert row["failed"] == 0
    assert launch_of(row["present"]) == knob.launch(tiny(knob), 4, arch=0)


def test_wrong_candidates_are_thrown_out(monkeypatch, interpreted):
    checks = iter([True, False, False])  # the present row passes, both candidates do not
    monkeypatch.setattr(tune, "_same", lambda ours, theirs: next(checks))
    row = tune.propose(NORM, tiny(NORM), torch.float32, CPU, limit=2, rounds=3)
    assert (row["tried"], row["failed"], row["propose"]) == (2, 2, False)
    assert row["first_failure"] == "ValueError: results differ from the present row's"
    assert row["best"] == row["present"]
    x = torch.tensor([1.0, 2.0])
    monkeypatch.undo()
    assert tune._same([x], [x * (1 + 1e-7)])
    assert not tune._same([x], [x * 1.001])
    assert not tune._same([x], [x * float("nan")])


@pytest.fixture
def clock(monkeypatch, interpreted):
    """Times by hand: (shape label, launch) -> ms; what is not there takes 1 ms."""
    ms: dict[tuple[str, Launch], list[float]] = {}
    shapes: dict[tune.Trial, str] = {}
    init = tune.Trial.__init__

    def noted(self, knob, shape, *rest, **more):
        init(self, knob, shape, *rest, **more)
        shapes[self] = shape.label

    def replay(self, launch):
        samples = ms.get((shapes[self], launch), [1.0])
        turns = iter(range(10**6))
        return timing.Replay(lambda: samples[next(turns) % len(samples)], "host")

    monkeypatch.setattr(tune.Trial, "__init__", noted)
    monkeypatch.setattr(tune.Trial, "replay", replay)
    return ms


def test_a_gain_is_proposed_where_it_costs_nowhere(clock):
    here, there = tiny(NORM), tiny(NORM, B=2)
    _, slower, good = plan(NORM, NORM.launch(here, 4, 0), here, 4, 0).candidates[:3]
    clock[here.label, slower] = [2.0]
    clock[here.label, good] = [0.5]

    def proposed(**how):
        return tune.propose(NORM, here, torch.float32, CPU, rounds=4, others=[there], **how)

    row = proposed()
    assert row["propose"]
    assert (row["gain"], row["elsewhere"]) == (2.0, {there.label: 1.0})
    assert launch_of(row["best"]) == good
    assert launch_of(row["present"]) == NORM.launch(here, 4, 0)
    assert row["tried"] == row["candidates"]

    row = proposed(limit=2)  # the good one is the third
    assert (row["propose"], row["verdict"]) == (False, "keep: nothing was faster")
    assert (row["tried"], row["best"]) == (2, row["present"])

    clock[there.label, good] = [1.1]
    row = proposed()
    assert not row["propose"]
    assert row["verdict"] == "keep: x2.000 here, but x0.909 at B=2 T=4 C=64, of the same row"

    clock[here.label, good] = [0.7, 0.7, 1.3]  # many turns are lost
    row = proposed()
    assert row["within_noise"]
    assert not row["propose"]
    assert row["elsewhere"] == {}  # not worth measuring

    clock[here.label, good] = [0.99]
    row = proposed()
    assert (row["propose"], row["within_noise"]) == (False, False)
    assert row["verdict"] == "keep: x1.010 is under x1.02"


CHILD = """
import os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    if "die" in line: print("illegal access", file=sys.stderr, flush=True); os._exit(3)
    if "abort" in line: os.abort()
    if "hang" in line: time.sleep(60)
    print('"wrong"' if "bad" in line else '""', flush=True)
"""


def child(code=CHILD):
    return [sys.executable, "-S", "-E", "-c", code]


def test_a_child_that_dies_costs_only_its_candidate(monkeypatch):
    monkeypatch.setattr(tune, "TASK_LIMIT_S", 0.5)
    tasks = ["a", "die", "b", "abort", "hang", "c", "bad", "d", "die", "e"]
    with tune.Children(child(), 2) as children:
        answers = children.run(tasks, 60.0)
        assert len(children.living) == 2
        assert children.run(["f"], 60.0) == [""]
        assert children.run(["g"], 0.0) == [None]  # no time left
        processes = [c.process for c in children.living]
    died = "the child ended with 3: illegal access"
    aborted = "the child ended with -6: no words"
    late = "no answer in 0 s: no words"
    assert answers == ["", died, "", aborted, late, "", "wrong", "", died, ""]
    assert all(process.returncode is not None for process in processes)  # none is left behind


def test_children_that_never_come_up(monkeypatch):
    monkeypatch.setattr(tune, "START_LIMIT_S", 0.3)
    with tune.Children(child("print(1/0)"), 2) as children:
        assert children.living == []
        assert children.why_dead == "the child ended with 1: ZeroDivisionError: division by zero"
        assert children.run(["a"], 1.0) == [None]
    with tune.Children(child("import time; time.sleep(60)"), 1) as children:
        assert children.why_dead == "not ready in 0 s: no words"


def test_the_child_s_side(monkeypatch, interpreted):
    said = []
    shape = tiny(NORM, B=3)
    launches = plan(NORM, NORM.launch(shape, 4, 0), shape, 4, 0).candidates[:2]
    tasks = [tune.task_of(NORM, shape, torch.float32, launch) for launch in launches]
    checked = []
    check = tune.Trial.check
    monkeypatch.setattr(
        tune.Trial, "check", lambda self, launch: (checked.append(launch), check(self, launch))
    )
    unknown = tasks[0].replace(NORM.label, "layer_norm.sideways")
    tune.serve(CPU, [tasks[0], unknown, tasks[1]], said.append)
    assert said[:2] == ["ready", '""']
    assert "unknown kernel 'layer_norm.sideways'" in said[2]
    assert said[3:] == ['""']
    assert checked == [*launches]

    monkeypatch.setattr(tune, "_same", lambda ours, theirs: False)
    tune.serve(CPU, tasks[:1], said.append)
    assert "results differ" in said[-1]
    monkeypatch.setattr(tune, "_is_lost", lambda device: True)
    with pytest.raises(tune.DeviceLost, match="results differ"):
        tune.serve(CPU, tasks[:1], said.append)
    assert said[-1] == "ready"  # no answer: the process ends instead


@pytest.mark.slow  # imports torch again
def test_a_real_child_answers():
    """On a CPU `ours` are the eager ops, which ask for no launch: the child says so and lives."""
    task = tune.task_of(NORM, tiny(NORM), torch.float32, NORM.launch(tiny(NORM), 4, 0))
    with tune.Children(tune.child_command(CPU), 1) as children:
        answers = children.run([task, task], 60.0)
        assert len(children.living) == 1
        assert children.living[0].process.poll() is None
    why = "NotAsked: add_layer_norm does not run this kernel at B=1 T=4 C=64"
    assert answers == [why, why]


@pytest.mark.parametrize("shape", [LARGE, SEED, Shape(3, 17), Shape(16, 17), Shape(32, 1000)])
def test_a_small_shape_compiles_alike(shape):
    """Triton specialises on multiples of 16; attention's kernel depends on T."""
    found = tune.small(shape)
    assert found.M <= 16 * tune.SMALL_T + 256
    assert (found.M % 16 == 0, found.T % 16 == 0) == (shape.M % 16 == 0, shape.T % 16 == 0)
    assert replace(found, B=shape.B, T=shape.T) == shape
    for knob in KNOBS:
        assert knob.asked(found, 2, 90) == knob.asked(shape, 2, 90)


@pytest.mark.parametrize("arch", [80, 90])
def test_the_plan_can_be_seen_without_a_gpu(arch, capsys):
    tune.main(["--list", "--arch", str(arch), "--jobs", "14"])
    lines = capsys.readouterr().out.splitlines()
    for shape in (LARGE, SEED):
        for knob in KNOBS:
            here = f"{knob.label} ({knob.op} {knob.mode}) {shape.label}: "
            [line] = [x for x in lines if x.startswith(here)]
            assert ("candidates" in line) == knob.asked(shape, 2, arch)
            assert ("not asked" in line) != knob.asked(shape, 2, arch)
    assert any("pruned: " in x and "registers" in x for x in lines)
    assert "s of compiling them all, 14 at once" in lines[-1]
    tune.main(["--list", "--op", "gelu_mlp", "--shape", "b8t1024"])
    lines = capsys.readouterr().out.splitlines()
    assert [x.partition(" ")[0] for x in (lines[0], lines[2])] == ["gelu_mlp.up", "gelu_mlp.down"]
    assert "maxnreg 128, 2 programs an SM" in lines[1]
    with pytest.raises(ValueError, match="there is none here, only --list works"):
        tune.main([])


def test_a_run_on_a_pretended_gpu(tmp_path, monkeypatch, capsys, interpreted):
    """From the children to the result file; the child dies at candidates of two rows."""
    code = CHILD.replace('"die" in line', """'"ROWS": 2' in line""")
    monkeypatch.setattr(tune, "child_command", lambda device: child(code))
    monkeypatch.setattr(timing, "MIN_GRAPH_CALLS", 2)
    monkeypatch.setattr(timing, "num_sets", lambda *_: 1)
    monkeypatch.setattr(timing, "spin", lambda device: None)
    monkeypatch.setattr(tune, "FINAL_S", 0.0)
    knobs = [NORM, find_knob("causal_attention.fwd")]
    shape = Shape(1, 2, C=32, H=2)
    _launch.arch.cache_clear()  # of no pretended device, neither before nor after
    with pretend_cuda() as pretended:
        device = torch.device("cuda")
        results = record.Results(device, tmp_path, commit="c" * 40)
        later = time.monotonic() + 120.0
        tune.run(knobs, [shape], device, results, seconds=0.0, deadline=later, limit=3, jobs=1)
        captured = len(pretended.graphs)
        tune.run(knobs, [shape], device, results, seconds=60.0, deadline=0.0, jobs=0)
    _launch.arch.cache_clear()
    [found] = record.load(results.path).rows("tune")
    row = found.values() | found.more
    assert (row["kernel"], row["mode"], row["dtype"]) == ("layer_norm.fwd", "fwd", "bfloat16")
    assert (row["tried"], row["failed"]) == (3, 1)
    assert row["first_failure"] == "the child ended with 3: illegal access"
    assert launch_of(row["present"]) == NORM.launch(shape, 2, arch=0)
    assert captured == 3  # the present row and the two that came back
    out = capsys.readouterr().out
    assert "causal_attention.fwd B=1 T=2 C=32: nothing to tune" in out
    assert "1 failed (the child ended with 3: illegal access)" in out
    assert "tune: no time for the last 2 of 2" in out


@pytest.mark.gpu
def test_what_the_children_compile_is_not_compiled_again(tmp_path, monkeypatch):
    """Children run small inputs: Triton must find their builds when the real ones come."""
    from triton import knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[bool] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda cache_hit, **_: found.append(cache_hit)
    )
    device, dtype = torch.device("cuda"), torch.bfloat16
    with tune.Children(tune.child_command(device), 2) as children:
        for knob in KNOBS:
            shape = LARGE if knob.asked(LARGE, 2, _launch.arch(device)) else SEED
            found.clear()
            row = tune.propose(knob, shape, dtype, device, limit=2, children=children)
            assert (row["failed"], row["tried"]) == (0, min(2, row["candidates"])), row
            assert found.count(True) >= row["tried"], f"{knob.label} {shape.label}"
