"""The gradient graph: each graph gets a backward graph by vector-Jacobian products.

The backward of a graph G takes G's inputs and a cotangent for each float result that is used, computes G's values again
where they are needed, and gives the cotangents of G's float inputs; a `weight_gradient` node receives the
cotangent of each weight. What no result depends on has no cotangent, rather than one of zeros: 0 times what is infinite
is not 0. A `call` becomes a call of the callee's backward, a `repeat` a `repeat_backward` and
an `attention` a call of its backward spelled out: the gradient of a deep model is as small as the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.builder import Builder, Value
from fastgrad_compiler.ir.calls import callees, graphs_with, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, Type, integer
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.ir.ops import COMPARISONS
from fastgrad_compiler.ir.verify import CompilerBug
from fastgrad_compiler.passes.attention_backward import attention_backward
from fastgrad_compiler.passes.vjp_rules import RULES, Cotangents


def derive_gradient(program: Program) -> Program:
    """The program with a backward, `G.backward`, of each graph G that the model or the objective reaches.

    `gradient` names the one of `main`. Graphs are differentiated once for each choice of results that calls use.
    """
    derivation = Derivation(program)
    gradient = derivation.backward(program.main)
    if program.objective is not None:
        derivation.backward(program.objective)
    return replace(program, graphs=(*program.graphs, *derivation.graphs), gradient=gradient)


class Derivation:
    """The backward graphs of one program, callees first, and what they were derived from."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graphs: list[Graph] = []
        self._names = UniqueNames(program.by_name)
        self._derived: dict[object, str] = {}
        self.unreached: dict[str, frozenset[int]] = {}  # by backward graph: inputs that no result depends on
        self._weighted = graphs_with(program, lambda node: node.op == "weight")

    def backward(self, graph: str, without: frozenset[int] = frozenset()) -> str:
        """The name of the backward of `graph`, derived on the first call; `without` a cotangent of these results."""
        key = graph, without
        if key not in self._derived:
            name = self._names.take(f"{graph}.backward")
            self._add(key, _differentiate(self, self.program[graph], name, without))
        return self._derived[key]

    def derived(self, graph: Graph) -> Graph:
        """The backward of a graph, which is not kept."""
        return _differentiate(self, graph, f"{graph.name}.backward", frozenset())

    def attention_backward(self, attention: Node, types: tuple[Type | None, ...]) -> str:
        """The name of the graph of this attention's exact backward; equal attentions share one."""
        key = (attention.attributes, types)
        if key not in self._derived:
            name = self._names.take("attention.backward")
            self._add(key, attention_backward(name, attention, types, self.program.multiples))
        return self._derived[key]

    def calls_weights(self, node: Node) -> bool:
        """Whether there are weights in what this node runs."""
        return not self._weighted.isdisjoint(callees(node))

    def _add(self, key: object, graph: Graph) -> None:
        self._derived[key] = graph.name
        self.graphs.append(graph)


# the rules, keyed by op

Rule: TypeAlias = Callable[[Derivation, Sequence[Any], Value, Sequence[Value]], Cotangents]
"""From the cotangents of the float results of `y`, `y` and its inputs to the inputs' cotangents.

Of the results of a call those that are not used have None.
"""


def _call(derivation: Derivation, gs: Sequence[Value | None], y: Value, xs: Sequence[Value]) -> Cotangents:
    label = str(y["label"])
    given = [g for g in gs if g is not None]
    graph = derivation.backward(str(y["graph"]), _without(y.node, gs))
    values = {"graph": graph, "label": label}
    results = y.builder.emit("call", (*xs, *given), values, name=f"_{label}_backward", type=_types(xs))
    return _spread(results, xs, derivation.unreached[graph])


def _without(node: Node, gs: Sequence[Value | None]) -> frozenset[int]:
    """The results of a call that have no cotangent."""
    places = [place for place, member in enumerate(_members(node.type)) if member.dtype == "float"]
    return frozenset(place for place, g in zip(places, gs, strict=True) if g is None)


