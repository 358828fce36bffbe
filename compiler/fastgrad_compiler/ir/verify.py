"""The invariants of a program, checked after every pass: what breaks one is a bug of the compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fastgrad_compiler.ir.calls import callees, reachable
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.ir.ops import OPS
from fastgrad_compiler.ir.shapes import ShapeError, infer_shapes

UNTYPED_STAGES = ("text", "elaborate")  # what may come before the pass `shapes`


class CompilerBug(Exception):
    """A pass broke an invariant, or met a program that its predecessors should not have made."""


def verify(program: Program, after: str) -> None:
    """Check every invariant of a program that the pass `after` made.

    Raises CompilerBug, which names the pass, the graph and the node. Types may be missing before `shapes`.
    """
    typed = all(node.type is not None for _, node in _places(program))
    checks = (*_CHECKS, _types) if after not in UNTYPED_STAGES or typed else _CHECKS
    for check in checks:
        for place, message in check(program):
            raise CompilerBug(f"after {after}: {place}: {message}")


Findings = Iterator[tuple[str, str]]


def _places(program: Program) -> Iterator[tuple[str, Node]]:
    for graph in program.graphs:
        yield from ((f"{graph.name}.{node.name}", node) for node in graph.nodes)


def _graph_names(program: Program) -> Findings:
    if len(program.by_name) != len(program.graphs):
        yield program.name, "two graphs have one name"
    for role in ("main", "objective", "gradient", "step", "training"):
        name = getattr(program, role)
        if name is not None and name not in program.by_name:
            yield program.name, f"{role} graph {name} is not there"
    if program.gradient in program.by_name:
        inputs = [node.name for node in program[program.main].inputs]
        given = [node.name for node in program[str(program.gradient)].inputs]
        if given[: len(inputs)] != inputs:
            yield str(program.gradient), f"its inputs {given} do not start with those of {program.main}"


def _nodes(program: Program) -> Findings:
    for graph in program.graphs:
        seen: set[str] = set()
        for node in graph.nodes:
            place = f"{graph.name}.{node.name}"
            if node.name in seen:
                yield place, "two nodes have one name"
            for source in node.inputs:
                if source not in seen:
                    fault = "comes later" if source in graph.by_name else "is not there"
                    yield place, f"it reads {source}, which {fault}"
            if node.op == "input" and len(seen) >= len(graph.inputs):
                yield place, "an input comes after other nodes"
            seen.add(node.name)
        for output in graph.outputs:
            if output not in seen:
                yield graph.name, f"its output {output} is not there"


def _vocabulary(program: Program) -> Findings:
    for place, node in _places(program):
        for message in _against_vocabulary(node):
            yield place, message


def _against_vocabulary(node: Node) -> Iterator[str]:
    op = OPS.get(node.op)
    if op is None:
        yield f"there is no operation {node.op}"
        return
    least, most = op.arity
    if len(node.inputs) < least or (most is not None and len(node.inputs) > most):
        yield f"{node.op} has {len(node.inputs)} inputs"
    keys = [key for key, _ in node.attributes]
    if keys != sorted(set(keys)):
        yield f"attributes {keys} are not sorted, or one is set twice"
    for key in op.attributes:
        if key not in keys:
            yield f"{node.op} lacks attribute {key}"
    for key in keys:
        if key not in op.attributes and key not in op.optional:
            yield f"{node.op} has no attribute {key}"


def _references(program: Program) -> Findings:
    for place, node in _places(program):
        if node.op in ("repeat", "repeat_backward"):
            yield from ((place, message) for message in _repeat(program, node))
        for name in callees(node):
            if name not in program.by_name:
                yield place, f"it runs graph {name}, which is not there"


def _repeat(program: Program, node: Node) -> Iterator[str]:
    bodies, carried = node["bodies"], node["carried"]
    if not isinstance(bodies, tuple) or not bodies:
        yield f"its bodies are {bodies!r}"
        return
    for run in bodies:
        if not (isinstance(run, tuple) and len(run) == 2 and isinstance(run[1], int) and run[1] > 0):
            yield f"its run is {run!r}, not (graph, times)"
            return
        body = program.by_name.get(str(run[0]))
        if body is not None and len(body.outputs) != carried:
            yield f"it carries {carried} values, body {body.name} gives {len(body.outputs)}"
        if body is not None and node.op == "repeat" and len(body.inputs) != len(node.inputs):
            yield f"it passes {len(node.inputs)} inputs, body {body.name} takes {len(body.inputs)}"
    backward = node.get("backward", bodies)
    if not isinstance(backward, tuple) or len(backward) != len(bodies):
        yield f"it has {len(bodies)} runs and backward graphs {backward!r}"


def _recursion(program: Program) -> Findings:
    done: set[str] = set()
    for graph in reachable(program.by_name, program.by_name):
        for node in graph.nodes:
            yield from ((callee, "it runs itself") for callee in callees(node) if callee not in done)
        done.add(graph.name)


def _labels(program: Program) -> Findings:
    forward = frozenset(graph.name for graph in reachable(program.by_name, program.roots))
    for graph in program.graphs:
        seen: set[object] = set()
        for node in graph.nodes:
            if node.op not in ("weight", "buffer", "call", "weight_gradient") or node.is_fused:
                continue
            # a backward graph runs a callee and its backward under one label, and a weight's gradient has
            # its own
            kind = "" if graph.name in forward else _kind(node, forward)
            if (kind, node["label"]) in seen:
                yield f"{graph.name}.{node.name}", f"label {node['label']} is taken"
            seen.add((kind, node["label"]))
        yield from _labels_of_repeats(program, graph)


def _kind(node: Node, forward: frozenset[str]) -> str:
    if node.op == "weight_gradient" or (node.op == "call" and node["graph"] not in forward):
        return "backward"
    return "forward"


def _labels_of_repeats(program: Program, graph: Graph) -> Findings:
    """Two repeats of one graph put their index after their labels, and nothing else tells those apart."""
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op == "repeat":
            labels = {label for body in callees(node) for label in _repeated(program, body)}
            for label in sorted(labels & taken):
                yield f"{graph.name}.{node.name}", f"label {label} is taken by another repeat"
            taken |= labels


def _repeated(program: Program, body: str) -> Iterator[str]:
    for node in program[body].nodes:
        if node.op in ("weight", "buffer", "call") and not node.is_fused:
            yield str(node["label"])
        elif node.op == "repeat":
            for inner in callees(node):
                yield from _repeated(program, inner)


def _dims(program: Program) -> Findings:
    names = [dim.name for dim in program.dims]
    if len(set(names)) != len(names):
        yield program.name, "a dim is declared twice"


def _types(program: Program) -> Findings:
    for place, node in _places(program):
        if node.type is None:
            yield place, "it has no type"
    try:
        inferred = infer_shapes(program)
    except ShapeError as error:
        yield program.name, f"types do not fit: {error.message}"
        return
    for (place, node), (_, found) in zip(_places(program), _places(inferred), strict=True):
        if node.type != found.type:
            yield place, f"its type is {node.type}, but {found.type} by its operands"


_CHECKS: tuple[Callable[[Program], Findings], ...] = (
    _graph_names,
    _dims,
    _nodes,
    _vocabulary,
    _references,
    _recursion,
    _labels,
)
