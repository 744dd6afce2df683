"""What a run amounts to, on one page: report.html, self-contained, report.json and loss.png.

A falling training loss says nothing about whether a model has learnt the language or the file. The
report puts beside it what does: the loss on held-out text, how often each token was seen, and how
much of what the model writes stands verbatim in what it read. Every sentence is made from the run's
own numbers, and where a number is missing or not finite nothing is concluded from it.

    python -m training.report runs/shakespeare-cpu
"""

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.edge import exits, is_real
from model.files import write_atomically
from model.tokenizer import get_encoding
from training import plot
from training.data import SHAKESPEARE_SHA256, Tokens
from training.metrics import read_metrics
from training.overlap import Overlap, find_overlap
from training.recipes import PRESETS, PUBLISHED_LOSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORPUS_FILE = "corpus.txt"  # the training text, kept beside the model for the demo
KEEP_CORPUS_BYTES = 32 << 20  # of larger corpora no copy is kept
MAX_CORPUS_BYTES = 128 << 20  # of larger corpora the first so many bytes are searched
DECODE_TOKENS = 1 << 20  # at once: as Python integers they take 30 times their size
SEED_RECIPE = "shakespeare-124m"
GAP_NATS = 0.5  # validation minus training loss: training text is e^0.5 = 1.6 times as likely
EASIER_NATS = 0.1  # validation loss below training loss
RISE_NATS = 0.1  # validation loss above its own minimum
WINDOW = 32  # bytes; a shorter stretch in common is ordinary language
RECITED_SHARE = 0.5  # of the samples' windows
RECITED_BYTES = 128  # two lines of verse
OWN_SHARE = 0.05
MANY_EPOCHS = 10.0
LOW_LOSS = 1.0  # nats per token; GPT-2 1558M reaches 2.5 to 3 on text it has not seen
RECITED_LOSS = 0.5  # after many epochs no other way leads there


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None: what stands in a file may be missing, NaN or of another type."""
    value: Any = values.get(key)
    return float(value) if is_real(value) and abs(value) < 1e300 else None


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of each row, NaN for what is not a finite number."""
    found = [(row["step"], number(row, key)) for row in rows if key in row]
    return [(step, math.nan if value is None else value) for step, value in found]


@dataclass(frozen=True)
class Run:
    """What a run folder says about itself; parts that are missing are empty."""

    summary: dict[str, Any]
    config: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def part(self, name: str) -> dict[str, Any]:
        """An object of config.json, such as recipe."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def recipe_name(self) -> str:
        return str(self.part("recipe").get("name", ""))

    @property
    def num_steps(self) -> float | None:
        return self.steps[-1]["step"] + 1 if self.steps else number(self.summary, "final_step")

    @property
    def train_loss(self) -> float | None:
        """Mean over the last twentieth of the steps: a single batch proves nothing."""
        losses = [number(step, "loss") for step in self.steps if "loss" in step]
        if not losses:
            return number(self.summary, "train_loss")
        last = [loss for loss in losses[-max(1, len(losses) // 20) :] if loss is not None]
        return sum(last) / len(last) if last else None

    @property
    def val_loss(self) -> float | None:
        """Of the last evaluation."""
        if self.summary.get("val_loss") is None and self.evaluations:
            return number(self.evaluations[-1], "val_loss")
        return number(self.summary, "val_loss")

    @property
    def baselines(self) -> dict[str, float]:
        """Validation losses of counting, by name."""
        values = self.summary.get("baselines")
        values = values if isinstance(values, dict) else {}
        return {name: loss for name in values if (loss := number(values, name)) is not None}

    @property
    def failure(self) -> str | None:
        """Why nothing can be concluded from this run's weights, in a sentence."""
        losses = _points(self.steps, "loss")
        last = losses[-1][0] if losses else None
        skipped = {event.get("step") for event in self.events if event.get("event") == "skipped"}
        finite = [i for i, (step, loss) in enumerate(losses)
                  if math.isfinite(loss) or step in skipped]  # fmt: skip
        if losses and (not finite or finite[-1] < len(losses) - 1):
            first = losses[finite[-1] + 1 if finite else 0][0]
            return f"The training loss is not finite from step {first:,} on"
        if any(
            event.get("event") == "give_up" and event.get("step") == last for event in self.events
        ):
            return f"The guard gave up at step {last:,}"
        if self.events and self.events[-1].get("event") == "failed" and not self.summary:
            return str(self.events[-1].get("reason") or "It was broken off")
        for values in (self.summary, *self.evaluations[-1:]):
            value = values.get("val_loss")
            if value is not None and number(values, "val_loss") is None:
                return f"The validation loss is no finite number but {value}"
        return None

    @property
    def published(self) -> plot.Points:
        """(step, loss) of the published run, where this run repeats it."""
        recipe, wanted = self.part("recipe"), asdict(PRESETS[SEED_RECIPE])
        free = ("max_steps", "target_loss", "guard", "seed")
        same = all(recipe.get(key) == wanted[key] for key in wanted if key not in free)
        on_it = self.part("data").get("sha256") == SHAKESPEARE_SHA256
        return PUBLISHED_LOSS if same and on_it and not self.part("flags").get("init") else ()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_run(folder: Path) -> Run:
    """Read summary.json, config.json and metrics.jsonl."""
    steps, evaluations, events = read_metrics(folder / "metrics.jsonl")
    summary = _read_object(folder / "summary.json")
    if steps and (number(summary, "final_step") or math.inf) <= steps[-1]["step"]:
        summary = {}  # of an earlier end: the run has been extended since and has not ended
    return Run(summary, _read_object(folder / "config.json"), steps, evaluations, events)


