"""What one run of the elaborator knows: graphs made so far, block instances, limits, diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fastgrad_compiler.frontend.builder import check_size, trace_origins
from fastgrad_compiler.frontend.modules import Module
from fastgrad_compiler.frontend.reporter import Reporter
from fastgrad_compiler.frontend.scope import Scope
from fastgrad_compiler.frontend.values import Tensor, Value, ValueProblem
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, TensorType, Type
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.ir.shapes import Blame, ShapeError, infer
from fastgrad_grammar import ast
from fastgrad_grammar.source import Span

MAX_STEPS = 100_000
MAX_UNROLLED = 200_000  # counting every iteration of repeats and every call of blocks
MAX_DEPTH = 64
MAX_REPEAT = 100_000


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

    reporter: Reporter
    main: Module
    call: Callable[[State, Scope, ast.Call], Value]
    repeat: Callable[[State, Scope, ast.Repeat], None]
    multiples: dict[str, int] = field(default_factory=dict)
    graphs: dict[str, Graph] = field(default_factory=dict)
    instances: dict[object, Instance] = field(default_factory=dict)
    open: list[tuple[Module, ast.BlockDecl, Span]] = field(default_factory=list)
    names: UniqueNames = field(default_factory=UniqueNames)
    file_scopes: dict[Module, Scope] = field(default_factory=dict)
    steps: int = 0

    def step(self, span: Span, work: int = 1) -> None:
        """Count work; FG241 ends the run where a program grows beyond what can be meant."""
        self.steps += work
        if self.steps > MAX_STEPS:
            self.reporter.error(
                "FG241",
                f"the program is too large: more than {MAX_STEPS} statements and operations",
                span,
                "reached here",
                help_=("repeat bodies that do not read the index are elaborated once",),
            )
            self.reporter.stop()

    def graph_name(self, wanted: str) -> str:
        """A graph name that is not in use: `wanted`, `wanted_2` ..."""
        return self.names.take(wanted)


def builder_of(state: State, scope: Scope, span: Span) -> None:
    """FG216 where tensors are computed outside of a block."""
    if scope.builder is None:
        state.reporter.fail(
            "FG216", "a tensor where a compile-time value is needed", span, "computed at run time"
        )


def emit(
    state: State, scope: Scope, span: Span, op: str, operands: Sequence[Tensor], **attributes: Attribute
) -> Tensor:
    """A node typed by the shape rules; a misfit is reported with what blames each side."""
    node = emit_node(state, scope, span, op, operands, None, **attributes)
    builder = scope.builder
    assert builder is not None  # emit_node refuses where there is none
    return builder.tensor(node, trace_origins(node.tensor.shape, operands))


def emit_node(
    state: State, scope: Scope, span: Span, op: str, operands: Sequence[Tensor], kind: Type | None,
    **attributes: Attribute,
) -> Node:  # fmt: skip
    """A node of any type; `kind` where it is known and no rule need be asked."""
    state.step(span)
    builder_of(state, scope, span)
    assert scope.builder is not None
    if kind is None:
        kind = typed(state, scope, span, op, operands, attributes)
    return scope.builder.add(op, [tensor.node for tensor in operands], kind, span, attributes)


def typed(
    state: State,
    scope: Scope,
    span: Span,
    op: str,
    operands: Sequence[Tensor],
    attributes: dict[str, Attribute],
) -> Type:
    """The type of a result by the shape rules, or a diagnostic."""
    try:
        kind = infer(op, tuple(tensor.type for tensor in operands), attributes, scope.multiples)
        for each in (kind,) if isinstance(kind, TensorType) else kind:
            check_size(each)
    except ShapeError as error:
        help_ = error.help or tuple(_matmul_help(error, operands))
        state.reporter.fail(error.code, error.message, span, blame_label(error.blame, operands), help_=help_)
    except ValueProblem as problem:
        state.reporter.fail(problem.code, f"{op}: {problem.message}", span)
    return kind


def blame_label(blame: Iterable[Blame], operands: Sequence[Tensor]) -> str:
    """`256 here (d_model, gpt.tfg:4) but 128 here (w1, gpt.tfg:12)`."""
    parts = []
    for each in blame:
        tensor = operands[each.input]
        origin = None
        if each.axis is not None:
            origin = tensor.origins[each.axis]
        elif tensor.declared is not None:
            origin = next((o for o in tensor.origins if o is not None), None)
        parts.append(each.text if origin is None or each.axis is None else f"{each.text} ({origin})")
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


def constant(state: State, scope: Scope, value: float | bool, span: Span) -> Tensor:
    """A scalar of the graph."""
    return emit(state, scope, span, "constant", (), value=value)
