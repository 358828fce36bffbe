"""`repeat i in N { ... }`: one body graph, or a run of graphs where the body depends on the index."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.builder import Builder
from fastgrad_compiler.frontend.expressions import look_up, scalar
from fastgrad_compiler.frontend.reporter import Abort
from fastgrad_compiler.frontend.scope import Binding, Failed, Hidden, Outer, Scope, assigned, mentions
from fastgrad_compiler.frontend.state import MAX_REPEAT, State, emit_several
from fastgrad_compiler.frontend.statements import bind, run_body
from fastgrad_compiler.frontend.values import Origin, Tensor
from fastgrad_compiler.ir.calls import in_runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, Node
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note


@dataclass(frozen=True, slots=True)
class _Body:
    """One elaborated iteration: its nodes, and what the carried names hold at its end."""

    builder: Builder
    captured: dict[str, Tensor]
    final: dict[str, Tensor]


def run_repeat(scope: Scope, statement: ast.Repeat) -> None:
    """Elaborate the body, once where all iterations are the same, and add a `repeat` node."""
    count = _count(scope, statement)
    local = {name: span for name, span in assigned(statement.body).items() if name not in scope.names}
    before = len(scope.report.diagnostics)
    if count:
        bodies = _bodies(scope, statement, count)
        if len(scope.report.diagnostics) > before:
            raise Abort
        _join(scope, statement, bodies, count)
    for name, span in local.items():
        scope.hidden[name] = Hidden("it is local to the body of the repeat", span,
                                    f"bind {name} before the repeat to carry it")  # fmt: skip


def _count(scope: Scope, statement: ast.Repeat) -> int:
    found = scalar(scope, statement.count, "the number of repeats")
    span = statement.count.span
    if isinstance(found, Dim):
        raise scope.report("FG212", f"the number of repeats is the run-time dimension {found}", span,
                           "it must be known at compile time", help_=("use a param",))  # fmt: skip
    if not values.is_int(found):
        raise scope.report("FG227", f"the number of repeats is an int, not {values.describe(found)}", span)
    if not 0 <= found <= MAX_REPEAT:
        raise scope.report("FG227", f"the number of repeats is between 0 and {MAX_REPEAT}, not {found}", span,
                           f"{found} here")  # fmt: skip
    return found


def _bodies(scope: Scope, statement: ast.Repeat, count: int) -> list[_Body]:
    index = statement.index.text
    changed = assigned(statement.body)
    steps = [
        name for name, binding in scope.names.items()
        if name in changed and not isinstance(binding.value, Tensor | Outer | Failed)
    ]  # fmt: skip
    varies = bool(steps) or mentions(statement.body, index)
    outer = scope.builder
    assert outer is not None  # repeats stand in bodies
    stepped: dict[str, Binding] = {}
    labels = outer.labels.copy()
    bodies: list[_Body] = []
    for iteration in range(count if varies else 1):
        builder = Builder(scope.tensor_names(), labels.copy(), outer.weights)
        scope.state.step(statement.span, 1 + len(scope.names) // 10)
        inner = scope.inner(builder)
        inner.names.update(stepped)
        origin = Origin(index, statement.index.span)
        scope.state.found(statement.index.span, iteration)
        inner.names[index] = Binding(iteration, statement.index.span, "index", origin)
        before = len(scope.report.diagnostics)
        run_body(inner, statement.body)
        if len(scope.report.diagnostics) > before or any(
            name in inner.names and isinstance(inner.names[name].value, Failed) for name in changed
        ):
            raise Abort
        bodies.append(_Body(builder, inner.captured, _carried(scope, inner, statement)))
        stepped = {name: inner.names[name] for name in steps}
        outer.labels.merge(builder.labels)
    scope.names.update(stepped)
    return bodies


def _carried(scope: Scope, inner: Scope, statement: ast.Repeat) -> dict[str, Tensor]:
    """The tensors from around the repeat that the body has bound anew; FG221 where their type changed."""
    found: dict[str, Tensor] = {}
    places = assigned(statement.body)
    for name, old in scope.names.items():
        if name == statement.index.text or name not in places:
            continue
        new = inner.names[name]
        was = old.value.tensor if isinstance(old.value, Outer) else old.value
        if isinstance(new.value, Outer | Failed) or new.value is inner.captured.get(name):
            continue
        if isinstance(was, Tensor) != isinstance(new.value, Tensor):
            message = f"the repeat turns `{name}` from a {_sort(was)} into a {_sort(new.value)}"
            scope.report("FG221", message, new.span, notes=(Note(f"{name} before the repeat", old.span),))
        elif isinstance(was, Tensor) and isinstance(new.value, Tensor):
            found[name] = new.value
            if was.type != new.value.type:
                now, note = new.value.type, Note(f"{was.type} here", old.span)
                message = f"`{name}` is {was.type} before the repeat and {now} after its body"
                help_ = "what a repeat carries keeps its type"
                scope.report("FG221", message, new.span, f"{now} here", notes=(note,), help_=(help_,))
    return found


def _sort(value: object) -> str:
    return "tensor" if isinstance(value, Tensor) else "compile-time value"


def _join(scope: Scope, statement: ast.Repeat, bodies: list[_Body], count: int) -> None:
    carried = list(dict.fromkeys(name for body in bodies for name in body.final))
    if not carried:
        raise scope.report("FG227", "the repeat has no effect: its body rebinds no tensor from outside",
                           statement.index.span, "nothing is carried",
                           help_=("rebind a name in it, as in x = layer(x)",))  # fmt: skip
    kept = [name for body in bodies for name in body.captured if name not in carried]
    read: dict[str, Tensor] = {}
    for name in [*carried, *dict.fromkeys(kept)]:
        value = look_up(scope, name, statement.span)
        assert isinstance(value, Tensor)  # only tensors are captured
        read[name] = value
    run = _run(scope.state, statement, bodies, read, carried)
    runs: Attribute = in_runs(run * count if len(bodies) == 1 else run)
    kinds = tuple(read[name].type for name in carried)
    origins = [read[name].origins for name in carried]
    results = emit_several(
        scope,
        statement.span,
        "repeat",
        list(read.values()),
        kinds,
        origins,
        bodies=runs,
        carried=len(carried),
    )
    for name, result in zip(carried, results, strict=True):
        bind(scope, ast.Name(scope.names[name].span, name), result)


def _run(
    state: State, statement: ast.Repeat, bodies: list[_Body], read: dict[str, Tensor], carried: list[str]
) -> list[str]:
    """The graph of each body: equal ones share it."""
    made: dict[tuple[tuple[Node, ...], tuple[str, ...]], str] = {}
    run: list[str] = []
    module, block, _ = state.open[-1]
    for body in bodies:
        graph = _graph(statement, body, read, carried)
        key = (graph.nodes, graph.outputs)
        if key not in made:
            made[key] = state.graph_names.take(f"{module.qualified(block)}.{statement.index.text}")
            state.graphs[made[key]] = replace(graph, name=made[key])
        run.append(made[key])
    return run


def _graph(statement: ast.Repeat, body: _Body, read: dict[str, Tensor], carried: list[str]) -> Graph:
    present = {node.name: node for node in body.builder.inputs}
    inputs = (
        present.get(name) or Node(name, "input", type=tensor.type, span=statement.span)
        for name, tensor in read.items()
    )
    outputs = tuple(body.final[name].node if name in body.final else name for name in carried)
    return Graph("", (*inputs, *body.builder.nodes), outputs, "", statement.span)
