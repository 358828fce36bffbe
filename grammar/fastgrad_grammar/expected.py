"""Sets of token types in the words of the language."""

from __future__ import annotations

from fastgrad_grammar.diagnostics import either
from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import ITEM_KEYWORDS, OPERATORS, STATEMENT_KEYWORDS

_VALUE_STARTS = frozenset({"NAME", "INT", "LPAR"})
_WORDS = {
    "_NL": "the end of the line",
    "NAME": "a name",
    "STRING": "a string",
    "INT": "a number",
    "$END": "the end of the file",
    "OPTIONAL": "`?`",
    "TRANSPOSE": "`.T`",
}
_SELDOM = frozenset({"AT", "EXACT", "TRANSPOSE", "DOT", "AS", "OPTIONAL"})


def describe_expected(accepted: frozenset[str]) -> str:
    """Accepted token types in the words of the language: "`,`, `)` or an operator"."""
    left = set(accepted)
    words: list[str] = []
    if left >= ITEM_KEYWORDS:
        return "use, param, dim, block, model, objective or budget"
    if left >= STATEMENT_KEYWORDS:
        return "a statement (name = ..., weight, buffer, repeat, if, return) or `}`"
    if left >= _VALUE_STARTS:
        words.append("an expression")
        left -= _VALUE_STARTS | {"FLOAT", "STRING", "TRUE", "FALSE", "NONE", "NOT", "MINUS", "AT", "EXACT"}
    if left >= {"PLUS", "STAR"}:
        words.append("an operator")
        left -= OPERATORS - {"COMMA", "ASSIGN", "ARROW"}
        left -= {"IF", "LPAR", "LSQB"}
    if "NAME" in left:
        left -= _SELDOM
    left -= {"TRANSPOSE", "DOT", "FLOAT"}
    words = [_WORDS.get(kind, f"`{_symbol(kind)}`") for kind in sorted(left, key=_order)] + words
    return either(words)


def _symbol(kind: str) -> str:
    """A symbol or keyword as the grammar spells it."""
    return str(load_grammar().get_terminal(kind).pattern.value)


def _order(kind: str) -> tuple[bool, str]:
    return kind == "_NL", kind if kind in _WORDS else _symbol(kind)
