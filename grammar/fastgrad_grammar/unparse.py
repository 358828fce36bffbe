"""Syntax trees as one line of text each, with as few parentheses as their meaning allows."""

from __future__ import annotations

from collections.abc import Sequence

from fastgrad_grammar import ast
from fastgrad_grammar.scope import Scope

CONDITIONAL, OR, AND, NOT, COMPARE, SUM, PRODUCT, SIGN, POSTFIX, PARENTHESES = range(10)
"""How tightly an expression binds; an operand that binds less tightly than its place asks for is put in
parentheses, and everything is where its place asks for PARENTHESES."""

_BINDING = {
    "or": OR,
    "and": AND,
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">="), COMPARE),
    **dict.fromkeys(("+", "-"), SUM),
    **dict.fromkeys(("*", "/", "//", "%", "@"), PRODUCT),
}


OPERATION_TENSORS = frozenset(
    (
        *("a", "b", "condition", "far", "ids", "image", "length", "local", "log_gate", "logits"),
        *("mask", "scores", "table", "targets", "tensors", "w", "weights", "x"),
    )
)
"""The parameters of operations that are tensors: never after `;`, even where a number is given for one."""

VALUE_OPERATIONS = frozenset({"fit"})
"""Operations that take compile-time values alone and give one."""


def binding(expr: ast.Expr) -> int:
    """How tightly an expression binds."""
    match expr:
        case ast.Conditional():
            return CONDITIONAL
        case ast.Binary():
            return _BINDING[expr.op]
        case ast.Unary():
            return NOT if expr.op == "not" else SIGN
        case _:
            return POSTFIX


def operand_places(expr: ast.Binary) -> tuple[int, int]:
    """What the left and the right operand must bind at least as tightly as; comparisons do not chain.

    Parentheses that the author put around an operation, or around a call with a label, stay.
    """
    own = _BINDING[expr.op]
    left = PARENTHESES if _keeps_parentheses(expr.left, expr.left.span.start > expr.span.start) else own
    right = PARENTHESES if _keeps_parentheses(expr.right, expr.right.span.end < expr.span.end) else own + 1
    return (own + 1 if own == COMPARE and left == own else left), right


def _keeps_parentheses(operand: ast.Expr, written: bool) -> bool:
    operation = isinstance(operand, ast.Unary | ast.Binary | ast.Conditional)
    return written and (operation or (isinstance(operand, ast.Call) and operand.label is not None))


def text(expr: ast.Expr, scope: Scope, place: int = CONDITIONAL) -> str:
    """An expression on one line, in parentheses if `place` asks for a tighter one."""
    plain = _plain(expr, scope)
    return f"({plain})" if binding(expr) < place else plain


def _plain(expr: ast.Expr, scope: Scope) -> str:
    match expr:
        case ast.Literal():
            return expr.span.text  # as its author wrote it
        case ast.Ref():
            return expr.name
        case ast.Call():
            return f"{call_head(expr)}({_arguments(expr, scope)}){label(expr)}"
        case ast.Tuple():
            items = ", ".join(text(item, scope) for item in expr.items)
            return f"({items},)" if len(expr.items) == 1 else f"({items})"
        case ast.Index():
            slices = ", ".join(_slice(part, scope) for part in expr.slices)
            return f"{text(expr.operand, scope, POSTFIX)}[{slices}]"
        case ast.Transpose():
            return f"{text(expr.operand, scope, POSTFIX)}.T"
        case _:
            return _operation(expr, scope)


def _operation(expr: ast.Unary | ast.Binary | ast.Conditional, scope: Scope) -> str:
    if isinstance(expr, ast.Unary):
        space = " " if expr.op == "not" else ""
        return f"{expr.op}{space}{text(expr.operand, scope, binding(expr))}"
    if isinstance(expr, ast.Binary):
        left, right = operand_places(expr)
        return f"{text(expr.left, scope, left)} {expr.op} {text(expr.right, scope, right)}"
    then, condition = text(expr.then, scope, OR), text(expr.condition, scope, OR)
    return f"{then} if {condition} else {text(expr.otherwise, scope)}"


def _slice(part: ast.Slice, scope: Scope) -> str:
    if part.ellipsis:
        return ".."
    if part.index is not None:
        return text(part.index, scope)
    start = "" if part.start is None else text(part.start, scope)
    stop = "" if part.stop is None else text(part.stop, scope)
    return f"{start}:{stop}"


