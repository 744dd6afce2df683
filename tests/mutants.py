"""Three faults in every kernel, one at a time, in a copy of the project: each must be noticed.

    python -m tests.mutants
    python -m tests.mutants --op gelu_mlp

The faults are a mask dropped, a row missed and a scale got wrong. A mutant is killed when the quick
tests of its op turn red; unmutated they must be green. The exit status is 1 if a mutant survives
and 2 if the text it replaces is not there any more.
"""

import concurrent.futures
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.forked import Forked

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "bench", "model", "training", "tests", "pyproject.toml")
TIMEOUT_S = 600

TESTS = {
    "layer_norm": ("tests/test_layer_norm.py", "tests/test_add_layer_norm.py"),
    "embedding": ("tests/test_embedding.py",),
    "gelu_mlp": ("tests/test_gelu_mlp.py",),
    "causal_attention": ("tests/test_causal_attention.py",),
    "linear_cross_entropy": ("tests/test_linear_cross_entropy.py",),
    "adamw": ("tests/test_adamw.py",),
}


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in the body of one function of kernels/<op>.py, where it stands once."""

    op: str
    function: str
    fault: str
    old: str
    new: str

    @property
    def file(self) -> str:
        return f"kernels/{self.op}.py"

    def apply(self, source: str) -> str:
        """The mutated file.

        Raises:
            ValueError: the function is gone, or `old` does not stand in it exactly once.
        """
        start = source.find(f"\ndef {self.function}(")
        if start < 0:
            raise ValueError(f"{self.file}: no function {self.function}")
        following = re.compile(r"\n(?=\S)").search(source, source.index(":\n", start) + 2)
        end = following.start() if following else len(source)
        body = source[start:end]
        if body.count(self.old) != 1:
            raise ValueError(
                f"{self.file}: {self.function} must hold {self.old!r} once, "
                f"holds it {body.count(self.old)} times"
            )
        return source[:start] + body.replace(self.old, self.new) + source[end:]


_LN, _EMBEDDING, _MLP, _ATTENTION, _LCE, _ADAMW = TESTS

MUTANTS = (
    Mutant(_LN, "_normalise", "mask",
           "(tl.where(mask, h[i] - mean, 0.0),)", "(h[i] - mean,)"),
    Mutant(_LN, "_normalise", "row",
           "tl.store(stats_ptr + M + rows, rstd, mask=rows < M)",
           "tl.store(stats_ptr + M + rows, rstd, mask=rows < M - 1)"),
    Mutant(_LN, "_normalise", "mean", "mean + mean_low", "mean"),
    Mutant(_LN, "_normalise", "scale", "/ C + eps)", "/ (C + 1) + eps)"),
    Mutant(_LN, "_layer_norm_bwd_kernel", "mask",
           "tl.sum(dweight[i], axis=0), mask=cols < C)", "tl.sum(dweight[i], axis=0))"),
    Mutant(_LN, "_layer_norm_bwd_kernel", "row",
           "range(pid * ROWS, M, num_programs * ROWS)",
           "range(pid * ROWS, M - 1, num_programs * ROWS)"),
    Mutant(_LN, "_layer_norm_bwd_kernel", "scale",
           "mean_gx = tl.sum(sum_gx, axis=1, keep_dims=True) / C",
           "mean_gx = tl.sum(sum_gx, axis=1, keep_dims=True) / (C + 1)"),
    Mutant(_LN, "_sum_partials_kernel", "mask",
           "mask=(rows < P) & (cols < C)[None, :]", "mask=(cols < C)[None, :]"),
    Mutant(_LN, "_sum_partials_kernel", "row", "(rows < P)", "(rows < P - 1)"),
    Mutant(_LN, "_sum_partials_kernel", "scale",
           "total = tl.sum(acc, axis=0)", "total = 0.99 * tl.sum(acc, axis=0)"),

    Mutant(_EMBEDDING, "_embedding_fwd_kernel", "mask", "mask=mask & known", "mask=mask"),
    Mutant(_EMBEDDING, "_embedding_fwd_kernel", "row",
           "stored, mask=mask)", "stored, mask=mask & (rows < M - 1))"),
    Mutant(_EMBEDDING, "_embedding_fwd_kernel", "scale", "wte + wpe", "wte + 0.99 * wpe"),
    Mutant(_EMBEDDING, "_embedding_fwd_kernel", "place", "(rows % T)", "(rows % (T + 1))"),
    Mutant(_EMBEDDING, "_embedding_sums_kernel", "mask",
           "(token != previous) & (token >= 0)", "(token != previous)"),
    Mutant(_EMBEDDING, "_embedding_sums_kernel", "row",
           "range(first, first + ROWS)", "range(first, first + ROWS - 1)"),
    Mutant(_EMBEDDING, "_embedding_sums_kernel", "scale", "+ total,", "+ 0.99 * total,"),
    Mutant(_EMBEDDING, "_embedding_sums_kernel", "carry",
           "tl.where(ids == previous, d, 0.0)", "tl.where(ids == previous, 0.0, 0.0)"),
    Mutant(_EMBEDDING, "embedding_bwd", "levels", "programs > 1 else 0", "programs > 4 else 0"),
    Mutant(_EMBEDDING, "embedding_bwd", "tie", "torch.float32, copy=True)", "torch.float32)"),

    Mutant(_MLP, "_tile_at", "row", "tl.minimum(tiles_m - first, GROUP_M)", "GROUP_M"),
    Mutant(_MLP, "_dot_tile", "row", "num_rows - 1)", "num_rows)"),
    Mutant(_MLP, "_gelu", "scale", "g * (e * s)", "g * (0.99 * e * s)"),
    Mutant(_MLP, "_store_up", "mask",
           "g.to(g_ptr.dtype.element_ty), mask=rows < num_rows)", "g.to(g_ptr.dtype.element_ty))"),
    Mutant(_MLP, "_store_up", "row",
           "d.to(d_ptr.dtype.element_ty), mask=rows < num_rows)",
           "d.to(d_ptr.dtype.element_ty), mask=rows < num_rows - 1)"),
    Mutant(_MLP, "_store_up", "column", "right, b_ptr + HALF_N", "right, b_ptr"),
    Mutant(_MLP, "_store_down", "mask", ", mask=rows < num_rows, other=0.0)", ")"),
    Mutant(_MLP, "_store_down", "row",
           "dh.to(dh_ptr.dtype.element_ty), mask=rows < num_rows)",
           "dh.to(dh_ptr.dtype.element_ty), mask=rows < num_rows - 1)"),
    Mutant(_MLP, "_store_down", "column", "sums_ptr + HALF_N", "sums_ptr"),
    Mutant(_MLP, "_store_down", "scale", "dh = dg * ", "dh = 0.99 * dg * "),

    Mutant(_ATTENTION, "_attention_fwd_kernel", "mask",
           "rows[:, None] >= cols[None, :]", "cols[None, :] < T"),
    Mutant(_ATTENTION, "_attention_fwd_kernel", "row",
           "y.to(y_ptr.dtype.element_ty), mask=(rows < T)[:, None])",
           "y.to(y_ptr.dtype.element_ty), mask=(rows < T - 1)[:, None])"),
    Mutant(_ATTENTION, "_attention_fwd_kernel", "mask",
           "first if before else tl", "first + BLOCK_N if before else tl"),
    Mutant(_ATTENTION, "_attention_fwd_kernel", "scale", "scale * LOG2_E", "scale * 1.43"),
    Mutant(_ATTENTION, "_dq_step", "mask", "tl.where(visible, p, 0.0)", "p + 0.0"),
    Mutant(_ATTENTION, "_attention_dq_kernel", "row",
           "range(0 if before else first,", "range(BLOCK_N if before else first,"),
    Mutant(_ATTENTION, "_attention_dq_kernel", "row",
           "kv_ptr += BLOCK_N * stride", "kv_ptr += 0 * stride"),
    Mutant(_ATTENTION, "_attention_dq_kernel", "scale", "(dq * scale)", "(dq * scale * 0.99)"),
    Mutant(_ATTENTION, "_dkdv_step", "mask", "tl.where(visible, pt, 0.0)", "pt + 0.0"),
    Mutant(_ATTENTION, "_attention_dkdv_kernel", "row",
           "(cut - full) // BLOCK_M if", "(cut - full) // BLOCK_M - 1 if"),
    Mutant(_ATTENTION, "_attention_dkdv_kernel", "scale", "(dk * scale)", "(dk * scale * 0.99)"),
    Mutant(_ATTENTION, "_attention_short_bwd_kernel", "mask",
           "rows[None, :] >= rows[:, None]", "rows[None, :] < T"),
    Mutant(_ATTENTION, "_attention_short_bwd_kernel", "row",
           "mask = (rows < T)[:, None]", "mask = ((rows < T) & (rows > 0))[:, None]"),
    Mutant(_ATTENTION, "_attention_short_bwd_kernel", "scale",
           "(dq * scale)", "(dq * scale * 0.99)"),

    Mutant(_LCE, "_load_lanes", "mask",
           'tl.where(cols < V, z, float("-inf"))', "(z + 0.0)"),
    Mutant(_LCE, "_load_lanes", "row",
           "inside & (cols < stride)", "(cols < stride)"),
    Mutant(_LCE, "_load_lanes", "scale",
           "other=0.0).to(tl.float32)", "other=0.0).to(tl.float32) * 1.01"),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "mask",
           "tl.where(at < V, dz, 0.0)", "dz + 0.0"),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "row",
           "loss, mask=rows < M)", "loss, mask=rows < M - 1)"),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "scale",
           "tl.div_rn(1.0, row_sum)", "tl.div_rn(0.99, row_sum)"),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "rescale",
           "lane_sum * tl.exp2((lane_max - new_max) * LOG2E) + part", "lane_sum + part"),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "block",
           "(whole - BLOCK_V - v if uncut else v)", "(whole - BLOCK_V if uncut else v)"),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "race",
           "        tl.debug_barrier()  # all lanes have read z_t\n", ""),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "order",
           "        tl.debug_barrier()  # all of dz is stored but for the target's -1\n", ""),
    Mutant(_LCE, "_linear_cross_entropy_rows_kernel", "target",
           "* LOG2E) * scale - 1.0", "* LOG2E) * scale"),
    Mutant(_LCE, "_linear_cross_entropy_scale_kernel", "mask",
           "(grad * scale).to(out_ptr.dtype.element_ty), mask=mask)",
           "(grad * scale).to(out_ptr.dtype.element_ty))"),
    Mutant(_LCE, "_linear_cross_entropy_scale_kernel", "row",
           "mask = offs < numel", "mask = offs < numel - 1"),
    Mutant(_LCE, "_linear_cross_entropy_scale_kernel", "scale",
           "tl.div_rn(tl.load(dloss_ptr), N)", "tl.load(dloss_ptr)"),

    Mutant(_ADAMW, "_update_chunk", "mask",
           "tl.store(v_ptr + offs, v, mask=mask)", "tl.store(v_ptr + offs, v)"),
    Mutant(_ADAMW, "_update_chunk", "row", "offs < end", "offs < end - 1"),
    Mutant(_ADAMW, "_update_chunk", "scale", ".to(tl.float32) * clip", ".to(tl.float32)"),
    Mutant(_ADAMW, "_adamw_kernel", "mask",
           "tl.load(found_inf_ptr) == 0.0", "tl.load(found_inf_ptr) <= 1.0"),
    Mutant(_ADAMW, "_find_chunk", "mask", "& fits", "& (fits | (first >= 0))"),
    Mutant(_ADAMW, "_adamw_advance_kernel", "row", "mask = rows < N", "mask = rows < N - 1"),
    Mutant(_ADAMW, "_adamw_advance_kernel", "scale", "lr / bias_correction1", "lr + 0.0"),
    Mutant(_ADAMW, "_sum_squares", "mask", "other = None if WHOLE else 0.0", "other = None"),
    Mutant(_ADAMW, "_sum_squares", "row", "offs < end", "offs < end - 1"),
    Mutant(_ADAMW, "_adamw_clip_kernel", "row", "offs < P", "offs < P - 1"),
    Mutant(_ADAMW, "_adamw_clip_kernel", "scale",
           "tl.where(coefficient > 1.0, 1.0, coefficient)", "coefficient"),
)  # fmt: skip


def quick_tests(op: str) -> None:
    """Run an op's quick tests in the copy that this forked process is in."""
    assert "kernels" not in sys.modules  # they would be the originals, without a fault
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # the originals, which brought this function here
    sys.path[:] = [str(Path.cwd()), *(p for p in sys.path if Path(p).resolve() != ROOT)]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS[op]]))


