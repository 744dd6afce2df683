"""Tables and plots from the committed result files, and from nothing else.

    python -m bench.report            # rewrite the marked blocks of README.md and bench/plots/
    python -m bench.report --check    # exit 1 if README.md says something else than the results
    python -m bench.report --merge A.json B.json --into bench/results/

In README.md a block is what stands between two comments, each on a line of its own:

    <!-- bench:step-gpu -->
    <!-- /bench:step-gpu -->

The text between them is replaced; the rest of the file is never touched. Known names:

    goals                 what was to be reached on one H200, and what was measured
    step-gpu, step-cpu    the whole training step, newest result file of a GPU or a CPU
    ops-gpu, ops-cpu      each op alone, forward and backward together
    train                 the seed recipe to its target loss, and ours against eager over steps
    evidence              what a GPU said of the kernels: numerics, tests, sanitizer, resume
    limits                where the time of a step goes, ours and the compiled baseline
    ablation              ours with one thing at a time switched back
    tune                  launch rows that the tuner proposes
    public                other people's figures for the same model
    roofline              estimates from data sheets, marked as such
    plots                 the images of bench/plots/ that have data

Where no result is committed a block is empty; goals are then open and step-gpu says so in a line.
A red row never shows a figure. `--merge` makes one result file of several calls on one machine.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import record
from bench.cases import CASES
from model.config import GPTConfig
from model.flops import flops_per_token, num_parameters
from training.machines import CARDS
from training.recipes import PRESETS, PUBLISHED_LOSS

README = record.ROOT / "README.md"
PLOTS = record.ROOT / "bench/plots"
Row = dict[str, Any]
Result = dict[str, Any]
Keep = Callable[[Row], bool]

# GPT-2 124M, T=1024, bf16, torch.compile, SDPA: tokens/s of one GPU, measured by others.
PUBLIC = (
    ("B200", 793_891, "a public single-file benchmark, B=128, torch 2.8, torch.compile"),
    ("H200 SXM", 498_141, "same file, B=128"),
    ("H100 SXM", 466_440, "same file, B=64"),
    ("A100 SXM 80 GB", 208_962, "same file"),
    ("H100 SXM, one of 8", 468_000, "llm.c, CUDA C, 0.5M tokens in 140 ms on 8"),
)
SAMPLE_CHARS = 300
MAX_REDS = 12  # listed; the table has their number
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


def rows_with(**want: Any) -> Keep:
    """A predicate: the row has these values."""
    return lambda row: want.items() <= row.items()


def newest(
    results: Sequence[Result], device_type: str, section: str, keep: Keep = bool
) -> Result | None:
    """The latest result of that kind of device that has such rows (by default any) in `section`."""
    return next(
        (r for r in reversed(results)
         if r["device"]["type"] == device_type and any(map(keep, r.get(section, ())))),
        None,
    )  # fmt: skip


def shown(row: Row) -> bool:
    """Whether a row's figures may be shown: it is neither red nor left out."""
    return not (row.get("red") or row.get("skip"))


def _number(row: Row, key: str, spec: str) -> str:
    return "" if row.get(key) is None else format(row[key], spec)


