"""Giving a name another one, wherever it stands; what would change the meaning of a file is refused."""

from __future__ import annotations

import re

from lsprotocol import types

from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_dsl.lsp.navigation import places, views_with
from fastgrad_dsl.lsp.symbols import Occurrence, Symbol
from fastgrad_dsl.lsp.view import STD, View
from fastgrad_dsl.lsp.workspace import Workspace

RESERVED = frozenset(
    (
        *("use", "as", "param", "dim", "block", "model", "objective", "budget", "weight", "buffer", "repeat"),
        *("in", "if", "else", "return", "and", "or", "not", "true", "false", "none"),
    )
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Refused(Exception):
    """Why something is not renamed, for the user."""


def prepare(known: Workspace, view: View, position: types.Position) -> types.Range:
    """Where the name stands that can be renamed. Raises Refused."""
    return view.range(_renamable(view, position).span)


def rename(known: Workspace, view: View, position: types.Position, name: str) -> types.WorkspaceEdit:
    """The edits that rename what stands at a place. Raises Refused."""
    found = _renamable(view, position)
    _check_name(name)
    if name == found.symbol.name:
        return types.WorkspaceEdit(changes={})
    _check_files(known, view, found.symbol)
    all_places = list(places(known, view, found.symbol))
    for other in {id(other): other for other, _ in all_places}.values():
        _check_free(other, found.symbol, name)
    changes: dict[str, list[types.TextEdit]] = {}
    for other, each in all_places:
        changes.setdefault(known.uri(other.path), []).append(types.TextEdit(other.range(each.span), name))
    return types.WorkspaceEdit(changes=changes)


def _renamable(view: View, position: types.Position) -> Occurrence:
    if view.parsed.diagnostics:
        raise Refused("the file has syntax errors: a name in what is broken would be missed")
    found = view.occurrence(position)
    if found is None:
        place = view.word(view.lines.offset(position))
        word = view.lines.text[slice(*place)] if place is not None else ""
        if word in NAMES:
            raise Refused(f"{word} is an operation of the language")
        raise Refused(f"{word} is not a name that the file gives" if word else "there is no name here")
    if found.symbol.path == STD:
        raise Refused(f"{found.symbol.name} is declared in the standard library")
    if found.kind == "use" and view.used.get(found.symbol.name) == STD:
        raise Refused("std is the name of the standard library")
    return found


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise Refused(f"{name!r} is not a name: letters, digits and _, a letter or _ first")
    if name in RESERVED:
        raise Refused(f"{name} is a reserved word")


def _check_files(known: Workspace, view: View, symbol: Symbol) -> None:
    """A file with errors may hold the name where its tree does not show it."""
    word = re.compile(rf"\b{re.escape(symbol.name)}\b")
    for other in views_with(known, view, symbol):
        if other.parsed.diagnostics and word.search(other.lines.text):
            raise Refused(f"{other.path} has syntax errors, and the name stands in it")


def _check_free(view: View, symbol: Symbol, name: str) -> None:
    """Refused where the new name means something already in a place of the old one."""
    taken = view.index.by_symbol
    if symbol.space.startswith(("block ", "objective ")):
        _refuse_if(Symbol(symbol.path, symbol.space, name) in taken, name, "in the block")
        inside = taken.get(Symbol(view.path, "file", name), ())
        block = symbol.space.partition(" ")[2]
        item = view.index.blocks.get(block) if symbol.path == view.path else None
        hidden = item is not None and any(item.span.start <= o.span.start < item.span.end for o in inside)
        _refuse_if(hidden or (symbol.space.startswith("objective ") and bool(inside)), name, "of the file")
    elif symbol.space == "file":
        around = {view.index.space_at(each.span.start) for each in taken[symbol]}
        hidden = any(Symbol(view.path, space, name) in taken for space in (*around, "file"))
        is_param = any(each.kind == "param" for each in taken[symbol])  # which the dims of signatures name
        sized = any(each.kind == "size" and each.symbol.name == name for each in view.index.occurrences)
        _refuse_if(hidden or (is_param and sized), name, "here")
    elif symbol.space == "block":
        _refuse_if(name in NAMES, name, "as an operation")
        _refuse_if(_is_path(view, name) or Symbol(view.path, "block", name) in taken, name, "here")
    elif symbol.space == "label":
        called = any(each.space == "block" and each.name in (name, symbol.name) for each in taken)
        _refuse_if(called or _is_path(view, name), name, "as a part of paths, or the old one is")
    else:
        _refuse_if(Symbol(view.path, symbol.space, name) in taken, name, "here")


def _is_path(view: View, name: str) -> bool:
    """Whether labels or weights have the name: it is a part of paths."""
    kinds = ("label", "weight", "buffer")
    return any(each.kind in kinds and each.symbol.name == name for each in view.index.occurrences)


def _refuse_if(taken: bool, name: str, where: str) -> None:
    if taken:
        raise Refused(f"{name} has a meaning {where} already")
