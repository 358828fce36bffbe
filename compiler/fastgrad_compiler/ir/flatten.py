"""The whole program as one flat graph, whose nodes are named by their paths, and what weights it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, TypeVar

from fastgrad_compiler.ir.calls import backward_of, iterations, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, Type, integer
from fastgrad_compiler.ir.names import UniqueNames

_Value = TypeVar("_Value")
Names: TypeAlias = "str | tuple[str, ...]"


class Place(NamedTuple):
    """Where a graph is run: the labels of the calls that lead to it, and the indices of the repeats inside the last."""

    scope: tuple[str, ...] = ()
    indices: tuple[int, ...] = ()

    def path(self, label: str) -> str:
        """The path of a label in the graph: `layers.3`."""
        return ".".join((*self.scope, label, *map(str, self.indices)))

    def called(self, call: Node) -> Place:
        """Inside a call."""
        return Place((*self.scope, str(call["label"]), *map(str, self.indices)))

    def repeated(self, index: int) -> Place:
        """Inside an iteration of a repeat."""
        return Place(self.scope, (*self.indices, index))


ROOT = Place()


def weights(program: Program, graph: str | None = None) -> Iterator[tuple[str, Node]]:
    """(path, node) of each weight and buffer that `graph` (by default main) reaches, in program order."""
    yield from _weights(program, graph or program.main, ROOT)


def _weights(program: Program, graph: str, place: Place) -> Iterator[tuple[str, Node]]:
    for node in program[graph].nodes:
        if node.op in ("weight", "buffer"):
            yield place.path(str(node["label"])), node
        elif node.op == "call":
            yield from _weights(program, str(node["graph"]), place.called(node))
        elif node.op == "repeat":
            for index, body in iterations(node):
                yield from _weights(program, body, place.repeated(index))


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
    outputs = flat.inline(source.name, inputs, ROOT)
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

    def inline(self, graph: str, inputs: Sequence[str], place: Place) -> list[str]:
        """Append what a graph computes; the names of its results."""
        source = self.program[graph]
        names: dict[str, Names] = dict(zip((node.name for node in source.inputs), inputs, strict=True))
        for node in source.nodes:
            if node.op != "input":
                names[node.name] = self._node(node, [names[name] for name in node.inputs], place)
        return [single(names[output]) for output in source.outputs]

    def _node(self, node: Node, inputs: list[Names], place: Place) -> Names:
        if node.op == "item" and isinstance(inputs[0], tuple):
            return inputs[0][integer(node["index"])]
        read = [single(name) for name in inputs]
        if node.op == "call":
            return packed(self.inline(str(node["graph"]), read, place.called(node)))
        if node.op == "repeat":
            return packed(self._repeat(node, read, place)[-1])
        if node.op == "repeat_backward":
            return packed(self._repeat_backward(node, read, place))
        if "label" in dict(node.attributes):
            node = node.with_attributes(label=place.path(str(node["label"])))
        return self.emit(node, place.path(node.name), tuple(read))

    def _repeat(self, node: Node, inputs: list[str], place: Place) -> list[list[str]]:
        """The carried values before each iteration and after the last one."""
        carried = integer(node["carried"])
        states = [inputs[:carried]]
        for index, body in iterations(node):
            states.append(self.inline(body, [*states[-1], *inputs[carried:]], place.repeated(index)))
        return states

    def _repeat_backward(self, node: Node, inputs: list[str], place: Place) -> list[str]:
        carried, backward = integer(node["carried"]), backward_of(node)
        graphs = list(iterations(node))
        floats = [is_float(x.type) for x in self.program[graphs[0][1]].inputs] if graphs else []
        invariants, cotangents = inputs[carried : len(floats)], inputs[len(floats) :]
        states = self._repeat(node, inputs[: len(floats)], place)
        kept = sum(floats[:carried])
        sums: list[str] = []
        for (index, body), state in zip(reversed(graphs), states[-2::-1], strict=True):
            given = [*state, *invariants, *cotangents]
            results = self.inline(backward[body], given, place.repeated(index))
            cotangents, more = results[:kept], results[kept:]
            sums = [self._add(node, *pair, place) for pair in zip(sums, more, strict=True)] if sums else more
        return [*cotangents, *sums]

    def _add(self, node: Node, left: str, right: str, place: Place) -> str:
        type_ = next(each.type for each in self.nodes if each.name == left)
        sum_ = Node("", "add", type=type_, span=node.span)
        return self.emit(sum_, place.path(f"{node.name}_sum"), (left, right))


def is_float(type_: Type | None) -> bool:
    """Whether a tensor of this type has a cotangent."""
    return isinstance(type_, TensorType) and type_.dtype == "float"


def single(value: _Value | tuple[_Value, ...]) -> _Value:
    """What a node with one result gives; ValueError where it is a tuple that only `item` may read."""
    if isinstance(value, tuple):
        raise ValueError(f"a tuple of {len(value)} results is read as one tensor")
    return value


def packed(values: Sequence[_Value]) -> _Value | tuple[_Value, ...]:
    """The results of a node: one alone, or a tuple."""
    return values[0] if len(values) == 1 else tuple(values)
