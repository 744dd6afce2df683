"""Result files, and the tables, plots and README blocks made of them; GPU results are made up."""

import math
import os
import re
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import cli, contestants, figures, recipe, record, report, step
from bench.cases import CASES
from bench.record import LARGE, CheckRow, OpRow, ProfileRow, Result, SeedRow, StepRow
from training import timing
from training.recipes import PUBLISHED_LOSS

CPU = torch.device("cpu")
RED = "gradient norm 9.0000, reference 4.2000, tolerance 0.21"
SECRET = 87654.3  # ms of rows in doubt: neither it nor its tokens/s may be shown
RIVALS = {"eager": 1.0, "compile": 1 / 1.13}
OURS: Any = {**LARGE, "provider": "ours bf16"}
ON = "aaaaaaaa"  # the commit of `cuda_result`


def step_row(provider: str, ms: float, shape: str = "b64t1024", **more: Any) -> StepRow:
    """A row as bench/step.py makes it, with what only a GPU adds."""
    setup = contestants.Setup("124m", cli.shape(shape), more.pop("accum", 1))
    warm = setup.row(provider, tokens=setup.tokens, losses=[10.9, 10.8], grad_norm=4.2)
    warm = replace(warm, first_step_s=20.0)
    doubt = more.pop("doubt", "")
    timed = timing.Timing([(SECRET if doubt else ms) * x for x in (0.99, 1.0, 1.01)])
    row = step.timed_row(warm, setup, timed, warm, "NVIDIA H200")
    return replace(row, peak_gib=60.0, doubt=doubt, **more)


def op_rows(op: str, shape: str, **more: Any) -> list[OpRow]:
    """Every provider of an op, as bench/ops.py makes them."""
    found = []
    for i, who in enumerate(("eager", "compile", "ours", "liger")):
        ms = 1.0 / (1 + 0.13 * i)
        tflops = None if CASES[op].limit == "copy_gbs" else 400 / ms
        over = {name: rival / ms for name, rival in RIVALS.items() if name != who}
        row = OpRow(op=op, shape=shape, dtype="bf16", mode="both", provider=who, ms=ms, **more)
        row = replace(row, q1_ms=ms, q3_ms=ms, cov=0.01, rounds=30, over=over, timed="graph")
        found.append(replace(row, gbs=2000 / ms, tflops=tflops, of_limit=0.7, peak_gib=1.0))
    return found


def ops() -> list[OpRow]:
    cases = [(op, shape) for shape in ("B=64 T=1024", "B=16 T=64") for op in CASES]
    found = [row for op, shape in cases for row in op_rows(op, shape)]
    doubts = {("gelu_mlp", "ours"): RED, ("layer_norm", "eager"): "out of memory"}
    for i, row in enumerate(found):
        if doubt := doubts.get((row.op, row.provider)):
            found[i] = replace(row, doubt=doubt, ms=SECRET)
        elif row.op == "layer_norm":
            found[i] = replace(row, over={})
    return [*found, *(replace(row, mode="fwd") for row in found[:4])]


def seeds() -> list[SeedRow]:
    losses = [10.9 * math.exp(-s / 700) + 0.08 for s in range(3600)]
    text = "First Citizen:\nBefore we proceed ```\n<!-- /bench:train --> any further, " + "x" * 400
    plan, said = "ops triton, bf16, graph", "loss 9.543 after 100 steps"
    row = SeedRow(text="tiny Shakespeare", plan=plan, tokens_per_s=260_000.0, cache="", result=said)
    cold = replace(row, cache="cold", seconds=26.0, first_step_s=24.0, steps=100)
    early = [{"prompt": "too", "text": " early"}]
    cold = replace(cold, curve=recipe.curve_of(losses[:100]), samples=early)
    warm = replace(row, cache="warm", seconds=58.0, first_step_s=5.0, reached=True, steps=3600)
    late = [{"prompt": "First Citizen:", "text": text}]
    said = "loss 0.089 after 3600 steps"
    warm = replace(warm, curve=recipe.curve_of(losses), result=said, samples=late)
    return [cold, warm]


