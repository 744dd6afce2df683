"""Recipes: what is trained, with sizes, schedule and data order. plan.py decides how it runs.

Two runs of one recipe with the same seed see the same samples in the same order and compute the
same losses, whatever the plan.
"""

import difflib
import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

import tyro

from model import MODELS, GPTConfig
from training import schema
from training.schema import MOST

Order = Literal["sequential", "shuffled"]
Keep = Literal["best", "last"]
Schedule = Literal["cosine", "wsd", "linear", "constant"]
MAX = 1e30  # the optimizer computes in fp32, which ends at 3e38
_AMOUNTS = ("max_lr", "min_lr", "epochs", "weight_decay", "grad_clip", "target_loss")
# Least and largest value of a field.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_AMOUNTS, (0, MAX)),
    "eps": (1e-30, MAX),  # with 0 a weight without a gradient would become 0 / 0
    **dict.fromkeys(("warmup_steps", "horizon_steps", "patience"), (0, MOST)),
    **dict.fromkeys(("max_steps", "batch_size", "block_size", "grad_accum_steps"), (1, MOST)),
    "seed": (0, 2**63),
}
_CHANGEABLE = dict.fromkeys(("block_size", "n_layer", "n_head", "n_embd"), int) | {"dropout": float}


def parse_model(spec: str) -> GPTConfig:
    """Read a model shape: a size, or a size with changes as in "small,n_embd=320,dropout=0.1".

    Raises:
        ValueError: unknown size or field, a value that is not a number, or an impossible shape.
    """
    size, *changes = (part.strip() for part in spec.split(","))
    if size not in MODELS:
        raise ValueError(f"model: unknown size {size!r}{_nearest(size, [*MODELS])}")
    changed: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in _CHANGEABLE:
            raise ValueError(f"model: cannot change {change!r}, only {', '.join(_CHANGEABLE)}")
        try:
            changed[name] = _CHANGEABLE[name](value)
        except ValueError:
            raise ValueError(
                f"model: {name} must be a {'' if name == 'dropout' else 'whole '}number, "
                f"got {value!r}"
            ) from None
    return replace(MODELS[size], **changed)


def spell_model(config: GPTConfig) -> str:
    """The text that `parse_model` reads as `config`.

    Raises:
        ValueError: a recipe cannot express it, for example because of its vocabulary.
    """
    values, default = asdict(config), asdict(GPTConfig())
    for name in values.keys() - _CHANGEABLE.keys():
        if (value := values[name]) != default[name]:
            added = name == "vocab_size" and value > default[name]  # a token to pad with, mostly
            raise ValueError(
                f"model: {name} must be {default[name]} to be trained here, got {value}"
                + "; transformers' resize_token_embeddings(50257) cuts off added tokens" * added
            )
    same = (n for n, known in MODELS.items() if replace(known, dropout=config.dropout) == config)
    base = next(same, next(iter(MODELS)))
    known = asdict(MODELS[base])
    changed = [f"{name}={values[name]}" for name in _CHANGEABLE if values[name] != known[name]]
    return ",".join([base, *changed])


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" (known: {', '.join(names)})"


@dataclass(frozen=True)
class Recipe:
    """What is trained. A field out of range raises ValueError with its value and bound."""

    model: str = "124m"
    """Model size, or a size with changes, as in small,n_embd=320,n_layer=4."""
    max_lr: float = 6e-4
    """Peak learning rate, after the warm-up."""
    min_lr: float = 6e-5
    """Final learning rate, from the horizon on."""
    schedule: Schedule = "cosine"
    """How max_lr decays to min_lr: cosine and linear from the warm-up on; wsd (warm-up, stable,
    decay) only at the end, linearly; constant not at all."""
    decay_fraction: float = 0.2
    """Fraction of the steps, up to the horizon, over which wsd decays."""
    warmup_steps: int = 0
    """Linear warm-up: step s uses max_lr * (s + 1) / warmup_steps."""
    horizon_steps: int = 0
    """Step at which the schedule reaches min_lr; 0: max_steps."""
    max_steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 1000
    """Optimizer steps."""
    epochs: float = 0.0
    """Passes over the training text, in place of max_steps; 0: off."""
    batch_size: int = 16
    """Rows (sequences) per micro-batch."""
    block_size: int = 64
    """Tokens per row, T; at most the model's positions."""
    grad_accum_steps: int = 1
    """Micro-batches per step; a step uses their mean gradient."""
    weight_decay: float = 0.1
    """Weight decay, for matrices only."""
    beta1: float = 0.9
    """AdamW's decay rate for the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate for the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    muon: bool = False
    """Update the blocks' matrices with Muon, the rest with AdamW; see training/optim.py."""
    grad_clip: float = 1.0
    """Clip gradients to this global norm; 0: off."""
    target_loss: float = 0.0
    """Stop at the first step whose training loss (nats per token) is below this; 0: off."""
    val_fraction: float = 0.1
    """Fraction of the text, from its end, held out for validation."""
    order: Order = "shuffled"
    """sequential: rows in the order of the text; shuffled: a seeded permutation per epoch."""
    keep: Keep = "last"
    """Weights to export: those of the best evaluation, or of the last step."""
    patience: int = 0
    """Stop after this many evaluations in a row without a better one; 0: off."""
    guard: bool = True
    """Skip updates with a non-finite loss or gradient, or a loss spike; see training/guard.py."""
    seed: int = 1337
    """Seed of the initial weights and the data order."""

    def __post_init__(self) -> None:
        for name, (least, most) in BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bound = f"at most {most}" if value > most else f"at least {least}"
                raise ValueError(f"recipe: {name} must be {bound}, got {value}")
        for name in ("beta1", "beta2", "val_fraction", "decay_fraction"):
            if not 0.0 <= (value := getattr(self, name)) < 1.0:
                raise ValueError(f"recipe: {name} must be in [0, 1), got {value}")
        for name, words in (("order", Order), ("keep", Keep), ("schedule", Schedule)):
            schema.check(f"recipe: {name}", getattr(self, name), schema.of(words))
        if self.min_lr > self.max_lr:
            raise ValueError(
                f"recipe: min_lr must be at most max_lr, got min_lr {self.min_lr}, "
                f"max_lr {self.max_lr}; give both"
            )
        positions = self.model_config.block_size
        if self.block_size > positions:
            raise ValueError(
                f"recipe: block_size must be at most the model's {positions} positions, got "
                f"{self.block_size}; a new model may have more: --model "
                f"{self.model},block_size={self.block_size}"
            )

    @property
    def model_config(self) -> GPTConfig:
        return parse_model(self.model)

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.block_size

    def reading(self, num_tokens: int) -> "Recipe":
        """This recipe with `max_steps` computed from `epochs` for a text of this length."""
        if not self.epochs:
            return self
        rows = (num_tokens - 1) // self.block_size
        return replace(self, max_steps=max(1, math.ceil(self.epochs * rows / self.rows_per_step)))

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0: linear warm-up, the schedule, then min_lr."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.max_lr
        horizon = self.horizon_steps or self.max_steps
        if step >= horizon:
            return self.min_lr
        progress = (step - self.warmup_steps) / (horizon - self.warmup_steps)
        share = {
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
            "linear": 1.0 - progress,
            "wsd": min(1.0, (horizon - step) / self.decay_steps),
        }[self.schedule]
        return self.min_lr + share * (self.max_lr - self.min_lr)

    @property
    def decay_steps(self) -> int:
        """Number of steps before the horizon in which wsd falls."""
        return max(1, round(self.decay_fraction * (self.horizon_steps or self.max_steps)))

    def cooled_down_from(self, step: int) -> "Recipe":
        """This wsd recipe, decaying from `step` on for the same fraction of all steps."""
        share = self.decay_fraction
        steps = step + max(1, round(step * share / (1.0 - share)))
        return replace(self, max_steps=steps, horizon_steps=0, epochs=0.0)


