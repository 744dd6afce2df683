"""What a run amounts to, on one page: report.html, self-contained, and report.json.

A falling training loss says nothing about whether a model has learnt the language or the file. The
report puts beside it what does: the loss on held-out text, how often each token was seen, and how
much of what the model writes stands verbatim in what it read.

    python -m training.report runs/shakespeare-cpu
"""

import html
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.tokenizer import get_encoding
from training.metrics import read_metrics
from training.overlap import Overlap, find_overlap
from training.recipes import PUBLISHED_LOSS

CORPUS_FILE = "corpus.txt"  # the training text, kept beside the model for the demo
KEEP_CORPUS_BYTES = 32 << 20  # of larger corpora no copy is kept
MAX_CORPUS_BYTES = 128 << 20  # of larger corpora the first so many bytes are searched
DECODE_TOKENS = 1 << 20  # at once: as Python integers they take 30 times their size
SEED_RECIPE = "shakespeare-124m"
GAP_NATS = 0.5  # validation minus training loss: training text is e^0.5 = 1.6 times as likely
RISE_NATS = 0.1  # validation loss above its own minimum
RECITED_SHARE = 0.5  # of the samples' 32-byte windows
RECITED_BYTES = 128  # two lines of verse
MANY_EPOCHS = 10.0
LOW_LOSS = 1.0  # nats per token; GPT-2 1558M reaches 2.5 to 3 on text it has not seen

RECITATION = (
    "A loss of 0.08 after 50 epochs over 338 thousand tokens is recitation: the model has learnt "
    "this file by heart. It says how well 124 million parameters store one megabyte, and nothing "
    "about text the model has not seen. The recipe keeps no validation split, so there is no "
    "number here that could say more; run it with --val-fraction 0.1 to get one."
)