def split_samples(text: str) -> list[tuple[str, str]]:
    """(prompt, what the model wrote) of a samples.txt; a file in another form is one sample."""
    pattern = r"^\[prompt\] (.*?)\n\[model\](.*?)(?=\n+\[prompt\] |\s*\Z)"
    parts = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return parts or ([("", text)] if text.strip() else [])


def read_samples(run: Path) -> list[tuple[str, str]]:
    """Of a run folder; none where it has no readable samples.txt."""
    try:
        return split_samples((run / "samples.txt").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


# ---- verdicts


def verdicts(run: Run, overlap: Overlap | None = None, whole: bool = True) -> list[tuple[str, str]]:
    """("warning" or "note", sentence) in plain words; what the numbers do and do not show.

    Args:
        run: The run.
        overlap: Of the model's samples with the training text.
        whole: All of the training text was searched.
    """
    if run.failure:
        return [("warning", f"This run failed. {run.failure}: its weights and what they write "
                            "say nothing, and neither do the figures below.")]  # fmt: skip
    found: list[tuple[str, str]] = []
    if run.steps and not run.summary:
        found.append(("note", f"This run has not ended; {run.num_steps:,} steps are done."))
    share = overlap.shares.get(WINDOW) if overlap else None
    recited = overlap is not None and share is not None and (
        share > RECITED_SHARE or len(overlap.longest) >= RECITED_BYTES
    )  # fmt: skip
    if run.val_loss is not None:
        found += _on_held_out_text(run, run.val_loss, recited)
    elif run.train_loss is not None:
        found.append(_without_held_out_text(run, run.train_loss))
    if overlap is not None and share is not None:
        where = "the training text" if whole else "the part of the training text searched"
        seen = (
            f"{share:.0%} of their {WINDOW}-byte windows stand verbatim in {where}, the longest "
            f"stretch has {len(overlap.longest)} bytes."
        )
        if recited:
            found.append(("warning", f"The samples recite: {seen}"))
        elif share <= OWN_SHARE:
            found.append(("note", f"The samples are the model's own: {seen}"))
        else:
            found.append(("note", f"The samples are partly recited: {seen}"))
    return found


def _on_held_out_text(run: Run, val: float, recited: bool) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    train, bigram = run.train_loss, run.baselines.get("bigram")
    learnt = bigram is None or val < bigram
    gap = val - train if train is not None else 0.0
    epochs = number(run.summary, "epochs")
    if gap > GAP_NATS and epochs is not None and epochs <= 1.0:
        found.append((
            "note",
            f"The validation loss {val:.2f} lies {gap:.2f} nats above the training loss: the "
            f"held-out text is harder. No text was read twice, so none can have been learnt by "
            f"heart.",
        ))  # fmt: skip
    elif gap > GAP_NATS:
        found.append((
            "warning",
            f"Memorisation: the loss is {train:.2f} on the training text and {val:.2f} on "
            f"held-out text. The gap of {gap:.2f} nats means a token of the training text is "
            f"{math.exp(min(gap, 99)):.3g} times as likely as one of new text: the model is "
            f"learning the file, not the language. Fewer steps, more text or dropout help.",
        ))  # fmt: skip
    elif train is not None and gap < -EASIER_NATS:
        found.append((
            "note",
            f"The validation loss {val:.2f} lies below the training loss {train:.2f}: the "
            f"held-out text is easier than the training text, or dropout weighs on the latter. "
            f"The two say nothing about memorisation then.",
        ))  # fmt: skip
    elif train is not None and learnt and not recited:
        found.append((
            "note",
            f"Training loss {train:.2f} and validation loss {val:.2f} lie {gap:+.2f} nats "
            f"apart: no sign of memorisation.",
        ))  # fmt: skip
    losses = [(loss, step) for step, loss in _points(run.evaluations, "val_loss")]
    best, step = min(losses, default=(val, 0))
    if val - best > RISE_NATS:
        found.append((
            "warning",
            f"Overfitting: the validation loss was {best:.2f} at step {step:,} and rose to "
            f"{val:.2f}. model/ holds the last weights, not the best.",
        ))  # fmt: skip
    if bigram is not None and not learnt:
        found.append((
            "warning",
            f"The validation loss {val:.2f} is not below the {bigram:.2f} that counting pairs of "
            f"tokens gives: the model has not learnt to use context yet.",
        ))  # fmt: skip
    return found


def _without_held_out_text(run: Run, train: float) -> tuple[str, str]:
    epochs = number(run.summary, "epochs") or 0.0
    after = f" after {epochs:.1f} epochs" if epochs else ""
    tokens = number(run.summary, "corpus_tokens")
    after += f" over {tokens:,.0f} tokens" if epochs and tokens else ""
    advice = "Run it with --val-fraction 0.1 to get a number that says more."
    if train < RECITED_LOSS and epochs > MANY_EPOCHS:
        return (
            "warning",
            f"A loss of {train:.2g}{after} is recitation: the model has learnt this text by "
            f"heart. It says nothing about text the model has not seen. {advice}",
        )
    doubtful = train < LOW_LOSS or epochs > MANY_EPOCHS
    return (
        "warning" if doubtful else "note",
        f"No validation split: a training loss of {train:.2f}{after} cannot be told from "
        f"recitation by itself. {advice}",
    )


# ---- the page

# Colours with some transparency do on a light page and on a dark one; the demo shares them.
STYLE = """
.warning,.note{border-left:4px solid #d98a00;background:#d98a0026;padding:6px 10px}
.note{border-color:#3a8f57;background:#3a8f5726}
.prompt{opacity:.65}mark{background:#ff9a3c66;color:inherit}
.curve svg{display:block;width:100%;max-width:640px;height:auto}
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:800px;margin:1em auto;padding:0 1em}
table{border-collapse:collapse}
td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top;font-variant-numeric:tabular-nums}
pre{background:#88888822;padding:10px}
pre,td,p,h1{white-space:pre-wrap;overflow-wrap:anywhere}
{{ style }}</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for kind, line in verdicts %}<p class="{{ kind }}">{{ line }}</p>
{% endfor %}
<h2>Numbers</h2>
<table>
{% for name, value in facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}</table>
{% if curves %}<h2>Curves</h2>
{% for curve in curves %}<div class="curve">{{ curve }}</div>
{% endfor %}{% endif %}
{% if published %}<h2>Beside the published run</h2>
<table>
<tr><th>step</th><th>published loss</th><th>this run</th></tr>
{% for row in published %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>The published run stopped after 4,176 steps of 4,096 tokens, 50.6 epochs.</p>
{% endif %}
{% if overlap and overlap.shares %}<h2>What of the samples stands in the training text</h2>
<table>
<tr><th>window, bytes</th><th>share of the samples' windows found verbatim</th></tr>
{% for size, share in overlap.shares.items() %}
<tr><td>{{ size }}</td><td>{{ "{:.1%}".format(share) }}</td></tr>
{% endfor %}</table>
{% if not whole %}<p>Only the first {{ "{:,}".format(searched) }} bytes of the training text were \
searched.</p>{% endif %}
{% if overlap.longest %}<p>The longest stretch, {{ overlap.longest | length }} bytes:</p>
<pre>{{ overlap.longest.decode("utf-8", "replace") }}</pre>{% endif %}
{% endif %}
{% if samples %}<h2>Samples</h2>
{% if overlap %}<p>Marked: at least 32 bytes found verbatim.</p>{% endif %}
{% for prompt, text in samples %}<pre><span class="prompt">{{ prompt }}</span>{{ text }}</pre>
{% endfor %}{% endif %}
<h2>Configuration</h2>
<details><summary>config.json</summary><pre>{{ config }}</pre></details>
</body>
</html>
"""


def facts(run: Run, corpus_bytes: int = 0) -> list[tuple[str, str]]:
    """(name, value) of what is known of a run.

    Args:
        run: The run.
        corpus_bytes: Size of the training text; 0 where it is not known.
    """
    summary, nats = run.summary, " nats per token"
    val, parameters = run.val_loss, number(run.config, "parameters")
    model = str(run.part("recipe").get("model", ""))
    size = f"{parameters:,.0f} parameters" if parameters else ""
    rows: list[tuple[str, float | None, str]] = [
        ("training text", corpus_bytes or None, ",.0f bytes"),
        ("training tokens", number(summary, "corpus_tokens"), ",.0f"),
        ("tokens seen", number(summary, "tokens_seen"), ",.0f"),
        ("epochs (times the text was read)", number(summary, "epochs"), ".2f"),
        ("steps", run.num_steps, ",.0f"),
        ("trained context", number(summary, "trained_context"), ",.0f tokens"),
        ("training loss, last 5% of steps", run.train_loss, ".4f" + nats),
        ("validation loss", val, ".4f" + nats),
        ("perplexity, held-out text", None if val is None else math.exp(min(val, 99)), ",.2f"),
        ("bits per byte, held-out text", number(summary, "val_bits_per_byte"), ".3f"),
        *((f"validation loss of counting ({name})", loss, ".4f" + nats)
          for name, loss in run.baselines.items()),
        ("time in steps", number(summary, "train_s"), ",.1f s"),
        ("time in all, start-up included", number(summary, "wall_s"), ",.1f s"),
        ("speed", number(summary, "tokens_per_s"), ",.0f tokens/s"),
        ("weights file", number(summary, "model_bytes"), ",.0f bytes"),
    ]  # fmt: skip
    texts = [
        ("recipe", run.recipe_name),
        ("model", ", ".join(filter(None, (model, size)))),
        ("device", str(summary.get("device") or run.config.get("device") or "")),
    ]
    for name, value, form in rows:
        spec, _, unit = form.partition(" ")
        if value is not None:
            texts.append((name, f"{value:{spec}} {unit}".strip()))
    return [(name, text) for name, text in texts if text]


def loss_figure(run: Run) -> "Figure":
    """Training and validation loss over the steps, with the published run where it is repeated."""
    evaluations = _points(run.evaluations, "val_loss")
    return plot.loss_curve(_points(run.steps, "loss"), evaluations, run.published, run.baselines)


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


def write_report(folder: Path, corpus: bytes, whole: bool = True) -> list[tuple[str, str]]:
    """Write report.html, report.json and loss.png into a run folder.

    Args:
        folder: Run folder with any of summary.json, config.json, metrics.jsonl, samples.txt.
        corpus: UTF-8 bytes of the training part of the text; up to 32 MiB a copy is kept as
            corpus.txt, in which the demo looks up what it highlights.
        whole: `corpus` is all of it.

    Returns:
        The verdicts.
    """
    from jinja2 import Environment  # only at the end of a run
    from markupsafe import Markup

    run, samples = read_run(folder), read_samples(folder)
    texts = [text for _, text in samples]
    overlap = find_overlap(texts, corpus) if samples and corpus else None
    if corpus and whole and len(corpus) <= KEEP_CORPUS_BYTES:
        write_atomically(folder / CORPUS_FILE, corpus)
    judged, table = verdicts(run, overlap, whole), facts(run, len(corpus) if whole else 0)
    figures = {}
    if run.steps:
        figures["loss"] = loss_figure(run)
        plot.save(figures["loss"], folder / "loss.png")
        figures["learning rate, gradient norm, speed"] = plot.step_curves({
            "learning rate": _points(run.steps, "lr"),
            "gradient norm before clipping": _points(run.steps, "grad_norm"),
            "tokens per second": _points(run.steps, "tokens_per_s"),
        })  # fmt: skip
    ours = dict(_points(run.steps, "loss"))
    spans = overlap.spans if overlap else [[] for _ in samples]
    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE).render(
        title=f"Run {folder.resolve().name}",
        style=Markup(STYLE),
        verdicts=judged,
        facts=table,
        curves=[Markup(plot.inline_svg(figure, label)) for label, figure in figures.items()],
        published=[(f"{step:,}", f"{loss:.3g}", f"{ours[step]:.3g}" if step in ours else "")
                   for step, loss in run.published],
        overlap=overlap,
        whole=whole,
        searched=len(corpus),
        samples=[(prompt, Markup(mark_spans(text, marks)))
                 for (prompt, text), marks in zip(samples, spans, strict=True)],
        config=json.dumps(run.config, indent=2),
    )  # fmt: skip
    write_atomically(folder / "report.html", page)
    found = overlap and {
        "longest_bytes": len(overlap.longest),
        "longest": overlap.longest.decode("utf-8", "replace"),
        "shares": overlap.shares,
        "covered": overlap.covered,
    }
    content = {
        "verdicts": [{"kind": kind, "text": line} for kind, line in judged],
        "facts": dict(table),
        "train_loss": run.train_loss,
        "val_loss": run.val_loss,
        "overlap": found,
    }
    write_atomically(folder / "report.json", json.dumps(content, indent=2) + "\n")
    return judged


