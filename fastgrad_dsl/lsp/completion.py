"""What can be written at a place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lsprotocol import types

from fastgrad_compiler.frontend.budgets import RULES, WHOLE
from fastgrad_compiler.frontend.initialisers import INITIALISERS
from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_dsl.lsp.callee import blocks_of, callees, of_block
from fastgrad_dsl.lsp.cursor import Cursor, cursor_at
from fastgrad_dsl.lsp.library import Views
from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.words import joined
from fastgrad_grammar.build import TENSOR_TYPES, VALUE_TYPES
from fastgrad_grammar.source import Source

_Kind = types.CompletionItemKind
_ITEMS = ("use", "param", "dim", "block", "model", "objective", "budget")
_STATEMENTS = ("weight", "buffer", "repeat", "if", "return")
_KINDS = {
    "param": _Kind.Constant,
    "dim": _Kind.TypeParameter,
    "size": _Kind.TypeParameter,
    "value": _Kind.Constant,
    "weight": _Kind.Field,
    "buffer": _Kind.Field,
}


def complete(view: View, position: types.Position, views: Views) -> list[types.CompletionItem]:
    """The completions at a place: each label once, the nearest kind first."""
    offset = view.lines.offset(position)
    cursor = cursor_at(Source(view.path, view.lines.text), offset)
    if cursor.comment:
        return []
    found: dict[str, types.CompletionItem] = {}
    for place, item in enumerate(_candidates(view, cursor, position, views)):
        item.sort_text = f"{place:05}"
        found.setdefault(item.label, item)
    return list(found.values())


def _candidates(
    view: View, cursor: Cursor, position: types.Position, views: Views
) -> Iterator[types.CompletionItem]:
    before = cursor.before
    if cursor.string is not None:
        if before[-1:] == ("AT",):
            yield from _paths(view, cursor.string, position)
    elif before[-1:] == ("DOT",) and len(before) > 1:
        yield from _blocks(view, str(cursor.line[-2]), views)
    elif cursor.body == "BUDGET":
        yield from _budget(cursor)
    elif not before and cursor.body is None:
        yield from _words(_ITEMS)
    elif before in (("USE",), ("PARAM",), ("DIM",), ("BLOCK",), ("MODEL",), ("OBJECTIVE",)):
        yield from _words(("std",) if before == ("USE",) else ())
    elif before[-1:] == ("COLON",) or (before[-1:] == ("ARROW",)):
        yield from _types()
    else:
        yield from _expression(view, cursor, position, views)


def _words(
    words: Iterable[str], kind: types.CompletionItemKind = _Kind.Keyword
) -> Iterator[types.CompletionItem]:
    return (types.CompletionItem(word, kind=kind) for word in words)


def _types() -> Iterator[types.CompletionItem]:
    for name in TENSOR_TYPES:
        yield types.CompletionItem(f"{name}[", kind=_Kind.Struct, detail="a tensor")
    for name in VALUE_TYPES:
        yield types.CompletionItem(name, kind=_Kind.Struct, detail="a compile-time value")


# ---------------------------------------------------------------- budgets


def _budget(cursor: Cursor) -> Iterator[types.CompletionItem]:
    before = cursor.before
    keys, names = (RULES, cursor.line[2:]) if before[:2] == ("AT", "STRING") else (WHOLE, cursor.line)
    if not names:
        for name, key in keys.items():
            sign = "<=" if key.limit else "="
            yield types.CompletionItem(
                name, kind=_Kind.Property, detail=key.expected, insert_text=f"{name} {sign} "
            )
        yield from _words(("exact",) if keys is RULES else ("at",))
    elif len(names) == 2 and str(names[0]) in keys and names[1].type == "ASSIGN":
        yield from _words(keys[str(names[0])].words, _Kind.EnumMember)


def _paths(view: View, written: str, position: types.Position) -> Iterator[types.CompletionItem]:
    """The paths of the model's attentions, and the patterns of those that differ in an index."""
    entries = [entry for model in view.models for entry in model.attentions]
    patterns = dict.fromkeys(
        ".".join("*" if part.isdecimal() else part for part in entry.path.split(".")) for entry in entries
    )
    start = types.Position(position.line, max(position.character - len(written), 0))
    for text in dict.fromkeys([*patterns, *(entry.path for entry in entries)]):
        count = sum(entry.path == text for entry in entries)
        detail = "an attention" if count else "attentions"
        edit = types.TextEdit(types.Range(start, position), text)
        yield types.CompletionItem(text, kind=_Kind.Value, detail=detail, text_edit=edit, filter_text=text)


# ---------------------------------------------------------------- expressions


def _expression(
    view: View, cursor: Cursor, position: types.Position, views: Views
) -> Iterator[types.CompletionItem]:
    if cursor.call is not None and cursor.call.fresh:
        for callee in callees(view, cursor.call.module, cursor.call.name, views):
            for formal in callee.formals:
                if formal.name not in cursor.call.names and not (formal.tensor and cursor.call.behind):
                    yield types.CompletionItem(
                        f"{formal.name} =",
                        kind=_Kind.Property,
                        detail=formal.text,
                        insert_text=f"{formal.name} = ",
                        filter_text=formal.name,
                    )
    if not cursor.before and cursor.body is not None:
        yield from _words(_STATEMENTS)
    if cursor.before[:1] in (("WEIGHT",), ("BUFFER",)) and cursor.before[-1:] == ("ASSIGN",):
        yield from _words(INITIALISERS, _Kind.Function)
    yield from _names(view, position)
    yield from _blocks(view, None, views)
    for name in view.used:
        yield types.CompletionItem(name, kind=_Kind.Module, detail=view.used[name])
    for name in sorted(NAMES):
        for callee in callees(view, None, name, views)[:1]:
            yield types.CompletionItem(
                name, kind=_Kind.Function, detail=callee.text, documentation=callee.documentation
            )


def _names(view: View, position: types.Position) -> Iterator[types.CompletionItem]:
    """The names that are bound before a place in its block, the last ones first, and those of the file."""
    offset = view.offset(position)
    block = view.index.block_at(offset)
    space = f"block {block.name.text}" if block is not None else ""
    seen = [each for each in view.index.occurrences if each.defines and each.span.start < offset]
    for each in reversed([each for each in seen if each.symbol.space == space]):
        values = view.values(each.span)
        yield types.CompletionItem(
            each.symbol.name, kind=_KINDS.get(each.kind, _Kind.Variable), detail=joined(values) or each.kind
        )
    for each in (each for each in view.index.occurrences if each.defines and each.symbol.space == "file"):
        values = view.values(each.span)
        yield types.CompletionItem(
            each.symbol.name, kind=_KINDS[each.kind], detail=joined(values) or each.kind
        )


def _blocks(view: View, module: str | None, views: Views) -> Iterator[types.CompletionItem]:
    for name, block in blocks_of(view, module, views).items():
        if not block.is_model:
            callee = of_block(block, f"{module}." if module else "")
            yield types.CompletionItem(
                name, kind=_Kind.Function, detail=callee.text, documentation=callee.documentation
            )
