"""Specs whose file names, imports, comments and strings are meant as code: nothing of them runs or is obeyed."""

from __future__ import annotations

import ast
import builtins
import io
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from rich.table import Table

import fastgrad_dsl as fg
from attack.quoting import PARTS, is_shown, undone
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.commands import terminal
from fastgrad_dsl.commands.cli import main
from fastgrad_dsl.report.document import build_report
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.render import render

PAYLOAD = '__import__("builtins").__dict__.__setitem__("pwned",1)'
NAMES = (
    f'a"+str({PAYLOAD})+"',
    f"a'+str({PAYLOAD})+'",
    f'a""";{PAYLOAD};"""',
    f'"""\n{PAYLOAD}\n"""',
    f"a\n{PAYLOAD}\n#",
    f"a\r{PAYLOAD}#",
    f"a\x0c\n        {PAYLOAD}",
    f"a\u2028{PAYLOAD}",
    "a\\",
    "bob's",
    '"',
    '\\"',
    "\x1b[2J\x07\u202e",
    "[red]a[|red]",
    "[|]",
    "<script>pwned=1",
    "{{ 7*7 }}",
    "%s{x}",
    "\udcff",
    "# coding: utf-7",
)
SPEC = """use "{used}.tfg" as parts
dim b
dim n <= 64 % 2
model tiny(x: float[b, n, 4]) -> float[b, n, 4] {{  # {comment}
    y = parts.twice(x)  # {comment}
    return softmax(y @ y.T) @ y  # {comment}
}}
objective loss(y: float[b, n, 4]) = mean(y)  # {comment}
"""
USED = """block twice(x: float[b, n, 4]) -> float[b, n, 4] {
    weight w: float[4] = ones()
    return 2 * x * w
}
"""
PLAIN = "bounded"


@pytest.fixture(autouse=True)
def nothing_ran() -> Iterator[None]:
    """No payload of a test was run."""
    yield
    assert not hasattr(builtins, "pwned")


def write(folder: Path, name: str, comment: str) -> Path:
    """A spec NAME.tfg that uses another of nearly the same name, where a string of the language can say it."""
    used = "plain" if {"\r", "\udcff"} & set(name) else f"used {name}"
    (folder / f"{used}.tfg").write_text(USED, encoding="utf-8")
    said = used.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    path = folder / f"{name}.tfg"
    path.write_text(SPEC.format(used=said, comment=comment), encoding="utf-8", newline="")
    return path


def compiled(folder: Path, name: str, comment: str = "") -> Compiled:
    return fg.compile(write(folder, name, comment), target="torch", validate=False)


def tree(text: str) -> str:
    """The syntax tree of a module, without what its strings say."""
    found = ast.parse(text)
    for node in ast.walk(found):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.dump(found)


@cache
def plain_trees() -> dict[str, str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return {file: tree(text) for file, text in compiled(Path(folder), PLAIN).modules.items()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_name_changes_strings_and_comments_only(name: str, tmp_path: Path) -> None:
    made = compiled(tmp_path, name, comment=name.replace("\n", " ").replace("\r", " ").replace("\udcff", ""))
    assert {file: tree(text) for file, text in made.modules.items()} == plain_trees()
    for text in made.files.values():
        text.encode()
    model = made.module()
    with pytest.raises(
        ValueError, match=r"dim n is 63, but (.|\n)+\.tfg:3 declares a multiple of 2"
    ) as refused:
        model(torch.zeros(1, 63, 4))
    assert undone(f"{name}.tfg:3") in undone(str(refused.value))
    assert is_shown(str(refused.value))
    assert is_shown(made.modules["model.py"], "\n")
    printed = print_program(made.program)
    assert is_shown(printed, "\n")
    assert print_program(parse_program(printed)) == printed


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_commands_obey_no_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(write(Path(), name, "a"))
    missing = f"{name}.not"
    commands = (
        ("check", file),
        ("stages", file, "--after", "plan"),
        ("compile", file, "-o", f"out {name}", "--target", "torch", "--no-validate"),
        ("report", f"out {name}", "--dim", "n=4"),
        ("check", missing),
    )
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["fastgrad", *command])
        with pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        assert (ended.value.code or 0) == (2 if command[1] == missing else 0), output.err
        assert is_shown(output.out + output.err, "\n")
        assert "[red]" not in name or "[red]" in output.out + output.err


@pytest.mark.medium
def test_comments_of_all_kinds_give_packages_that_load(tmp_path: Path) -> None:
    for place, part in enumerate(PARTS):
        comment = part.encode("utf-8", "ignore").decode().replace("\n", " ").replace("\r", " ")
        made = compiled(tmp_path, f"plain{place}", comment)
        assert tree(made.modules["model.py"]) == plain_trees()["model.py"]
        assert is_shown(made.modules["model.py"], "\n")
        made.module()


def test_commands_that_reproduce_a_report_run_nothing_else(tmp_path: Path) -> None:
    """A plan.json with code for a shell in each of its strings; its commands are split as a shell does."""
    made = compiled(tmp_path, PLAIN)
    params = {"$(touch pwned)": "`touch pwned`"}
    plan = replace(made.plan_document, model="m; touch pwned", source="a b.tfg;touch pwned", params=params)
    commands = build_report(plan).reproduce.commands
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        done = subprocess.run(["bash", "-c", f"fastgrad() {{ printf '%s\\0' fastgrad \"$@\"; }}; {command}"],
                              cwd=tmp_path, capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout.split("\0")[:-1] == words
    assert not (tmp_path / "pwned").exists()


# ---------------------------------------------------------------- the terminal


def test_a_console_obeys_nothing_in_texts() -> None:
    for text in PARTS:
        out = terminal.PlainConsole(width=400)
        out.file = io.StringIO()
        table = Table(box=None, title=text)
        table.add_column(text)
        table.add_row(text)
        out.print(text)
        out.print(table)
        shown = out.file.getvalue()
        assert is_shown(shown, "\n")
        if is_shown(text) and text.strip() == text:
            assert shown.count(text) >= 4


def test_a_spinner_reads_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    made = terminal.PlainConsole(width=100)
    monkeypatch.setattr(type(made), "is_terminal", True)
    made.file, made.is_interactive = out, True
    monkeypatch.setattr(terminal, "console", lambda **_: made)
    with terminal.progress("measuring") as tell:
        tell("[/red] [bold]a\x1b]0;title\x07")
    assert "\x07" not in out.getvalue()
    assert "[bold]a" in out.getvalue()


def test_source_lines_in_diagnostics_are_shown_not_obeyed(tmp_path: Path) -> None:
    for part in PARTS:
        path = tmp_path / "spec.tfg"
        path.write_bytes(f"model {part} \x1b[31m".encode(errors="ignore"))
        with pytest.raises(TfgError) as found:
            fg.compile(path)
        assert is_shown(render(found.value.diagnostics), "\n")
