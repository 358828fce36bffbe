"""Running the body of a block: assignments, weights, static conditions, returns. `repeat` is in `repeats`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.expressions import condition, dimension, evaluate
from fastgrad_compiler.frontend.initialisers import initialiser
from fastgrad_compiler.frontend.reporter import Abort
from fastgrad_compiler.frontend.scope import (
    Binding,
    Failed,
    Hidden,
    Scope,
    always_bound,
    assigned,
    returns,
)
from fastgrad_compiler.frontend.values import Origin, Several, Tensor, Value
from fastgrad_compiler.ir.graph import TensorType
from fastgrad_compiler.ir.words import counted
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note


def run_body(scope: Scope, body: Sequence[ast.Statement]) -> tuple[Value, ast.Return] | None:
    """Run statements in order; the returned value, or None where none returned. A failed statement is passed over."""
    for place, statement in enumerate(body):
        scope.state.step(statement.span)
        try:
            returned = _STATEMENTS[type(statement)](scope, statement)
        except Abort:
            bind_failed(scope, statement)
            returned = None
            if isinstance(statement, ast.Return) and not scope.in_repeat:
                raise
        if returns((statement,)) and place + 1 < len(body):
            scope.report("FG223", "this statement is never reached", body[place + 1].span, "after the return",
                         notes=(Note("returns here", statement.span),))  # fmt: skip
        if returned is not None:
            return returned
    return None


def bind_failed(scope: Scope, statement: ast.Statement) -> None:
    """The names that a failed statement would have bound: reading them says nothing more.

    What a condition or a repeat only rebinds most likely keeps its type, so that it stays as it was.
    """
    keep = isinstance(statement, ast.If | ast.Repeat)
    for name, span in assigned((statement,)).items():
        if keep and name in scope.names:
            continue
        scope.names[name] = Binding(Failed(), span, "local")
        scope.hidden.pop(name, None)


def bind(scope: Scope, name: ast.Name, value: Value) -> None:
    """Give a value the user's name."""
    if isinstance(value, Tensor) and scope.builder is not None:
        value = scope.builder.rename(value, name.text)
    scope.state.found(name.span, value)
    scope.names[name.text] = Binding(value, name.span, "local", Origin(name.text, name.span))
    scope.hidden.pop(name.text, None)


# ---------------------------------------------------------------- statements


def _assign(scope: Scope, statement: ast.Assign) -> None:
    value = evaluate(scope, statement.value)
    targets = statement.targets
    if len(targets) == 1 and not statement.span.text.startswith("("):
        if isinstance(value, Several):
            message = f"{len(value.items)} values for the one name `{targets[0].text}`"
            help_ = _names_help(len(value.items), statement.value)
            raise scope.report("FG238", message, statement.value.span, values.describe(value), help_=(help_,))
        bind(scope, targets[0], value)
        return
    items = value.items if isinstance(value, Several) else (value,)
    if len(items) != len(targets):
        found = counted(len(items), "value")
        raise scope.report("FG238", f"{found} for {len(targets)} names", statement.value.span, f"{found} here",
                           help_=(_names_help(len(items), statement.value),))  # fmt: skip
    for target, item in zip(targets, items, strict=True):
        bind(scope, target, item)


def _names_help(count: int, value: ast.Expr) -> str | None:
    if count == 1 or count > 4:
        return None
    return f"write ({', '.join('abcd'[:count])}) = {value.span.text.splitlines()[0][:40]}"


def _weight(scope: Scope, statement: ast.Weight | ast.Buffer) -> None:
    is_weight = isinstance(statement, ast.Weight)
    what = "weight" if is_weight else "buffer"
    name = statement.name
    bound = scope.names.get(name.text)
    if bound is not None and bound.kind not in ("dim", "param"):
        raise scope.report("FG202", f"`{name.text}` is declared twice", name.span, "declared again",
                           notes=(Note("first here", bound.span),))  # fmt: skip
    kind = tensor_type(scope, statement.type)
    for dim, expr in zip(kind.shape, statement.type.dims, strict=True):
        if dim.constant is None:
            message = f"the {what} `{name.text}` has the run-time dimension {dim}"
            label, help_ = "its size must be known at compile time", "use a param for its size"
            raise scope.report("FG229", message, expr.span, label, help_=(help_,))
    if is_weight and kind.dtype != "float":
        raise scope.report("FG229", f"the weight `{name.text}` is {kind}: weights are floats", statement.type.span,
                           "cannot be trained", help_=("declare it as a buffer",))  # fmt: skip
    init = initialiser(scope, statement, kind)
    assert scope.builder is not None  # bodies have one
    label = scope.builder.label(name.text, weight=True)
    node = scope.builder.add(what, (), kind, statement.span, {"init": init, "label": label}, name.text)
    origins = tuple([dim_origin(scope, expr, name) for expr in statement.type.dims])
    declared = (name.text, tuple([expr.span.text for expr in statement.type.dims]))
    tensor = Tensor(node.name, kind, origins, scope.builder, declared)
    scope.state.found(name.span, tensor)
    scope.names[name.text] = Binding(tensor, name.span, "weight", Origin(name.text, name.span))
    scope.hidden.pop(name.text, None)


def tensor_type(scope: Scope, kind: ast.TensorType) -> TensorType:
    """A written type with its dims evaluated."""
    return TensorType(kind.dtype, tuple([dimension(scope, expr) for expr in kind.dims]))


def dim_origin(scope: Scope, expr: ast.Expr, owner: ast.Name) -> Origin:
    """Where a written dim has its size from: the name it is, or the tensor that is declared with it."""
    if isinstance(expr, ast.Ref):
        binding = scope.names.get(expr.name)
        if binding is not None and binding.origin is not None:
            return binding.origin
    return Origin(owner.text, owner.span, sized=False)


def _if(scope: Scope, statement: ast.If) -> tuple[Value, ast.Return] | None:
    before = set(scope.names)
    chosen = condition(scope, statement.condition, "`if`")
    taken, other = (statement.then, statement.otherwise) if chosen else (statement.otherwise, statement.then)
    returned = run_body(scope, taken)
    if returned is None:
        kept = always_bound((statement,))
        for name, span in assigned((statement,)).items():
            if name not in before and name not in kept:
                scope.names.pop(name, None)
                missing = "else" if other is statement.otherwise and not other else "other branch"
                scope.hidden[name] = Hidden("not every branch of the `if` binds it", span,
                                            f"bind {name} before the `if`, or in its {missing} too")  # fmt: skip
    return returned


def _return(scope: Scope, statement: ast.Return) -> tuple[Value, ast.Return]:
    if scope.in_repeat:
        raise scope.report("FG223", "`return` inside a repeat", statement.span, "a repeat cannot be left",
                           help_=("return after the repeat",))  # fmt: skip
    return evaluate(scope, statement.value), statement


_STATEMENTS: dict[type, Callable[..., tuple[Value, ast.Return] | None]] = {
    ast.Assign: _assign,
    ast.Weight: _weight,
    ast.Buffer: _weight,
    ast.If: _if,
    ast.Return: _return,
    ast.Repeat: lambda scope, statement: scope.state.repeat(scope, statement),
}
