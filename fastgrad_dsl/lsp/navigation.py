"""Where a name is bound, and where else it stands."""

from __future__ import annotations

from collections.abc import Iterator

from lsprotocol import types

from fastgrad_dsl.lsp.library import block_of, parameter_of
from fastgrad_dsl.lsp.positions import Lines, uri_of
from fastgrad_dsl.lsp.symbols import Occurrence, Symbol
from fastgrad_dsl.lsp.view import STD, View
from fastgrad_dsl.lsp.workspace import Workspace
from fastgrad_grammar.source import Span

_SHARED = ("block", "block ")
"""How the spaces begin of names that other files can write: blocks, and their parameters in calls."""


def definition(known: Workspace, view: View, position: types.Position) -> types.Location | None:
    """Where the name at a place was bound last before it; of a used file, the file."""
    found = view.occurrence(position)
    if found is None:
        return None
    if found.kind == "use":
        return _of_use(known, view, found)
    if found.symbol.path == view.path:
        bound = view.index.definition_before(found.symbol, found.span.start)
        return types.Location(known.uri(view.path), view.range(bound.span)) if bound is not None else None
    declared = parameter_of(found.symbol, known.view) or block_of(found.symbol, known.view)
    return _location(known, found.symbol, declared.name.span) if declared is not None else None


def _of_use(known: Workspace, view: View, found: Occurrence) -> types.Location | None:
    """The `use` that a qualifier stands for; from there, the file."""
    item = view.index.uses.get(found.symbol.name)
    if item is not None and not item.span.start <= found.span.start <= item.span.end:
        return types.Location(known.uri(view.path), view.range(item.span))
    path = view.used.get(found.symbol.name)
    if path is None or path == STD:
        return None
    start = types.Position(0, 0)
    return types.Location(known.uri(path), types.Range(start, start))


def _location(known: Workspace, symbol: Symbol, span: Span) -> types.Location | None:
    if symbol.path == STD:
        lines = Lines(span.source.text, known.encoding)
        return types.Location(uri_of(span.source.path), lines.range(span.start, span.end))
    view = known.view(symbol.path)
    return types.Location(known.uri(symbol.path), view.range(span)) if view is not None else None


def references(
    known: Workspace, view: View, position: types.Position, *, declaration: bool
) -> list[types.Location]:
    """Every place of the name at a place, in all files; with `declaration`, where it is bound too."""
    found = view.occurrence(position)
    if found is None:
        return []
    return [
        types.Location(known.uri(other.path), other.range(each.span))
        for other, each in places(known, view, found.symbol)
        if declaration or not each.defines
    ]


def highlights(view: View, position: types.Position) -> list[types.DocumentHighlight]:
    """Every place of the name at a place in its document; where it is bound is a write."""
    found = view.occurrence(position)
    read, write = types.DocumentHighlightKind.Read, types.DocumentHighlightKind.Write
    return [
        types.DocumentHighlight(view.range(each.span), write if each.defines else read)
        for each in (view.index.by_symbol.get(found.symbol, ()) if found is not None else ())
    ]


def places(known: Workspace, view: View, symbol: Symbol) -> Iterator[tuple[View, Occurrence]]:
    """Every occurrence of a symbol, with the view of its file."""
    for other in views_with(known, view, symbol):
        for each in other.index.by_symbol.get(symbol, ()):
            yield other, each


def views_with(known: Workspace, view: View, symbol: Symbol) -> Iterator[View]:
    """The files in which a symbol may stand."""
    shared = symbol.space.startswith(_SHARED)
    for path in known.files(view.path) if shared else [view.path]:
        other = view if path == view.path else known.view(path)
        if other is not None:
            yield other
