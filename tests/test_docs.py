"""Documents tell the truth: their links lead somewhere, their Python parses, their commands exist."""

import ast
import doctest
import re
from pathlib import Path

import pytest

from distri.cli import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^(?:    |`|\| `)distri ([a-z]+)", re.MULTILINE)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for target in LINK.findall(text_of(page)):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_in_pages_parses_and_its_examples_hold(page: Path) -> None:
    for block in PYTHON.findall(text_of(page)):
        if ">>>" not in block:
            ast.parse(block)
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_pages_exist(page: Path) -> None:
    assert set(COMMAND.findall(text_of(page))) <= set(COMMANDS)


def test_decisions_are_numbered_without_gaps_and_complete() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    numbers = [int(page.name[:4]) for page in pages]
    assert numbers == list(range(1, len(pages) + 1))
    for page in pages:
        for part in ("**Context.**", "**Choice.**", "**Alternatives.**", "**Consequences.**"):
            assert part in text_of(page), f"{page.name} has no {part}"
