"""Parsing a text that is being edited: only the items that changed are read again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.parser import MAX_DIAGNOSTICS, parse_tolerant
from fastgrad_grammar.read import MAX_BYTES
from fastgrad_grammar.source import Source, Span

_HEAD = re.compile(r"^(?:use|param|dim|block|model|objective|budget)\b", re.MULTILINE)
_NOTHING = re.compile(r"(?:\s|#[^\n]*)*\Z")
_OF_THE_WHOLE = frozenset({"FG102", "FG103", "FG106"})
"""Codes about brackets: which one is at fault, all of the text decides."""


@dataclass(frozen=True)
class Parsed:
    """A text and its tree; with `diagnostics` the tree lacks what is wrong, and is None if there is little left."""

    source: Source
    tree: ast.File | None
    diagnostics: tuple[Diagnostic, ...] = ()

    def whole(self) -> ast.File:
        """The tree. Raises TfgError for a text with errors."""
        if self.diagnostics or self.tree is None:
            raise TfgError(self.diagnostics)
        return self.tree


class _Read(NamedTuple):
    """A piece of a text without errors: where it was read, and what it is."""

    source: Source
    start: int
    items: tuple[ast.Item, ...]


class ItemParser:
    """The parser of one document. It gives what `parse_tolerant` gives, and knows the items of the last text."""

    def __init__(self) -> None:
        self._known: dict[str, _Read] = {}
        self._last: Parsed | None = None

    def parse(self, source: Source) -> Parsed:
        """The tree of a text, with every error in it."""
        if (
            self._last is None
            or self._last.source.text != source.text
            or self._last.source.path != source.path
        ):
            self._last = self._by_items(source) or _at_once(source)
        return self._last

    def _by_items(self, source: Source) -> Parsed | None:
        """None where the text must be read as a whole."""
        heads = [head.start() for head in _HEAD.finditer(source.text)]
        if not heads or len(source.text) > MAX_BYTES or not _NOTHING.match(source.text, 0, heads[0]):
            return None
        known: dict[str, _Read] = {}
        items: list[ast.Item] = []
        errors: list[Diagnostic] = []
        bounds = [*heads, len(source.text)]
        for place, (start, end) in enumerate(zip(heads, bounds[1:], strict=True)):
            text = source.text[start:end]
            read = known.get(text) or self._known.get(text)
            if read is None:
                found, wrong = _piece(source, start, end, bounds[min(place + 2, len(bounds) - 1)])
                if found is None or any(each.code in _OF_THE_WHOLE for each in wrong):
                    return None
                errors += wrong
                read = _Read(source, start, found)
                if wrong:
                    items += found
                    continue
            read = _moved_to(read, source, start, end)
            known[text] = read
            items += read.items
        if len(errors) >= MAX_DIAGNOSTICS:
            return None
        self._known = known
        return Parsed(source, ast.File(Span(source, 0, len(source.text)), tuple(items)), tuple(errors))


def _piece(
    source: Source, start: int, end: int, beyond: int
) -> tuple[tuple[ast.Item, ...] | None, list[Diagnostic]]:
    """The items of a piece and its errors; these depend on that the text goes on, up to `beyond`."""
    file, errors = parse_tolerant(source, start, end)
    if errors and beyond > end:
        file, errors = parse_tolerant(source, start, beyond)
        errors = [each for each in errors if each.span is None or each.span.start < end]
    if file is None:
        return None, errors
    return tuple(_sound(item for item in file.items if item.span.start < end)), errors


def _at_once(source: Source) -> Parsed:
    file, errors = parse_tolerant(source)
    if file is not None and errors:
        file = ast.File(file.span, tuple(_sound(file.items)))
    return Parsed(source, file, tuple(errors))


def _sound(items: Iterable[ast.Item]) -> Iterator[ast.Item]:
    """Without blocks whose head stands in for a broken one: its name is not in the text."""
    for item in items:
        if not isinstance(item, ast.BlockDecl) or item.name.span.text == item.name.text:
            yield item


def _moved_to(read: _Read, source: Source, start: int, end: int) -> _Read:
    """The same piece at another place; as it is where nothing before its end changed."""
    if read.source is source and read.start == start:
        return read
    if read.start == start and read.source.text[:end] == source.text[:end]:
        return read
    move = _Move(source, start - read.start)
    return _Read(source, start, tuple(map(move.node, read.items)))


@dataclass(frozen=True)
class _Move:
    """Copies trees to another place of another text. Constructors check nothing that a copy could break."""

    source: Source
    by: int

    def node(self, node: Any) -> Any:
        copy = object.__new__(type(node))
        for name, value in vars(node).items():
            copy.__dict__[name] = self.value(value)
        return copy

    def value(self, value: Any) -> Any:
        if isinstance(value, Span):
            return Span(self.source, value.start + self.by, value.end + self.by)
        if isinstance(value, ast.Node):
            return self.node(value)
        return tuple([self.value(each) for each in value]) if isinstance(value, tuple) else value
