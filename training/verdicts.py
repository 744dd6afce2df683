"""What the numbers of a run folder show about the run, and what they do not, in plain words.

A falling training loss does not say whether a model has learnt the language or the file. Other
numbers do: the loss on held-out text, how often each token was seen, and how much of the samples
appears verbatim in the training text. Each sentence uses the run's own numbers. A number that is
missing or not finite leads to none.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from math import isfinite
from pathlib import Path
from typing import Any

from model.edge import is_real
from model.files import read_object, read_regular
from training.data import SHAKESPEARE_SHA256
from training.metrics import read_metrics
from training.overlap import Overlap
from training.plot import Points
from training.recipes import PRESETS, PUBLISHED_LOSS

SEED_RECIPE = "shakespeare-124m"
GAP_NATS = 0.5  # validation minus training loss: training text is e^0.5 = 1.6 times as likely
EASIER_NATS = 0.1  # validation loss below training loss
RISE_NATS = 0.1  # validation loss above its own minimum
WINDOW = 32  # bytes; shorter matches are ordinary language
RECITED_SHARE = 0.5  # share of the samples' windows
RECITED_BYTES = 128  # two lines of verse
OWN_SHARE = 0.05
MANY_EPOCHS = 10.0
LOW_LOSS = 1.0  # nats per token; GPT-2 1558M reaches 2.5 to 3 on text it has not seen
RECITED_LOSS = 0.5  # after many epochs, only a memorised text gets so low
WARNINGS = ("failed", "memorised", "overfitted", "unlearnt", "by_heart", "recited")
# Name: sentence. `verdicts` chooses some and fills in the run's own numbers.
SENTENCES = """
failed: This run failed. {failure}. Its weights, its samples and the figures below mean nothing.

unfinished: This run has not ended; {steps:,} steps are done.

harder: The validation loss {val:.2f} is {gap:.2f} nats above the training loss, because the
held-out text is harder. No text was read twice, so none can have been memorised.

memorised: Memorisation: the loss is {train:.2f} on the training text and {val:.2f} on held-out
text. The gap of {gap:.2f} nats makes a token of the training text {times:.3g} times as likely as
one of new text: the model is learning the file, not the language. Use fewer steps, more text or
dropout.

easier: The validation loss {val:.2f} is below the training loss {train:.2f}: the held-out text is
easier than the training text, or dropout raises the training loss. So the two do not show whether
the model memorises.

alike: Training loss {train:.2f} and validation loss {val:.2f} differ by {gap:+.2f} nats, which is
no sign of memorisation.

kept: model/ holds the weights of step {kept:,}, which had the lowest validation loss; after step
{steps:,} it was {last:.2f}.

overfitted: Overfitting: the validation loss was {best:.2f} at step {best_step:,} and rose to
{val:.2f}. model/ holds the last weights, not the best.

unlearnt: The validation loss {val:.2f} is not below the {bigram:.2f} of a bigram model: the model
has not yet learnt to use context.

by_heart: A loss of {train:.2g}{after} means that the model has memorised this text. It says nothing
about other text; --val-fraction 0.1 holds some out to measure that.

unsplit: No validation split: a training loss of {train:.2f}{after} does not tell learning from
memorisation; --val-fraction 0.1 holds out text to tell them apart.

recited: The samples are copied: {seen}

own: The samples are the model's own: {seen}

partly: The samples are partly copied: {seen}
"""


def number(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None: a file's value may be missing, NaN or of another type."""
    value: Any = values.get(key)
    return float(value) if is_real(value) and abs(value) < 1e300 else None


def spell_epochs(epochs: float) -> str:
    return f"{epochs:.1f} epochs" if epochs >= 0.1 else "less than 0.1 epochs"


