"""Evaluating expressions: compile-time values fold, tensors become nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_compiler.frontend.reporter import Abort, did_you_mean
from fastgrad_compiler.frontend.scope import Failed, Hidden, Outer, Scope
from fastgrad_compiler.frontend.state import emit
from fastgrad_compiler.frontend.values import Constant, Scalar, Several, Tensor, Value, ValueProblem
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.words import counted
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.source import Span


def evaluate(scope: Scope, expr: ast.Expr) -> Value:
    """The value of an expression: a compile-time value, a tensor of the scope's graph, or several of them."""
    value = _EXPRESSIONS[type(expr)](scope, expr)
    scope.state.found(expr.span, value)
    return value


def scalar(scope: Scope, expr: ast.Expr, what: str) -> Scalar:
    """The value of an expression that must be known at compile time; FG216 otherwise."""
    return _scalar_of(scope, evaluate(scope, expr), expr, what)


def _scalar_of(scope: Scope, found: Value, expr: ast.Expr, what: str) -> Scalar:
    """What the expression was found to be, unless it is a tensor or a tuple."""
    if isinstance(found, Tensor | Several):
        raise scope.report("FG216", f"{what} is a compile-time value, not {values.describe(found)}", expr.span,
                           "known at run time only" if isinstance(found, Tensor) else "a tuple")  # fmt: skip
    return found


def bare_word(scope: Scope, expr: ast.Expr) -> str | None:
    """The text of a name that stands for nothing in the file, and so for itself: one of an option's fixed words."""
    names = (scope.names, scope.file.names, scope.hidden, scope.file.hidden)
    return expr.name if isinstance(expr, ast.Ref) and not any(expr.name in known for known in names) else None


def compile_time(scope: Scope, expr: ast.Expr, what: str) -> Constant:
    """The same, where a tuple of compile-time values is one too."""
    found = evaluate(scope, expr)
    if isinstance(found, Several) and not any(isinstance(item, Tensor | Several) for item in found.items):
        return found
    return _scalar_of(scope, found, expr, what)


def dimension(scope: Scope, expr: ast.Expr) -> Dim:
    """An expression as a dimension: at least 1 where it is known; FG216, FG217, FG218."""
    found = scalar(scope, expr, "a dimension")
    if isinstance(found, Dim):
        return found
    if not values.is_int(found):
        whole, hint = values.describe(found), None
        if isinstance(found, float):
            whole, hint = f"{values.show(found)} is not a whole number", "divide with // to round down"
        raise scope.report("FG217", f"a dimension is an int: {whole}", expr.span, f"{values.show(found)} here",
                           help_=(hint,))  # fmt: skip
    if found < 1:
        raise scope.report("FG218", f"a dimension is at least 1, not {found}", expr.span, f"{found} here")
    return Dim.of(found)


def tensor(scope: Scope, expr: ast.Expr, what: str) -> Tensor:
    """The value of an expression as a tensor of the graph; FG216 where it is none."""
    return as_tensor(scope, evaluate(scope, expr), expr.span, what)


