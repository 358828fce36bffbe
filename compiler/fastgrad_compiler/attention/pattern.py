"""Which nodes of a graph spell an attention: softmax(masks(scale * q.k)) v, read off the structure.

`match` starts at the product with the values and walks inward. It follows everything that commutes with a
softmax over keys: constants and learned factors, transpositions, masks, and softmax itself written as
exp(s) / sum(exp(s)). The same with a polynomial of the scores in place of exp is an attention that is low-rank as
the model has it. It gives None as soon as a step would change the function. Every node it consumes may be read by
consumed nodes only.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    for weights, value, flipped, late in _products(graph, root):
        walk = Walk(graph, flipped=flipped)
        if late:
            walk.consumed.add(root.inputs[0])
        found = divided(walk, weights, root.inputs[1]) if late else weights_of(walk, weights)
        products = None if found is None else _to_products(walk, found)
        if found is None or products is None or not _private(walk, root):
            continue
        if found.coefficients and (walk.mask.window is not None or walk.alibi):
            continue  # the kernels have neither: the model's own polynomial runs as it is written
        far, local, near = products
        coefficients = tuple(float(str(each)) for each in found.coefficients)
        return Match(
            far, local, near, value, flipped, walk.mask, walk.operands, walk.alibi, walk.range, coefficients
        )
    return None


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
