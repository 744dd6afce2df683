"""The models of the page: how they are found, and what is known of their training."""

import html
import json
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT
from model.find import find_model, latest_model
from training.plot import inline_svg
from training.report import CORPUS_FILE, facts, loss_figure
from training.verdicts import Run, read_run, read_samples, verdicts

MAX_EXAMPLES = 4
EXAMPLE_CHARS = 80
NO_MODEL = (
    "There is no model here yet. Train one with <code>make train</code> (a few minutes on a CPU), "
    "then reload this page."
)
NO_RECORD = "How this model was trained is unknown: there is no record beside its weights."
# Rows of training.report.facts that help a visitor, separated by semicolons.
PANEL = (
    "recipe;model;training text;training tokens;tokens seen;epochs (passes over the text);"
    "trained context;training loss, last 5% of steps;validation loss;bits per byte, held-out text;"
    "device"
)
_loading = threading.Lock()  # matplotlib, which draws the panel, has global settings


class Loaded(NamedTuple):
    """A model and what is known of its training."""

    path: Path
    model: GPT
    corpus: bytes  # the training text; empty if no copy lies beside the model
    panel: str  # HTML
    examples: list[str]  # prompts


class Models:
    """Finds and loads a model when it is first asked for.

    Args:
        path: See `find_model`; None is the newest under runs/.
        about: A Space's JSON file with the panel and the examples, shown unchanged. None makes
            them from the run that the model belongs to.
        beside: A second model, which answers after the first with the same settings.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        about: Path | None = None,
        beside: Path | str | None = None,
    ):
        self.path, self.about = path, about
        self.loaded: Loaded | None = None
        self.all: list[Models] = [self, *([Models(beside)] if beside is not None else [])]

    def get(self) -> Loaded:
        """The model.

        Raises:
            FileNotFoundError, ValueError: there is none, or it cannot be read.
        """
        with _loading:
            if self.loaded is None:
                folder = find_model(latest_model() if self.path is None else self.path)
                model = GPT.from_pretrained(folder).eval()
                if torch.cuda.is_available():
                    model = model.cuda()
                places = (folder, folder.parent)  # a run keeps its record beside model/
                run = next((p for p in places if (p / "summary.json").is_file()), folder)
                texts = [p / CORPUS_FILE for p in places if (p / CORPUS_FILE).is_file()]
                corpus = texts[0].read_bytes() if texts else b""
                if self.about:
                    known = json.loads(self.about.read_text(encoding="utf-8"))
                else:
                    known = {
                        "panel": run_html(read_run(run), model, len(corpus)),
                        "examples": example_prompts(run),
                    }
                self.loaded = Loaded(folder, model, corpus, **known)
            return self.loaded


def example_prompts(run: Path) -> list[str]:
    """The prompts of the run's own samples, taken from its validation text."""
    prompts = (prompt.strip()[:EXAMPLE_CHARS] for prompt, _ in read_samples(run))
    worded = (prompt for prompt in prompts if any(map(str.isalpha, prompt)))
    return [*dict.fromkeys(worded)][:MAX_EXAMPLES]


def run_html(run: Run, model: GPT, corpus_bytes: int) -> str:
    """The panel on the training: verdicts, loss curve, figures."""
    recipe = run.part("recipe").get("model")
    size = f"{model.num_parameters():,} parameters"
    known = dict(facts(run, corpus_bytes))
    known["model"] = f"{recipe}, {size}" if recipe else size
    known["trained context"] = f"{model.trained_context:,} tokens"
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(known[name])}</td></tr>"
        for name in PANEL.split(";")
        if name in known
    )
    judged = verdicts(run) if run.steps or run.summary else [("note", NO_RECORD)]
    lines = "".join(f'<p class="{kind}">{html.escape(line)}</p>' for kind, line in judged)
    curve = inline_svg(loss_figure(run), "loss") if run.steps else ""
    return f'<div class="run">{lines}<div class="curve">{curve}</div><table>{rows}</table></div>'


def error_html(models: Models, error: Exception) -> str:
    """What went wrong, or how to train a model if there is none yet."""
    early = models.path is None and isinstance(error, FileNotFoundError)
    return NO_MODEL if early else html.escape(str(error))


def about(models: Models) -> tuple[str, list[str]]:
    """The panels and the examples; without a model the reason, and no examples."""
    try:
        loaded = [each.get() for each in models.all]
    except (OSError, ValueError) as error:
        return f'<div class="run"><p class="warning">{error_html(models, error)}</p></div>', []
    panels = [f"<h4>{html.escape(str(each.path))}</h4>{each.panel}" for each in loaded]
    return "".join(panels) if len(loaded) > 1 else loaded[0].panel, loaded[0].examples
