"""Makes a picture of what a command prints, without the middle of a long output.

make train | python -m docs.terminal "make train" docs/train.svg
"""

import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

HEAD, TAIL = 9, 28  # lines shown of the beginning and of the end


def draw(command: str, lines: list[str]) -> str:
    """An SVG of a terminal in which `command` has printed `lines`."""
    if len(lines) > HEAD + TAIL:
        lines = [*lines[:HEAD], "...", *lines[-TAIL:]]
    console = Console(record=True, width=110, file=StringIO(), force_terminal=True, highlight=False)
    console.print(f"[bold green]$[/] [bold]{command}[/]")
    for line in lines:
        console.print(line, markup=False)
    picture = console.export_svg(title=command)
    return re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # no font from the network


if __name__ == "__main__":
    name, out = sys.argv[1:]
    Path(out).write_text(draw(name, sys.stdin.read().splitlines()), encoding="utf-8")
