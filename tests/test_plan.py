"""What the plan decides for machines that are not at hand, and what it refuses."""

import inspect
import json
import re
from dataclasses import asdict, replace

import pytest

from training import machines, plan
from training.plan import Choices, Machine, Plan, detect, make_plan
from training.recipes import PRESETS, Recipe

GIB = 2**30
real_detect = inspect.unwrap(detect)  # where `--machine` replaces it
SEED, FINEWEB, SMOKE = (PRESETS[n] for n in ("shakespeare-124m", "fineweb-124m", "smoke"))


def gpu(name: str, arch: int, gib: int) -> Machine:
    return Machine("cuda", name, arch, num_threads=8, has_bf16=arch >= 80, memory_bytes=gib * GIB)


CPU = Machine("cpu", "a CPU", num_threads=2, memory_bytes=24 * GIB)
MACHINES = {
    "3090": gpu("NVIDIA GeForce RTX 3090", 86, 24),
    "4090": gpu("NVIDIA GeForce RTX 4090", 89, 24),
    "A100": gpu("NVIDIA A100-SXM4-80GB", 80, 80),
    "H100": gpu("NVIDIA H100 80GB HBM3", 90, 80),
    "H200": gpu("NVIDIA H200", 90, 141),
    "B200": gpu("NVIDIA B200", 100, 180),
    "T4": gpu("Tesla T4", 75, 15),
    "CPU": CPU,
    "CPU with AMX": Machine("cpu", "Xeon", num_threads=16, has_bf16=True, memory_bytes=64 * GIB),
}
TRITON = {"ops": "triton", "dtype": "bf16", "optimizer": "triton", "working_copies": True}
TRITON |= {"cuda_graph": True, "compile_scope": "blocks", "compile": True}
EAGER = {"ops": "eager", "dtype": "fp32", "optimizer": "torch", "working_copies": False}
EAGER |= {"compile": True, "residual": "fp32"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, TRITON) for name in ("3090", "4090", "A100", "H100", "H200", "B200")),
        ("T4", EAGER | {"dtype": "fp16", "cuda_graph": True, "compile_scope": "blocks"}),
        ("CPU", EAGER | {"cuda_graph": False, "compile_scope": "blocks"}),
        ("CPU with AMX", EAGER | {"dtype": "bf16", "working_copies": True, "cuda_graph": False}),
    ],
)
def test_what_each_machine_runs(name: str, expected: dict) -> None:
    made = make_plan(SEED, MACHINES[name])
    assert {key: getattr(made, key) for key in expected} == expected
    assert any(note.startswith(f"ops {made.ops}") for note in made.notes)
    # 4,096 tokens of 124M fit everywhere.
    assert (made.micro_batch_size, made.num_micro_batches) == (64, 1)


@pytest.mark.parametrize(("gib", "micro"), [(0, 16), (4, 16), (7, 32), (16, 64)])
def test_a_cpu_merges_in_half_of_its_memory(gib: int, micro: int) -> None:
    made = make_plan(SEED, replace(CPU, memory_bytes=gib * GIB))
    assert made.micro_batch_size == micro
    assert made.micro_batch_size * made.num_micro_batches == SEED.rows_per_step
    longer = replace(SEED, block_size=512)  # more than 4,096 tokens at once gain nothing
    assert make_plan(longer, replace(CPU, memory_bytes=256 * GIB)).micro_batch_size == 16


def test_five_minutes_on_a_cpu_are_not_compiled() -> None:
    assert not make_plan(PRESETS["shakespeare-cpu"], CPU).compile
    assert make_plan(SEED, CPU).compile


@pytest.mark.parametrize("name", [*MACHINES])
def test_fineweb_takes_what_fits(name: str) -> None:
    machine = MACHINES[name]
    made = make_plan(FINEWEB, machine)
    assert made.micro_batch_size * made.num_micro_batches == FINEWEB.rows_per_step == 512
    if machine.device == "cpu":
        assert made.micro_batch_size == FINEWEB.batch_size
        return
    budget = plan.MEMORY_SHARE * machine.memory_bytes
    assert made.memory_bytes <= budget
    twice = make_plan(FINEWEB, machine, Choices(micro_batch_size=2 * made.micro_batch_size))
    assert twice.memory_bytes > budget  # and no more
    assert twice.memory_bytes > made.memory_bytes


