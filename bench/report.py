"""Tables and plots from the committed result files, and from nothing else.

    python -m bench.report            # rewrite the marked blocks of README.md and bench/plots/
    python -m bench.report --check    # exit 1 if README.md says something else than the results

In README.md a block is what stands between two comments, each on a line of its own:

    <!-- bench:step-gpu -->
    <!-- /bench:step-gpu -->

The text between them is replaced; the rest of the file is never touched. Known names:

    step-gpu, step-cpu    the whole training step, newest result file of a GPU or a CPU
    ops-gpu, ops-cpu      each op alone, forward and backward together
    ablation              ours with one op at a time switched back to eager
    train                 recipes run to their end
    public                other people's figures for the same model
    roofline              estimates from data sheets, marked as such
    plots                 the images of bench/plots/ that have data

Where no result is committed a block says so in one line.
"""

import argparse
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.cases import CASES
from model.config import GPTConfig
from model.flops import PEAK_BF16_TFLOPS, flops_per_token, num_parameters

README = record.ROOT / "README.md"
PLOTS = record.ROOT / "bench/plots"
Result = dict[str, Any]

# GPT-2 124M, T=1024, bf16, torch.compile, SDPA: tokens/s of one GPU, measured by others.
PUBLIC = (
    ("B200", 793_891, "a public single-file benchmark, B=128, torch 2.8, torch.compile"),
    ("H200 SXM", 498_141, "same file, B=128"),
    ("H100 SXM", 466_440, "same file, B=64"),
    ("A100 SXM 80 GB", 208_962, "same file"),
    ("H100 SXM, one of 8", 468_000, "llm.c, CUDA C, 0.5M tokens in 140 ms on 8"),
)
# GB/s of device memory, vendors' data sheets.
BANDWIDTH_GBS = {
    "B200": 8000.0, "H200": 4800.0, "H100": 3350.0, "A100": 2039.0, "L40S": 864.0,
    "RTX 4090": 1008.0, "RTX 3090": 936.0,
}  # fmt: skip
MAX_BAR = 3.0  # of eager's time; a slower one is cut off there and keeps its number
COLOURS = {
    "eager": "#9aa0a6", "eager fp32": "#9aa0a6", "eager bf16": "#5f6368",
    "compile": "#4a7fb5", "compile fp32": "#4a7fb5", "compile bf16": "#4a7fb5",
    "ours": "#d9602b", "ours fp32": "#d9602b", "ours bf16": "#d9602b",
    "liger": "#7b5ea7", "sdpa-flash": "#3f9b6e", "sdpa-cudnn": "#a8a03a", "linear-ce": "#b5507c",
}  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, the rest to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def newest(results: Sequence[Result], device_type: str, section: str) -> Result | None:
    """The latest result of that kind of device that has rows in `section`."""
    found = [r for r in results if r["device"]["type"] == device_type and r.get(section)]
    return found[-1] if found else None


