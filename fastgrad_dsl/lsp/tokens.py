"""Colours by meaning: what each token of a document is. Tokens are those of the lexer: broken text has them too."""

from __future__ import annotations

from collections.abc import Iterator

import lark
from lsprotocol import types

from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_dsl.lsp.view import View
from fastgrad_grammar.build import TENSOR_TYPES, VALUE_TYPES
from fastgrad_grammar.comments import find_comments
from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import OPERATORS, lex
from fastgrad_grammar.source import Source
from fastgrad_grammar.syntax_errors import KEYWORDS

TYPES = (
    *("keyword", "comment", "string", "number", "operator", "namespace", "type", "function", "class"),
    *("parameter", "variable", "property", "typeParameter", "enumMember", "label"),
)
MODIFIERS = ("declaration", "readonly", "defaultLibrary")
LEGEND = types.SemanticTokensLegend(list(TYPES), list(MODIFIERS))

_BY_KIND = {
    "use": "namespace",
    "param": "variable",
    "dim": "typeParameter",
    "size": "typeParameter",
    "block": "function",
    "model": "class",
    "objective": "function",
    "input": "parameter",
    "value": "parameter",
    "parameter": "parameter",
    "weight": "property",
    "buffer": "property",
    "local": "variable",
    "index": "variable",
    "label": "label",
}
_FIXED = {"param", "dim", "size", "value", "index"}
_LITERALS = {"STRING": "string", "INT": "number", "FLOAT": "number"}


def semantic_tokens(view: View) -> types.SemanticTokens:
    """The tokens of a document, each relative to the one before it."""
    data: list[int] = []
    line = character = 0
    for start, end, kind, modifiers in sorted(_tokens(view)):
        place = view.lines.position(start)
        length = view.lines.position(end).character - place.character
        if length <= 0:
            continue
        delta = place.character - character if place.line == line else place.character
        data += [place.line - line, delta, length, TYPES.index(kind), modifiers]
        line, character = place.line, place.character
    return types.SemanticTokens(data)


def _tokens(view: View) -> Iterator[tuple[int, int, str, int]]:
    source = Source(view.path, view.lines.text)
    raw, _ = lex(source, load_grammar())
    text = view.source.text == source.text
    known = {each.span.start: each for each in view.index.occurrences} if text else {}
    for place, token in enumerate(raw):
        start, end = token.start_pos or 0, token.end_pos or 0
        found = known.get(start)
        if found is not None and found.span.end == end:
            modifiers = _modifiers(
                "declaration" if found.defines else "", "readonly" if found.kind in _FIXED else ""
            )
            if found.symbol.path == "std":
                modifiers |= _modifiers("defaultLibrary")
            yield start, end, _BY_KIND[found.kind], modifiers
        else:
            kind, library = _kind(token, raw[place + 1] if place + 1 < len(raw) else None)
            if kind:
                yield start, end, kind, _modifiers("defaultLibrary" if library else "")
    for comment in find_comments(source):
        yield comment.offset, comment.offset + len(comment.text), "comment", 0


def _kind(token: lark.Token, following: lark.Token | None) -> tuple[str, bool]:
    """What a token is that is no name of the file, and whether the language gives it."""
    if token.type in KEYWORDS:
        return "keyword", False
    if token.type in _LITERALS:
        return _LITERALS[token.type], False
    if token.type in OPERATORS - {"COMMA"} or token.type in ("OPTIONAL", "TRANSPOSE", "ELLIPSIS"):
        return "operator", False
    if token.type not in ("NAME", "AT", "EXACT"):
        return "", False
    if following is not None and following.type == "LPAR" and str(token) in NAMES:
        return "function", True
    if str(token) in {*TENSOR_TYPES, *VALUE_TYPES}:
        return "type", True
    return ("keyword", False) if token.type in ("AT", "EXACT") else ("variable", False)


def _modifiers(*names: str) -> int:
    return sum(1 << MODIFIERS.index(name) for name in names if name)
