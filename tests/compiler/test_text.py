"""The text form of programs: what is printed parses back, and a malformed text says where."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import (
    ON_VIOLATION,
    ROLES,
    TRUST,
    Attribute,
    Bound,
    Budget,
    BudgetRule,
    DimInfo,
    Graph,
    Memory,
    Node,
    Program,
    TensorType,
)
from fastgrad_compiler.ir.text import parse_program, print_program
from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_grammar.source import Source, Span

EXAMPLE = """\
program gpt
main gpt
objective loss
dim n <= 65536 % 64  # bounded.tfg:12
budget {  # bounded.tfg:40
    output <= 0.01
    near = 256
    at "layers.0.*" relative = 0.001  # bounded.tfg:44
    at "layers.5.*" exact
}

graph gpt block gpt {  # bounded.tfg:14
    %x = input() : float[b, n, 16]
    %w = weight(init = ("normal", 0.0, 0.02), label = "w") : float[16, 16]
    %y = matmul(%x, %w) : float[b, n, 16] where in [-1.0, 1.0], norm <= 4.0, asserted, by "# b", "c"  # a:15
    %z = reshape(%y, shape = [b*n, 4, 4]) : float[b*n, 4, 4]
    %layers.3.x = slice(%z, axis = -1, start = 0, stop = <n/64>) : float[b*n, 4, n/64]
    %pair = call(%x, %y, graph = "layer", label = "layers") : (float[b], int[])
    return %layers.3.x, %pair
}
"""


def test_prints_what_it_parsed() -> None:
    assert print_program(parse_program(EXAMPLE)) == EXAMPLE


def test_reads_values_as_what_they_are() -> None:
    text = (
        "graph g {\n"
        "%x = op(a = 1, b = 1.0, c = -inf, d = true, e = none, "
        'f = "1", g = (1,), h = [n], i = <n>, j = ())\n'
        "return %x\n}"
    )
    n = Dim.of("n")
    assert dict(parse_program(text)["g"]["x"].attributes) == {
        "a": 1, "b": 1.0, "c": -math.inf, "d": True, "e": None,
        "f": "1", "g": (1,), "h": (n,), "i": n, "j": (),
    }  # fmt: skip
    assert type(parse_program(text)["g"]["x"]["b"]) is float
    assert type(parse_program(text)["g"]["x"]["a"]) is int


def test_places_come_from_spans() -> None:
    source = Source("m.tfg", "a\nbc\nd")
    node = Node("x", "input", span=Span(source, 2, 4))
    text = print_program(Program((Graph("g", (node,), ("x",)),), "g"))
    assert "%x = input()  # m.tfg:2" in text
    span = parse_program(text)["g"]["x"].span
    assert span is not None
    assert span.short_place == "m.tfg:2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a program holds at least one graph"),
        ("grph g {\n}", "line 1: expected one of program"),
        ("graph g {\n  %x = input()\n", r"line 1: `\{` is never closed"),
        ("graph g {\n  %x = input()\n}", "line 1: graph g returns nothing"),
        ("graph g {\n  x = input()\n}", "line 2: expected `%`, found `x`"),
        ("graph g {\n  %x = input(\n}", "line 2: expected a name, found the end of the line"),
        ("graph g {\n\n  %x = f(a = 1, %y)\n}", "line 3: expected inputs before attributes"),
        ("graph g {\n  %x = f(a = 1, a = 2)\n}", "line 2: expected a once"),
        ("graph g {\n  %x = f(a = @)\n}", "line 2: unexpected character '@'"),
        ("graph g {\n  %x = f() : real[n]\n}", "line 2: expected float, int or bool"),
        ("graph g {\n  %x = f() : float[n] where in [0, 1]\n}", "line 2: expected `,`"),
        ("graph g {\n  return %x\n  %y = f()\n}", "line 3: expected `}` after return"),
        ("dim n <= many\n", "line 1: expected an integer, found `many`"),
        (
            "budget {\n  speed <= 3\n}",
            "line 2: expected output, gradient, memory, near, trust, on_violation or at",
        ),
    ],
)
def test_a_malformed_text_says_where(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_program(text)


@pytest.mark.parametrize(
    "text", ["", " ", "n +", "+", "4 n", "n m", "n/0", "n/m", "n/-2", "(n)", "n # a", "n\nm", "1.5", "%"]
)
def test_what_is_no_dim_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"line 1|divided by 0"):
        parse_dim(text)


names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,4}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True)
identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,4}", fullmatch=True)
numbers = st.floats(allow_nan=False)
fractions = st.builds(Fraction, st.integers(-99, 99), st.sampled_from([1, 2, 64]))
terms = st.tuples(st.lists(st.sampled_from("bnm"), max_size=2), fractions)
dims = st.lists(terms, max_size=3).map(lambda terms: Dim._sum((tuple(sorted(m)), c) for m, c in terms))
texts = st.text(max_size=6)
scalars: st.SearchStrategy[Attribute] = st.one_of(
    st.integers(), numbers, st.booleans(), st.none(), texts, dims
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
tensors = st.builds(
    TensorType, st.sampled_from(["float", "int", "bool"]), st.lists(dims, max_size=3).map(tuple)
)
types = st.one_of(st.none(), tensors, st.lists(tensors, max_size=3).map(tuple))
bounds = st.one_of(
    st.none(),
    st.builds(Bound, numbers, numbers, numbers, st.booleans(), st.lists(texts, max_size=2).map(tuple)),
)
attribute_sets = st.dictionaries(identifiers, values, max_size=3).map(lambda d: tuple(sorted(d.items())))
inputs = st.lists(st.one_of(names, texts.filter(bool)), max_size=3).map(tuple)
nodes = st.builds(Node, names, names, inputs, attribute_sets, types, bounds)
graphs = st.builds(
    Graph, names, st.lists(nodes, max_size=4).map(tuple), st.lists(names, max_size=2).map(tuple), names
)
rules = st.builds(
    BudgetRule, texts, identifiers, st.one_of(st.none(), numbers, st.integers(), texts.filter(bool))
)
budgets = st.builds(
    Budget,
    st.one_of(st.none(), numbers),
    st.one_of(st.none(), numbers),
    st.one_of(st.none(), numbers),
    st.one_of(st.none(), st.integers(1, 99)),
    st.lists(rules, max_size=2).map(tuple),
    st.one_of(st.none(), st.sampled_from(TRUST)),
    st.one_of(st.none(), st.sampled_from(ON_VIOLATION)),
)
dim_infos = st.builds(DimInfo, identifiers, st.one_of(st.none(), st.integers(0, 10**6)), st.integers(1, 128))
memories = st.builds(
    Memory,
    st.lists(st.tuples(identifiers, st.integers(1, 10**9)), min_size=1, max_size=2).map(tuple),
    st.one_of(st.none(), st.integers(1, 10**6)),
)
programs = st.builds(
    Program,
    st.lists(graphs, min_size=1, max_size=2).map(tuple),
    names,
    *(st.one_of(st.none(), names) for _ in ROLES[1:]),
    st.lists(dim_infos, max_size=2).map(tuple),
    st.one_of(st.none(), budgets),
    st.one_of(st.none(), memories),
    names,
)


@pytest.mark.medium
@given(programs)
def test_round_trip(program: Program) -> None:
    text = print_program(program)
    parsed = parse_program(text)
    assert parsed == program
    assert print_program(parsed) == text
    proofs = [node.bound.proof for graph in program.graphs for node in graph.nodes if node.bound]
    assert proofs == [node.bound.proof for graph in parsed.graphs for node in graph.nodes if node.bound]


@given(dims)
def test_a_dim_is_read_from_its_text(dim: Dim) -> None:
    assert parse_dim(str(dim)) == dim
