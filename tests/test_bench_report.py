"""Tables, figures and README from result files; the GPU parts from one that is made up here."""

import copy
import math
import re
from typing import Any

import pytest
import torch

from bench import gpu, record, report, step, timing, tune
from bench.cases import CASES, Shape, find_shape
from kernels._launch import Launch
from training.recipes import PUBLISHED_LOSS

CPU = torch.device("cpu")
RED = "gradient norm 9.0000, reference 4.2000, tolerance 0.21"
SECRET = 87654.3  # what a red row measured, ms or tokens/s: it must stand nowhere
PROVIDERS = ("eager", "compile", "ours", "liger", "sdpa-flash", "sdpa-cudnn", "linear-ce")


def step_row(provider: str, ms: float, shape: str = "b64t1024", **more: Any) -> dict[str, Any]:
    """A row as bench/step.py makes it, with what only a GPU adds; red if `red` is given."""
    setup = step.Setup("124m", find_shape(shape), more.pop("accum", 1))
    prepared = step.Prepared(None, 20.0, [10.9, 10.8], 4.2)
    peak = int(more.pop("peak_gib", 60.0) * 2**30)
    timed = timing.Timing([ms * x for x in (0.99, 1.0, 1.01)])
    row = step.make_row(provider, setup, CPU, prepared, timed, more.get("red"), peak)
    if row["red"]:
        return row | {"unverified_ms": SECRET, "unverified_tokens_per_s": SECRET}
    return row | {"mfu_palm": 0.4, "mfu_llmc": 0.41, "gpu": {"sm_mhz": 1980}} | more


def op_rows(op: str, shape: str, **more: Any) -> list[dict[str, Any]]:
    """Every provider of an op, as bench/ops.py makes them; those that have no such op skip."""
    only = {"liger": ("layer_norm", "linear_cross_entropy"), "linear-ce": ("linear_cross_entropy",),
            "sdpa-flash": ("causal_attention",), "sdpa-cudnn": ("causal_attention",)}  # fmt: skip
    rows = []
    for i, who in enumerate(PROVIDERS):
        row: dict[str, Any] = {"op": op, "shape": shape, "dtype": "bf16", "mode": "both",
                               "provider": who, **more}  # fmt: skip
        rows.append(row)
        if who in only and op not in only[who]:
            row["skip"] = f"{who} has no {op}"
            continue
        ms = 1.0 / (1 + 0.13 * i)
        row |= {"ms": ms, "q1_ms": ms, "q3_ms": ms, "cov": 0.01, "noisy": False, "rounds": 30,
                "timed": "graph", "gbs": 2000 / ms, "of_limit": 0.7, "peak_gib": 1.0}  # fmt: skip
        if CASES[op].limit != "copy_gbs":
            row["tflops"] = 400 / ms
        rivals = {"eager": 1.0, "compile": 1 / 1.13}
        row |= {f"over_{other}": rival / ms for other, rival in rivals.items() if other != who}
    return rows


def redden(row: dict[str, Any]) -> None:
    """Make an op's row what it is where the numerics fail."""
    identity = {k: row[k] for k in ("op", "shape", "dtype", "mode", "provider")}
    sweep = {"sweep": True} if row.get("sweep") else {}
    row.clear()
    row.update(identity | sweep | {"red": "dx: error 1.0 over budget 0.1", "unverified_ms": SECRET})