def profiles() -> list[ProfileRow]:
    times = {"GEMM": (60.0, 66.0), "norm": (20.0, 24.0), "idle": (0.5, 30.0)}
    found = []
    for i, who in enumerate(("ours bf16", "compile bf16")):
        for kind, ms in times.items():
            whose: Any = {"model": "124m", "shape": "B=64 T=1024", "provider": who, "kind": kind}
            calls = 0 if kind == "idle" else 96
            found.append(ProfileRow(**whose, ms=ms[i], share=ms[i] / 100, calls=calls))
    return [*found, replace(found[-1], kind="elementwise", ms=20.0, share=0.2, calls=50)]


def checks(check: str = "numerics bf16", **doubts: str) -> list[CheckRow]:
    doubts = doubts or {"layer_norm y": "", "layer_norm dx": "error 3, allowed | 2"}
    return [CheckRow(check=check, what=what, doubt=doubt) for what, doubt in doubts.items()]


def cuda_result(
    date: str = "2027-01-02 10:00 UTC", commit: str = "a" * 40, name: str = "H200", **sections: Any
) -> Result:
    """A GPU's result with every section and kind of row."""
    twins = (("compile bf16", 30.0), ("ours bf16", 25.0))
    step = [
        step_row("compile bf16", 120.0, over={"compile bf16": 1.0}),
        replace(step_row("ours bf16", 105.0, over={"compile bf16": 1.1429}), peak_gib=39.0),
        step_row("eager bf16", 200.0),
        step_row("eager fp32", 1.0, doubt=RED),
        step_row("compile bf16", 22.0, "b16t64", accum=4),
        step_row("ours bf16", 20.0, "b16t64", accum=4),
        *(step_row(who, ms, shape) for shape in ("b8t1024", "b32t2048") for who, ms in twins),
        step_row("ours bf16", 1.0, "b128t1024", doubt="out of memory"),
    ]
    ablation = [
        step_row("ours bf16", 105.0),
        step_row("ours bf16, gelu_mlp=eager", 110.0, over={"ours bf16": 0.9545}),
        step_row("ours bf16, causal_attention=eager", 1.0, doubt=RED),
    ]
    about = {
        "schema": record.SCHEMA,
        "date": date,
        "device": {"type": "cuda", "name": f"NVIDIA {name}", "driver": "570.1"},
        "torch": "2.13.0+cu130",
        "triton": "3.7.1",
        "commit": commit,
        "dirty": False,
        "command": "python -m bench.gpu --only final",
        "limits": {"copy_gbs": 4000.0, "matmul_tflops": 700.0, "matmul_k768_tflops": 600.0},
    }
    whole: dict[str, Any] = {"step": step, "ablation": ablation, "ops": ops(), "seed": seeds()}
    whole |= {"checks": checks(), "profile": profiles(), "generate": [step_row("cached", 9.0)]}
    return Result(about, whole | sections)


def change(result: Result, section: str, want: dict[str, Any], **values: Any) -> None:
    """Replace fields of the first row with these values."""
    found = result.sections[section]
    at = next(i for i, row in enumerate(found) if row.has(**want))
    found[at] = replace(found[at], **values)


def goals(*results: Result) -> list[list[str]]:
    """Measured, commit, state of each goal."""
    return [goal.cells(results)[0] for goal in report.GOALS]


def drawn(name: str, result: Result) -> list[Any]:
    return next((plot.rows for plot in figures.to_draw([result]) if plot.name == name), [])


def check_secret(text: str) -> None:
    assert "8765" not in text.replace(",", "")
    assert "748" not in text.replace(",", "")  # 65,536 tokens in that time


