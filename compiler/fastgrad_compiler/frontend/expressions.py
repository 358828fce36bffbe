"""Evaluating expressions: compile-time values fold, tensors become nodes."""

from __future__ import annotations

from collections.abc import Callable

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.operations import NAMES
from fastgrad_compiler.frontend.reporter import Abort, did_you_mean
from fastgrad_compiler.frontend.scope import Binding, Failed, Outer, Scope
from fastgrad_compiler.frontend.state import State, constant, emit
from fastgrad_compiler.frontend.values import Constant, Scalar, Several, Tensor, Value, ValueProblem
from fastgrad_compiler.ir.dim import Dim
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.source import Span


def evaluate(state: State, scope: Scope, expr: ast.Expr) -> Value:
    """The value of an expression: a compile-time value, a tensor of the scope's graph, or several of them."""
    return _EXPRESSIONS[type(expr)](state, scope, expr)


def scalar(state: State, scope: Scope, expr: ast.Expr, what: str) -> Scalar:
    """The value of an expression that must be known at compile time; FG216 otherwise."""
    return scalar_of(state, evaluate(state, scope, expr), expr, what)


def scalar_of(state: State, found: Value, expr: ast.Expr, what: str) -> Scalar:
    """What the expression was found to be, unless it is a tensor or a tuple."""
    if isinstance(found, Tensor | Several):
        state.reporter.fail("FG216", f"{what} is a compile-time value, not {values.describe(found)}", expr.span,
                            "known at run time only" if isinstance(found, Tensor) else "a tuple")  # fmt: skip
    return found


def compile_time(state: State, scope: Scope, expr: ast.Expr, what: str) -> Constant:
    """The same, where a tuple of compile-time values is one too."""
    found = evaluate(state, scope, expr)
    if isinstance(found, Several) and not any(isinstance(item, Tensor | Several) for item in found.items):
        return found
    return scalar_of(state, found, expr, what)


def dimension(state: State, scope: Scope, expr: ast.Expr) -> Dim:
    """An expression as a dimension: at least 1 where it is known; FG216, FG217, FG218."""
    found = scalar(state, scope, expr, "a dimension")
    if isinstance(found, Dim):
        return found
    if isinstance(found, bool) or not isinstance(found, int):
        whole = (
            f"{values.show(found)} is not a whole number"
            if isinstance(found, float)
            else values.describe(found)
        )
        hint = "divide with // to round down" if isinstance(found, float) else None
        state.reporter.fail("FG217", f"a dimension is an int: {whole}", expr.span, f"{values.show(found)} here",
                            help_=(hint,))  # fmt: skip
    if found < 1:
        state.reporter.fail("FG218", f"a dimension is at least 1, not {found}", expr.span, f"{found} here")
    return Dim.of(found)