def _attention(derivation: Derivation, gs: Sequence[Value], y: Value, xs: Sequence[Value]) -> Cotangents:
    graph = derivation.attention_backward(y.node, tuple(x.node.type for x in xs))
    values = {"graph": graph, "label": f"{y.name}.attention"}  # a dot: no user's call has this label
    return _spread(
        y.builder.emit("call", (*xs, *gs), values, name="_attention_backward", type=_types(xs)), xs
    )


def _poly_attention(derivation: Derivation, gs: Sequence[Value], y: Value, xs: Sequence[Value]) -> Cotangents:
    op = "poly_attention_backward"
    values = Attention.of(y.node).attributes(op)
    return _spread(y.builder.emit(op, (*xs, *gs), values, type=_types(xs)), xs)


def _repeat(derivation: Derivation, gs: Sequence[Value], y: Value, xs: Sequence[Value]) -> Cotangents:
    backward = tuple(derivation.backward(body) for body, _ in runs(y.node))
    values = {"bodies": y["bodies"], "backward": backward, "carried": y["carried"]}
    results = y.builder.emit("repeat_backward", (*xs, *gs), values, type=_types(xs))
    invariant = frozenset.intersection(*(derivation.unreached[name] for name in backward))
    carried = integer(y["carried"])
    first = frozenset(place for place in derivation.unreached[backward[0]] if place < carried)
    return _spread(results, xs, first | frozenset(place for place in invariant if place >= carried))


def _types(xs: Sequence[Value]) -> Type:
    """The type of a node that gives the cotangents of `xs`: one tensor, or a tuple of any other number."""
    types = tuple(x.node.tensor for x in xs if is_float(x.node))
    return types[0] if len(types) == 1 else types


def _spread(results: Value, xs: Sequence[Value], unreached: frozenset[int] = frozenset()) -> Cotangents:
    """The members of a tuple of cotangents at the places of the float inputs; None for those that no result reaches."""
    parts = iter(results.builder.parts(results))
    found = [next(parts) if is_float(x.node) else None for x in xs]
    return [None if place in unreached else part for place, part in enumerate(found)]


def _plain(rule: Callable[..., Value | Cotangents]) -> Rule:
    """A rule of an operation inside a graph, which has one result."""

    def pulled(derivation: Derivation, gs: Sequence[Value], y: Value, xs: Sequence[Value]) -> Cotangents:
        found = rule(gs[0], y, *xs)
        return (found,) if isinstance(found, Value) else found

    return pulled


VJP: dict[str, Rule] = {
    **{op: _plain(rule) for op, rule in RULES.items()},
    "item": lambda derivation, gs, y, xs: gs,
    "call": _call,
    "repeat": _repeat,
    "attention": _attention,
    "poly_attention": _poly_attention,
}

DECLINED: dict[str, str] = {
    **dict.fromkeys(
        ("input", "weight", "buffer", "constant", "fill", "literal", "arange", "sinusoid"), "has no inputs"
    ),
    **dict.fromkeys((*COMPARISONS, "logical_not"), "gives truth values"),
    "one_hot": "reads whole numbers",
    "weight_gradient": "receives a gradient",
    "linear_cross_entropy": "is made when gradients are derived",
    **dict.fromkeys(("poly_attention_backward", "repeat_backward"), "has no second derivative"),
}
"""Operations through which no cotangent flows, and why."""


# one graph

LEAVES = ("input", "weight")


class Sums:
    """The cotangent of each result of each node of a graph, summed over the uses met so far."""

    def __init__(self, build: Builder) -> None:
        self._build = build
        self._sums: dict[tuple[str, int], Value] = {}

    def add(self, node: str, index: int, g: Value) -> None:
        """One more use of result `index` of `node` gives `g`."""
        known = self._sums.get((node, index))
        self._sums[node, index] = g if known is None else known + g

    def of(self, node: Node) -> list[Value]:
        """The cotangent of each float result of `node`, zeros where no use gave one."""
        shapes = [member.shape for member in _members(node.type) if member.dtype == "float"]
        given = zip(self.given(node), shapes, strict=True)
        return [self._build.fill(shape, 0.0) if g is None else g for g, shape in given]

    def given(self, node: Node) -> list[Value | None]:
        """The cotangent of each float result of `node`, None where no use gave one."""
        members = enumerate(_members(node.type))
        return [self._sums.get((node.name, index)) for index, member in members if member.dtype == "float"]

    def reach(self, node: Node) -> bool:
        """Whether any use gave one."""
        return any((node.name, index) in self._sums for index in range(len(_members(node.type))))

    def names(self, nodes: Sequence[Node]) -> dict[str, str]:
        """New names for the cotangents of `nodes`: `_d_x` for that of x, where they have one by operation."""
        given = {node.name for node in self._build.nodes if node.op == "input"}
        names: dict[str, str] = {}
        for node in nodes:
            total = self._sums.get((node.name, 0)) if isinstance(node.type, TensorType) else None
            if total is not None and total.name not in given and total.name not in names:
                names[total.name] = self._build.fresh(f"_d_{node.name}")
        return names


