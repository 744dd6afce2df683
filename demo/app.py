"""The web page: a prompt, the usual knobs, text as it is generated, and what of it is recited.

Everything runs on this machine: the server binds to localhost (GRADIO_SERVER_NAME overrides, which
is how a Space opens it), sends nothing anywhere, takes no files, and the page loads nothing from
elsewhere.

    python -m demo.app --model runs/shakespeare-cpu
    python -m demo.app --model runs/a --beside runs/a/checkpoints/step-200
"""

import html
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from demo.line import Line, status_html
from model import GPT, tokenizer
from model.decoder import resolve_window
from model.edge import check_int, exits, is_real
from model.find import find_model, latest_model
from model.sampling import Sampling
from model.text import stream_text
from model.tokenizer import get_encoding
from training.console import surviving
from training.overlap import Overlap, find_overlap
from training.plot import inline_svg
from training.report import CORPUS_FILE, STYLE, facts, loss_figure, mark_spans
from training.verdicts import Run, read_run, read_samples, verdicts

TITLE = "Try a GPT-2"
MAX_PROMPT_CHARS = 4000
MAX_NEW_TOKENS = 500
MAX_SAMPLES = 4
NEW_SEEDS = 10**6  # one of so many is drawn: short enough to type again
REFRESH_S = 0.05  # shortest time between two updates of the page
MARK_SHARE = 0.1  # of the time may go into looking for recited parts while text is coming
MAX_EXAMPLES = 4
EXAMPLE_CHARS = 80

NO_MODEL = (
    "There is no model here yet. Train one with <code>make train</code> (a few minutes on a CPU), "
    "then reload this page."
)
NO_RECORD = "How this model was trained is not known: no record of it lies beside the weights."
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
# Rows of training.report.facts that help a visitor.
PANEL = (
    "recipe", "model", "training text", "training tokens", "tokens seen",
    "epochs (times the text was read)",
    "trained context", "training loss, last 5% of steps", "validation loss",
    "bits per byte, held-out text", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model with what is known of its training."""

    path: Path
    model: GPT
    corpus: bytes
    panel: str
    examples: list[str]


class Models:
    """Finds and loads the model when it is first asked for, once.

    Args:
        path: A run, model folder or .safetensors file; None takes the newest under `runs`.
        runs: Folder of runs.
        about: A JSON file with the panel and the examples, as a Space has it; None makes them from
            the run that the model belongs to. It is shown as it stands.
        beside: A second model, which answers after the first with the same settings.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        runs: Path = Path("runs"),
        about: Path | None = None,
        beside: Path | str | None = None,
    ):
        self.path, self.runs, self.about = path, runs, about
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()
        self.all: list[Models] = [self]
        if beside is not None:
            self.all.append(Models(beside))
            self.all[1]._lock = self._lock

    def get(self) -> Loaded:
        """The model.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        with self._lock:  # also around matplotlib, whose settings are global
            if self._loaded is None:
                folder = find_model(latest_model(self.runs) if self.path is None else self.path)
                model = GPT.from_pretrained(folder).eval()
                if torch.cuda.is_available():
                    model = model.cuda()
                # A run keeps its record beside model/.
                places = (folder, folder.parent)
                run = next((p for p in places if (p / "summary.json").is_file()), folder)
                text = next((p / CORPUS_FILE for p in places if (p / CORPUS_FILE).is_file()), None)
                corpus = text.read_bytes() if text else b""
                if self.about:
                    known = json.loads(self.about.read_text(encoding="utf-8"))
                else:
                    known = {
                        "panel": run_html(read_run(run), model, len(corpus)),
                        "examples": example_prompts(run),
                    }
                self._loaded = Loaded(folder, model, corpus, **known)
            return self._loaded


def example_prompts(run: Path) -> list[str]:
    """What the run's own samples begin with: words of the text that it was tested on."""
    prompts = (prompt.strip()[:EXAMPLE_CHARS] for prompt, _ in read_samples(run))
    worded = (prompt for prompt in prompts if any(map(str.isalpha, prompt)))
    return [*dict.fromkeys(worded)][:MAX_EXAMPLES]


def run_html(run: Run, model: GPT, corpus_bytes: int) -> str:
    """What is known of the training: verdicts, loss curve, figures."""
    recipe = run.part("recipe").get("model")
    size = f"{model.num_parameters():,} parameters"
    known = dict(facts(run, corpus_bytes))
    known["model"] = f"{recipe}, {size}" if recipe else size
    known["trained context"] = f"{model.trained_context:,} tokens"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(known[name])}</td></tr>"
        for name in PANEL
        if name in known
    )
    judged = verdicts(run) if run.steps or run.summary else [("note", NO_RECORD)]
    lines = "".join(f'<p class="{kind}">{html.escape(line)}</p>' for kind, line in judged)
    curve = inline_svg(loss_figure(run), "loss") if run.steps else ""
    return f'<div class="run">{lines}<div class="curve">{curve}</div><table>{rows}</table></div>'


def error_html(models: Models, error: Exception) -> str:
    """What went wrong; or, before the first training, what to do."""
    early = models.path is None and isinstance(error, FileNotFoundError)
    return NO_MODEL if early else html.escape(str(error))


