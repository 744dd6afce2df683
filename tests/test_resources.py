"""Every build of every kernel compiles and fits. Separate processes compile them, because one that
interprets kernels cannot."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.resources import ARCHS, blocks_per_sm, outside_loops, table
from kernels._op import INTERPRETED

ROOT = Path(__file__).parents[1]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True
    )


def run_table(*args: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "bench.resources", *args)


# With cold caches the builds of one arch take two cores one to two minutes; CI runs them all.
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
from bench import builds, resources
from bench.cases import Shape
forward, *_ = builds.record(builds.step(Shape(64, 1024))["add_layer_norm"], 90)
print(resources.compiled(forward).asm["ptx"])
"""
    done = run("-c", code)
    assert "div.rn.f32" in done.stdout, done.stderr


def test_no_kernel_and_no_row_is_forgotten():
    """Each has a build on one of the chips, but for rows of other versions of triton."""
    code = f"""
from dataclasses import replace
from bench.builds import builds
from kernels._launch import ANY, rows, triton_version
found = [build for arch in {[*ARCHS]} for build in builds(arch)]
print(*(build.source.name for build in found))
for layer in rows():
    for row, launch in layer.items():
        here = row.triton in (ANY, triton_version()) and row.arch != 0
        if row.triton == ANY and replace(row, triton=triton_version()) in layer:
            continue
        if here and not any(row.serves(b.key) and b.launch == launch for b in found):
            print(row)
"""
    done = run("-c", code)
    names, *rows = done.stdout.splitlines()
    files = (path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    written = {n for text in files for n in re.findall(r"^@jit\ndef (_\w+_kernel)\(", text, re.M)}
    assert ({*names.split()}, rows) == (written, []), done.stderr


def test_a_short_sequence_has_kernels_of_its_own():
    code = """
from bench import builds
from bench.cases import Shape
for T in 1024, 64:
    for build in builds.record(builds.step(Shape(16, T))["causal_attention"], 90):
        print(T, build.key.kernel, build.label)
"""
    assert run("-c", code).stdout.splitlines() == [
        "1024 causal_attention.fwd M128 N64 w8 s3",
        "1024 causal_attention.dq M128 N64 w8 s3",
        "1024 causal_attention.dkdv M64 N64 w4 s3",
        "64 causal_attention.fwd M64 N64 w4 s1",
        "64 causal_attention.short M64 w4 s1",
    ]


def test_planted_faults_are_reported(tmp_path):
    report = tmp_path / "table.json"
    done = run_table("--module", "tests.planted", "--arch", "90", "--json", str(report))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "5 of them in violation" in done.stdout.splitlines()[-1]
    found = {row["label"]: row for row in json.loads(report.read_text())["rows"]}
    assert "spills" in found["spills"]["violations"][0]
    assert found["spills"]["spill_bytes"] > 0
    assert "a block may have 232448" in found["wants too much shared memory"]["violations"][0]
    assert "no HGMMA with 64 rows" in found["claims TF32, is exact"]["violations"]
    assert "does not build" in found["does not build"]["violations"][0]
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


def test_instructions_outside_the_loops_with_products():
    listing = """
        /*0000*/ MOV R1, R2 ;
.L_x_0:
        /*0010*/ IADD3 R1, R1, R2 ;
.L_x_1:
        /*0020*/ HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0030*/ @P0 BRA `(.L_x_1) ;
        /*0040*/ STG.E [R2], R4 ;
        /*0050*/ @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/ FADD R1, R1, R2 ;
        /*0070*/ @P2 BRA `(.L_x_2) ;
        /*0080*/ EXIT ;
.L_x_3:
        /*0090*/ NANOSLEEP 0x1 ;
        /*00a0*/ BRA `(.L_x_0) ;
"""
    assert outside_loops(listing) == 9 - 2


def test_a_block_never_gets_the_whole_sm():
    assert all(limits.block_shared < limits.sm_shared for limits in ARCHS.values())


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter is in the way")
def test_the_interpreter_is_refused():
    with pytest.raises(ValueError, match="unset it"):
        next(table(lambda arch: [], [90]))
