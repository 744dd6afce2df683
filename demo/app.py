"""The web page: a prompt, the usual settings, text as it is generated, and what of it is copied.

Everything runs on this machine. The server binds to localhost (a Space sets GRADIO_SERVER_NAME to
open it), sends nothing and takes no files. The page loads nothing from elsewhere.

    python -m demo.app --model runs/shakespeare-cpu
    python -m demo.app --model runs/a --beside runs/a/checkpoints/step-200
"""

import html
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

try:
    import gradio as gr
except ModuleNotFoundError:  # `make train` does not install it
    raise SystemExit("demo: gradio is not installed; `make setup-dev` installs it") from None

from demo.line import Line
from demo.models import Loaded, Models, about, error_html
from demo.texts import shaded, status_html, texts_html, token_chances
from model.edge import check_int, exits, is_real
from model.sampling import Sampling
from model.text import stream_text
from training.console import surviving
from training.overlap import find_overlap
from training.report import STYLE, mark_spans

TITLE = "Try a GPT-2"
MAX_PROMPT_CHARS = 4000
MAX_NEW_TOKENS = 500
MAX_SAMPLES = 4
NEW_SEEDS = 10**6  # a random seed is below this, so that it is short enough to type again
REFRESH_S = 0.05  # shortest time between two updates of the page
SLIDERS = {  # lowest, highest, first value, step, label
    "temperature": (0, 2, 0.8, 0.05, "Temperature (0: most likely token)"),
    "top-k": (0, 200, 0, 1, "Top-k (0: off)"),
    "top-p": (0.05, 1, 1, 0.05, "Top-p (1: off)"),
    "length": (1, MAX_NEW_TOKENS, 200, 1, "Max new tokens"),
}

CSS = f"""
.texts{{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.55;min-height:12em}}
.texts .sample{{padding:.6em 0;border-bottom:1px solid var(--border-color-primary)}}
.texts .sample:last-child{{border-bottom:0}}
.pair{{display:grid;grid-template-columns:repeat(auto-fit,minmax(280px,1fr));gap:0 1.5em}}
.chance{{background:rgb(64 128 224/calc(.75*var(--p)))}}
.status{{min-height:1.5em;opacity:.8}}
.run table,.run tr,.run td{{border:0!important;background:none!important}}
.run table{{font-size:.9em}}.run td{{padding:1px 10px 1px 0!important}}
{STYLE}"""


def read_settings(
    prompt: str,
    temperature: float,
    top_k: float,
    top_p: float,
    max_new_tokens: float,
    seed: str | int,
    num_samples: float,
) -> tuple[Sampling, int]:
    """How to sample and how often. Everything is checked: a request need not come from the page.

    Raises:
        ValueError: one of them has another type or is outside its range.
    """
    if len(prompt) > MAX_PROMPT_CHARS:
        raise ValueError(
            f"the prompt has {len(prompt):,} characters, the limit is {MAX_PROMPT_CHARS:,}"
        )
    values = (temperature, top_k, top_p, max_new_tokens, num_samples)
    if not all(map(is_real, values)):
        raise ValueError(f"every setting must be a number, got {values}")
    tokens = "max new tokens", max_new_tokens, MAX_NEW_TOKENS
    for name, value, most in (tokens, ("samples", num_samples, MAX_SAMPLES)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {value}")
    seed = str(seed).strip()
    if seed and not (seed.isascii() and seed.isdigit()):
        raise ValueError(f"the seed must be a whole number or empty, got {seed[:40]!r}")
    number = int(seed) if seed else secrets.randbelow(NEW_SEEDS)
    sampling = Sampling(int(max_new_tokens), float(temperature), int(top_k), float(top_p), number)
    return sampling, int(num_samples)


def generate(
    models: Models,
    prompt: str | None,
    *settings: Any,
    chances: bool = False,
    ended: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, str]]:
    """(texts, status) as HTML, as text is generated; two models answer one after the other.

    Args:
        prompt, settings: What `read_settings` takes.
        chances: At the end, shade each token by its probability.
        ended: True once nobody wants more.

    Raises:
        gr.Error: no model, a bad setting, or a model that fails; the page shows the message.
    """
    finished = shown = status = ""
    try:
        how = read_settings(prompt or "", *settings)
        for each in models.all:
            loaded, pane = each.get(), ""
            for texts, status in _updates(loaded, prompt or "", *how, chances, ended):
                pane = f"<div><h4>{html.escape(str(loaded.path))}</h4>{texts}</div>"
                both = f'<div class="pair">{finished}{pane}</div>'
                shown = both if len(models.all) > 1 else texts
                yield shown, status_html(status)
            finished += pane
            if ended():
                break
    except (OSError, ValueError, OverflowError) as error:
        message = error_html(models, error)
        raise gr.Error(message, print_exception=False, duration=None) from None
    yield shown, status_html(status, "done")