@dataclass(frozen=True)
class Run:
    """What a run folder says about itself; parts that are missing are empty."""

    summary: dict[str, Any]
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]

    @property
    def recipe_name(self) -> str:
        return str(self.config.get("recipe", {}).get("name", ""))

    @property
    def train_loss(self) -> float | None:
        """Mean over the last twentieth of the steps: a single batch proves nothing."""
        losses = [s["loss"] for s in self.steps if isinstance(s.get("loss"), float)]
        if not losses:
            return self.summary.get("train_loss")
        last = losses[-max(1, len(losses) // 20) :]
        return sum(last) / len(last)

    @property
    def val_loss(self) -> float | None:
        value = self.summary.get("val_loss")
        if value is None and self.evaluations:
            value = self.evaluations[-1].get("val_loss")
        return value


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(folder: Path) -> Run:
    """Read summary.json, config.json and metrics.jsonl."""
    return Run(
        _read_object(folder / "summary.json"),
        _read_object(folder / "config.json"),
        *read_metrics(folder / "metrics.jsonl"),
    )


def split_samples(text: str) -> list[str]:
    """The model's parts of a samples.txt; a file in another form is one sample."""
    parts = re.findall(r"^\[model\](.*?)(?=\n+\[prompt\] |\s*\Z)", text, re.DOTALL | re.MULTILINE)
    return parts or ([text] if text.strip() else [])


def verdicts(run: Run, overlap: Overlap | None) -> list[tuple[str, str]]:
    """("warning" or "note", sentence) in plain words; what the numbers do and do not show."""
    found: list[tuple[str, str]] = []
    train, val = run.train_loss, run.val_loss
    epochs = run.summary.get("epochs")
    if run.recipe_name == SEED_RECIPE:
        found.append(("warning", RECITATION))
    if train is not None and val is not None:
        gap = val - train
        if gap > GAP_NATS:
            found.append((
                "warning",
                f"Memorisation: the loss is {train:.2f} on the training text and {val:.2f} on "
                f"held-out text. The gap of {gap:.2f} nats means a token of the training text is "
                f"{math.exp(gap):.1f} times as likely as one of new text: the model is learning "
                f"the file, not the language. Fewer steps, more text or dropout help.",
            ))  # fmt: skip
        else:
            found.append((
                "note",
                f"Training loss {train:.2f} and validation loss {val:.2f} lie {gap:+.2f} nats "
                f"apart: no sign of memorisation.",
            ))  # fmt: skip
    elif val is None and train is not None and run.recipe_name != SEED_RECIPE:
        doubtful = train < LOW_LOSS or (epochs or 0) > MANY_EPOCHS
        found.append((
            "warning" if doubtful else "note",
            f"No validation split: a training loss of {train:.2f}"
            + (f" after {epochs:.1f} epochs" if epochs else "")
            + " cannot be told from recitation by itself.",
        ))  # fmt: skip
    losses = [e["val_loss"] for e in run.evaluations if "val_loss" in e]
    if losses and losses[-1] - min(losses) > RISE_NATS:
        best = run.evaluations[losses.index(min(losses))]
        found.append((
            "warning",
            f"Overfitting: the validation loss was {min(losses):.2f} at step {best.get('step')} "
            f"and rose to {losses[-1]:.2f}. The saved weights are the last, not the best.",
        ))  # fmt: skip
    bigram = (run.summary.get("baselines") or {}).get("bigram")
    if val is not None and bigram is not None and val >= bigram:
        found.append((
            "warning",
            f"The validation loss {val:.2f} is not below the {bigram:.2f} that counting pairs of "
            f"tokens gives: the model has not learnt to use context yet.",
        ))  # fmt: skip
    if overlap is not None:
        found.append(_overlap_verdict(overlap))
    return found


def _overlap_verdict(overlap: Overlap) -> tuple[str, str]:
    share, longest = overlap.shares.get(32, 0.0), len(overlap.longest)
    if share > RECITED_SHARE or longest >= RECITED_BYTES:
        return (
            "warning",
            f"The samples recite: {share:.0%} of their 32-byte windows stand verbatim in the "
            f"training text, the longest stretch has {longest} bytes.",
        )
    return (
        "note",
        f"The samples are the model's own: {share:.0%} of their 32-byte windows stand verbatim in "
        f"the training text, the longest stretch has {longest} bytes.",
    )


# ---- curves


def svg_plot(
    series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]],
    levels: Sequence[tuple[str, float]] = (),
    title: str = "",
    size: tuple[int, int] = (760, 300),
    log_y: bool = False,
) -> str:
    """A line plot as inline SVG.

    Args:
        series: (name, style, points); style is "line", "dots" or "crosses".
        levels: (name, y): horizontal lines.
        title: Above the plot.
        size: Width and height in pixels.
        log_y: Logarithmic y axis.
    """
    series = [(n, s, [(x, y) for x, y in p if math.isfinite(y)]) for n, s, p in series]
    points = [p for _, _, ps in series for p in ps]
    if not points:
        return f"<p>{html.escape(title)}: n/a</p>"
    ys = [y for _, y in points] + [y for _, y in levels]
    log_y = log_y and min(ys) > 0

    def scale(y: float) -> float:
        return math.log10(y) if log_y else y

    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = scale(min(ys)), scale(max(ys))
    x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)
    W, H = size
    left, right, top, bottom = 56, 12, 28, 30

    def px(x: float) -> float:
        return left + (x - x0) / (x1 - x0) * (W - left - right)

    def py(y: float) -> float:
        return H - bottom - (scale(y) - y0) / (y1 - y0) * (H - top - bottom)

    out = [
        f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{html.escape(title)}">',
        f'<text x="{left}" y="16" class="t">{html.escape(title)}</text>',
    ]
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        value = 10**y if log_y else y
        at = H - bottom - (H - top - bottom) * i / 4
        out.append(f'<line x1="{left}" x2="{W - right}" y1="{at:.1f}" y2="{at:.1f}" class="g"/>')
        out.append(f'<text x="{left - 6}" y="{at + 4:.1f}" class="a e">{value:.3g}</text>')
        x = x0 + (x1 - x0) * i / 4
        out.append(f'<text x="{px(x):.1f}" y="{H - 10}" class="a m">{x:.6g}</text>')
    for name, level in levels:
        out.append(
            f'<line x1="{left}" x2="{W - right}" y1="{py(level):.1f}" y2="{py(level):.1f}" '
            f'class="l"/><text x="{W - right}" y="{py(level) - 4:.1f}" class="a e">'
            f"{html.escape(name)} {level:.2f}</text>"
        )
    legend_x = left + 260.0
    for i, (name, style, line) in enumerate(series):
        if not line:
            continue
        # More points than pixels only cost bytes; the last one always stays.
        every = max(1, len(line) // 1500)
        line = [*line[:-1:every], line[-1]]
        places = [(px(x), py(y)) for x, y in line]
        if style == "crosses":
            d = "".join(f"M{x - 4:.1f} {y:.1f}h8M{x:.1f} {y - 4:.1f}v8" for x, y in places)
        else:
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        out.append(f'<path d="{d}" class="s s{i}"/>')
        if style == "dots":
            out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" class="f{i}"/>' for x, y in places]
        out.append(f'<rect x="{legend_x:.0f}" y="8" width="10" height="10" class="f{i}"/>')
        out.append(f'<text x="{legend_x + 14:.0f}" y="17" class="a">{html.escape(name)}</text>')
        legend_x += 30 + 7 * len(name)
    return "".join(out) + "</svg>"


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]