def device_line(result: Result) -> str:
    device = result["device"]
    if device["type"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, {device['isa']}"
    return device["name"]


def source_line(result: Result) -> str:
    """Where a table comes from, in one sentence."""
    device = result["device"]
    name = device_line(result)
    if device["type"] == "cuda":
        name += f", driver {device['driver']}"
    dirty = ", uncommitted changes" if result["dirty"] else ""
    return (
        f"{name}; torch {result['torch']}, triton {result['triton']}; commit "
        f"{result['commit'][:8]}{dirty}; {result['date'][:10]}; `{result['command']}`"
    )


def _nothing(device_type: str, what: str) -> str:
    kind = "GPU" if device_type == "cuda" else "CPU"
    return f"No {what} result of a {kind} is committed yet."


def _limits_line(result: Result) -> str:
    limits = result.get("limits")
    if not limits:
        return ""
    return (
        f"\nLimits measured in the same run: copy {limits['copy_gbs']:,.3g} GB/s, matmul "
        f"{limits['matmul_tflops']:,.3g} TFLOP/s, matmul with K=768 "
        f"{limits['matmul_k768_tflops']:,.3g} TFLOP/s.\n"
    )


def step_block(results: Sequence[Result], device_type: str, section: str = "step") -> str:
    from bench.step import step_table

    result = newest(results, device_type, section)
    if result is None:
        return _nothing(device_type, "training-step" if section == "step" else section)
    parts = []
    for key in dict.fromkeys((r["model"], r["shape"], r["accum"]) for r in result[section]):
        rows = [r for r in result[section] if (r["model"], r["shape"], r["accum"]) == key]
        accum = f", {key[2]} micro-batches" if key[2] > 1 else ""
        parts.append(f"GPT-2 {key[0]}, {key[1]}{accum}\n\n{step_table(rows)}\n")
    if device_type == "cuda":
        parts.append(
            "fp32 rows multiply in TF32. MFU is against the data sheet's dense bf16 peak.\n"
        )
    return "\n".join([*parts, source_line(result)])


def ops_block(results: Sequence[Result], device_type: str) -> str:
    from bench.ops import ops_table

    result = newest(results, device_type, "ops")
    if result is None:
        return _nothing(device_type, "op")
    rows = [
        r for r in result["ops"] if r["mode"] == "both" and "skip" not in r and not r.get("sweep")
    ]
    parts = []
    for label in dict.fromkeys(r["shape"] for r in rows):
        these = sorted((r for r in rows if r["shape"] == label), key=lambda r: r["op"])
        parts.append(f"Forward and backward, {label}, {these[0]['dtype']}\n\n{ops_table(these)}\n")
    return "\n".join([*parts, _limits_line(result).lstrip(), source_line(result)])


def train_block(results: Sequence[Result]) -> str:
    result = newest(results, "cuda", "train") or newest(results, "cpu", "train")
    if result is None:
        return _nothing("cuda", "training-run")
    lines = [
        [row["recipe"], row["provider"], row["verdict"], f"{row.get('seconds', 0):,.1f}"]
        for row in result["train"]
    ]
    return table(["recipe", "ops", "result", "seconds"], lines) + "\n\n" + source_line(result)


def public_block(results: Sequence[Result]) -> str:
    """Other people's figures, and ours beneath them where they exist."""
    lines = [[name, f"{rate:,}", who] for name, rate, who in PUBLIC]
    result = newest(results, "cuda", "step")
    ours = [
        row
        for row in (result["step"] if result else [])
        if row["provider"] == "ours bf16" and row.get("tokens_per_s") and "T=1024" in row["shape"]
    ]
    for row in ours:
        assert result is not None
        name = result["device"]["name"]
        lines.append([name, f"{row['tokens_per_s']:,.0f}", f"this project, {row['shape']}"])
    note = "GPT-2 124M, T=1024, bf16, one GPU. Rows not marked as this project are other people's"
    return f"{note}; they were not run again here.\n\n" + table(["GPU", "tokens/s", "who"], lines)


def step_floor(gpu: str, T: int = 1024, tokens: int = 65536) -> tuple[float, float]:
    """(ms of flops, ms of bytes) of a GPT-2 124M step at a GPU's data-sheet rates.

    Flops: matrix products and causal attention (llmc form). Bytes: what a fused step has to move
    beside its GEMMs: per layer two add + LayerNorm forward and backward (28 B an element, fp32
    residual), attention (24 B), the MLP's hidden activation (4C wide, 2 B, six passes), and
    AdamW's 30 B a parameter. GEMMs overlap bytes with flops, so the floor of a step lies between
    the larger of the two and their sum.
    """
    config = GPTConfig()
    peak = next(v for k, v in PEAK_BF16_TFLOPS.items() if k in gpu)
    flops_ms = flops_per_token(config, T, "llmc") * tokens / peak / 1e9
    per_token = config.n_layer * config.n_embd * (2 * 28 + 24 + 4 * 2 * 6)
    moved = per_token * tokens + 30 * num_parameters(config)
    return flops_ms, moved / BANDWIDTH_GBS[gpu] / 1e6


def roofline_block(results: Sequence[Result]) -> str:
    """Estimates; the one block with no measurement in it."""
    lines = []
    for gpu in BANDWIDTH_GBS:
        flops_ms, bytes_ms = step_floor(gpu)
        best, worst = max(flops_ms, bytes_ms), flops_ms + bytes_ms
        lines.append(
            [gpu, f"{flops_ms:.0f}", f"{bytes_ms:.0f}"]
            + [f"{round(65536 / ms * 1e3, -4):,.0f}" for ms in (worst, best)]
        )
    header = [
        "GPU (data sheet)",
        "flops ms",
        "bytes ms",
        "tokens/s, nothing overlaps",
        "all overlaps",
    ]
    return (
        "Estimate, not a measurement: the ceiling of a bf16 training step of GPT-2 124M, B=64 "
        "T=1024, at data-sheet rates, which no GEMM reaches.\n\n" + table(header, lines)
    )


def plots_block(results: Sequence[Result]) -> str:
    names = [name for name, (title, draw) in FIGURES.items() if draw(results, None)]
    if not names:
        return "No result with enough rows for a plot is committed yet."
    return "\n".join(f"![{FIGURES[name][0]}](bench/plots/{name}.svg)" for name in names)


BLOCKS: dict[str, Callable[[Sequence[Result]], str]] = {
    "step-gpu": lambda results: step_block(results, "cuda"),
    "step-cpu": lambda results: step_block(results, "cpu"),
    "ops-gpu": lambda results: ops_block(results, "cuda"),
    "ops-cpu": lambda results: ops_block(results, "cpu"),
    "ablation": lambda results: step_block(results, "cuda", "ablation"),
    "train": train_block,
    "public": public_block,
    "roofline": roofline_block,
    "plots": plots_block,
}


def fill(text: str, results: Sequence[Result]) -> str:
    """`text` with every marked block regenerated.

    Raises:
        ValueError: a block has an unknown name, or is not closed.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"report: unknown block {name!r}; known: {', '.join(BLOCKS)}")
        return f"<!-- bench:{name} -->\n{BLOCKS[name](results).strip()}\n<!-- /bench:{name} -->"

    pattern = r"<!-- bench:(?P<name>[a-z-]+) -->\n.*?<!-- /bench:(?P=name) -->"
    opened = re.findall(r"<!-- bench:([a-z-]+) -->", text)
    filled, count = re.subn(pattern, replace, text, flags=re.DOTALL)
    if count != len(opened):
        raise ValueError(f"report: of the blocks {opened} only {count} are closed by /bench:NAME")
    return filled


def _axes(title: str, ylabel: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Same file for same data: no random ids, text left as text.
    matplotlib.rcParams |= {"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 10}
    _, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def _quartile_bars(rows: Sequence[dict[str, Any]], scale: Callable[[float], float]) -> Any:
    """Distances of the quartiles from the median, as matplotlib's yerr wants them."""
    values = [scale(r["ms"]) for r in rows]
    low = [abs(v - scale(r["q3_ms"])) for v, r in zip(values, rows, strict=True)]
    high = [abs(scale(r["q1_ms"]) - v) for v, r in zip(values, rows, strict=True)]
    return [low, high]


def draw_step(device_type: str) -> Callable[..., list[dict[str, Any]]]:
    def draw(results: Sequence[Result], out: Path | None) -> list[dict[str, Any]]:
        result = newest(results, device_type, "step")
        rows = [r for r in (result["step"] if result else []) if r.get("tokens_per_s")]
        if not rows or result is None:
            return []
        first = (rows[0]["model"], rows[0]["shape"], rows[0]["accum"])
        rows = [r for r in rows if (r["model"], r["shape"], r["accum"]) == first]
        if out is None:
            return rows
        title = f"Training step, GPT-2 {first[0]}, {first[1]}\n{device_line(result)}"
        axes = _axes(title, "tokens/s")
        for i, row in enumerate(rows):
            colour = COLOURS.get(row["provider"], "#c9c9c9")
            bars = _quartile_bars([row], lambda ms, row=row: row["tokens"] / ms * 1e3)
            axes.bar(
                i, row["tokens_per_s"], 0.6, color=colour, yerr=bars, ecolor="#333333", capsize=3
            )
            text = f"{row['tokens_per_s']:,.0f}" + (" !" if row["noisy"] else "")
            axes.text(i, row["tokens_per_s"] * 0.5, text, ha="center", va="center", color="white")
        axes.set_xticks(range(len(rows)), [r["provider"] for r in rows])
        if any(r["noisy"] for r in rows):
            axes.set_xlabel("bars: quartiles; ! : samples spread over 5%", fontsize=8)
        _save(axes, out, rows)
        return rows

    return draw


def draw_ops(device_type: str) -> Callable[..., list[dict[str, Any]]]:
    def draw(results: Sequence[Result], out: Path | None) -> list[dict[str, Any]]:
        result = newest(results, device_type, "ops")
        rows = [r for r in (result["ops"] if result else []) if r["mode"] == "both"]
        rows = [r for r in rows if "ms" in r and not r.get("sweep")]
        if not rows or result is None:
            return []
        label = rows[0]["shape"]
        rows = [r for r in rows if r["shape"] == label]
        if out is None:
            return rows
        ops = sorted({r["op"] for r in rows}, key=[*CASES].index)
        who = list(dict.fromkeys(r["provider"] for r in rows))
        title = f"Each op, forward and backward, {label}\n{device_line(result)}"
        axes = _axes(title, "time, eager = 1 (lower is faster)")
        width = 0.8 / len(who)
        for j, name in enumerate(who):
            shares = {
                i: 1.0 if name == "eager" else 1 / r["over_eager"]
                for i, op in enumerate(ops)
                for r in rows
                if r["op"] == op
                and r["provider"] == name
                and (name == "eager" or "over_eager" in r)
            }
            at = [i + (j - (len(who) - 1) / 2) * width for i in shares]
            heights = [min(share, MAX_BAR) for share in shares.values()]
            axes.bar(at, heights, width * 0.92, color=COLOURS.get(name, "#c9c9c9"), label=name)
            for x, share in zip(at, shares.values(), strict=True):
                text = f"{share:.2f}" if share < 10 else f"{share:.0f}"
                axes.text(x, min(share, MAX_BAR) + 0.02, text, ha="center", fontsize=6)
        axes.set_xticks(range(len(ops)), [op.replace("_", " ") for op in ops], fontsize=8)
        axes.axhline(1, color="#777777", linewidth=0.8)
        axes.legend(frameon=False, ncols=len(who), fontsize=8, loc="upper right")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)  # room for the legend
        _save(axes, out, rows)
        return rows

    return draw


