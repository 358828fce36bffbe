"""What language a block of code is in that does not say so, and code within docstrings."""

from __future__ import annotations

import ast
import re

from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import lex
from fastgrad_grammar.source import Source

_SHELL = re.compile(r"^(?:fastgrad|make|pip|python|torchrun|\.venv/bin/\w+) ", re.MULTILINE)
_TFG = re.compile(
    r"^\s*(?:block|model|param|dim|use|weight|buffer|budget|repeat) |std\.\w+\(|^\s*\w+ = .*;", re.MULTILINE
)
_PIPE = re.compile(
    r"\|(?=(?:[^`]*`[^`]*`)*[^`]*$)"
)  # outside of backticks; elsewhere it would name a substitution
_PYTHON = re.compile(r"^(?:import|from) |\bfg\.|\btorch\.", re.MULTILINE)


def language_of(text: str) -> str:
    """The name of a lexer: `console`, `bash`, `tfg`, `python`, or `text` where nothing is certain."""
    if text.startswith("$ "):
        return "console"
    if "error[FG" in text or "-->" in text:
        return "text"
    if _SHELL.match(text):
        return "bash"
    if _PYTHON.search(text) and _parses(text):
        return "python"
    return "tfg" if _TFG.search(text) and not lex(Source("", text), load_grammar())[1] else "text"


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def as_markdown_code(lines: list[str]) -> list[str]:
    """A docstring for reStructuredText, whose indented blocks after an empty line are code, as in Markdown."""
    found: list[str] = []
    for place, line in enumerate(lines):
        indented = line.startswith("    ")
        follows = place > 0 and not lines[place - 1].strip()
        if indented and follows and not _within(found):
            found += [f".. code-block:: {language_of(line.strip())}", ""]
        found.append(line if indented else _PIPE.sub(r"\|", line))
    return found


def _within(lines: list[str]) -> bool:
    """Whether the last line that is not empty belongs to a block of code already."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.startswith("    ")
