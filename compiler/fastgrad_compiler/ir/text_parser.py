"""Parses the text form of a program that `text.py` prints; text.lark is its grammar."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from lark import Lark, Token, Transformer, UnexpectedCharacters, UnexpectedInput, UnexpectedToken, v_args

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import (
    ROLES,
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
    Type,
)
from fastgrad_grammar.source import Source, Span

_GRAMMAR = Path(__file__).with_name("text.lark")
_PLACE = re.compile(r"#\s*(?P<path>.+):(?P<line>\d+)\s*")
_EXPECTED = {
    "GRAPH": "one of program, main, objective, gradient, step, along, training, dim, budget, memory, graph",
    "_AT": "output, gradient, memory, near, trust, on_violation or at",
    "_RETURN": "`%`",
    "DTYPE": "float, int or bool",
    "WORD": "a value",
    "NAME": "a name",
    "SYMBOL": "a name",
    "FLOAT": "a number",
    "INT": "an integer",
    "SIZE": "an integer",
    "STRING": "a string",
    "_NL": "the end of the line",
    "$END": "the end of the line",
    "RBRACE": "`}` after return",
}
"""What a line lacks, by the first of these terminals that may stand there."""

_Item = TypeVar("_Item")


def parse_program(text: str) -> Program:
    """The program of a text that `print_program` wrote, or that was written by hand in its manner.

    Names default: the program to "model", `main` to the first graph. ValueError with the line number on a
    malformed text.
    """
    return cast(Program, _parse(f"\n{text}\n", "program"))


def parse_dim(text: str) -> Dim:
    """A dim from the text that `str` gives of it; ValueError for anything else."""
    return cast(Dim, _parse(text, "dim"))


@lru_cache(maxsize=1)
def _parser() -> Lark:
    return Lark(
        _GRAMMAR.read_text(encoding="utf-8"), parser="lalr", start=["program", "dim"], transformer=_Build(),
        maybe_placeholders=True,
    )  # fmt: skip


def _parse(text: str, start: str) -> object:
    try:
        return _parser().parse(text, start=start)
    except UnexpectedInput as error:
        raise ValueError(_said(text, start, error)) from None


def _said(text: str, start: str, error: UnexpectedInput) -> str:
    first = 1 if start == "program" else 0  # line of the text: an empty one stands before it
    content = text.split("\n")[max(error.line, 0) - 1].strip()
    if isinstance(error, UnexpectedCharacters):
        return f"line {error.line - first}: unexpected character {error.char!r}: {content}"
    assert isinstance(error, UnexpectedToken)
    if error.token.type == "$END" and start == "program":
        stack = error.interactive_parser.parser_state.value_stack
        opening = [each for each in stack if isinstance(each, Token) and each.type == "LBRACE"]
        return f"line {_line(opening[-1])}: `{{` is never closed"
    names = error.accepts or error.expected
    known = next((words for name, words in _EXPECTED.items() if name in names), None)
    expected = known or f"`{_symbol(min(names))}`"
    found = "the end of the line" if error.token.type in ("_NL", "PLACE", "$END") else f"`{error.token}`"
    return f"line {error.line - first}: expected {expected}, found {found}: {content}"


def _symbol(name: str) -> str:
    """A symbol or a keyword as it is written."""
    return str(_parser().get_terminal(name).pattern.value).partition("(")[0]


def _line(token: Token) -> int:
    """In a text of a program, before which an empty line stands."""
    return (token.line or 1) - 1


def _place(comment: Token | None) -> Span | None:
    match = _PLACE.fullmatch(comment) if comment else None
    return _span(match["path"], int(match["line"])) if match else None


@lru_cache(maxsize=4096)
def _span(path: str, line: int) -> Span:
    """A place known by its line only: the line's start in a text of empty lines."""
    return Span(Source(path, "\n" * (line - 1)), line - 1, line - 1)


class _Pair(NamedTuple):
    """An attribute, or an entry of the head or of a budget."""

    key: str
    value: Attribute


def _several(_: object, *items: _Item) -> tuple[_Item, ...]:
    return items


def _pair(_: object, key: str, value: Attribute, place: Token | None = None) -> _Pair:
    return _Pair(str(key), value)