def test_every_section_says_what_a_gpu_measured():
    text = report.page([cuda_result()])
    assert "`!` marks more than 5%" in text
    check_secret(text)
    sections = dict(part.split("\n\n", 1) for part in text.split("\n## ")[1:])
    assert {*sections} == {x for x in report.SECTIONS if not x.endswith("CPU")}
    for heading, block in sections.items():
        assert heading == "Plots" or ON in block  # where its figures come from
        for lines in re.findall(r"(?:^\|.*\n?)+", block, re.MULTILINE):
            # Text from elsewhere cannot add a cell.
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines.splitlines()}) == 1
    assert "\n\n\n" not in text
    assert f"\n- NVIDIA H200, {ON}: driver 570.1, torch 2.13.0+cu130" in text
    step = sections["The whole training step on a GPU"]
    assert step.startswith(f"GPT-2 124m, B=64 T=1024 (NVIDIA H200, {ON})\n")
    assert f"GPT-2 124m, B=16 T=64, 4 micro-batches (NVIDIA H200, {ON})\n" in step
    assert "GPT-2 124m, B=8 T=1024: ours bf16" in step.partition("Other sizes")[2]
    assert f"\neager fp32: not shown: {RED}" in step
    assert "GPT-2 124m, B=128 T=1024: ours bf16: not shown: out of memory" in step
    assert re.search(r"ours bf16 +\| +624,152 \| +105.0 \| +1.0% \| +1.14 \| +\d+.\d% / ", step)
    ops = sections["Each op on a GPU"]
    assert ops.startswith("Forward and backward, B=64 T=1024, bf16")
    assert "<details><summary>Forward and backward, B=16 T=64, bf16" in ops
    assert f"\ngelu_mlp ours: not shown: {RED}" in ops
    assert re.search(r"gelu_mlp +\| +1 \| +0.885 \| +\| +0.719 \| +\|", ops)
    assert "copy 4,000 GB/s" in ops
    assert re.search(r"gelu_mlp=eager +\| +595,782 \| +110.0 \| +1.0% \| +0.95 \|", text)
    assert f"\nours bf16, causal_attention=eager: not shown: {RED}" in text


def test_train_block_quotes_what_the_recipe_writes():
    result = cuda_result()
    text = report.SECTIONS["The Shakespeare recipe"]([result])
    assert re.search(r"cold \| +loss 9.543 after 100 steps \| +24.0 \| +26.0 \| +260,000 \|", text)
    assert re.search(
        r"warm \| loss 0.089 after 3600 steps, its lowest below the goal \| +5.0 \| +58.0 \|", text
    )
    [fence] = re.findall(r"```\n(.*?)\n```", text, re.DOTALL)
    assert fence.startswith("[prompt]First Citizen:\n[model]\nBefore we proceed ` ` `")
    assert 300 < len(fence) < 360
    assert fence.endswith("x ...")
    assert "<!--" not in text
    change(result, "seed", {"cache": "warm"}, doubt="no step, exit 1")
    text = report.SECTIONS["The Shakespeare recipe"]([result])
    assert "warm: not shown: no step, exit 1" in text
    assert "58.0" not in text


def test_evidence_is_the_newest_of_each_thing_that_was_checked():
    found = {"mended": RED, "op x": RED, "op y": "error | 4", "fine": ""}
    old = cuda_result(checks=checks(**found))
    later = checks(**{"mended": "", "op z": RED})
    new = cuda_result("2027-01-03 10:00 UTC", "b" * 40, checks=later)
    new.sections["checks"] += [CheckRow(check="tests", what="all", found="3 passed in 40 s")]
    text = report.evidence_block([old, new])
    assert re.search(rf"numerics bf16 +\| +2 of 5 hold \| +{ON}, bbbbbbbb \|", text)
    assert re.search(r"tests +\| +1 of 1 hold: 3 passed in 40 s \| +bbbbbbbb \|", text)
    # One line for an op and a commit, however many of its checks fail.
    assert [line for line in text.splitlines() if line.startswith("FAILED")] == [
        f"FAILED numerics bf16 op x: {RED}, {ON} (and 1 more of this op)",
        f"FAILED numerics bf16 op z: {RED}, bbbbbbbb",
    ]


def test_limits_hold_ours_beside_the_baseline():
    lines = report.SECTIONS["Where the time of a step goes"]([cuda_result()]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:9]]
    assert [cells[0], *cells[2:]] == [
        ["kind", "ours bf16: ms", "share", "compile bf16: ms", "share"],
        ["GEMM", "60.00", "60.0%", "66.00", "66.0%"],
        ["norm", "20.00", "20.0%", "24.00", "24.0%"],
        ["elementwise", "", "", "20.00", "20.0%"],
        ["idle", "0.50", "0.5%", "30.00", "30.0%"],
        ["all", "80.50", "", "140.00", ""],
    ]


