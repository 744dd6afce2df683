"""The kernel builds that the ops launch on a chip, recorded where there is none.

An op's launch functions run on meta tensors, which have shapes but no memory. Triton's JIT
specialises the arguments as it would on the chip, then asks a hook whether to compile. The hook
keeps the build and declines. So each build is the one that a GPU would run.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from bench.cases import GPU_SHAPES, Shape
from kernels import HEAD_DIMS, TRITON, _launch, adamw  # noqa: F401, two of them fill LAUNCHES
from kernels._launch import Key, Launch, candidates_for, replaced
from kernels._op import LAUNCHES
from kernels.causal_attention import short_t

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Run = Callable[[], object]

new = partial(torch.empty, device="meta")


class Build(NamedTuple):
    """One build of one kernel."""

    op: str  # public op that launches it
    arch: int
    label: str  # the arguments and the launch, such as "T=64 M64 w4 s1"
    key: Key
    launch: Launch
    source: ASTSource
    options: dict[str, Any]


class _Driver:
    """What triton's JIT asks of a GPU before it compiles. The device number is the chip's."""

    def __init__(self, arch: int) -> None:
        self.get_current_device = self.get_current_stream = lambda *_: arch
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)


def record(run: Run, arch: int, kernel: str = "", launch: Launch | None = None) -> list[Build]:
    """The builds that `run` launches on a chip. If `launch` is given, `kernel` runs with it.

    An op asks for a row right before it launches, so each build has the row last asked for.
    """
    found: list[Build] = []

    def keep(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        key, row = asked[-1]
        kernel, (attrs,) = fn.jit_function, compile["configs"]
        fixed = {kernel.arg_names[path[0]]: value for path, value in compile["constants"].items()}
        sizes = {k: v for k, v in fixed.items() if k.startswith("BLOCK") or k == "ROWS"}
        sizes |= {"w": row.num_warps, "s": row.num_stages}
        label = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in sizes.items())
        options = {k: v for k, v in row.kwargs().items() if k not in fixed}
        source = ASTSource(kernel, compile["signature"], compile["constants"], attrs)
        found.append(Build("", arch, label, key, row, source, options))
        return True  # do not compile

    with (
        mock.patch.object(driver, "_active", _Driver(arch)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", keep),
        mock.patch.object(_launch, "OFF_CUDA", arch),
        replaced(kernel, launch) as asked,
    ):
        run()
    return found


def _layer_norm(M: int, C: int, x: torch.dtype, h: torch.dtype, add: bool = True) -> None:
    weight, bias = new(C, dtype=FP32), new(C, dtype=FP32)
    stream = new(M, C, dtype=h)
    more = stream if add else None
    y, _, stats = LAUNCHES["layer_norm_fwd"](new(M, C, dtype=x), more, weight, bias, 1e-5, x)
    LAUNCHES["layer_norm_bwd"](y, more, stream, weight, stats, x)


def _embedding(B: int, T: int, C: int, h: torch.dtype, table: torch.dtype = FP32) -> None:
    wte, wpe = new(50304, C, dtype=table), new(T, C, dtype=table)
    weight, bias = new(C, dtype=FP32), new(C, dtype=FP32)
    idx = new(B, T, dtype=torch.int64)
    _, dh, _ = LAUNCHES["embedding_fwd"](idx, wte, wpe, weight, bias, 1e-5, BF16, h)
    LAUNCHES["embedding_bwd"](idx, dh, wte)


def _gelu_mlp(M: int, C: int, dtype: torch.dtype) -> None:
    x, w, b = new(M, C, dtype=dtype), new(4 * C, C, dtype=dtype), new(4 * C, dtype=FP32)
    _, d = LAUNCHES["gelu_mlp_up"](x, w, b, True)
    LAUNCHES["gelu_mlp_down"](x, w.view(C, 4 * C), d)


def _causal_attention(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> None:
    qkv = new(B, T, 3 * H * D, dtype=dtype)
    y, lse = LAUNCHES["causal_attention_fwd"](qkv, H)
    LAUNCHES["causal_attention_bwd"](y, qkv, y, lse, H)


def _linear_cross_entropy(s: Shape, dtype: torch.dtype, train: bool = True) -> None:
    x, w = new(s.M, s.C, dtype=dtype), new(s.Vp, s.C, dtype=FP32)
    targets, dloss = new(s.M, dtype=torch.int64), new((), dtype=FP32)
    _, N, *grads = LAUNCHES["linear_cross_entropy_fwd"](x, w, targets, s.V, -100, train, train)
    for grad in grads:
        LAUNCHES["linear_cross_entropy_bwd"](grad, dloss, N, grad.dtype)


def _adamw() -> None:
    table, chunks = new(148, 16, dtype=torch.int64), new(15278, 2, dtype=torch.int32)  # GPT-2's
    _, clip = LAUNCHES["adamw_norm"](table, chunks, 1.0, [])
    LAUNCHES["adamw_step"](table, chunks, clip, new((), dtype=FP32), [], [])


def step(s: Shape) -> dict[str, Run]:
    """What launches the kernels of a GPT-2 124M step in bf16, by op."""
    return {
        "embedding": partial(_embedding, s.B, s.T, s.C, FP32),
        "add_layer_norm": partial(_layer_norm, s.M, s.C, BF16, FP32),
        "gelu_mlp": partial(_gelu_mlp, s.M, s.C, BF16),
        "causal_attention": partial(_causal_attention, s.B, s.T, s.H, s.C // s.H, BF16),
        "linear_cross_entropy": partial(_linear_cross_entropy, s, BF16),
        "adamw": _adamw,
    }


def _with_products(math: str, run: Run) -> None:
    """`run` with products of fp32 operands in "tf32" or "ieee"; "" leaves them as they are."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = math or before
    run()
    matmul.fp32_precision = before