@v_args(inline=True)
class _Build(Transformer[Token, object]):
    """What each rule of the grammar gives, from what the rules within it gave."""

    named = near = setting = attribute = size_of = _pair
    nodes = entries = arguments = dims = group = tensors = proof = _several

    def program(self, *items: _Pair | DimInfo | Budget | Memory | Graph) -> Program:
        graphs = tuple(item for item in items if isinstance(item, Graph))
        if not graphs:
            raise ValueError("line 1: a program holds at least one graph")
        names = {item.key: str(item.value) for item in items if isinstance(item, _Pair)}
        dims = tuple(item for item in items if isinstance(item, DimInfo))
        budget = next((item for item in reversed(items) if isinstance(item, Budget)), None)
        memory = next((item for item in items if isinstance(item, Memory)), None)
        main = names.get("main", graphs[0].name)
        name = names.get("program", "model")
        roles = {role: names.get(role) for role in ROLES[1:]}
        return Program(graphs, main, **roles, dims=dims, budget=budget, memory=memory, name=name)

    def dim_info(self, name: str, most: int | None, multiple: int | None, place: Token | None) -> DimInfo:
        return DimInfo(name, most, 1 if multiple is None else multiple, _place(place))

    def budget(
        self, place: Token | None, entries: tuple[_Pair | BudgetRule, ...], end: Token | None
    ) -> Budget:
        rules = tuple(entry for entry in entries if isinstance(entry, BudgetRule))
        limits: dict[str, Any] = dict(entry for entry in entries if isinstance(entry, _Pair))
        return Budget(rules=rules, span=_place(place), **limits)

    def memory(self, *parts: Any) -> Memory:
        *sizes, piece = parts
        return Memory(tuple((name, size) for name, size in sizes), piece)

    def limit(self, key: Token, value: float, place: Token | None) -> _Pair:
        return _Pair(str(key), float(value))

    def rule(self, pattern: str, kind: str, value: float | str | None, place: Token | None) -> BudgetRule:
        return BudgetRule(pattern, kind, value, _place(place))

    def graph(
        self, at: Token, name: str, block: str | None, place: Token | None, nodes: tuple[Node, ...],
        outputs: tuple[str, ...] | None, end: Token | None,
    ) -> Graph:  # fmt: skip
        if outputs is None:
            raise ValueError(f"line {_line(at)}: graph {name} returns nothing")
        return Graph(name, nodes, outputs, block or "", _place(place))

    def outputs(self, *names: str | None) -> tuple[str | None, ...]:
        return names[:-1]  # the last is the place

    def node(
        self, name: str, at: Token, op: str, arguments: tuple[str | _Pair, ...], type_: Type | None,
        bound: Bound | None, place: Token | None,
    ) -> Node:  # fmt: skip
        inputs = tuple(each for each in arguments if not isinstance(each, _Pair))
        pairs = [each for each in arguments if isinstance(each, _Pair)]
        if arguments[: len(inputs)] != inputs:
            raise ValueError(f"line {_line(at)}: expected inputs before attributes")
        attributes = dict(pairs)
        for key in attributes:
            if sum(each.key == key for each in pairs) > 1:
                raise ValueError(f"line {_line(at)}: expected {key} once")
        return Node(name, op, inputs, tuple(sorted(attributes.items())), type_, bound, _place(place))

    def tensor(self, dtype: Token, dims: tuple[Dim, ...]) -> TensorType:
        return TensorType(str(dtype), dims)

    def bound(
        self, low: float, high: float, norm: float, asserted: Token | None, proof: tuple[str, ...] | None
    ) -> Bound:
        return Bound(float(low), float(high), float(norm), asserted is not None, proof or ())

    def dim(self, *terms: Token | Dim) -> Dim:
        total, sign = Dim.of(0), 1
        for term in terms:
            if isinstance(term, Dim):
                total, sign = total + term * sign, 1
            else:
                sign = -1
        return total

    def term(self, *parts: Any) -> Dim:
        *factors, divisor = parts
        if divisor is not None and int(divisor) == 0:
            raise ValueError("a dim is divided by 0")
        product = Dim((((), Fraction(1, int(divisor or 1))),))
        for factor in factors:
            product = product * Dim.of(factor)
        return product

    def size(self, digits: Token) -> int:
        return int(digits)

    integer = size

    def number(self, digits: Token) -> float:
        return int(digits) if digits.type == "INT" else float(digits)

    def string(self, text: Token) -> str:
        return str(json.loads(text))

    def name(self, text: Token) -> str:
        return str(json.loads(text)) if text.type == "STRING" else str(text)

    symbol = name

    def word(self, text: Token) -> bool | None:
        return {"true": True, "false": False, "none": None}[text]
