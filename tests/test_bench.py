"""Cases, baseline, check of an op before it is timed, profile, generation, command lines."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import baseline, cli, contestants, generate, ops, profile, record, tables
from bench.cases import CASES, MODES, Shape, make_inputs
from bench.record import OpRow, ProfileRow
from kernels import EAGER
from model import GPT, GPTConfig
from training import timing

CPU = torch.device("cpu")
TINY = Shape(2, 8, C=32, H=2, V=128)
TINY_CONFIG = GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize("op", CASES)
def test_case_covers_the_op_and_its_baseline_agrees(op):
    case = CASES[op]
    inputs = make_inputs(case, TINY, torch.float32, CPU)
    ours = getattr(EAGER, op)(**inputs)
    theirs = baseline.OPS[op](**inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mode in case.modes:
        assert case.bytes(TINY, 2, mode) > 0
        results = ops.make_call(getattr(EAGER, op), case, mode, inputs)()
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        outputs = {"add_layer_norm": 2, "embedding": 3}.get(op, 1)
        assert len(results) == (outputs if mode == "fwd" else len(leaves))
    if "bwd" in case.modes:
        both = case.bytes(TINY, 2, "both")
        assert both == case.bytes(TINY, 2, "fwd") + case.bytes(TINY, 2, "bwd")


def test_cases_state_the_known_work():
    big = Shape(64, 1024)
    bytes_of = {(op, m): CASES[op].bytes(big, 2, m) for op in CASES for m in CASES[op].modes}
    # 65,536 x 768 elements at 12 and 16 bytes: x, residual, y, h; dy, dh_out, h, dh, dx.
    assert bytes_of["add_layer_norm", "fwd"] == 65536 * 768 * 12
    assert bytes_of["add_layer_norm", "bwd"] == 65536 * 768 * 16
    assert CASES["linear_cross_entropy"].flops(big, "both") == 6 * 65536 * 768 * 50304
    assert CASES["causal_attention"].flops(big, "fwd") == pytest.approx(103.1e9, rel=1e-3)
    assert CASES["gelu_mlp"].flops(big, "fwd") == 2 * (2 * 65536 * 768 * 3072)
    limits = {"copy_gbs": 4000.0, "matmul_tflops": 700.0, "matmul_k768_tflops": 600.0}
    assert CASES["layer_norm"].floor_ms(big, 2, "fwd", limits) == pytest.approx(
        65536 * 768 * 4 / 4e12 * 1e3
    )
    assert CASES["gelu_mlp"].floor_ms(big, 2, "fwd", limits) == pytest.approx(
        CASES["gelu_mlp"].flops(big, "fwd") / 600e12 * 1e3
    )


def test_baseline_is_our_model_without_our_ops():
    ours, theirs = GPT(TINY_CONFIG), baseline.BaselineGPT(TINY_CONFIG)
    theirs.load_state_dict(ours.state_dict())
    idx, targets = torch.randint(128, (2, 2, 16))
    loss, reference = ours(idx, targets), theirs(idx, targets)
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=1e-6)
    loss.backward()
    reference.backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    source = Path(baseline.__file__).read_text()
    assert "import kernels" not in source
    assert "from kernels" not in source


def test_wrong_or_unchecked_numerics_hide_the_speed(monkeypatch):
    def broken(**_: Any) -> Any:
        raise TypeError("no such argument")

    def wrong(**inputs: Any) -> Any:
        return EAGER.layer_norm(**inputs) * 1.01

    monkeypatch.setattr(record, "limits", lambda device: {"copy_gbs": 1.0})
    how = {"providers": ["eager", "ours", "sdpa-flash"], "seconds": 0.0, "rounds": 3}
    why = "TypeError: no such argument"
    for layer_norm, doubt in (
        (wrong, "over budget"),
        (broken, f"not checked: {why}; not timed: {why}"),
        (EAGER.layer_norm, ""),
    ):
        monkeypatch.setattr(
            ops, "parse_ops", lambda spec, f=layer_norm: replace(EAGER, layer_norm=f)
        )
        rows, _ = ops.measure("layer_norm", TINY, torch.float32, "both", CPU, **how)
        assert {*rows} == {"eager", "ours"}  # a provider without this op has no row
        assert doubt in rows["ours"].doubt
        assert bool(rows["ours"].doubt) == bool(doubt)
        text = tables.ops_table([*rows.values()])
        assert "ours" not in rows["eager"].over
        if doubt:
            assert f"layer_norm ours: not shown: {rows['ours'].doubt[:20]}" in text
            assert "ours ms" not in text
        else:
            assert rows["ours"].over["eager"] > 0
            assert "not shown" not in text


def test_profile_sorts_names_into_kinds():
    kinds = {
        "GEMM": ["sm90_xmma_gemm_bf16bf16_tn", "_gelu_mlp_up_kernel"],
        "attention": ["pytorch_flash::flash_fwd_kernel", "_attention_dkdv_kernel"],
        "norm": ["_layer_norm_fwd_kernel"],
        "loss": ["_linear_cross_entropy_rows_kernel"],
        "copies": ["Memcpy DtoD"],
        "optimizer": ["multi_tensor_apply_kernel<FusedAdam>"],
        "elementwise": ["triton_poi_fused_add_0"],
        "other": ["who_knows"],
    }
    for kind, names in kinds.items():
        assert {profile.kind_of(name) for name in names} == {kind}
    whose: Any = {"model": "m", "shape": "s", "provider": "p"}
    times = [("aten::mm", 0.3, 2), ("x", 0.1, 1)]
    assert profile.by_kind(times, span_ms=1.0, rest="idle", **whose) == [
        ProfileRow(**whose, kind="GEMM", ms=0.3, share=0.3, calls=2, names=["aten::mm"]),
        ProfileRow(**whose, kind="other", ms=0.1, share=0.1, calls=1, names=["x"]),
        ProfileRow(**whose, kind="idle", ms=0.6, share=0.6),
    ]


def test_profile_of_a_real_step(tmp_path, monkeypatch):
    monkeypatch.setitem(contestants.MODELS, "test", TINY_CONFIG)
    setup = contestants.Setup("test", Shape(2, 16))
    rows = profile.trace_step("eager fp32", setup, CPU, 2, tmp_path / "trace.json")
    kinds = {row.kind for row in rows}
    assert {"GEMM", "attention", "norm", "loss", "optimizer", "python"} <= kinds
    assert 0.5 < sum(row.share for row in rows) <= 1.2
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_generation_is_timed(capsys):
    argv = ["--model", "smoke", "--tokens", "5", "--batch", "2", "--rounds", "1"]
    generate.main(argv)
    assert "| smoke, 2 x 5 new tokens, fp32 |" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Not saving anything")
def test_ops_are_written_as_they_come_and_ours_in_doubt_fails(monkeypatch, tmp_path, capsys):
    """The job that pytest-benchmark runs, with made-up measurements."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(record, "limits", lambda device: {"copy_gbs": 1.0})
    doubt: dict[str, str] = {}
    written: list[int] = []

    def measure(op: str, shape: Shape, dtype: Any, mode: str, device: Any, **how: Any) -> Any:
        found = record.load(results.path).rows("ops") if results.path.exists() else []
        written.append(len(found))
        timed = {name: timing.Timing([1.0, 2.0]) for name in how["providers"]}
        whose: Any = {"op": op, "shape": shape.label, "dtype": "fp32", "mode": mode}
        rows = {n: OpRow(provider=n, doubt=doubt.get(n, ""), **whose) for n in timed}
        return {n: replace(row, **timed[n].figures) for n, row in rows.items()}, timed

    monkeypatch.setattr(ops, "measure", measure)
    argv = ["--op", "layer_norm", "--provider", "eager", "--provider", "ours"]
    job = ops.Job([*argv, f"--benchmark-storage=file://{tmp_path}/kept"])
    results = record.open_result(CPU, tmp_path, commit="c" * 40)
    assert job.run(results) == 0
    assert written == [0, 2, 4]  # one call for both providers, in each of three modes
    assert "| layer_norm |    1.5 ! |   1.5 ! |" in capsys.readouterr().out
    doubt["ours"] = RED = "wrong"
    assert job.run(results) == 1
    rows = record.load(results.path).rows("ops")
    assert [row.doubt for row in rows] == ["", RED] * 3
    assert "layer_norm ours: not shown: wrong" in capsys.readouterr().out
    job.options.minutes = -1.0
    assert job.run(results) == 0
    assert len(written) == 6  # nothing starts when the time is up


