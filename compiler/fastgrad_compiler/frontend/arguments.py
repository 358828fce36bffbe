"""Matching the arguments of a call with the parameters of a block or an operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrad_compiler.frontend.reporter import Abort, Reporter, did_you_mean
from fastgrad_compiler.ir.words import counted
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note
from fastgrad_grammar.source import Span

PYTORCH_NAMES = {
    "dim": "axis",
    "dims": "axes",
    "min": "low",
    "max": "high",
    "keepdims": "keepdim",
    "axis": "axes",
}
"""Keywords of PyTorch and numpy, and what they are called here."""


@dataclass(frozen=True, slots=True)
class Formal:
    """A parameter as calls see it: `tensor` before the `;`, else a compile-time value; `needed` without a default."""

    name: str
    tensor: bool
    needed: bool
    span: Span | None = None


def match_arguments(
    report: Reporter, call: ast.Call, formals: Sequence[Formal], what: str, *, rest: str | None = None
) -> dict[str, list[ast.Expr]]:
    """The expressions given for each parameter; only `rest` can get several.

    Positional arguments fill the tensors and then the values; after a `;` they fill the values. Raises Abort after
    FG213 (missing), FG214 (too many), FG215 (unknown name) or FG216 (wrong side of `;`).
    """
    given: dict[str, list[ast.Expr]] = {}
    front = [formal.name for formal in formals]
    behind = [formal.name for formal in formals if not formal.tensor]
    for argument in call.arguments:
        if argument.name is not None:
            _keyword(report, argument, argument.name, formals, given, what)
            continue
        queue = behind if argument.value_side else front
        name = next((each for each in queue if each not in given or each == rest), None)
        if name is None:
            raise _too_many(report, argument, formals, what)
        given.setdefault(name, []).append(argument.value)
    missing = [formal for formal in formals if formal.needed and formal.name not in given]
    if missing:
        names = " and ".join(f"`{formal.name}`" for formal in missing)
        notes = [Note(f"{formal.name} is declared here", formal.span) for formal in missing if formal.span]
        example = next((f"write {f.name} = ..." for f in missing if not f.tensor), None)
        raise report("FG213", f"{what} needs {names}", call.function.span, "missing here", notes=notes[:2],
                     help_=(example,))  # fmt: skip
    return given


def _keyword(
    report: Reporter,
    argument: ast.Argument,
    name: ast.Name,
    formals: Sequence[Formal],
    given: dict[str, list[ast.Expr]],
    what: str,
) -> None:
    formal = next((formal for formal in formals if formal.name == name.text), None)
    if formal is None:
        names = [formal.name for formal in formals]
        usual = PYTORCH_NAMES.get(name.text)
        help_ = f"it is called {usual} here" if usual in names else did_you_mean(name.text, names)
        known = f"it takes {', '.join(names)}" if names else "it takes no arguments"
        raise report("FG215", f"{what} has no parameter `{name.text}`", name.span, known, help_=(help_,))
    if formal.tensor and argument.value_side:
        notes = [Note("declared here", formal.span)] if formal.span else []
        raise report("FG216", f"the tensor `{name.text}` is after `;`", argument.span, "tensors come first",
                     notes=notes, help_=("move it before the `;`",))  # fmt: skip
    if name.text in given:
        raise report("FG214", f"`{name.text}` of {what} is given twice", name.span, "given again",
                     notes=[Note("given by position", given[name.text][0].span)])  # fmt: skip
    given[name.text] = [argument.value]


def _too_many(report: Reporter, argument: ast.Argument, formals: Sequence[Formal], what: str) -> Abort:
    tensors = sum(formal.tensor for formal in formals)
    values = counted(len(formals) - tensors, "value")
    takes = f"{values} after `;`" if argument.value_side else f"{counted(tensors, 'tensor')} and {values}"
    return report("FG214", f"too many arguments for {what}", argument.span, f"it takes {takes}")
