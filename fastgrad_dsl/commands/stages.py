"""`fastgrad stages`: programs as text, in colour on a terminal that has some."""

from __future__ import annotations

from fastgrad_compiler.pipeline import Stage
from fastgrad_dsl.commands.terminal import console


def print_stage(stage: Stage) -> None:
    """The program as a pass left it."""
    text = str(stage)
    if console().color_system is not None:
        from pygments import highlight
        from pygments.formatters import TerminalFormatter

        from fastgrad_grammar.highlight import ProgramLexer

        text = highlight(text, ProgramLexer(), TerminalFormatter()).rstrip("\n") + "\n"
    print(text)