def about(models: Models) -> tuple[str, list[str]]:
    """The panels and the examples; without a model the reason, and none."""
    try:
        loaded = [each.get() for each in models.all]
    except (OSError, ValueError) as error:
        return f'<div class="run"><p class="warning">{error_html(models, error)}</p></div>', []
    heads = [f"<h4>{html.escape(str(each.path))}</h4>" for each in loaded]
    panels = map("".join, zip(heads, (each.panel for each in loaded), strict=True))
    return "".join(panels) if len(loaded) > 1 else loaded[0].panel, loaded[0].examples


def texts_html(prompt: str, texts: Iterable[str]) -> str:
    """The samples, given as HTML, the prompt before each."""
    body = "".join(
        f'<div class="sample"><span class="prompt">{html.escape(prompt)}</span>'
        f'<span class="text">{text}</span></div>'
        for text in texts
    )
    return f'<div class="texts">{body}</div>'


def token_chances(model: GPT, prompt: str, text: str) -> list[tuple[bytes, float]]:
    """Each token of `text` and the chance the model gives it behind those before.

    A text longer than the window is read in halves of it: each token sees half a window at least.
    """
    window, ids = resolve_window(model, None), tokenizer.encode(text).tolist()
    tokens = (tokenizer.encode(prompt).tolist() or [tokenizer.EOT]) + ids
    at, found = len(tokens) - len(ids), []
    with torch.inference_mode():
        while at < len(tokens):
            end = min(len(tokens), max(window, at + window // 2))
            row = torch.tensor(tokens[max(0, end - window) : end])
            logits = model(row[None, :-1].to(model.transformer.wte.weight.device))[0, at - end :]
            chances = logits.float().softmax(-1).cpu()
            found += chances[torch.arange(end - at), row[at - end :]].tolist()
            at = end
    return [*zip(get_encoding().decode_tokens_bytes(ids), found, strict=True)]


def shaded(tokens: Iterable[tuple[bytes, float]]) -> str:
    """HTML of tokens, shaded the more the likelier; tokens that share a character are one."""
    out, held, chance = [], b"", 1.0
    for data, p in tokens:
        held, chance = held + data, chance * p
        try:
            word = html.escape(held.decode())
        except UnicodeDecodeError:
            continue
        out.append(
            f'<span class="chance" style="--p:{chance:.3f}" title="{chance:.1%}">{word}</span>'
        )
        held, chance = b"", 1.0
    return "".join(out) + html.escape(held.decode("utf-8", "replace"))


def _recited(overlap: Overlap, texts: Sequence[str]) -> str:
    if not any(texts):
        return ""
    return (
        f"; {overlap.covered:.0%} stands verbatim in the training text (marked), longest stretch "
        f"{len(overlap.longest)} bytes"
    )


def read_settings(
    prompt: str,
    temperature: float,
    top_k: float,
    top_p: float,
    max_new_tokens: float,
    seed: str | int,
    num_samples: float,
) -> tuple[Sampling, int]:
    """How to sample and how often, checked here too: a request need not come from the page.

    Raises:
        ValueError: one of them is of another type or outside its range.
    """
    if len(prompt) > MAX_PROMPT_CHARS:
        raise ValueError(
            f"the prompt has {len(prompt):,} characters, at most {MAX_PROMPT_CHARS:,} are read"
        )
    values = (temperature, top_k, top_p, max_new_tokens, num_samples)
    if not all(map(is_real, values)):
        raise ValueError(f"every setting must be a number, got {values}")
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(f"max length must be 1 to {MAX_NEW_TOKENS}, got {max_new_tokens}")
    if not 1 <= num_samples <= MAX_SAMPLES:
        raise ValueError(f"samples must be 1 to {MAX_SAMPLES}, got {num_samples}")
    seed = str(seed).strip()
    if seed and not (seed.isascii() and seed.isdigit()):
        raise ValueError(f"the seed must be a whole number or empty, got {seed[:40]!r}")
    sampling = Sampling(
        max_new_tokens=int(max_new_tokens),
        temperature=float(temperature),
        top_k=int(top_k),
        top_p=float(top_p),
        seed=int(seed) if seed else secrets.randbelow(NEW_SEEDS),
    )
    return sampling, int(num_samples)


def generate(
    models: Models,
    prompt: str | None,
    *settings: Any,
    chances: bool = False,
    ended: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, str]]:
    """(texts, status) as HTML, as text comes; of two models one after the other.

    Args:
        models: Gives the model, or two.
        prompt, settings: What `read_settings` takes; an empty seed draws one, which the status
            names.
        chances: At the end shade each token by its chance.
        ended: True once nobody wants more of it.

    Raises:
        gr.Error: no model, a bad setting, or a model that fails; the page shows the message.
    """
    finished, prompt = "", prompt or ""
    try:
        how = read_settings(prompt, *settings)
        for each in models.all:
            last, loaded = each is models.all[-1], each.get()
            pane = ""
            for texts, status in _updates(loaded, ended, prompt, *how, chances, last):
                pane = f"<div><h4>{html.escape(str(loaded.path))}</h4>{texts}</div>"
                both = f'<div class="pair">{finished}{pane}</div>'
                yield (both if len(models.all) > 1 else texts), status
            finished += pane
    except (OSError, ValueError, OverflowError) as error:
        message = error_html(models, error)
        raise gr.Error(message, print_exception=False, duration=None) from None


def _updates(
    loaded: Loaded,
    ended: Callable[[], bool],
    prompt: str,
    sampling: Sampling,
    num_samples: int,
    chances: bool,
    last: bool,
) -> Iterator[tuple[str, str]]:
    notes: list[str] = []
    pieces = stream_text(
        loaded.model, get_encoding(), [prompt], sampling,
        num_samples=num_samples, notify=notes.append,
    )  # fmt: skip
    texts, counts = [""] * num_samples, [0] * num_samples
    start = shown = looked = time.perf_counter()
    spans, cost, recited, stopped = [[]] * num_samples, 0.0, "", ""
    prefix = "".join(f"{html.escape(note)}. " for note in notes)

    def status(now: float, state: str = "") -> str:
        rate = sum(counts) / max(now - start, 1e-9)
        return status_html(
            f"{prefix}{sum(counts)} tokens{stopped}, {rate:.0f} tokens/s, seed {sampling.seed}"
            f"{recited}",
            state,
        )

    yield texts_html(prompt, texts), status_html(prefix)
    for piece in pieces:
        texts[piece.row] += piece.text
        counts[piece.row] = piece.num_tokens
        if ended():
            stopped = ", stopped"
            break
        now = time.perf_counter()
        if now - shown < REFRESH_S:
            continue
        if loaded.corpus and now - looked > max(0.5, cost / MARK_SHARE):
            overlap = find_overlap(texts, loaded.corpus)
            spans, recited = overlap.spans, _recited(overlap, texts)
            looked = time.perf_counter()
            cost = looked - now
        yield texts_html(prompt, map(mark_spans, texts, spans)), status(now)
        shown = time.perf_counter()
    end = time.perf_counter()
    if loaded.corpus:
        overlap = find_overlap(texts, loaded.corpus)
        spans, recited = overlap.spans, _recited(overlap, texts)
    if chances:
        bodies = [shaded(token_chances(loaded.model, prompt, text)) for text in texts]
    else:
        bodies = map(mark_spans, texts, spans)
    yield texts_html(prompt, bodies), status(end, "done" if last or ended() else "")


def build(models: Models) -> gr.Blocks:
    """The page."""
    # analytics_enabled=False: otherwise the server calls two hosts at start.
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {TITLE}")
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
                status = gr.HTML(status_html(""), elem_id="status")
                examples = gr.Dataset(
                    components=[gr.Textbox(visible=False)], samples=[], visible=False,
                    label="Beginnings", elem_id="examples",
                )  # fmt: skip
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
                    seed = gr.Textbox(
                        label="Seed", placeholder="a new one each time", max_lines=1, elem_id="seed"
                    )
                    num_samples = gr.Slider(
                        1, MAX_SAMPLES, 1, step=1, label="Samples", elem_id="samples"
                    )
                chances = gr.Checkbox(
                    label="Shade each token by its chance (stronger: likelier)", elem_id="chances"
                )
                with gr.Accordion("Training", open=True):
                    panel = gr.HTML(elem_id="panel")

        visit = gr.State({"newest": 0, "stopped": -1})
        turn = gr.Number(0, visible=False)  # counted by the page, so that Stop names what it ends
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

        gr.on(
            [go.click, prompt.submit],
            serve,
            [
                visit,
                turn,
                chances,
                prompt,
                temperature,
                top_k,
                top_p,
                max_new_tokens,
                seed,
                num_samples,
            ],
            [output, status],
            js="(visit, turn, ...rest) => [visit, window.turn = (window.turn ?? 0) + 1, ...rest]",
            trigger_mode="multiple",
            concurrency_limit=None,
            show_progress="hidden",
            api_name="generate",
        )
        stop.click(
            end, [visit, turn], js="visit => [visit, window.turn ?? 0]", queue=False,
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        examples.click(lambda row: row[0], examples, prompt, api_visibility="private")
        page.load(show, None, [panel, examples], api_visibility="private")
    return page


def launch(page: gr.Blocks, port: int | None = None, **more: Any) -> Any:
    """Serve the page: system fonts, no footer, no files, nothing from another host."""
    # type: ignore because gradio's own annotation of font is narrower than what it takes
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # type: ignore
    return page.launch(
        server_port=port, theme=theme, css=CSS, footer_links=[], run_history=False, share=False,
        ssr_mode=False, max_file_size=1, show_error=True, **more,
    )  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """`python -m demo.app`."""
    import tyro

    def command(
        model: str | None = None, beside: str | None = None, port: int | None = None
    ) -> None:
        """Try a model in the browser.

        Args:
            model: Run, model folder or .safetensors file; without it the newest under runs/.
            beside: A second one to compare with: a checkpoint, another run.
            port: Port on localhost; without it the first free one from 7860.
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
