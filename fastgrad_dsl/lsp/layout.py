"""The layout of a document: formatting it, and what can be folded."""

from __future__ import annotations

from lsprotocol import types

from fastgrad_dsl.lsp.view import View
from fastgrad_grammar import ast
from fastgrad_grammar.comments import find_comments
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.format import format_source
from fastgrad_grammar.source import Source, Span


def formatting(view: View) -> list[types.TextEdit]:
    """The edit that gives a document its layout: of the lines that change. None for a text with syntax errors."""
    text = view.lines.text
    try:
        new = format_source(Source(view.path, text))
    except TfgError:
        return []
    if new == text:
        return []
    before, after = text.splitlines(keepends=True), new.splitlines(keepends=True)
    head = _shared(before, after)
    tail = _shared(before[head:][::-1], after[head:][::-1])
    start = types.Position(head, 0)
    end = types.Position(len(before) - tail, 0) if tail else view.lines.position(len(text))
    return [types.TextEdit(types.Range(start, end), "".join(after[head : len(after) - tail]))]


def _shared(first: list[str], second: list[str]) -> int:
    """How many lines are the same at the beginning of both."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def folding(view: View) -> list[types.FoldingRange]:
    """The bodies of blocks, budgets, repeats and conditions, signatures of several lines, and comments."""
    found = [
        types.FoldingRange(first, last - 1 if brace else last)
        for span, brace in _spans(view)
        for first, last in [(view.range(span).start.line, view.range(span).end.line)]
        if last - brace > first
    ]
    return [*found, *_comments(view)]


def _spans(view: View) -> list[tuple[Span, bool]]:
    """(span, whether it ends with a brace) of what can be folded."""
    spans: list[tuple[Span, bool]] = []
    for item in view.items():
        spans.append((item.span, isinstance(item, ast.BlockDecl | ast.Budget)))
        if isinstance(item, ast.BlockDecl):
            for each in ast.walk(item.body):
                spans.append((each.span, isinstance(each, ast.Repeat | ast.If)))
    return spans


def _comments(view: View) -> list[types.FoldingRange]:
    lines = [
        comment.line - 1
        for comment in find_comments(Source(view.path, view.lines.text))
        if _alone(view, comment.offset)
    ]
    found: list[types.FoldingRange] = []
    for line in lines:
        if found and found[-1].end_line == line - 1:
            found[-1].end_line = line
        else:
            found.append(types.FoldingRange(line, line, kind=types.FoldingRangeKind.Comment))
    return [each for each in found if each.end_line > each.start_line]


def _alone(view: View, offset: int) -> bool:
    start = view.lines.text.rfind("\n", 0, offset) + 1
    return not view.lines.text[start:offset].strip()
