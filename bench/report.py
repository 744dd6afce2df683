"""Tables and plots from the committed result files alone.

    python -m bench.report            # write docs/results.md, bench/plots/, the blocks of README.md
    python -m bench.report --check    # exit 1 if one of them differs from what the results say

docs/results.md is written whole, README.md only between lines such as <!-- bench:goals --> and
<!-- /bench:goals -->; the blocks are goals, step-gpu and step-cpu. Files of one device, commit and
versions count as one, in which later rows win. The figures of a row in doubt are never shown.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bench import cli, figures, record, tables
from bench.record import LARGE, CheckRow, ProfileRow, Result, StepRow, newest
from bench.tables import cell, number, table, where
from model.files import write_atomically

SAMPLE_CHARS = 300
GOAL_GPU = "H200"
SEED = {"model": "124m", "shape": "B=16 T=64", "accum": 4}

Figure = Callable[[Result], float | None]  # None: not measured; NaN: in doubt
Block = Callable[[Sequence[Result]], str]


def of(section: str, get: Callable[[Any], float | None], **want: Any) -> Figure:
    """A figure of the last row with these values: a new measurement outranks an old failure."""

    def figure(result: Result) -> float | None:
        rows = result.rows(section, **want)
        if not rows:
            return None
        return math.nan if rows[-1].doubt else get(rows[-1])

    return figure


def peak_share(result: Result) -> float | None:
    """Our peak memory as a share of the compiled baseline's."""
    who = ("ours bf16", "compile bf16")
    ours, theirs = (of("step", lambda r: r.peak_gib, provider=p, **LARGE)(result) for p in who)
    return None if ours is None or theirs is None else ours / theirs


class Goal(NamedTuple):
    """A bound on a figure."""

    what: str
    target: str  # the bound in words
    figure: Figure
    bound: float
    digits: int = 0  # after the point; rounding never makes a figure look better
    unit: str = ""
    at_least: bool = False  # False: the figure must not exceed the bound

    def text(self, figure: float) -> str:
        units = round(figure * 10**self.digits, 4)  # 1.15 * 100 is 114.99999999999999
        units = math.floor(units) if self.at_least else math.ceil(units)
        return f"{units / 10**self.digits:,.{self.digits}f}{self.unit}"

    def cells(self, results: Sequence[Result]) -> tuple[list[str], Result | None]:
        """Figure, commit and verdict of the newest GPU result with the figure, and that result."""
        for result in reversed(results):
            figure = self.figure(result) if result.device["type"] == "cuda" else None
            if figure is None:
                continue
            if math.isnan(figure):
                return ["not shown: in doubt", result.commit, "open"], result
            met = figure >= self.bound if self.at_least else figure <= self.bound
            text = "not reached" if math.isinf(figure) else self.text(figure)
            return [text, result.commit, "met" if met else "missed"], result
        return ["", "", "open"], None


OURS: dict[str, Any] = {"provider": "ours bf16"}
SPEEDUP = of("step", lambda row: row.over.get("compile bf16"), **OURS, **LARGE)
RATE = of("step", lambda row: row.tokens_per_s, **OURS, **LARGE)
SEED_RATE = of("step", lambda row: row.tokens_per_s, **OURS, **SEED)
COLD = of("seed", lambda row: row.first_step_s, cache="cold")
WARM = of("seed", lambda row: row.first_step_s, cache="warm")
TEXT = {"cache": "warm", "text": "tiny Shakespeare"}
SECONDS = of("seed", lambda row: row.seconds if row.reached else math.inf, **TEXT)
MICRO = "the same recipe as four separate micro-batches, tokens/s"
MEMORY = "peak memory over the compiled baseline's, B=64 T=1024"
GOALS = (
    Goal("tokens/s over compiled plain PyTorch, B=64 T=1024", "1.10x", SPEEDUP, 1.1, 2, "x", True),
    Goal("the same, stretch goal", "1.20x", SPEEDUP, 1.2, 2, "x", True),
    Goal("tokens/s, same shape, stretch goal", "600,000", RATE, 6e5, at_least=True),
    Goal("Shakespeare recipe to loss < 0.09, warm caches", "60 s", SECONDS, 60, 1, " s"),
    Goal(MICRO, "200,000", SEED_RATE, 2e5, at_least=True),
    Goal(MEMORY, "two thirds", peak_share, 2 / 3, 3),
    Goal("process start to first step, cold caches", "30 s", COLD, 30, 1, " s"),
    Goal("process start to first step, warm caches", "6 s", WARM, 6, 1, " s"),
)


