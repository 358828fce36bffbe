"""Calls of operations: arguments by kind, folding of compile-time numbers, axes by number or by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from fastgrad_compiler.approximation.own_polynomial import objection, trimmed
from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.arguments import Formal, match_arguments
from fastgrad_compiler.frontend.expressions import (
    as_tensor,
    compile_time,
    dimension,
    evaluate,
    problem,
    scalar,
)
from fastgrad_compiler.frontend.operations import NEEDED, OPERATIONS, OVERLOADS, Operation, Parameter
from fastgrad_compiler.frontend.reporter import Abort
from fastgrad_compiler.frontend.scope import Scope
from fastgrad_compiler.frontend.state import State, constant, emit
from fastgrad_compiler.frontend.values import FUNCTIONS, Several, Tensor, Value, ValueProblem
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute
from fastgrad_compiler.ir.shape_errors import product
from fastgrad_grammar import ast

_TENSORKINDS = ("tensor", "tensors")


@dataclass(frozen=True, slots=True)
class _Emit:
    """`operations.Emit` at one call."""

    state: State
    scope: Scope
    call: ast.Call

    def node(self, op: str, *operands: Tensor, **attributes: Attribute) -> Tensor:
        return emit(self.state, self.scope, self.call.span, op, operands, **attributes)

    def number(self, value: float) -> Tensor:
        return constant(self.state, self.scope, value, self.call.span)

    def refuse(self, code: str, message: str, help_: str | None = None) -> NoReturn:
        self.state.reporter.fail(code, message, self.call.span, help_=(help_,))


def call_operation(state: State, scope: Scope, call: ast.Call) -> Value:
    """The value of a call of an operation: folded where every argument is a compile-time number."""
    name = call.function.text
    if call.label is not None:
        state.reporter.fail("FG228", f"`as {call.label.text}` labels a call of a block, {name} is an operation",
                            call.label.span, "an operation has no path")  # fmt: skip
    cache = _arguments(state, scope, call)
    folded = _fold(state, scope, call, cache)
    if folded is not None:
        return folded
    operation = _overload(call, cache) if name in OVERLOADS else OPERATIONS[name]
    return _apply(state, scope, call, operation, cache)


def _arguments(state: State, scope: Scope, call: ast.Call) -> dict[int, Value]:
    """The values of the arguments except axes (an axis can be a dim's name), by the identity of the expression."""
    found: dict[int, Value] = {}
    if call.function.text in FUNCTIONS:
        for argument in call.arguments:
            if argument.name is None:
                found[id(argument.value)] = evaluate(state, scope, argument.value)
    return found


def _fold(state: State, scope: Scope, call: ast.Call, cache: dict[int, Value]) -> Value:
    name = call.function.text
    given = [cache[id(a.value)] for a in call.arguments if id(a.value) in cache]
    if not given or len(given) != len(call.arguments) or isinstance(given[0], Tensor | Several):
        return None
    if any(not values.is_number(value) for value in given):
        if all(isinstance(value, Dim) or values.is_number(value) for value in given):
            if name == "int" and len(given) == 1:
                return given[0]
            state.reporter.fail("FG212", f"{name} of a run-time dimension", call.span,
                                "known at run time only; shapes take it, numbers do not")  # fmt: skip
        return None
    least = 2 if name in ("min", "max") else 1
    if len(given) < least or (least == 1 and len(given) > 1):
        count = "two or more numbers" if least == 2 else "one number"
        state.reporter.fail("FG214" if least == 1 else "FG213", f"{name} takes {count}", call.span,
                            f"{len(given)} here")  # fmt: skip
    try:
        return values.fold(name, tuple(v for v in given if not isinstance(v, Tensor | Several)))
    except ValueProblem as error:
        problem(state, error, call.span)
        raise Abort from None


def _overload(call: ast.Call, cache: dict[int, Value]) -> Operation:
    over_axes, pair = OVERLOADS[call.function.text]
    keywords = {argument.name.text for argument in call.arguments if argument.name is not None}
    positional = [a for a in call.arguments if a.name is None]
    second = cache.get(id(positional[1].value)) if len(positional) > 1 else None
    two = (len(positional) > 1 and not keywords and not isinstance(second, Several)) or "a" in keywords
    return pair if two else over_axes


def _apply(
    state: State, scope: Scope, call: ast.Call, operation: Operation, cache: dict[int, Value]
) -> Value:
    formals = [
        Formal(p.name, p.kind in _TENSORKINDS, isinstance(p.default, type(NEEDED)))
        for p in operation.parameters
    ]
    given = match_arguments(state.reporter, call, formals, operation.name, rest=operation.rest)
    arguments: dict[str, Any] = {}
    for parameter in operation.parameters:
        expressions = given.get(parameter.name)
        context = _Argument(state, scope, call, operation, parameter, expressions or [], arguments, cache)
        if expressions is None:
            missing = parameter.kind == "all_axes" or parameter.default is NEEDED
            arguments[parameter.name] = _all_axes(context) if missing else parameter.default
        else:
            arguments[parameter.name] = KINDS[parameter.kind](context)
    return operation.rule(_Emit(state, scope, call), arguments)


@dataclass(frozen=True, slots=True)
class _Argument:
    """One argument of an operation while it is evaluated; `before` are those before it."""

    state: State
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
        return evaluate(self.state, self.scope, expr)

    @property
    def what(self) -> str:
        return f"`{self.parameter.name}` of {self.operation.name}"

    @property
    def rank(self) -> int:
        """How many dims the first operand has."""
        first = next(iter(self.before.values()))
        tensor = first if isinstance(first, Tensor) else first[0]
        return len(tensor.type.shape)

    def fail(
        self, code: str, message: str, expr: ast.Expr, label: str = "", help_: str | None = None
    ) -> NoReturn:
        self.state.reporter.fail(code, message, expr.span, label, help_=(help_,))


def _tensor(a: _Argument) -> Tensor:
    (expr,) = a.expressions
    return as_tensor(a.state, a.scope, a.value(expr), expr.span, a.what)


def _tensors(a: _Argument) -> list[Tensor]:
    found: list[Tensor] = []
    for expr in a.expressions:
        value = a.value(expr)
        for each in value.items if isinstance(value, Several) else (value,):
            found.append(as_tensor(a.state, a.scope, each, expr.span, a.what))
    if not found:
        a.fail("FG213", f"{a.operation.name} needs at least one tensor", a.call)
    return found


def _number(a: _Argument) -> Any:
    (expr,) = a.expressions
    kind = a.parameter.kind
    found = scalar(a.state, a.scope, expr, a.what)
    optional = a.parameter.default is None
    if kind == "int" and isinstance(found, Dim):
        a.fail("FG212", f"{a.what} is known at compile time, not the run-time dimension {found}", expr)
    try:
        value = values.convert(found, kind, optional)
    except ValueProblem as error:
        a.fail(error.code, f"{a.what}: {error.message}", expr, help_=error.help)
    _limits(a, expr, value)
    return value


def _limits(a: _Argument, expr: ast.Expr, value: Value) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    p = a.parameter
    if p.least is not None and value < p.least:
        a.fail("FG218", f"{a.what} is at least {p.least}, not {value}", expr, f"{value} here")
    if p.below is not None and value >= p.below:
        a.fail("FG218", f"{a.what} is below {p.below}, not {value}", expr, f"{value} here")
    if p.positive and value <= 0:
        a.fail("FG218", f"{a.what} is above 0, not {value}", expr, f"{value} here")


def _weight_polynomial(a: _Argument) -> tuple[float, ...]:
    """Coefficients of weights that are positive for every score (FG242)."""
    (expr,) = a.expressions
    found = compile_time(a.state, a.scope, expr, a.what)
    try:
        converted = values.convert(found, "floats", optional=False)
    except ValueProblem as error:
        a.fail(error.code, f"{a.what}: {error.message}", expr, help_=error.help)
    coefficients = trimmed([float(str(c)) for c in converted.items] if isinstance(converted, Several) else [])
    wrong = objection(coefficients)
    if wrong is not None:
        a.fail("FG242", f"{a.what}: {wrong.message}", expr, f"{values.show(converted)} here", wrong.help)
    return coefficients


def _dim(a: _Argument) -> Attribute:
    return values.normal(dimension(a.state, a.scope, a.expressions[0]))


def _axis(a: _Argument) -> int:
    return _one_axis(a, a.expressions[0], a.rank)


def _new_axis(a: _Argument) -> int:
    return _one_axis(a, a.expressions[0], a.rank + 1)


def _one_axis(a: _Argument, expr: ast.Expr, rank: int) -> int:
    """An axis as a negative int; a name of a dim stands for the axis that has it."""
    if isinstance(expr, ast.Ref):
        binding = a.scope.names.get(expr.name) or a.state.file_scopes[a.scope.module].names.get(expr.name)
        if binding is not None and binding.kind == "dim":
            return _named_axis(a, expr)
    found = scalar(a.state, a.scope, expr, a.what)
    if isinstance(found, bool) or not isinstance(found, int):
        a.fail("FG217", f"{a.what} is an int or the name of a dimension, not {values.describe(found)}", expr)
    return _in_range(a, expr, found, rank)


def _in_range(a: _Argument, expr: ast.Expr, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        reach = f"its axes are {-rank} to {rank - 1}" if rank else "it is a scalar"
        first = next(iter(a.before.values()))
        tensor = first if isinstance(first, Tensor) else first[0]
        a.fail(
            "FG206", f"{a.operation.name} over axis {axis} of {tensor.type}: {reach}", expr, "no such axis"
        )
    return axis if axis < 0 else axis - rank


def _named_axis(a: _Argument, expr: ast.Ref) -> int:
    size = evaluate(a.state, a.scope, expr)
    first = next(iter(a.before.values()))
    tensor = first if isinstance(first, Tensor) else first[0]
    if not isinstance(size, int | Dim):
        a.fail("FG217", f"{a.what} is an int or the name of a dimension, not {values.describe(size)}", expr)
    places = [axis for axis in range(-a.rank, 0) if tensor.type.shape[axis] == Dim.of(size)]
    if len(places) != 1:
        why = "has no such dimension" if not places else "has several of that size"
        message = f"{a.operation.name} over {expr.name} of {tensor.type}: it {why}"
        a.fail("FG206", message, expr, "" if str(size) == expr.name else f"{expr.name} is {size}",
               "name the axis by its number, -1 for the last")  # fmt: skip
    return places[0]


def _all_axes(a: _Argument) -> tuple[int, ...]:
    if a.expressions:
        return _axes(a, a.rank)
    return tuple(range(-a.rank, 0))


def _axes(a: _Argument, rank: int) -> tuple[int, ...]:
    expressions = a.expressions
    if len(expressions) == 1 and isinstance(expressions[0], ast.Tuple):
        expressions = list(expressions[0].items)
    if len(expressions) == 1 and isinstance(expressions[0], ast.Literal) and expressions[0].value is None:
        return tuple(range(-rank, 0))
    return tuple([_one_axis(a, expr, rank) for expr in expressions])


def _permutation(a: _Argument) -> tuple[int, ...]:
    found = _axes(a, a.rank)
    return tuple(axis + a.rank for axis in found)


def _shape(a: _Argument) -> tuple[Attribute, ...]:
    """The dims of a shape; one -1 in `reshape` becomes what is left."""
    expressions = a.expressions
    if len(expressions) == 1 and isinstance(expressions[0], ast.Tuple):
        expressions = list(expressions[0].items)
    found: list[Dim | None] = []
    for expr in expressions:
        rest = (
            a.operation.name == "reshape"
            and isinstance(expr, ast.Unary)
            and expr.span.text.replace(" ", "") == "-1"
        )
        found.append(None if rest else dimension(a.state, a.scope, expr))
    if found.count(None) > 1:
        a.fail("FG207", "reshape infers at most one dimension from -1", expressions[-1])
    if None not in found:
        return tuple(values.normal(dim) for dim in found if dim is not None)
    source: Tensor = a.before["x"]
    known = product(dim for dim in found if dim is not None)
    left = product(source.type.shape).divide(known, a.scope.multiples)
    if left is None:
        at = expressions[found.index(None)]
        count = product(source.type.shape)
        a.fail("FG207", f"reshape of {source.type}: {count} elements are not a multiple of {known}",
               at, "nothing fits here")  # fmt: skip
    return tuple(values.normal(left if dim is None else dim) for dim in found)


KINDS: dict[str, Callable[[_Argument], Any]] = {
    "tensor": _tensor,
    "tensors": _tensors,
    "int": _number,
    "float": _number,
    "bool": _number,
    "weight_polynomial": _weight_polynomial,
    "dim": _dim,
    "axis": _axis,
    "new_axis": _new_axis,
    "axes": _permutation,
    "all_axes": _all_axes,
    "shape": _shape,
}