def as_tensor(scope: Scope, value: Value, span: Span, what: str) -> Tensor:
    """A value as a tensor of the graph: numbers and bools become constants; FG216 for everything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool | int | float):
        return emit(scope, span, "constant", value=value)
    hint = None
    if isinstance(value, Dim):
        hint = "a run-time dimension can be used only in shapes; mean(x, axis = ...) divides by one"
    raise scope.report("FG216", f"{what} is a tensor, not {values.describe(value)}", span, "not a tensor",
                       help_=(hint,))  # fmt: skip


@contextmanager
def reported(scope: Scope, span: Span, context: str = "") -> Iterator[None]:
    """Report a compile-time problem that arises within at a place, and give up."""
    try:
        yield
    except ValueProblem as error:
        raise scope.report(error.code, f"{context}{error.message}", span, help_=(error.help,)) from None


# ---------------------------------------------------------------- names

OF_PYTHON = ("True", "False", "None")  # here in small letters


def look_up(scope: Scope, name: str, span: Span) -> Value:
    """What a name stands for here; FG201 and FG225 where it is not visible.

    A tensor from around a repeat that its body reads becomes an input of the body.
    """
    binding = scope.names.get(name) or scope.file.names.get(name)
    if binding is None:
        raise _unknown(scope, name, span)
    if isinstance(binding.value, Failed):
        raise Abort
    if isinstance(binding.value, Outer):
        assert scope.builder is not None  # only bodies have outer tensors
        outer = binding.value.tensor
        tensor = scope.builder.input(name, outer.type, outer.origins, binding.span)
        scope.captured[name] = tensor
        scope.names[name] = replace(binding, value=tensor)
        return tensor
    return binding.value


def _unknown(scope: Scope, name: str, span: Span) -> Abort:
    if name in scope.hidden:
        return _invisible(scope, name, scope.hidden[name], "bound here", span)
    hint = did_you_mean(name, [*scope.names, *scope.file.names])
    if name in OF_PYTHON:
        hint = f"did you mean {name.lower()}?"
    if hint is None and (name in NAMES or name in scope.module.blocks):
        hint = f"call it: {name}(...)"
    if hint is None and name in scope.file.hidden:
        return _invisible(scope, name, scope.file.hidden[name], "declared here", span)
    return scope.report("FG201", f"unknown name `{name}`", span, "not found", help_=(hint,))


def _invisible(scope: Scope, name: str, hidden: Hidden, note: str, span: Span) -> Abort:
    return scope.report("FG225", f"`{name}` is not visible here: {hidden.reason}", span, "not bound here",
                        notes=(Note(note, hidden.span),), help_=(hidden.help,))  # fmt: skip


# ---------------------------------------------------------------- operators


def _unary(scope: Scope, expr: ast.Unary) -> Value:
    operand = evaluate(scope, expr.operand)
    if isinstance(operand, Tensor):
        return emit(scope, expr.span, "neg" if expr.op == "-" else "logical_not", (operand,))
    if isinstance(operand, Several):
        raise scope.report("FG217", f"`{expr.op}` of {values.describe(operand)}", expr.span)
    with reported(scope, expr.span):
        return values.negate(operand) if expr.op == "-" else not values.truth(operand)


_TENSOR_OPS = {
    "@": "matmul",
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "<": "less",
    "<=": "less_equal",
    "==": "equal",
}
_SWAPPED = {">": "less", ">=": "less_equal"}


def _binary(scope: Scope, expr: ast.Binary) -> Value:
    if expr.op in ("and", "or"):
        return _logical(scope, expr)
    left, right = _both(scope, expr)
    if isinstance(left, Tensor) or isinstance(right, Tensor) or expr.op == "@":
        return _tensor_binary(scope, expr, left, right)
    if isinstance(left, Several) or isinstance(right, Several):
        if expr.op in ("==", "!=") and any(map(values.is_floats, (left, right))):
            return (left == right) == (expr.op == "==")
        message = f"`{expr.op}` of {values.describe(left)} and {values.describe(right)}"
        raise scope.report("FG217", message, expr.span)
    with reported(scope, expr.span):
        result = values.binary(expr.op, left, right, scope.state.multiples)
    if expr.op == "//":
        _check_even(scope, expr, left, right)
    return result


def _check_even(scope: Scope, expr: ast.Binary, left: Value, right: Value) -> None:
    """FG244 where a dimension is not divided evenly, of which FG208 speaks where its size is not known here."""
    binding = scope.names.get(expr.left.name) if isinstance(expr.left, ast.Ref) else None
    if binding is None or binding.kind != "dim" or not (isinstance(left, int) and isinstance(right, int)):
        return
    if left % right:
        help_ = "give qk_dim and v_dim, the widths of a head, or a number of heads that divides it"
        raise scope.report("FG244", f"{left} is not a multiple of {right}", expr.span, "does not divide evenly",
                           help_=(help_ if scope.module.name == "std" else None,))  # fmt: skip


def _both(scope: Scope, expr: ast.Binary) -> tuple[Value, Value]:
    """The right side is looked at even where the left one has no value: it may be wrong too."""
    try:
        left = evaluate(scope, expr.left)
    except Abort:
        evaluate(scope, expr.right)
        raise
    return left, evaluate(scope, expr.right)


def _tensor_binary(scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Tensor:
    if left is None or right is None:
        raise scope.report("FG239", f"`{expr.op}` of {values.describe(left)} and {values.describe(right)}", expr.span,
                           "a tensor is never none",
                           help_=("only compile-time values such as float? can be none",))  # fmt: skip
    sides = (
        as_tensor(scope, left, expr.left.span, f"the left side of `{expr.op}`"),
        as_tensor(scope, right, expr.right.span, f"the right side of `{expr.op}`"),
    )
    if expr.op in _TENSOR_OPS:
        return emit(scope, expr.span, _TENSOR_OPS[expr.op], sides)
    if expr.op in _SWAPPED:
        return emit(scope, expr.span, _SWAPPED[expr.op], sides[::-1])
    if expr.op == "!=":
        same = emit(scope, expr.span, "equal", sides)
        return emit(scope, expr.span, "logical_not", (same,))
    raise scope.report("FG239", f"`{expr.op}` does not work on tensors", expr.span, "compile-time numbers only",
                       help_=("divide with / instead" if expr.op == "//" else None,))  # fmt: skip


def _logical(scope: Scope, expr: ast.Binary) -> Value:
    left = condition(scope, expr.left, f"`{expr.op}`")
    if left == (expr.op == "or"):
        return left
    return condition(scope, expr.right, f"`{expr.op}`")


def condition(scope: Scope, expr: ast.Expr, what: str) -> bool:
    """A compile-time truth; FG212, FG226 and, for a tensor, FG239."""
    found = evaluate(scope, expr)
    if isinstance(found, Tensor | Several):
        raise scope.report("FG239", f"{what} needs a compile-time bool, not {values.describe(found)}", expr.span,
                           "known at run time only",
                           help_=("choose between tensors with where(condition, a, b)",))  # fmt: skip
    with reported(scope, expr.span):
        return values.truth(found)


def _conditional(scope: Scope, expr: ast.Conditional) -> Value:
    return evaluate(scope, expr.then if condition(scope, expr.condition, "`if`") else expr.otherwise)


def _transpose(scope: Scope, expr: ast.Transpose) -> Value:
    operand = tensor(scope, expr.operand, "what `.T` turns")
    rank = len(operand.type.shape)
    if rank < 2:
        raise scope.report("FG205", f"`.T` of {operand.type}: it swaps the last two dimensions", expr.span,
                           f"{counted(rank, 'dimension')} here")  # fmt: skip
    return emit(scope, expr.span, "permute", (operand,), axes=(*range(rank - 2), rank - 1, rank - 2))


# ---------------------------------------------------------------- x[..]


def _index(scope: Scope, expr: ast.Index) -> Value:
    found = tensor(scope, expr.operand, "what is indexed")
    rank, given = len(found.type.shape), sum(not part.ellipsis for part in expr.slices)
    ellipses = len(expr.slices) - given
    if ellipses > 1:
        raise scope.report("FG206", "an index has at most one `..`", expr.slices[-1].span, "one too many")
    if given > rank:
        raise scope.report("FG205", f"{given} indices for {found.type}, which has {rank} dimensions", expr.span,
                           "too many indices")  # fmt: skip
    axis = -rank
    for place, part in enumerate(expr.slices):
        if part.ellipsis:
            axis = -(len(expr.slices) - place - 1)
            continue
        found = _take(scope, expr.span, found, part, axis)
        axis += 1
    return found


def _take(scope: Scope, span: Span, tensor: Tensor, part: ast.Slice, axis: int) -> Tensor:
    size = tensor.type.shape[axis]
    if part.index is not None:
        at = _place(scope, part.index, size)
        return emit(scope, span, "select", (tensor,), axis=axis, index=at)
    if part.start is None and part.stop is None:
        return tensor
    start = 0 if part.start is None else _place(scope, part.start, size)
    stop = values.normal(size) if part.stop is None else _place(scope, part.stop, size)
    return emit(scope, span, "slice", (tensor,), axis=axis, start=start, stop=stop)


def _place(scope: Scope, expr: ast.Expr, size: Dim) -> int | Dim:
    """An index along an axis of this size, counted from the front."""
    found = evaluate(scope, expr)
    if isinstance(found, Tensor):
        raise scope.report("FG216", "an index is a compile-time int, not a tensor", expr.span, f"{found.type} here",
                           help_=("look rows up with embedding(table, ids)",))  # fmt: skip
    if isinstance(found, Dim):
        return found
    if not values.is_int(found):
        raise scope.report("FG217", f"an index is an int, not {values.describe(found)}", expr.span)
    return found if found >= 0 else values.normal(size + found)


_EXPRESSIONS: dict[type, Callable[..., Value]] = {
    ast.Literal: lambda scope, expr: expr.value,
    ast.Ref: lambda scope, expr: look_up(scope, expr.name, expr.span),
    ast.Unary: _unary,
    ast.Binary: _binary,
    ast.Conditional: _conditional,
    ast.Transpose: _transpose,
    ast.Index: _index,
    ast.Tuple: lambda scope, expr: Several(tuple([evaluate(scope, item) for item in expr.items])),
    ast.Call: lambda scope, expr: scope.state.call(scope, expr),
}