def report_run(run: Path, train_tokens: Tokens, say: Callable[[str], None]) -> None:
    """The end of a training run: write the report, say its warnings and where it is.

    Args:
        run: Run folder with summary.json and samples.txt.
        train_tokens: (N,) GPT-2 token ids of the training part.
        say: Called with each line.
    """
    corpus, at = bytearray(), 0
    while at < len(train_tokens) and len(corpus) < MAX_CORPUS_BYTES:
        tokens = np.asarray(train_tokens[at : at + DECODE_TOKENS])
        corpus += get_encoding().decode_bytes(tokens.tolist())
        at += DECODE_TOKENS
    for kind, line in write_report(run, bytes(corpus), at >= len(train_tokens)):
        if kind == "warning":
            say(f"warning: {line}")
    say(f"report: {run / 'report.html'}")


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
        if corpus is not None and not corpus.is_file():
            raise FileNotFoundError(f"report: no such file: {corpus}")
        text, path = b"", corpus or run / CORPUS_FILE
        if path.is_file():
            with path.open("rb") as file:
                text = file.read(MAX_CORPUS_BYTES + 1)
        whole = len(text) <= MAX_CORPUS_BYTES
        for kind, line in write_report(run, text[:MAX_CORPUS_BYTES], whole):
            print(f"{kind}: {line}")
        print(f"report: {run / 'report.html'}")

    with exits():
        tyro.cli(command, prog="python -m training.report", args=args)


if __name__ == "__main__":
    main()