# Goal, section, row, field, a value that just meets the goal, one that just does not, and how the
# latter is printed: rounded against us.
SEED: Any = {"provider": "ours bf16", **report.SEED}
OVER = "compile bf16"
BOUNDS = [
    (0, "step", OURS, "over", {OVER: 1.1}, {OVER: 1.0999}, "1.09x"),
    (1, "step", OURS, "over", {OVER: 1.2}, {OVER: 1.1999}, "1.19x"),
    (2, "step", OURS, "ms", 65.536 / 0.6, 65.536 / 0.59999, "599,990"),
    (3, "seed", {"cache": "warm"}, "seconds", 60.0, 60.01, "60.1 s"),
    (4, "step", SEED, "ms", 4.096 / 0.2, 4.096 / 0.19999, "199,990"),
    (5, "step", OURS, "peak_gib", 40.0, 40.01, "0.667"),
    (6, "seed", {"cache": "cold"}, "first_step_s", 30.0, 30.01, "30.1 s"),
    (7, "seed", {"cache": "warm"}, "first_step_s", 6.0, 6.01, "6.1 s"),
]


@pytest.mark.parametrize(("goal", "section", "want", "name", "good", "bad", "reads"), BOUNDS)
def test_goals_turn_at_their_bounds(goal, section, want, name, good, bad, reads):
    result = cuda_result()
    change(result, section, want, **{name: good})
    assert goals(result)[goal][1:] == [ON, "met"]
    change(result, section, want, **{name: bad})
    assert goals(result)[goal] == [reads, ON, "missed"]
    change(result, section, want, doubt=RED)
    assert goals(result)[goal] == ["not shown: in doubt", ON, "open"]
    # An older figure does not replace a newer one that is in doubt, only one that is missing.
    older = cuda_result(commit="b" * 40)
    assert goals(older, result)[goal][0] == "not shown: in doubt"
    result.sections[section] = [r for r in result.rows(section) if not r.has(**want)]
    assert goals(result)[goal] == ["", "", "open"]
    assert goals(older, result)[goal][1] == "bbbbbbbb"


def test_goals_take_what_else_there_is_and_need_what_belongs_to_it():
    assert [bound[0] for bound in BOUNDS] == [*range(len(report.GOALS))]
    assert report.GOALS[0].text(1.15) == "1.15x"  # times 100 it is 114.99999999999999
    result = cuda_result()
    change(result, "seed", {"cache": "warm"}, reached=False)
    assert goals(result)[3] == ["not reached", ON, "missed"]
    assert goals(result)[7][2] == "met"  # the time to its first step counts all the same
    result.sections["seed"] = [replace(r, text="this project's source") for r in seeds()]
    assert goals(result)[3] == ["", "", "open"]
    assert drawn("curve-gpu", result) == []
    # A failure has another key, so it stays in front of the new measurement.
    failed = replace(seeds()[1], plan="not said", doubt="exit 1")
    result.sections["seed"] = [failed, replace(seeds()[1], seconds=59.0)]
    assert goals(result)[3][0] == "59.0 s"
    change(result, "step", LARGE | {"provider": "compile bf16"}, doubt=RED)
    assert goals(result)[5] == ["not shown: in doubt", ON, "open"]
    text = report.goals_block([result, cuda_result(commit="b" * 40, name="GH200 480GB", seed=[])])
    assert text.endswith("|\n\nbbbbbbbb was measured on an NVIDIA GH200 480GB, not an H200.")


def test_without_a_gpu_one_line_and_open_goals():
    result = cuda_result()
    result.about["device"] = {"type": "cpu", "name": "x", "cores": 2, "isa": "AVX2"}
    assert report.step_block([result], "cuda") == report.NO_GPU_STEP
    text = report.page([result])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Goals",
        "## The whole training step on a GPU",
        "## The whole training step on a CPU",
        "## Each op on a CPU",
        "## Plots",
        "## What was run",
    ]
    assert f"GPT-2 124m, B=64 T=1024 (x, 2 cores, AVX2, {ON})" in text
    goals = report.goals_block([result])
    assert goals.count("|  open |") == goals.count("open") == len(report.GOALS)
    assert "measured" not in goals
    # The result of a GPU that timed no steps does not change this.
    checked = cuda_result(step=[], ops=[], ablation=[])
    assert report.step_block([checked], "cuda") == report.NO_GPU_STEP


