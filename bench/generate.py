"""Generation speed: our cached decoding, the uncached loop, transformers' generate.

The three run the same random weights from the same prompt, greedily, in turn (A B C A B C ...),
and must give the same tokens. transformers runs in a process of its own that lives through the
bench and waits while the others run: beside our folder named `kernels` it would take that for
the package it looks for.

    python -m bench.generate --model small --rounds 5
    python -m bench.generate --model 124m --no-uncached
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.record import Results, rounded
from bench.timing import Replay, host_replay, interleave, ratio
from model import GPT, MODELS
from model.decoder import generate_tokens
from model.sampling import Sampling

PROMPT_TOKENS = 16

WORKER = """
import json, sys, time
import torch
from transformers import GPT2LMHeadModel
folder, device = sys.argv[1:3]
model = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
for line in sys.stdin:
    prompt, num = json.loads(line)
    ids = torch.tensor([prompt], device=device)
    mask = torch.ones_like(ids)
    start = time.perf_counter()
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num,
                         min_new_tokens=num, pad_token_id=0)
    tokens = out[0, len(prompt):].tolist()
    ms = (time.perf_counter() - start) * 1e3
    print("ANSWER" + json.dumps([ms, tokens]), flush=True)
"""


@contextmanager
def transformers_worker(folder: Path, device: str) -> Iterator[Any]:
    """ask(prompt, num) -> (ms, tokens) in another process, whose path does not hold our folder."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", WORKER, str(folder), device],
        cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def ask(prompt: list[int], num: int) -> tuple[float, list[int]]:
            stdin.write(json.dumps([prompt, num]) + "\n")
            stdin.flush()
            for line in stdout:
                if line.startswith("ANSWER"):
                    ms, tokens = json.loads(line[6:])
                    return ms, tokens
            raise RuntimeError("generate: the transformers process ended; is it installed?")

        try:
            yield ask
        finally:
            stdin.close()
            process.wait()


def bench(model_name: str, num: int, rounds: int, uncached: bool, device: str) -> list[dict]:
    """Rows of the result file, one for each contestant; raises when their tokens differ."""
    torch.manual_seed(0)
    config = MODELS[model_name]
    # transformers cannot slide a window, so give all three positions enough; they cost nothing.
    config = replace(config, block_size=max(config.block_size, PROMPT_TOKENS + num))
    model = GPT(config)
    with torch.no_grad():  # wider than at init, or one token would win every step
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        model.transformer.wte.weight[model.config.vocab_size :].zero_()
    prompt = torch.randint(model.config.vocab_size, (PROMPT_TOKENS,)).tolist()
    sampling = Sampling(max_new_tokens=num, temperature=0.0)
    tokens: dict[str, list[int]] = {}
    model.to(device)

    def run(name: str, use_cache: bool) -> None:
        tokens[name] = generate_tokens(model, [prompt], sampling, use_cache=use_cache)[0]

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with transformers_worker(Path(folder), device) as ask:

            def run_transformers() -> float:
                ms, tokens["transformers"] = ask(prompt, num)
                return ms

            replays = {
                "cached": host_replay(lambda: run("cached", True)),
                "transformers": Replay(run_transformers, "host"),
            }
            if uncached:
                replays["uncached"] = host_replay(lambda: run("uncached", False))
            for use_cache in (True, False):  # a short run each: a whole one takes minutes
                short = replace(sampling, max_new_tokens=4)
                generate_tokens(model, [prompt], short, use_cache=use_cache)
            ask(prompt, 4)
            timings = interleave(replays, rounds=rounds, seconds=1e9, warmup=0, min_rounds=1)
    for name, found in tokens.items():
        if found != tokens["cached"]:
            at = next(
                i for i, (a, b) in enumerate(zip(found, tokens["cached"], strict=True)) if a != b
            )
            raise ValueError(f"generate: {name} and cached differ at token {at} of {num}")
    return [
        rounded({
            "model": model_name,
            "provider": name,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": num,
            "dtype": "fp32",
            "rounds": len(timing.samples_ms),
            "median_ms": timing.median_ms,
            "quartiles_ms": timing.quartiles_ms,
            "tokens_per_s": num / timing.median_ms * 1e3,
            "cached_is_faster_by": ratio(timing, timings["cached"]),
        })
        for name, timing in timings.items()
    ]  # fmt: skip


def main(args: list[str] | None = None) -> None:
    """`python -m bench.generate`."""
    import tyro

    def command(
        model: str = "small",
        tokens: int = 256,
        rounds: int = 5,
        uncached: bool = True,
        device: str = "cpu",
        out: Path | None = None,
    ) -> None:
        """Time generation.

        Args:
            model: Size.
            tokens: New tokens.
            rounds: Samples of each.
            uncached: Time the uncached loop too; minutes for 124m on a CPU.
            device: cpu or cuda.
            out: Result file or folder; without it only a table is printed.
        """
        if model not in MODELS:
            raise ValueError(f"generate: unknown model {model!r}; expected one of {[*MODELS]}")
        rows = bench(model, tokens, rounds, uncached, device)
        for row in rows:
            spread = "{:.0f} to {:.0f}".format(*row["quartiles_ms"])
            print(
                f"{model:6} {row['provider']:13} {row['median_ms']:9.0f} ms ({spread}) "
                f"{row['tokens_per_s']:8.1f} tokens/s   cached: {row['cached_is_faster_by']:.2f}x"
            )
        if out is not None:
            results = Results(torch.device(device), out)
            for row in rows:
                results.add("generate", row)

    try:
        tyro.cli(command, prog="python -m bench.generate", args=args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
