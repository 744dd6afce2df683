"""The code, files and figures that the pages in docs/ quote exist."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from docs import figures
from training.flags import Config
from training.plan import Choices
from training.recipes import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
QUOTE = re.compile(r"```python\n# (kernels/\w+\.py): (\w+)\n(.*?)```", re.DOTALL)
QUOTES = QUOTE.findall((ROOT / "docs/kernels.md").read_text())


def source_of(path: str, name: str) -> str:
    """The source of the function `name`, as one line."""
    text = (ROOT / path).read_text()
    [found] = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return " ".join((ast.get_source_segment(text, found) or "").split())


@pytest.mark.parametrize(("path", "name", "code"), QUOTES, ids=[name for _, name, _ in QUOTES])
def test_quoted_code_is_the_kernels(path, name, code):
    """Unchanged and in this order: a page must not teach what the kernel no longer does."""
    source = source_of(path, name)
    for part in code.split("...\n"):
        quoted = " ".join(part.split())
        assert quoted in source, f"docs/kernels.md quotes what {name} does not hold, or not here"
        source = source[source.index(quoted) :]


def test_names_in_the_text_are_those_of_kernels():
    sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    names = re.findall(r"`(_\w+)`", (ROOT / "docs/kernels.md").read_text())
    assert names
    assert [name for name in names if f"def {name}(" not in sources] == []


def test_every_kernel_file_is_quoted():
    files = (path for path in (ROOT / "kernels").glob("*.py") if "\n@jit\n" in path.read_text())
    assert {path for path, _, _ in QUOTES} == {f"kernels/{path.name}" for path in files}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for name in re.findall(r"[\w./-]*[0-9a-f]{8}\.json", page.read_text()):
        assert (ROOT / "bench/results" / Path(name).name).is_file(), name


def test_flags_by_other_names_are_flags():
    guide = (ROOT / "docs/guide.md").read_text()
    table = guide.split("## Flags by other names")[1].split("\n## ")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`--([a-z-]+)", row)}
    known = {field.name for kind in (Config, Choices, Recipe) for field in fields(kind)}
    assert len(named) > 20
    assert {name.replace("-", "_") for name in named} - known == {"steps"}


def test_figures_are_those_of_the_script_and_small():
    names = [*figures.FIGURES]
    files = sorted(figures.FOLDER.iterdir())
    assert [path.stem for path in files] == sorted(names)
    page = (ROOT / "docs/kernels.md").read_text()
    assert all(f"(figures/{name}.svg)" in page for name in names)
    assert sum(path.stat().st_size for path in files) < 150_000
