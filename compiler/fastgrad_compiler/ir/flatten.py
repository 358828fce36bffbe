"""The whole program as one flat graph, whose nodes are named by their paths, and what weights it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fastgrad_compiler.ir.calls import backward_of, iterations, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, Type
from fastgrad_compiler.ir.names import UniqueNames

Indices: TypeAlias = tuple[int, ...]
Names: TypeAlias = "str | tuple[str, ...]"


def path_of(scope: tuple[str, ...], label: str, indices: Indices = ()) -> str:
    """The path of a label in the graph called at `scope`, inside repeats at `indices`: `layers.3`."""
    return ".".join((*scope, label, *map(str, indices)))


def weights(program: Program, graph: str | None = None) -> Iterator[tuple[str, Node]]:
    """(path, node) of each weight and buffer that `graph` (by default main) reaches, in program order."""
    yield from _weights(program, graph or program.main, (), ())


def _weights(
    program: Program, graph: str, scope: tuple[str, ...], indices: Indices
) -> Iterator[tuple[str, Node]]:
    for node in program[graph].nodes:
        if node.op in ("weight", "buffer"):
            yield path_of(scope, str(node["label"]), indices), node
        elif node.op == "call":
            inner = (*scope, str(node["label"]), *map(str, indices))
            yield from _weights(program, str(node["graph"]), inner, ())
        elif node.op == "repeat":
            for index, body in iterations(node):
                yield from _weights(program, body, scope, (*indices, index))


def flat_size(program: Program, graph: str) -> int:
    """How many nodes `flatten` would make of a graph, found without doing so."""
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = sum(map(of_node, program[name].nodes))
        return sizes[name]

    def of_node(node: Node) -> int:
        inner = runs(node)
        return sum(times * size(body) for body, times in inner) if inner else 1

    return size(graph)


def flatten(program: Program, graph: str | None = None) -> Graph:
    """One graph without `call` and `repeat` that computes what `graph` (by default main) computes.

    A node's name is its path; so is the label of a weight, a buffer and a `weight_gradient`. Where two
    nodes would have one name (a weight that a backward graph reads again, temporaries of two repeats), the
    later ones get `_2`, `_3`.
    """
    source = program[graph or program.main]
    flat = _Flat(program)
    inputs = [flat.emit(node, node.name, ()) for node in source.inputs]
    outputs = flat.inline(source.name, inputs, (), ())
    return Graph(source.name, tuple(flat.nodes), tuple(outputs), source.block, source.span)


@dataclass
class _Flat:
    """The nodes so far."""

    program: Program
    nodes: list[Node] = field(default_factory=list)
    _names: UniqueNames = field(default_factory=UniqueNames)

    def emit(self, node: Node, path: str, inputs: tuple[str, ...]) -> str:
        """Append a node under its path, or a free name like it."""
        name = self._names.take(path)
        self.nodes.append(replace(node, name=name, inputs=inputs))
        return name

    def inline(
        self, graph: str, inputs: Sequence[str], scope: tuple[str, ...], indices: Indices
    ) -> list[str]:
        """Append what a graph computes; the names of its results."""
        source = self.program[graph]
        names: dict[str, Names] = dict(zip((node.name for node in source.inputs), inputs, strict=True))
        for node in source.nodes:
            if node.op != "input":
                names[node.name] = self._node(node, [names[name] for name in node.inputs], scope, indices)
        return [single(names[output]) for output in source.outputs]

    def _node(self, node: Node, inputs: list[Names], scope: tuple[str, ...], indices: Indices) -> Names:
        if node.op == "item" and isinstance(inputs[0], tuple):
            return inputs[0][int(str(node["index"]))]
        read = [single(name) for name in inputs]
        if node.op == "call":
            inner = (*scope, str(node["label"]), *map(str, indices))
            return _pack(self.inline(str(node["graph"]), read, inner, ()))
        if node.op == "repeat":
            return _pack(self._repeat(node, read, scope, indices)[-1])
        if node.op == "repeat_backward":
            return _pack(self._repeat_backward(node, read, scope, indices))
        if "label" in dict(node.attributes):
            node = node.with_attributes(label=path_of(scope, str(node["label"]), indices))
        return self.emit(node, path_of(scope, node.name, indices), tuple(read))

    def _repeat(
        self, node: Node, inputs: list[str], scope: tuple[str, ...], indices: Indices
    ) -> list[list[str]]:
        """The carried values before each iteration and after the last one."""
        carried = int(str(node["carried"]))
        invariants = inputs[carried:]
        states = [inputs[:carried]]
        for index, body in iterations(node):
            states.append(self.inline(body, [*states[-1], *invariants], scope, (*indices, index)))
        return states

    def _repeat_backward(
        self, node: Node, inputs: list[str], scope: tuple[str, ...], indices: Indices
    ) -> list[str]:
        carried, backward = int(str(node["carried"])), backward_of(node)
        graphs = list(iterations(node))
        floats = [is_float(x.type) for x in self.program[graphs[0][1]].inputs] if graphs else []
        invariants = inputs[carried : len(floats)]
        cotangents = inputs[len(floats) :]
        states = self._repeat(node, inputs[: len(floats)], scope, indices)
        kept = sum(floats[:carried])
        sums: list[str] | None = None
        for (index, body), state in zip(reversed(graphs), states[-2::-1], strict=True):
            given = [*state, *invariants, *cotangents]
            results = self.inline(backward[body], given, scope, (*indices, index))
            cotangents = results[:kept]
            more = results[kept:]
            sums = (
                more
                if sums is None
                else [self._add(node, a, b, scope, indices) for a, b in zip(sums, more, strict=True)]
            )
        return [*cotangents, *(sums or [])]

    def _add(self, node: Node, left: str, right: str, scope: tuple[str, ...], indices: Indices) -> str:
        type_ = next(each.type for each in self.nodes if each.name == left)
        sum_ = Node("", "add", (left, right), type=type_, span=node.span)
        return self.emit(sum_, path_of(scope, f"{node.name}_sum", indices), (left, right))


def is_float(type_: Type | None) -> bool:
    """Whether a tensor of this type has a cotangent."""
    return isinstance(type_, TensorType) and type_.dtype == "float"


def single(names: Names) -> str:
    """The name of a node with one result; ValueError where it is a tuple that only `item` may read."""
    if isinstance(names, tuple):
        raise ValueError(f"a tuple of {len(names)} results is read as one tensor")
    return names


def _pack(names: Sequence[str]) -> Names:
    return names[0] if len(names) == 1 else tuple(names)
