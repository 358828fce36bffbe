"""Diagnostics have colour on a terminal, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.parser import parse
from fastgrad_grammar.render import render
from fastgrad_grammar.source import Source

ROOT = Path(__file__).parents[2]
BAD = "param depth 6\n"
COMMAND = [sys.executable, "-c", "from fastgrad_dsl.commands.cli import main; main()", "check", "bad.tfg"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")},
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "compiler", ROOT / "grammar"))),
    "TERM": "xterm",
}


def expected(colour: bool) -> str:
    try:
        parse(Source("bad.tfg", BAD))
    except TfgError as error:
        return render(error.diagnostics, colour=colour)
    raise AssertionError("the text is bad")


def test_a_terminal_gets_colour(tmp_path: Path) -> None:
    (tmp_path / "bad.tfg").write_text(BAD)
    terminal, inner = os.openpty()
    status = subprocess.run(COMMAND, cwd=tmp_path, env=ENVIRONMENT, stderr=inner, check=False).returncode
    os.close(inner)
    shown = os.read(terminal, 100_000).decode().replace("\r\n", "\n")
    os.close(terminal)
    assert status == 2
    assert shown == expected(colour=True) != expected(colour=False)
    assert "\x1b[" in shown


def test_a_pipe_gets_none(tmp_path: Path) -> None:
    (tmp_path / "bad.tfg").write_text(BAD)
    result = subprocess.run(
        COMMAND, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", expected(colour=False))