# ---------------------------------------------------------------- calls


def call_head(call: ast.Call) -> str:
    """`std.attention`."""
    return call.function.text if call.module is None else f"{call.module}.{call.function.text}"


def label(call: ast.Call) -> str:
    """` as layers`, or nothing."""
    return f" as {call.label.text}" if call.label is not None else ""


def argument_prefix(argument: ast.Argument) -> str:
    """`name = `, or nothing."""
    return f"{argument.name.text} = " if argument.name is not None else ""


def _arguments(call: ast.Call, scope: Scope) -> str:
    texts = [argument_prefix(one) + text(one.value, scope) for one in call.arguments]
    return join_sides(texts, first_value(call, scope))


def join_sides(texts: Sequence[str], values_from: int | None) -> str:
    """Texts joined by commas, with `;` before the one at `values_from`."""
    if values_from is None:
        return ", ".join(texts)
    return f"{', '.join(texts[:values_from])}; {', '.join(texts[values_from:])}".strip()


def first_value(call: ast.Call, scope: Scope) -> int | None:
    """The index of the argument before which `;` belongs; None for no `;`.

    A block whose signature is known decides. Otherwise a `;` of the author stays, and the keyword arguments of an
    operation get one if they are plainly compile-time values. None stands before the first argument.
    """
    arguments = call.arguments
    tensors = (
        () if _is_value_operation(call, scope) else scope.signatures.get((call.module, call.function.text))
    )
    if tensors is not None:
        sides = [_is_value(index, one, tensors) for index, one in enumerate(arguments)]
    else:
        sides = [one.value_side for one in arguments]
        if not any(sides) or sides[0]:
            sides = [one.name is not None for one in arguments]
            if call.module is not None or not all(_is_value_of_operation(one, scope) for one in arguments):
                return None
    first = sides.index(True) if any(sides) else 0
    return first if first and all(sides[first:]) else None


def _is_value_operation(call: ast.Call, scope: Scope) -> bool:
    """A block of the file hides the operation of its name."""
    name = (call.module, call.function.text)
    return call.module is None and call.function.text in VALUE_OPERATIONS and name not in scope.signatures


def _is_value(index: int, argument: ast.Argument, tensors: tuple[str, ...]) -> bool:
    return index >= len(tensors) if argument.name is None else argument.name.text not in tensors


def _is_value_of_operation(argument: ast.Argument, scope: Scope) -> bool:
    """False for a keyword argument that is, or could be, a tensor."""
    if argument.name is None:
        return True
    return argument.name.text not in OPERATION_TENSORS and _is_plain_value(argument.value, scope)


def _is_plain_value(expr: ast.Expr, scope: Scope) -> bool:
    match expr:
        case ast.Literal():
            return True
        case ast.Ref():
            return expr.name not in scope.tensors
        case ast.Unary():
            return _is_plain_value(expr.operand, scope)
        case ast.Binary():
            return expr.op != "@" and all(_is_plain_value(side, scope) for side in (expr.left, expr.right))
        case ast.Conditional():
            parts = (expr.then, expr.condition, expr.otherwise)
            return all(_is_plain_value(part, scope) for part in parts)
        case ast.Tuple():
            return all(_is_plain_value(item, scope) for item in expr.items)
        case ast.Call():
            return _is_value_operation(expr, scope)
        case _:
            return False


# ---------------------------------------------------------------- types and signatures


def tensor_type(kind: ast.TensorType, scope: Scope) -> str:
    """`float[b, n, 4 * d]`."""
    return f"{kind.dtype}[{', '.join(text(dim, scope) for dim in kind.dims)}]"


def value_type(kind: ast.ValueType) -> str:
    """`float?`."""
    return f"{kind.name}{'?' if kind.optional else ''}"


def results(types: Sequence[ast.TensorType], scope: Scope) -> str:
    """What comes after `->`."""
    joined = ", ".join(tensor_type(kind, scope) for kind in types)
    return joined if len(types) == 1 else f"({joined})"


def parameter(param: ast.TensorParam | ast.ValueParam, scope: Scope) -> str:
    """`x: float[b, n]` or `heads: int = 8`."""
    if isinstance(param, ast.TensorParam):
        return f"{param.name.text}: {tensor_type(param.type, scope)}"
    default = "" if param.default is None else f" = {text(param.default, scope)}"
    return f"{param.name.text}: {value_type(param.type)}{default}"