FINETUNE = "finetune"  # the preset for runs that start from pretrained weights

PRESETS: dict[str, Recipe] = {
    # A published run in plain PyTorch that memorises tiny Shakespeare. Its table prints a learning
    # rate of 6.00e-04 at step 4175, so its cosine ran over at least 164,874 steps.
    "shakespeare-124m": Recipe(
        model="124m",
        warmup_steps=1000,
        horizon_steps=200_000,
        max_steps=10_000,
        batch_size=16,
        block_size=64,
        grad_accum_steps=4,
        target_loss=0.09,
        val_fraction=0.0,
        order="sequential",
        guard=False,
    ),
    # 589k tokens, 1.9 epochs of tiny Shakespeare; bench/LOG.md has the search. Muon gains most,
    # then its learning rate. 38,500 ids of the vocabulary never occur: the large eps keeps AdamW
    # from pushing them all the same way at full rate. The width suits the speed of AVX2.
    "shakespeare-cpu": Recipe(
        model="tiny,n_layer=2,n_embd=160,n_head=5",
        max_lr=6e-3,
        min_lr=0.0,
        schedule="linear",
        warmup_steps=20,
        max_steps=1150,
        batch_size=8,
        block_size=64,
        weight_decay=1.0,
        beta2=0.99,
        eps=1e-5,
        muon=True,
    ),
    # GPT-2 124M on 10B tokens of FineWeb-Edu, the schedule the public reproductions share.
    "fineweb-124m": Recipe(
        model="124m",
        warmup_steps=715,
        max_steps=19_073,
        batch_size=64,
        block_size=1024,
        grad_accum_steps=8,
        val_fraction=0.01,
    ),
    # A tenth of the learning rate of training, as is common for fine-tuning GPT-2.
    FINETUNE: Recipe(
        model="124m,dropout=0.1",
        max_lr=5e-5,
        min_lr=0.0,
        warmup_steps=20,
        max_steps=500,
        batch_size=1,
        block_size=1024,
        grad_accum_steps=8,
        keep="best",
        patience=3,
    ),
    "smoke": Recipe(
        model="smoke",
        max_lr=1e-3,
        min_lr=1e-4,
        warmup_steps=2,
        max_steps=20,
        batch_size=4,
        block_size=64,
    ),
}

ABOUT = {
    "shakespeare-cpu": "a small GPT-2 on a text, 2 to 5 minutes on 2 cores; the default on a CPU",
    "shakespeare-124m": "GPT-2 124M until it memorises tiny Shakespeare; the default on a GPU",
    "fineweb-124m": "GPT-2 124M, 19,073 steps of half a million tokens; needs GPUs and --data",
    FINETUNE: "fine-tune the weights of --init and keep the best; GPT-2 needs a GPU to be fast",
    "smoke": "20 steps of a toy model, to try out a flag",
}

# (step, loss) of the published run of shakespeare-124m, drawn beside ours.
PUBLISHED_LOSS = [
    *[(0, 10.97), (100, 6.61), (500, 3.62), (1000, 2.47), (1500, 0.71)],
    *[(2000, 0.24), (2500, 0.17), (3000, 0.15), (4000, 0.12), (4175, 0.082)],
]


def find_preset(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: no such recipe; the message suggests the nearest name.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise ValueError(f"preset: unknown recipe {name!r}{_nearest(name, [*PRESETS])}")
