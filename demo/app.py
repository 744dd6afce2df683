"""The web page: a prompt, the usual knobs, text as it is generated, and what of it is recited.

Everything runs on this machine: the server binds to localhost (GRADIO_SERVER_NAME overrides, which
is how a Space opens it), sends nothing anywhere, and the page loads nothing from elsewhere.

    python -m demo.app --model runs/shakespeare-cpu
"""

import html
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from model import GPT
from model.find import find_model, latest_model
from model.sampling import Sampling
from model.text import stream_text
from model.tokenizer import get_encoding
from training.overlap import Overlap, find_overlap
from training.plot import inline_svg
from training.report import (
    CORPUS_FILE,
    STYLE,
    Run,
    facts,
    loss_figure,
    mark_spans,
    read_run,
    verdicts,
)

TITLE = "GPT-2, trained here"
MAX_PROMPT_CHARS = 4000
MAX_NEW_TOKENS = 500
MAX_SAMPLES = 4
MAX_QUEUE = 16  # further visitors get "queue is full" instead of a wait without end
MAX_AT_ONCE = 2  # requests that generate at the same time
REFRESH_S = 0.05  # shortest time between two updates of the page
MARK_SHARE = 0.1  # of the time may go into looking for recited parts while text is coming
EXAMPLES = ["ROMEO:", "First Citizen:\nBefore we proceed", "To be, or not to be", ""]

NO_MODEL = (
    "There is no model here yet. Train one with <code>make train</code> (a few minutes on a CPU), "
    "then reload this page."
)
CSS = f"""
.texts{{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.55;min-height:12em}}
.texts .sample{{padding:.6em 0;border-bottom:1px solid var(--border-color-primary)}}
.texts .sample:last-child{{border-bottom:0}}
.status{{min-height:1.5em;opacity:.8}}
.run table,.run tr,.run td{{border:0!important;background:none!important}}
.run table{{font-size:.9em}}.run td{{padding:1px 10px 1px 0!important}}
{STYLE}"""
# Panel rows of training.report.facts, the ones that help a visitor.
PANEL = (
    "recipe", "model", "training text", "training tokens", "tokens seen",
    "epochs (times the text was read)",
    "trained context", "training loss, last 5% of steps", "validation loss",
    "bits per byte, held-out text", "time in all, start-up included", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model with what is known of its training."""

    path: Path
    model: GPT
    run: Run
    corpus: bytes


class Models:
    """Finds and loads the model when it is first asked for, once.

    Args:
        path: A run, model folder or .safetensors file; None takes the newest under `runs`.
        runs: Folder of runs.
    """

    def __init__(self, path: Path | None = None, runs: Path = Path("runs")):
        self.path, self.runs = path, runs
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()

    def get(self) -> Loaded:
        """The model.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        with self._lock:
            if self._loaded is None:
                folder = find_model(self.path or latest_model(self.runs))
                model = GPT.from_pretrained(folder).eval()
                if torch.cuda.is_available():
                    model = model.cuda()
                # A run keeps its record beside model/, a Space in the folder itself.
                places = (folder, folder.parent)
                run = next((p for p in places if (p / "summary.json").is_file()), folder)
                corpus = next(
                    (p / CORPUS_FILE for p in places if (p / CORPUS_FILE).is_file()), None
                )
                self._loaded = Loaded(
                    folder, model, read_run(run), corpus.read_bytes() if corpus else b""
                )
            return self._loaded


def panel_html(models: Models) -> str:
    """What is known of the model: warnings, figures, loss curve."""
    try:
        loaded = models.get()
    except FileNotFoundError as error:
        if models.path is None:
            return f'<div class="run"><p class="warning">{NO_MODEL}</p></div>'
        return f'<div class="run"><p class="warning">{html.escape(str(error))}</p></div>'
    except ValueError as error:
        return f'<div class="run"><p class="warning">{html.escape(str(error))}</p></div>'
    run, model = loaded.run, loaded.model
    known = dict(facts(run, len(loaded.corpus)))
    known["model"] = f"{model.num_parameters():,} parameters"
    known["trained context"] = f"{model.trained_context:,} tokens"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(known[name])}</td></tr>"
        for name in PANEL
        if name in known
    )
    lines = "".join(f'<p class="{kind}">{html.escape(line)}</p>' for kind, line in verdicts(run))
    curve = inline_svg(loss_figure(run), "loss") if run.steps else ""
    return f'<div class="run">{lines}<div class="curve">{curve}</div><table>{rows}</table></div>'


def texts_html(
    prompt: str, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]] | None = None
) -> str:
    """The samples, the prompt before each; `spans` are byte ranges to mark in each text."""
    spans = spans or [[]] * len(texts)
    body = "".join(
        f'<div class="sample"><span class="prompt">{html.escape(prompt)}</span>'
        f'<span class="text">{mark_spans(text, marks)}</span></div>'
        for text, marks in zip(texts, spans, strict=True)
    )
    return f'<div class="texts">{body}</div>'


def _recited(overlap: Overlap, texts: Sequence[str]) -> str:
    if not any(texts):
        return ""
    return (
        f"; {overlap.covered:.0%} stands verbatim in the training text (marked), longest stretch "
        f"{len(overlap.longest)} bytes"
    )


