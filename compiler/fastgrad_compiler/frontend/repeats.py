"""`repeat i in N { ... }`: one body graph, or a run of graphs where the body depends on the index."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastgrad_compiler.frontend import values
from fastgrad_compiler.frontend.builder import Builder
from fastgrad_compiler.frontend.expressions import look_up, scalar
from fastgrad_compiler.frontend.reporter import Abort
from fastgrad_compiler.frontend.scope import Binding, Failed, Hidden, Outer, Scope, assigned, mentions
from fastgrad_compiler.frontend.state import MAX_REPEAT, State, emit_node
from fastgrad_compiler.frontend.statements import bind, run_body
from fastgrad_compiler.frontend.values import Origin, Tensor
from fastgrad_compiler.ir.calls import in_runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Graph, Node, TensorType
from fastgrad_grammar import ast
from fastgrad_grammar.diagnostics import Note


@dataclass(frozen=True, slots=True)
class _Body:
    """One elaborated iteration: its nodes, and what the carried names hold at its end."""

    builder: Builder
    captured: dict[str, Tensor]
    final: dict[str, Tensor]


def run_repeat(state: State, scope: Scope, statement: ast.Repeat) -> None:
    """Elaborate the body, once where all iterations are the same, and add a `repeat` node."""
    count = _count(state, scope, statement)
    local = {name: span for name, span in assigned(statement.body).items() if name not in scope.names}
    before = len(state.reporter.diagnostics)
    if count:
        bodies = _bodies(state, scope, statement, count)
        if len(state.reporter.diagnostics) > before:
            raise Abort
        _join(state, scope, statement, bodies, count)
    for name, span in local.items():
        scope.hidden[name] = Hidden("it is local to the body of the repeat", span,
                                    f"bind {name} before the repeat to carry it")  # fmt: skip


def _count(state: State, scope: Scope, statement: ast.Repeat) -> int:
    found = scalar(state, scope, statement.count, "the number of repeats")
    span = statement.count.span
    if isinstance(found, Dim):
        state.reporter.fail("FG212", f"the number of repeats is the run-time dimension {found}", span,
                            "it must be known at compile time", help_=("use a param",))  # fmt: skip
    if isinstance(found, bool) or not isinstance(found, int):
        state.reporter.fail("FG227", f"the number of repeats is an int, not {values.describe(found)}", span)
    if not 0 <= found <= MAX_REPEAT:
        state.reporter.fail("FG227", f"the number of repeats is between 0 and {MAX_REPEAT}, not {found}", span,
                            f"{found} here")  # fmt: skip
    return found


def _bodies(state: State, scope: Scope, statement: ast.Repeat, count: int) -> list[_Body]:
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
        state.step(statement.span, 1 + len(scope.names) // 10)
        inner = scope.inner(builder)
        inner.names.update(stepped)
        origin = Origin(index, statement.index.span)
        inner.names[index] = Binding(iteration, statement.index.span, "index", origin)
        before = len(state.reporter.diagnostics)
        run_body(state, inner, statement.body)
        if len(state.reporter.diagnostics) > before or any(
            name in inner.names and isinstance(inner.names[name].value, Failed) for name in changed
        ):
            raise Abort
        bodies.append(_Body(builder, inner.captured, _carried(state, scope, inner, statement)))
        stepped = {name: inner.names[name] for name in steps}
        outer.labels.merge(builder.labels)
    scope.names.update(stepped)
    return bodies


def _carried(state: State, scope: Scope, inner: Scope, statement: ast.Repeat) -> dict[str, Tensor]:
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
            state.reporter.error(
                "FG221", f"the repeat turns `{name}` from a {_sort(was)} into a {_sort(new.value)}", new.span,
                notes=(Note(f"{name} before the repeat", old.span),),
            )  # fmt: skip
        elif isinstance(was, Tensor) and isinstance(new.value, Tensor):
            _same_type(state, name, old, was, new, new.value)
            found[name] = new.value
    return found


def _sort(value: object) -> str:
    return "tensor" if isinstance(value, Tensor) else "compile-time value"


def _same_type(state: State, name: str, old: Binding, was: Tensor, new: Binding, now: Tensor) -> None:
    if was.type != now.type:
        state.reporter.error(
            "FG221",
            f"`{name}` is {was.type} before the repeat and {now.type} after its body",
            new.span,
            f"{now.type} here",
            notes=(Note(f"{was.type} here", old.span),),
            help_=("what a repeat carries keeps its type",),
        )


def _join(state: State, scope: Scope, statement: ast.Repeat, bodies: list[_Body], count: int) -> None:
    carried = list(dict.fromkeys(name for body in bodies for name in body.final))
    if not carried:
        state.reporter.fail("FG227", "the repeat has no effect: its body rebinds no tensor from outside",
                            statement.index.span, "nothing is carried",
                            help_=("rebind a name in it, as in x = layer(x)",))  # fmt: skip
    kept = [name for body in bodies for name in body.captured if name not in carried]
    names = [*carried, *dict.fromkeys(kept)]
    tensors: list[Tensor] = []
    for name in names:
        value = look_up(state, scope, name, statement.span)
        assert isinstance(value, Tensor)  # only tensors are captured
        tensors.append(value)
    runs = _runs(state, statement, bodies, names, carried, tensors, count)
    kinds = tuple(tensor.type for tensor in tensors[: len(carried)])
    node = emit_node(state, scope, statement.span, "repeat", tensors, kinds[0] if len(kinds) == 1 else kinds,
                     bodies=runs, carried=len(carried))  # fmt: skip
    _bind_results(state, scope, statement, node, carried, tensors, kinds)


def _bind_results(
    state: State, scope: Scope, statement: ast.Repeat, node: Node, carried: list[str], tensors: list[Tensor],
    kinds: tuple[TensorType, ...],
) -> None:  # fmt: skip
    assert scope.builder is not None
    for index, (name, before, kind) in enumerate(zip(carried, tensors, kinds, strict=False)):
        target = ast.Name(name, scope.names[name].span)
        if len(carried) == 1:
            bind(scope, target, Tensor(node.name, kind, before.origins, scope.builder))
        else:
            whole = Tensor(node.name, kind, before.origins, scope.builder)
            item = emit_node(state, scope, statement.span, "item", (whole,), kind, index=index)
            bind(scope, target, Tensor(item.name, kind, before.origins, scope.builder))


def _runs(
    state: State, statement: ast.Repeat, bodies: list[_Body], names: list[str], carried: list[str],
    tensors: list[Tensor], count: int,
) -> tuple[Attribute, ...]:  # fmt: skip
    """The bodies as ((graph, times), ...): equal bodies share a graph, neighbours that do so a run."""
    made: dict[tuple[tuple[Node, ...], tuple[str, ...]], str] = {}
    run: list[str] = []
    for body in bodies:
        graph = _graph(statement, body, names, carried, tensors)
        key = (graph.nodes, graph.outputs)
        if key not in made:
            made[key] = state.graph_name(_graph_base(state, statement))
            state.graphs[made[key]] = replace(graph, name=made[key])
        run.append(made[key])
    return in_runs(run * count if len(bodies) == 1 else run)


def _graph_base(state: State, statement: ast.Repeat) -> str:
    module, block, _ = state.open[-1]
    name = f"{module.name}.{block.name.text}" if module.name else block.name.text
    return f"{name}.{statement.index.text}"


def _graph(
    statement: ast.Repeat, body: _Body, names: list[str], carried: list[str], tensors: list[Tensor]
) -> Graph:
    present = {node.name: node for node in body.builder.inputs}
    inputs = []
    for name, tensor in zip(names, tensors, strict=True):
        node = present.get(name)
        inputs.append(node or Node(name, "input", type=tensor.type, span=statement.span))
    outputs = tuple(body.final[name].node if name in body.final else name for name in carried)
    return Graph("", (*inputs, *body.builder.nodes), outputs, "", statement.span)