def cuda_result(**more: Any) -> dict[str, Any]:
    """A result file of a GPU with every section and row shape."""
    large = [
        step_row("compile bf16", 120.0, peak_gib=60.0, over_compile_bf16=1.0),
        step_row("ours bf16", 105.0, peak_gib=39.0, over_compile_bf16=1.1429),
        step_row("eager bf16", 200.0),
        step_row("eager fp32", 1.0, red=RED),
    ]
    seed = [step_row("compile bf16", 22.0, "b16t64", accum=4),
            step_row("ours bf16", 20.0, "b16t64", accum=4)]  # fmt: skip
    sweep = [step_row(who, ms, shape) for shape in ("b8t1024", "b16t1024", "b32t1024", "b32t2048")
             for who, ms in (("compile bf16", 30.0), ("ours bf16", 25.0))]  # fmt: skip
    sweep += [{"model": "124m", "shape": "B=128 T=1024", "accum": 1, "provider": "ours bf16",
               "tokens": 131072, "red": "out of memory"}]  # fmt: skip
    ablation = [step_row("ours bf16", 105.0), step_row("ours bf16, gelu_mlp=eager", 110.0),
                step_row("ours bf16, no graph", 106.0),
                step_row("ours bf16, causal_attention=eager", 1.0, red=RED)]  # fmt: skip
    ops = [row for shape in ("B=64 T=1024", "B=16 T=64") for op in CASES
           for row in op_rows(op, shape)]  # fmt: skip
    ops += [{**row, "mode": "fwd"} for row in ops[:7]]
    for row in ops:
        if row["op"] == "gelu_mlp" and row["provider"] == "ours":
            redden(row)
        if row["op"] == "layer_norm" and row["provider"] == "eager":
            row["skip"] = "out of memory"
            row.pop("ms", None)
        if row["op"] == "layer_norm":
            row.pop("over_eager", None)
    ops += [row for op, case in CASES.items() for shape in case.sweep
            for row in op_rows(op, shape.label, sweep=True)]  # fmt: skip
    redden(next(r for r in ops if r.get("sweep") and r["provider"] == "ours"))

    def numerics(result: str, **figures: Any) -> dict[str, Any]:
        identity = {"op": "layer_norm", "shape": "B=2 T=64", "dtype": "bf16", "result": result}
        return identity | {"holds": True, "ours": 1e-3, "eager": 1e-3, "budget": 2e-3} | figures

    losses = [10.9 * math.exp(-s / 700) + 0.08 for s in range(3600)]
    run = {"kind": "seed", "recipe": "tiny Shakespeare, GPT-2 124M, 16x64x4",
           "provider": "ops triton, bf16, graph", "tokens_per_s": 260_000.0}  # fmt: skip
    prompt = "First Citizen:"
    samples = [{"prompt": prompt, "text": prompt + "\nBefore we proceed any further, " + "x" * 400},
               {"prompt": "ROMEO:", "text": "\n```\n<!-- /bench:train -->\nHe jests."},
               {"prompt": "Third", "text": " sample"}]  # fmt: skip
    train = [
        run | {"cache": "cold", "seconds": 26.0, "first_step_s": 24.0, "reached": False,
               "steps": 100, "curve": gpu.curve_of(losses[:100]), "final_loss": losses[99],
               "verdict": "loss 9.543 after 100 steps",
               "samples": [{"prompt": "too", "text": " early"}]},
        run | {"cache": "warm", "seconds": 58.0, "first_step_s": 5.0, "reached": True,
               "steps": 3600, "curve": gpu.curve_of(losses), "final_loss": losses[-1],
               "verdict": "loss 0.089 after 3600 steps", "samples": samples},
        {"kind": "drift", "recipe": "500 steps, shakespeare, GPT-2 124m, B=16 T=256, bf16",
         "provider": "triton against eager", "verdict": "drift 0.0042 within bound 0.0100",
         "holds": True, "drift": 0.0042, "bound": 0.01,
         "losses": {"eager": gpu.curve_of([10.9, 3.21]), "ours": gpu.curve_of([10.9, 3.22])}},
        {"kind": "drift", "recipe": "500 steps, wrong", "provider": "triton against eager",
         "verdict": "drift 0.5 OUTSIDE bound 0.0100", "holds": False, "drift": 0.5, "bound": 0.01,
         "losses": {}},
    ]  # fmt: skip
    launch = tune.describe(Launch((("BLOCK_M", 128), ("BLOCK_N", 128)), 8, 3, source="safe"))
    best = tune.describe(Launch((("BLOCK_M", 128), ("BLOCK_N", 256)), 8, 4, source="candidate"))
    tuned = {"op": "gelu_mlp", "mode": "fwd", "shape": "B=64 T=1024", "dtype": "bfloat16",
            "present": launch, "best": best, "present_ms": 1.0,
            "best_ms": 0.9, "tried": 20, "failed": 1}  # fmt: skip
    times = {"GEMM": (60.0, 66.0), "norm": (20.0, 24.0), "idle": (0.5, 30.0)}
    profile = [{"model": "124m", "shape": "B=64 T=1024", "provider": who, "kind": kind,
                "ms": ms[i], "share": ms[i] / 100, "calls": 0 if kind == "idle" else 96}
               for i, who in enumerate(("ours bf16", "compile bf16"))
               for kind, ms in times.items()]  # fmt: skip
    profile.append(profile[-1] | {"kind": "elementwise", "ms": 20.0, "share": 0.2, "calls": 50})
    return {
        "schema": record.SCHEMA,
        "date": "2027-01-02 10:00 UTC",
        "device": {"type": "cuda", "name": "NVIDIA H200", "sms": 132, "memory_gib": 139.8,
                   "l2_mib": 60.0, "capability": "sm_90", "driver": "570.1"},
        "torch": "2.13.0+cu130", "triton": "3.7.1", "python": "3.11.7",
        "commit": "a" * 40, "dirty": False, "command": "python -m bench.gpu --only final",
        "limits": {"copy_gbs": 4000.0, "matmul_tflops": 700.0, "matmul_k768_tflops": 600.0},
        "numerics": [
            numerics("y"),
            numerics("dx", holds=False, ours=3e-3),
            numerics("error", holds=False, error="CUDA error: illegal | access\nat 0x0"),
            numerics("y", dtype="fp32"),
            numerics("50 reruns", dtype="fp32", holds=False, ours=3, eager=0, budget=0),
        ],
        "ops": ops, "step": [*large, *seed, *sweep], "ablation": ablation,
        "first_step": [{"model": "124m", "shape": "B=64 T=1024", "provider": "ours bf16",
                        "cache": cache, "first_step_s": 3.0, "process_start_s": seconds}
                       for cache, seconds in (("cold", 29.0), ("warm", 7.0))],
        "train": train,
        "tune": [tuned | {"kernel": "gelu_mlp.up", "gain": 1.11, "propose": True},
                 tuned | {"kernel": "gelu_mlp.down", "gain": 1.0, "propose": False}],
        "profile": profile,
        "tests": {"verdict": "exit 1; exit 0", "last_line": "1 failed, 312 passed; 9 passed",
                  "failed": ["FAILED tests/test_adamw.py::test_x - a | b"]},
        "sanitizer": [{"tool": "memcheck", "op": "planted", "verdict": "found, as it must be"},
                      *({"tool": "memcheck", "op": op, "verdict": "clean"} for op in CASES),
                      {"tool": "racecheck", "op": "causal_attention", "verdict": "cut off"}],
        "resume": {"verdict": "bitwise", "last_line": "3 passed in 40 s"},
        "generate": [{"model": "124m", "provider": "1 row", "tokens_per_s": 900.0}],
        "optimizer": {"rows": [{"who": "torch", "ms": 1.0}]},
        "parts": {"step": "done (90 s)"},
        **more,
    }  # fmt: skip


