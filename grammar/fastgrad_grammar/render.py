"""Diagnostics as text: headline, place, source line, carets, notes and help."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastgrad_grammar.diagnostics import Diagnostic, Note
from fastgrad_grammar.quote import terminal
from fastgrad_grammar.source import Span

MAX_COLUMNS = 100
"""A longer source line is cut to this many columns around the place that matters."""

_CONTEXT = 40  # columns kept before that place
_TAB = "    "
_ELIDED = "..."
_COLOURS = {"error": "1;31", "warning": "1;33", "note": "1;36", "help": "1;32", "gutter": "1;34", "bold": "1"}


def render(diagnostics: Iterable[Diagnostic], *, colour: bool = False) -> str:
    """Every diagnostic as a terminal shows it, and a count if there is more than one; ends with a newline.

    `colour` adds ANSI sequences; callers ask for it only where the text goes to a terminal.
    """
    found = list(diagnostics)
    painter = _Painter(colour)
    parts = ["\n".join(_diagnostic(diagnostic, painter)) for diagnostic in found]
    if len(found) > 1:
        parts.append(_summary(found))
    return "".join(f"{part}\n" for part in "\n\n".join(parts).split("\n")) if parts else ""


@dataclass(frozen=True)
class _Painter:
    enabled: bool

    def __call__(self, kind: str, text: str) -> str:
        return f"\x1b[{_COLOURS[kind]}m{text}\x1b[0m" if self.enabled and text else text


def _summary(found: list[Diagnostic]) -> str:
    counts = [(sum(one.severity == kind for one in found), kind) for kind in ("error", "warning")]
    return ", ".join(f"{count} {kind}{'s' if count > 1 else ''}" for count, kind in counts if count)


def _diagnostic(diagnostic: Diagnostic, paint: _Painter) -> Iterator[str]:
    kind = "error" if diagnostic.severity == "error" else "warning"
    yield paint(kind, f"{kind}[{diagnostic.code}]") + paint("bold", f": {terminal(diagnostic.message)}")
    spans = [
        span for span in (diagnostic.span, *(note.span for note in diagnostic.notes)) if span is not None
    ]
    width = max((len(str(_last_line(span))) for span in spans), default=1)
    if diagnostic.span is not None:
        yield from _snippet(diagnostic.span, diagnostic.label, width, "^", kind, paint)
    margin = " " * (width + 1) + paint("gutter", "=") + " "
    for note in diagnostic.notes:
        if note.span is None:
            yield f"{margin}{paint('bold', 'note')}: {terminal(note.message)}"
    for line in diagnostic.help:
        yield f"{margin}{paint('help', 'help')}: {terminal(line)}"
    for note in diagnostic.notes:
        yield from _note(note, width, paint)


def _note(note: Note, width: int, paint: _Painter) -> Iterator[str]:
    if note.span is not None:
        yield f"{paint('note', 'note')}: {terminal(note.message)}"
        yield from _snippet(note.span, "", width, "-", "note", paint)


# ---------------------------------------------------------------- source lines


def _last_line(span: Span) -> int:
    return span.source.position(max(span.start, span.end - 1))[0]


def _snippet(span: Span, label: str, width: int, mark: str, kind: str, paint: _Painter) -> Iterator[str]:
    """The place, and the first and last line of the span with their characters marked."""
    source = span.source
    first, column = source.position(span.start)
    last = _last_line(span)
    bar = paint("gutter", "|")
    yield f"{' ' * width}{paint('gutter', '-->')} {terminal(source.path)}:{first}:{column}"
    yield f"{' ' * (width + 1)}{bar}"
    for number in dict.fromkeys((first, last)):
        if number == last and last > first + 1:
            yield paint("gutter", _ELIDED)
        text, marks = _marked_line(span, number, mark)
        words = f" {terminal(label)}" if label and number == last else ""
        yield f"{paint('gutter', f'{number:>{width}} |')} {text}".rstrip()
        yield f"{' ' * (width + 1)}{bar} {marks[0]}{paint(kind, marks[1] + words)}"


def _marked_line(span: Span, number: int, mark: str) -> tuple[str, tuple[str, str]]:
    """A source line as shown, and below it the blanks and marks for its part of the span."""
    text = span.source.line(number)
    line_start = span.source.line_start(number)
    start = max(span.start - line_start, 0) if span.start >= line_start else _indentation(text)
    end = min(span.end - line_start, len(text))
    start = min(start, len(text))
    low, high = max(0, start - _CONTEXT), start + MAX_COLUMNS
    if len(text) <= MAX_COLUMNS:
        low, high = 0, len(text)
    before, inside = _show(text[low:start]), _show(text[start : min(end, high)])
    after = _show(text[max(start, min(end, high)) : high])
    head = _ELIDED if low else ""
    tail = _ELIDED if high < len(text) else ""
    blanks = " " * (len(head) + _columns(before))
    return f"{head}{before}{inside}{after}{tail}", (blanks, mark * max(1, _columns(inside)))


def _indentation(text: str) -> int:
    return len(text) - len(text.lstrip())


def _show(text: str) -> str:
    """Text of a source line as it is safe to print, with tabs widened."""
    return terminal(text.replace("\t", _TAB))


def _columns(text: str) -> int:
    """How many terminal columns a text takes."""
    if text.isascii():
        return len(text)
    return sum(_width(char) for char in text)


def _width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1