@pytest.mark.slow  # imports torch again and measures the machine's limits
def test_pytest_benchmark_keeps_and_compares_the_measured_samples(tmp_path):
    """`make bench OP=layer_norm` end to end, on a tiny shape."""
    # pytest-benchmark does not measure in a worker.
    unset = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    command = [sys.executable, "-m", "bench.ops", "--op", "layer_norm", "--shape", "b1t8"]
    command += ["--seconds", "0.2", "--provider", "eager", "--provider", "ours"]
    command += ["--out", str(tmp_path), f"--benchmark-storage=file://{tmp_path}/kept"]
    out = None
    for _ in range(2):
        out = subprocess.run(command, cwd=record.ROOT, env=env, capture_output=True, text=True)
        assert out.returncode == 0, out.stdout + out.stderr
        command += ["--mode", "fwd", "--benchmark-compare"]
    assert out
    assert "(NOW)" in out.stdout
    [path] = tmp_path.glob("*.json")
    rows = {(row.mode, row.provider): row for row in record.load(path).rows("ops")}
    assert {*rows} == {(mode, who) for mode in MODES for who in ("eager", "ours")}
    first, second = (json.loads(kept.read_text()) for kept in sorted(tmp_path.glob("kept/*/*")))
    assert (len(first["benchmarks"]), len(second["benchmarks"])) == (6, 2)
    for entry in second["benchmarks"]:
        row = rows[entry["extra_info"]["mode"], entry["extra_info"]["provider"]]
        assert entry["stats"]["median"] * 1e3 == pytest.approx(row.ms, rel=1e-3)
        assert entry["stats"]["rounds"] == row.rounds


