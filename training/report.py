"""What a run amounts to, on one page: report.html, self-contained, report.json and loss.png.

What the numbers show is said by training/verdicts.py; here is the page.

    python -m training.report runs/shakespeare-cpu
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.edge import exits
from model.files import write_atomically
from model.tokenizer import get_encoding
from training import plot
from training.data import Tokens
from training.metrics import write_json
from training.overlap import find_overlap
from training.verdicts import Run, number, points, read_run, read_samples, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORPUS_FILE = "corpus.txt"  # the training text, kept beside the model for the demo
KEEP_CORPUS_BYTES = 32 << 20  # of larger corpora no copy is kept
MAX_CORPUS_BYTES = 128 << 20  # of larger corpora the first so many bytes are searched
DECODE_TOKENS = 1 << 20  # at once: as Python integers they take 30 times their size

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
@media print{:root{color-scheme:light}.curve,pre,tr{break-inside:avoid}details{display:none}}
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
        *(
            (f"validation loss of counting ({name})", loss, ".4f" + nats)
            for name, loss in run.baselines.items()
        ),
        ("time in steps", number(summary, "train_s"), ",.1f s"),
        ("time in all, start-up included", number(summary, "wall_s"), ",.1f s"),
        ("speed", number(summary, "tokens_per_s"), ",.0f tokens/s"),
        ("weights file", number(summary, "model_bytes"), ",.0f bytes"),
    ]
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
    evaluations = points(run.evaluations, "val_loss")
    return plot.loss_curve(points(run.steps, "loss"), evaluations, run.published, run.baselines)


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
        figures["learning rate, gradient norm, speed"] = plot.step_curves(
            {
                "learning rate": points(run.steps, "lr"),
                "gradient norm before clipping": points(run.steps, "grad_norm"),
                "tokens per second": points(run.steps, "tokens_per_s"),
            }
        )
    ours = dict(points(run.steps, "loss"))
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
    write_json(folder / "report.json", content)
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
