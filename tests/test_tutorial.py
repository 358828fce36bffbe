"""The tutorial and the guides do what they show: files are written, commands run, and outputs are those of the page.

Every command line of every page names a command and options that exist.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from fastgrad_dsl.commands import cli

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = ("tutorial", "which-attention", "from-pytorch", "from-transformers", "notebooks")
QUICK = ("check", "advise", "import", "export", "fmt", "graph", "stages")
"""Commands that are run where nothing is trained or measured."""

BLOCK = re.compile(r"^```(console|tfg|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(name: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))


def write(text: str) -> None:
    """A block that begins with the name of a file: the file, or something at its end or within its last braces."""
    first, rest = text.split("\n", 1)
    found = re.fullmatch(r"# (at the end of )?([\w.]+)(, inside the braces of budget)?", first)
    if found is None:
        return
    file = Path(found[2])
    if found[3]:
        whole = file.read_text(encoding="utf-8").rstrip()
        assert whole.endswith("}")
        file.write_text(f"{whole[:-1]}{rest}}}\n", encoding="utf-8")
    elif found[1]:
        file.write_text(file.read_text(encoding="utf-8") + "\n" + rest, encoding="utf-8")
    else:
        file.write_text(text, encoding="utf-8")


def commands(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """The command lines of a block, each with the lines of output below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, *shown = part.rstrip("\n").split("\n")
        yield shlex.split(line, comments=True), shown


def run(arguments: list[str]) -> str:
    """All that a command prints, if its status is 0, or 2 for a shown error."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    text = printed.getvalue()
    assert ended.value.code in (0, 2), text
    assert (ended.value.code == 2) == ("error[" in text), text
    return text


def steady(line: str) -> str:
    """A line without the numbers that are measured or estimated, since those are a machine's."""
    return (
        re.sub(r"\d[\d.,e+-]*", "#", line) if re.search(r"\((?:measured|estimate)", line) else line.rstrip()
    )


def follow(name: str, only: tuple[str, ...] = (), *, whole: bool = False) -> None:
    """Do what a page says, in the present folder; `only` these commands, and Python where there is no such choice.

    Shown lines are parts of the output; `whole`: they are all of it, apart from what is said about building kernels.
    """
    namespace: dict[str, object] = {}
    for kind, text in blocks(name):
        if kind == "tfg":
            write(text)
        elif kind == "python" and not only:
            exec(compile(text, f"{name}.md", "exec"), namespace)
        elif kind == "console":
            for arguments, shown in commands(text):
                if not only or arguments[1] in only:
                    printed = run(arguments)
                    if whole:
                        lines = [
                            line for line in printed.splitlines() if not line.startswith("fastgrad: building")
                        ]
                        assert [*map(steady, shown)] == [*map(steady, lines)]
                        continue
                    for line in shown:
                        assert line.rstrip() in printed, (arguments, line, printed)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with contextlib.chdir(tmp_path), mock.patch.dict(os.environ, COLUMNS="200"):
        yield tmp_path


@pytest.mark.parametrize("name", ["which-attention", "from-pytorch", "from-transformers", "notebooks"])
def test_a_guide(place: Path, name: str) -> None:
    follow(name)


@pytest.mark.medium
def test_first_sessions(place: Path) -> None:
    follow("first-sessions", whole=True)
    assert (place / "poem.html").is_file()


def test_files_and_decisions_of_the_tutorial(place: Path) -> None:
    follow("tutorial", QUICK)
    assert (place / "first.tfg").read_text().rstrip().endswith('at "*" degree = 2\n}')


@pytest.mark.slow
def test_the_tutorial(place: Path) -> None:
    """Every command and snippet: it builds kernels, trains and measures."""
    follow("tutorial")
    assert (place / "first.html").is_file()
    assert (place / "runs/first/weights.safetensors").is_file()


def lines_of_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))  # commands on several lines
        for line in re.findall(
            r"^(?:    |\$ |    \$ )?(fastgrad [a-z]+ .*|fastgrad [a-z]+)$", text, re.MULTILINE
        ):
            if not re.search(r"[A-Z]{2,}\||\.\.\.", line):
                line = re.sub(r"--threads \d+", "--threads 1", line)  # as many as this machine has
                found.append((page.name, line.split(" > ")[0]))
    return found


@pytest.mark.parametrize(("page", "line"), lines_of_commands())
def test_a_command_of_a_page_exists(page: str, line: str) -> None:
    group = get_command(cli.app)
    assert isinstance(group, TyperGroup)
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = group.commands.get(name)
    assert command is not None, line
    command.make_context(
        name, arguments
    )  # raises for an option that is not there, or a value it does not take


def test_command_lines_are_found() -> None:
    assert len(lines_of_commands()) > 40
