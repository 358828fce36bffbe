"""Compile-time values: numbers, truths, texts, `none`, dimensions and tuples of numbers, and the arithmetic on them.

int / int is an int where it is exact and a float otherwise; ints stay below 2**63. A dimension whose value is known is
an int; one that is known only at run time stays a `Dim`, which shapes take and conditions do not.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard, TypeVar

from fastgrad_compiler.approximation import elementary
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import TensorType
from fastgrad_grammar.source import Span

Scalar: TypeAlias = "int | float | bool | str | Dim | None"
MAX_INT = 2**63 - 1
MAX_TERMS = 32
MAX_DEGREE = 16


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a dimension got its size: the name to show and its declaration.

    `sized`: the name is that of the size itself, and can be written in a shape; else it is a tensor's.
    """

    text: str
    span: Span
    sized: bool = True

    def __str__(self) -> str:
        return f"{self.text}, {self.span.short_place}"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the graph that the builder `owner` makes: its node, its type and where each of its dims came from.

    `declared` holds, for a weight, its name and its dims as they are written.
    """

    node: str
    type: TensorType
    origins: tuple[Origin | None, ...]
    owner: object
    declared: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True, slots=True)
class Several:
    """A tuple: the results of a call, or in parentheses axes, shapes and the numbers of a `floats`."""

    items: tuple[Value, ...]


Constant: TypeAlias = "Scalar | Several"  # what params and values of blocks hold; a tuple is one of numbers
Value: TypeAlias = "Scalar | Tensor | Several"


_Checked = TypeVar("_Checked")


class ValueProblem(Exception):
    """Compile-time arithmetic without a result: a code, a message and perhaps a help."""

    def __init__(self, code: str, message: str, help_: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.help = help_


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int (and not a bool)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an int or a float (and not a bool)."""
    return isinstance(value, float) or is_int(value)


def is_floats(value: object) -> bool:
    """Whether a value is a tuple of numbers."""
    return isinstance(value, Several) and bool(value.items) and all(map(is_number, value.items))


def describe(value: Value) -> str:
    """A value as messages show it: `the int 3`, `float[b, n]`, `none`."""
    if isinstance(value, Tensor):
        return f"the tensor {value.type}"
    if isinstance(value, Several):
        return f"a tuple of {len(value.items)}"
    if isinstance(value, Dim):
        return f"the run-time dimension {value}"
    return "none" if value is None else f"the {type_name(value)} {show(value)}"


def type_name(value: Constant) -> str:
    """int, float, bool, str, floats or none; a run-time dimension is an int."""
    if value is None:
        return "none"
    if isinstance(value, Several):
        return "floats"
    return "int" if isinstance(value, Dim) else type(value).__name__


def show(value: Constant) -> str:
    """A value as the language writes it."""
    if isinstance(value, Several):
        items = [show(item) for item in value.items if not isinstance(item, Tensor)]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 40 else f'"{value[:40]}..."'
    return "none" if value is None else str(value)


def key(value: Constant) -> tuple[str, Constant]:
    """What tells values apart when an instance is looked up: 1, 1.0 and true differ."""
    return type(value).__name__, value


def normal(dim: Dim) -> int | Dim:
    """A dim as a value: the int, where it is known."""
    constant = dim.constant
    return dim if constant is None else constant


def checked(value: _Checked) -> _Checked:
    """The value, unless it, or a float of a tuple, left the range of numbers (FG219)."""
    if isinstance(value, Several):
        for each in value.items:
            checked(each)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueProblem("FG219", "the result is not a finite number")
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ValueProblem("FG219", "the result does not fit in 64 bits")
    if isinstance(value, Dim):
        check_dim(value)
    return value


def check_dim(dim: Dim) -> None:
    """FG219 where a dimension outgrows what a model can need."""
    if len(dim.terms) > MAX_TERMS or any(len(monomial) > MAX_DEGREE for monomial, _ in dim.terms):
        raise ValueProblem("FG219", "the dimension is too complicated")
    if any(abs(c.numerator) > MAX_INT or c.denominator > MAX_INT for _, c in dim.terms):
        raise ValueProblem("FG219", "the dimension does not fit in 64 bits")


# ---------------------------------------------------------------- operators


def negate(value: Scalar) -> Scalar:
    """-value."""
    if isinstance(value, Dim):
        return checked(normal(value * -1))
    if not is_number(value):
        raise ValueProblem("FG217", f"unary minus of {describe(value)}")
    return checked(-value)


