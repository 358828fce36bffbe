"""Inlay hints: the shape that a statement gives, and what an attention will be."""

from __future__ import annotations

from collections.abc import Iterator

from lsprotocol import types

from fastgrad_compiler.attention.table import AttentionEntry
from fastgrad_compiler.frontend.values import Tensor
from fastgrad_dsl.lsp.syntax import EXPRESSIONS, parts
from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.words import attention_text, decisions, joined
from fastgrad_grammar import ast
from fastgrad_grammar.source import Span


def hints(view: View, within: types.Range) -> list[types.InlayHint]:
    """The hints at the ends of the lines of a range."""
    first, last = within.start.line, within.end.line
    return [hint for hint in _hints(view) if first <= hint.position.line <= last]


def _hints(view: View) -> Iterator[types.InlayHint]:
    for item in view.items():
        for statement in ast.walk(item.body) if isinstance(item, ast.BlockDecl) else ():
            if isinstance(statement, ast.Assign):
                types_ = [_type(view, target.span) for target in statement.targets]
                if all(types_):
                    yield _hint(view, statement.span, f": {', '.join(types_)}")
            if isinstance(statement, ast.Assign | ast.Return):
                entries = _attentions(view, statement.value)
                if entries:
                    text = " | ".join(
                        f"{said} ({len(same)}x)" if len(same) > 1 else said
                        for said, same in decisions(entries)
                    )
                    yield _hint(view, statement.span, f"attention: {text}", attention_text(entries))


def _type(view: View, span: Span) -> str:
    """The type of a name where it is bound; nothing for a compile-time value."""
    values = view.values(span)
    return joined(values) if values and all(isinstance(value, Tensor) for value in values) else ""


def _attentions(view: View, expr: ast.Expr) -> tuple[AttentionEntry, ...]:
    """Those of the outermost expressions of a statement that are attentions or lead to some."""
    found = view.attentions(expr.span)
    if found:
        return found
    inner = (part for part in _inside(expr) if isinstance(part, EXPRESSIONS))
    return tuple(entry for part in inner for entry in _attentions(view, part))


def _inside(node: ast.Node) -> Iterator[ast.Node]:
    for part in parts(node):
        yield from parts(part) if isinstance(part, ast.Argument | ast.Slice) else (part,)


def _hint(view: View, span: Span, text: str, tooltip: str = "") -> types.InlayHint:
    end = view.range(span).end
    place = view.lines.position(view.lines.line_end(view.lines.offset(end)))
    shown = types.MarkupContent(types.MarkupKind.Markdown, tooltip) if tooltip else None
    return types.InlayHint(place, text, padding_left=True, tooltip=shown, kind=types.InlayHintKind.Type)
