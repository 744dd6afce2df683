"""The bench measures what it says: timer, floors, baseline, gate, results, GPU parts."""

import json
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import baseline, ops, profile, record, report, step, timing, tune
from bench.cases import CASES, MODES, Shape, find_case, find_shape, floor_ms, make_inputs
from kernels import EAGER, TRITON, Ops
from model import GPT, GPTConfig
from training.plan import Choices
from training.step import TrainStep

CPU = torch.device("cpu")
TINY = Shape(2, 8, C=32, H=2, V=128)
TINY_CONFIG = GPTConfig(block_size=16, vocab_size=128, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def interpreted(monkeypatch):
    """`ours` as on a GPU: the Triton ops, here in the interpreter."""
    monkeypatch.setattr(ops, "parse_ops", lambda spec: TRITON)


def test_timer_measures_a_sleep():
    found = timing.time_calls(
        {"short": [lambda: time.sleep(0.005)], "long": [lambda: time.sleep(0.015)]},
        CPU, rounds=10, warmup=1,
    )  # fmt: skip
    # A sleep is never shorter than asked; a busy machine makes it longer, the best one hardly.
    assert 5.0 <= min(found["short"].samples_ms) < 8.0
    assert 15.0 <= min(found["long"].samples_ms) < 18.0
    assert 1.5 < timing.ratio(found["long"], found["short"]) < 4.0


@pytest.mark.gpu
def test_timer_measures_a_copy_of_known_bytes():
    device = torch.device("cuda")
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    found = timing.time_calls({"": [lambda: target.copy_(source)]}, device, 1 << 31)[""]
    gbs = 2 * 4 * (1 << 28) / found.median_ms / 1e6
    assert found.mode == "graph"
    assert 0.5 < gbs / timing.limits(device)["copy_gbs"] < 1.1


def test_interleave_takes_turns_and_keeps_the_budget():
    order = []
    clock = {"a": 1.0, "b": 2.0}

    def replay(name):
        def once():
            order.append(name)
            return clock[name]

        return timing.Replay(once, "host")

    found = timing.interleave({n: replay(n) for n in clock}, rounds=4, seconds=9.0, warmup=1)
    assert order == ["a", "b"] * 5
    assert found["a"].samples_ms == (1.0,) * 4
    found = timing.interleave({n: replay(n) for n in clock}, rounds=50, seconds=0.0, min_rounds=3)
    assert len(found["a"].samples_ms) == 3


def test_ratio_is_paired_and_spread_is_marked():
    # Both slow down threefold half-way: the ratio of neighbours does not notice.
    slow, fast = timing.Timing([2, 2, 6, 6, 6]), timing.Timing([1, 1, 3, 3, 3])
    assert timing.ratio(slow, fast) == 2.0
    assert fast.noisy
    steady = timing.Timing([1.0, 1.01, 1.02])
    assert not steady.noisy
    assert steady.median_ms == 1.01
    assert steady.quartiles_ms == pytest.approx((1.005, 1.015))


@pytest.mark.parametrize("op", CASES)
def test_case_covers_the_op_and_its_baseline_agrees(op):
    case = find_case(op)
    inputs = make_inputs(case, TINY, torch.float32, CPU)
    ours = getattr(EAGER, op)(**inputs)
    theirs = baseline.OPS[op](**inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for mode in case.modes:
        assert case.bytes(TINY, 2, mode) > 0
        results = ops.make_call(getattr(EAGER, op), case, mode, inputs)()
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        assert len(results) == (len(leaves) if mode != "fwd" else 1 + (op == "add_layer_norm"))
    if "bwd" in case.modes:
        both = case.bytes(TINY, 2, "both")
        assert both == case.bytes(TINY, 2, "fwd") + case.bytes(TINY, 2, "bwd")


def test_cases_state_the_known_work():
    big = find_shape("b64t1024")
    bytes_of = {(op, m): CASES[op].bytes(big, 2, m) for op in CASES for m in CASES[op].modes}
    # 65,536 x 768 elements at 12 and 16 bytes: x, residual, y, h; dy, dh_out, h, dh, dx.
    assert bytes_of["add_layer_norm", "fwd"] == 65536 * 768 * 12
    assert bytes_of["add_layer_norm", "bwd"] == 65536 * 768 * 16
    assert CASES["linear_cross_entropy"].flops(big, 2, "both") == 6 * 65536 * 768 * 50304
    assert CASES["causal_attention"].flops(big, 2, "fwd") == pytest.approx(103.1e9, rel=1e-3)
    assert CASES["gelu_mlp"].flops(big, 2, "fwd") == 2 * (2 * 65536 * 768 * 3072)
    limits = {"copy_gbs": 4000.0, "matmul_tflops": 700.0, "matmul_k768_tflops": 600.0}
    assert floor_ms(CASES["layer_norm"], big, torch.bfloat16, "fwd", limits) == pytest.approx(
        65536 * 768 * 4 / 4e12 * 1e3
    )
    assert floor_ms(CASES["gelu_mlp"], big, torch.bfloat16, "fwd", limits) == pytest.approx(
        CASES["gelu_mlp"].flops(big, 2, "fwd") / 600e12 * 1e3
    )


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda: find_case("layernorm"), "add_layer_norm"),
        (lambda: find_shape("64x1024"), "b64t1024"),
        (lambda: ops.find_provider("torch", "layer_norm", CPU), "sdpa-cudnn"),
        (lambda: next(step.measure(["fast"], step.Setup("smoke", TINY), CPU)), "eager fp32"),
        (lambda: step.main(["--model", "125m"]), "124m"),
        (lambda: tune.main(["--op", "gelu"]), "gelu_mlp"),
        (lambda: report.fill("<!-- bench:speed -->\n<!-- /bench:speed -->", []), "step-gpu"),
    ],
)
def test_unknown_names_list_the_known(call, known):
    with pytest.raises(ValueError, match=rf"unknown .* known: .*{known}"):
        call()