def _updates(
    loaded: Loaded,
    prompt: str,
    sampling: Sampling,
    num_samples: int,
    chances: bool,
    ended: Callable[[], bool],
) -> Iterator[tuple[str, str]]:
    """(texts, status) of one model, every REFRESH_S and at the end."""
    notes: list[str] = []
    how = {"num_samples": num_samples, "notify": notes.append}
    pieces = stream_text(loaded.model, [prompt], sampling, **how)
    prefix, stopped = "".join(f"{html.escape(note)}. " for note in notes), ""
    texts, counts = [""] * num_samples, [0] * num_samples
    start = shown = time.perf_counter()

    def status() -> str:
        num, seconds = sum(counts), max(time.perf_counter() - start, 1e-9)
        speed = f"{num} tokens{stopped}, {num / seconds:.0f} tokens/s"
        return f"{prefix}{speed}, seed {sampling.seed}"

    yield texts_html(prompt, texts), prefix
    for piece in pieces:
        texts[piece.row] += piece.text
        counts[piece.row] = piece.num_tokens
        if ended():
            stopped = ", stopped"
            break
        if time.perf_counter() - shown >= REFRESH_S:
            yield texts_html(prompt, map(html.escape, texts)), status()
            shown = time.perf_counter()
    last, bodies = status(), map(html.escape, texts)
    if loaded.corpus and any(texts):
        overlap = find_overlap(texts, loaded.corpus)
        bodies = map(mark_spans, texts, overlap.spans)
        where = "the training text" if chances else "the training text (marked)"
        last += (
            f"; {overlap.covered:.0%} appears verbatim in {where}, "
            f"longest match {len(overlap.longest) or 'fewer than 16'} bytes"
        )
    if chances:  # shades take the place of marks
        bodies = [shaded(token_chances(loaded.model, prompt, text)) for text in texts]
    yield texts_html(prompt, bodies), last


def build(models: Models) -> gr.Blocks:
    # With analytics the server would contact two hosts at start.
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}")
        with gr.Row():
            with gr.Column(scale=3):
                hint = "Text to continue; empty starts a new document"
                size: Any = {"lines": 3, "max_lines": 8, "max_length": MAX_PROMPT_CHARS}
                prompt = gr.Textbox(label="Prompt", placeholder=hint, elem_id="prompt", **size)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                output = gr.HTML(texts_html("", [""]), elem_id="output")
                status = gr.HTML(status_html(""), elem_id="status")
                hidden = [gr.Textbox(visible=False)]
                examples = gr.Dataset(
                    components=hidden, visible=False, label="Examples", elem_id="examples"
                )
            with gr.Column(scale=2):
                temperature, top_k, top_p, max_new_tokens = (
                    gr.Slider(low, high, value, step=step, label=label, elem_id=name)
                    for name, (low, high, value, step, label) in SLIDERS.items()
                )
                with gr.Row():
                    hint = "random"
                    seed = gr.Textbox(label="Seed", placeholder=hint, max_lines=1, elem_id="seed")
                    num_samples = gr.Slider(
                        1, MAX_SAMPLES, 1, step=1, label="Samples", elem_id="samples"
                    )
                chances = gr.Checkbox(
                    label="Shade tokens by probability (darker: likelier)", elem_id="chances"
                )
                with gr.Accordion("Training", open=True):
                    panel = gr.HTML(elem_id="panel")

        visit = gr.State({"newest": 0, "stopped": -1})
        turn = gr.Number(0, visible=False)  # the page counts, so that Stop ends the right one
        line = Line()

        async def serve(
            visit: Any, turn: int, chances: Any, *values: Any
        ) -> AsyncIterator[tuple[Any, str]]:
            act = partial(generate, models, *values, chances=chances is True)
            async for update in line.serve(act, visit, turn):
                yield update

        async def end(visit: dict[str, int], turn: int) -> None:
            visit["stopped"] = turn

        def show() -> tuple[str, Any]:
            shown, prompts = about(models)
            return shown, gr.Dataset(samples=[[text] for text in prompts], visible=bool(prompts))

        settings = [temperature, top_k, top_p, max_new_tokens, seed, num_samples]
        gr.on(
            [go.click, prompt.submit],
            serve,
            [visit, turn, chances, prompt, *settings],
            [output, status],
            js="(visit, turn, ...rest) => [visit, window.turn = (window.turn ?? 0) + 1, ...rest]",
            trigger_mode="multiple",
            concurrency_limit=None,
            show_progress="hidden",
            api_name="generate",
        )
        quiet: Any = {"show_progress": "hidden", "api_visibility": "private"}
        stop.click(
            end, [visit, turn], js="visit => [visit, window.turn ?? 0]", queue=False, **quiet
        )
        examples.click(lambda row: row[0], examples, prompt, **quiet)
        page.load(show, None, [panel, examples], **quiet)
    return page


def launch(page: gr.Blocks, port: int | None = None, **more: Any) -> Any:
    """Serve the page: system fonts, no footer, no files, nothing from another host."""
    # type: ignore because gradio's annotation of font is narrower than what it accepts
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # type: ignore
    off = dict.fromkeys(("run_history", "share", "ssr_mode"), False)
    more |= {"theme": theme, "css": CSS, "footer_links": []}
    return page.launch(server_port=port, max_file_size=1, show_error=True, **off, **more)


def main(args: list[str] | None = None) -> None:
    import tyro

    def command(
        model: str | None = None, beside: str | None = None, port: int | None = None
    ) -> None:
        """Try a model in the browser.

        Args:
            model: Run, model folder or .safetensors file; by default the newest under runs/.
            beside: A second model to compare with, such as a checkpoint or another run.
            port: Port on localhost; by default the first free one from 7860.
        """
        if port is None and "GRADIO_SERVER_PORT" in os.environ:
            port = int(os.environ["GRADIO_SERVER_PORT"])
        if port is not None:
            check_int("demo", "--port", port, 1, 65535)
        models = Models(model, beside=beside)
        try:
            for each in models.all:
                loaded = each.get()
                print(f"model: {loaded.path}, {loaded.model.num_parameters():,} parameters")
        except FileNotFoundError as error:
            if model is not None or beside is not None:
                raise
            print(f"note: {error}", file=sys.stderr)
        launch(build(models), port)

    with exits(), surviving():
        tyro.cli(command, prog="python -m demo.app", args=args)


if __name__ == "__main__":
    main()