def draw_sweep(op: str) -> Callable[..., list[dict[str, Any]]]:
    def draw(results: Sequence[Result], out: Path | None) -> list[dict[str, Any]]:
        result = newest(results, "cuda", "ops")
        rows = [r for r in (result["ops"] if result else []) if r["op"] == op and r.get("sweep")]
        rows = [r for r in rows if "ms" in r and r["mode"] == "both"]
        if not rows or result is None or out is None:
            return rows
        key = "tflops" if "tflops" in rows[0] else "gbs"
        unit = "TFLOP/s" if key == "tflops" else "GB/s"
        axes = _axes(f"{op}, forward and backward\n{result['device']['name']}", unit)
        labels = list(dict.fromkeys(r["shape"] for r in rows))
        for name in dict.fromkeys(r["provider"] for r in rows):
            line = {r["shape"]: r[key] for r in rows if r["provider"] == name}
            xs = [i for i, label in enumerate(labels) if label in line]
            ys = [line[labels[i]] for i in xs]
            axes.plot(xs, ys, marker="o", markersize=3, color=COLOURS.get(name), label=name)
        axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=20)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        _save(axes, out, rows)
        return rows

    return draw


FIGURES: dict[str, tuple[str, Callable[..., list[dict[str, Any]]]]] = {
    "step-gpu": ("Tokens per second of a training step on a GPU", draw_step("cuda")),
    "step-cpu": ("Tokens per second of a training step on a CPU", draw_step("cpu")),
    "ops-gpu": ("Each op beside its rivals on a GPU", draw_ops("cuda")),
    "ops-cpu": ("Each op beside its rivals on a CPU", draw_ops("cpu")),
    **{f"sweep-{op}": (f"{op} over sizes", draw_sweep(op)) for op in CASES},
}