def _name(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16", FP16: "fp16"}[dtype]


def _calls(arch: int) -> Iterator[tuple[str, str, Run]]:
    """(op, what is special, launches): the main shapes, then what takes other rows or arguments.

    Lengths that are no multiple of 16 are the harder case: no address along them is known to be
    aligned.
    """
    for shape in GPU_SHAPES:
        yield from ((op, shape.label, run) for op, run in step(shape).items())
    M = 65535
    for C, x, h in (768, BF16, BF16), (1024, FP32, FP32), (6400, BF16, FP32), (8192, BF16, FP32):
        special = f"C={C} x={_name(x)} h={_name(h)}"
        yield "add_layer_norm", special, partial(_layer_norm, M, C, x, h)
    yield "layer_norm", "bf16", partial(_layer_norm, M, 768, BF16, BF16, add=False)
    for h, table in (BF16, FP32), (BF16, BF16):
        special = f"h={_name(h)} wte={_name(table)}"
        yield "embedding", special, partial(_embedding, 64, 1023, 768, h, table)
    products = ((BF16, ""), (FP32, "tf32"), (FP32, "ieee"))
    for (dtype, math), rows in product(products, (63, M)):
        run = partial(_gelu_mlp, rows, 768, dtype)
        yield "gelu_mlp", f"M={rows} {math or 'bf16'}", partial(_with_products, math, run)
    for (dtype, math), D in product(products, HEAD_DIMS):
        short = short_t(dtype.itemsize, D, arch) - 1
        for T in sorted({min(short, 63), short, 1023}):
            run = partial(_causal_attention, 8, T, 12, D, dtype)
            special = f"D={D} T={T} {math or 'bf16'}"
            yield "causal_attention", special, partial(_with_products, math, run)
    for dtype, train in (BF16, False), (FP16, True), (FP32, True):
        special = f"{_name(dtype)} {'train' if train else 'eval'}"
        run = partial(_linear_cross_entropy, Shape(1, 1023), dtype, train)
        yield "linear_cross_entropy", special, run


def builds(arch: int) -> Iterator[Build]:
    """Every build once, first with the rows that launches take, then with the candidates."""
    seen: set[str] = set()
    for op, special, run in _calls(arch):
        found = record(run, arch)
        for key in dict.fromkeys(build.key for build in found):
            for launch in candidates_for(key):
                tried = record(run, arch, key.kernel, launch)
                found += [build for build in tried if build.key == key]
        for build in found:
            source = build.source
            arguments = source.signature, source.constants, source.attrs, build.options
            same = f"{source.name} {arguments}"
            if same not in seen:
                seen.add(same)
                yield build._replace(op=op, label=f"{special} {build.label}")
