"""Source text and places in it."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Source:
    """One `.tfg` text and the name that diagnostics show for it.

    `path` is what the user typed (or `<text>` for source given as a string, `std` for the standard library).
    `include` are folders, besides its own, from which it may `use` files.
    """

    path: str
    text: str = field(repr=False)
    include: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def _line_starts(self) -> list[int]:
        starts = [0]
        starts.extend(index + 1 for index, char in enumerate(self.text) if char == "\n")
        return starts

    def position(self, offset: int) -> tuple[int, int]:
        """The 1-based (line, column) of a 0-based character offset."""
        line = bisect_right(self._line_starts, offset)
        return line, offset - self._line_starts[line - 1] + 1

    def line_start(self, number: int) -> int:
        """The offset at which 1-based line `number` begins."""
        return self._line_starts[number - 1]

    def line(self, number: int) -> str:
        """The text of 1-based line `number`, without its line end."""
        start = self.line_start(number)
        end = self.text.find("\n", start)
        return self.text[start : len(self.text) if end < 0 else end].rstrip("\r")


@dataclass(frozen=True)
class Span:
    """Characters `start` up to, not including, `end` of a source."""

    source: Source = field(repr=False)
    start: int
    end: int

    @property
    def text(self) -> str:
        """The characters of the span."""
        return self.source.text[self.start : self.end]

    @property
    def place(self) -> str:
        """`path:line:column`, as diagnostics print it."""
        line, column = self.source.position(self.start)
        return f"{self.source.path}:{line}:{column}"

    @property
    def short_place(self) -> str:
        """`path:line`, for places named inside a message."""
        return f"{self.source.path}:{self.source.position(self.start)[0]}"

    def to(self, other: Span) -> Span:
        """The span from the start of this one to the end of `other`."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))
