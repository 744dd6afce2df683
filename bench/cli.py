"""Command lines of the bench. A wrong argument gives one line and exit code 2."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from bench.cases import Shape
from bench.record import RESULTS
from model.edge import exits
from training.console import surviving

MAX_COUNT = 10**6  # the most micro-batches, rounds or steps to ask for


class Parser(argparse.ArgumentParser):
    """Its help is a module's docstring; an error does not print the whole usage."""

    def __init__(self, module: str, doc: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        prog = f"python -m {module}"
        super().__init__(prog=prog, description=doc, allow_abbrev=False, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_output(parser: Parser, default: Path | None = RESULTS) -> None:
    """Add the options that `record.open_result` takes."""
    parser.add_argument("--out", type=path, default=default, help="result file or folder")
    parser.add_argument("--commit", help="the measured commit, if git does not know it")


def devices() -> list[str]:
    """The devices of this machine; the default is the last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def count(text: str) -> int:
    if not 1 <= (found := int(text)) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MAX_COUNT:,}, got {text}")
    return found


def amount(text: str) -> float:
    """Seconds, minutes or a price."""
    if not 0 < (found := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return found


def shape(text: str) -> Shape:
    if found := re.fullmatch(r"b([1-9][0-9]{0,8})t([1-9][0-9]{0,8})", text):
        return Shape(int(found[1]), int(found[2]))
    raise argparse.ArgumentTypeError(f"a shape is b<B>t<T>, such as b64t1024, got {text!r}")


def path(text: str) -> Path:
    """A path. An empty one is refused: it would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or a folder, got nothing")
    return Path(text)


def file(text: str) -> Path:
    """An existing file, as an absolute path: commands may run elsewhere."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text).resolve()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its code, even if nobody reads its output."""
    with exits(), surviving():
        sys.exit(main() or 0)
