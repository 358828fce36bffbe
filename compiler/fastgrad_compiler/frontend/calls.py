"""Calls of operations: arguments by kind, folding of compile-time numbers, axes by number or by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from fastgrad_compiler.approximation.own_polynomial import objection
from fastgrad_compiler.approximation.polynomial import FAMILIES
from fastgrad_compiler.approximation.rational import trimmed
from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.arguments import Formal, match_arguments
from fastgrad_compiler.frontend.expressions import (
    as_tensor,
    bare_word,
    compile_time,
    dimension,
    evaluate,
    reported,
    scalar,
)
from fastgrad_compiler.frontend.operations import NEEDED, OPERATIONS, OVERLOADS, Operation, Parameter
from fastgrad_compiler.frontend.reporter import Abort, did_you_mean
from fastgrad_compiler.frontend.scope import Scope
from fastgrad_compiler.frontend.state import emit
from fastgrad_compiler.frontend.values import FUNCTIONS, Constant, Several, Tensor, Value
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, TensorType
from fastgrad_compiler.ir.shape_errors import product
from fastgrad_grammar import ast


@dataclass(frozen=True, slots=True)
class _Emit:
    """`operations.Emit` at one call."""

    scope: Scope
    call: ast.Call

    def node(self, op: str, *operands: Tensor, **attributes: Attribute) -> Tensor:
        return emit(self.scope, self.call.span, op, operands, **attributes)

    def step(self, work: int) -> None:
        self.scope.state.step(self.call.span, work)

    def refuse(self, code: str, message: str) -> Abort:
        return self.scope.report(code, message, self.call.span)


def call_operation(scope: Scope, call: ast.Call) -> Value:
    """The value of a call of an operation: folded where every argument is a compile-time number."""
    name = call.function.text
    if call.label is not None:
        raise scope.report("FG228", f"`as {call.label.text}` labels a call of a block; {name} is an operation",
                           call.label.span, "an operation has no path")  # fmt: skip
    cache: dict[int, Value] = {}
    if name in FUNCTIONS:  # an axis can be a dim's name: keywords are looked at later
        for argument in call.arguments:
            if argument.name is None:
                cache[id(argument.value)] = evaluate(scope, argument.value)
    folded = _fold(scope, call, cache)
    if folded is not None:
        return folded
    operation = _overload(call, cache) if name in OVERLOADS else OPERATIONS[name]
    return _apply(scope, call, operation, cache)


def _fold(scope: Scope, call: ast.Call, cache: dict[int, Value]) -> Value:
    name = call.function.text
    given = [cache[id(a.value)] for a in call.arguments if id(a.value) in cache]
    if not given or len(given) != len(call.arguments) or isinstance(given[0], Tensor | Several):
        return None
    if any(not values.is_number(value) for value in given):
        if all(isinstance(value, Dim) or values.is_number(value) for value in given):
            if name == "int" and len(given) == 1:
                return given[0]
            label = "known at run time only; shapes take it, numbers do not"
            raise scope.report("FG212", f"{name} of a run-time dimension", call.span, label)
        return None
    least = 2 if name in ("min", "max") else 1
    if len(given) < least or (least == 1 and len(given) > 1):
        code, count = ("FG213", "two or more numbers") if least == 2 else ("FG214", "one number")
        raise scope.report(code, f"{name} takes {count}", call.span, f"{len(given)} here")
    with reported(scope, call.span):
        return values.fold(name, tuple(v for v in given if not isinstance(v, Tensor | Several)))


def _overload(call: ast.Call, cache: dict[int, Value]) -> Operation:
    over_axes, pair = OVERLOADS[call.function.text]
    keywords = {argument.name.text for argument in call.arguments if argument.name is not None}
    positional = [a for a in call.arguments if a.name is None]
    second = cache.get(id(positional[1].value)) if len(positional) > 1 else None
    two = (len(positional) > 1 and not keywords and not isinstance(second, Several)) or "a" in keywords
    return pair if two else over_axes


def _apply(scope: Scope, call: ast.Call, operation: Operation, cache: dict[int, Value]) -> Value:
    formals = [Formal(p.name, p.is_tensor, p.default is NEEDED) for p in operation.parameters]
    given = match_arguments(scope.report, call, formals, operation.name, rest=operation.rest)
    arguments: dict[str, Any] = {}
    for parameter in operation.parameters:
        expressions = given.get(parameter.name)
        context = _Argument(scope, call, operation, parameter, expressions or [], arguments, cache)
        if expressions is None:
            missing = parameter.kind == "all_axes" or parameter.default is NEEDED
            arguments[parameter.name] = _axes(context) if missing else parameter.default
        else:
            arguments[parameter.name] = KINDS[parameter.kind](context)
    return operation.result(_Emit(scope, call), arguments)


@dataclass(frozen=True, slots=True)
class _Argument:
    """One argument of an operation while it is evaluated; `before` are those before it."""

    scope: Scope
    call: ast.Call
    operation: Operation
    parameter: Parameter
    expressions: list[ast.Expr]
    before: dict[str, Any]
    cache: dict[int, Value]

    def value(self, expr: ast.Expr) -> Value:
        if id(expr) in self.cache:
            return self.cache[id(expr)]
        return evaluate(self.scope, expr)

    @property
    def what(self) -> str:
        return f"`{self.parameter.name}` of {self.operation.name}"

    @property
    def operand(self) -> TensorType:
        """The type of the first operand."""
        first = next(iter(self.before.values()))
        found: Tensor = first if isinstance(first, Tensor) else first[0]
        return found.type

    @property
    def rank(self) -> int:
        """How many dims the first operand has."""
        return len(self.operand.shape)

    @property
    def entries(self) -> list[ast.Expr]:
        """What is listed, as `permute(x, 0, 1)` or `permute(x, (0, 1))`."""
        first, *more = self.expressions
        return list(first.items) if isinstance(first, ast.Tuple) and not more else self.expressions

    def converted(self, found: Constant, kind: str, optional: bool) -> Constant:
        """What was found as the type that is wanted."""
        with reported(self.scope, self.expressions[0].span, f"{self.what}: "):
            return values.convert(found, kind, optional)

    def refuse(
        self, code: str, message: str, expr: ast.Expr, label: str = "", help_: str | None = None
    ) -> Abort:
        return self.scope.report(code, message, expr.span, label, help_=(help_,))


def _tensor(a: _Argument) -> Tensor:
    (expr,) = a.expressions
    return as_tensor(a.scope, a.value(expr), expr.span, a.what)


def _tensors(a: _Argument) -> list[Tensor]:
    found: list[Tensor] = []
    for expr in a.expressions:
        value = a.value(expr)
        for each in value.items if isinstance(value, Several) else (value,):
            found.append(as_tensor(a.scope, each, expr.span, a.what))
    if not found:
        raise a.refuse("FG213", f"{a.operation.name} needs at least one tensor", a.call)
    return found


def _number(a: _Argument) -> Any:
    (expr,) = a.expressions
    p, kind = a.parameter, a.parameter.kind
    found = scalar(a.scope, expr, a.what)
    if kind == "int" and isinstance(found, Dim):
        raise a.refuse(
            "FG212", f"{a.what} is known at compile time, not the run-time dimension {found}", expr
        )
    value = a.converted(found, kind, p.default is None)
    if values.is_number(value):
        for broken, limit in (
            (p.least is not None and value < p.least, f"at least {p.least}"),
            (p.most is not None and value > p.most, f"at most {p.most}"),
            (p.below is not None and value >= p.below, f"below {p.below}"),
            (p.positive and value <= 0, "above 0"),
        ):
            if broken:
                raise a.refuse("FG218", f"{a.what} is {limit}, not {value}", expr, f"{value} here")
    return value


def _family(a: _Argument) -> str:
    """A family of polynomials, with quotes or without."""
    (expr,) = a.expressions
    word = bare_word(a.scope, expr)
    found = word or a.converted(scalar(a.scope, expr, a.what), "str", optional=False)
    if found not in FAMILIES:
        shown = word or values.show(found)
        help_ = did_you_mean(str(found), FAMILIES)
        message = f"{a.what} is one of {', '.join(sorted(FAMILIES))}, not {shown}"
        raise a.refuse("FG218", message, expr, f"{shown} here", help_)
    return str(found)


def _weight_polynomial(a: _Argument) -> tuple[float, ...]:
    """Coefficients of weights that are positive for every score (FG242)."""
    (expr,) = a.expressions
    found = compile_time(a.scope, expr, a.what)
    converted = a.converted(found, "floats", optional=False)
    items = converted.items if isinstance(converted, Several) else ()
    coefficients = tuple(trimmed([each for each in items if isinstance(each, float)]))
    wrong = objection(coefficients)
    if wrong is not None:
        raise a.refuse(
            "FG242", f"{a.what}: {wrong.message}", expr, f"{values.show(converted)} here", wrong.help
        )
    return coefficients


def _stretch(a: _Argument) -> tuple[float, ...] | None:
    """One number above 0 for all pairs of a rotary, or one for each (which the shape rule counts)."""
    (expr,) = a.expressions
    converted = a.converted(compile_time(a.scope, expr, a.what), "floats", optional=True)
    if converted is None:
        return None
    numbers = tuple(each for each in getattr(converted, "items", ()) if isinstance(each, float))
    wrong = next((each for each in numbers if not 0 < each < inf), None)
    if wrong is not None or not numbers:
        raise a.refuse("FG218", f"{a.what} is numbers above 0, not {values.show(converted)}", expr)
    return numbers


def _one_axis(a: _Argument, expr: ast.Expr, rank: int) -> int:
    """An axis as a negative int; a name of a dim stands for the axis that has it."""
    if isinstance(expr, ast.Ref):
        binding = a.scope.names.get(expr.name) or a.scope.file.names.get(expr.name)
        if binding is not None and binding.kind == "dim":
            return _named_axis(a, expr)
    found = scalar(a.scope, expr, a.what)
    if not values.is_int(found):
        raise a.refuse(
            "FG217", f"{a.what} is an int or the name of a dimension, not {values.describe(found)}", expr
        )
    if not -rank <= found < rank:
        reach = f"its axes are {-rank} to {rank - 1}" if rank else "it is a scalar"
        message = f"{a.operation.name} over axis {found} of {a.operand}: {reach}"
        raise a.refuse("FG206", message, expr, "no such axis")
    return found if found < 0 else found - rank


def _named_axis(a: _Argument, expr: ast.Ref) -> int:
    size = evaluate(a.scope, expr)
    if not isinstance(size, int | Dim):
        raise a.refuse(
            "FG217", f"{a.what} is an int or the name of a dimension, not {values.describe(size)}", expr
        )
    places = [axis for axis in range(-a.rank, 0) if a.operand.shape[axis] == Dim.of(size)]
    if len(places) != 1:
        why = "has no such dimension" if not places else "has several of that size"
        message = f"{a.operation.name} over {expr.name} of {a.operand}: it {why}"
        raise a.refuse("FG206", message, expr, "" if str(size) == expr.name else f"{expr.name} is {size}",
                       "name the axis by its number, -1 for the last")  # fmt: skip
    return places[0]


def _axes(a: _Argument) -> tuple[int, ...]:
    """All of them where none are given, or `none`."""
    entries = a.entries if a.expressions else []
    given = [expr for expr in entries if not (isinstance(expr, ast.Literal) and expr.value is None)]
    if not given and len(entries) < 2:
        return tuple(range(-a.rank, 0))
    return tuple([_one_axis(a, expr, a.rank) for expr in entries])


def _shape(a: _Argument) -> tuple[Attribute, ...]:
    """The dims of a shape; one -1 in `reshape` becomes what is left."""
    found: list[Dim | None] = []
    for expr in a.entries:
        minus_one = isinstance(expr, ast.Unary) and expr.span.text.replace(" ", "") == "-1"
        rest = minus_one and a.operation.name == "reshape"
        found.append(None if rest else dimension(a.scope, expr))
    if found.count(None) > 1:
        raise a.refuse("FG207", "reshape infers at most one dimension from -1", a.entries[-1])
    if None not in found:
        return tuple(values.normal(dim) for dim in found if dim is not None)
    source: Tensor = a.before["x"]
    known = product(dim for dim in found if dim is not None)
    count = product(source.type.shape)
    left = count.divide(known, a.scope.state.multiples)
    if left is None:
        message = f"reshape of {source.type}: {count} elements are not a multiple of {known}"
        raise a.refuse("FG207", message, a.entries[found.index(None)], "nothing fits here")
    return tuple(values.normal(left if dim is None else dim) for dim in found)


KINDS: dict[str, Callable[[_Argument], Any]] = {
    "tensor": _tensor,
    "tensors": _tensors,
    "int": _number,
    "float": _number,
    "bool": _number,
    "family": _family,
    "stretch": _stretch,
    "weight_polynomial": _weight_polynomial,
    "dim": lambda a: values.normal(dimension(a.scope, a.expressions[0])),
    "axis": lambda a: _one_axis(a, a.expressions[0], a.rank),
    "new_axis": lambda a: _one_axis(a, a.expressions[0], a.rank + 1),
    "axes": lambda a: tuple(axis + a.rank for axis in _axes(a)),
    "all_axes": _axes,
    "shape": _shape,
}
