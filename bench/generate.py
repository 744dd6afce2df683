"""How fast a model generates: greedily, with a KV cache, from random weights.

python -m bench.generate --model small --rounds 5
python -m bench.generate --model 124m --device cuda --dtype bf16 --batch 16
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import cli, record
from bench.record import StepRow
from bench.tables import rows_table, spread
from model import GPT, MODELS
from model.decoder import generate_tokens
from model.sampling import Sampling
from training import timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser("bench.generate", __doc__)
    add = parser.add_argument
    add("--model", default="small", choices=[*MODELS])
    add("--tokens", type=cli.count, default=256, help="new ones per row")
    add("--batch", type=cli.count, default=1, help="rows at once")
    add("--dtype", default="fp32", choices=[*DTYPES])
    add("--rounds", type=cli.count, default=5, help="samples")
    add("--device", default="cpu", choices=cli.devices())
    cli.add_output(parser, None)
    args = parser.parse_args(argv)
    device, config, num = torch.device(args.device), MODELS[args.model], args.tokens
    results = record.open_result(device, args.out, args.commit) if args.out else None
    torch.manual_seed(0)
    # Enough positions for all tokens: sliding the window would be timed, too.
    model = GPT(replace(config, block_size=max(config.block_size, PROMPT_TOKENS + num)))
    model = model.to(device, DTYPES[args.dtype]).eval()
    prompts = torch.randint(config.vocab_size, (args.batch, PROMPT_TOKENS)).tolist()

    def generate(num: int = num) -> None:
        generate_tokens(model, prompts, Sampling(max_new_tokens=num, temperature=0.0))
        torch.get_device_module(device).synchronize()

    generate(4)  # a short warm-up: a whole run may take a minute
    replays = {"cached": timing.host_replay(generate)}
    timed = timing.interleave(replays, rounds=args.rounds, seconds=1e9, warmup=0)
    shape = f"{args.batch} x {num} new tokens, {args.dtype}"
    row = StepRow(model=args.model, shape=shape, provider="cached", tokens=args.batch * num)
    row = replace(row, **timed["cached"].figures)
    columns = {
        "ms": lambda row: f"{row.ms:,.0f}",
        "spread": spread,
        "tokens/s": lambda row: f"{row.tokens_per_s:,.1f}",
    }
    print(rows_table([row], {"what": lambda row: f"{row.model}, {row.shape}"}, columns))
    if results:
        results.add("generate", row)


if __name__ == "__main__":
    cli.run(main)
