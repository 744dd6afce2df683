"""What a run will take, before anyone rents the cards: hours, checkpoints, disk and cost.

python -m bench.plan_run --preset fineweb-124m --cards 8xH100 --price 3

What does not fit is refused, as by train.py. Tokens per second come from the newest result file;
for other cards and models they are estimated from the fraction of the peak that was reached there.
Several cards count as that many times one, because the costs of communication and of launching
without a graph have not been measured.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from bench import cli, record
from bench.record import StepRow
from model.flops import flops_per_token, num_parameters
from training.distributed import World, share
from training.machines import CARDS, Machine, find_card
from training.plan import Plan, make_plan
from training.recipes import Recipe, find_preset

PAPER = {name: card for name, card in CARDS.items() if card.arch}  # those described in full
CHECKPOINTS_KEPT = 3  # train.py's --keep-last and the best


def read_cards(text: str) -> tuple[int, str]:
    """8xH100 -> (8, "H100"); ValueError for anything else."""
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?(.+)", text)
    if not found or found[2] not in PAPER:
        raise ValueError(f"--cards must be like 8xH100, of {', '.join(PAPER)}, got {text}")
    return int(found[1] or 1), found[2]


def rate(recipe: Recipe, card: str) -> tuple[float, str]:
    """Tokens per second of one card, and where that figure comes from."""
    result, rows = record.newest(record.load_all(), "cuda", "step", provider="ours bf16")
    figures = find_card(card)
    assert result is not None, "result files are part of the checkout"
    assert figures is not None
    row: StepRow = max(rows, key=lambda row: row.tokens_per_s)
    name = result.device["name"]
    reached = row.tflops_palm / (row.peak_tflops or figures.tflops)
    flops = flops_per_token(recipe.model_config, recipe.block_size)
    measured = (recipe.model, figures) == (row.model, find_card(name))
    measured &= row.shape.endswith(f"T={recipe.block_size}")
    source = "measured" if measured else f"estimate: {reached:.0%} of the peak, as {row.model}"
    return reached * figures.tflops * 1e12 / flops, f"{source} on {name}, {row.shape}"


def describe(recipe: Recipe, plan: Plan, count: int, card: str, price: float | None) -> list[str]:
    """What the run takes, one line for each resource."""
    one, source = rate(recipe, card)
    tokens = recipe.tokens_per_step * recipe.max_steps
    hours = tokens / (count * one) / 3600
    saved = 12 * num_parameters(recipe.model_config) / 1e9  # fp32: weights and two moments
    several = f", times {count} (estimate: nothing lost between them)" if count > 1 else ""
    return [
        plan.describe(recipe.muon),
        f"tokens: {tokens:,} in {recipe.max_steps:,} steps of {recipe.tokens_per_step:,}",
        f"tokens per second: {one:,.0f} on one card ({source}){several}",
        f"hours: {hours:,.1f} for the training steps; evaluations and start-up come on top",
        f"checkpoints: {saved:.2f} GB each, of which {CHECKPOINTS_KEPT} are kept",
        f"shards: {2 * tokens / 1e9:.1f} GB of disk, if no token is read twice",
        *([f"cost: {hours * count * price:,.0f} at {price:g} per card and hour"] if price else []),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.plan_run", __doc__)
    parser.add_argument("--preset", default="fineweb-124m")
    parser.add_argument("--model", help="instead of the recipe's: 350m, 774m, 1558m")
    parser.add_argument("--cards", default="8xH100", metavar="NxCARD")
    parser.add_argument("--price", type=cli.amount, help="per card and hour, in any currency")
    options = parser.parse_args(argv)
    recipe = find_preset(options.preset)
    recipe = replace(recipe, model=options.model or recipe.model)
    count, card = read_cards(options.cards)
    arch, memory_bytes = PAPER[card].arch, PAPER[card].gib << 30
    machine = Machine("cuda", card, arch, has_bf16=True, memory_bytes=memory_bytes)
    plan = share(make_plan(recipe, machine, None, count), recipe, World(size=count))
    print("\n".join(describe(recipe, plan, count, card, options.price)))


if __name__ == "__main__":
    cli.run(main)
