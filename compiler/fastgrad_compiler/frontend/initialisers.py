"""Initialisers of weights and buffers, and their defaults.

    normal(mean = 0.0, std = 0.02)        ("normal", mean, std)
    trunc_normal(mean = 0.0, std = 0.02)  ("trunc_normal", mean, std), cut at two standard deviations
    xavier(gain = 1.0)                    ("xavier", gain), uniform; fan-in and fan-out are the last two dims
    linspace(first, last)                 ("linspace", first, last), evenly spaced along the last dim
    zeros()  ones()  constant(value)      ("zeros",) ("ones",) ("constant", value)

A weight without one takes xavier() from two dims on, else zeros(); a buffer zeros().
"""

from __future__ import annotations

from fastgrad_compiler.frontend.arguments import Formal, match_arguments
from fastgrad_compiler.frontend.expressions import reported, scalar
from fastgrad_compiler.frontend.reporter import did_you_mean
from fastgrad_compiler.frontend.scope import Scope
from fastgrad_compiler.frontend.values import convert
from fastgrad_compiler.ir.graph import TensorType
from fastgrad_grammar import ast

INITIALISERS: dict[str, tuple[tuple[str, float | None], ...]] = {
    "normal": (("mean", 0.0), ("std", 0.02)),
    "trunc_normal": (("mean", 0.0), ("std", 0.02)),
    "xavier": (("gain", 1.0),),
    "linspace": (("first", None), ("last", None)),
    "zeros": (),
    "ones": (),
    "constant": (("value", None),),
}
_FRACTIONS = ("normal", "trunc_normal", "xavier", "linspace")

Init = tuple[str | float, ...]


def initialiser(scope: Scope, statement: ast.Weight | ast.Buffer, kind: TensorType) -> Init:
    """The attribute `init` of a weight or buffer; FG230 for what does not apply, FG217 and FG218 for its numbers."""
    init = statement.init
    if init is None:
        return ("xavier", 1.0) if isinstance(statement, ast.Weight) and len(kind.shape) > 1 else ("zeros",)
    name = init.function.text if isinstance(init, ast.Call) and init.module is None else None
    if not isinstance(init, ast.Call) or name is None or name not in INITIALISERS:
        shown = init.function if isinstance(init, ast.Call) else init
        raise scope.report("FG230", f"unknown initialiser `{name or shown.span.text}`", shown.span,
                           f"expected one of {', '.join(INITIALISERS)}",
                           help_=(did_you_mean(name or "", INITIALISERS),))  # fmt: skip
    _applies(scope, init, name, kind)
    formals = [Formal(each, False, default is None) for each, default in INITIALISERS[name]]
    given = match_arguments(scope.report, init, formals, name)
    numbers = [default if each not in given else _number(scope, given[each][0], f"`{each}` of {name}")
               for each, default in INITIALISERS[name]]  # fmt: skip
    if kind.dtype != "float":
        return (name, *(int(number) for number in numbers if number is not None))
    return (name, *(number for number in numbers if number is not None))


def _applies(scope: Scope, init: ast.Call, name: str, kind: TensorType) -> None:
    if name in _FRACTIONS and kind.dtype != "float":
        raise scope.report("FG230", f"{name} fills float tensors, not {kind}", init.span, "numbers that are not whole",
                           help_=("use zeros(), ones() or constant(value)",))  # fmt: skip
    if name == "xavier" and len(kind.shape) < 2:
        raise scope.report("FG230", f"xavier needs two dimensions, not {kind}", init.span, "no fan-in and fan-out",
                           help_=("use zeros(), ones() or normal(std = 0.02)",))  # fmt: skip
    if name == "linspace" and not kind.shape:
        raise scope.report("FG230", f"linspace needs a dimension, not {kind}", init.span, "one number",
                           help_=("use constant(value)",))  # fmt: skip


def _number(scope: Scope, expr: ast.Expr, what: str) -> float:
    with reported(scope, expr.span, f"{what}: "):
        found = convert(scalar(scope, expr, what), "float", False)
    number = float(found) if isinstance(found, int | float) else 0.0
    if "std" in what and number < 0:
        raise scope.report("FG218", f"{what} is at least 0, not {number}", expr.span, f"{number} here")
    return number
