"""Command lines of the bench: what is asked wrongly is one line and exit code 2."""

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

MAX_COUNT = 10**6  # of anything one counts: micro-batches, rounds, steps


class Parser(argparse.ArgumentParser):
    """Help from a module's docstring; of a wrong argument it says one line, not the whole usage."""

    def __init__(self, module: str, doc: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        prog = f"python -m {module}"
        super().__init__(prog=prog, description=doc, allow_abbrev=False, formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_output(parser: Parser, default: Path | None = RESULTS) -> None:
    """Where rows go and what they are of, as `record.open_result` takes it."""
    parser.add_argument("--out", type=path, default=default, help="result file or folder")
    parser.add_argument("--commit", help="what is measured, where git is not at hand")


def devices() -> list[str]:
    """Of this machine, the one to take where nothing is said last."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not 1 <= (found := int(text)) <= MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MAX_COUNT:,}, got {text}")
    return found


def amount(text: str) -> float:
    """A finite number above 0, of seconds or minutes."""
    if not 0 < (found := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return found


def shape(text: str) -> Shape:
    """The shape of `b<B>t<T>`, at GPT-2's width."""
    if found := re.fullmatch(r"b([1-9][0-9]{0,8})t([1-9][0-9]{0,8})", text):
        return Shape(int(found[1]), int(found[2]))
    raise argparse.ArgumentTypeError(f"a shape is b<B>t<T>, such as b64t1024, got {text!r}")


def path(text: str) -> Path:
    """A path; the empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or a folder, got nothing")
    return Path(text)


def file(text: str) -> Path:
    """A file that is there, wherever a command runs."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return Path(text).resolve()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command to its exit code, whatever becomes of what it prints."""
    with exits(), surviving():
        sys.exit(main() or 0)
