"""Parses the text form of a program that `text.py` prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import NoReturn, TypeVar

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import (
    Attribute,
    Bound,
    Budget,
    BudgetRule,
    DimInfo,
    Graph,
    Node,
    Program,
    TensorType,
    Type,
)
from fastgrad_grammar.source import Source, Span

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<string>"(?:\\.|[^"\\])*")
    | (?P<float>-?(?:inf|nan)\b | -?\d+(?:\.\d*(?:[eE][-+]?\d+)?|[eE][-+]?\d+)(?![\w.]))
    | (?P<int>-?\d+(?![\w.]))
    | (?P<name>[\w.]+)
    | (?P<symbol><= | [%=(),:\[\]{}<>*/+-])
    | (?P<comment>\#.*)
    )""",
    re.VERBOSE | re.ASCII,
)
_WORDS: dict[str, Attribute] = {"true": True, "false": False, "none": None}
_PLACE = re.compile(r"#\s*(?P<path>.+):(?P<line>\d+)\s*")
_Item = TypeVar("_Item")


@dataclass
class _Line:
    """The tokens of one line, and how many of them are read."""

    number: int
    text: str
    tokens: list[tuple[str, str]] = field(default_factory=list)
    span: Span | None = None
    position: int = 0

    @property
    def kind(self) -> str:
        return self.tokens[self.position][0] if self.position < len(self.tokens) else "end"

    @property
    def token(self) -> str:
        return self.tokens[self.position][1] if self.position < len(self.tokens) else ""

    def fail(self, expected: str) -> NoReturn:
        found = f"`{self.token}`" if self.token else "the end of the line"
        raise ValueError(f"line {self.number}: expected {expected}, found {found}: {self.text.strip()}")

    def next(self) -> str:
        token = self.token
        self.position += 1
        return token

    def accept(self, token: str) -> bool:
        if self.kind in ("symbol", "name") and self.token == token:
            self.position += 1
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.accept(token):
            self.fail(f"`{token}`")

    def end(self) -> None:
        if self.kind != "end":
            self.fail("the end of the line")

    def name(self) -> str:
        if self.kind == "string":
            return str(json.loads(self.next()))
        if self.kind in ("name", "int") and not self.token.startswith("-"):
            return self.next()
        self.fail("a name")

    def string(self) -> str:
        if self.kind != "string":
            self.fail("a string")
        return str(json.loads(self.next()))

    def integer(self) -> int:
        if self.kind != "int":
            self.fail("an integer")
        return int(self.next())

    def number_(self) -> float:
        if self.kind not in ("int", "float"):
            self.fail("a number")
        return float(self.next())

    def list(self, item: Callable[[_Line], _Item], close: str) -> tuple[_Item, ...]:
        """Items between commas up to `close`, which is read; a comma before it is allowed."""
        items: list[_Item] = []
        while not self.accept(close):
            items.append(item(self))
            if not self.accept(","):
                self.expect(close)
                break
        return tuple(items)


def parse_program(text: str) -> Program:
    """The program of a text that `print_program` wrote, or that was written by hand in its manner.

    Names default: the program to "model", `main` to the first graph. ValueError with the line number on a
    malformed text.
    """
    lines = _lines(text)
    state = _Header()
    for line in lines:
        keyword = line.name()
        if keyword not in _ITEMS:
            line.position -= 1
            line.fail("one of " + ", ".join(_ITEMS))
        _ITEMS[keyword](state, line, lines)
    if not state.graphs:
        raise ValueError("line 1: a program holds at least one graph")
    return Program(
        tuple(state.graphs),
        state.names.get("main", state.graphs[0].name),
        state.names.get("objective"),
        state.names.get("gradient"),
        tuple(state.dims),
        state.budget,
        state.names.get("program", "model"),
    )


def parse_dim(text: str) -> Dim:
    """A dim from the text that `str` gives of it; ValueError for anything else."""
    (line,) = _lines(text)
    dim = _dim(line)
    line.end()
    return dim