def goals_block(results: Sequence[Result]) -> str:
    header = [f"goal on one {GOAL_GPU}, bf16, GPT-2 124M, maths unchanged"]
    lines, others = [], []
    for goal in GOALS:
        cells, result = goal.cells(results)
        lines.append([goal.what, goal.target, *cells])
        # Whole words: a GH200 is another GPU.
        if result and not re.search(rf"\b{GOAL_GPU}\b", result.device["name"]):
            device = tables.device_line(result)
            others.append(f"{result.commit} was measured on an {device}, not an {GOAL_GPU}.")
    body = table([*header, "target", "measured", "commit", "state"], lines)
    return "\n\n".join([body, *dict.fromkeys(others)])


NO_GPU_STEP = "No training-step result of a GPU is committed yet."


def step_block(results: Sequence[Result], device_type: str, num_tables: int | None = None) -> str:
    """A table per size, the goals' size first; at most `num_tables`.

    On a GPU all sizes without a goal share one table.
    """
    result, rows = newest(results, device_type, "step")
    cuda = device_type == "cuda"
    if result is None:
        return NO_GPU_STEP if cuda else ""
    groups: dict[str, list[StepRow]] = {}
    for row in sorted(rows, key=lambda row: not row.has(**LARGE)):
        accum = f", {row.accum} micro-batches" if row.accum > 1 else ""
        title = f"GPT-2 {row.model}, {row.shape}{accum}"
        if cuda and not (row.has(**LARGE) or row.has(**SEED)):
            row, title = replace(row, provider=f"{title}: {row.provider}"), "Other sizes"
        groups.setdefault(title, []).append(row)
    parts = [f"{title} ({where(result)})\n\n{tables.step_table(x)}" for title, x in groups.items()]
    note = "fp32 rows multiply in TF32. MFU is against the data sheet's dense bf16 peak."
    return "\n\n".join([*parts[:num_tables], *([note] if cuda else [])])


def ablation_block(results: Sequence[Result]) -> str:
    result, rows = newest(results, "cuda", "ablation")
    if result is None:
        return ""
    return f"One at a time, {rows[0].shape} ({where(result)})\n\n{tables.step_table(rows)}"


def ops_block(results: Sequence[Result], device_type: str) -> str:
    """Forward and backward together. The size of the goals is visible, the others are folded."""
    result, rows = newest(results, device_type, "ops", mode="both")
    if result is None:
        return ""
    parts = []
    sizes = dict.fromkeys(row.shape for row in rows)
    for size in sorted(sizes, key=lambda size: size != LARGE["shape"]):
        these = [row for row in rows if row.shape == size]
        title = f"Forward and backward, {size}, {these[0].dtype} ({where(result)})"
        body = tables.ops_table(these)
        if parts:
            title, body = f"<details><summary>{title}</summary>", f"{body}\n\n</details>"
        parts.append(f"{title}\n\n{body}")
    if limits := result.about.get("limits"):
        said = {name: tables.figures_3(limit) for name, limit in limits.items()}
        parts.append(
            f"Limits measured in the same run: copy {said['copy_gbs']} GB/s, "
            f"matmul {said['matmul_tflops']} TFLOP/s, "
            f"matmul with K=768 {said['matmul_k768_tflops']} TFLOP/s."
        )
    return "\n\n".join(parts)