# Wrong arguments of every command, and a part of the answer.
HUGE = "b999999t999999"
EPYC = "bench/results/amd-epyc-2-cores-60eee570.json"
WRONG = [
    ("bench", ["--op", "gelu"], "choose from"),
    ("bench", ["--shape", HUGE], "take a smaller one"),
    ("bench", ["--seconds", "-1"], "must be more than 0, got -1"),
    ("bench", ["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ("bench.ops", ["--op", "gelu_mlp", "--shape", HUGE], "T=999999 needs about"),
    ("bench.ops", ["--shape", "64x1024"], "a shape is b<B>t<T>, such as b64t1024, got '64x1024'"),
    ("bench.ops", ["--shape", "b0t64"], "a shape is b<B>t<T>"),
    ("bench.ops", ["--provider", "torch"], "sdpa-cudnn"),
    ("bench.ops", ["--seconds", "nan"], "must be more than 0, got nan"),
    ("bench.ops", ["--second", "1"], "unrecognized arguments: --second 1"),
    ("bench.ops", ["--out", ""], "must name a file or a folder, got nothing"),
    ("bench.ops", ["--out", "README.md/x"], "Not a directory"),
    ("bench.ops", ["--out", EPYC], "must agree in"),
    ("bench.step", ["--shape", "b4t64", "--shape", HUGE], "take a smaller one"),
    ("bench.step", ["--accum", "0"], "must be from 1 to 1,000,000, got 0"),
    ("bench.step", ["--accum", "1e3"], "invalid count value: '1e3'"),
    ("bench.step", ["--accum", "99999999999999999999"], "must be from 1 to 1,000,000"),
    ("bench.step", ["--provider", "fast"], "unknown provider 'fast'; known: eager fp32"),
    ("bench.step", ["--against", "karpathy", "x"], "--against knows nanogpt, got 'karpathy'"),
    ("bench.step", ["--against", "nanogpt", "nowhere"], "nowhere (no such file)"),
    ("bench.step", ["--minutes", "1e400"], "must be more than 0, got 1e400"),
    ("bench.step", ["--ablation", "--device", "cpu"], "it needs a GPU"),
    ("bench.profile", ["--provider", "fast"], "unknown provider 'fast'"),
    ("bench.profile", ["--trace", "bench"], "--trace must name a file, got the folder bench"),
    ("bench.generate", ["--out", "README.md/x"], "Not a directory"),
    ("bench.generate", ["--device", "tpu"], "choose from"),
    ("bench.recipe", ["seed", "--data", "nowhere.txt"], "nowhere.txt does not exist"),
    ("bench.recipe", ["curve"], "choose from"),
    ("bench.report", ["--results", "nowhere"], "--results must be a folder, got nowhere"),
    ("bench.report", ["--results", "README.md"], "--results must be a folder, got README.md"),
    ("bench.resources", ["--op", "gelu"], "choose from"),
    ("bench.gpu", ["--out", "x", "--only", "numerics,speed"], "unknown part 'speed'; known: check"),
    ("bench.gpu", ["--out", "x"], "torch sees no GPU"),
    ("bench.gpu", [], "the following arguments are required: --out"),
    ("bench.ops", ["--shape", "b4"], "a shape is b<B>t<T>"),
    ("tests.numerics", ["--dtype", "int8"], "choose from"),
]


@pytest.mark.parametrize("name", sorted({module for module, _, _ in WRONG}))
def test_help_is_the_modules(name, capsys):
    module = importlib.import_module("bench.__main__" if name == "bench" else name)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    assert str(module.__doc__).strip() in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="some need that there is no GPU")
@pytest.mark.parametrize(("module", "argv", "said"), WRONG)
def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(module, argv, said, capsys, monkeypatch):
    monkeypatch.chdir(record.ROOT)
    monkeypatch.setattr(sys, "argv", ["bench", *argv])
    name = "bench.__main__" if module == "bench" else module
    main = importlib.import_module(name).main
    before = {*record.ROOT.glob("*"), *record.ROOT.glob("bench/*/*")}
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: main(argv))
    out = capsys.readouterr()
    assert end.value.code == 2, out
    [line] = out.err.splitlines()
    assert said in line
    assert out.out == ""
    assert {*record.ROOT.glob("*"), *record.ROOT.glob("bench/*/*")} == before
