"""Colours outside of the language server: the lexer for Pygments, and the grammar that VS Code holds."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from pygments import token

from fastgrad_grammar.comments import find_comments
from fastgrad_grammar.grammar import load_grammar
from fastgrad_grammar.highlight import BUDGETS, TfgLexer, signs, terminals, textmate, textmate_text, words
from fastgrad_grammar.layout import lex
from fastgrad_grammar.source import Source

ROOT = Path(__file__).parents[2]
HELD = ROOT / "editors/vscode/syntaxes/tfg.tmLanguage.json"
FILES = [*sorted((ROOT / "examples").glob("*.tfg")), *sorted((ROOT / "grammar").rglob("*.tfg"))]


def test_the_grammar_of_the_extension_is_in_step() -> None:
    """If not: python -m fastgrad_grammar.highlight > editors/vscode/syntaxes/tfg.tmLanguage.json"""
    assert HELD.read_text(encoding="utf-8") == textmate_text()


def test_every_terminal_has_a_colour() -> None:
    """A keyword or an operator that tfg.lark gains is in the tables, or this names it."""
    shown = {word for kind in words().values() for word in kind} | set(signs())
    left = {
        name
        for name, pattern in terminals().items()
        if re.sub(r"\\(.)", r"\1", pattern) not in shown and not name.startswith("_")
    }
    punctuation = {"SEMICOLON", "COMMA", "COLON", "DOT", "LPAR", "RPAR", "LSQB", "RSQB", "LBRACE", "RBRACE"}
    assert left == punctuation | BUDGETS | {"NAME", "TRANSPOSE", "FLOAT", "INT", "STRING"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tokens_begin_and_end_where_the_compiler_says(path: Path) -> None:
    """No token of the language is cut by a colour, and nothing is coloured as an error."""
    text = path.read_text(encoding="utf-8")
    found = list(TfgLexer(stripnl=False, ensurenl=False).get_tokens_unprocessed(text))
    assert "".join(value for _, _, value in found) == text
    assert all(kind is not token.Error for _, kind, _ in found)
    starts = {start for start, _, _ in found}
    source = Source(str(path), text)
    raw, broken = lex(source, load_grammar())
    assert not broken
    assert {each.start_pos for each in raw if each.type != "_NL"} <= starts
    comments = {each.offset for each in find_comments(source)}
    assert {start for start, kind, _ in found if kind is token.Comment.Single} == comments


def test_words_of_budgets_are_names_elsewhere() -> None:
    kinds = dict((value, kind) for kind, value in TfgLexer().get_tokens('at "*" exact\n'))
    assert (kinds["at"], kinds["exact"]) == (token.Keyword, token.Keyword)
    assert token.Keyword not in {kind for kind, _ in TfgLexer().get_tokens("at = exact + at\n")}


def test_patterns_are_of_this_language() -> None:
    for each in textmate()["patterns"]:  # type: ignore[attr-defined]
        re.compile(each["match"])
    assert json.loads(textmate_text())["scopeName"] == "source.tfg"


def test_the_lexer_is_registered() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["pygments.lexers"].items()
    assert EntryPoint(name, value, "pygments.lexers").load() is TfgLexer