def seed_block(results: Sequence[Result]) -> str:
    """The Shakespeare recipe to its end, and what the model then writes."""
    result, rows = newest(results, "cuda", "seed")
    if result is None:
        return ""
    goal = ", its lowest below the goal"
    body = tables.rows_table(
        rows,
        {
            f"GPT-2 124M, from process start ({where(result)})": lambda row: cell(row.text),
            "caches": lambda row: row.cache,
        },
        {
            "result": lambda row: cell(row.result) + goal * row.reached,
            "first step s": lambda row: number(row.first_step_s, ".1f"),
            "all s": lambda row: number(row.seconds, ".1f"),
            "tokens/s": lambda row: number(row.tokens_per_s, ",.0f"),
        },
    )
    samples = [row.samples[0] for row in figures.warmest(tables.shown(rows)) if row.samples]
    if not samples:
        return body
    prompt, text = samples[0]["prompt"], samples[0]["text"].removeprefix(samples[0]["prompt"])
    if len(text) > SAMPLE_CHARS:
        text = text[:SAMPLE_CHARS] + " ..."
    # The text must not end the fence or the block.
    quoted = f"[prompt]{prompt}\n[model]{text}".rstrip()
    quoted = quoted.replace("```", "` ` `").replace("<!--", "<! --")
    return f"{body}\n\nA sample at the end:\n\n```\n{quoted}\n```"


def evidence_block(results: Sequence[Result]) -> str:
    """How much of each check passes on a GPU, and what does not.

    A later result replaces an earlier one only for what it checked.
    """
    latest: dict[tuple[Any, ...], tuple[CheckRow, str]] = {}
    for result in results:
        for row in result.rows("checks") if result.device["type"] == "cuda" else ():
            latest[row.key] = row, result.commit
    lines: list[list[str]] = []
    reds: dict[tuple[str, str, str], list[CheckRow]] = {}
    for check in sorted({check for check, _ in latest}):
        rows = [(row, commit) for row, commit in latest.values() if row.check == check]
        holds = f"{sum(not row.doubt for row, _ in rows)} of {len(rows)} hold"
        said = "; ".join(dict.fromkeys(cell(row.found) for row, _ in rows if row.found))
        commits = ", ".join(sorted({commit for _, commit in rows}))
        lines.append([check, f"{holds}: {said}" if said else holds, commits])
        for row, commit in rows:
            if row.doubt:
                reds.setdefault((check, row.what.split(" ")[0], commit), []).append(row)
    if not lines:
        return ""
    parts = [table(["check", "result", "commit"], lines)]
    for (check, _, commit), rows in reds.items():  # one line per op and commit
        more = f" (and {len(rows) - 1} more of this op)" if len(rows) > 1 else ""
        parts.append(f"FAILED {check} {rows[0].what}: {cell(rows[0].doubt)}, {commit}{more}")
    return "\n\n".join(parts)


def profile_block(results: Sequence[Result]) -> str:
    """Where a step's time goes by the profiler, a table per size, contestants side by side."""
    result, everything = newest(results, "cuda", "profile")
    if result is None:
        return ""
    parts = []
    for model, shape in dict.fromkeys((row.model, row.shape) for row in everything):
        rows: list[ProfileRow] = [row for row in everything if row.has(model=model, shape=shape)]
        who = sorted({row.provider for row in rows}, key=lambda name: (name != "ours bf16", name))
        longest = {row.kind: row.ms for row in sorted(rows, key=lambda row: row.ms)}
        kinds = sorted(longest, key=lambda kind: (kind == "idle", -longest[kind]))
        header, lines, total = ["kind"], [[kind] for kind in kinds], ["all"]
        for name in who:
            header += [f"{name}: ms", "share"]
            found = {row.kind: row for row in rows if row.provider == name}
            for line in lines:
                row = found.get(line[0])
                line += [f"{row.ms:,.2f}", f"{row.share:.1%}"] if row else ["", ""]
            total += [f"{sum(row.ms for row in found.values()):,.2f}", ""]
        title = f"By the profiler, GPT-2 {model}, {shape} ({where(result)})"
        parts.append(f"{title}\n\n{table(header, [*lines, total])}")
    return "\n\n".join(parts)