def _cell(text: object) -> str:
    """Text of others (errors, last lines) as it may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:200]


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


def where(result: Result) -> str:
    """Device and commit: what tells apart the figures of one table."""
    return f"{device_line(result)}, {result['commit'][:8]}"


def source_lines(results: Sequence[Result | None]) -> str:
    """A line for each result, each once."""
    return "\n\n".join(dict.fromkeys(source_line(r) for r in results if r is not None))


def _limits_line(result: Result) -> str:
    limits = result.get("limits")
    if not limits:
        return ""
    return (
        f"\nLimits measured in the same run: copy {limits['copy_gbs']:,.3g} GB/s, matmul "
        f"{limits['matmul_tflops']:,.3g} TFLOP/s, matmul with K=768 "
        f"{limits['matmul_k768_tflops']:,.3g} TFLOP/s.\n"
    )


GOAL_GPU = "H200"
LARGE: Row = {"model": "124m", "shape": "B=64 T=1024", "accum": 1}
SEED: Row = {"model": "124m", "shape": "B=16 T=64", "accum": 4}


def seed_run(**want: Any) -> Keep:
    """A predicate: a run of the seed recipe on its text, which bench.gpu names by its checksum."""
    named = rows_with(kind="seed", **want)
    return lambda row: named(row) and row["recipe"].startswith("tiny Shakespeare")


@dataclass(frozen=True)
class Source:
    """Where a figure stands.

    Args:
        section: Of a result file.
        keep: Takes its row.
        key: The figure in that row.
        over: Takes the row by whose figure it is divided.
    """

    section: str
    keep: Keep
    key: str
    over: Keep | None = None

    def rows(self, result: Result) -> list[Row]:
        """The rows that make the figure; none if one was not measured. Red ones count as such."""
        found = []
        for keep in (self.keep, *([self.over] if self.over else [])):
            # The last: what was measured again stands behind what failed before.
            row = next(filter(keep, reversed(result.get(self.section, ()))), {})
            if shown(row) and row.get(self.key) is None:
                return []
            found.append(row)
        return found


@dataclass(frozen=True)
class Goal:
    """A bound on a figure.

    Args:
        what: The figure, in words.
        must: The bound, in words.
        bound: The bound.
        at_least: Whether the figure must reach the bound; else it must not exceed it.
        sources: Where the figure stands; the first that a result has.
        unit: Written after it.
        digits: After the point; rounded against us, so a figure never looks better than it is.
        needs: What else must be true in the row.
    """

    what: str
    must: str
    bound: float
    at_least: bool
    sources: tuple[Source, ...]
    unit: str = ""
    digits: int = 0
    needs: str | None = None

    def text(self, figure: float) -> str:
        units = round(figure * 10**self.digits, 4)  # 1.15 * 100 is 114.99999999999999
        units = math.floor(units) if self.at_least else math.ceil(units)
        return f"{units / 10**self.digits:,.{self.digits}f}{self.unit}"

    def verdict(self, row: Row, figure: float) -> str:
        if self.needs and not row.get(self.needs):
            return f"short: not {self.needs}"
        met = figure >= self.bound if self.at_least else figure <= self.bound
        return "met" if met else f"short: {self.text(figure)}"

    def cells(self, results: Sequence[Result]) -> tuple[list[str], Result | None]:
        """Figure, origin and verdict by the newest result of a GPU that measured it, and that."""
        cuda = [r for r in results if r["device"]["type"] == "cuda"]
        pairs = ((r, source, source.rows(r)) for r in reversed(cuda) for source in self.sources)
        result, source, rows = next(filter(lambda found: found[2], pairs), (None, None, []))
        if result is None or source is None:
            return ["", "", "open"], None
        on = where(result)
        if not re.search(rf"\b{GOAL_GPU}\b", result["device"]["name"]):  # GH200 is another
            on += f" (not an {GOAL_GPU})"
        if not all(map(shown, rows)):
            return ["not shown: red", on, "open"], result
        figure = rows[0][source.key] / (rows[1][source.key] if source.over else 1)
        return [self.text(figure), on, self.verdict(rows[0], figure)], result


def _step(setup: Row, key: str, over: str | None = None) -> tuple[Source, ...]:
    rival = rows_with(**setup, provider=over) if over else None
    return (Source("step", rows_with(**setup, provider="ours bf16"), key, rival),)


def _first_step(cache: str) -> tuple[Source, ...]:
    alone = rows_with(model="124m", provider="ours bf16", cache=cache)
    return (
        Source("train", rows_with(kind="seed", cache=cache), "first_step_s"),  # on any text
        Source("first_step", alone, "process_start_s"),
    )


GOALS = (
    Goal("tokens/s over plain PyTorch compiled, B=64 T=1024", "1.10x", 1.10, True,
         _step(LARGE, "over_compile_bf16"), "x", 2),
    Goal("the same, aim", "1.20x", 1.20, True, _step(LARGE, "over_compile_bf16"), "x", 2),
    Goal("tokens/s there, aim", "600,000", 600_000, True, _step(LARGE, "tokens_per_s")),
    Goal("Shakespeare recipe to loss < 0.09, warm caches", "60 s", 60, False,
         (Source("train", seed_run(cache="warm"), "seconds"),), " s", 1, "reached"),
    Goal("the same recipe as four separate micro-batches, tokens/s", "200,000", 200_000, True,
         _step(SEED, "tokens_per_s")),
    Goal("peak memory over the compiled baseline's, B=64 T=1024", "two thirds", 2 / 3, False,
         _step(LARGE, "peak_gib", "compile bf16"), "", 3),
    Goal("process start to first step, cold caches", "30 s", 30, False, _first_step("cold"),
         " s", 1),
    Goal("process start to first step, warm caches", "6 s", 6, False, _first_step("warm"), " s", 1),
)  # fmt: skip


def goals_block(results: Sequence[Result]) -> str:
    header = [f"goal on one {GOAL_GPU}, bf16, GPT-2 124M, maths unchanged"]
    header += ["must", "measured", "on", "state"]
    found = [goal.cells(results) for goal in GOALS]
    lines = [[g.what, g.must, *cells] for g, (cells, _) in zip(GOALS, found, strict=True)]
    keep = [i for i in range(len(header)) if any(line[i] for line in lines)]
    lines = [[line[i] for i in keep] for line in lines]
    sources = source_lines([result for _, result in found])
    return table([header[i] for i in keep], lines) + f"\n\n{sources}"


NOTHING_YET = (
    "**On a GPU: nothing has been measured yet**, and no step has been captured as a CUDA graph."
)


def step_block(results: Sequence[Result], device_type: str) -> str:
    """A table for each size; on a GPU for those of the goals, and one for all the others."""
    from bench.step import step_table

    result = newest(results, device_type, "step")
    if result is None and device_type == "cpu":
        return ""
    if result is None:
        some = any(r["device"]["type"] == "cuda" for r in results)
        return "No training-step result of a GPU is committed yet." if some else NOTHING_YET
    cuda = device_type == "cuda"
    groups: dict[str, list[Row]] = {}
    for row in result["step"]:
        accum = f", {row['accum']} micro-batches" if row["accum"] > 1 else ""
        title = f"GPT-2 {row['model']}, {row['shape']}{accum}"
        if cuda and not (rows_with(**LARGE)(row) or rows_with(**SEED)(row)):
            row, title = row | {"provider": f"{title}: {row['provider']}"}, "Other sizes"
        groups.setdefault(title, []).append(row)
    parts = [f"{title}\n\n{step_table(rows)}\n" for title, rows in groups.items()]
    if cuda:
        parts.append(
            "fp32 rows multiply in TF32. MFU is against the data sheet's dense bf16 peak.\n"
        )
    return "\n".join([*parts, source_line(result)])


def ablation_block(results: Sequence[Result]) -> str:
    result = newest(results, "cuda", "ablation")
    if result is None:
        return ""
    rows = result["ablation"]
    whole = next(filter(rows_with(provider="ours bf16"), filter(shown, rows)), None)
    lines = []
    for row in rows:
        what = row["provider"].removeprefix("ours bf16, ")
        if not shown(row):
            lines.append([what, f"not shown: {_cell(row['red'])}", "", ""])
            continue
        spread = f"{100 * row['cov']:.1f}%" + (" !" if row["noisy"] else "")
        share = f"{row['tokens_per_s'] / whole['tokens_per_s']:.3f}" if whole else ""
        lines.append([what, f"{row['tokens_per_s']:,.0f}", spread, share])
    title = f"Ours with one thing switched back at a time, {rows[0]['shape']}"
    body = table(["what differs", "tokens/s", "spread", "x ours"], lines)
    return f"{title}\n\n{body}\n\n{source_line(result)}"


def op_row(row: Row) -> bool:
    """Of the tables and figures of single ops: no sweep, and nobody who does not do the op."""
    does = " has no " not in row.get("skip", "")
    return row["mode"] == "both" and does and not row.get("sweep")


def op_sizes(rows: Sequence[Row]) -> list[str]:
    """Labels in the order of the rows, that of the goals first."""
    labels = dict.fromkeys(row["shape"] for row in rows)
    return sorted(labels, key=lambda label: label != LARGE["shape"])


def ops_block(results: Sequence[Result], device_type: str) -> str:
    """One size in sight, the others folded."""
    from bench.ops import ops_table

    result = newest(results, device_type, "ops", op_row)
    if result is None:
        return ""
    rows = sorted(filter(op_row, result["ops"]), key=lambda r: [*CASES].index(r["op"]))
    parts = []
    for label in op_sizes(rows):
        these = list(filter(rows_with(shape=label), rows))
        title, body = f"Forward and backward, {label}, {these[0]['dtype']}", ops_table(these)
        if parts:
            title, body = f"<details><summary>{title}</summary>", f"{body}\n\n</details>"
        parts.append(f"{title}\n\n{body}\n")
    return "\n".join([*parts, _limits_line(result).lstrip(), source_line(result)])


def train_block(results: Sequence[Result]) -> str:
    """The seed recipe to its end, with what it then writes; ours beside eager over some steps."""
    seed, drift = (newest(results, "cuda", "train", rows_with(kind=k)) for k in ("seed", "drift"))
    parts = []
    if seed:
        rows = list(filter(rows_with(kind="seed"), seed["train"]))
        header = ["recipe, from process start", "caches", "first step s", "all s", "tokens/s"]
        parts.append(table([*header, "result"], [_seed_cells(row) for row in rows]))
        samples = warmest(filter(shown, rows)).get("samples", ())
        if samples:
            parts += ["What it writes at the end:", *map(_quote, samples[:2])]
    if drift:
        lines = []
        for row in filter(rows_with(kind="drift"), drift["train"]):
            verdict = _cell(row.get("red") or row["verdict"])
            ends = row.get("losses", {}) if shown(row) else {}
            lines.append([_cell(row["recipe"]), row["provider"],
                          verdict if shown(row) and row.get("holds") else f"RED: {verdict}",
                          ", ".join(f"{k} {v[-1][1]:.3f}" for k, v in ends.items())])  # fmt: skip
        parts.append(table(["same weights, same data", "what runs", "result", "last loss"], lines))
    return "\n\n".join([*parts, source_lines([seed, drift])])


def warmest(rows: Iterable[Row]) -> Row:
    """Of seed runs that with warm caches, the last; only that one is taken to the target."""
    return max(enumerate(rows), key=lambda x: (x[1].get("cache") == "warm", x[0]), default=(0, {}))[
        1
    ]


def _seed_cells(row: Row) -> list[str]:
    cells = [_cell(row["recipe"]), row["cache"]]
    if not shown(row):
        return [*cells, "", "", "", f"not shown: {_cell(row['red'])}"]
    return [
        *cells,
        _number(row, "first_step_s", ".1f"),
        _number(row, "seconds", ".1f"),
        _number(row, "tokens_per_s", ",.0f"),
        _cell(row["verdict"]) + (", reached" if row.get("reached") else ""),
    ]


def _quote(sample: Row) -> str:
    """A prompt and its continuation, cut; a text can end neither the fence nor the block."""
    prompt, text = sample["prompt"], sample["text"].removeprefix(sample["prompt"])
    if len(text) > SAMPLE_CHARS:
        text = text[:SAMPLE_CHARS] + " ..."
    quoted = f"[prompt]{prompt}\n[model]{text}".rstrip()
    return "```\n" + quoted.replace("```", "` ` `").replace("<!--", "<! --") + "\n```"


def evidence_block(results: Sequence[Result]) -> str:
    """What a GPU says of the kernels, each part from the newest result that has it."""
    found = {s: newest(results, "cuda", s) for s in ("numerics", "tests", "sanitizer", "resume")}
    if not any(found.values()):
        return ""
    lines: list[list[str]] = []
    reds: list[str] = []
    for section, result in found.items():
        if result is None:
            lines.append([section, "not run", ""])
            continue
        pairs, red = EVIDENCE[section](result[section])
        lines += [[what, _cell(verdict), where(result)] for what, verdict in pairs]
        reds += red
    parts = [table(["evidence", "result", "on"], lines), *(f"RED {red}" for red in reds[:MAX_REDS])]
    parts += [f"and {len(reds) - MAX_REDS} more"] if len(reds) > MAX_REDS else []
    return "\n\n".join([*parts, source_lines([*found.values()])])


# Of a section: what was checked and what came of it; and a line for each red result.
Evidence = tuple[list[tuple[str, str]], list[str]]


def _numerics_evidence(rows: Sequence[Row]) -> Evidence:
    """Results against float64, and how many of them gave the same bits again and again."""
    by: dict[tuple[str, str], list[bool]] = {}
    reds = []
    for row in rows:
        rule = "the same bits" if "reruns" in row["result"] else "within twice eager's error"
        by.setdefault((row["dtype"], rule), []).append(row["holds"])
        if not row["holds"]:
            why = row.get("error") or f"{row['ours']:.3g}, allowed {row['budget']:.3g}"
            reds.append(f"{row['op']} {row['shape']} {row['dtype']} {row['result']}: {_cell(why)}")
    pairs = [
        (f"numerics, {dtype}", f"{sum(holds)} of {len(holds)} {rule}")
        for (dtype, rule), holds in by.items()
    ]
    return pairs, reds


def _tests_evidence(tests: Row) -> Evidence:
    pair = ("tests, not interpreted", f"{tests['verdict']}: {tests.get('last_line', '')}")
    return [pair], [_cell(line) for line in tests.get("failed", ())]


def _sanitizer_evidence(rows: Sequence[Row]) -> Evidence:
    by: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        by.setdefault(row["tool"], {}).setdefault(row["verdict"], []).append(row["op"])
    return [
        (tool, "; ".join(f"{verdict}: {', '.join(ops)}" for verdict, ops in verdicts.items()))
        for tool, verdicts in by.items()
    ], []


EVIDENCE: dict[str, Callable[[Any], Evidence]] = {
    "numerics": _numerics_evidence,
    "tests": _tests_evidence,
    "sanitizer": _sanitizer_evidence,
    "resume": lambda row: ([("exact resume", f"{row['verdict']}: {row.get('last_line', '')}")], []),
}


def limits_block(results: Sequence[Result]) -> str:
    """Where a step's time goes, by the profiler, contestants side by side."""
    result = newest(results, "cuda", "profile")
    if result is None:
        return ""
    parts = []
    for model, shape in dict.fromkeys((r["model"], r["shape"]) for r in result["profile"]):
        rows = list(filter(rows_with(model=model, shape=shape), result["profile"]))
        who = sorted({r["provider"] for r in rows}, key=lambda name: (name != "ours bf16", name))
        longest = {row["kind"]: row["ms"] for row in sorted(rows, key=lambda r: r["ms"])}
        kinds = sorted(longest, key=lambda kind: (kind == "idle", -longest[kind]))
        lines = []
        for kind in kinds:
            lines.append([kind])
            for name in who:
                row = next(filter(rows_with(provider=name, kind=kind), rows), {})
                lines[-1] += [_number(row, "ms", ",.2f"), _number(row, "share", ".1%")]
                lines[-1] += [_number(row, "calls", ",")]
        lines.append(["all"])
        for name in who:
            total = sum(row["ms"] for row in rows if row["provider"] == name)
            lines[-1] += [f"{total:,.2f}", "", ""]
        header = ["kind", *(cell for name in who for cell in (f"{name}: ms", "share", "calls"))]
        title = f"Where the time of a step goes, by the profiler, GPT-2 {model}, {shape}"
        parts.append(f"{title}\n\n{table(header, lines)}\n")
    return "\n".join([*parts, source_line(result)])