def row_of(result: dict[str, Any], section: str, **want: Any) -> dict[str, Any]:
    return next(filter(report.rows_with(**want), result[section]))


def ours(result: dict[str, Any], **more: Any) -> dict[str, Any]:
    return row_of(result, "step", provider="ours bf16", **(report.LARGE | more))


def goals(*results: dict[str, Any]) -> list[list[str]]:
    """Measured, on, state of each goal."""
    return [goal.cells(results)[0] for goal in report.GOALS]


def check_secret(text: str) -> None:
    assert "8765" not in text.replace(",", "")


def test_every_block_says_what_a_gpu_measured():
    results = [cuda_result()]
    text = {name: block(results) for name, block in report.BLOCKS.items()}
    for name, block in text.items():
        check_secret(block)
        assert bool(block) == (name not in ("step-cpu", "ops-cpu")), name
    for name in ("goals", "step-gpu", "ops-gpu", "train", "evidence", "limits", "ablation", "tune"):
        assert "NVIDIA H200, driver 570.1; torch 2.13.0+cu130" in text[name]
        assert text[name].count("driver 570.1") == 1
        assert "\n\n\n" not in text[name]
        tables = re.findall(r"(?:^\|.*\n?)+", text[name], re.MULTILINE)
        assert tables, name
        for lines in tables:  # a text of others can make no cell of its own
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1
    step_block = text["step-gpu"]
    assert "GPT-2 124m, B=64 T=1024\n" in step_block
    assert "GPT-2 124m, B=16 T=64, 4 micro-batches\n" in step_block
    assert "GPT-2 124m, B=8 T=1024: ours bf16" in step_block.partition("Other sizes")[2]
    assert f"eager fp32   | not shown: {RED}" in step_block
    assert "not shown: out of memory" in step_block
    assert text["ops-gpu"].startswith("Forward and backward, B=64 T=1024, bf16")
    assert "<details><summary>Forward and backward, B=16 T=64, bf16</summary>" in text["ops-gpu"]
    assert "not shown: dx: error 1.0 over budget 0.1" in text["ops-gpu"]
    assert "copy 4e+03 GB/s" in text["ops-gpu"]
    assert re.search(r"gelu_mlp=eager +\| +595,782 \| +1.0% \| +0.955 \|", text["ablation"])
    assert f"causal_attention=eager | not shown: {RED}" in text["ablation"]
    assert "this project, B=64 T=1024" in text["public"]
    assert "this project, B=128" not in text["public"]
    assert "1 of 2 launches could be faster." in text["tune"]
    assert re.search(r"\| BLOCK_N 128 -> 256, num_stages 3 -> 4 \| +1.110 \|", text["tune"])


