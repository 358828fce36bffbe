"""Colours for .tfg text where no server runs: a lexer for Pygments, and a TextMate grammar for editors.

Both are made from the terminals of tfg.lark, so that a new keyword or operator is coloured when it is in the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pygments import token
from pygments.lexer import RegexLexer, bygroups

from fastgrad_grammar.build import TENSOR_TYPES, VALUE_TYPES
from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.layout import ITEM_KEYWORDS, OPERATORS
from fastgrad_grammar.quote import html

if TYPE_CHECKING:
    from markupsafe import Markup
    from pygments.token import _TokenType

NAME = "fastgrad"
LANGUAGE = "tfg"
WORDS_OF_VALUES = frozenset({"TRUE", "FALSE", "NONE"})
WORD_OPERATORS = frozenset({"AND", "OR", "NOT"})
PUNCTUATION = frozenset(
    {"SEMICOLON", "COMMA", "COLON", "DOT", "LPAR", "RPAR", "LSQB", "RSQB", "LBRACE", "RBRACE"}
)
BUDGETS = frozenset({"AT", "EXACT"})
"""Words that are keywords in budgets, and names elsewhere."""

_DECLARED = r"\b(block|model|objective)([ \t]+)([A-Za-z_][A-Za-z0-9_]*)"
_IN_BUDGETS = r"\bat(?=[ \t]*\")|\bexact(?=[ \t]*(?:#|$|\}))"
_LIBRARY = r"\bstd(?=[ \t]*\.)"
_CALLED = r"\b[A-Za-z_][A-Za-z0-9_]*(?=[ \t]*\()"


def terminals() -> dict[str, str]:
    """The pattern of each terminal of the grammar by its name; words and signs as patterns too."""
    return {each.name: each.pattern.to_regexp() for each in load_grammar().terminals}


def words() -> dict[str, list[str]]:
    """The keywords by what they are: of declarations, of statements, of values, operators, others; sorted."""
    plain = {name: text for name, text in terminals().items() if text.isalpha() and name not in BUDGETS}
    kinds = {
        "declaration": ITEM_KEYWORDS | {"WEIGHT", "BUFFER"},
        "value": WORDS_OF_VALUES,
        "operator": WORD_OPERATORS,
    }
    found = {kind: sorted(plain[name] for name in names) for kind, names in kinds.items()}
    taken = frozenset().union(*kinds.values())
    return {**found, "control": sorted(text for name, text in plain.items() if name not in taken)}


def signs() -> list[str]:
    """The operators that are no words, the longest first, and the dots of slices and the mark of optional types."""
    found = terminals()
    names = [*(OPERATORS - WORD_OPERATORS - PUNCTUATION), "ELLIPSIS", "OPTIONAL"]
    return sorted(
        (re.sub(r"\\(.)", r"\1", found[name]) for name in names), key=lambda sign: (-len(sign), sign)
    )


def types() -> list[str]:
    """The types of tensors and of values."""
    return sorted({*TENSOR_TYPES, *VALUE_TYPES})


def _any(texts: list[str]) -> str:
    return rf"\b(?:{'|'.join(map(re.escape, texts))})\b"


class TfgLexer(RegexLexer):
    """`.tfg` text for Pygments: `pygmentize -l tfg model.tfg`, and blocks of documentation."""

    name = NAME
    aliases: ClassVar = [LANGUAGE]
    filenames: ClassVar = ["*.tfg"]
    url = ""

    _found: ClassVar[Mapping[str, str]] = terminals()
    _words: ClassVar[Mapping[str, list[str]]] = words()
    tokens: ClassVar = {
        "root": [
            (r"#[^\n]*", token.Comment.Single),
            (r"\s+", token.Whitespace),
            (_found["STRING"], token.String.Double),
            (_found["FLOAT"], token.Number.Float),
            (_found["INT"], token.Number.Integer),
            (_found["TRANSPOSE"], token.Operator),
            (
                _DECLARED,
                bygroups(token.Keyword.Declaration, token.Whitespace, token.Name.Class),
            ),
            (_any(_words["declaration"]), token.Keyword.Declaration),
            (_any(_words["value"]), token.Keyword.Constant),
            (_any(_words["operator"]), token.Operator.Word),
            (_any(_words["control"]), token.Keyword),
            (_IN_BUDGETS, token.Keyword),
            (_any(types()), token.Keyword.Type),
            (_LIBRARY, token.Name.Namespace),
            (_CALLED, token.Name.Function),
            (_found["NAME"], token.Name),
            ("|".join(map(re.escape, signs())), token.Operator),
            (r"[()\[\]{};:,.]", token.Punctuation),
        ]
    }


class ProgramLexer(RegexLexer):
    """The text of a program as `fastgrad stages` prints it (docs/architecture.md)."""

    name = f"{NAME} program"
    aliases: ClassVar = ["tfg-program"]

    tokens: ClassVar = {
        "root": [
            (r"#[^\n]*", token.Comment.Single),
            (r"\s+", token.Whitespace),
            (r'"(?:\\.|[^"\\\n])*"', token.String.Double),
            (r"%[\w.]+", token.Name.Variable),
            (r"-?(?:inf|nan)\b|-?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", token.Number),
            (r"\b(?:program|main|objective|gradient|step|along|dim|budget|graph|block|return|where|by|in|norm|at)\b(?!\()",
             token.Keyword),
            (r"\b(?:true|false|none)\b", token.Keyword.Constant),
            (_any(types()), token.Keyword.Type),
            (r"[A-Za-z_][\w.]*(?=\()", token.Name.Function),
            (r"[A-Za-z_@][\w.@]*", token.Name),
            (r"[^\w\s]", token.Punctuation),
        ]
    }  # fmt: skip


COLOURS = {
    token.Comment: "#6e7781",
    token.String: "#0a7d4f",
    token.Number: "#0969da",
    token.Keyword: "#cf222e",
    token.Name.Function: "#8250df",
    token.Name.Variable: "#953800",
}
"""Of tokens in a notebook."""


def coloured(text: str, lexer: RegexLexer) -> str:
    """A text as HTML, its tokens in colour and all of it quoted; for a notebook."""
    from markupsafe import Markup

    span = Markup('<span style="color:{}">{}</span>')

    def written(kind: _TokenType, value: str) -> Markup:
        colour = next((shade for parent, shade in COLOURS.items() if parent in kind.split()), None)
        return html(value) if colour is None else span.format(colour, html(value))

    pieces = (written(kind, value) for kind, value in lexer.get_tokens(text))
    return str(Markup('<pre style="overflow-x:auto">{}</pre>').format(Markup("").join(pieces)))


def textmate() -> dict[str, object]:
    """The TextMate grammar, as JSON holds it: what the extension for VS Code colours texts with."""
    found = terminals()
    scopes = {
        "declaration": "storage.type",
        "value": "constant.language",
        "operator": "keyword.operator.word",
        "control": "keyword.control",
    }
    coloured = [
        ("comment.line.number-sign", "#.*$"),
        ("string.quoted.double", found["STRING"]),
        ("constant.numeric.float", found["FLOAT"]),
        ("constant.numeric.integer", found["INT"]),
        ("keyword.operator.transpose", found["TRANSPOSE"]),
        *((scopes[kind], _any(texts)) for kind, texts in words().items()),
        ("keyword.control", _IN_BUDGETS),
        ("support.type", _any(types())),
        ("entity.name.namespace", _LIBRARY),
        ("entity.name.function", _CALLED),
        ("variable.other", found["NAME"]),
        ("keyword.operator", "|".join(map(re.escape, signs()))),
    ]
    declared = {
        "match": _DECLARED,
        "captures": {
            "1": {"name": f"storage.type.{LANGUAGE}"},
            "3": {"name": f"entity.name.type.{LANGUAGE}"},
        },
    }
    patterns = [{"name": f"{scope}.{LANGUAGE}", "match": match} for scope, match in coloured]
    return {
        "name": NAME,
        "scopeName": f"source.{LANGUAGE}",
        "fileTypes": [LANGUAGE],
        "patterns": [*patterns[:1], declared, *patterns[1:]],
    }


def textmate_text() -> str:
    """The file that editors/vscode holds; `python -m fastgrad_grammar.highlight` prints it."""
    return json.dumps(textmate(), indent=2) + "\n"


if __name__ == "__main__":
    print(textmate_text(), end="")