def test_more_memory_more_rows() -> None:
    sizes = [
        make_plan(FINEWEB, MACHINES[n]).micro_batch_size
        for n in ("T4", "3090", "H100", "H200", "B200")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize(("rows", "gib", "want"), [(480, 40, 80), (7, 24, 7), (13, 5, 1)])
def test_rows_at_once_divide_those_of_a_step(rows: int, gib: int, want: int) -> None:
    recipe = replace(FINEWEB, batch_size=1, grad_accum_steps=rows)
    machine = replace(MACHINES["H200"], memory_bytes=gib * 2**30)
    assert make_plan(recipe, machine).micro_batch_size == want


def test_a_model_that_cannot_fit_says_so() -> None:
    huge = replace(FINEWEB, model="1558m")
    with pytest.raises(ValueError, match=r"one row of 1558m at T=1024 needs about .* Tesla T4 has"):
        make_plan(huge, MACHINES["T4"])
    assert make_plan(huge, MACHINES["T4"], Choices(micro_batch_size=1)).micro_batch_size == 1


def test_every_choice_is_obeyed() -> None:
    off = dict.fromkeys(("compile", "working_copies", "cuda_graph"), False)
    asked = {"ops": "eager", "dtype": "fp32", "optimizer": "torch", "micro_batch_size": 16, **off}
    asked |= {"compile_scope": "model"}
    made = make_plan(SEED, MACHINES["H200"], Choices(**asked))
    assert asked.items() <= vars(made).items()
    assert made.num_micro_batches == 4


def test_a_bf16_residual_is_reported_as_changed_numerics() -> None:
    made = make_plan(SEED, MACHINES["H200"], Choices(residual="bf16"))
    assert made.residual == "bf16"
    assert any("not those of plain autocast" in note for note in made.notes)
    assert "changed numerics" in made.describe()
    assert "changed numerics" not in make_plan(SEED, MACHINES["H200"]).describe()


@pytest.mark.parametrize(
    ("machine", "ops", "repeats"),
    [
        ("H100", "auto", True),
        ("H100", "triton,causal_attention=sdpa-cudnn", False),
        ("H100", "eager", False),
        ("T4", "auto", False),
        ("CPU", "eager", True),
    ],
)
def test_a_plan_that_does_not_repeat_to_the_bit_says_so(
    machine: str, ops: str, repeats: bool
) -> None:
    made = make_plan(SEED, MACHINES[machine], Choices(ops=ops))
    assert repeats != any("up to rounding" in note for note in made.notes)


@pytest.mark.parametrize(
    ("machine", "asked", "message"),
    [
        ("CPU", Choices(ops="triton"), "'triton' needs a GPU; use --ops eager"),
        ("T4", Choices(ops="triton"), "needs sm_80 or newer, got sm_75; use --ops eager"),
        ("T4", Choices(optimizer="triton"), "got sm_75; use --optimizer torch"),
        (
            "T4",
            Choices(ops="triton,causal_attention=sdpa-cudnn"),
            "needs sm_80 or newer, got sm_75",
        ),
        ("T4", Choices(ops="eager,causal_attention=sdpa-flash"), "needs sm_80 or newer, got sm_75"),
        ("H200", Choices(ops="eager,causal_attention=sdpa-flash", dtype="fp32"), "--dtype bf16"),
        ("CPU", Choices(ops="eager,causal_attention=sdpa-cudnn"), "needs a GPU; use --ops eager$"),
        ("CPU", Choices(optimizer="triton"), "use --optimizer torch"),
        ("CPU", Choices(cuda_graph=True), "needs a GPU; leave --cuda-graph out"),
        ("CPU", Choices(working_copies=True), "they are bf16, but dtype is fp32"),
        ("CPU", Choices(residual="bf16"), "bf16 needs --dtype bf16, got fp32"),
        ("H200", Choices(micro_batch_size=5), "must divide the 64 rows of a step, got 5"),
        ("H200", Choices(micro_batch_size=-4), "must be at least 0, got -4"),
        ("H200", Choices(dtype="fp16", working_copies=True), "they are bf16, but dtype is fp16"),
    ],
)
def test_what_a_machine_cannot_do_is_refused(machine: str, asked: Choices, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(SEED, MACHINES[machine], asked)


def shaped(model: str) -> Recipe:
    return replace(SEED, model=f"124m,{model}")


@pytest.mark.parametrize(
    ("model", "ops", "want"),
    [
        ("n_embd=800,n_head=100", "triton,gelu_mlp=eager,causal_attention=eager", "8"),
        (
            "n_embd=80,n_head=5",
            "triton,gelu_mlp=eager",
            "gelu_mlp.* n_embd a multiple of 64, got 80",
        ),
        ("n_embd=192,n_head=2", "triton,causal_attention=eager", "head dim of 16 or.* 128, got 96"),
        ("dropout=0.1", "triton,causal_attention=eager", "causal_attention .* dropout 0, got 0.1"),
        ("n_embd=1600,n_head=25", "triton", ""),
    ],
)
def test_a_shape_that_kernels_do_not_take(model: str, ops: str, want: str) -> None:
    """auto leaves those ops to eager and says so; who insists is refused, with the way out."""
    made = make_plan(shaped(model), MACHINES["H200"])
    assert sorted(made.ops.split(",")) == sorted(ops.split(","))
    if want:
        assert re.search(want, " ".join(made.notes))
        with pytest.raises(
            ValueError, match=f"ops: .*{want}.*; use --ops triton,.*=eager"
        ) as caught:
            make_plan(shaped(model), MACHINES["H200"], Choices(ops="triton"))
        out = str(caught.value).rpartition(" ")[2]
        if model != "n_embd=800,n_head=100":  # there the first of two is named
            assert make_plan(shaped(model), MACHINES["H200"], Choices(ops=out)).ops == out
    assert make_plan(shaped(model), MACHINES["H200"], Choices(ops="eager")).ops == "eager"


def test_without_the_triton_package() -> None:
    bare = replace(MACHINES["H200"], has_triton=False)
    made = make_plan(SEED, bare)
    assert (made.ops, made.optimizer, made.dtype) == ("eager", "torch", "bf16")
    assert (
        "ops eager: triton needs the triton package, which `make -B setup` installs" in made.notes
    )
    with pytest.raises(
        ValueError, match="needs the triton package, which `make -B setup` installs"
    ):
        make_plan(SEED, bare, Choices(ops="triton"))


def test_compiling_where_it_cannot_pay_or_cannot_work() -> None:
    made = make_plan(SMOKE, CPU)
    assert not made.compile
    assert any("compiling pays off from 2e+14" in note for note in made.notes)
    assert make_plan(SMOKE, CPU, Choices(compile=True)).compile
    assert not make_plan(SEED, CPU, Choices(compile=False)).compile
    bare = Machine("cpu", "a CPU", missing_tools=("g++", "openssl"))
    made = make_plan(SEED, bare)
    assert not made.compile
    assert "not compiled: torch.compile needs g++, openssl" in made.notes
    with pytest.raises(ValueError, match=r"torch.compile needs g\+\+, openssl"):
        make_plan(SEED, bare, Choices(compile=True))
    with pytest.raises(ValueError, match=r"ops: 'compiled' needs g\+\+, openssl; use --ops eager"):
        make_plan(SEED, bare, Choices(ops="compiled"))
    assert make_plan(SEED, CPU, Choices(ops="compiled")).ops == "compiled"


def test_detection_sees_missing_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines.shutil, "which", lambda tool: None if tool == "openssl" else tool)
    monkeypatch.setattr(machines.torch, "__file__", "/venv/torch/__init__.py")  # and no space in it
    assert real_detect("cpu").missing_tools == ("openssl",)


def test_a_torch_in_a_folder_with_a_space_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(machines.torch, "__file__", "/my projects/.venv/torch/__init__.py")
    machine = real_detect("cpu")
    assert machine.missing_tools == (machines.NO_SPACE,)
    made = make_plan(SEED, machine)
    assert not made.compile
    assert any(machines.NO_SPACE in note for note in made.notes)


def test_detection_sees_this_machine() -> None:
    machine = real_detect("cpu")
    assert machine.name
    assert machine.num_threads >= 1
    assert machine.memory_bytes > GIB
    assert machine.has_triton


def test_the_plan_in_a_line_and_as_json() -> None:
    made = make_plan(SEED, MACHINES["H200"])
    line = made.describe()
    start = (
        "plan: cuda (NVIDIA H200), ops triton, bf16 with bf16 working copies, compiled (blocks), "
        "1 x 64 rows per step, triton AdamW, one CUDA graph, about "
    )
    assert line.startswith(start)
    assert line.endswith(" GiB for a step, plus 0.5 for CUDA itself")
    assert ", Muon and triton AdamW, " in made.describe(muon=True)
    assert Plan(**json.loads(json.dumps(asdict(made)))) == replace(made, notes=[*made.notes])


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),  # measured: half the rate of fp32
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        ("", "", False),
    ],
)
def test_which_cpus_are_fast_in_bf16(
    vendor: str, flags: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"vendor_id": vendor, "flags": flags}
    monkeypatch.setattr(machines, "cpuinfo", lambda key: facts.get(key, ""))
    assert real_detect("cpu").has_bf16 == fast
