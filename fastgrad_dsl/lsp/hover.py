"""What a name or an expression is: its type, what is proved of its range, and what an attention will be."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lsprotocol import types

from fastgrad_dsl.lsp.library import Views, block_of, parameter_of, qualifier
from fastgrad_dsl.lsp.operations import operation_forms, operation_signature, rows
from fastgrad_dsl.lsp.symbols import Occurrence
from fastgrad_dsl.lsp.syntax import EXPRESSIONS, around
from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.words import (
    attention_text,
    code,
    comment_above,
    comment_of_file,
    joined,
    plain,
    range_text,
    signature,
)
from fastgrad_grammar import ast
from fastgrad_grammar.source import Span

_BLOCKS = ("block", "model")


def hover(view: View, position: types.Position, views: Views) -> types.Hover | None:
    """All that is known of what stands at a place; None where that is nothing."""
    found = view.occurrence(position)
    syntax = around(view.items(), view.offset(position))
    if found is None:
        parts = list(_expression(view, syntax, view.offset(position)))
        span = syntax[-1].span if parts else None
        parts = parts or list(_operation(view, position))
    else:
        parts, span = list(_name(view, found, syntax, views)), found.span
    text = "\n\n".join(part for part in parts if part)
    folder = os.path.dirname(view.path)
    text = (
        text.replace(f"{folder.rstrip('/')}/", "") if folder else text
    )  # reasons name files by their places
    if not text:
        return None
    place = view.range(span) if span is not None and view.source.text == view.lines.text else None
    return types.Hover(types.MarkupContent(types.MarkupKind.Markdown, text), place)


# ---------------------------------------------------------------- names


def _name(view: View, found: Occurrence, syntax: list[ast.Node], views: Views) -> Iterator[str]:
    if found.kind in _BLOCKS:
        yield from _block(view, found, views)
        yield from _attention_of_call(view, syntax, found.span)
    elif found.kind == "parameter":
        parameter = parameter_of(found.symbol, views)
        if parameter is not None:
            yield code(parameter.span.text)
            yield f"a parameter of `{found.symbol.space.removeprefix('block ')}`"
    elif found.kind == "use":
        path = view.used.get(found.symbol.name, "")
        yield code(f"use {found.symbol.name}" if path == "std" else f'use "{path}" as {found.symbol.name}')
    elif found.kind == "label":
        yield from _label(view, syntax, found)
    elif found.kind == "objective":
        yield code(f"objective {found.symbol.name}")
    else:
        yield from _value(view, found)


def _block(view: View, found: Occurrence, views: Views) -> Iterator[str]:
    block = block_of(found.symbol, views)
    if block is None:
        return
    yield code(signature(block, qualifier(view, found.symbol.path)))
    comment = comment_above(block.span.source, block)
    if found.symbol.path == "std":
        comment = "\n\n".join(filter(None, (comment, _of_its_file(block))))
    if comment:
        yield code_of_comment(comment)


def _of_its_file(block: ast.BlockDecl) -> str:
    """The comment at the head of a file of the library says what parameters mean; the first block has it as its own."""
    head = comment_of_file(block.span.source)
    return "" if head == comment_above(block.span.source, block) else head


def code_of_comment(comment: str) -> str:
    """A comment as it is written: it may hold tables, and nothing in it is Markdown."""
    return f"```text\n{comment.replace('```', '')}\n```"


_WHAT = {"size": "dim", "local": "", "index": "index", "input": "", "value": ""}


def _value(view: View, found: Occurrence) -> Iterator[str]:
    """A name of a block, a param or a dim: what it is here, in every instance of its block."""
    bound = view.index.definition_before(found.symbol, found.span.start)
    values = view.values(found.span)
    if not values and bound is not None:
        values = view.values(bound.span)
    node = bound.node if bound is not None else None
    known = bound.kind if bound is not None else found.kind
    kind = _WHAT.get(known, known)
    name = f"{kind} {found.symbol.name}".strip()
    if known == "dim" and node is not None:
        yield code(node.text.strip())
    elif values and known in ("param", "size", "index"):
        yield code(f"{name} = {joined(values)}")
    elif values:
        yield code(f"{name}: {joined(values)}")
    elif node is not None and known in ("input", "value", "weight", "buffer", "param"):
        yield code(node.text.strip())
    else:
        yield code(name)
    yield range_text(view.bounds(found.span) or (view.bounds(node) if node is not None else ()))
    if bound is not None and known in ("param", "dim"):
        yield plain(comment_above(view.source, ast.Name(node or bound.span, "")))


def _label(view: View, syntax: list[ast.Node], found: Occurrence) -> Iterator[str]:
    yield code(f"as {found.symbol.name}")
    yield from _attention_of_call(view, syntax, found.span)


def _attention_of_call(view: View, syntax: list[ast.Node], name: Span) -> Iterator[str]:
    """What is known of the call whose name or label this is, and of the attentions that it leads to."""
    call = next((each for each in reversed(syntax) if isinstance(each, ast.Call)), None)
    if call is None or call.span.start > name.start:
        return
    values = view.values(call.span)
    if values:
        yield f"gives `{joined(values)}`"
        yield range_text(view.bounds(call.span))
    yield attention_text(view.attentions(call.span))


# ---------------------------------------------------------------- expressions and operations


def _expression(view: View, syntax: list[ast.Node], offset: int) -> Iterator[str]:
    """An operator, a literal or the call of an operation; then the attention that it is a part of."""
    expressions = [each for each in syntax if isinstance(each, EXPRESSIONS)]
    if not expressions:
        return
    inner = expressions[-1]
    if isinstance(inner, ast.Call) and inner.module is None and _within(inner.function.span, offset):
        yield from operation_text(inner.function.text)
    values = view.values(inner.span)
    if values and not isinstance(inner, ast.Literal):
        yield code(joined(values))
        yield range_text(view.bounds(inner.span))
    for each in reversed(expressions):
        entries = view.attentions(each.span)
        if entries:
            yield attention_text(entries)
            return


def _within(span: Span, offset: int) -> bool:
    return span.start <= offset <= span.end


def operation_text(name: str) -> Iterator[str]:
    """How an operation is called, and its row in docs/language.md."""
    forms = operation_forms(name)
    if forms:
        yield code("\n".join(map(operation_signature, forms)))
        yield rows()[name].meaning if name in rows() else ""


def _operation(view: View, position: types.Position) -> Iterator[str]:
    """The operation whose name is spelled in a statement that is broken."""
    place = view.word(view.lines.offset(position))
    if place is not None and view.parsed.diagnostics:
        yield from operation_text(view.lines.text[slice(*place)])
