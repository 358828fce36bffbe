"""Diagnostics as editors show them: what the terminal prints, file by file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from lsprotocol import types

from fastgrad_compiler.attention.table import LIBRARY
from fastgrad_dsl.lsp.analysis import Analysis
from fastgrad_dsl.lsp.positions import Lines
from fastgrad_grammar.codes import CODES
from fastgrad_grammar.diagnostics import Diagnostic, Note
from fastgrad_grammar.source import Source, Span

SOURCE = "fastgrad"
_ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"
_SEVERITIES = {"error": types.DiagnosticSeverity.Error, "warning": types.DiagnosticSeverity.Warning}


def problems_of(
    analysis: Analysis, uri: Callable[[str], str], encoding: str
) -> dict[str, list[types.Diagnostic]]:
    """The diagnostics of an analysis by the path of the file in which they are shown; its own file is always there."""
    main = analysis.source
    shown: dict[str, list[types.Diagnostic]] = {main.path: []}
    lines: dict[str, Lines] = {}

    def place(span: Span) -> types.Range:
        path = span.source.path
        return lines.setdefault(path, Lines(span.source.text, encoding)).range(span.start, span.end)

    for found in map(_outside_of_library, analysis.diagnostics):
        path = found.span.source.path if found.span is not None else main.path
        shown.setdefault(path, []).append(_problem(found, main, uri, place))
    return shown


def _problem(
    found: Diagnostic, main: Source, uri: Callable[[str], str], place: Callable[[Span], types.Range]
) -> types.Diagnostic:
    notes = [note for note in found.notes if note.span is not None]
    related = [
        types.DiagnosticRelatedInformation(
            types.Location(uri(note.span.source.path), place(note.span)), _relative(note.message, main.path)
        )
        for note in notes
        if note.span is not None
    ]
    start = types.Position(0, 0)
    return types.Diagnostic(
        range=place(found.span) if found.span is not None else types.Range(start, start),
        message=_relative("\n".join(_lines(found)), main.path),
        severity=_SEVERITIES[found.severity],
        code=found.code,
        code_description=_section(found.code),
        source=SOURCE,
        related_information=related or None,
        data={"help": list(found.help)},
    )


def _lines(found: Diagnostic) -> list[str]:
    headline = f"{found.message}: {found.label}" if found.label else found.message
    plain = [f"note: {note.message}" for note in found.notes if note.span is None]
    return [headline, *plain, *(f"help: {line}" for line in found.help)]


def _outside_of_library(found: Diagnostic) -> Diagnostic:
    """What is wrong in a block of the library, at the call that made it so."""
    if found.span is None or not found.span.source.path.startswith(LIBRARY):
        return found
    spans = [note.span for note in found.notes if note.span is not None]
    own = next((span for span in spans if not span.source.path.startswith(LIBRARY)), None)
    within = Note(f"{found.label} (in the standard library)".strip(), found.span)
    return Diagnostic(found.code, found.message, own, "", (within, *found.notes), found.help, found.severity)


def _relative(text: str, path: str) -> str:
    """A message in which files are named from the folder of the one that is checked."""
    folder = os.path.dirname(path)
    return text.replace(f"{folder.rstrip('/')}/", "") if folder else text


@lru_cache(maxsize=1)
def _page() -> str | None:
    """The URI of docs/errors.md, None in an installation without the documentation."""
    return _ERRORS.as_uri() if _ERRORS.exists() else None


def _section(code: str) -> types.CodeDescription | None:
    page = _page()
    return types.CodeDescription(f"{page}#{anchor(code)}") if page is not None else None


def anchor(code: str) -> str:
    """The anchor of a code's section in docs/errors.md, as Markdown viewers name it."""
    words = re.sub(r"[^\w\- ]", "", f"{code}: {CODES[code]}".lower())
    return words.replace(" ", "-")


class Problems:
    """What is shown, by the file that is checked and the file in which it is shown."""

    def __init__(self) -> None:
        self._found: dict[str, Mapping[str, list[types.Diagnostic]]] = {}

    def replace(self, owner: str, found: Mapping[str, list[types.Diagnostic]]) -> list[str]:
        """What a check found takes the place of what it found before; the paths whose diagnostics may have changed."""
        before = self._found.get(owner, {})
        if found:
            self._found[owner] = found
        else:
            self._found.pop(owner, None)
        return list(dict.fromkeys([*before, *found]))

    def of(self, path: str) -> list[types.Diagnostic]:
        """All that is to be shown in a file: what several checks found is shown once."""
        found: dict[tuple[object, ...], types.Diagnostic] = {}
        for shown in self._found.values():
            for each in shown.get(path, ()):
                start = each.range.start
                found.setdefault((each.code, each.message, start.line, start.character), each)
        return list(found.values())
