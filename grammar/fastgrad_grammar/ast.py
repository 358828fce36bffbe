"""The abstract syntax of `.tfg`: frozen dataclasses, each with the span it was read from.

Spans take no part in equality, so that two texts that mean the same give equal trees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from fastgrad_grammar.source import Span

# ---------------------------------------------------------------- names and types


@dataclass(frozen=True)
class Name:
    """An identifier where it is declared, or a parameter's name in a call."""

    text: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class TensorType:
    """`float[b, n, 4 * d]`; `dtype` is float, int or bool; no dims is a scalar `float[]`."""

    dtype: str
    dims: tuple[Expr, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class ValueType:
    """The type of a compile-time value: int, float, bool, str or floats; `optional` (`float?`) may be none."""

    name: str
    optional: bool
    span: Span = field(compare=False, repr=False)


# ---------------------------------------------------------------- expressions


@dataclass(frozen=True, eq=False)
class Literal:
    """An int, float, bool, str or none; 1, 1.0 and true are three different literals."""

    value: int | float | bool | str | None
    span: Span = field(compare=False, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Literal):
            return NotImplemented
        return type(self.value) is type(other.value) and self.value == other.value

    def __hash__(self) -> int:
        return hash((type(self.value), self.value))


@dataclass(frozen=True)
class Ref:
    """A name used as a value."""

    name: str
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Unary:
    """`-x` or `not x`; `op` is "-" or "not"."""

    op: str
    operand: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Binary:
    """`op` is one of @ + - * / // % == != < <= > >= and or."""

    op: str
    left: Expr
    right: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Conditional:
    """`then if condition else otherwise`."""

    condition: Expr
    then: Expr
    otherwise: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Transpose:
    """`x.T`, the last two dimensions."""

    operand: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Slice:
    """One place of an index: `a:b` with optional ends, one `index`, or `..` (`ellipsis`: leading dims)."""

    start: Expr | None
    stop: Expr | None
    index: Expr | None
    ellipsis: bool
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Index:
    """`x[.., 0:4]`."""

    operand: Expr
    slices: tuple[Slice, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Tuple:
    """`(a, b)`: several results in `return (a, b)`, or axes as in `permute(x, (0, 2, 1))`."""

    items: tuple[Expr, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Argument:
    """One argument; `name` for keywords; `value_side` if it stood after `;`."""

    value: Expr
    name: Name | None
    value_side: bool = field(compare=False)
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Call:
    """`f(x; k = 1) as label`, also `std.f(...)`: `module` is the qualifier."""

    module: str | None
    function: Name
    arguments: tuple[Argument, ...]
    label: Name | None
    span: Span = field(compare=False, repr=False)


Expr: TypeAlias = Literal | Ref | Unary | Binary | Conditional | Transpose | Index | Tuple | Call


# ---------------------------------------------------------------- statements


@dataclass(frozen=True)
class Assign:
    """`x = expr`, or `(x, y) = expr` for a call with several results."""

    targets: tuple[Name, ...]
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Weight:
    """`weight w: float[n, m] = normal(std = 0.02)`; `init` None takes the default (docs/language.md)."""

    name: Name
    type: TensorType
    init: Call | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Buffer:
    """`buffer x: float[n] = zeros()`: a tensor of the state_dict that is not trained."""

    name: Name
    type: TensorType
    init: Expr | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Repeat:
    """`repeat i in count { body }`."""

    index: Name
    count: Expr
    body: tuple[Statement, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class If:
    """`if condition { then } else { otherwise }` on a compile-time condition; `else if` nests."""

    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Return:
    """`return expr`."""

    value: Expr
    span: Span = field(compare=False, repr=False)


Statement: TypeAlias = Assign | Weight | Buffer | Repeat | If | Return


# ---------------------------------------------------------------- items


@dataclass(frozen=True)
class Use:
    """`use std` (`path` None) or `use "path.tfg" as name`."""

    name: Name
    path: str | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Param:
    """`param name: type = expr`."""

    name: Name
    type: ValueType | None
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class DimDecl:
    """`dim n <= 65536 % 64`."""

    name: Name
    at_most: Expr | None
    multiple_of: Expr | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class TensorParam:
    """`x: float[b, n, d]` before the `;` of a signature."""

    name: Name
    type: TensorType
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class ValueParam:
    """`heads: int = 8` after the `;` of a signature."""

    name: Name
    type: ValueType
    default: Expr | None
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class BlockDecl:
    """`block` or `model` (`is_model`); `results` are the types after `->`."""

    is_model: bool
    name: Name
    tensors: tuple[TensorParam, ...]
    values: tuple[ValueParam, ...]
    results: tuple[TensorType, ...]
    body: tuple[Statement, ...]
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Objective:
    """`objective loss(logits: ..., targets: ...) = expr`."""

    name: Name
    tensors: tuple[TensorParam, ...]
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Limit:
    """`output <= 1e-2`, `gradient <= 5e-2`, or after `at`, `relative <= 1e-3`."""

    name: Name
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Setting:
    """`near = 256`, `degree = 4`, `family = "balanced"`."""

    name: Name
    value: Expr
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Exact:
    """`at "layers.5.*" exact`."""

    span: Span = field(compare=False, repr=False)


Rule: TypeAlias = Limit | Setting | Exact


@dataclass(frozen=True)
class At:
    """`at "layers.0.*" relative <= 1e-3`: one rule for the attentions whose path matches."""

    pattern: Literal
    rule: Rule
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Budget:
    """`budget { ... }` for every model of the file, or `budget gpt { ... }` for one."""

    model: Name | None
    entries: tuple[Limit | Setting | At, ...]
    span: Span = field(compare=False, repr=False)


Item: TypeAlias = Use | Param | DimDecl | BlockDecl | Objective | Budget


@dataclass(frozen=True)
class File:
    """A whole `.tfg` file, its items in order."""

    items: tuple[Item, ...]
    span: Span = field(compare=False, repr=False)
