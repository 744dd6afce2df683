"""One name per op, everywhere. Arrows point one way. A compiled model is our ops, nothing stray."""

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule, Node

import kernels
from bench import baseline, cases
from kernels import EAGER, SDPA, TRITON, Ops, parse_ops, read_ops, spell_ops
from model import GPT, GPTConfig
from tests import mutants
from training import optim

ROOT = Path(__file__).parents[1]
OPS = [f.name for f in fields(Ops)]
PACKAGES = ("kernels", "model", "training", "bench", "demo")

# What each package may import of ours, beside itself. train.py and bench stand on top; the bench
# holds every row to the error that the tests allow (tests/numerics.py).
ARROWS = {
    "kernels": set(),
    "model": {"kernels"},
    "training": {"kernels", "model"},
    "demo": {"model", "training"},
    "bench": {"kernels", "model", "training", "tests"},
    "train.py": {"kernels", "model", "training"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, the ones inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # The kernels have two names, `kernels` here and `fused_gpt.kernels` in a wheel: they
            # call one another by neither, all else by its whole name.
            module = "kernels" if node.level else node.module or ""
            ours = module.split(".")[0] in PACKAGES and path.parent == ROOT / "kernels"
            assert node.level == int(ours), f"{path.name}: {ast.unparse(node)}"
            names.add(module)
    return {name.split(".")[0] for name in names}


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [*found, ROOT / "train.py"]


@pytest.mark.parametrize("op", OPS)
def test_op_has_every_part(op):
    function = getattr(TRITON, op)
    file = Path(inspect.getfile(function))
    assert file.parent == ROOT / "kernels"
    assert getattr(EAGER, op).__module__ == "kernels.reference"
    test_file = f"tests/test_{op}.py"
    assert f"{op}(" in (ROOT / test_file).read_text(), "a test file that does not call its op"
    assert test_file in mutants.TESTS.get(file.stem, ()), f"tests/mutants.py: no {test_file}"
    assert op in cases.CASES, f"no bench case for {op}"
    assert op in baseline.OPS, f"bench/baseline.py has no {op} for the bench to hold it against"
    assert inspect.getdoc(function), f"{op} has no docstring"


@pytest.mark.parametrize("op", OPS)
def test_backends_have_equal_signatures(op):
    """Each is called as the eager one: names, order, defaults, annotations."""
    specs = ["triton", "compiled", *(f"eager,causal_attention={name}" for name in SDPA)]
    for backend in map(parse_ops, specs):
        assert inspect.signature(getattr(backend, op)) == inspect.signature(getattr(EAGER, op))


def test_optimizer_kernel_has_every_part():
    """It is no member of `Ops`: a model never calls it, and its reference is torch's own."""
    from kernels.adamw_tables import Tables

    assert "adamw" not in OPS
    for public in (Tables, Tables.grad_norm, Tables.adamw):
        assert inspect.getdoc(public)
    assert "TritonAdamW(" in (ROOT / "tests/test_adamw.py").read_text()
    parameters = [
        [*inspect.signature(getattr(kind, method)).parameters.values()]
        for kind in (optim.AdamW, optim.TritonAdamW)
        for method in ("__init__", "clip", "step", "zero_grad")
    ]
    assert parameters[:4] == parameters[4:]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imported(path) & {*PACKAGES, "train", "tests"}
    assert ours - {package} <= ARROWS[package]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_need_torch_and_triton_alone(path):
    allowed = {"torch", "kernels", *sys.stdlib_module_names}
    if path.name not in ("__init__.py", "_op.py", "reference.py"):
        allowed |= {"triton"}
    assert imported(path) <= allowed


@pytest.mark.slow  # builds, installs and imports torch again
def test_a_wheel_holds_the_kernels_and_nothing_by_a_common_name(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    offline = ["--no-index", "--no-deps"]
    target = tmp_path / "elsewhere"
    for command in (
        ["wheel", *offline, "--no-build-isolation", "--wheel-dir", "wheels", "."],
        ["install", *offline, "--find-links", "wheels", "--target", str(target), "fused-gpt"],
    ):
        subprocess.run([*pip, *command], cwd=tmp_path, check=True)
    assert {path.name for path in target.iterdir() if path.suffix == ""} == {"fused_gpt"}
    code = (
        "import torch\n"
        "from fused_gpt.kernels import EAGER, TRITON\n"
        "x, w, b = torch.randn(4, 64), torch.randn(256, 64), torch.randn(256)\n"
        "args = x, w, b, w.T.contiguous(), b[:64]\n"
        "close = {'rtol': 1e-3, 'atol': 1e-3}  # sums of products in the hundreds\n"
        "torch.testing.assert_close(TRITON.gelu_mlp(*args), EAGER.gelu_mlp(*args), **close)\n"
        "import kernels\n"
    )
    env = {**os.environ, "PYTHONPATH": str(target), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=target, env=env, capture_output=True, text=True
    )
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'kernels'\n"), done.stderr


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env},
        capture_output=True, text=True,
    )  # fmt: skip


def test_eager_needs_neither_triton_nor_a_gpu():
    """Nor is triton imported on the way, as dynamo does: `make numerics` has to set it up first."""
    done = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, kernels, tests.numerics\n"
        "from model import GPT, MODELS\n"
        "idx = torch.zeros(1, 4, dtype=torch.int64)\n"
        "print(GPT(MODELS['smoke'], kernels.parse_ops('eager'))(idx, idx).dim())\n"
        "print('torch._dynamo' in sys.modules)\n"
        "kernels.TRITON",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.stdout == "0\nFalse\n"
    assert "triton" in done.stderr.splitlines()[-1]
    assert done.returncode == 1


def test_triton_without_a_gpu_is_refused_not_replaced(monkeypatch):
    monkeypatch.setattr(kernels._op, "INTERPRETED", False)
    with pytest.raises(ValueError, match="layer_norm: triton needs a CUDA tensor, got one on cpu"):
        TRITON.layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(4))


