"""Which syntax stands at a place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fastgrad_grammar import ast

EXPRESSIONS = (
    ast.Literal,
    ast.Ref,
    ast.Unary,
    ast.Binary,
    ast.Conditional,
    ast.Transpose,
    ast.Index,
    ast.Tuple,
    ast.Call,
)


def around(nodes: Iterable[ast.Node], offset: int) -> list[ast.Node]:
    """The syntax around a place, also if it ends there, the outermost first."""
    found: list[ast.Node] = []
    pending = nodes
    while True:
        inside = [node for node in pending if node.span.start <= offset <= node.span.end]
        node = next((each for each in inside if offset < each.span.end), inside[-1] if inside else None)
        if node is None:
            return found
        found.append(node)
        pending = parts(node)


def parts(node: ast.Node) -> Iterator[ast.Node]:
    """The syntax directly inside of a piece."""
    for value in vars(node).values():
        if isinstance(value, ast.Node):
            yield value
        elif isinstance(value, tuple):
            yield from (each for each in value if isinstance(each, ast.Node))


def calls(node: ast.Node) -> Iterator[ast.Call]:
    """All calls in a piece of syntax, the outer ones first."""
    pending = [node]
    while pending:
        piece = pending.pop()
        if isinstance(piece, ast.Call):
            yield piece
        pending += list(parts(piece))[::-1]
