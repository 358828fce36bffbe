"""What the documentation shows compiles, and what it names exists."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fastgrad_compiler.frontend import elaborate
from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_compiler.pipeline import run
from fastgrad_grammar.source import Source

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TESTS = {  # by the file's path below tests/, and by its name alone
    key: path.read_text(encoding="utf-8")
    for path in (ROOT / "tests").rglob("test_*.py")
    for key in (path.name, str(path.relative_to(ROOT / "tests")))
}


def programs(page: str) -> list[str]:
    """The blocks of a page, indented or fenced, that hold a whole model."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", text, re.M)
    blocks = [*fenced, *map(textwrap.dedent, indented)]
    return [block for block in blocks if re.search(r"^model ", block, re.M) and "embedding(" in block]


@pytest.mark.parametrize("page", ["README.md", "docs/language.md"])
def test_whole_programs_compile(page: str) -> None:
    found = programs(page)
    assert found
    for text in found:
        assert run(elaborate(Source(page, text)))[-1].program.name == "gpt"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_names_of_tests_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    file = ""
    for name, test in re.findall(r"`(?:tests/)?((?:\w+/)?test_\w+\.py)?::(\w+)`", text):
        file = name or file  # `::name` is of the file named before
        assert f"def {test}(" in TESTS.get(file, ""), f"{file}::{test}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for named in re.findall(r"(?:examples|benchmarks|docs|tests)/[\w/]+\.(?:py|md|tfg|txt)", text):
        assert (ROOT / named).exists(), named


def test_each_operation_is_specified() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    specified = {name for text in re.findall(r"`([^`]+)`", page) for name in re.findall(r"\w+", text)}
    assert specified >= NAMES


def test_constants_of_the_specification_are_those_of_functions() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    places = np.linspace(-3, 3, 600_001)
    erf = np.vectorize(math.erf)(places / math.sqrt(2))
    for least, values in (("-0.16997", places * (1 + erf) / 2), ("-0.27846", places / (1 + np.exp(-places)))):
        assert least in page
        assert f"{values.min():.5f}" == least