def test_train_block_shows_both_kinds_and_quotes_what_it_writes():
    result = cuda_result()
    text = report.train_block([result])
    assert re.search(r"cold \| +24.0 \| +26.0 \| +260,000 \| +loss 9.543 after 100 steps \|", text)
    assert re.search(r"warm \| +5.0 \| +58.0 .* loss 0.089 after 3600 steps, reached \|", text)
    assert "drift 0.0042 within bound 0.0100 | eager 3.210, ours 3.220 |" in text
    assert "RED: drift 0.5 OUTSIDE bound" in text
    fences = re.findall(r"```\n(.*?)\n```", text, re.DOTALL)
    assert len(fences) == text.count("```") / 2 == 2
    assert fences[0].startswith("[prompt]First Citizen:\n[model]\nBefore we proceed")
    assert 300 < len(fences[0]) < 360
    assert fences[0].endswith("x ...")
    block = f"<!-- bench:train -->\n{text}\n<!-- /bench:train -->\nafter"
    assert report.fill(block, [result]) == block  # a sample cannot end it
    row_of(result, "train", cache="warm").update(red="exit 1", verdict="no step, exit 1")
    text = report.train_block([result])
    assert re.search(r"warm \| +\| +\| +\| +not shown: exit 1 \|", text)
    assert "58.0" not in text


def test_evidence_counts_what_holds_and_lists_what_does_not():
    result = cuda_result()
    text = report.evidence_block([result])
    assert re.search(r"numerics, bf16 +\| +1 of 3 within twice eager's error \|", text)
    assert re.search(r"numerics, fp32 +\| +1 of 1 within twice eager's error \|", text)
    assert re.search(r"numerics, fp32 +\| +0 of 1 the same bits \|", text)
    assert "RED layer_norm B=2 T=64 bf16 dx: 0.003, allowed 0.002" in text
    assert "RED layer_norm B=2 T=64 bf16 error: CUDA error: illegal \\| access at 0x0" in text
    assert "RED layer_norm B=2 T=64 fp32 50 reruns: 3, allowed 0" in text
    assert "RED FAILED tests/test_adamw.py::test_x - a \\| b" in text
    assert "exit 1; exit 0: 1 failed, 312 passed; 9 passed" in text
    assert "found, as it must be: planted; clean: layer_norm, add_layer_norm" in text
    assert re.search(r"racecheck +\| +cut off: causal_attention", text)
    assert re.search(r"exact resume +\| +bitwise: 3 passed in 40 s", text)
    result["numerics"] = [result["numerics"][1]] * 20
    text = report.evidence_block([result])
    assert text.count("RED") == 12
    assert "\n\nand 9 more\n" in text
    del result["resume"]
    assert re.search(r"resume +\| +not run", report.evidence_block([result]))


