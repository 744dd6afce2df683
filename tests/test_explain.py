"""What `--explain` says about other machines, and about this one."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.flops import flops_per_token
from training import explain as explain_module
from training import probe as probe_module
from training.explain import elsewhere, explain, findings, roofline_s, traffic_bytes
from training.machines import find_card, free_bytes, nvidia_smi
from training.plan import Choices, Machine, detect, make_plan
from training.probe import Probe, Rates, measure_rates, probe_steps
from training.recipes import Recipe, find_preset

RECIPE = find_preset("fineweb-124m")
H100 = Machine(
    "cuda", "NVIDIA H100 80GB HBM3", arch=90, num_threads=8, has_bf16=True, memory_bytes=80 * 10**9
)
CPU = Machine("cpu", "Some CPU", num_threads=2, memory_bytes=16 * 10**9)
GPU_PLAN = replace(
    make_plan(RECIPE, H100, Choices(micro_batch_size=64)), ops="triton", memory_bytes=60 * 10**9
)
CPU_RECIPE = Recipe(model="smoke", batch_size=16)
CPU_PLAN = make_plan(CPU_RECIPE, CPU, Choices(compile=True))
GPU_RATES = Rates(3000.0, {"fp32": 5e4, "tf32": 4e5, "bf16": 7e5}, 6e5, 16, 700, 700, 1700, 1980)
CPU_RATES = Rates(20.0, {"fp32": 100.0}, 90.0, 2)


def healthy(recipe: Recipe, rate_gflops: float) -> Probe:
    """A probe at 80% of the matmul rate with little beside it."""
    flops = flops_per_token(recipe.model_config, recipe.block_size) * recipe.tokens_per_step
    busy = flops / (0.8 * rate_gflops * 1e9)
    phases = {"data": 0.0, "forward": busy / 3, "backward": 2 * busy / 3, "optimizer": 0.1 * busy}
    step = sum(phases.values())
    return Probe(phases, (step,) * 4, recipe.tokens_per_step, host_s=0.1 * step)


GPU_PROBE, CPU_PROBE = healthy(RECIPE, 7e5), healthy(CPU_RECIPE, 100.0)
ON_GPU = (RECIPE, H100, GPU_PLAN, GPU_RATES, GPU_PROBE)
EQUAL = replace(CPU_RATES, matmul_gflops={"fp32": 100.0, "bf16": 100.0})
BF16 = replace(CPU, has_bf16=True), replace(CPU_PLAN, dtype="bf16")
ON_CPU = (CPU_RECIPE, *BF16, EQUAL, CPU_PROBE)
# Lacks what the plan has notes about.
BARE = replace(CPU, missing_tools=("g++",), has_triton=False)
ON_BARE = (CPU_RECIPE, BARE, replace(CPU_PLAN, compile=False), CPU_RATES, CPU_PROBE)


@pytest.mark.parametrize("healthy_case", [ON_GPU, ON_CPU, ON_BARE], ids=["H100", "cpu", "bare"])
def test_a_healthy_machine_has_no_findings(healthy_case):
    assert findings(*healthy_case) == []


def slow(probe: Probe, **factors: float) -> Probe:
    phases = {k: s * factors.get(k, 1.0) for k, s in probe.phases.items()}
    return replace(probe, phases=phases)


# A fault, and the start of the one line that it must add to a healthy machine's none.
RECIPE_100 = replace(RECIPE, model="124m,n_embd=800,n_head=10")
WRONG = [
    (ON_CPU, {"machine": CPU}, "bf16 is slow on Some CPU, 100 GFLOP/s against 100 in fp32"),
    (ON_GPU, {"plan": replace(GPU_PLAN, dtype="fp32"), "probe": healthy(RECIPE, 4e5),
              "rates": replace(GPU_RATES, shape_gflops=4e5)},
     "fp32, but bf16 products are 1.8 times as fast here: --dtype bf16"),
    (ON_CPU, {"machine": replace(CPU, has_bf16=True, num_threads=1)}, "threads: torch uses 1 of 2"),
    (ON_GPU, {"rates": replace(GPU_RATES, power_limit_w=300)}, "power limit 300 W of 700 W"),
    (ON_GPU, {"rates": replace(GPU_RATES, sm_mhz=1200)}, "clock 1200 of 1980 MHz"),
    (ON_GPU, {"plan": replace(GPU_PLAN, cuda_graph=False),
              "probe": replace(GPU_PROBE, host_s=0.95 * sum(GPU_PROBE.phases.values()))},
     "batch too small: "),
    (ON_GPU, {"probe": slow(GPU_PROBE, backward=2.0)},
     "forward+backward run at 48% of the matmul rate measured here"),
    (ON_GPU, {"rates": replace(GPU_RATES, shape_gflops=3e5)},
     "products of this model's shape (65536 x 768 x 3072) reach 43%"),
    (ON_GPU, {"rates": replace(GPU_RATES, shape_gflops=1e6)}, "products reached 1.4 times"),
    (ON_GPU, {"probe": replace(GPU_PROBE, phases=GPU_PROBE.phases | {"data": 0.5})}, "data takes "),
    (ON_GPU, {"probe": slow(GPU_PROBE, optimizer=4.0)}, "optimizer takes 29% of a step"),
    (ON_GPU, {"recipe": RECIPE_100, "probe": healthy(RECIPE_100, 7e5)}, "n_embd 800: not a mul"),
    (ON_GPU, {"recipe": RECIPE_100, "probe": healthy(RECIPE_100, 7e5)}, "head dim 80: "),
    (ON_GPU, {"plan": replace(GPU_PLAN, memory_bytes=78 * 10**9)}, "memory close to its limit: 78"),
    (ON_GPU, {"probe": replace(GPU_PROBE, peak_bytes=79 * 10**9)}, "memory close to its limit: 79"),
    (ON_GPU, {"plan": replace(GPU_PLAN, memory_bytes=20 * 10**9)}, "memory: 20.0 of 80.0 GB used"),
    (ON_GPU, {"probe": replace(GPU_PROBE, seconds=(1.0, 1.0, 2.0))}, "steps differ by a factor"),
]  # fmt: skip
NAMES = ("recipe", "machine", "plan", "rates", "probe")


@pytest.mark.parametrize(("base", "changes", "line"), WRONG, ids=[w[2][:24] for w in WRONG])
def test_each_finding_is_seen(base, changes, line):
    found = findings(*(changes.get(name, value) for name, value in zip(NAMES, base, strict=True)))
    assert sum(f.startswith(line) for f in found) == 1, found
    others = 1 if "800" in line or "80:" in line else 0  # one width breaks two rules
    assert len(found) == 1 + others, found


def test_a_graph_hides_launches():
    """A captured step does not wait for the host, however slow."""
    probe = replace(GPU_PROBE, host_s=10.0)
    graph = (RECIPE, H100, replace(GPU_PLAN, cuda_graph=True), GPU_RATES, probe)
    assert findings(*graph) == []


def test_roofline_adds_products_and_traffic():
    flops = flops_per_token(RECIPE.model_config, 1024) * RECIPE.tokens_per_step
    got = roofline_s(RECIPE, GPU_PLAN, 7e5, 3000.0)
    assert got == pytest.approx(flops / 7e14 + traffic_bytes(RECIPE, GPU_PLAN) / 3e12)
    # Fused ops move fewer bytes than eager ones, and working copies fewer than casts.
    eager = replace(GPU_PLAN, ops="eager", compile=False)
    assert traffic_bytes(RECIPE, GPU_PLAN) < traffic_bytes(RECIPE, eager)
    casts = replace(GPU_PLAN, working_copies=False)
    assert traffic_bytes(RECIPE, GPU_PLAN) < traffic_bytes(RECIPE, casts)


def test_known_machines_stand_in_order_of_speed():
    lines = elsewhere(RECIPE, GPU_PLAN)
    speed = {line[:9].strip(): float(line.split()[-2].replace(",", "")) for line in lines}
    assert [*speed.values()] == sorted(speed.values())
    assert next(iter(speed)) == "T4"
    assert lines[-1].startswith("B200 ")
    # GPT-2 124M cannot beat 989.5 TFLOP/s over 855 MFLOP a token on an H100.
    assert 400_000 < speed["H100"] < 989.5e12 / flops_per_token(RECIPE.model_config, 1024)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("Tesla T4", 65.0),
        ("NVIDIA L40", None),  # holds "L4"
        ("NVIDIA GH200 480GB", None),  # holds "H200"
        ("AMD EPYC", None),
    ],
)
def test_a_card_is_found_by_whole_words(name: str, tflops: float | None):
    card = find_card(name)
    assert (card and card.tflops) == tflops


def write_cgroup(folder: Path, limit: str, used: int, cached: int):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_free_memory_is_what_the_machine_or_a_cgroup_leaves(tmp_path):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    assert free_bytes(proc, groups) == 0  # unknown
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert free_bytes(proc, groups) == 8000 << 10
    (proc / "self/cgroup").write_text("0::/job/a:step\n")
    write_cgroup(groups / "job/a:step", "max", 5, 0)
    assert free_bytes(proc, groups) == 8000 << 10
    write_cgroup(groups / "job", "1000000", 600000, 100000)  # the limit of its parent group
    assert free_bytes(proc, groups) == 500000
    write_cgroup(groups / "job/a:step", "300000", 290000, 10)
    assert free_bytes(proc, groups) == 10010
    write_cgroup(groups / "job/a:step", "300000", 400000, 10)
    assert free_bytes(proc, groups) == 0


def test_what_nvidia_smi_does_not_know_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi("power.limit") == {}  # no such program
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '550.54.15, [N/A], 1980, ERR!'\necho 'of the second GPU'\n")
    fake.chmod(0o755)
    got = nvidia_smi("driver_version", "power.limit", "clocks.sm", "fan.speed")
    assert got == {"driver_version": "550.54.15", "clocks.sm": "1980"}


TINY = Recipe(model="smoke", batch_size=2, block_size=16, grad_accum_steps=2)
TOKENS = np.arange(2000, dtype=np.uint16)


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(probe_module, "MAX_STEPS", 2)
    monkeypatch.setattr(probe_module, "RATE_S", 0.1)


def test_probe_times_the_phases_of_a_step(quick):
    plan = make_plan(TINY, detect("cpu"), Choices(dtype="fp32"))
    got = probe_steps(TINY, plan, TOKENS, limit_s=60.0)
    assert len(got.seconds) == 2
    assert got.note == ""
    assert all(s > 0 for s in got.phases.values())
    assert all(s > 0 for s in got.seconds)
    assert got.tokens_per_s == pytest.approx(64 / got.step_s)


def test_probe_of_a_slow_step_scales_a_few_rows(quick):
    plan = make_plan(TINY, detect("cpu"), Choices(dtype="fp32"))
    got = probe_steps(TINY, plan, TOKENS, limit_s=0.0)
    assert len(got.seconds) == 1
    assert got.note == "1 of 4 rows, their time scaled, no warm-up"


def test_a_busy_machine_compiles_nothing(quick, monkeypatch):
    """On a busy machine compiling took 160 s, where it takes 20 s on an idle one."""
    plan = replace(make_plan(TINY, detect("cpu"), Choices(dtype="fp32")), compile=True)
    monkeypatch.setattr(probe_module, "slowdown", lambda: 4.0)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    got = probe_steps(TINY, plan, TOKENS)
    assert got.note == "not compiled: this machine is busy, it would take 80 s"


def test_slowdown_counts_the_time_of_others(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(probe_module.time, "perf_counter", lambda: next(clock) * 0.1)
    monkeypatch.setattr(probe_module.time, "thread_time", lambda: next(clock) * 0.025)
    assert probe_module.slowdown(0.35) == pytest.approx(0.4 / 0.1, rel=0.3)


def test_rates_take_what_time_there_is(monkeypatch):
    """A product that takes longer than that is measured once, not five times."""
    calls = 0

    def slow(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.06)

    monkeypatch.setattr(torch, "mm", slow)
    monkeypatch.setattr(probe_module, "RATE_S", 0.05)
    measure_rates(TINY, replace(CPU, has_bf16=False), replace(CPU_PLAN, dtype="fp32"))
    assert calls == 4  # two products, each with one warm-up call


def test_explain_prints_every_part(quick, monkeypatch, capsys):
    """On this machine, with products that take little time."""
    machine = detect("cpu")
    plan = make_plan(TINY, machine, Choices(dtype="fp32"))
    rates = measure_rates(TINY, machine, plan)
    assert rates.copy_gbs > 0.1
    assert rates.matmul("fp32") > 0.1
    monkeypatch.setattr(explain_module, "measure_rates", lambda *_: rates)
    explain(TINY, plan, machine, TOKENS)
    text = capsys.readouterr().out
    parts = ["plan: cpu", "measured here: copy", "estimate from", "H200", "optimizer"]
    parts += ["computed from datasheets, not measured", "% of the products alone"]
    for part in (f"torch {torch.__version__}", *parts, "what would help:"):
        assert part in text, part
