"""The command line of generation.

python -m model.generate --prompt "ROMEO:" --temperature 0.8 --top-k 50
python -m model.generate --model runs/smoke --prompt - --num-samples 3 < prompt.txt
"""

import sys
import time
from dataclasses import dataclass, fields
from typing import Literal

import torch

from model.edge import exits, one_line, read_stdin, read_utf8
from model.find import latest_model, usable_device
from model.gpt import GPT
from model.sampling import Sampling
from model.text import stream_text

MAX_PROMPT_BYTES = 16 << 20  # read from standard input; only its end fits into a window


@dataclass(frozen=True)
class Options(Sampling):
    """Generate text with a trained model.

    Args:
        model: Run, model folder or .safetensors file; by default the newest under runs/.
        prompt: Text to continue, or several for a batch; - reads stdin; "" starts a document.
        num_samples: Texts for each prompt.
        window: Tokens the model sees at once; by default the context it was trained with.
        device: Where to run.
        dtype: Dtype of weights and activations.
    """

    model: str | None = None
    prompt: tuple[str, ...] = ("",)
    num_samples: int = 1
    window: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """No check here: tyro would print its error as a box of several lines."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{f.name: getattr(self, f.name) for f in fields(Sampling)})


def _run(options: Options) -> None:
    sampling, device = options.sampling, usable_device("generate", options.device)
    prompts = [
        read_utf8("generate: stdin", read_stdin("generate", MAX_PROMPT_BYTES)) if p == "-" else p
        for p in options.prompt
    ]
    path = latest_model() if options.model is None else options.model
    model = GPT.from_pretrained(path)
    model = model.to(device, torch.bfloat16 if options.dtype == "bf16" else torch.float32)

    pieces = stream_text(
        model,
        prompts,
        sampling,
        num_samples=options.num_samples,
        window=options.window,
        notify=lambda line: print(f"note: {line}", file=sys.stderr),
    )
    num_rows = len(prompts) * options.num_samples
    texts = [prompt for prompt in prompts for _ in range(options.num_samples)]
    counts = [0] * num_rows
    start = time.perf_counter()
    if num_rows == 1:
        print(texts[0], end="", flush=True)
    for piece in pieces:
        texts[piece.row] += piece.text
        counts[piece.row] = piece.num_tokens
        if num_rows == 1:
            print(piece.text, end="", flush=True)
    elapsed = time.perf_counter() - start
    print()
    if num_rows > 1:
        for r, text in enumerate(texts):
            print(f"--- {r + 1} of {num_rows}\n{text}")
    print(
        f"{one_line(path)}: {sum(counts)} tokens in {elapsed:.2f} s, "
        f"{sum(counts) / max(elapsed, 1e-9):.1f} tokens/s on {device}",
        file=sys.stderr,
    )


def main(args: list[str] | None = None) -> None:
    import tyro

    with exits():
        _run(tyro.cli(Options, prog="python -m model.generate", args=args))


if __name__ == "__main__":
    main()