def test_limits_hold_ours_beside_the_baseline():
    lines = report.limits_block([cuda_result()]).splitlines()
    assert "ours bf16: ms | share | calls | compile bf16: ms" in lines[2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:9]]
    assert cells == [
        ["GEMM", "60.00", "60.0%", "96", "66.00", "66.0%", "96"],
        ["norm", "20.00", "20.0%", "96", "24.00", "24.0%", "96"],
        ["elementwise", "", "", "", "20.00", "20.0%", "50"],
        ["idle", "0.50", "0.5%", "0", "30.00", "30.0%", "0"],
        ["all", "80.50", "", "", "140.00", "", ""],
    ]


# Goal, section, row, key, the last figure that meets it and the first that does not, and how that
# one reads: rounded against us.
STEP = {"provider": "ours bf16", **report.LARGE}
SEED = {"provider": "ours bf16", **report.SEED}
BOUNDS = [
    (0, "step", STEP, "over_compile_bf16", 1.1, 1.0999, "1.09x"),
    (1, "step", STEP, "over_compile_bf16", 1.2, 1.1999, "1.19x"),
    (2, "step", STEP, "tokens_per_s", 600_000.0, 599_990.0, "599,990"),
    (3, "train", {"kind": "seed", "cache": "warm"}, "seconds", 60.0, 60.01, "60.1 s"),
    (4, "step", SEED, "tokens_per_s", 200_000.0, 199_990.0, "199,990"),
    (5, "step", STEP, "peak_gib", 40.0, 40.01, "0.667"),
    (6, "train", {"kind": "seed", "cache": "cold"}, "first_step_s", 30.0, 30.01, "30.1 s"),
    (7, "train", {"kind": "seed", "cache": "warm"}, "first_step_s", 6.0, 6.01, "6.1 s"),
]


@pytest.mark.parametrize(("goal", "section", "row", "key", "good", "bad", "reads"), BOUNDS)
def test_goals_turn_at_their_bounds(goal, section, row, key, good, bad, reads):
    result = cuda_result()
    row_of(result, section, **row)[key] = good
    assert goals(result)[goal][1:] == ["NVIDIA H200, aaaaaaaa", "met"]
    row_of(result, section, **row)[key] = bad
    assert goals(result)[goal] == [reads, "NVIDIA H200, aaaaaaaa", f"short: {reads}"]
    row_of(result, section, **row)["red"] = RED
    assert goals(result)[goal] == ["not shown: red", "NVIDIA H200, aaaaaaaa", "open"]
    # Red in the newest is not made up for by an older figure; a row that is missing is.
    older = cuda_result(commit="b" * 40)
    assert goals(older, result)[goal][0] == "not shown: red"
    result[section].remove(row_of(result, section, **row))
    if key != "first_step_s":
        assert goals(result)[goal] == ["", "", "open"]
    result["first_step"] = []
    assert goals(older, result)[goal][1] == "NVIDIA H200, bbbbbbbb"


def test_goals_are_as_many_as_their_bounds():
    assert [b[0] for b in BOUNDS] == [*range(len(report.GOALS))]
    assert report.GOALS[0].text(1.15) == "1.15x"  # times 100 it is 114.99999999999999


def test_goals_take_the_first_step_alone_where_no_recipe_ran():
    result = cuda_result(train=[])
    on = "NVIDIA H200, aaaaaaaa"
    assert goals(result)[6:] == [["29.0 s", on, "met"], ["7.0 s", on, "short: 7.0 s"]]


def test_goal_needs_the_loss_the_text_and_both_sides_of_a_ratio():
    result = cuda_result()
    warm = row_of(result, "train", cache="warm")
    warm["reached"] = False
    assert goals(result)[3] == ["58.0 s", "NVIDIA H200, aaaaaaaa", "short: not reached"]
    assert goals(result)[7][2] == "met"  # its first step was taken all the same
    for row in filter(report.rows_with(kind="seed"), result["train"]):
        row |= {"reached": True, "recipe": f"{gpu.text_of(None)}, GPT-2 124M"}
    assert goals(result)[3] == ["", "", "open"]
    assert report.FIGURES["curve-gpu"][1]([result], None) == []
    # A failure stands under its own key, in front of what was measured again.
    warm["recipe"] = "tiny Shakespeare, GPT-2 124M"
    result["train"] = [warm | {"provider": "train.py", "red": "exit 1"}, warm | {"seconds": 59.0}]
    assert goals(result)[3][0] == "59.0 s"
    row_of(result, "step", provider="compile bf16", **report.LARGE)["red"] = RED
    assert goals(result)[5] == ["not shown: red", "NVIDIA H200, aaaaaaaa", "open"]