def test_baseline_is_our_model_without_our_ops():
    torch.manual_seed(0)
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


def test_red_numerics_hide_the_speed(monkeypatch):
    wrong = replace(EAGER, layer_norm=lambda **inputs: EAGER.layer_norm(**inputs) * 1.01)
    monkeypatch.setattr(ops, "parse_ops", lambda spec: wrong)
    monkeypatch.setattr(timing, "limits", lambda device: {"copy_gbs": 1.0})
    how = {"providers": ["eager", "ours"], "seconds": 0.0, "rounds": 3}
    rows, timed = ops.measure("layer_norm", TINY, torch.float32, "both", CPU, **how)
    ours = next(row for row in rows if row["provider"] == "ours")
    assert "over budget" in ours["red"]
    assert "ms" not in ours
    assert "ours" not in timed
    assert "not shown" in ops.ops_table(rows)
    monkeypatch.setattr(ops, "parse_ops", lambda spec: EAGER)
    rows, _ = ops.measure("layer_norm", TINY, torch.float32, "both", CPU, **how)
    assert next(row for row in rows if row["provider"] == "ours")["over_eager"] > 0


def test_step_rows_and_their_gate(monkeypatch):
    monkeypatch.setitem(step.MODELS, "test", TINY_CONFIG)
    setup = step.Setup("test", Shape(2, 16), accum=2)
    known = step.known_providers(CPU)
    eager = known["eager fp32"]

    def ours(setup, device):  # as "ours fp32", not compiled: compiling takes 20 s
        model = GPT(setup.config)
        model.load_state_dict(step._weights(setup))
        return step._contestant(model, device, bf16=False, compiled=False)

    def other_weights(setup, device):
        contestant = eager(setup, device)
        assert isinstance(contestant, step.PlainLoop)
        for p in contestant.parameters:
            p.data.mul_(1.5)
        return contestant

    known = {"eager fp32": eager, "ours fp32": ours, "wrong": other_weights}
    rows = list(step.measure([*known], setup, CPU, seconds=0.1, known=known))
    right, wrong = rows[1], rows[2]
    assert right["tokens"] == 64
    assert right["tokens_per_s"] == pytest.approx(64 / right["ms"] * 1e3)
    assert right["loss"] == pytest.approx(rows[0]["loss"], abs=1e-3)
    assert right["over_eager_fp32"] > 0
    assert "gradient norm" in wrong["red"]
    assert "tokens_per_s" not in wrong
    assert "not shown" in step.step_table(rows)