def run_tests(copy: Path, op: str) -> tuple[int, str]:
    """Exit status of an op's quick tests, and the first test that failed."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    process = Forked(quick_tests, op, cwd=copy, environment=environment)
    printed, code = process.communicate(TIMEOUT_S)
    if code < 0:
        return 124, f"no answer in {TIMEOUT_S} s"
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(?:::)?(\S+)", printed, re.MULTILINE)
    return code, failed[1].split("::")[-1] if failed else ""


def make_copy(folder: Path) -> Path:
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def judge(mutants: Sequence[Mutant], workers: int) -> int:
    """Run all of them, `workers` at a time; returns how many end wrongly, red baselines too."""
    trials: list[tuple[str, Mutant | None]] = [(op, None) for op in {m.op: None for m in mutants}]
    trials += [(m.op, m) for m in mutants]
    failures = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for worker in range(workers):
            copies.put(make_copy(Path(folder, str(worker))))

        def trial(op: str, mutant: Mutant | None) -> tuple[bool, str]:
            copy, begun = copies.get(), time.monotonic()
            try:
                if mutant is None:
                    status, test = run_tests(copy, op)
                    held, verdict = status == 0, "green" if status == 0 else f"RED: {test}"
                else:
                    path = copy / mutant.file
                    source = path.read_text()
                    path.write_text(mutant.apply(source))
                    try:
                        status, test = run_tests(copy, op)
                    finally:
                        path.write_text(source)
                    # Only a failing test counts: 2 to 5 say that pytest itself could not run.
                    held = status == 1
                    verdict = f"killed by {test}" if held else f"SURVIVED (pytest exit {status})"
            finally:
                copies.put(copy)
            what = f"{mutant.function:<40}{mutant.fault:<7}" if mutant else f"{'-':<40}{'none':<7}"
            return held, f"{op:<21}{what}{time.monotonic() - begun:>6.0f} s  {verdict}"

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for held, line in pool.map(lambda t: trial(*t), trials):
                print(line, flush=True)
                failures += not held
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    from bench import cli  # not above: it imports kernels, and so would each process that tests

    parser = cli.Parser("tests.mutants", __doc__)
    parser.add_argument("--op", action="append", choices=[*TESTS], help="default: all")
    parser.add_argument("--workers", type=int, default=2, help="test runs at a time (default: 2)")
    args = parser.parse_args(argv)
    mutants = [m for m in MUTANTS if m.op in (args.op or TESTS)]
    for mutant in mutants:
        try:
            mutant.apply((ROOT / mutant.file).read_text())
        except ValueError as error:
            print(f"mutants: {error}")
            return 2
    if not torch.cuda.is_available():  # as tests/conftest.py has it, which here comes too late
        os.environ["TRITON_INTERPRET"] = "1"
    failures = judge(mutants, args.workers)
    print(f"mutants: {len(mutants)} faults planted, {failures} test runs above ended wrongly")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