@dataclass
class _Header:
    names: dict[str, str] = field(default_factory=dict)
    dims: list[DimInfo] = field(default_factory=list)
    budget: Budget | None = None
    graphs: list[Graph] = field(default_factory=list)


def _lines(text: str) -> Iterator[_Line]:
    """The lines that hold tokens."""
    for number, content in enumerate(text.split("\n"), start=1):
        line = _Line(number, content)
        position = 0
        stripped = content.rstrip()
        while position < len(stripped):
            match = _TOKEN.match(stripped, position)
            if match is None or match.lastgroup is None:
                character = stripped[position:].strip()[0]
                raise ValueError(f"line {number}: unexpected character {character!r}: {content.strip()}")
            if match.lastgroup == "comment":
                line.span = _place(match["comment"])
            else:
                line.tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()
        if line.tokens:
            yield line


def _place(comment: str) -> Span | None:
    match = _PLACE.fullmatch(comment)
    return _span(match["path"], int(match["line"])) if match else None


@lru_cache(maxsize=4096)
def _span(path: str, line: int) -> Span:
    """A place known by its line only: the line's start in a text of empty lines."""
    return Span(Source(path, "\n" * (line - 1)), line - 1, line - 1)


# ---------------------------------------------------------------- items


def _named(keyword: str) -> Callable[[_Header, _Line, Iterator[_Line]], None]:
    def parse(state: _Header, line: _Line, lines: Iterator[_Line]) -> None:
        state.names[keyword] = line.name()
        line.end()

    return parse


def _parse_dim(state: _Header, line: _Line, lines: Iterator[_Line]) -> None:
    name = line.name()
    at_most = line.integer() if line.accept("<=") else None
    multiple_of = line.integer() if line.accept("%") else 1
    line.end()
    state.dims.append(DimInfo(name, at_most, multiple_of, line.span))


def _parse_budget(state: _Header, line: _Line, lines: Iterator[_Line]) -> None:
    line.expect("{")
    line.end()
    limits: dict[str, float] = {}
    words: dict[str, str] = {}
    near: int | None = None
    rules: list[BudgetRule] = []
    for entry in _body(line, lines):
        if entry.accept("at"):
            rules.append(_parse_rule(entry))
        elif entry.accept("near"):
            entry.expect("=")
            near = entry.integer()
        elif entry.token in ("output", "gradient"):
            key = entry.next()
            entry.expect("<=")
            limits[key] = entry.number_()
        elif entry.token in ("trust", "on_violation"):
            key = entry.next()
            entry.expect("=")
            words[key] = entry.name()
        else:
            entry.fail("output, gradient, near, trust, on_violation or at")
        entry.end()
    state.budget = Budget(
        limits.get("output"),
        limits.get("gradient"),
        near,
        tuple(rules),
        words.get("trust"),
        words.get("on_violation"),
        line.span,
    )


def _parse_rule(line: _Line) -> BudgetRule:
    pattern, kind = line.string(), line.name()
    value = _attribute(line) if line.accept("=") else None
    if isinstance(value, tuple | Dim):
        line.fail("a number or a string")
    return BudgetRule(pattern, kind, value, line.span)


def _parse_graph(state: _Header, line: _Line, lines: Iterator[_Line]) -> None:
    name = line.name()
    block = line.name() if line.accept("block") else ""
    line.expect("{")
    line.end()
    nodes: list[Node] = []
    outputs: tuple[str, ...] | None = None
    for entry in _body(line, lines):
        if outputs is not None:
            entry.fail("`}` behind return")
        if entry.accept("return"):
            outputs = _outputs(entry)
        else:
            nodes.append(_node(entry))
        entry.end()
    if outputs is None:
        raise ValueError(f"line {line.number}: graph {name} returns nothing")
    state.graphs.append(Graph(name, tuple(nodes), outputs, block, line.span))


def _body(opening: _Line, lines: Iterator[_Line]) -> Iterator[_Line]:
    for line in lines:
        if line.accept("}"):
            line.end()
            return
        yield line
    raise ValueError(f"line {opening.number}: `{{` is never closed")