def test_each_section_is_of_the_newest_result_that_has_it():
    old, new = cuda_result(commit="c" * 40), cuda_result("2027-01-03 10:00 UTC", profile=[])
    assert "cccccccc" in report.SECTIONS["Where the time of a step goes"]([old, new])
    assert ON in report.step_block([old, new], "cuda")
    assert all(plot.result is new for plot in figures.to_draw([old, new]))
    # A result with one section says nothing of the others.
    for name in record.SECTIONS:
        alone = Result(new.about, {name: old.rows(name)})
        headings = report.page([alone]).count("\n## ")
        at_least = ("Goals", "The whole training step on a GPU", "What was run")
        assert len(at_least) <= headings <= len(at_least) + 2, name


def test_a_page_and_every_figure_are_made_and_checked(tmp_path, capsys):
    """`make report` on the committed README and results, and on one more."""
    results = tmp_path / "bench/results"
    results.mkdir(parents=True)
    replace(cuda_result(), path=results / "h200.json").write()
    for path in record.RESULTS.glob("*.json"):
        (results / path.name).write_text(path.read_text())
    (tmp_path / "README.md").write_text((record.ROOT / "README.md").read_text())
    where = ["--results", str(results), "--root", str(tmp_path)]
    assert report.main(where) == 0
    assert report.main([*where, "--check"]) == 0
    text = (tmp_path / "README.md").read_text()
    check_secret(text)
    assert "624,152" in text  # of H200, the newest
    assert text.count("GPT-2 124m, B=") == 2  # one table for each kind of device
    plots = [*(tmp_path / "bench/plots").iterdir()]
    names = {f"{what}-{device}" for what in ("step", "curve") for device in ("gpu", "cpu")}
    assert {path.stem for path in plots} == names
    for path in plots:
        check_secret(re.sub(r'"[^"]*"|<path.*?/>', "", path.read_text()))
        assert f"](../bench/plots/{path.name})" in (tmp_path / "docs/results.md").read_text()
    (tmp_path / "bench/plots/curve-gpu.svg").write_text("")
    (tmp_path / "docs/results.md").write_text("")
    capsys.readouterr()
    assert report.main([*where, "--check"]) == 1
    assert "docs/results.md, bench/plots/curve-gpu.svg differ" in capsys.readouterr().err


def test_figures_leave_out_what_is_in_doubt():
    result = cuda_result()
    names = [row.provider for row in drawn("step-gpu", result)]
    assert names == ["compile bf16", "ours bf16", "eager bf16"]
    [curve] = drawn("curve-gpu", result)
    assert curve.curve[-1][0] == 3599
    axes = figures.draw_curve(result, [curve])
    lines = {line.get_label(): len(line.get_xdata()) for line in axes.lines}  # type: ignore[arg-type]
    assert lines["published run"] == len([step for step, _ in PUBLISHED_LOSS if step < 3600])
    # The size of the goals is drawn, whichever was measured last.
    result.sections["step"].reverse()
    assert drawn("step-gpu", result)[0].shape == "B=64 T=1024"
    change(result, "seed", {"cache": "warm"}, doubt=RED)
    assert drawn("curve-gpu", result)[0].curve[-1][0] == 99


