"""What a document declares, as a tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lsprotocol import types

from fastgrad_dsl.lsp.view import View
from fastgrad_dsl.lsp.words import signature
from fastgrad_grammar import ast

_Kind = types.SymbolKind


def outline(view: View) -> list[types.DocumentSymbol]:
    """The items of a document, with the weights, labels and repeats of each block."""
    return list(_items(view))


def _items(view: View) -> Iterator[types.DocumentSymbol]:
    for item in view.items():
        match item:
            case ast.Use():
                yield _symbol(view, item, item.name, _Kind.Module)
            case ast.Param():
                yield _symbol(view, item, item.name, _Kind.Constant, item.value.span.text)
            case ast.DimDecl():
                yield _symbol(view, item, item.name, _Kind.TypeParameter)
            case ast.BlockDecl():
                kind = _Kind.Class if item.is_model else _Kind.Function
                detail = signature(item).partition(item.name.text)[2]
                yield _symbol(view, item, item.name, kind, detail, _statements(view, item.body))
            case ast.Objective():
                yield _symbol(view, item, item.name, _Kind.Function)
            case ast.Budget():
                name = item.model or ast.Name(item.span, "budget")
                yield _symbol(view, item, name, _Kind.Object)


def _statements(view: View, body: Iterable[ast.Statement]) -> Iterator[types.DocumentSymbol]:
    for statement in body:
        match statement:
            case ast.Weight() | ast.Buffer():
                yield _symbol(view, statement, statement.name, _Kind.Field, statement.type.span.text)
            case ast.Repeat():
                inner = _statements(view, statement.body)
                count = f"in {statement.count.span.text}"
                yield _symbol(view, statement, statement.index, _Kind.Array, count, inner)
            case ast.If():
                yield from _statements(view, (*statement.then, *statement.otherwise))
            case ast.Assign(value=ast.Call(label=ast.Name() as label)):
                yield _symbol(view, statement, label, _Kind.Key)


def _symbol(
    view: View,
    node: ast.Node,
    name: ast.Name,
    kind: types.SymbolKind,
    detail: str = "",
    children: Iterable[types.DocumentSymbol] = (),
) -> types.DocumentSymbol:
    return types.DocumentSymbol(
        name.text,
        kind,
        view.range(node.span),
        view.range(name.span),
        " ".join(detail.split()),
        children=list(children),
    )