# ---- the page

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:800px;margin:2em auto;padding:0 1em;color:#1b1f24}
table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}
td.n{font-variant-numeric:tabular-nums}pre{white-space:pre-wrap;background:#f5f6f8;padding:10px}
.warning{background:#fff1d6;border-left:4px solid #d98a00;padding:8px 12px}
.note{background:#e9f3ec;border-left:4px solid #3a8f57;padding:8px 12px}
mark{background:#ffd8a8}svg{width:100%;height:auto}
.g{stroke:#e3e6ea}.l{stroke:#888;stroke-dasharray:5 4}.s{fill:none;stroke-width:1.4}
.t{font-size:14px;font-weight:600}.a{font-size:11px;fill:#555}.e{text-anchor:end}.m{text-anchor:middle}
.s0{stroke:#2563b0}.f0{fill:#2563b0}.s1{stroke:#c2410c}.f1{fill:#c2410c}.s2{stroke:#111}.f2{fill:#111}
"""


def _number(value: Any, form: str = ",.0f", unit: str = "") -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return "n/a"
    return f"{value:{form}}{unit}"


def facts(run: Run, corpus_bytes: int) -> list[tuple[str, str]]:
    """(name, value) rows of the table; n/a for what the run does not say."""
    s, val = run.summary, run.val_loss
    tokens = s.get("corpus_tokens")
    bytes_per_token = corpus_bytes / tokens if tokens and corpus_bytes else None
    bits = val / (math.log(2) * bytes_per_token) if val is not None and bytes_per_token else None
    train_s, wall_s = s.get("train_s"), s.get("wall_s")
    parameters = run.config.get("parameters")
    return [
        ("recipe", run.recipe_name or "n/a"),
        ("model", f"{run.config.get('recipe', {}).get('model', 'n/a')}, "
                  f"{_number(parameters)} parameters"),
        ("training text", _number(corpus_bytes or None, ",.0f", " bytes")),
        ("training tokens", _number(tokens)),
        ("tokens seen", _number(s.get("tokens_seen"))),
        ("epochs (times the text was read)", _number(s.get("epochs"), ".2f")),
        ("steps", _number(s.get("final_step", len(run.steps) or None))),
        ("trained context", _number(s.get("trained_context"), ",.0f", " tokens")),
        ("training loss, last 5% of steps", _number(run.train_loss, ".4f", " nats per token")),
        ("validation loss", _number(val, ".4f", " nats per token")),
        ("perplexity, held-out text", _number(math.exp(val) if val is not None else None, ",.2f")),
        ("bits per byte, held-out text", _number(bits, ".3f")),
        *(
            (f"validation loss of counting ({name})", _number(loss, ".4f", " nats per token"))
            for name, loss in (s.get("baselines") or {}).items()
        ),
        ("time in steps", _number(train_s, ",.1f", " s")),
        ("time in all, start-up included", _number(wall_s, ",.1f", " s")),
        ("speed", _number(s.get("tokens_per_s"), ",.0f", " tokens/s")),
        ("device", str(s.get("device") or run.config.get("device") or "n/a")),
        ("weights file", _number(s.get("model_bytes"), ",.0f", " bytes")),
    ]  # fmt: skip


def loss_curve(run: Run) -> str:
    """Training and validation loss over the steps, with the published run for the seed recipe."""
    published = PUBLISHED_LOSS if run.recipe_name == SEED_RECIPE else ()
    return svg_plot(
        [
            ("training", "line", _points(run.steps, "loss")),
            ("validation", "dots", _points(run.evaluations, "val_loss")),
            ("published run", "crosses", published),
        ],
        [*(run.summary.get("baselines") or {}).items()],
        "loss, nats per token",
        log_y=bool(published),
    )


def _curves(run: Run) -> str:
    return loss_curve(run) + "".join(
        svg_plot([(key, "line", _points(run.steps, key))], (), title, (760, 170))
        for key, title in (
            ("lr", "learning rate"),
            ("grad_norm", "gradient norm before clipping"),
            ("tokens_per_s", "tokens per second"),
        )
    )


def _published_table(run: Run) -> str:
    if run.recipe_name != SEED_RECIPE:
        return ""
    ours = dict(_points(run.steps, "loss"))
    rows = "".join(
        f"<tr><td class=n>{step:,}</td><td class=n>{loss:.3g}</td>"
        f"<td class=n>{_number(ours.get(step), '.3g')}</td></tr>"
        for step, loss in PUBLISHED_LOSS
    )
    return (
        "<h2>Beside the published run</h2><table><tr><th>step</th><th>published loss</th>"
        f"<th>this run</th></tr>{rows}</table><p>The published run stopped at step 4,175, after "
        "4,176 steps of 4,096 tokens: 17.1 million tokens, 50.6 epochs.</p>"
    )


def mark_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """HTML of `text` with its byte ranges `spans` marked."""
    raw, out, at = text.encode("utf-8", "replace"), [], 0
    for start, end in (*spans, (len(raw), len(raw))):
        # A span may begin or end inside a character; that character is then left unmarked.
        while start < end and raw[start] & 0xC0 == 0x80:
            start += 1
        while start < end < len(raw) and raw[end] & 0xC0 == 0x80:
            end -= 1
        out.append(html.escape(raw[at:start].decode()))
        if end > start:
            out.append(f"<mark>{html.escape(raw[start:end].decode())}</mark>")
        at = end
    return "".join(out)


def _overlap_html(overlap: Overlap | None, samples: Sequence[str], cut: bool) -> str:
    if overlap is None:
        return "<h2>Samples</h2><p>n/a</p>"
    rows = "".join(
        f"<tr><td class=n>{size}</td><td class=n>{share:.1%}</td></tr>"
        for size, share in overlap.shares.items()
    )
    texts = "".join(
        f"<pre>{mark_spans(sample, spans)}</pre>"
        for sample, spans in zip(samples, overlap.spans, strict=True)
    )
    longest = html.escape(overlap.longest.decode("utf-8", "replace"))
    note = "<p>Only the first 128 MiB of the training text were searched.</p>" if cut else ""
    return (
        "<h2>What the model writes, and what of it stands in the training text</h2>"
        "<table><tr><th>window, bytes</th><th>share of the samples' windows found verbatim</th>"
        f"</tr>{rows}</table>{note}<p>Longest stretch: {len(overlap.longest)} bytes.</p>"
        f"<pre>{longest}</pre><h2>Samples</h2><p>Marked: at least 32 bytes found verbatim.</p>"
        f"{texts}"
    )


def write_report(run: Path, corpus: bytes, samples: Sequence[str] | None = None) -> Path:
    """Write report.html and report.json into a run folder.

    Args:
        run: Run folder with any of summary.json, config.json, metrics.jsonl, samples.txt.
        corpus: UTF-8 bytes of the training part of the text; up to 32 MiB a copy is kept as
            corpus.txt, in which the demo looks up what it highlights.
        samples: Texts the model made; None takes the model's parts of samples.txt.

    Returns:
        The path of report.html.
    """
    record = read_run(run)
    if samples is None:
        file = run / "samples.txt"
        samples = split_samples(file.read_text(encoding="utf-8")) if file.is_file() else []
    searched = corpus[:MAX_CORPUS_BYTES]
    overlap = find_overlap(samples, searched) if samples and searched else None
    if 0 < len(corpus) <= KEEP_CORPUS_BYTES:
        (run / CORPUS_FILE).write_bytes(corpus)
    judged = verdicts(record, overlap)
    table = facts(record, len(corpus))
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{html.escape(value)}</td></tr>"
        for name, value in table
    )
    title = f"Run {run.name}"
    details = html.escape(json.dumps(record.config, indent=2))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
        f"</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        + "".join(f'<p class="{kind}">{html.escape(line)}</p>' for kind, line in judged)
        + f"<h2>Numbers</h2><table>{rows}</table><h2>Curves</h2>{_curves(record)}"
        + _published_table(record)
        + _overlap_html(overlap, samples, len(corpus) >= MAX_CORPUS_BYTES)
        + f"<h2>Configuration</h2><details><summary>config.json</summary><pre>{details}</pre>"
        "</details></body></html>\n"
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    content = {
        "verdicts": [{"kind": kind, "text": line} for kind, line in judged],
        "facts": dict(table),
        "train_loss": record.train_loss,
        "val_loss": record.val_loss,
        "overlap": None
        if overlap is None
        else {
            "longest_bytes": len(overlap.longest),
            "longest": overlap.longest.decode("utf-8", "replace"),
            "shares": {str(size): share for size, share in overlap.shares.items()},
            "covered": overlap.covered,
        },
    }
    (run / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def report_run(run: Path, train_tokens: np.ndarray, say: Callable[[str], None]) -> None:
    """The end of a training run: write the report, say its warnings and where it is.

    Args:
        run: Run folder with summary.json and samples.txt.
        train_tokens: (N,) GPT-2 token ids of the training part.
        say: Called with each line.
    """
    corpus = bytearray()
    for at in range(0, len(train_tokens), DECODE_TOKENS):
        if len(corpus) >= MAX_CORPUS_BYTES:
            break
        corpus += get_encoding().decode_bytes(train_tokens[at : at + DECODE_TOKENS].tolist())
    path = write_report(run, bytes(corpus))
    for verdict in _read_object(run / "report.json")["verdicts"]:
        if verdict["kind"] == "warning":
            say(f"warning: {verdict['text']}")
    say(f"report: {path}")


def main(args: list[str] | None = None) -> None:
    """`python -m training.report`."""
    import tyro

    def command(run: tyro.conf.Positional[Path], corpus: Path | None = None) -> None:
        """Write report.html of a run again.

        Args:
            run: Run folder.
            corpus: Training text; without it the copy in the run folder.
        """
        if not run.is_dir():
            raise FileNotFoundError(f"report: no such run folder: {run}")
        text = corpus or run / CORPUS_FILE
        if corpus is not None and not corpus.is_file():
            raise FileNotFoundError(f"report: no such file: {corpus}")
        path = write_report(run, text.read_bytes() if text.is_file() else b"")
        content = _read_object(run / "report.json")
        for verdict in content["verdicts"]:
            print(f"{verdict['kind']}: {verdict['text']}")
        print(f"report: {path}")

    try:
        tyro.cli(command, prog="python -m training.report", args=args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
