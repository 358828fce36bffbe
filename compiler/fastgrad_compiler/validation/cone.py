"""The part of a graph on which what a pass claims depends, with everything that is costly and opaque made an input.

What a call, a loop, a lookup or a product with a large weight gives is anything within what is proved of it, as far as
a pass knows that leaves it in place: it is drawn. So a graph is cheap to run, however large the model around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from fastgrad_compiler.ir.graph import Graph, Node, Program, TensorType, Type
from fastgrad_compiler.validation.structure import Correspondence

LARGE = 1 << 20  # entries of a weight with which a product is not computed
_OPAQUE = ("call", "repeat", "embedding", "patches")


@dataclass(frozen=True)
class Pair:
    """A graph before and after a pass, how they correspond, and the programs that they are of."""

    program: Program
    later: Program
    before: Graph
    after: Graph
    found: Correspondence
    free: bool  # whether any inputs are admissible: nothing is proved of the inputs of a model

    def __post_init__(self) -> None:
        assert self.program[self.before.name] is self.before
        assert self.later[self.after.name] is self.after


def cut(pair: Pair) -> Pair:
    """The pair with its earlier graph reduced to what claims depend on, costly nodes replaced by inputs."""
    graph, keys = pair.before, _keys(pair.before)
    left = {keys[name] for name in pair.found.stayed}
    types = {node.name: node.type or _type(pair.after, node.name) for node in graph.nodes}
    opaque = {
        node.name
        for node in graph.nodes
        if keys[node.name] in left and types[node.name] is not None and _is_opaque(graph, node)
    }
    named = {claim.old for claim in pair.found.claims} | (kept_nodes(pair) & graph.by_name.keys())
    needed = graph.ancestors(named, stop=frozenset(opaque))
    nodes = tuple(
        _as_input(node, types[node.name], keys[node.name]) if node.name in opaque else node
        for node in graph.nodes
        if node.name in needed or node.op == "input"
    )
    small = replace(graph, nodes=nodes)
    others = (small if each is graph else each for each in pair.program.graphs)
    program = pair.program.with_graphs(others)
    return replace(pair, program=program, before=small, free=pair.free and not opaque & needed)


def fresh_nodes(pair: Pair) -> frozenset[str]:
    """The nodes of the later graph that are to be computed."""
    return _reached(pair) - pair.found.stayed


def kept_nodes(pair: Pair) -> frozenset[str]:
    """The nodes that stayed and that those read, or a claim names."""
    return _reached(pair) & pair.found.stayed


def _reached(pair: Pair) -> frozenset[str]:
    return pair.after.ancestors([claim.new for claim in pair.found.claims], stop=pair.found.stayed)


def _type(graph: Graph, name: str) -> Type | None:
    return graph[name].type if name in graph.by_name else None


def _is_opaque(graph: Graph, node: Node) -> bool:
    if node.op in _OPAQUE:
        return True
    return node.op == "matmul" and any(_is_large_weight(graph[name]) for name in node.inputs)


def _is_large_weight(node: Node) -> bool:
    if node.op != "weight" or not isinstance(node.type, TensorType):
        return False
    return prod(dim.constant or 1 for dim in node.type.shape) > LARGE


def _as_input(node: Node, type_: Type | None, key: str) -> Node:
    return Node(node.name, "input", (), (("key", key),), type_, node.bound, node.span)


def _keys(graph: Graph) -> Mapping[str, str]:
    """A name for what each node computes: two that compute the same from the same have one."""
    keys: dict[str, str] = {}
    for node in graph.nodes:
        own = node.name if node.op == "input" else ""
        text = repr((node.op, own, node.attributes, [keys[name] for name in node.inputs]))
        keys[node.name] = hashlib.sha256(text.encode()).hexdigest()
    return keys