def plots_block(results: Sequence[Result]) -> str:
    plots = figures.to_draw(results)
    return "\n".join(f"![{plot.title}](../bench/plots/{plot.name}.svg)" for plot in plots)


README_BLOCKS: dict[str, Block] = {
    "goals": goals_block,
    "step-gpu": lambda results: step_block(results, "cuda", num_tables=1),
    "step-cpu": lambda results: step_block(results, "cpu", num_tables=1),
}

SECTIONS: dict[str, Block] = {  # of docs/results.md, by heading
    "Goals": goals_block,
    "The whole training step on a GPU": lambda results: step_block(results, "cuda"),
    "The whole training step on a CPU": lambda results: step_block(results, "cpu"),
    "Each op on a GPU": lambda results: ops_block(results, "cuda"),
    "Each op on a CPU": lambda results: ops_block(results, "cpu"),
    "Where the time of a step goes": profile_block,
    "Ablation of our step": ablation_block,
    "The Shakespeare recipe": seed_block,
    "Checks of the kernels on a GPU": evidence_block,
    "Plots": plots_block,
    "What was run": lambda results: "\n".join(f"- {tables.source_line(r)}" for r in results),
}


def page(results: Sequence[Result]) -> str:
    """docs/results.md: every section that is not empty."""
    found = {heading: block(results) for heading, block in SECTIONS.items()}
    parts = [f"## {heading}\n\n{text}" for heading, text in found.items() if text]
    about = (
        "Made by `make report` from `bench/results/`. Each figure names its device and commit; the "
        "commands are listed at the end. The spread is the samples' standard deviation over their "
        f"mean; `!` marks more than {record.NOISY_COV:.0%}."
    )
    return "\n\n".join(["# Results", about, *parts]) + "\n"


def fill(text: str, results: Sequence[Result]) -> str:
    """`text` with every marked block rewritten.

    Raises:
        ValueError: a block has an unknown name, or is not closed.
    """

    def written(match: re.Match[str]) -> str:
        name, closed = match.groups()
        if name not in README_BLOCKS:
            raise ValueError(f"report: unknown block {name!r}; known: {', '.join(README_BLOCKS)}")
        start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if not closed:
            raise ValueError(f"report: {start} must be followed by {end}")
        return f"{start}\n{README_BLOCKS[name](results)}\n{end}"

    block = r"<!-- bench:([a-z-]+) -->(\n.*?<!-- /bench:\1 -->)?"
    return re.sub(block, written, text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser("bench.report", __doc__)
    parser.add_argument("--check", action="store_true", help="edit nothing, exit 1 on a difference")
    parser.add_argument("--results", type=cli.path, default=record.RESULTS)
    parser.add_argument(
        "--root", type=cli.path, default=record.ROOT, help="where files are written"
    )
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise ValueError(f"report: --results must be a folder, got {args.results}")
    results, readme = record.load_all(args.results), args.root / "README.md"
    texts = {
        readme: fill(readme.read_text() if readme.exists() else "", results),
        args.root / "docs/results.md": page(results),
    }
    plots = {args.root / f"bench/plots/{plot.name}.svg": plot for plot in figures.to_draw(results)}
    before = {path: path.read_text() if path.exists() else "" for path in (*texts, *plots)}
    wrong = [path for path, text in texts.items() if before[path] != text]
    wrong += [path for path, plot in plots.items() if plot.mark not in before[path]]
    names = ", ".join(str(path.relative_to(args.root)) for path in wrong)
    if args.check:
        if wrong:
            print(f"report: {names} differ from bench/results; run `make report`", file=sys.stderr)
        return 1 if wrong else 0
    for path, text in texts.items():
        write_atomically(path, text)
    for path, plot in plots.items():
        plot.save(path)
    print(f"wrote {len(before)} files from {len(results)} results; changed: {names or 'none'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