def test_ops_are_read_from_a_string():
    assert parse_ops("triton") == TRITON
    assert parse_ops("eager") == EAGER
    mixed = parse_ops("triton, layer_norm=eager, gelu_mlp=eager")
    assert mixed.layer_norm is EAGER.layer_norm
    assert mixed.gelu_mlp is EAGER.gelu_mlp
    assert mixed.causal_attention is TRITON.causal_attention
    for spec in ("triton", "triton,gelu_mlp=eager", "compiled,causal_attention=sdpa-flash"):
        assert spell_ops(read_ops(spec)) == spec
    most = [op for op in OPS if op not in ("causal_attention", "linear_cross_entropy")]
    assert spell_ops(read_ops(",".join(["triton", *(f"{op}=eager" for op in most)]))) == (
        "eager,causal_attention=triton,linear_cross_entropy=triton"
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuda", r"unknown backend 'cuda'; the backends are eager, triton, compiled$"),
        ("sdpa-flash", "unknown backend 'sdpa-flash'"),
        ("eager,gelu_mlp=sdpa-flash", "cannot read 'gelu_mlp=sdpa-flash'"),
        ("", "unknown backend ''"),
        ("triton,layernorm=eager", r"cannot read 'layernorm=eager'; the ops are layer_norm, "),
        (
            "triton,layer_norm=fast",
            r"cannot read 'layer_norm=fast'.*the backends eager, triton, compiled$",
        ),
        ("triton,layer_norm", "cannot read 'layer_norm'"),
    ],
)
def test_a_wrong_ops_string_names_the_known_ones(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_ops(spec)


def test_an_unknown_attribute_is_not_a_backend():
    with pytest.raises(AttributeError, match="no attribute 'CUDA'"):
        _ = kernels.CUDA


def fgpt_schemas() -> list[torch.FunctionSchema]:
    assert TRITON  # defines them
    return [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fgpt::")]


def test_schemas_declare_no_mutation_and_no_alias():
    importlib.import_module("kernels.adamw")
    # An optimizer step is nothing but writes; that one schema must say so.
    [step] = [schema for schema in fgpt_schemas() if schema.name == "fgpt::adamw_step"]
    assert step.is_mutable
    assert [a.name for a in step.arguments if a.alias_info and a.alias_info.is_write] == ["written"]
    schemas = [schema for schema in fgpt_schemas() if schema.name != step.name]
    assert {f"fgpt::{name}" for name in (*FORWARD, *BACKWARD)} <= {s.name for s in schemas}
    for schema in schemas:
        assert not schema.is_mutable, schema
        assert all(value.alias_info is None for value in [*schema.arguments, *schema.returns]), (
            schema
        )


L = 2
CONFIG = GPTConfig(block_size=32, vocab_size=211, n_layer=L, n_head=2, n_embd=64)
FORWARD = {
    "embedding_fwd": 1, "layer_norm_fwd": 2 * L, "gelu_mlp_up": L, "causal_attention_fwd": L,
    "linear_cross_entropy_fwd": 1,
}  # fmt: skip
BACKWARD = {
    "embedding_bwd": 1, "layer_norm_bwd": 1 + 2 * L, "gelu_mlp_down": L, "causal_attention_bwd": L,
    "linear_cross_entropy_bwd": 2,  # scales the gradients of x and of the weight
}  # fmt: skip
COPIES = ("aten::clone", "aten::copy", "aten::copy_", "aten::contiguous")
CAST = "aten::_to_copy"


def op_name(node: Node) -> str:
    """Such as aten::sum, for any of its overloads; empty for what is no operator."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if node.op == "call_function" and schema else ""


def capture(device: str, autocast: bool, residual_dtype: torch.dtype | None = None) -> list[Graph]:
    """Forward and backward graph of one compiled training step of the model."""
    graphs: list[Graph] = []

    def keep(gm: GraphModule, _: Any) -> Any:
        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    torch._dynamo.reset()
    model = GPT(CONFIG, TRITON, residual_dtype).to(device)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    idx = torch.randint(CONFIG.vocab_size, (2, 17), device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss = compiled(idx, idx)
    loss.backward()
    return graphs


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiled_graph_is_our_ops_and_nothing_stray(autocast, device):
    graphs = capture(device, autocast)
    for graph, want in zip(graphs, (FORWARD, BACKWARD), strict=True):
        names = Counter(op_name(node) for node in graph.nodes)
        ours = {n.removeprefix("fgpt::"): c for n, c in names.items() if n.startswith("fgpt::")}
        assert ours == want
        assert not {*COPIES} & {*names}
        if not autocast:
            assert CAST not in names
    forward, backward = graphs
    for node in forward.nodes:
        if op_name(node) == CAST:
            assert node.args[0].op == "placeholder", f"an activation is cast: {node}"
    for node in backward.nodes:
        if op_name(node) == CAST:
            assert {user.op for user in node.users} == {"output"}, f"not a weight gradient: {node}"
