"""Text from outside, in each language that is written (docs/security.md); the wide fuzz is attack/quoting.py."""

from __future__ import annotations

import shutil

import pytest

from attack.quoting import CHECKS, PARTS, compiler_agrees, failures, texts
from fastgrad_grammar import quote

SHORT = (*PARTS, *texts(400, seed=7))
COMPILER = shutil.which("g++") or shutil.which("clang++")


def test_every_language_reads_what_was_written() -> None:
    assert failures(SHORT) == []


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on the path")
def test_a_cpp_compiler_agrees() -> None:
    assert COMPILER is not None
    assert compiler_agrees(SHORT, COMPILER)


@pytest.mark.parametrize("language", CHECKS)
def test_the_fuzz_sees_text_that_is_not_quoted(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function, replaced by none at all, fails the check of its language."""
    functions = {
        "Python string": ("python_string", lambda text: f'"{text}"'),
        "Python docstring": ("python_docstring", str),
        "comment": ("comment", str),
        "C++ comment": ("cpp_comment", lambda text: text.replace("\n", " ")),
        "HTML": ("html", lambda text: text.replace("<", "&lt;")),
        "JSON": ("json_text", lambda value: str(value).replace("'", '"')),
        "terminal": ("terminal", lambda text: text.replace("\x1b", "?")),
    }
    monkeypatch.setattr(quote, *functions[language])

    def fails(text: str) -> bool:
        try:
            return not CHECKS[language](text)
        except (SyntaxError, ValueError):
            return True

    assert any(map(fails, PARTS))


@pytest.mark.parametrize("text", ["gpt.tfg:14", "déjà.tfg", "漢字", "a/b c", "x @ y.T  # why", "e^-s"])
def test_ordinary_text_is_left(text: str) -> None:
    assert quote.comment(text) == quote.cpp_comment(text) == quote.terminal(text) == text
    assert quote.python_string(text) == f'"{text}"'
    assert quote.python_docstring(text) == str(quote.html(text)) == text


def test_quotes_are_those_of_ruff() -> None:
    assert quote.python_string("bob's") == '"bob\'s"'
    assert quote.python_string('a "b"') == "'a \"b\"'"


def test_a_number_that_is_not_finite_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        quote.json_text({"loss": float("nan")})