def truth(value: Scalar) -> bool:
    """The value of a condition; FG226 if it is not a bool."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Dim):
        raise _undecided(value)
    other = "0" if is_number(value) else "none" if value is None else None
    hint = other and f"compare it, for instance with != {other}"
    raise ValueProblem("FG226", f"a condition is true or false, not {describe(value)}", hint)


def _undecided(what: object) -> ValueProblem:
    return ValueProblem("FG212", f"{what} is known at run time only; a condition is decided at compile time")


def binary(op: str, left: Scalar, right: Scalar, multiples: Mapping[str, int]) -> Scalar:
    """`left op right`, or a ValueProblem: FG212, FG217, FG219."""
    if op in ("==", "!="):
        return equal(left, right) == (op == "==")
    if not all(is_number(side) or isinstance(side, Dim) for side in (left, right)):
        hint = "test it with != none first" if left is None or right is None else None
        raise ValueProblem("FG217", f"`{op}` of {describe(left)} and {describe(right)}", hint)
    if isinstance(left, Dim) or isinstance(right, Dim):
        return checked(_symbolic(op, left, right, multiples))
    if op in ("/", "//", "%") and right == 0:
        raise ValueProblem("FG219", f"division of {show(left)} by zero")
    try:
        result: Scalar = _NUMBERS[op](left, right)
        return checked(result)
    except OverflowError:
        raise ValueProblem("FG219", "the result is not a finite number") from None


def equal(left: Scalar, right: Scalar) -> bool:
    """Whether two values are the same; FG212 where run-time dims leave it open."""
    if isinstance(left, Dim) or isinstance(right, Dim):
        if left is None or right is None or isinstance(left, str) or isinstance(right, str):
            return False
        return _symbolic("==", left, right, {}) is True
    both = is_number(left) and is_number(right)
    return left == right and (both or type(left) is type(right))


def _exact_quotient(left: float, right: float) -> int | float:
    if isinstance(left, int) and isinstance(right, int) and left % right == 0:
        return left // right
    return left / right


_NUMBERS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _exact_quotient,
    "//": operator.floordiv,
    "%": operator.mod,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _symbolic(op: str, left: Scalar, right: Scalar, multiples: Mapping[str, int]) -> Scalar:
    if not (isinstance(left, int | Dim) and isinstance(right, int | Dim)):
        sides = f"`{op}` of {describe(left)} and {describe(right)}"
        raise ValueProblem("FG212", f"{sides}: a run-time dimension is a whole number that only shapes take")
    first, second = Dim.of(left), Dim.of(right)
    if op in ("+", "-", "*"):
        return normal(_NUMBERS[op](first, second))
    if op in ("/", "//", "%"):
        return _divide(op, first, second, multiples)
    difference = (first - second).constant
    if difference is None:
        raise _undecided(f"`{left} {op} {right}`")
    return bool({"==": operator.eq, **_NUMBERS}[op](difference, 0))


def _divide(op: str, first: Dim, second: Dim, multiples: Mapping[str, int]) -> Scalar:
    if second == Dim.of(0):
        raise ValueProblem("FG219", f"division of {first} by zero")
    quotient = first.divide(second, multiples)
    if quotient is None:
        names = sorted(first.names)
        hint = f"declare dim {names[0]} % {second}" if first == Dim.of(names[0] if names else 0) else None
        raise ValueProblem("FG208", f"{first} is not a multiple of {second} for every value", hint)
    return 0 if op == "%" else normal(quotient)


# ---------------------------------------------------------------- types and functions

_ACCEPTS: dict[str, Callable[[Constant], bool]] = {
    "int": lambda value: isinstance(value, Dim) or is_int(value),
    "float": is_number,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "floats": is_floats,
}


def convert(value: Constant, kind: str, optional: bool) -> Constant:
    """A value as `kind` (an int becomes a float where a float is wanted); FG217 where it is of another type."""
    if value is None and optional:
        return None
    if not _ACCEPTS[kind](value):
        wanted = f"{kind} or none" if optional else kind
        example = "a tuple of numbers, such as (1.0, 1.0, 0.5); of one number (1.0,)"
        hint = example if kind == "floats" else None
        raise ValueProblem("FG217", f"expected {wanted}, found {describe(value)}", hint)
    if isinstance(value, Several):
        return Several(tuple([_as_float(item) for item in value.items if isinstance(item, int | float)]))
    return _as_float(value) if kind == "float" and isinstance(value, int) else value


def _as_float(value: float) -> float:
    """The float nearest to an int from outside, which has any number of digits."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "rsqrt": lambda value: 1 / math.sqrt(value),
    "exp": elementary.exp,
    "log": elementary.log,
    "tanh": elementary.tanh,
    "abs": abs,
    "min": min,
    "max": max,
    "int": int,
    "float": float,
}
"""Operations that fold where every argument is a compile-time number."""


def fold(name: str, arguments: tuple[Scalar, ...]) -> Scalar:
    """The value of a function of compile-time numbers; FG219 outside its domain."""
    shown = ", ".join(map(show, arguments))
    try:
        return checked(FUNCTIONS[name](*arguments))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueProblem("FG219", f"{name}({shown}) has no value") from None