def tune_block(results: Sequence[Result]) -> str:
    result = newest(results, "cuda", "tune")
    if result is None:
        return ""
    rows = result["tune"]
    lines = [
        [r["kernel"], f"{r['shape']} {r['dtype']}", _change(r["present"], r["best"]),
         f"{r['gain']:.3f}"]
        for r in filter(rows_with(propose=True), rows)
    ]  # fmt: skip
    parts = [f"{len(lines)} of {len(rows)} launches could be faster."]
    if lines:
        parts.append(table(["kernel", "size", "proposed", "x now"], lines))
    return "\n\n".join([*parts, source_line(result)])


def _change(now: Row, then: Row) -> str:
    """What differs between two launches as bench/tune.py describes them."""
    a, b = (x["blocks"] | x for x in (now, then))
    differs = [key for key in b if key not in ("blocks", "source") and b[key] != a.get(key)]
    return ", ".join(f"{key} {a.get(key)} -> {b[key]}" for key in differs)


def public_block(results: Sequence[Result]) -> str:
    """Other people's figures, and ours beneath them where they exist."""
    lines = [[name, f"{rate:,}", who] for name, rate, who in PUBLIC]
    result = newest(results, "cuda", "step")
    ours = [
        row
        for row in (result["step"] if result else [])
        if row["provider"] == "ours bf16" and shown(row) and "T=1024" in row["shape"]
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
    card = CARDS[gpu]
    flops_ms = flops_per_token(config, T, "llmc") * tokens / card.tflops / 1e9
    per_token = config.n_layer * config.n_embd * (2 * 28 + 24 + 4 * 2 * 6)
    moved = per_token * tokens + 30 * num_parameters(config)
    return flops_ms, moved / card.gbs / 1e6


def roofline_block(results: Sequence[Result]) -> str:
    """Estimates; the one block with no measurement in it."""
    lines = []
    for gpu in CARDS:
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
        return ""
    return "\n".join(f"![{FIGURES[name][0]}](bench/plots/{name}.svg)" for name in names)


BLOCKS: dict[str, Callable[[Sequence[Result]], str]] = {
    "goals": goals_block,
    "step-gpu": lambda results: step_block(results, "cuda"),
    "step-cpu": lambda results: step_block(results, "cpu"),
    "ops-gpu": lambda results: ops_block(results, "cuda"),
    "ops-cpu": lambda results: ops_block(results, "cpu"),
    "train": train_block,
    "evidence": evidence_block,
    "limits": limits_block,
    "ablation": ablation_block,
    "tune": tune_block,
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


def _quartile_bars(rows: Sequence[Row], scale: Callable[[float], float]) -> Any:
    """Distances of the quartiles from the median, as matplotlib's yerr wants them."""
    values = [scale(r["ms"]) for r in rows]
    low = [abs(v - scale(r["q3_ms"])) for v, r in zip(values, rows, strict=True)]
    high = [abs(scale(r["q1_ms"]) - v) for v, r in zip(values, rows, strict=True)]
    return [low, high]


def draw_step(device_type: str) -> Callable[..., list[Row]]:
    def draw(results: Sequence[Result], out: Path | None) -> list[Row]:
        result = newest(results, device_type, "step")
        rows = list(filter(shown, result["step"])) if result else []
        if not rows or result is None:
            return []
        # On a GPU the size of the goals, whatever was measured last.
        first = next(filter(rows_with(**LARGE), rows), rows[0])
        first = (first["model"], first["shape"], first["accum"])
        rows = [r for r in rows if (r["model"], r["shape"], r["accum"]) == first]
        if out is None:
            return rows
        title = f"Training step, GPT-2 {first[0]}, {first[1]}\n{device_line(result)}"
        axes = _axes(title, "tokens/s")
        for i, row in enumerate(rows):
            colour = COLOURS.get(row["provider"], "#8f8f8f")
            bars = _quartile_bars([row], lambda ms, row=row: row["tokens"] / ms * 1e3)
            axes.bar(
                i, row["tokens_per_s"], 0.6, color=colour, yerr=bars, ecolor="#333333", capsize=3
            )
            text = f"{row['tokens_per_s']:,.0f}" + (" !" if row["noisy"] else "")
            middle = {"ha": "center", "va": "center", "color": "white", "fontsize": 9}
            axes.text(i, row["tokens_per_s"] * 0.5, text, **middle)
        labels = ["\n".join(r["provider"].rsplit(" ", 1)) for r in rows]
        axes.set_xticks(range(len(rows)), labels)
        if any(r["noisy"] for r in rows):
            axes.set_xlabel("bars: quartiles; ! : samples spread over 5%", fontsize=8)
        _save(axes, out, rows)
        return rows

    return draw


def draw_ops(device_type: str) -> Callable[..., list[Row]]:
    def draw(results: Sequence[Result], out: Path | None) -> list[Row]:
        result = newest(results, device_type, "ops", op_row)
        if result is None:
            return []
        rows = list(filter(shown, filter(op_row, result["ops"])))
        rows = [r for r in rows if r["provider"] == "eager" or "over_eager" in r]
        rows = [r for r in rows if r["shape"] == op_sizes(rows)[0]]
        if out is None:
            return rows
        ops = sorted({r["op"] for r in rows}, key=[*CASES].index)
        who = list(dict.fromkeys(r["provider"] for r in rows))
        title = f"Each op, forward and backward, {rows[0]['shape']}\n{device_line(result)}"
        axes = _axes(title, "time, eager = 1 (lower is faster)")
        groups = [sorted(filter(rows_with(op=op), rows), key=lambda r: who.index(r["provider"]))
                  for op in ops]  # fmt: skip
        width = 0.8 / max(map(len, groups))
        bars = {}
        for i, group in enumerate(groups):
            for j, row in enumerate(group):
                share = 1 / row.get("over_eager", 1.0)
                x, height = i + (j - (len(group) - 1) / 2) * width, min(share, MAX_BAR)
                colour = COLOURS.get(row["provider"], "#8f8f8f")
                bars[row["provider"]] = axes.bar(x, height, width * 0.92, color=colour)
                text = f"{share:.2f}" if share < 10 else f"{share:.0f}"
                behind = {"facecolor": "white", "linewidth": 0, "pad": 0.2}  # hides the line at 1
                axes.text(x, height + 0.02, text, ha="center", fontsize=6, bbox=behind)
        axes.set_xticks(range(len(ops)), [op.replace("_", " ") for op in ops], fontsize=8)
        axes.axhline(1, color="#777777", linewidth=0.8)
        handles = [bars[name] for name in who]
        axes.legend(handles, who, frameon=False, ncols=len(who), fontsize=8, loc="upper right")
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)  # room for the legend
        _save(axes, out, rows)
        return rows

    return draw


def curve_rows(results: Sequence[Result]) -> tuple[Result | None, list[Row]]:
    """The loss of the newest seed run, of one result that with warm caches, and the published."""

    def keep(row: Row) -> bool:
        return seed_run()(row) and shown(row) and bool(row.get("curve"))

    result = newest(results, "cuda", "train", keep)
    if result is None:
        return None, []
    ours = warmest(filter(keep, result["train"]))
    published = [[*point] for point in PUBLISHED_LOSS]
    return result, [
        {"name": "published run", "curve": published},
        {"name": "ours", "curve": ours["curve"]},
    ]


def draw_curve(results: Sequence[Result], out: Path | None) -> list[Row]:
    result, rows = curve_rows(results)
    if result is None or out is None:
        return rows
    title = f"Loss of the recipe shakespeare-124m\n{device_line(result)}"
    axes = _axes(title, "training loss, nats a token")
    published = {"marker": "o", "markersize": 4, "color": "#5f6368"}
    for row, style in zip(rows, (published, {"color": COLOURS["ours"]}), strict=True):
        axes.plot(*zip(*row["curve"], strict=True), label=row["name"], linewidth=1.2, **style)
    axes.set_yscale("log")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    target = PRESETS["shakespeare-124m"].target_loss
    axes.axhline(target, color="#777777", linewidth=0.8, linestyle="--", label=f"goal {target:g}")
    axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    _save(axes, out, rows)
    return rows


def draw_sweep(op: str) -> Callable[..., list[Row]]:
    def draw(results: Sequence[Result], out: Path | None) -> list[Row]:
        def keep(row: Row) -> bool:
            return row["op"] == op and row["mode"] == "both" and bool(row.get("sweep"))

        result = newest(results, "cuda", "ops", keep)
        rows = [r for r in result["ops"] if keep(r) and shown(r)] if result else []
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


FIGURES: dict[str, tuple[str, Callable[..., list[Row]]]] = {
    "step-gpu": ("Tokens per second of a training step on a GPU", draw_step("cuda")),
    "step-cpu": ("Tokens per second of a training step on a CPU", draw_step("cpu")),
    "ops-gpu": ("Each op beside its rivals on a GPU", draw_ops("cuda")),
    "ops-cpu": ("Each op beside its rivals on a CPU", draw_ops("cpu")),
    "curve-gpu": ("Loss of the recipe shakespeare-124m on a GPU", draw_curve),
    **{f"sweep-{op}": (f"{op} over sizes", draw_sweep(op)) for op in CASES},
}


def fingerprint(rows: Sequence[Row]) -> str:
    """Of the rows a figure shows; it stands in the SVG, so a stale figure is found."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _save(axes: Any, out: Path, rows: Sequence[Row]) -> None:
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
    parser.add_argument("--merge", nargs="+", type=Path, help="result files of one device")
    parser.add_argument("--into", type=Path, default=record.RESULTS, help="file or folder for it")
    args = parser.parse_args(argv)
    if args.merge:
        print(f"wrote {os.path.relpath(record.merge(args.merge, args.into))}")
        return
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
