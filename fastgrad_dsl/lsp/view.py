"""What a request sees: a text, its names, and the facts of the latest analysis that has some.

A text with errors is seen through the tree of what is sound in it; where little is left, through its last tree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from lsprotocol import types

from fastgrad_compiler.attention.table import AttentionEntry
from fastgrad_compiler.frontend.values import Value
from fastgrad_compiler.ir.graph import Bound
from fastgrad_dsl.lsp.analysis import Analysis, ModelFacts, Place
from fastgrad_dsl.lsp.items import Parsed
from fastgrad_dsl.lsp.positions import Lines
from fastgrad_dsl.lsp.shift import Shift
from fastgrad_dsl.lsp.symbols import Index, Occurrence, Symbol, index_of
from fastgrad_grammar import ast
from fastgrad_grammar.source import Source, Span

STD = "std"
"""The path of the symbols of the standard library."""

_Fact = TypeVar("_Fact")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class View:
    """A document at the time of a request; offsets and spans are those of `source`, which its tree was read from."""

    path: str
    lines: Lines
    parsed: Parsed
    used: Mapping[str, str]
    analyses: tuple[tuple[str, Analysis], ...] = ()

    @property
    def source(self) -> Source:
        """The text that the tree was read from."""
        return self.parsed.source

    @cached_property
    def index(self) -> Index:
        """The names of the text."""
        return index_of(self.source, self.parsed.tree, self.used)

    # ------------------------------------------------------------ places

    @cached_property
    def _shift(self) -> Shift:
        return Shift(self.source.text, self.lines.text)

    def offset(self, position: types.Position) -> int:
        """The place in `source` of one in the editor."""
        return self._shift.to_old(self.lines.offset(position))

    def range(self, span: Span) -> types.Range:
        """Where a span of `source` is in the editor."""
        return self.lines.range(self._shift.to_new(span.start), self._shift.to_new(span.end))

    # ------------------------------------------------------------ names

    def occurrence(self, position: types.Position) -> Occurrence | None:
        """The name at a place, also one in a statement that is broken, as far as its spelling says what it means."""
        offset = self.offset(position)
        return self.index.at(offset) or self._spelled(self.lines.offset(position), offset)

    def word(self, offset: int) -> tuple[int, int] | None:
        """The word of the editor's text at an offset, also one that ends there."""
        line = self.lines.text.rfind("\n", 0, offset) + 1
        for found in _WORD.finditer(self.lines.text, line, self.lines.line_end(offset)):
            if found.start() <= offset <= found.end():
                return found.start(), found.end()
        return None

    def _spelled(self, offset: int, old: int) -> Occurrence | None:
        if not self.parsed.diagnostics and self.lines.text == self.source.text:
            return None
        place = self.word(offset)
        if place is None:
            return None
        name, text = self.lines.text[slice(*place)], self.lines.text
        span = Span(self.source, self._shift.to_old(place[0]), self._shift.to_old(place[0]) + len(name))
        before = re.search(r"(\w+)\.$", text[: place[0]])
        if before is not None:
            path = self.used.get(before[1])
            return Occurrence(Symbol(path, "block", name), span, "block") if path else None
        block = self.index.block_at(old)
        spaces = ["block"] if text[place[1] : place[1] + 1] == "(" else []
        spaces += [f"block {block.name.text}"] if block is not None else []
        for space in (*spaces, "file", "block", "use"):
            symbol = Symbol(self.path, space, name)
            if symbol in self.index.by_symbol:
                return Occurrence(symbol, span, self.index.by_symbol[symbol][0].kind)
        return None

    # ------------------------------------------------------------ facts

    def values(self, span: Span) -> tuple[Value, ...]:
        """What an expression, or a name where it is bound, was found to be."""
        return self._facts(span, lambda analysis, place: analysis.values(place))

    def bounds(self, span: Span) -> tuple[Bound, ...]:
        """What is proved of the value of an expression."""
        return self._facts(span, lambda analysis, place: analysis.bounds(place))

    def attentions(self, span: Span) -> tuple[AttentionEntry, ...]:
        """The attentions that an expression is, or that a call leads to."""
        return self._facts(span, lambda analysis, place: analysis.attentions(place))

    @property
    def models(self) -> tuple[ModelFacts, ...]:
        """The models of the last analysis without errors."""
        own = (analysis for _, analysis in self.analyses if analysis.source.path == self.path)
        return next((analysis.models for analysis in own if any(m.program for m in analysis.models)), ())

    def _facts(self, span: Span, ask: Callable[[Analysis, Place], tuple[_Fact, ...]]) -> tuple[_Fact, ...]:
        start, end = self._shift.to_new(span.start), self._shift.to_new(span.end)
        for text, analysis in self.analyses:
            was = Shift(text, self.lines.text).span_to_old(start, end)
            found = ask(analysis, (self.path, *was)) if was is not None else ()
            if found:
                return found
        return ()

    # ------------------------------------------------------------ items

    def items(self) -> tuple[ast.Item, ...]:
        """The items of the tree."""
        return self.index.items