def fingerprint(rows: Sequence[dict[str, Any]]) -> str:
    """Of the rows a figure shows; it stands in the SVG, so a stale figure is found."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _save(axes: Any, out: Path, rows: Sequence[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        axes.figure.savefig(out, dpi=110)
    else:
        text = io.StringIO()
        axes.figure.savefig(
            text, format="svg", metadata={"Date": None, "Description": f"rows {fingerprint(rows)}"}
        )
        out.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")
    pyplot.close(axes.figure)


def stale_plots(results: Sequence[Result], folder: Path = PLOTS) -> list[str]:
    """Figures that are missing, or show other rows than the results have."""
    stale = []
    for name, (_, draw) in FIGURES.items():
        rows = draw(results, None)
        path = folder / f"{name}.svg"
        if rows and (not path.exists() or f"rows {fingerprint(rows)}" not in path.read_text()):
            stale.append(name)
    return stale


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="edit nothing, exit 1 on a difference")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--plots", type=Path, default=PLOTS)
    parser.add_argument("--png", action="store_true", help="PNG in place of SVG")
    args = parser.parse_args(argv)
    results = record.load_all(args.results)
    text = README.read_text() if README.exists() else ""
    filled = fill(text, results)
    if args.check:
        wrong = [*(["README.md"] if filled != text else []), *stale_plots(results, args.plots)]
        if wrong:
            sys.exit(f"report: {', '.join(wrong)} differ from bench/results; run `make report`")
        return
    if filled != text:
        README.write_text(filled)
    for name, (_, draw) in FIGURES.items():
        if draw(results, args.plots / f"{name}.{'png' if args.png else 'svg'}"):
            print(f"drew {name}")
    print(f"README.md: {text.count('<!-- bench:')} blocks from {len(results)} result files")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(str(error))