def test_cpu_contestants_live_in_processes_of_their_own():
    setup = step.Setup("smoke", Shape(2, 16), accum=2)
    with step.Worker("eager fp32", setup, None) as worker:
        assert worker.process.pid != os.getpid()
        assert worker.step_ms() > 0
        batches = step.make_batches(setup, CPU)
        here = step.prepare(step.known_providers(CPU)["eager fp32"], setup, CPU, batches)
        assert worker.prepared.losses == pytest.approx(here.losses, rel=1e-5)
    assert worker.process.returncode == 0


def test_our_contestant_takes_the_trainer_s_step():
    setup = step.Setup("smoke", Shape(2, 16), accum=2)
    batches = step.make_batches(setup, CPU)
    ours = step.Ours(setup, CPU, Choices(compile=False, dtype="fp32"))
    assert isinstance(ours.take_step, TrainStep)
    assert ours.take_step.plan.num_micro_batches == 2
    found = step.prepare(lambda *_: ours, setup, CPU, batches)
    plain = step.prepare(step.known_providers(CPU)["eager fp32"], setup, CPU, batches)
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)  # its softmax has no padding
    assert found.grad_norm == pytest.approx(plain.grad_norm, rel=1e-3)


def test_against_nanogpt_takes_a_model_by_path(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no such file.*git clone"):
        step.load_nanogpt(tmp_path / "model.py")
    (tmp_path / "model.py").write_text("GPT = None\n")
    with pytest.raises(ValueError, match=r"must define GPT and GPTConfig, lacks \['GPTConfig'\]"):
        step.load_nanogpt(tmp_path)
    # A model of nanoGPT's interface: constructor arguments, names of weights, (logits, loss).
    (tmp_path / "model.py").write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from bench.baseline import BaselineGPT\n"
        "from model import GPTConfig as G\n"
        "@dataclass\n"
        "class GPTConfig:\n"
        "    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int\n"
        "    dropout: float; bias: bool\n"
        "class GPT(BaselineGPT):\n"
        "    def __init__(self, c):\n"
        "        super().__init__(G(c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd))\n"
        "    def forward(self, idx, targets):\n"
        "        return None, super().forward(idx, targets)\n"
    )
    monkeypatch.setitem(step.MODELS, "test", TINY_CONFIG)
    names = ["eager fp32", "nanogpt eager fp32"]
    setup = step.Setup("test", Shape(2, 16))
    known = step.known_providers(CPU, tmp_path)
    known = {name: known[name] for name in names}
    rows = list(step.measure(names, setup, CPU, seconds=0.0, known=known))
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-5)


def test_results_keep_rows_replace_twins_and_refuse_strangers(tmp_path):
    results = record.Results(CPU, tmp_path, commit="c" * 40)
    row = {
        "op": "layer_norm",
        "shape": "B=1 T=1",
        "dtype": "fp32",
        "mode": "fwd",
        "provider": "eager",
    }
    results.add("ops", row | {"ms": 1.0})
    on_disk = record.load(results.path)  # written at once: an interrupted run keeps it
    assert on_disk["ops"] == [row | {"ms": 1.0}]
    assert {"device", "torch", "triton", "commit", "dirty", "command", "date"} <= {*on_disk}

    again = record.Results(CPU, tmp_path, commit="c" * 40)
    again.add("ops", row | {"ms": 2.0})
    again.add("ops", row | {"provider": "ours", "ms": 1 / 3})
    data = record.load(again.path)
    assert [r["ms"] for r in data["ops"]] == [2.0, 0.33333]
    assert [*tmp_path.iterdir()] == [again.path]

    with pytest.raises(ValueError, match=r"is about commit ccc.* this run about ddd"):
        record.Results(CPU, again.path, commit="d" * 40)
    (tmp_path / "other.json").write_text('{"schema": "someone/else"}')
    with pytest.raises(ValueError, match=r"other.json must have schema .* has 'someone/else'"):
        record.load_all(tmp_path)
    (tmp_path / "other.json").write_text('{"ops": [')
    with pytest.raises(ValueError, match=r"other.json is not JSON"):
        record.load_all(tmp_path)


