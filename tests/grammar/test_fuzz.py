"""Whatever text comes in: diagnostics, never another exception, in bounded time."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.format import format_source
from fastgrad_grammar.layout import MAX_NESTING
from fastgrad_grammar.read import MAX_BYTES, read_source
from fastgrad_grammar.render import render
from fastgrad_grammar.source import Source
from tests.golden_errors import front_end
from tests.grammar.programs import programs

ROOT = Path(__file__).parent.parent.parent
SEEDS = [
    path.read_text(encoding="utf-8")
    for folder in (ROOT / "examples", ROOT / "grammar/fastgrad_grammar/std", ROOT / "tests/golden/errors")
    for path in sorted(folder.glob("*.tfg"))
    if path.stat().st_size < 4000
]
TOKEN = re.compile(r"\s+|#[^\n]*|\"[^\"\n]*\"|\w+|.")
PIECES = sorted({token for text in SEEDS for token in TOKEN.findall(text) if len(token) < 20})
BRACKETS = [
    "(",
    "[",
    "{",
    "f(",
    "x[",
    "(1, ",
    "float[",
    "repeat i in 2 {\n",
    "if true {\n",
    "} else {\n",
    "as (",
]
SECONDS = 120.0  # a hang is what this looks for; the machine may be busy
"""Longest time for one text of the largest size, on a slow and busy machine."""


def attack(text: str) -> list[str]:
    """The codes that a text is answered with; anything but diagnostics fails the test."""
    try:
        front_end(Source("fuzz.tfg", text))
    except TfgError as error:
        render(error.diagnostics).encode()
        render(error.diagnostics, colour=True).encode()
        return [found.code for found in error.diagnostics]
    return []


@pytest.mark.medium
@settings(max_examples=200)
@given(st.text(st.characters()))
def test_random_characters(text: str) -> None:
    attack(text)


@pytest.mark.medium
@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_random_bytes_in_a_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.tfg"
    path.write_bytes(data)
    try:
        text = read_source(path).text
    except TfgError as error:
        render(error.diagnostics).encode()
    else:
        attack(text)


@settings(max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=60), st.sampled_from(["", " "]))
def test_token_soups(tokens: list[str], blank: str) -> None:
    attack(blank.join(tokens))


@pytest.mark.medium
@settings(max_examples=40)
@given(programs())
def test_well_formed_texts_without_a_meaning(text: str) -> None:
    attack(text)


@st.composite
def mutants(draw: st.DrawFn) -> str:
    """A good or a bad file with a few tokens deleted, inserted, doubled or swapped."""
    tokens = TOKEN.findall(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(tokens) - 1)))
        match draw(st.sampled_from(["delete", "insert", "double", "swap", "cut"])):
            case "delete":
                del tokens[place : place + 1]
            case "insert":
                tokens.insert(place, draw(st.sampled_from(PIECES)))
            case "double":
                tokens[place:place] = tokens[place : place + draw(st.integers(1, 30))]
            case "swap":
                other = draw(st.integers(0, max(0, len(tokens) - 1)))
                if tokens:
                    tokens[place], tokens[other] = tokens[other], tokens[place]
            case _:
                del tokens[place:]
    return "".join(tokens)


@settings(max_examples=150)
@given(mutants())
def test_mutated_files(text: str) -> None:
    attack(text)


@pytest.mark.slow
@settings(max_examples=5000)
@given(mutants())
def test_many_mutated_files(text: str) -> None:
    attack(text)


@settings(max_examples=100)
@given(mutants())
def test_formatter_refuses_or_keeps_mutated_files(text: str) -> None:
    try:
        formatted = format_source(Source("fuzz.tfg", text))
    except TfgError:
        return
    assert format_source(formatted) == formatted


@pytest.mark.parametrize("opening", BRACKETS)
@pytest.mark.parametrize("head", ["param p = ", "block f(x: float[b]) -> float[b] {\n"])
def test_nesting_of_5000(head: str, opening: str) -> None:
    assert attack(head + opening * 5000)
    closing = {"(": ")", "[": "]", "{": "}"}
    ends = "".join(closing.get(char, "") for char in reversed(opening))
    assert attack(head + opening * 5000 + "1" + ends * 5000 + "\n}\n")


@pytest.mark.medium
@pytest.mark.parametrize(
    "chain",
    ["x + ", "x @ ", "-", "not ", "x if c else ", "f(x).T.T @ "],
)
def test_chains_of_10_000(chain: str) -> None:
    assert attack(f"param p = {chain * 10_000}x\n") == ["FG106"]
    with pytest.raises(TfgError):
        format_source(f"param p = {chain * 10_000}x\n")


def test_comparison_chain_of_10_000() -> None:
    assert attack(f"param p = {'1 < ' * 10_000}x\n") == ["FG115"]


@pytest.mark.medium
def test_postfix_chains_of_10_000() -> None:
    for suffix in (".T", "[0]", " as y"):
        assert attack(f"param p = f(x){suffix * 10_000}\n")


def test_else_if_chain_of_10_000() -> None:
    chain = " else if k {\n}" * 10_000
    assert "FG106" in attack(
        f"block f(x: float[b]; k: bool) -> float[b] {{\nif k {{\n}}{chain}\nreturn x\n}}\n"
    )


@pytest.mark.medium
def test_10_000_statements_are_no_error_of_the_syntax() -> None:
    lines = "    x = x + x\n" * 10_000
    text = f"dim b\nmodel f(x: float[b]) -> float[b] {{\n{lines}    return x\n}}\n"
    assert not [code for code in attack(text) if code < "FG2"]


@pytest.mark.medium
@pytest.mark.parametrize(
    "unit",
    ["\n", "#", "(", "x", '"', "é", "\x00", "param a = 1\n", "a b\n", "}\n", "“", "x = (\n", "block "],
)
def test_texts_of_10_megabytes_and_of_the_largest_size(unit: str) -> None:
    begin = time.perf_counter()
    assert attack(unit * (10_000_000 // len(unit))) == ["FG003"]
    attack((unit * MAX_BYTES)[:MAX_BYTES])
    assert time.perf_counter() - begin < SECONDS


def test_the_deepest_legal_text_is_read_and_formatted() -> None:
    depth = MAX_NESTING - 1
    text = f"param p = {'(' * depth}1{')' * depth}\n"
    assert format_source(text) == "param p = 1\n"
    deep = f"block f(x: float[b]) -> float[b] {{\n{'if true {' * depth}x = 1{'}' * depth}\n}}\n"
    formatted = format_source(deep)
    assert format_source(formatted) == formatted