def test_goals_name_device_and_commit_of_every_figure():
    h200 = cuda_result()
    h100 = cuda_result(date="2027-01-03 10:00 UTC", commit="b" * 40, train=[])
    h100["device"] |= {"name": "NVIDIA H100 80GB HBM3"}
    h100["step"] = [ours(h100)]
    text = report.goals_block([h200, h100])
    on = [cells[1] for cells in goals(h200, h100)]
    other = "NVIDIA H100 80GB HBM3, bbbbbbbb (not an H200)"
    assert on == [other] * 3 + ["NVIDIA H200, aaaaaaaa"] * 3 + [other] * 2
    assert text.count("; commit aaaaaaaa; 2027-01-02") == text.count("; commit bbbbbbbb") == 1
    h100["device"] |= {"name": "NVIDIA GH200 480GB"}
    assert goals(h100)[0][1] == "NVIDIA GH200 480GB, bbbbbbbb (not an H200)"


def test_without_a_gpu_one_line_and_open_goals(tmp_path):
    results = [cuda_result(device={"type": "cpu", "name": "x", "cores": 2, "isa": "AVX2"})]
    text = {name: block(results).strip() for name, block in report.BLOCKS.items()}
    empty = ("ops-gpu", "train", "evidence", "limits", "ablation", "tune")
    assert [text[name] for name in empty] == [""] * len(empty)
    assert text["step-gpu"].startswith("**On a GPU: nothing has been measured yet**")
    assert "\n" not in text["step-gpu"]
    assert text["goals"].count("|  open |") == text["goals"].count("open") == len(report.GOALS)
    assert "measured" not in text["goals"]
    # A first call without steps: then the line would be wrong.
    checked = cuda_result(step=[], ops=[], ablation=[])
    assert report.step_block([checked], "cuda").startswith("No training-step result of a GPU")
    assert report.fill("<!-- bench:limits -->\nold\n<!-- /bench:limits -->", []) == (
        "<!-- bench:limits -->\n\n<!-- /bench:limits -->"
    )
    assert report.plots_block([]) == ""


def test_each_section_alone_makes_its_own_blocks_and_figures():
    whole = cuda_result()
    sections = [name for name, rows in whole.items() if isinstance(rows, list)]
    makes = {}
    for name in sections:
        alone = cuda_result(**{other: [] for other in sections if other != name})
        for single in ("tests", "resume", "limits"):
            del alone[single]
        blocks = {b for b, block in report.BLOCKS.items() if "commit aaaaaaaa" in block([alone])}
        figures = {f for f, (_, draw) in report.FIGURES.items() if draw([alone], None)}
        makes[name] = (blocks, figures)
    sweeps = {f"sweep-{op}" for op in CASES}
    assert makes == {
        "numerics": ({"evidence"}, set()),
        "sanitizer": ({"evidence"}, set()),
        "ops": ({"ops-gpu"}, {"ops-gpu"} | sweeps),
        "step": ({"goals", "step-gpu"}, {"step-gpu"}),
        "ablation": ({"ablation"}, set()),
        "first_step": ({"goals"}, set()),
        "train": ({"goals", "train"}, {"curve-gpu"}),
        "tune": ({"tune"}, set()),
        "profile": ({"limits"}, set()),
        "generate": (set(), set()),
    }


def test_newest_is_per_section():
    old = cuda_result(commit="c" * 40)
    new = cuda_result(date="2027-01-03 10:00 UTC", profile=[], ablation=[])
    new["ops"] = [row for row in new["ops"] if not row.get("sweep")]
    assert "commit cccccccc" in report.limits_block([old, new])
    assert "commit aaaaaaaa" in report.step_block([old, new], "cuda")
    assert report.FIGURES["sweep-gelu_mlp"][1]([old, new], None)
    assert report.FIGURES["ops-gpu"][1]([old, new], None)[0] in new["ops"]


