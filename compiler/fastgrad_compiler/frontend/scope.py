"""What names mean at a place: bindings of a block instance or of a file, and why others are not visible."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fastgrad_compiler.frontend.builder import Builder
from fastgrad_compiler.frontend.modules import Module
from fastgrad_compiler.frontend.reporter import Reporter
from fastgrad_compiler.frontend.values import Origin, Tensor, Value
from fastgrad_grammar import ast
from fastgrad_grammar.source import Span

if TYPE_CHECKING:
    from fastgrad_compiler.frontend.state import State


@dataclass(frozen=True, slots=True)
class Failed:
    """The value of a name whose statement was reported."""


@dataclass(frozen=True, slots=True)
class Outer:
    """A tensor around a repeat: the body gets it as an input when it first reads it."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Binding:
    """A name's value, where it was bound, and as what: input, weight, value, local, param, dim or index."""

    value: Value | Failed | Outer
    span: Span
    kind: str
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Hidden:
    """Why a name is not visible: bound at `span`, but only there."""

    reason: str
    span: Span
    help: str | None = None


@dataclass(slots=True)
class Scope:
    """The names of one block instance (or, with `builder` None, of a file's own declarations)."""

    state: State
    module: Module
    builder: Builder | None = None
    names: dict[str, Binding] = field(default_factory=dict)
    hidden: dict[str, Hidden] = field(default_factory=dict)
    in_repeat: bool = False
    captured: dict[str, Tensor] = field(default_factory=dict)

    @property
    def report(self) -> Reporter:
        """Where to say what is wrong."""
        return self.state.report

    @property
    def file(self) -> Scope:
        """That of the file, as far as it has been read."""
        return self.state.file_scopes[self.module]

    def inner(self, builder: Builder) -> Scope:
        """The scope of a repeat's body: tensors from outside become inputs when they are read."""
        names = {
            name: replace(binding, value=Outer(binding.value))
            if isinstance(binding.value, Tensor)
            else binding
            for name, binding in self.names.items()
        }
        return Scope(self.state, self.module, builder, names, dict(self.hidden), True)

    def tensor_names(self) -> list[str]:
        """The names that are tensors now."""
        return [name for name, binding in self.names.items() if isinstance(binding.value, Tensor | Outer)]


# ---------------------------------------------------------------- what statements bind, without running them


def always_bound(body: Iterable[ast.Statement]) -> set[str]:
    """The names that a body binds whichever way its conditions go."""
    found: set[str] = set()
    for statement in body:
        found.update(name.text for name in ast.bound(statement))
        if isinstance(statement, ast.If):
            branches = [b for b in (statement.then, statement.otherwise) if not returns(b)]
            found |= set.intersection(*map(always_bound, branches)) if branches else set()
    return found


def returns(body: Iterable[ast.Statement]) -> bool:
    """Whether a body returns whichever way its conditions go."""
    return any(
        isinstance(s, ast.Return) or (isinstance(s, ast.If) and returns(s.then) and returns(s.otherwise))
        for s in body
    )


def assigned(body: Iterable[ast.Statement]) -> dict[str, Span]:
    """Every name that a body may assign, and where it first does."""
    found: dict[str, Span] = {}
    for statement in ast.walk(body):
        for name in ast.bound(statement):
            found.setdefault(name.text, name.span)
    return found


def mentions(node: object, name: str) -> bool:
    """Whether a name is read anywhere in a piece of syntax."""
    pending = [node]
    while pending:
        piece = pending.pop()
        if isinstance(piece, ast.Ref) and piece.name == name:
            return True
        if isinstance(piece, tuple):
            pending.extend(piece)
        elif isinstance(piece, ast.Node):
            pending.extend(vars(piece).values())
    return False
