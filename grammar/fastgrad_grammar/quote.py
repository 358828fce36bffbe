"""Text from outside as it is written: one function for each language that is written (docs/security.md).

Names of files, comments, values of params and strings of documents may hold anything. Strings of Python, JSON and HTML
give back the very text. Where a language has no escape (a comment, a terminal), a character that is not plain is
written as Python's escape for it, such as `\\x1b`: controls, breaks of lines, unpaired surrogates, marks of direction.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markupsafe import Markup

_NOT_PLAIN = frozenset({"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"})
"""Categories of Unicode: controls, formats such as marks of direction, surrogates, unassigned, breaks of lines."""

_UNUSUAL = re.compile(r"[^ -~]")
# ends of comments, and what joins one with the next line
_CPP = re.compile(r"(?<=\*)/|/(?=\*)|(?<=\?\?)/|\\(?= *\Z)")


def python_string(text: str) -> str:
    """A literal of Python, quoted as `ruff format` does; evaluates to `text`."""
    mark = "'" if text.count('"') > text.count("'") else '"'
    return mark + _plain(text.replace("\\", "\\\\")).replace(mark, f"\\{mark}") + mark


def python_docstring(text: str) -> str:
    """What stands between triple double quotes; evaluates to `text`."""
    return _plain(text.replace("\\", "\\\\")).replace('"', '\\"')


def comment(text: str) -> str:
    """What follows `#` in Python and in the text of a program: one line."""
    return _plain(text)


def cpp_comment(text: str) -> str:
    """What follows `//` or stands between `/*` and `*/`: one line, not joined with the next."""
    return _CPP.sub(_escape, _plain(text))


def html(text: str) -> Markup:
    """Text or the value of an attribute between quotes; tabs and breaks of lines are kept, and markup is as it was."""
    from markupsafe import Markup, escape

    return text if isinstance(text, Markup) else escape(_plain(text, kept="\t\n"))


def json_text(value: object, indent: int | None = None) -> str:
    """The text of JSON, in ASCII; ValueError for a number that is not finite."""
    return json.dumps(value, indent=indent, allow_nan=False)


def terminal(text: str, kept: str = "") -> str:
    """What a terminal shows and does not obey; control characters in `kept` are left."""
    return _plain(text, kept)


def _plain(text: str, kept: str = "") -> str:
    def written(found: re.Match[str]) -> str:
        character = found[0]
        usual = character in kept or unicodedata.category(character) not in _NOT_PLAIN
        return character if usual else _escape(found)

    return _UNUSUAL.sub(written, text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    return f"\\x{ord(character):02x}" if character in "/\\" else character.encode("unicode_escape").decode()
