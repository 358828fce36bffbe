"""The abstract syntax of `.tfg`: frozen dataclasses, each with the span it was read from.

Spans take no part in equality, so that two texts that mean the same give equal trees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from fastgrad_grammar.source import Span


@dataclass(frozen=True)
class Node:
    """A piece of syntax, and where it was read."""

    span: Span = field(compare=False, repr=False)


# ---------------------------------------------------------------- names and types


@dataclass(frozen=True)
class Name(Node):
    """An identifier where it is declared, or a parameter's name in a call."""

    text: str


@dataclass(frozen=True)
class TensorType(Node):
    """`float[b, n, 4 * d]`; `dtype` is float, int or bool; no dims is a scalar `float[]`."""

    dtype: str
    dims: tuple[Expr, ...]


@dataclass(frozen=True)
class ValueType(Node):
    """The type of a compile-time value: int, float, bool, str or floats; `optional` (`float?`) may be none."""

    name: str
    optional: bool


# ---------------------------------------------------------------- expressions


@dataclass(frozen=True, eq=False)
class Literal(Node):
    """An int, float, bool, str or none; 1, 1.0 and true are three different literals."""

    value: int | float | bool | str | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Literal):
            return NotImplemented
        return type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class Ref(Node):
    """A name used as a value."""

    name: str


@dataclass(frozen=True)
class Unary(Node):
    """`-x` or `not x`; `op` is "-" or "not"."""

    op: str
    operand: Expr


@dataclass(frozen=True)
class Binary(Node):
    """`op` is one of @ + - * / // % == != < <= > >= and or."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Conditional(Node):
    """`then if condition else otherwise`."""

    then: Expr
    condition: Expr
    otherwise: Expr


@dataclass(frozen=True)
class Transpose(Node):
    """`x.T`, the last two dimensions."""

    operand: Expr


@dataclass(frozen=True)
class Slice(Node):
    """One place of an index: `a:b` with optional ends, one `index`, or `..` (`ellipsis`: leading dims)."""

    start: Expr | None = None
    stop: Expr | None = None
    index: Expr | None = None
    ellipsis: bool = False


@dataclass(frozen=True)
class Index(Node):
    """`x[.., 0:4]`."""

    operand: Expr
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Tuple(Node):
    """`(a, b)`: several results in `return (a, b)`, or axes as in `permute(x, (0, 2, 1))`."""

    items: tuple[Expr, ...]


@dataclass(frozen=True)
class Argument(Node):
    """One argument; `name` for keywords; `value_side` if it stood after `;`."""

    value: Expr
    name: Name | None
    value_side: bool = field(compare=False)


@dataclass(frozen=True)
class Call(Node):
    """`f(x; k = 1) as label`, also `std.f(...)`: `module` is the qualifier."""

    module: str | None
    function: Name
    arguments: tuple[Argument, ...]
    label: Name | None


Expr: TypeAlias = Literal | Ref | Unary | Binary | Conditional | Transpose | Index | Tuple | Call


# ---------------------------------------------------------------- statements


@dataclass(frozen=True)
class Assign(Node):
    """`x = expr`, or `(x, y) = expr` for a call with several results."""

    targets: tuple[Name, ...]
    value: Expr


@dataclass(frozen=True)
class Weight(Node):
    """`weight w: float[n, m] = normal(std = 0.02)`; `init` None takes the default (docs/language.md)."""

    name: Name
    type: TensorType
    init: Call | None


@dataclass(frozen=True)
class Buffer(Node):
    """`buffer x: float[n] = zeros()`: a tensor of the state_dict that is not trained."""

    name: Name
    type: TensorType
    init: Expr | None


@dataclass(frozen=True)
class Repeat(Node):
    """`repeat i in count { body }`."""

    index: Name
    count: Expr
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class If(Node):
    """`if condition { then } else { otherwise }` on a compile-time condition; `else if` nests."""

    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]


@dataclass(frozen=True)
class Return(Node):
    """`return expr`."""

    value: Expr


Statement: TypeAlias = Assign | Weight | Buffer | Repeat | If | Return


def walk(body: Iterable[Statement]) -> Iterator[Statement]:
    """All statements of a body, those of nested bodies too, in order."""
    for statement in body:
        yield statement
        if isinstance(statement, Repeat):
            yield from walk(statement.body)
        elif isinstance(statement, If):
            yield from walk((*statement.then, *statement.otherwise))


def bound(statement: Statement) -> tuple[Name, ...]:
    """The names that a statement binds, apart from those inside of it."""
    if isinstance(statement, Assign):
        return statement.targets
    return (statement.name,) if isinstance(statement, Weight | Buffer) else ()


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class Use(Node):
    """`use std` or `use "path.tfg" as name`."""

    name: Name
    path: str | None = None


@dataclass(frozen=True)
class Param(Node):
    """`param name: type = expr`."""

    name: Name
    type: ValueType | None
    value: Expr


@dataclass(frozen=True)
class DimDecl(Node):
    """`dim n <= 65536 % 64`."""

    name: Name
    at_most: Expr | None
    multiple_of: Expr | None


@dataclass(frozen=True)
class TensorParam(Node):
    """`x: float[b, n, d]` before the `;` of a signature."""

    name: Name
    type: TensorType


@dataclass(frozen=True)
class ValueParam(Node):
    """`heads: int = 8` after the `;` of a signature."""

    name: Name
    type: ValueType
    default: Expr | None


@dataclass(frozen=True)
class BlockDecl(Node):
    """`block` or `model` (`is_model`); `results` are the types after `->`."""

    is_model: bool
    name: Name
    tensors: tuple[TensorParam, ...]
    values: tuple[ValueParam, ...]
    results: tuple[TensorType, ...]
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class Objective(Node):
    """`objective loss(logits: ..., targets: ...) = expr`."""

    name: Name
    tensors: tuple[TensorParam, ...]
    value: Expr


@dataclass(frozen=True)
class Limit(Node):
    """`output <= 1e-2`, `gradient <= 5e-2`, or after `at`, `relative <= 1e-3`."""

    name: Name
    value: Expr


@dataclass(frozen=True)
class Setting(Node):
    """`near = 256`, `degree = 4`, `family = "balanced"`."""

    name: Name
    value: Expr


@dataclass(frozen=True)
class Exact(Node):
    """`at "layers.5.*" exact`."""


Rule: TypeAlias = Limit | Setting | Exact


@dataclass(frozen=True)
class At(Node):
    """`at "layers.0.*" relative <= 1e-3`: one rule for the attentions whose path matches."""

    pattern: Literal
    rule: Rule


@dataclass(frozen=True)
class Budget(Node):
    """`budget { ... }` for every model of the file, or `budget gpt { ... }` for one."""

    model: Name | None
    entries: tuple[Limit | Setting | At, ...]


Item: TypeAlias = Use | Param | DimDecl | BlockDecl | Objective | Budget


@dataclass(frozen=True)
class File(Node):
    """A whole `.tfg` file, its items in order."""

    items: tuple[Item, ...]
