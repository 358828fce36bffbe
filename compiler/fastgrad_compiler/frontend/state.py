"""What one run of the elaborator knows: graphs made so far, block instances, limits, diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from fastgrad_compiler.frontend.builder import Builder, check_size, trace_origins
from fastgrad_compiler.frontend.modules import Module
from fastgrad_compiler.frontend.reporter import Reporter
from fastgrad_compiler.frontend.scope import Scope
from fastgrad_compiler.frontend.values import Origin, Tensor, Value, ValueProblem
from fastgrad_compiler.ir.graph import Attribute, Graph, TensorType, Type
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.ir.shapes import Blame, ShapeError, infer
from fastgrad_grammar import ast
from fastgrad_grammar.source import Span

MAX_STEPS = 100_000
MAX_UNROLLED = 200_000  # counting every iteration of repeats and every call of blocks
MAX_DEPTH = 64
MAX_REPEAT = 100_000


Watch: TypeAlias = "Callable[[Span, Value], None]"
"""Is told the value of each expression, and of each name where it is bound, once for each instance of its block."""


@dataclass(frozen=True, slots=True)
class Instance:
    """A block for one signature: its graph's name (None where its body was wrong) and its result types."""

    graph: str | None
    results: tuple[TensorType, ...]


@dataclass(slots=True)
class State:
    """Shared by everything that elaborates one model.

    `call` evaluates a call expression and `repeat` elaborates a repeat: both run bodies again, which hold them.
    """

    report: Reporter
    call: Callable[[Scope, ast.Call], Value]
    repeat: Callable[[Scope, ast.Repeat], None]
    multiples: dict[str, int] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    instances: dict[object, Instance] = field(default_factory=dict)
    open: list[tuple[Module, ast.BlockDecl, Span]] = field(default_factory=list)
    graph_names: UniqueNames = field(default_factory=UniqueNames)
    file_scopes: dict[Module, Scope] = field(default_factory=dict)
    steps: int = 0
    watch: Watch | None = None

    def found(self, span: Span, value: Value) -> None:
        """Tell who watches what an expression, or a name where it is bound, was found to be."""
        if self.watch is not None:
            self.watch(span, value)

    def step(self, span: Span, work: int = 1) -> None:
        """Count work; FG241 ends the run where a program grows beyond what can be meant."""
        self.steps += work
        if self.steps > MAX_STEPS:
            message = f"the program is too large: more than {MAX_STEPS} statements and operations"
            help_ = "repeat bodies that do not read the index are elaborated once"
            self.report("FG241", message, span, "reached here", help_=(help_,))
            self.report.stop()


def builder_of(scope: Scope, span: Span) -> Builder:
    """The graph that a tensor is added to; FG216 where tensors are computed outside of a block."""
    if scope.builder is None:
        raise scope.report(
            "FG216", "a tensor where a compile-time value is needed", span, "computed at run time"
        )
    return scope.builder


def emit(
    scope: Scope, span: Span, op: str, operands: Sequence[Tensor] = (), **attributes: Attribute
) -> Tensor:
    """A node typed by the shape rules; a misfit is reported with what blames each side."""
    scope.state.step(span)
    builder = builder_of(scope, span)
    kind = _typed(scope, span, op, operands, attributes)
    node = builder.add(op, [tensor.node for tensor in operands], kind, span, attributes)
    return Tensor(node.name, node.tensor, trace_origins(node.tensor.shape, operands), builder)


def emit_several(
    scope: Scope,
    span: Span,
    op: str,
    operands: Sequence[Tensor],
    kinds: tuple[TensorType, ...],
    origins: Sequence[tuple[Origin | None, ...]],
    **attributes: Attribute,
) -> list[Tensor]:
    """The results of a node of known types: the node itself, or an `item` for each of several."""
    scope.state.step(span)
    builder, kind = builder_of(scope, span), kinds[0] if len(kinds) == 1 else kinds
    node = builder.add(op, [tensor.node for tensor in operands], kind, span, attributes)
    nodes = [node]
    if len(kinds) > 1:
        nodes = [builder.add("item", (node.name,), kind, span, {"index": i}) for i, kind in enumerate(kinds)]
    return [
        Tensor(each.name, each.tensor, origin, builder) for each, origin in zip(nodes, origins, strict=True)
    ]


def _typed(
    scope: Scope, span: Span, op: str, operands: Sequence[Tensor], attributes: dict[str, Attribute]
) -> Type:
    """The type of a result by the shape rules, or a diagnostic."""
    try:
        kind = infer(op, tuple(tensor.type for tensor in operands), attributes, scope.state.multiples)
        for each in (kind,) if isinstance(kind, TensorType) else kind:
            check_size(each)
    except ShapeError as error:
        help_ = error.help or tuple(_matmul_help(error, operands))
        raise scope.report(
            error.code, error.message, span, _blame_label(error.blame, operands), help_=help_
        ) from None
    except ValueProblem as problem:
        raise scope.report(problem.code, f"{op}: {problem.message}", span) from None
    return kind


def _blame_label(blame: Iterable[Blame], operands: Sequence[Tensor]) -> str:
    """`256 here (d_model, gpt.tfg:4) but 128 here (w1, gpt.tfg:12)`."""
    parts = []
    for each in blame:
        origin = None if each.axis is None else operands[each.input].origins[each.axis]
        parts.append(each.text if origin is None else f"{each.text} ({origin})")
    return " but ".join(parts)


def _matmul_help(error: ShapeError, operands: Sequence[Tensor]) -> Iterable[str]:
    """How to declare the weight of a matrix product, or that it wants to be transposed."""
    if error.code != "FG204" or "inner" not in error.message:
        return
    left, right = operands
    wanted = left.type.shape[-1]
    if right.type.shape[-1] == wanted:
        yield f"write {right.declared[0] if right.declared else '(...)'}.T for the right side"
    elif right.declared is not None:
        name, dims = right.declared
        origin = left.origins[-1]
        inner = origin.text if origin is not None and origin.sized else str(wanted)
        yield f"declare {name} as {right.type.dtype}[{', '.join((*dims[:-2], inner, dims[-1]))}]"
