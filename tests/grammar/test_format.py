"""The formatter changes the layout and nothing else, and nothing the second time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings

from fastgrad_compiler.frontend.operations import OPERATIONS, OVERLOADS
from fastgrad_grammar.comments import find_comments
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.format import MAX_COLUMNS, format_source
from fastgrad_grammar.parser import parse
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source
from fastgrad_grammar.unparse import OPERATION_TENSORS
from tests.conftest import Golden
from tests.golden_errors import front_end
from tests.grammar.programs import programs

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests/golden/format"
TEXTS = sorted([*(ROOT / "grammar/fastgrad_grammar/std").glob("*.tfg"), *(ROOT / "examples").glob("*.tfg")])


def comments(text: str) -> Counter[str]:
    return Counter(comment.text for comment in find_comments(Source("<text>", text)))


def check(text: str) -> str:
    formatted = format_source(text)
    assert format_source(formatted) == formatted
    assert parse(Source("<text>", formatted)) == parse(Source("<text>", text))
    assert comments(formatted) == comments(text)
    return formatted


@pytest.mark.medium
@settings(max_examples=50)
@given(programs())
def test_random_programs_keep_their_tree_and_their_comments(text: str) -> None:
    check(text)


@pytest.mark.slow
@settings(max_examples=300)
@given(programs())
def test_many_random_programs_keep_their_tree_and_their_comments(text: str) -> None:
    check(text)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_library_and_examples_keep_their_tree_their_comments_and_their_meaning(path: Path) -> None:
    formatted = check(read_source(path).text)
    if path.parent.name == "examples":
        front_end(Source(str(path), formatted))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.tfg")), ids=lambda path: path.stem)
def test_golden_layout(path: Path, golden: Golden) -> None:
    golden(path.with_suffix(".out"), check(read_source(path).text))


def body(text: str) -> str:
    """A statement as the formatter writes it in a block with a tensor `x` and a value `k`."""
    formatted = check(f"use std\nblock f(x: float[b]; k: int) -> float[b] {{\n{text}\n}}\n")
    return "\n".join(line.removeprefix("    ") for line in formatted.splitlines()[2:-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y=softmax(x,axis=-1)", "y = softmax(x; axis = -1)"),
        ("y = f2(x, k, n = k)", "y = f2(x, k; n = k)"),
        ("y = f2(x, w = x)", "y = f2(x, w = x)"),
        ("y = f2(x, w = g(k), n = 1)", "y = f2(x, w = g(k), n = 1)"),
        ("y = f2(x; k)", "y = f2(x; k)"),
        ("y = f2(; k)", "y = f2(k)"),
        ("y = normal(std = 0.02)", "y = normal(std = 0.02)"),
        ("y = other.f(x, n = 1)", "y = other.f(x, n = 1)"),
        ("y = std.linear(x, 64, bias = false)", "y = std.linear(x; 64, bias = false)"),
        ("y = std.linear(x, 64; bias = false)", "y = std.linear(x; 64, bias = false)"),
        ("y = fit(balanced; degree = 4, bound = 2.0)", "y = fit(balanced, degree = 4, bound = 2.0)"),
        (
            "y = polynomial(x, coefficients = fit(taylor, 2, 1.0))",
            "y = polynomial(x; coefficients = fit(taylor, 2, 1.0))",
        ),
        ("y = other.g(x, coefficients = other.fit(x))", "y = other.g(x, coefficients = other.fit(x))"),
        ("y = f(x, k)", "y = f(x, k)"),  # not the block itself: a block cannot call itself
    ],
)
def test_semicolon_before_the_first_compile_time_value(text: str, expected: str) -> None:
    assert body(text) == expected


def test_tensors_of_operations_never_stand_behind_the_semicolon() -> None:
    operations = [*OPERATIONS.values(), *(one for pair in OVERLOADS.values() for one in pair)]
    parameters = [parameter for operation in operations for parameter in operation.parameters]
    assert {one.name for one in parameters if one.kind in ("tensor", "tensors")} == OPERATION_TENSORS
    assert body("y = where(x, a = 1.0, b = 0.0)") == "y = where(x, a = 1.0, b = 0.0)"


def test_semicolon_by_the_signature_of_a_block_of_the_file() -> None:
    text = "block g(x: float[b], y: float[b]; k: int) -> float[b] {}\nblock f(x: float[b]) -> float[b] {{\n{}\n}}\n"
    text = text.replace("{}\n", "{\n}\n", 1)
    for call, expected in [
        ("g(x, x, 3)", "g(x, x; 3)"),
        ("g(x, y = x, k = x)", "g(x, y = x; k = x)"),
        ("g(x; x, 3)", "g(x, x; 3)"),
        ("g(x, k = 3, y = x)", "g(x, k = 3, y = x)"),
    ]:
        assert f"    y = {expected}\n" in check(text.replace("{{\n{}\n}}", f"{{\ny = {call}\n}}"))


def test_a_block_of_the_file_hides_the_operation_of_its_name() -> None:
    text = (
        "block fit(x: float[b]; k: int) -> float[b] {\n    return x\n}\nblock f(x: float[b]) -> float[b] {\n"
    )
    assert "    y = fit(x; 3)\n" in check(f"{text}    y = fit(x, 3)\n}}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = ((x))", "y = x"),
        ("y = (x * k) + (x)", "y = (x * k) + x"),
        ("y = x-(k-1)", "y = x - (k - 1)"),
        ("y = x - k - 1", "y = x - k - 1"),
        ("y = (a<b)==c", "y = (a < b) == c"),
        ("y = not(a and b)", "y = not (a and b)"),
        ("y = (a if b else c) if d else e", "y = (a if b else c) if d else e"),
        ("y = a if b else (c if d else e)", "y = a if b else c if d else e"),
        ("y = (-x).T", "y = (-x).T"),
        ("y = (norm(x) as n) @ x", "y = (norm(x) as n) @ x"),
        ("y = x [ .. , 1 : k ]", "y = x[.., 1:k]"),
        ("y = 65_536*1E-2", "y = 65_536 * 1E-2"),
    ],
)
def test_parentheses_and_spaces(text: str, expected: str) -> None:
    assert body(text) == expected


def test_long_lines_are_broken() -> None:
    text = "y = x + std.attention(x, k, " + ", ".join(f"name{i} = {i}" for i in range(12)) + ")"
    lines = body(text).splitlines()
    assert lines[:4] == ["y = x + std.attention(", "    x;", "    k,", "    name0 = 0,"]
    assert lines[-1] == ")"
    chain = body("y = " + " + ".join(["a_rather_long_name"] * 20))
    assert max(map(len, chain.splitlines())) <= MAX_COLUMNS


def test_errors_are_refused() -> None:
    with pytest.raises(TfgError):
        format_source("param a = \n")


def test_carriage_returns_become_line_ends() -> None:
    assert format_source("param a=1\r\n# c\r\n") == "param a = 1\n# c\n"


@pytest.mark.medium
def test_large_texts_take_linear_time() -> None:
    line = "    x = f(x, 1, k = 2)  # comment\n"
    text = f"block f2(x: float[b]) -> float[b] {{\n{line * 1500}}}\n"
    assert check(text).count("# comment") == 1500