def test_readme_is_filled_from_a_gpu_result(tmp_path, monkeypatch):
    """`make report` alone: the blocks of the committed README, and every figure."""
    for name in ("results", "plots"):
        (tmp_path / name).mkdir()
    (tmp_path / "results/h200.json").write_text(record.dumps(cuda_result()))
    for path in record.RESULTS.glob("*.json"):
        (tmp_path / "results" / path.name).write_text(path.read_text())
    (tmp_path / "README.md").write_text(report.README.read_text())
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    where = ["--results", str(tmp_path / "results"), "--plots", str(tmp_path / "plots")]
    report.main(where)
    report.main([*where, "--check"])
    text = report.README.read_text()
    check_secret(text)
    assert "nothing has been measured" not in text
    assert "curve-gpu.svg" in text
    for name in ("goals", "step-gpu", "ops-gpu", "train", "evidence", "limits", "ablation"):
        block = re.search(rf"<!-- bench:{name} -->\n(.*?)<!-- /bench:{name} -->", text, re.DOTALL)
        assert block, name
        assert block[1].strip(), name
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {*report.FIGURES}
    for path in (tmp_path / "plots").iterdir():
        check_secret(re.sub(r'"[^"]*"|<path.*?/>', "", path.read_text()))
    (tmp_path / "plots/curve-gpu.svg").write_text("")
    with pytest.raises(SystemExit, match="curve-gpu differ"):
        report.main([*where, "--check"])


def test_figures_leave_out_what_is_red_or_has_nothing_to_be_held_against():
    result = cuda_result()
    draw = {name: figure[1]([result], None) for name, figure in report.FIGURES.items()}
    assert [r["provider"] for r in draw["step-gpu"]] == ["compile bf16", "ours bf16", "eager bf16"]
    found = {(r["op"], r["provider"]) for r in draw["ops-gpu"]}
    assert ("gelu_mlp", "compile") in found
    assert ("gelu_mlp", "ours") not in found
    assert all(op != "layer_norm" for op, _ in found)  # its eager ran out of memory
    assert {r["shape"] for r in draw["ops-gpu"]} == {"B=64 T=1024"}
    assert len(draw["sweep-layer_norm"]) == 4 * 7 - 1
    published, curve = draw["curve-gpu"]
    assert published == {"name": "published run", "curve": [[*p] for p in PUBLISHED_LOSS]}
    assert curve["curve"][-1][0] == 3599
    # Whichever was measured last, the size of the goals is drawn.
    result["step"].reverse()
    assert report.FIGURES["step-gpu"][1]([result], None)[0]["shape"] == "B=64 T=1024"
    row_of(result, "train", cache="warm")["red"] = RED
    assert report.FIGURES["curve-gpu"][1]([result], None)[1]["curve"][-1][0] == 99


