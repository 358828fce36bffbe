"""The blocks that a symbol can mean in other places than its document: those of `std`, and of used files."""

from __future__ import annotations

from collections.abc import Callable

from fastgrad_compiler.frontend.modules import standard_library
from fastgrad_dsl.lsp.symbols import Symbol
from fastgrad_dsl.lsp.view import STD, View
from fastgrad_grammar import ast

Views = Callable[[str], View | None]
"""The view of a path: of an open document, or of a file on the disk."""


def block_of(symbol: Symbol, views: Views) -> ast.BlockDecl | None:
    """The block that a symbol names, or of whose parameters it is one; None if there is none."""
    name = symbol.name if symbol.space == "block" else symbol.space.removeprefix("block ")
    if symbol.path == STD:
        return standard_library().blocks.get(name)
    view = views(symbol.path)
    return view.index.blocks.get(name) if view is not None else None


def parameter_of(symbol: Symbol, views: Views) -> ast.TensorParam | ast.ValueParam | None:
    """The parameter of a block that a symbol names."""
    block = block_of(symbol, views) if symbol.space.startswith("block ") else None
    if block is None:
        return None
    declared: list[ast.TensorParam | ast.ValueParam] = [*block.tensors, *block.values]
    return next((each for each in declared if each.name.text == symbol.name), None)


def qualifier(view: View, path: str) -> str:
    """How blocks of a file are written here: `std.`, or nothing for those of the document itself."""
    if path == view.path:
        return ""
    return next((f"{name}." for name, used in view.used.items() if used == path), "")