def as_tensor(state: State, scope: Scope, value: Value, span: Span, what: str) -> Tensor:
    """A value as a tensor of the graph: numbers and bools become constants; FG216 for everything else."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, bool | int | float):
        return constant(state, scope, value, span)
    hint = None
    if isinstance(value, Dim):
        hint = "a run-time dimension can be used only in shapes; mean(x, axis = ...) divides by one"
    state.reporter.fail("FG216", f"{what} is a tensor, not {values.describe(value)}", span,
                        "not a tensor", help_=(hint,))  # fmt: skip


def problem(state: State, error: ValueProblem, span: Span, context: str = "") -> None:
    """Report a compile-time problem at a place, and give up."""
    state.reporter.fail(error.code, f"{context}{error.message}", span, help_=(error.help,))


# ---------------------------------------------------------------- names


def look_up(state: State, scope: Scope, name: str, span: Span) -> Value:
    """What a name stands for here; FG201 and FG225 where it is not visible."""
    binding = scope.names.get(name)
    if binding is None:
        binding = _of_file(state, scope, name)
    if binding is None:
        _unknown(state, scope, name, span)
        raise Abort
    if isinstance(binding.value, Failed):
        raise Abort
    if isinstance(binding.value, Outer):
        return capture(scope, name, binding, binding.value)
    return binding.value


def capture(scope: Scope, name: str, binding: Binding, outer: Outer) -> Tensor:
    """Read a tensor from around a repeat in its body: it becomes an input of the body."""
    assert scope.builder is not None  # only bodies have outer tensors
    tensor = scope.builder.input(name, outer.tensor.type, outer.tensor.origins, binding.span)
    scope.captured[name] = tensor
    scope.names[name] = Binding(tensor, binding.span, binding.kind, binding.origin)
    return tensor


def _of_file(state: State, scope: Scope, name: str) -> Binding | None:
    file = state.file_scopes.get(scope.module)
    return None if file is None or file is scope else file.names.get(name)


def _unknown(state: State, scope: Scope, name: str, span: Span) -> None:
    hidden = scope.hidden.get(name)
    if hidden is not None:
        state.reporter.fail("FG225", f"`{name}` is not visible here: {hidden.reason}", span, "not bound here",
                            notes=(Note("bound here", hidden.span),), help_=(hidden.help,))  # fmt: skip
    file = state.file_scopes.get(scope.module)
    known = [*scope.names, *(file.names if file else ())]
    hint = did_you_mean(name, known)
    if hint is None and (name in NAMES or name in scope.module.blocks):
        hint = f"call it: {name}(...)"
    if hint is None and file is not None and name in file.hidden:
        reason = file.hidden[name]
        state.reporter.fail("FG225", f"`{name}` is not visible here: {reason.reason}", span, "not bound here",
                            notes=(Note("declared here", reason.span),), help_=(reason.help,))  # fmt: skip
    state.reporter.fail("FG201", f"unknown name `{name}`", span, "not found", help_=(hint,))


# ---------------------------------------------------------------- operators


def _literal(state: State, scope: Scope, expr: ast.Literal) -> Value:
    return expr.value


def _ref(state: State, scope: Scope, expr: ast.Ref) -> Value:
    return look_up(state, scope, expr.name, expr.span)


def _unary(state: State, scope: Scope, expr: ast.Unary) -> Value:
    operand = evaluate(state, scope, expr.operand)
    if isinstance(operand, Tensor):
        return emit(state, scope, expr.span, "neg" if expr.op == "-" else "logical_not", (operand,))
    if isinstance(operand, Several):
        state.reporter.fail("FG217", f"`{expr.op}` of {values.describe(operand)}", expr.span)
    try:
        return values.negate(operand) if expr.op == "-" else not values.truth(operand)
    except ValueProblem as error:
        problem(state, error, expr.span)
        raise Abort from None


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


def _binary(state: State, scope: Scope, expr: ast.Binary) -> Value:
    if expr.op in ("and", "or"):
        return _logical(state, scope, expr)
    left, right = _both(state, scope, expr)
    if isinstance(left, Tensor) or isinstance(right, Tensor) or expr.op == "@":
        return _tensor_binary(state, scope, expr, left, right)
    if isinstance(left, Several) or isinstance(right, Several):
        if expr.op in ("==", "!=") and any(map(values.is_floats, (left, right))):
            return (left == right) == (expr.op == "==")
        state.reporter.fail(
            "FG217", f"`{expr.op}` of {values.describe(left)} and {values.describe(right)}", expr.span
        )
    try:
        result = values.binary(expr.op, left, right, scope.multiples)
    except ValueProblem as error:
        problem(state, error, expr.span)
        raise Abort from None
    if expr.op == "//":
        _check_even(state, scope, expr, left, right)
    return result


def _check_even(state: State, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> None:
    """FG244 where a dimension is not divided evenly, of which FG208 speaks where its size is not known here."""
    binding = scope.names.get(expr.left.name) if isinstance(expr.left, ast.Ref) else None
    if binding is None or binding.kind != "dim" or not (isinstance(left, int) and isinstance(right, int)):
        return
    if left % right:
        help_ = "give qk_dim and v_dim, the widths of a head, or a number of heads that divides it"
        state.reporter.fail("FG244", f"{left} is not a multiple of {right}", expr.span, "does not divide evenly",
                            help_=(help_ if scope.module.name == "std" else None,))  # fmt: skip


def _both(state: State, scope: Scope, expr: ast.Binary) -> tuple[Value, Value]:
    """The right side is looked at even where the left one has no value: it may be wrong too."""
    try:
        left = evaluate(state, scope, expr.left)
    except Abort:
        evaluate(state, scope, expr.right)
        raise
    return left, evaluate(state, scope, expr.right)


def _tensor_binary(state: State, scope: Scope, expr: ast.Binary, left: Value, right: Value) -> Tensor:
    if left is None or right is None:
        state.reporter.fail("FG239", f"`{expr.op}` of {values.describe(left)} and {values.describe(right)}", expr.span,
                            "a tensor is never none",
                            help_=("only compile-time values such as float? can be none",))  # fmt: skip
    sides = (
        as_tensor(state, scope, left, expr.left.span, f"the left side of `{expr.op}`"),
        as_tensor(state, scope, right, expr.right.span, f"the right side of `{expr.op}`"),
    )
    if expr.op in _TENSOR_OPS:
        return emit(state, scope, expr.span, _TENSOR_OPS[expr.op], sides)
    if expr.op in _SWAPPED:
        return emit(state, scope, expr.span, _SWAPPED[expr.op], sides[::-1])
    if expr.op == "!=":
        same = emit(state, scope, expr.span, "equal", sides)
        return emit(state, scope, expr.span, "logical_not", (same,))
    state.reporter.fail("FG239", f"`{expr.op}` does not work on tensors", expr.span, "compile-time numbers only",
                        help_=("divide with / instead" if expr.op == "//" else None,))  # fmt: skip


def _logical(state: State, scope: Scope, expr: ast.Binary) -> Value:
    left = condition(state, scope, expr.left, f"`{expr.op}`")
    if left == (expr.op == "or"):
        return left
    return condition(state, scope, expr.right, f"`{expr.op}`")


def condition(state: State, scope: Scope, expr: ast.Expr, what: str) -> bool:
    """A compile-time truth; FG212, FG226 and, for a tensor, FG239."""
    found = evaluate(state, scope, expr)
    if isinstance(found, Tensor | Several):
        state.reporter.fail("FG239", f"{what} needs a compile-time bool, not {values.describe(found)}", expr.span,
                            "known at run time only",
                            help_=("choose between tensors with where(condition, a, b)",))  # fmt: skip
    try:
        return values.truth(found)
    except ValueProblem as error:
        problem(state, error, expr.span)
        raise Abort from None


def _conditional(state: State, scope: Scope, expr: ast.Conditional) -> Value:
    chosen = expr.then if condition(state, scope, expr.condition, "`if`") else expr.otherwise
    return evaluate(state, scope, chosen)


def _transpose(state: State, scope: Scope, expr: ast.Transpose) -> Value:
    operand = as_tensor(
        state, scope, evaluate(state, scope, expr.operand), expr.operand.span, "what `.T` turns"
    )
    rank = len(operand.type.shape)
    if rank < 2:
        state.reporter.fail("FG205", f"`.T` of {operand.type}: it swaps the last two dimensions", expr.span,
                            f"{rank} dimension{'' if rank == 1 else 's'} here")  # fmt: skip
    return emit(state, scope, expr.span, "permute", (operand,), axes=(*range(rank - 2), rank - 1, rank - 2))


def _tuple(state: State, scope: Scope, expr: ast.Tuple) -> Value:
    return Several(tuple([evaluate(state, scope, item) for item in expr.items]))


def _call(state: State, scope: Scope, expr: ast.Call) -> Value:
    return state.call(state, scope, expr)


# ---------------------------------------------------------------- x[..]


def _index(state: State, scope: Scope, expr: ast.Index) -> Value:
    tensor = as_tensor(
        state, scope, evaluate(state, scope, expr.operand), expr.operand.span, "what is indexed"
    )
    rank, given = len(tensor.type.shape), sum(not part.ellipsis for part in expr.slices)
    ellipses = len(expr.slices) - given
    if ellipses > 1:
        state.reporter.fail("FG206", "an index has at most one `..`", expr.slices[-1].span, "one too many")
    if given > rank:
        state.reporter.fail("FG205", f"{given} indices for {tensor.type}, which has {rank} dimensions", expr.span,
                            "too many indices")  # fmt: skip
    axis = -rank
    for place, part in enumerate(expr.slices):
        if part.ellipsis:
            axis = -(len(expr.slices) - place - 1)
            continue
        tensor = _take(state, scope, expr.span, tensor, part, axis)
        axis += 1
    return tensor


def _take(state: State, scope: Scope, span: Span, tensor: Tensor, part: ast.Slice, axis: int) -> Tensor:
    size = tensor.type.shape[axis]
    if part.index is not None:
        at = _place(state, scope, part.index, size)
        return emit(state, scope, span, "select", (tensor,), axis=axis, index=at)
    if part.start is None and part.stop is None:
        return tensor
    start = 0 if part.start is None else _place(state, scope, part.start, size)
    stop = values.normal(size) if part.stop is None else _place(state, scope, part.stop, size)
    return emit(state, scope, span, "slice", (tensor,), axis=axis, start=start, stop=stop)


def _place(state: State, scope: Scope, expr: ast.Expr, size: Dim) -> int | Dim:
    """An index along an axis of this size, counted from the front."""
    found = evaluate(state, scope, expr)
    if isinstance(found, Tensor):
        state.reporter.fail("FG216", "an index is a compile-time int, not a tensor", expr.span, f"{found.type} here",
                            help_=("look rows up with embedding(table, ids)",))  # fmt: skip
    if isinstance(found, Dim):
        return found
    if isinstance(found, bool) or not isinstance(found, int):
        state.reporter.fail("FG217", f"an index is an int, not {values.describe(found)}", expr.span)
    return found if found >= 0 else values.normal(size + found)


_EXPRESSIONS: dict[type, Callable[..., Value]] = {
    ast.Literal: _literal,
    ast.Ref: _ref,
    ast.Unary: _unary,
    ast.Binary: _binary,
    ast.Conditional: _conditional,
    ast.Transpose: _transpose,
    ast.Index: _index,
    ast.Tuple: _tuple,
    ast.Call: _call,
}
