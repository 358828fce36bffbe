"""A file's own values: params with what the caller sets, and run-time dims with their bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.expressions import compile_time, scalar
from fastgrad_compiler.frontend.modules import Module
from fastgrad_compiler.frontend.reporter import Abort, Reporter, did_you_mean
from fastgrad_compiler.frontend.scope import Binding, Failed, Hidden, Scope
from fastgrad_compiler.frontend.state import State
from fastgrad_compiler.frontend.values import Constant, Origin, Several, ValueProblem
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import DimInfo
from fastgrad_grammar import ast

_WORDS: dict[str, bool | None] = {"true": True, "false": False, "none": None}


def file_scope(state: State, module: Module, given: Mapping[str, object]) -> Scope:
    """The params and dims of a file; `given` overrides params by name (FG401 to FG403)."""
    scope = Scope(state, module)
    state.file_scopes[module] = scope
    params = module.of(ast.Param)
    _unknown_params(state.report, [param.name.text for param in params], given)
    for param in params:
        scope.hidden[param.name.text] = Hidden("it is declared further down", param.span, "declare it first")
    for item in module.items:
        if isinstance(item, ast.Param):
            scope.hidden.pop(item.name.text, None)
            _param(scope, item, given)
        elif isinstance(item, ast.DimDecl):
            name, span = item.name.text, item.name.span
            scope.names.setdefault(name, Binding(Dim.of(name), span, "dim", Origin(name, span)))
    return scope


def dim_info(scope: Scope) -> dict[str, DimInfo]:
    """What the file declares of its run-time dims."""
    found: dict[str, DimInfo] = {}
    for item in scope.module.of(ast.DimDecl):
        name = item.name.text
        at_most = _limit(scope, item.at_most, f"the bound of `{name}`")
        multiple = _limit(scope, item.multiple_of, f"the divisor of `{name}`") or 1
        if at_most is not None and at_most < multiple and item.at_most is not None:
            message = f"`{name}` is at most {at_most} and a multiple of {multiple}"
            scope.report("FG237", message, item.at_most.span, "no such number")
        found.setdefault(name, DimInfo(name, at_most, multiple, item.span))
    return found


def _limit(scope: Scope, expr: ast.Expr | None, what: str) -> int | None:
    if expr is None:
        return None
    try:
        value = scalar(scope, expr, what)
        if not values.is_int(value) or value < 1:
            raise scope.report("FG237", f"{what} is an int of at least 1, not {values.describe(value)}", expr.span,
                               f"{values.show(value)} here")  # fmt: skip
    except Abort:
        return None
    return value


def _param(scope: Scope, item: ast.Param, given: Mapping[str, object]) -> None:
    name, origin = item.name, Origin(item.name.text, item.name.span)
    try:
        value = compile_time(scope, item.value, f"the param `{name.text}`")
        if isinstance(value, Dim):
            raise scope.report("FG212", f"the param `{name.text}` is the run-time dimension {value}", item.value.span,
                               "known at run time only")  # fmt: skip
        kind, optional = _type_of(scope, item, value)
        try:
            value = values.convert(value, kind, optional)
        except ValueProblem as error:
            hint = f"declare it as {kind}?" if value is None else None
            raise scope.report(error.code, f"the param `{name.text}`: {error.message}", item.value.span,
                               f"{values.show(value)} here", help_=(hint,)) from None  # fmt: skip
        if name.text in given:
            value = _outside(scope.report, name.text, kind, optional, given[name.text])
    except Abort:
        scope.names[name.text] = Binding(Failed(), name.span, "param")
        return
    scope.state.found(name.span, value)
    scope.names[name.text] = Binding(value, name.span, "param", origin)


def _type_of(scope: Scope, item: ast.Param, value: Constant) -> tuple[str, bool]:
    if item.type is not None:
        return item.type.name, item.type.optional
    if value is None:
        raise scope.report("FG217", f"the param `{item.name.text}` needs a type: none fits every optional one",
                           item.value.span, "of which type?",
                           help_=(f"write param {item.name.text}: float? = none",))  # fmt: skip
    return values.type_name(value), False


# ---------------------------------------------------------------- values from outside


def _unknown_params(report: Reporter, names: Sequence[str], given: Mapping[str, object]) -> None:
    for name in given:
        if name not in names:
            listed = f"its params are {', '.join(names)}" if names else "it has no params"
            report("FG401", f"the file has no param `{name}`", None,
                   help_=(did_you_mean(name, names) or listed,))  # fmt: skip


def _outside(report: Reporter, name: str, kind: str, optional: bool, value: object) -> Constant:
    """A value that the caller or the command line gives for a param of type `kind`."""
    wanted = f"{kind} or none" if optional else kind
    found = _parse(value, kind, optional) if isinstance(value, str) else value
    if kind == "floats" and isinstance(found, list | tuple):
        found = Several(tuple(found))
    if found is not None and not isinstance(found, int | float | bool | str | Several):
        raise report("FG402", f"param `{name}` is {wanted}, not a Python {type(value).__name__}", None)
    try:
        return values.checked(values.convert(found, kind, optional))
    except ValueProblem as error:
        if error.code == "FG219":
            raise report("FG403", f"param `{name}`: {values.show(found)} is out of range", None) from None
        shown = f'"{value}"' if isinstance(value, str) else values.show(found)
        raise report("FG402", f"param `{name}` is {wanted}, not {shown}", None) from None


def _parse(text: str, kind: str, optional: bool) -> Constant:
    """A command-line text as a value of `kind`; the text itself where it is none."""
    if kind == "floats" and text.strip().lower() not in _WORDS:
        parts = text.strip().removeprefix("(").removesuffix(")").split(",")
        items = tuple(_parse(part, "float", False) for part in parts)
        return Several(items) if all(map(values.is_number, items)) else text
    if kind == "str":
        return None if optional and text == "none" else text
    lowered = text.strip().lower()
    if lowered in _WORDS:
        return _WORDS[lowered]
    if len(lowered) > 400:
        return text
    for convert in (int, float):
        try:
            return convert(lowered)
        except ValueError:
            continue
    return text
