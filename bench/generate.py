"""Generation speed: our cached decoding, the uncached loop, transformers' generate.

All run the same random weights from the same prompt, greedily, in turn (A B C A B C ...), and must
give the same tokens, or the row is in doubt. transformers runs in a process of its own that lives
through the bench and waits while the others run: beside our folder named `kernels` it would take
that for the package it looks for.

    python -m bench.generate --model small --rounds 5
    python -m bench.generate --model 124m --only cached --only transformers
    python -m bench.generate --model 124m --device cuda --dtype bf16 --batch 16 --only cached
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from bench import cli
from bench.record import Results
from bench.rows import StepRow, filled
from bench.tables import rows_table
from model import GPT, MODELS
from model.decoder import generate_tokens
from model.sampling import Sampling
from training import timing
from training.child import PIPE, Child, ChildDied

PROVIDERS = ("cached", "transformers", "uncached")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_TOKENS = 16
ANSWER_LIMIT_S = 600.0
WORKER = f"""
import os, sys, time
from multiprocessing.connection import Connection
import torch
from transformers import GPT2LMHeadModel
folder, device, dtype = sys.argv[1:4]
model = GPT2LMHeadModel.from_pretrained(folder).to(device, getattr(torch, dtype)).eval()
pipe = Connection(int(os.environ["{PIPE}"]))
pipe.send("ready")
while True:
    prompts, num = pipe.recv()
    ids = torch.tensor(prompts, device=device)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=num, min_new_tokens=num, pad_token_id=0)
    tokens = out[:, ids.shape[1]:].tolist()
    pipe.send([(time.perf_counter() - start) * 1e3, tokens])
"""


def make_model(name: str, num: int, device: str, dtype: torch.dtype) -> GPT:
    """Random weights, wider than at init, or one token would win every step."""
    torch.manual_seed(0)
    config = MODELS[name]
    # transformers cannot slide a window, so give all positions enough; they cost nothing.
    model = GPT(replace(config, block_size=max(config.block_size, PROMPT_TOKENS + num)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        model.transformer.wte.weight[config.vocab_size :].zero_()
    return model.to(device, dtype).eval()


def measure(options: argparse.Namespace) -> list[StepRow]:
    """A row for each contestant; one whose process dies, or whose tokens differ, is in doubt."""
    num, dtype = options.tokens, DTYPES[options.dtype]
    model = make_model(options.model, num, options.device, dtype)
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    prompts = [prompt] * options.batch
    tokens: dict[str, list[list[int]]] = {}
    replays: dict[str, timing.Replay] = {}
    failed: dict[str, str] = {}

    def ours(name: str, num: int = num) -> None:
        sampling = Sampling(max_new_tokens=num, temperature=0.0)
        tokens[name] = generate_tokens(model, prompts, sampling, use_cache=name == "cached")
        if options.device == "cuda":
            torch.cuda.synchronize()

    with ExitStack() as held:
        for name in options.only:
            if name != "transformers":
                ours(name, 4)  # a short run: a whole one takes minutes
                replays[name] = timing.host_replay(partial(ours, name))
                continue
            folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
            model.save_pretrained(folder)
            command = [sys.executable, "-I", "-c", WORKER, str(folder), options.device,
                       str(dtype).removeprefix("torch.")]  # fmt: skip
            try:
                worker = held.enter_context(Child(command, cwd=folder))  # not beside our `kernels`
                worker.ask([prompts, 4], ANSWER_LIMIT_S)
            except ChildDied as why:
                failed[name] = str(why)
                continue

            def theirs(name: str = name, worker: Child = worker) -> float:
                ms, tokens[name] = worker.ask([prompts, num], ANSWER_LIMIT_S)
                return ms

            replays[name] = timing.Replay(theirs, "host")
        timed = timing.interleave(
            replays, rounds=options.rounds, seconds=1e9, warmup=0, min_rounds=1, failed=failed
        )
    rows = []
    shape = f"{options.batch} x {num} new tokens, {options.dtype}"
    for name in options.only:
        row = StepRow(model=options.model, shape=shape, provider=name, tokens=options.batch * num)
        row = filled(row, timed, failed, timed)
        if name in timed:
            known = tokens.get("cached", tokens[name])
            row = replace(row, doubt=difference(tokens[name], known))
        rows.append(row)
    return rows


def difference(found: list[list[int]], cached: list[list[int]]) -> str:
    """Where the tokens differ from those of cached decoding; empty if nowhere."""
    for a, b in zip(found, cached, strict=True):
        if a != b:
            at = next(i for i in range(len(b)) if a[i : i + 1] != b[i : i + 1])
            return f"differs from cached at token {at} of {len(b)}"
    return ""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser("bench.generate", __doc__)
    add = parser.add_argument
    add("--model", default="small", choices=[*MODELS])
    add("--tokens", type=cli.count, default=256, help="new ones of each row")
    add("--batch", type=cli.count, default=1, help="rows at once")
    add("--dtype", default="fp32", choices=[*DTYPES])
    add("--rounds", type=cli.count, default=5, help="samples of each")
    some = "repeat for several; uncached takes minutes for 124m"
    add("--only", action="append", choices=PROVIDERS, help=some)
    add("--device", default="cpu", choices=cli.devices())
    cli.add_output(parser, None)
    options = parser.parse_args(argv)
    options.only = options.only or PROVIDERS
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m bench.generate`."""
    options = parse(argv)
    device = torch.device(options.device)
    results = Results(device, options.out, options.commit) if options.out else None
    rows = measure(options)
    print(rows_table(
        rows,
        {"model": lambda r: r.model, "who": lambda r: r.provider},
        {"ms": lambda r: f"{r.ms:,.0f}", "spread": lambda r: r.spread,
         "tokens/s": lambda r: f"{r.tokens_per_s:,.1f}",
         "cached is x": lambda r: f"{1 / r.over['cached']:.2f}" if "cached" in r.over else ""},
    ))  # fmt: skip
    if results:
        results.add("generate", *rows)


if __name__ == "__main__":
    cli.run(main)