def points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of each row that has the key; NaN for a value that is not a finite number."""
    found = [(row["step"], number(row, key)) for row in rows if key in row]
    return [(step, math.nan if value is None else value) for step, value in found]


@dataclass(frozen=True)
class Run:
    """The contents of a run folder's files; missing ones are empty."""

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
    def num_steps(self) -> float | None:
        return self.steps[-1]["step"] + 1 if self.steps else number(self.summary, "final_step")

    @property
    def kept(self) -> int | None:
        """How many steps made the weights in model/, if the run took more after them."""
        saved = number(self.summary, "saved_after_step")
        return None if saved is None or saved + 1 == self.num_steps else int(saved) + 1

    @property
    def train_loss(self) -> float | None:
        """Mean over the last 5% of the steps that made model/: one batch proves nothing."""
        kept = self.kept
        losses = [number(step, "loss") for step in self.steps[:kept] if "loss" in step]
        if not losses:
            return number(self.summary, "train_loss")
        last = [loss for loss in losses[-max(1, len(losses) // 20) :] if loss is not None]
        return sum(last) / len(last) if last else None

    @property
    def val_loss(self) -> float | None:
        """The last evaluation's."""
        if self.summary.get("val_loss") is None and self.evaluations:
            return number(self.evaluations[-1], "val_loss")
        return number(self.summary, "val_loss")

    @property
    def baselines(self) -> dict[str, float]:
        """Validation losses of the unigram and bigram models, by name."""
        values = self.summary.get("baselines")
        values = values if isinstance(values, dict) else {}
        return {name: loss for name in values if (loss := number(values, name)) is not None}

    @property
    def failure(self) -> str | None:
        """A sentence that says why this run's weights are useless; None if they may be good."""
        told = [(event.get("event"), event.get("step")) for event in self.events]
        losses = points(self.steps, "loss")[::-1]
        lost = [*takewhile(lambda p: not (isfinite(p[1]) or ("skipped", p[0]) in told), losses)]
        if lost:
            return f"The training loss is not finite from step {lost[-1][0]:,} on"
        if losses and ("give_up", losses[0][0]) in told:
            return f"The guard gave up at step {losses[0][0]:,}"
        if self.events and self.events[-1].get("event") == "failed" and not self.summary:
            return str(self.events[-1].get("reason") or "It was stopped")
        for values in (self.summary, *self.evaluations[-1:]):
            value = values.get("val_loss")
            if value is not None and number(values, "val_loss") is None:
                return f"The validation loss is not finite but {value}"
        return None

    @property
    def published(self) -> Points:
        """(step, loss) of the published run if this run repeats it."""
        recipe, wanted = self.part("recipe"), asdict(PRESETS[SEED_RECIPE])
        free = ("max_steps", "target_loss", "guard", "seed")
        same = all(recipe.get(key) == wanted[key] for key in wanted if key not in free)
        on_it = self.part("data").get("sha256") == SHAKESPEARE_SHA256
        return PUBLISHED_LOSS if same and on_it and not self.part("flags").get("init") else ()


def read_run(folder: Path) -> Run:
    """Read summary.json, config.json and metrics.jsonl."""
    steps, evaluations, events = read_metrics(folder / "metrics.jsonl")
    summary = read_object(folder / "summary.json")
    if steps and (number(summary, "final_step") or math.inf) <= steps[-1]["step"]:
        summary = {}  # from an earlier end; the run was extended and has not ended again
    return Run(summary, read_object(folder / "config.json"), steps, evaluations, events)


def read_samples(run: Path) -> list[tuple[str, str]]:
    """(prompt, what the model wrote) in samples.txt; a file in another form is one sample."""
    try:
        text = read_regular(run / "samples.txt")
    except (OSError, ValueError):
        return []
    pattern = r"^\[prompt\] (.*?)\n\[model\](.*?)(?=\n+\[prompt\] |\s*\Z)"
    parts = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return parts or ([("", text)] if text.strip() else [])


def verdicts(run: Run, overlap: Overlap | None = None, whole: bool = True) -> list[tuple[str, str]]:
    """("warning" or "note", sentence) for each thing that the numbers show.

    Args:
        run: The run.
        overlap: Of the model's samples with the training text.
        whole: All of the training text was searched.
    """
    known = run.val_loss, run.train_loss, run.baselines.get("bigram"), number(run.summary, "epochs")
    # An unknown number becomes NaN, so that no comparison with it is true.
    val, train, bigram, epochs = (math.nan if value is None else value for value in known)
    share = overlap.shares.get(WINDOW, math.nan) if overlap else math.nan
    longest, validated, gap = len(overlap.longest) if overlap else 0, val == val, val - train
    losses = [(loss, step) for step, loss in points(run.evaluations, "val_loss")]
    best, best_step = min(losses, default=(val, 0))
    recited = share > RECITED_SHARE or (share >= 0 and longest >= RECITED_BYTES)
    by_heart = train < RECITED_LOSS and epochs > MANY_EPOCHS
    rose = run.part("recipe").get("keep") != "best" and val - best > RISE_NATS
    holds = {
        "unfinished": bool(run.steps) and not run.summary,
        "harder": gap > GAP_NATS and epochs <= 1.0,
        "memorised": gap > GAP_NATS and not epochs <= 1.0,
        "easier": gap < -EASIER_NATS,
        "alike": -EASIER_NATS <= gap <= GAP_NATS and not (val >= bigram or recited),
        "kept": validated and run.kept is not None,
        "overfitted": rose and run.kept is None,
        "unlearnt": val >= bigram,
        "by_heart": by_heart and not validated,
        "unsplit": train == train and not (validated or by_heart),
        "recited": recited,
        "own": share <= OWN_SHARE and not recited,
        "partly": share > OWN_SHARE and not recited,
    }
    tokens = number(run.summary, "corpus_tokens") or 0
    after = f" after {spell_epochs(epochs)}" if epochs > 0 else ""
    after += f" over {tokens:,.0f} tokens" if after and tokens else ""
    where = "the training text" if whole else "the part of the training text searched"
    facts = {"failure": run.failure, "steps": run.num_steps, "val": val, "train": train, "gap": gap,
             "times": math.exp(min(gap, 99)), "bigram": bigram, "kept": run.kept, "best": best,
             "best_step": best_step, "last": losses[-1][0] if losses else math.nan, "after": after,
             "seen": f"{share:.0%} of their {WINDOW}-byte windows appear verbatim in {where}; the "
                     f"longest match has {longest or 'fewer than 16'} bytes."}  # fmt: skip
    doubtful = train < LOW_LOSS or epochs > MANY_EPOCHS
    warnings = (*WARNINGS, "unsplit") if doubtful else WARNINGS
    found = []
    for name, sentence in (each.split(": ", 1) for each in SENTENCES.strip().split("\n\n")):
        if name == "failed" if run.failure else holds.get(name):
            kind = "warning" if name in warnings else "note"
            found.append((kind, " ".join(sentence.split()).format(**facts)))
    return found
