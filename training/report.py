"""The report of a run: report.html, which needs no other file, and loss.png.

training/verdicts.py writes the sentences about the numbers. To write a run's report again:

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
from training.overlap import find_overlap
from training.verdicts import Run, number, points, read_run, read_samples, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORPUS_FILE = "corpus.txt"  # a copy of the training text, so that the demo can mark copied text
KEEP_CORPUS_BYTES = 32 << 20  # a larger text is not copied
MAX_CORPUS_BYTES = 128 << 20  # in a larger text only the beginning is searched
DECODE_TOKENS = 1 << 20  # at once: as Python integers they take 30 times their size

# Transparent colours suit a light page and a dark one; the demo shares them.
STYLE = """
.warning,.note{border-left:4px solid #d98a00;background:#d98a0026;padding:6px 10px}
.note{border-color:#3a8f57;background:#3a8f5726}
.prompt{opacity:.65}mark{background:#ff9a3c66;color:inherit}
.curve svg{display:block;width:100%;max-width:640px;height:auto}
"""
TEMPLATE = Path(__file__).with_name("report.html.jinja")
# The numbers of a run: name, key, format.
FACTS = """
training text | corpus_bytes | {:,.0f} bytes
training tokens | corpus_tokens | {:,.0f}
tokens seen | tokens_seen | {:,.0f}
epochs (passes over the text) | epochs | {:.4g}
steps | steps | {:,.0f}
trained context | trained_context | {:,.0f} tokens
training loss, last 5% of steps | train_loss | {:.4f} nats per token
validation loss | val_loss | {:.4f} nats per token
perplexity, held-out text | perplexity | {:,.2f}
bits per byte, held-out text | val_bits_per_byte | {:.3f}
HellaSwag | hellaswag | {:.2%}
time in steps | train_s | {:,.1f} s
total time, start-up included | wall_s | {:,.1f} s
speed | tokens_per_s | {:,.0f} tokens/s
weights file | model_bytes | {:,.0f} bytes
"""


def facts(run: Run, corpus_bytes: int = 0) -> dict[str, str]:
    """What is known of a run, by name; `corpus_bytes` is 0 if the text's size is not known."""
    val, parameters = run.val_loss, number(run.config, "parameters")
    size = f"{parameters:,.0f} parameters" if parameters else ""
    recipe = run.part("recipe")
    found = {
        "recipe": str(recipe.get("name", "")),
        "model": ", ".join(filter(None, (str(recipe.get("model", "")), size))),
        "device": str(run.summary.get("device") or run.config.get("device") or ""),
    }
    values = run.summary | {
        "corpus_bytes": corpus_bytes or None,
        "steps": run.num_steps,
        "train_loss": run.train_loss,
        "val_loss": val,
        "perplexity": None if val is None else math.exp(min(val, 99)),
    }
    for name, key, form in (line.split(" | ") for line in FACTS.strip().splitlines()):
        value = number(values, key)
        found[name] = "" if value is None else form.format(value)
    for name, loss in run.baselines.items():
        found[f"validation loss of a {name} model"] = f"{loss:.4f} nats per token"
    return {name: text for name, text in found.items() if text}


def loss_figure(run: Run) -> "Figure":
    """Training and validation loss by step, with the published run if this one repeats it."""
    evaluations = points(run.evaluations, "val_loss")
    return plot.loss_curve(points(run.steps, "loss"), evaluations, run.published, run.baselines)


def mark_spans(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """HTML of `text` with the whole characters of its byte ranges `spans` marked."""
    raw, out, at = text.encode("utf-8", "replace"), [], 0
    for start, end in spans:
        while start < end and raw[start] & 0xC0 == 0x80:  # inside a character
            start += 1
        marked = raw[start:end].decode(errors="ignore")
        out.append(html.escape(raw[at:start].decode()))
        if marked:
            out.append(f"<mark>{html.escape(marked)}</mark>")
        at = start + len(marked.encode())
    return "".join([*out, html.escape(raw[at:].decode())])


def write_report(folder: Path, corpus: bytes) -> list[tuple[str, str]]:
    """Write report.html and loss.png into a run folder; returns the verdicts.

    Args:
        folder: Run folder with any of summary.json, config.json, metrics.jsonl, samples.txt.
        corpus: UTF-8 bytes of the training text. What follows MAX_CORPUS_BYTES is not searched.
    """
    from jinja2 import Template  # only at the end of a run

    whole, corpus = len(corpus) <= MAX_CORPUS_BYTES, corpus[:MAX_CORPUS_BYTES]
    run, samples = read_run(folder), read_samples(folder)
    overlap = find_overlap([text for _, text in samples], corpus) if samples and corpus else None
    if corpus and whole and len(corpus) <= KEEP_CORPUS_BYTES:
        write_atomically(folder / CORPUS_FILE, corpus)
    judged, table = verdicts(run, overlap, whole), facts(run, len(corpus) if whole else 0)
    curves = []
    if run.steps:
        plot.save(figure := loss_figure(run), folder / "loss.png")
        series = {
            "learning rate": points(run.steps, "lr"),
            "gradient norm before clipping": points(run.steps, "grad_norm"),
            "tokens per second": points(run.steps, "tokens_per_s"),
        }
        beside = plot.step_curves(series)
        curves = [plot.inline_svg(figure, "loss"), plot.inline_svg(beside, ", ".join(series))]
    spans = overlap.spans if overlap else [[] for _ in samples]
    marked = [
        (prompt, mark_spans(text, found))
        for (prompt, text), found in zip(samples, spans, strict=True)
    ]
    page = Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True).render(
        title=f"Run {folder.resolve().name}",
        style=STYLE,
        verdicts=judged,
        facts=table,
        curves=curves,
        run=run,
        ours=dict(points(run.steps, "loss")),
        overlap=overlap,
        whole=whole,
        searched=len(corpus),
        samples=marked,
        config=json.dumps(run.config, indent=2),
    )
    write_atomically(folder / "report.html", page)
    return judged


def report_run(run: Path, train_tokens: Tokens, say: Callable[[str], None]) -> None:
    """At the end of a run in folder `run`: write the report, print its warnings and its path."""
    corpus, at = bytearray(), 0
    while at < len(train_tokens) and len(corpus) <= MAX_CORPUS_BYTES:
        tokens = np.asarray(train_tokens[at : at + DECODE_TOKENS])
        corpus += get_encoding().decode_bytes(tokens.tolist())
        at += DECODE_TOKENS
    for kind, line in write_report(run, bytes(corpus)):
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
            corpus: Training text; by default the copy in the run folder.
        """
        if not run.is_dir():
            raise FileNotFoundError(f"report: no such run folder: {run}")
        text, path = b"", corpus or run / CORPUS_FILE
        if corpus and not path.is_file():
            raise FileNotFoundError(f"report: no such file: {path}")
        if path.is_file():
            with path.open("rb") as file:
                text = file.read(MAX_CORPUS_BYTES + 1)
        for kind, line in write_report(run, text):
            print(f"{kind}: {line}")
        print(f"report: {run / 'report.html'}")

    with exits():
        tyro.cli(command, prog="python -m training.report", args=args)


if __name__ == "__main__":
    main()