def generate(
    models: Models,
    prompt: str,
    temperature: float,
    top_k: float,
    top_p: float,
    max_new_tokens: float,
    seed: float,
    num_samples: float,
) -> Iterator[tuple[str, str]]:
    """(texts, status) as HTML, as text comes.

    Limits are checked here too: a request need not come from the page.

    Raises:
        gr.Error: no model, or a value outside its range; the page shows the message.
    """
    try:
        loaded = models.get()
        prompt = prompt or ""
        if len(prompt) > MAX_PROMPT_CHARS:
            raise ValueError(
                f"the prompt has {len(prompt):,} characters, at most {MAX_PROMPT_CHARS:,} are read"
            )
        values = (temperature, top_k, top_p, max_new_tokens, seed, num_samples)
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise ValueError(f"every setting must be a number, got {values}")
        if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
            raise ValueError(f"max length must be 1 to {MAX_NEW_TOKENS}, got {max_new_tokens}")
        if not 1 <= num_samples <= MAX_SAMPLES:
            raise ValueError(f"samples must be 1 to {MAX_SAMPLES}, got {num_samples}")
        sampling = Sampling(
            max_new_tokens=int(max_new_tokens),
            temperature=float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            seed=int(seed),
        )
        notes: list[str] = []
        pieces = stream_text(
            loaded.model, get_encoding(), [prompt], sampling,
            num_samples=int(num_samples), notify=notes.append,
        )  # fmt: skip
    except FileNotFoundError as error:
        message = NO_MODEL if models.path is None else html.escape(str(error))
        raise gr.Error(message, print_exception=False, duration=None) from None
    except (ValueError, OverflowError) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None

    texts, counts = [""] * int(num_samples), [0] * int(num_samples)
    start = shown = looked = time.perf_counter()
    spans, cost, recited = None, 0.0, ""
    prefix = "".join(f"{html.escape(note)}. " for note in notes)

    def status(now: float) -> str:
        seconds = now - start
        return (
            f'<div class="status">{prefix}{sum(counts)} tokens, '
            f"{sum(counts) / max(seconds, 1e-9):.0f} tokens/s{recited}</div>"
        )

    yield texts_html(prompt, texts), f'<div class="status">{prefix}</div>'
    for piece in pieces:
        texts[piece.row] += piece.text
        counts[piece.row] = piece.num_tokens
        now = time.perf_counter()
        if now - shown < REFRESH_S:
            continue
        if loaded.corpus and now - looked > max(0.5, cost / MARK_SHARE):
            overlap = find_overlap(texts, loaded.corpus)
            spans, recited = overlap.spans, _recited(overlap, texts)
            looked = time.perf_counter()
            cost = looked - now
        yield texts_html(prompt, texts, spans), status(now)
        shown = time.perf_counter()
    end = time.perf_counter()
    if loaded.corpus:
        overlap = find_overlap(texts, loaded.corpus)
        spans, recited = overlap.spans, _recited(overlap, texts)
    yield texts_html(prompt, texts, spans), status(end)


def build(models: Models) -> gr.Blocks:
    """The page."""
    # analytics_enabled=False: otherwise the server calls two hosts at start.
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}\nText of a model trained with this repository.")
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=3,
                    max_lines=8,
                    max_length=MAX_PROMPT_CHARS,
                    placeholder="Text to continue; empty starts a new document",
                    elem_id="prompt",
                )
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                output = gr.HTML(texts_html("", [""]), elem_id="output")
                status = gr.HTML('<div class="status"></div>', elem_id="status")
                gr.Examples(
                    [[text] for text in EXAMPLES if text], inputs=[prompt], cache_examples=False
                )
            with gr.Column(scale=2):
                temperature = gr.Slider(
                    0, 2, 0.8, step=0.05, label="Temperature (0: most likely token)",
                    elem_id="temperature",
                )  # fmt: skip
                top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0: off)", elem_id="top-k")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (1: off)", elem_id="top-p")
                max_new_tokens = gr.Slider(
                    1, MAX_NEW_TOKENS, 200, step=1, label="Max length, tokens", elem_id="length"
                )
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                    num_samples = gr.Slider(
                        1, MAX_SAMPLES, 1, step=1, label="Samples", elem_id="samples"
                    )
                with gr.Accordion("Training", open=True):
                    panel = gr.HTML(elem_id="panel")

        def run(*values: Any) -> Iterator[tuple[str, str]]:
            yield from generate(models, *values)

        settings = [prompt, temperature, top_k, top_p, max_new_tokens, seed, num_samples]
        event = gr.on(
            [go.click, prompt.submit], run, settings, [output, status],
            concurrency_limit=MAX_AT_ONCE, api_name="generate",
        )  # fmt: skip
        stop.click(None, cancels=[event])
        page.load(lambda: panel_html(models), None, panel, api_visibility="private")
    return page.queue(max_size=MAX_QUEUE)


def launch(page: gr.Blocks, port: int | None = None, **more: Any) -> Any:
    """Serve the page: system fonts, no footer, nothing from another host."""
    # type: ignore because gradio's own annotation of font is narrower than what it takes
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # type: ignore
    return page.launch(
        server_port=port, theme=theme, css=CSS, footer_links=[], run_history=False, share=False,
        ssr_mode=False,
        **more,
    )  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """`python -m demo.app`."""
    import tyro

    def command(model: Path | None = None, port: int | None = None) -> None:
        """Try a model in the browser.

        Args:
            model: Run, model folder or .safetensors file; without it the newest under runs/.
            port: Port on localhost; without it the first free one from 7860.
        """
        models = Models(model)
        try:
            loaded = models.get()
            print(f"model: {loaded.path}, {loaded.model.num_parameters():,} parameters")
        except FileNotFoundError as error:
            if model is not None:
                raise
            print(f"note: {error}", file=sys.stderr)
        launch(build(models), port)

    try:
        tyro.cli(command, prog="python -m demo.app", args=args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
