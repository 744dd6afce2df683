"""Every build of every kernel compiles and fits. Separate processes compile them, because one that
interprets kernels cannot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.resources import ARCHS, blocks_per_sm, table
from kernels._op import INTERPRETED

ROOT = Path(__file__).parents[1]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True
    )


def run_table(*args: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "bench.resources", *args)


# With cold caches the builds of one arch take two cores a minute; CI runs them all.
@pytest.mark.parametrize(
    "flags",
    [
        ("--arch", "90", "--op", "gelu_mlp"),
        *(pytest.param(("--arch", str(arch)), marks=pytest.mark.slow) for arch in ARCHS),
    ],
    ids=" ".join,
)
def test_every_shipped_build_fits(flags):
    done = run_table(*flags)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert verdict.startswith("resources: ")
    assert verdict.endswith("none spills, all fit")


def test_the_mean_that_is_stored_is_the_one_that_is_subtracted():
    """ptxas makes an approximate division by a constant part of the subtraction that follows."""
    code = """
from bench.resources import build
from kernels.layer_norm import aot_cases
case = next(case for case in aot_cases(90) if case.label.startswith("fwd"))
print(build(case, 90).asm["ptx"])
"""
    done = run("-c", code)
    assert "div.rn.f32" in done.stdout, done.stderr


def test_planted_faults_are_reported(tmp_path):
    report = tmp_path / "table.json"
    done = run_table("--module", "tests.planted", "--arch", "90", "--json", str(report))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 of them in violation" in done.stdout.splitlines()[-1]
    found = {row["label"]: row for row in json.loads(report.read_text())["rows"]}
    assert "spills" in found["spills"]["violations"][0]
    assert found["spills"]["spill_bytes"] > 0
    assert "a block may have 232448" in found["wants too much shared memory"]["violations"][0]
    assert "no HGMMA with 64 rows" in found["claims TF32, is exact"]["violations"]
    assert "does not build" in found["does not build"]["violations"][0]
    assert "PRECISION is a constexpr and has no" in found["lacks a constexpr"]["violations"][0]
    assert "the row counts on 8" in found["claims too many programs"]["violations"][0]
    assert found["sound"]["violations"] == []
    assert found["sound"]["tensor_ops"]["HGMMA"] > 0


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "want"),
    [
        (255, 256, 0, 90, 1),  # 255 rounds to 256 a thread: 65536 / (256 * 256)
        (168, 384, 0, 90, 1),  # FA3's shape: 168 * 384 = 64512, one block
        (32, 128, 0, 90, 16),  # 64 warps / 4
        (32, 32, 0, 86, 16),  # the limit on blocks
        (64, 128, 50 << 10, 80, 3),  # 164 KB / (50 + 1)
        (64, 128, 99 << 10, 120, 1),
        (64, 128, 227 << 10, 90, 1),
    ],
)
def test_occupancy(registers, threads, shared, arch, want):
    assert blocks_per_sm(registers, threads, shared, arch) == want


def test_a_block_never_gets_the_whole_sm():
    assert all(limits.block_shared < limits.sm_shared for limits in ARCHS.values())


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter is in the way")
def test_the_interpreter_is_refused():
    with pytest.raises(ValueError, match="unset it"):
        next(table(["tests.planted"], [90]))