def test_merge_makes_one_file_of_several_calls(tmp_path):
    base = cuda_result()
    common = {k: base[k] for k in ("schema", "device", "torch", "triton", "python", "commit")}
    step_a, step_b = copy.deepcopy(base["step"][:2]), copy.deepcopy(base["step"][1:3])
    step_b[0]["ms"] = 99.0
    one = common | {"date": "2027-01-02 10:00 UTC", "dirty": False, "command": "python a",
                    "numerics": base["numerics"], "step": step_a, "tests": base["tests"],
                    "parts": {"tests": "done", "step": "cut off"}}  # fmt: skip
    two = common | {"date": "2027-01-02 11:00 UTC", "dirty": None, "command": "python b",
                    "step": step_b, "limits": base["limits"],
                    "parts": {"step": "done"}}  # fmt: skip
    for name, data in (("a.json", one), ("b.json", two)):
        (tmp_path / name).write_text(record.dumps(data))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    # Later is by date, so a glob may give them in any order.
    report.main(["--merge", str(b), str(a), "--into", str(tmp_path / "out")])
    [path] = (tmp_path / "out").iterdir()
    assert path.name == "nvidia-h200-aaaaaaaa.json"
    merged = record.load(path)
    assert [(r["provider"], r["ms"]) for r in merged["step"]] == [
        ("compile bf16", 120.0), ("ours bf16", 99.0), ("eager bf16", 200.0)
    ]  # fmt: skip
    assert merged["numerics"] == base["numerics"]
    assert merged["tests"] == base["tests"]
    assert merged["limits"] == base["limits"]
    assert merged["parts"] == {"tests": "done", "step": "done"}
    assert (merged["date"], merged["dirty"], merged["command"]) == (
        "2027-01-02 11:00 UTC", None, "python a; python b"
    )  # fmt: skip
    # A third call goes into the file that is there.
    three = two | {"date": "2027-01-02 12:00 UTC", "dirty": True, "step": [],
                   "command": "python a"}  # fmt: skip
    b.write_text(record.dumps(three))
    report.main(["--merge", str(b), "--into", str(tmp_path / "out")])
    again = record.load(path)
    assert again["step"] == merged["step"]
    assert (again["dirty"], again["command"]) == (True, "python a; python b")

    b.write_text(record.dumps(two | {"commit": "b" * 40}))
    with pytest.raises(ValueError, match=r"commit is a{40} in a.json, b{40} in b.json"):
        record.merge([a, b], tmp_path / "new")
    b.write_text(record.dumps(two | {"device": base["device"] | {"name": "NVIDIA H100"}}))
    with pytest.raises(ValueError, match=r"device is .*'NVIDIA H200'.* in a.json, .*'NVIDIA H100'"):
        record.merge([a, b], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rows_of_a_train_section_are_told_apart(tmp_path):
    results = record.Results(CPU, tmp_path, commit="c" * 40)
    for row in cuda_result()["train"]:
        results.add("train", row)
        results.add("train", row)
    assert len(results.rows("train")) == 4


def test_readme_and_plots_agree_with_the_results():
    if not report.README.exists():
        pytest.skip("no README yet")
    results = record.load_all()
    text = report.README.read_text()
    assert "<!-- bench:" in text, "README has no marked tables"
    assert report.fill(text, results) == text, "run `make report`"
    assert report.stale_plots(results) == [], "run `make report`"


def test_report_fills_blocks_and_nothing_else(tmp_path):
    results = record.Results(CPU, tmp_path, commit="c" * 40)
    setup = step.Setup("smoke", Shape(4, 64))
    prepared = step.Prepared(None, 0.5, [10.8, 10.7], 1.0)
    for name, ms in (("eager fp32", 200.0), ("ours fp32", 100.0)):
        timed = timing.Timing([ms, ms, ms])
        results.add("step", step.make_row(name, setup, CPU, prepared, timed, None, None))
    loaded = record.load_all(tmp_path)
    text = "before\n<!-- bench:step-cpu -->\nold\n<!-- /bench:step-cpu -->\nafter\n"
    filled = report.fill(text, loaded)
    assert filled.startswith("before\n<!-- bench:step-cpu -->\nGPT-2 smoke")
    assert filled.endswith("<!-- /bench:step-cpu -->\nafter\n")
    assert "old" not in filled
    assert "2,560" in filled  # 256 tokens in 100 ms
    assert report.fill(filled, loaded) == filled
    gpu_text = "<!-- bench:step-gpu -->\n<!-- /bench:step-gpu -->"
    assert "nothing has been measured" in report.fill(gpu_text, loaded)
    with pytest.raises(ValueError, match="only 0 are closed"):
        report.fill("<!-- bench:step-cpu -->\n", loaded)

    assert report.stale_plots(loaded, tmp_path / "plots") == ["step-cpu"]
    report.FIGURES["step-cpu"][1](loaded, tmp_path / "plots/step-cpu.svg")
    assert report.stale_plots(loaded, tmp_path / "plots") == []
    results.add("step", results.rows("step")[0] | {"ms": 150.0})
    assert report.stale_plots(record.load_all(tmp_path), tmp_path / "plots") == ["step-cpu"]


def test_public_and_estimated_figures_say_what_they_are():
    public = report.public_block([])
    assert "other people's" in public
    assert "498,141" in public
    assert "this project," not in public  # no row of ours without a result
    assert report.roofline_block([]).startswith("Estimate, not a measurement")
    flops_ms, bytes_ms = report.step_floor("H200")
    # 803.5 MFLOP a token (llm.c's form) at 989.5 TFLOP/s; bytes are the smaller part.
    assert flops_ms == pytest.approx(803.5e6 * 65536 / 989.5e12 * 1e3, rel=0.01)
    assert 5 < bytes_ms < flops_ms
