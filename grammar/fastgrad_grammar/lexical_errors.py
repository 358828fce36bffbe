"""What to say about text that no token of the language matches."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from fastgrad_grammar.diagnostics import Diagnostic, short
from fastgrad_grammar.source import Source, Span

_BAD_NUMBER = re.compile(r"\d[\w.]*")
_BAD_STRING = re.compile(r'"[^\n]*')
_BAD_NAME = re.compile(r"\w+")
_STRANGE_RUN = re.compile(r"[^\x00-\x7f]+")

_REPLACEMENTS = {
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{DOUBLE LOW-9 QUOTATION MARK}": '"',
    "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}": '"',
    "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}": '"',
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{MULTIPLICATION SIGN}": "*",
    "\N{MIDDLE DOT}": "*",
    "\N{DIVISION SIGN}": "/",
    "\N{LESS-THAN OR EQUAL TO}": "<=",
    "\N{GREATER-THAN OR EQUAL TO}": ">=",
    "\N{NOT EQUAL TO}": "!=",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{HORIZONTAL ELLIPSIS}": "..",
    "\N{NO-BREAK SPACE}": " ",
    "\N{IDEOGRAPHIC SPACE}": " ",
    "\N{FULLWIDTH COMMA}": ",",
    "\N{FULLWIDTH SEMICOLON}": ";",
    "\N{FULLWIDTH LEFT PARENTHESIS}": "(",
    "\N{FULLWIDTH RIGHT PARENTHESIS}": ")",
}
_HELP = {
    "!": "negation is written `not`; unequal is `!=`",
    "&": "write `and`",
    "|": "write `or`",
    "^": "there is no power operator; write a product, such as x * x",
    "'": 'strings are in double quotes, as in "layers.*"',
    "`": 'strings are in double quotes, as in "layers.*"',
    "\\": "a line continues by itself inside brackets and after an operator",
    "$": "values from outside are declared with `param`, and given when the file is compiled",
}


def explain_character(source: Source, offset: int) -> tuple[Diagnostic, int]:
    """The diagnostic for what stands at `offset`, and where lexing continues after it."""
    text = source.text
    char = text[offset]
    if char.isascii() and char.isdigit():
        return _run(source, offset, _BAD_NUMBER, _number)
    if char == '"':
        return _run(source, offset, _BAD_STRING, _string)
    if char == "_" or char.isalpha():
        return _run(source, offset, _BAD_NAME, _name)
    end = offset + 1
    if not char.isascii() and char not in _REPLACEMENTS:
        run = _STRANGE_RUN.match(text, offset)
        end = run.end() if run else end
    return Diagnostic(
        "FG104",
        f"unexpected character {_describe(char)}",
        Span(source, offset, end),
        help=_character_help(char),
    ), end


def _character_help(char: str) -> tuple[str, ...]:
    if char in _REPLACEMENTS:
        plain = _REPLACEMENTS[char]
        return (f"write `{plain}`" if plain.strip() else "use a plain space",)
    return (_HELP[char],) if char in _HELP else ()


def _describe(char: str) -> str:
    point = f"U+{ord(char):04X}"
    if char.isascii() and char.isprintable():
        return f"`{char}`"
    name = unicodedata.name(char, "").lower()
    return f"{point} ({name})" if name else point


def _run(
    source: Source, offset: int, pattern: re.Pattern[str], explain: Callable[[Span], Diagnostic]
) -> tuple[Diagnostic, int]:
    match = pattern.match(source.text, offset)
    span = Span(source, offset, match.end() if match else offset + 1)
    return explain(span), span.end


def _number(span: Span) -> Diagnostic:
    message, help_ = f"malformed number `{short(span.text)}`", "numbers look like 64, 65_536, 0.5 or 1e-3"
    return Diagnostic("FG120", message, span, help=(help_,))


def _string(span: Span) -> Diagnostic:
    opening = Span(span.source, span.start, span.start + 1)
    help_ = 'add the closing `"`; a string ends on the line where it begins'
    return Diagnostic("FG105", "string is never closed", opening, "opened here", help=(help_,))


def _name(span: Span) -> Diagnostic:
    odd = next((char for char in span.text if not char.isascii()), span.text[0])
    message = f"unexpected character {_describe(odd)} in `{short(span.text)}`"
    help_ = "names are made of the letters a to z and A to Z, digits and `_`"
    return Diagnostic("FG104", message, span, help=(help_,))
