"""Places in a text as editors count them, and files by their URIs.

An editor counts lines from 0 and, unless another encoding was agreed on, UTF-16 code units within them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lsprotocol import types

from fastgrad_compiler.attention.table import LIBRARY
from fastgrad_grammar import ast

UNITS = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_SIZES = {"utf-8": 1, "utf-16": 2, "utf-32": 4}
_LIBRARY_FOLDER = Path(ast.__file__).with_name("std")


@dataclass(frozen=True)
class Lines:
    """The lines of a text, in which line ends are LF, and the unit in which columns are counted."""

    text: str
    encoding: str = "utf-16"

    @cached_property
    def starts(self) -> list[int]:
        """The offset of each line."""
        return [0, *(index + 1 for index, char in enumerate(self.text) if char == "\n")]

    def offset(self, position: types.Position) -> int:
        """The character offset of a position; one beyond a line or the text is at its end."""
        if position.line >= len(self.starts):
            return len(self.text)
        start = self.starts[max(position.line, 0)]
        line = self._line(start)
        if line.isascii():
            return start + min(max(position.character, 0), len(line))
        units = 0
        for place, char in enumerate(line):
            if units >= position.character:
                return start + place
            units += self._units(char)
        return start + len(line)

    def position(self, offset: int) -> types.Position:
        """The position of a character offset."""
        offset = min(max(offset, 0), len(self.text))
        line = bisect_right(self.starts, offset) - 1
        return types.Position(line, self._units(self.text[self.starts[line] : offset]))

    def range(self, start: int, end: int) -> types.Range:
        """That of the characters from `start` to `end`."""
        return types.Range(self.position(start), self.position(end))

    def line_end(self, offset: int) -> int:
        """The offset at which the line of an offset ends."""
        end = self.text.find("\n", offset)
        return len(self.text) if end < 0 else end

    def _line(self, start: int) -> str:
        return self.text[start : self.line_end(start)]

    def _units(self, text: str) -> int:
        if text.isascii():
            return len(text)
        return len(text.encode(UNITS[self.encoding], "surrogatepass")) // _SIZES[self.encoding]


def plain_text(text: str) -> str:
    """A text as files are read: without a byte order mark, with LF line ends."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def path_of(uri: str) -> str:
    """What a document is called here: the place of a file without links; a name in angle brackets if it is no file."""
    parts = urlsplit(uri)
    if parts.scheme != "file":
        return f"<{uri.replace('/', '_')}>"
    return os.path.realpath(unquote(parts.path).replace("\0", "_"))


def uri_of(path: str) -> str:
    """The URI of a source's path, also of one of the standard library."""
    if path.startswith(LIBRARY):
        return (_LIBRARY_FOLDER / path.removeprefix(LIBRARY)).as_uri()
    return Path(path).as_uri()