def test_committed_results_are_small_and_readable():
    for path in record.RESULTS.glob("*.json"):
        assert path.stat().st_size < 300_000, f"{path.name} is not small"
        record.load(path)


def test_profile_sorts_names_into_kinds():
    names = {
        "sm90_xmma_gemm_bf16bf16_tn": "GEMM", "_attention_dkdv_kernel": "attention",
        "pytorch_flash::flash_fwd_kernel": "attention", "_layer_norm_fwd_kernel": "norm",
        "_linear_cross_entropy_rows_kernel": "loss", "Memcpy DtoD": "copies",
        "multi_tensor_apply_kernel<FusedAdam>": "optimizer", "_gelu_mlp_up_kernel": "GEMM",
        "triton_poi_fused_add_0": "elementwise", "who_knows": "other",
    }  # fmt: skip
    assert {name: profile.kind_of(name) for name in names} == names
    rows = profile.by_kind([("aten::mm", 300.0, 2), ("x", 100.0, 1)], span_us=1000.0, rest="idle")
    assert rows == [
        ("GEMM", 0.3, 0.3, 2, ("aten::mm",)),
        ("other", 0.1, 0.1, 1, ("x",)),
        ("idle", 0.6, 0.6, 0, ()),
    ]


def test_profile_of_a_real_step(tmp_path, monkeypatch):
    monkeypatch.setitem(step.MODELS, "test", TINY_CONFIG)
    setup = step.Setup("test", Shape(2, 16))
    rows, longest = profile.trace_step("eager fp32", setup, CPU, 2, tmp_path / "trace.json")
    kinds = {kind for kind, *_ in rows}
    assert {"GEMM", "attention", "norm", "loss", "optimizer", "python"} <= kinds
    assert 0.5 < sum(row.share for row in rows) <= 1.2
    assert len(longest) == 10
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_numerics_gate_runs_on_triton_ops(interpreted):
    """The gate of every GPU row, here on the interpreted kernels."""
    found = ops.check_numerics("layer_norm", Shape(1, 16, C=64), torch.bfloat16, CPU)
    assert {c.name for c in found} == {"y", "dx", "dweight", "dbias"}
    assert all(c.holds for c in found)


@pytest.mark.slow  # imports torch again and measures the machine's limits
def test_pytest_benchmark_reads_the_measured_samples(tmp_path):
    """`make bench OP=layer_norm` end to end, on a tiny shape."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-q", "--benchmark-only"]
    command += ["-p", "no:cacheprovider", "--op", "layer_norm", "--shape", "b1t8", "--seconds"]
    command += ["0.2", "--provider", "eager", "--provider", "ours", "--out", str(tmp_path)]
    command += ["--benchmark-json", str(tmp_path / "benchmark.txt")]
    out = subprocess.run(command, cwd=record.ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    [path] = tmp_path.glob("*.json")
    rows = {(r["mode"], r["provider"]): r for r in record.load(path)["ops"]}
    assert {*rows} == {(mode, who) for mode in MODES for who in ("eager", "ours")}
    entries = json.loads((tmp_path / "benchmark.txt").read_text())["benchmarks"]
    assert len(entries) == len(rows)
    for entry in entries:
        row = rows[entry["extra_info"]["mode"], entry["extra_info"]["provider"]]
        assert entry["stats"]["median"] * 1e3 == pytest.approx(row["ms"], rel=1e-3)
        assert entry["stats"]["rounds"] == row["rounds"]


def test_every_op_is_in_the_sweeps_and_figures():
    assert [*CASES] == [f.name for f in fields(Ops)]
    for op, case in CASES.items():
        assert f"sweep-{op}" in report.FIGURES
        assert len(case.sweep) >= 5
    assert np.all(np.diff([s.M for s in CASES["layer_norm"].sweep]) > 0)
