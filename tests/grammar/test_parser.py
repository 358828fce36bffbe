"""Every construct of the language gives the tree that docs/language.md says it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.layout import MAX_NESTING
from fastgrad_grammar.parser import MAX_DIAGNOSTICS, parse
from fastgrad_grammar.read import read_source
from fastgrad_grammar.source import Source

ROOT = Path(__file__).parent.parent.parent
TEXTS = sorted([*(ROOT / "grammar/fastgrad_grammar/std").glob("*.tfg"), *(ROOT / "examples").glob("*.tfg")])


def items(text: str) -> tuple[ast.Item, ...]:
    return parse(Source("<text>", text)).items


def expression(text: str) -> ast.Expr:
    (item,) = items(f"param p = {text}\n")
    assert isinstance(item, ast.Param)
    return item.value


def statements(text: str) -> tuple[ast.Statement, ...]:
    (item,) = items(f"block f(x: float[b]) -> float[b] {{\n{text}\n}}\n")
    assert isinstance(item, ast.BlockDecl)
    return item.body


def codes(text: str) -> list[str]:
    with pytest.raises(TfgError) as caught:
        parse(Source("<text>", text))
    return [found.code for found in caught.value.diagnostics]


def shape(expr: ast.Expr | None) -> str:
    """An expression with every parenthesis written out."""
    match expr:
        case ast.Binary():
            return f"({shape(expr.left)} {expr.op} {shape(expr.right)})"
        case ast.Unary():
            return f"({expr.op} {shape(expr.operand)})"
        case ast.Conditional():
            return f"({shape(expr.then)} if {shape(expr.condition)} else {shape(expr.otherwise)})"
        case ast.Transpose():
            return f"{shape(expr.operand)}.T"
        case ast.Ref():
            return expr.name
        case ast.Literal():
            return repr(expr.value)
        case ast.Tuple():
            return f"<{' '.join(map(shape, expr.items))}>"
        case ast.Call():
            return f"{expr.function.text}({', '.join(shape(one.value) for one in expr.arguments)})"
        case _:
            raise AssertionError(expr)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b * c", "(a + (b * c))"),
        ("a - b - c", "((a - b) - c)"),
        ("a / b // c % d", "(((a / b) // c) % d)"),
        ("-a * b", "((- a) * b)"),
        ("a * -b", "(a * (- b))"),
        ("-a.T", "(- a.T)"),
        ("(-a).T", "(- a).T"),
        ("q @ k.T @ v", "((q @ k.T) @ v)"),
        ("not a == b and c or d", "(((not (a == b)) and c) or d)"),
        ("a if b else c if d else e", "(a if b else (c if d else e))"),
        ("a or b if c else d", "((a or b) if c else d)"),
        ("a <= b + 1", "(a <= (b + 1))"),
        ("(0, 2, 1)", "<0 2 1>"),
        ("(a,)", "<a>"),
        ("f((a), -1)", "f(a, (- 1))"),
        ("at + exact", "(at + exact)"),
    ],
)
def test_operators_bind_as_in_python(text: str, expected: str) -> None:
    assert shape(expression(text)) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("65_536", 65536),
        ("007", 7),
        ("0.5", 0.5),
        ("1e-2", 0.01),
        ("2.5E3", 2500.0),
        ("1_0.2_5", 10.25),
        ("9223372036854775807", 2**63 - 1),
        ("true", True),
        ("false", False),
        ("none", None),
        (r'"a\"b\\c\n\t"', 'a"b\\c\n\t'),
        ('"# no comment"', "# no comment"),
    ],
)
def test_literals(text: str, value: object) -> None:
    found = expression(text)
    assert isinstance(found, ast.Literal)
    assert (type(found.value), found.value) == (type(value), value)


def test_literals_of_different_types_are_different() -> None:
    one, point, true = (expression(text) for text in ("1", "1.0", "true"))
    assert one != point
    assert one != true
    assert len({one, point, true}) == 3


def test_spans_hold_exactly_the_text_read() -> None:
    text = "block f(x: float[b, n]; k: int = 2) -> float[b] {\n    y = (x + std.g(x; k)) @ x[.., 0:4].T\n}\n"
    (block,) = items(text)
    assert isinstance(block, ast.BlockDecl)
    (assign,) = block.body
    assert isinstance(assign, ast.Assign)
    product = assign.value
    assert isinstance(product, ast.Binary)
    assert isinstance(product.left, ast.Binary)
    found = [
        block.tensors[0].span.text,
        block.values[0].span.text,
        block.results[0].span.text,
        assign.span.text,
        product.left.span.text,
        product.left.right.span.text,
        product.right.span.text,
    ]
    assert found == [
        "x: float[b, n]",
        "k: int = 2",
        "float[b]",
        "y = (x + std.g(x; k)) @ x[.., 0:4].T",
        "x + std.g(x; k)",
        "std.g(x; k)",
        "x[.., 0:4].T",
    ]
    assert block.span.text == text.rstrip()
    assert product.right.span.place == "<text>:2:29"


def test_call_sides_keywords_module_and_label() -> None:
    call = expression("std.f(x, y; 3, k = 4) as name")
    assert isinstance(call, ast.Call)
    assert (call.module, call.function.text) == ("std", "f")
    assert call.label is not None
    assert call.label.text == "name"
    assert [one.value_side for one in call.arguments] == [False, False, True, True]
    assert [one.name.text if one.name else None for one in call.arguments] == [None, None, None, "k"]
    assert call == expression("std.f(x, y, 3, k = 4) as name")


def test_slices() -> None:
    index = expression("x[.., 0:4, :k, 1:, :, 7]")
    assert isinstance(index, ast.Index)
    assert [
        (part.ellipsis, part.start is None, part.stop is None, part.index is None) for part in index.slices
    ] == [
        (True, True, True, True),
        (False, False, False, True),
        (False, True, False, True),
        (False, False, True, True),
        (False, True, True, True),
        (False, True, True, False),
    ]


def test_declarations() -> None:
    use, path, typed, maybe, dim, full, product = items(
        'use std\nuse "a/b.tfg" as c\nparam k: int = 3\nparam g: float? = none\n'
        "dim b\ndim n <= 65536 % 64\ndim m <= 2 * k % (k + 1)\n"
    )
    assert isinstance(use, ast.Use)
    assert (use.name.text, use.path) == ("std", None)
    assert isinstance(path, ast.Use)
    assert (path.name.text, path.path) == ("c", "a/b.tfg")
    assert isinstance(typed, ast.Param)
    assert typed.type is not None
    assert (typed.type.name, typed.type.optional) == ("int", False)
    assert isinstance(maybe, ast.Param)
    assert maybe.type is not None
    assert (maybe.type.name, maybe.type.optional) == ("float", True)
    assert isinstance(dim, ast.DimDecl)
    assert (dim.at_most, dim.multiple_of) == (None, None)
    assert isinstance(full, ast.DimDecl)
    assert (shape(full.at_most), shape(full.multiple_of)) == ("65536", "64")
    assert isinstance(product, ast.DimDecl)
    assert (shape(product.at_most), shape(product.multiple_of)) == ("(2 * k)", "(k + 1)")


def test_signatures() -> None:
    block, only_values, model, objective = items(
        'block f(x: float[b, 2 * d], y: int[b],; h: int, s: str = "a",) -> (float[], bool[b]) { }\n'
        "block p(; n: int) -> float[n] { }\n"
        "model m(x: float[b]) -> float[b] { return x }\n"
        "objective loss(x: float[b]) = mean(x)\n"
    )
    assert isinstance(block, ast.BlockDecl)
    assert [one.name.text for one in block.tensors] == ["x", "y"]
    assert [(one.name.text, one.default is None) for one in block.values] == [("h", True), ("s", False)]
    assert [(one.dtype, len(one.dims)) for one in block.results] == [("float", 0), ("bool", 1)]
    assert not block.is_model
    assert isinstance(only_values, ast.BlockDecl)
    assert (only_values.tensors, len(only_values.values)) == ((), 1)
    assert isinstance(model, ast.BlockDecl)
    assert model.is_model
    assert isinstance(objective, ast.Objective)
    assert shape(objective.value) == "mean(x)"


def test_statements() -> None:
    weight, bare, buffer, unpack, repeat, branch, result = statements(
        "weight w: float[n] = normal(std = 0.02)\nweight v: float[n]\nbuffer t: float[n] = arange(n)\n"
        "(a, c) = f(x)\nrepeat i in 2 * k { x = f(x) }\n"
        "if k == 1 {\n y = x\n}\nelse if k == 2 { y = a } else {\n y = c\n}\nreturn (x, y)"
    )
    assert isinstance(weight, ast.Weight)
    assert weight.init is not None
    assert isinstance(bare, ast.Weight)
    assert bare.init is None
    assert isinstance(buffer, ast.Buffer)
    assert shape(buffer.init) == "arange(n)"
    assert isinstance(unpack, ast.Assign)
    assert [name.text for name in unpack.targets] == ["a", "c"]
    assert isinstance(repeat, ast.Repeat)
    assert (repeat.index.text, shape(repeat.count), len(repeat.body)) == ("i", "(2 * k)", 1)
    assert isinstance(branch, ast.If)
    (nested,) = branch.otherwise
    assert isinstance(nested, ast.If)
    assert nested.span.text.startswith("if k == 2")
    assert isinstance(nested.otherwise[0], ast.Assign)
    assert isinstance(result, ast.Return)
    assert shape(result.value) == "<x y>"


def test_budget() -> None:
    everywhere, one = items(
        'budget {\n output <= 1e-2\n near = 256\n at "a.*" relative <= 1e-3\n at "b" exact\n'
        ' at "c" degree = 4\n at = 3\n exact = 1\n}\nbudget gpt { }\n'
    )
    assert isinstance(everywhere, ast.Budget)
    assert everywhere.model is None
    kinds = [type(entry).__name__ for entry in everywhere.entries]
    assert kinds == ["Limit", "Setting", "At", "At", "At", "Setting", "Setting"]
    rules = [entry.rule for entry in everywhere.entries if isinstance(entry, ast.At)]
    assert [type(rule).__name__ for rule in rules] == ["Limit", "Exact", "Setting"]
    assert isinstance(one, ast.Budget)
    assert one.model is not None
    assert one.entries == ()


@pytest.mark.parametrize(
    "text",
    [
        "x = a +\n b",
        "x =\n a + b",
        "x = (\n a\n + b\n)",
        "x = a + # why\n\n b",
    ],
)
def test_a_line_goes_on_in_brackets_and_behind_operators(text: str) -> None:
    assert statements(text) == statements("x = a + b")


def test_line_ends_before_brace_arrow_and_else_are_free() -> None:
    loose = "block f(x: float[b])\n -> float[b]\n{\n if k\n {\n y = x\n }\n else\n {\n y = a if k\n else b\n }\n}\n"
    tight = "block f(x: float[b]) -> float[b] { if k { y = x } else { y = a if k else b } }"
    assert items(loose) == items(tight)


def test_an_empty_text_is_a_file_without_items() -> None:
    assert items("") == items("\n  # nothing\n\n") == ()


def test_carriage_returns_before_line_ends_are_blanks() -> None:
    assert items("param a = 1\r\nparam b = 2\r\n") == items("param a = 1\nparam b = 2\n")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_library_and_examples_parse(path: Path) -> None:
    assert parse(read_source(path)).items


def test_errors_come_in_the_order_of_the_text_and_stop_at_a_limit() -> None:
    text = "".join(f"param p{index} =\n" for index in range(3 * MAX_DIAGNOSTICS))
    with pytest.raises(TfgError) as caught:
        parse(Source("<text>", text))
    places = [found.span.start for found in caught.value.diagnostics if found.span]
    assert len(places) == MAX_DIAGNOSTICS
    assert places == sorted(places)


def test_an_error_hides_no_other_statement() -> None:
    text = "block f(x: float) -> float[b] {\n a = 1 2\n if k = 1 {\n c = )\n }\n return\n}\nparam p = f(\n"
    assert codes(text) == ["FG109", "FG101", "FG108", "FG103", "FG101", "FG102"]


@pytest.mark.parametrize("text", ["(" * 99 + "1" + ")" * 99, "1" + " + 1" * 99, "- " * 99 + "1"])
def test_nesting_below_the_limit_is_read(text: str) -> None:
    expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * (MAX_NESTING + 1) + "1" + ")" * (MAX_NESTING + 1),
        "1" + " + 1" * (MAX_NESTING + 1),
        "- " * (MAX_NESTING + 1) + "1",
        "not " * (MAX_NESTING + 1) + "true",
        "x" + ".T" * (MAX_NESTING + 1),
        "1 if c else " * (MAX_NESTING + 1) + "1",
    ],
)
def test_nesting_beyond_the_limit_is_one_diagnostic(text: str) -> None:
    assert codes(f"param p = {text}\n") == ["FG106"]