def is_float(node: Node) -> bool:
    """Whether the node has a float among its results."""
    return any(member.dtype == "float" for member in _members(node.type))


def _members(type: Type | None) -> tuple[TensorType, ...]:
    return (type,) if isinstance(type, TensorType) else type or ()


def _differentiate(derivation: Derivation, graph: Graph, name: str, without: frozenset[int]) -> Graph:
    build = Builder(graph.nodes, derivation.program.multiples)
    sums = Sums(build)
    for place, output in enumerate(graph.outputs):
        if is_float(graph[output]) and place not in without:
            sums.add(output, 0, build.emit("input", name=f"_d_{output}", type=graph[output].type))
    active = _active(derivation, graph)
    forward = {node.name: Value(build, node) for node in graph.nodes}
    for node in reversed(graph.nodes):
        if node.name in active and node.op not in LEAVES and sums.reach(node):
            build.span = node.span
            inputs = [forward[source] for source in node.inputs]
            gs = sums.given(node) if node.op == "call" else sums.of(node)
            pulled = _rule(node)(derivation, gs, forward[node.name], inputs)
            for x, g in zip(inputs, pulled, strict=True):
                if g is not None and x.name in active:
                    index = integer(node["index"]) if node.op == "item" else 0
                    sums.add(x.name, index, g if node.op == "item" else g.fit(x.shape))
    derivation.unreached[name] = frozenset(
        place for place, node in enumerate(graph.inputs) if is_float(node) and not sums.reach(node)
    )
    return _finish(graph, name, sums, build)


def _rule(node: Node) -> Rule:
    if node.op in DECLINED:
        raise CompilerBug(f"no gradient through {node.op} {node.name}: it {DECLINED[node.op]}")
    return VJP[node.op]


def _active(derivation: Derivation, graph: Graph) -> frozenset[str]:
    """The nodes of float values that depend on a float input or on a weight."""
    active: set[str] = set()
    for node in graph.nodes:
        source = node.op in LEAVES or derivation.calls_weights(node)
        if is_float(node) and (source or not active.isdisjoint(node.inputs)):
            active.add(node.name)
    return frozenset(active)


def _finish(graph: Graph, name: str, sums: Sums, build: Builder) -> Graph:
    """The backward graph: inputs first, unused nodes left out, cotangents named after what they belong to."""
    build.span = graph.span
    outputs = [sums.of(node)[0].name for node in graph.inputs if is_float(node)]
    for node in graph.nodes:
        if node.op == "weight":
            build.span = node.span
            label = {"label": node["label"]}
            build.emit("weight_gradient", sums.of(node), label, name=f"_gradient_{node.name}")
    names = sums.names(graph.nodes)
    live = _live(Graph(name, tuple(build.nodes), ()), outputs, {node.name for node in graph.nodes})
    nodes = sorted((node.renamed(names) for node in live), key=lambda node: node.op != "input")
    return Graph(name, tuple(nodes), tuple(names.get(output, output) for output in outputs), span=graph.span)


SINKS = ("weight_gradient", "call", "repeat_backward")  # a call of a backward graph, which holds sinks


def _live(graph: Graph, outputs: Sequence[str], forward: set[str]) -> list[Node]:
    """The inputs, and what an output or the gradient of a weight, here or in a callee, depends on."""
    sinks = [node.name for node in graph.nodes if node.op in SINKS and node.name not in forward]
    needed = graph.ancestors([*outputs, *sinks])
    return [node for node in graph.nodes if node.op == "input" or node.name in needed]