_ITEMS: dict[str, Callable[[_Header, _Line, Iterator[_Line]], None]] = {
    **{keyword: _named(keyword) for keyword in ("program", "main", "objective", "gradient")},
    "dim": _parse_dim,
    "budget": _parse_budget,
    "graph": _parse_graph,
}


# ---------------------------------------------------------------- nodes


def _outputs(line: _Line) -> tuple[str, ...]:
    names: list[str] = []
    while line.kind != "end":
        names.append(_reference(line))
        if not line.accept(","):
            break
    return tuple(names)


def _reference(line: _Line) -> str:
    line.expect("%")
    return line.name()


def _node(line: _Line) -> Node:
    name = _reference(line)
    line.expect("=")
    op = line.name()
    line.expect("(")
    inputs: list[str] = []
    attributes: dict[str, Attribute] = {}
    for key, value in line.list(_argument, ")"):
        if key is None:
            if attributes:
                line.fail("inputs before attributes")
            inputs.append(str(value))
        elif key in attributes:
            line.fail(f"{key} once")
        else:
            attributes[key] = value
    type_ = _type(line) if line.accept(":") else None
    bound = _bound(line) if line.accept("where") else None
    return Node(name, op, tuple(inputs), tuple(sorted(attributes.items())), type_, bound, line.span)


def _argument(line: _Line) -> tuple[str | None, Attribute]:
    if line.token == "%":
        return None, _reference(line)
    key = line.name()
    line.expect("=")
    return key, _attribute(line)


def _attribute(line: _Line) -> Attribute:
    if line.kind in _LITERALS:
        return _LITERALS[line.kind](line)
    if line.accept("<"):
        dim = _dim(line)
        line.expect(">")
        return dim
    if line.accept("["):
        return line.list(_dim, "]")
    if line.accept("("):
        return line.list(_attribute, ")")
    if line.kind == "name" and line.token in _WORDS:
        return _WORDS[line.next()]
    line.fail("a value")


_LITERALS: dict[str, Callable[[_Line], Attribute]] = {
    "string": lambda line: line.string(),
    "int": lambda line: line.integer(),
    "float": lambda line: line.number_(),
}


def _type(line: _Line) -> Type:
    if line.accept("("):
        return line.list(_tensor_type, ")")
    return _tensor_type(line)


def _tensor_type(line: _Line) -> TensorType:
    dtype = line.name()
    if dtype not in ("float", "int", "bool"):
        line.position -= 1
        line.fail("float, int or bool")
    line.expect("[")
    return TensorType(dtype, line.list(_dim, "]"))


def _dim(line: _Line) -> Dim:
    """A sum of products, each optionally over an integer, as `str(Dim)` prints it."""
    total = _term(line)
    while line.token in ("+", "-") or (line.kind == "int" and line.token.startswith("-")):
        if line.token == "+":
            line.next()
            total += _term(line)
        elif line.accept("-"):
            total += _term(line) * -1
        else:
            total += _term(line)
    return total


def _term(line: _Line) -> Dim:
    result = _factor(line)
    while line.accept("*"):
        result *= _factor(line)
    if line.accept("/"):
        result *= Dim((((), Fraction(1, line.integer())),))
    return result


def _factor(line: _Line) -> Dim:
    if line.kind == "int":
        return Dim.of(line.integer())
    return Dim.of(line.name())


def _bound(line: _Line) -> Bound:
    line.expect("in")
    line.expect("[")
    low = line.number_()
    line.expect(",")
    high = line.number_()
    line.expect("]")
    line.expect(",")
    line.expect("norm")
    line.expect("<=")
    norm = line.number_()
    asserted = False
    proof: list[str] = []
    while line.accept(","):
        if line.accept("asserted"):
            asserted = True
            continue
        if not proof:
            line.expect("by")
        proof.append(line.string())
    return Bound(low, high, norm, asserted, tuple(proof))
