"""Which nodes of a graph spell an attention: softmax(masks(scale * q.k)) v, read off the structure.

`match` starts at the product with the values and walks inward. It follows everything that commutes with a
softmax over keys: constants and learned factors, transpositions, masks, and softmax itself written as
exp(s) / sum(exp(s)). The same with a polynomial of the scores in place of exp is an attention that is low-rank as
the model has it. It gives None as soon as a step would change the function. Every node it consumes may be read by
consumed nodes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastgrad_compiler.attention.scores import Product, Walk, inward, near_and_far
from fastgrad_compiler.attention.value import Mask, Range
from fastgrad_compiler.attention.weights import Weights, divided, weights_of
from fastgrad_compiler.ir.graph import Graph, Node


@dataclass(frozen=True, slots=True)
class Match:
    """An attention found in a graph, in terms of the graph's nodes; `transposed`: `value` and the root hold
    transposes. `operands` are what the mask reads, by role; `coefficients` are those of the model's own polynomial,
    empty for exp.
    """

    far: Product
    local: Product | None
    near: int | None
    value: str
    transposed: bool
    mask: Mask
    operands: Mapping[str, str]
    alibi: bool
    range: Range
    coefficients: tuple[float, ...]


def match(graph: Graph, root: Node) -> Match | None:
    """The attention whose result (or its transpose) is `root`."""
    return next((found for found, _ in _readings(graph, root) if found is not None), None)


def refused_gates(graph: Graph, root: Node) -> dict[str, str]:
    """The forget gates between `root` and scores that are no attention's, by name, and why; "" where it is another's
    fault.
    """
    return {
        name: why
        for found, walk in _readings(graph, root)
        if found is None
        for name, why in walk.refused.items()
    }


def _readings(graph: Graph, root: Node) -> Iterator[tuple[Match | None, Walk]]:
    """What each way to read the root finds, and where it came on its way inward."""
    for weights, value, flipped, late in _products(graph, root):
        walk = Walk(graph, flipped=flipped)
        if late:
            walk.consumed.add(root.inputs[0])
        found = divided(walk, weights, root.inputs[1]) if late else weights_of(walk, weights)
        yield None if found is None else _read(walk, root, found, (value, flipped)), walk


def _read(walk: Walk, root: Node, found: Weights, value: tuple[str, bool]) -> Match | None:
    products = _to_products(walk, found)
    if products is None:
        return None
    objection = _objection(walk, root, found)
    if objection:  # it runs as it is written
        walk.refuse(objection)
        return None
    far, local, near = products
    coefficients = tuple(float(str(each)) for each in found.coefficients)
    return Match(far, local, near, *value, walk.mask, walk.operands, walk.alibi, walk.range, coefficients)


def _objection(walk: Walk, root: Node, found: Weights) -> str:
    """Why what was read is no attention; empty where it is one."""
    if not _private(walk, root):
        return "something else reads its scores or weights too"
    if found.coefficients and (walk.mask.window is not None or walk.alibi):
        return "no kernel has the model's own polynomial with a window or with slopes"
    if walk.mask.forget and not walk.mask.causal:
        return "its scores are not causal"
    if walk.mask.forget and walk.alibi:
        return "its scores have the slopes of alibi too"
    return ""


def _to_products(walk: Walk, weights: Weights) -> tuple[Product, Product | None, int | None] | None:
    if weights.local is None or weights.near is None:
        return inward(walk, weights.scores)
    return near_and_far(walk, weights.local, weights.scores, weights.near)


def _products(graph: Graph, root: Node) -> list[tuple[str, str, bool, bool]]:
    """(weights, values, flipped, late) of each way to read the root; `late` divides by the row sum after
    the product.
    """
    if root.op == "matmul":
        left, right = root.inputs
        return [(left, right, False, False), (right, left, True, False)]
    if root.op == "div" and graph[root.inputs[0]].op == "matmul":
        left, right = graph[root.inputs[0]].inputs
        return [(left, right, False, True)]
    return []


def _private(walk: Walk, root: Node) -> bool:
    """Whether nothing but the attention itself reads what it consumes."""
    known = walk.consumed | {root.name}
    return all(
        name not in walk.graph.outputs and all(user.name in known for user in walk.graph.users[name])
        for name in walk.consumed
    )