def test_results_keep_rows_replace_twins_and_refuse_strangers(tmp_path):
    results = record.open_result(CPU, tmp_path, commit="c" * 40)
    row = OpRow(op="layer_norm", shape="s", dtype="fp32", mode="fwd", provider="eager", ms=1.0)
    results.add("ops", row)
    on_disk = record.load(results.path)  # written at once: an interrupted run keeps it
    assert on_disk.rows("ops") == [row]
    about = {"device", "torch", "triton", "commit", "dirty", "command", "date"}
    assert about <= {*on_disk.about}
    again = record.open_result(CPU, tmp_path, commit="c" * 40)
    again.add("ops", replace(row, ms=math.nan), replace(row, provider="ours", ms=1 / 3))
    assert [r.ms for r in record.load(again.path).rows("ops")] == [None, 0.33333]
    assert [*tmp_path.iterdir()] == [again.path]
    with pytest.raises(ValueError, match=r"must agree in commit; it is c{40} and d{40}"):
        record.open_result(CPU, again.path, commit="d" * 40)
    for text, why in (
        ('{"schema": "someone/else"}', r"must have schema .* has 'someone/else'"),
        ('{"ops": [', "is not JSON"),
        (again.path.read_text().replace('"dtype"', '"kind"'), "a row of other.json cannot be read"),
        (f'{{"schema": "{record.SCHEMA}", "ops": [3]}}', "a row of other.json cannot be read"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match=f"other.json {why}|{why}"):
            record.load_all(tmp_path)
    (tmp_path / "other.json").unlink()
    os.mkfifo(tmp_path / "other.json")  # to read it would take for ever
    with pytest.raises(ValueError, match=r"other.json is not JSON \(not a regular file\)"):
        record.load_all(tmp_path)


def test_files_of_several_calls_count_as_one(tmp_path):
    def part(name: str, hour: int, sections: dict[str, Any], **about: Any) -> None:
        whole = cuda_result(f"2027-01-02 {hour}:00 UTC")
        Result(whole.about | about, sections, tmp_path / name).write()

    step = cuda_result().rows("step")
    # The date says which is later, not the name.
    part("b.json", 10, {"step": step[:2], "checks": checks()}, command="python a")
    later = [replace(step[1], ms=99.0), step[2]]
    part("a.json", 11, {"step": later}, command="python b", dirty=None)
    [whole] = record.load_all(tmp_path)
    found = {row.provider: row.ms for row in whole.rows("step")}
    assert found == {"compile bf16": 120.0, "ours bf16": 99.0, "eager bf16": 200.0}
    assert whole.rows("checks") == checks()
    assert (whole.about["date"], whole.about["dirty"]) == ("2027-01-02 11:00 UTC", None)
    assert whole.about["command"] == "python a; python b"
    part("c.json", 12, {}, command="python a", dirty=True)
    part("d.json", 13, {}, commit="b" * 40)
    whole, other = record.load_all(tmp_path)
    assert (other.about["commit"], whole.about["dirty"]) == ("b" * 40, True)
    assert whole.about["command"] == "python a; python b"


def test_readme_page_and_plots_agree_with_the_results(capsys):
    for path in record.RESULTS.glob("*.json"):
        assert path.stat().st_size < 300_000, f"{path.name} is not small"
    assert "<!-- bench:goals" in (record.ROOT / "README.md").read_text()
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_report_fills_blocks_and_nothing_else():
    result = cuda_result()
    text = "before\n<!-- bench:step-gpu -->\nold\n<!-- /bench:step-gpu -->\nafter\n"
    filled = report.fill(text, [result])
    assert filled.startswith("before\n<!-- bench:step-gpu -->\nGPT-2 124m")
    assert filled.endswith("<!-- /bench:step-gpu -->\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, [result]) == filled
    assert report.fill(filled, []).splitlines()[2] == report.NO_GPU_STEP
    with pytest.raises(ValueError, match="must be followed by <!-- /bench:step-cpu -->"):
        report.fill("<!-- bench:step-cpu -->\n", [])
    with pytest.raises(ValueError, match=r"unknown block 'speed'; known: .*step-gpu"):
        report.fill("<!-- bench:speed -->\n<!-- /bench:speed -->", [])


def test_what_the_report_writes_is_no_uncommitted_change(tmp_path, monkeypatch):
    """Otherwise all results after `make report` would be marked as made by changed code."""
    monkeypatch.setattr(record, "ROOT", tmp_path)
    written = ["README.md", "docs/results.md", "bench/plots/x.svg", "bench/results/x.json"]
    for name in ("train.py", *written):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    for name in written:
        (tmp_path / name).write_text("after")
    commit, dirty = record.git_state()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert not dirty
    (tmp_path / "train.py").write_text("after")
    assert record.git_state() == (commit, True)
