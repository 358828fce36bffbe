"""Which nodes of a graph spell an attention: softmax(masks(scale * q.k)) v, read off the structure.

`match` starts at the product with the values and walks inward. It follows everything that commutes with a
softmax over keys: constants and learned factors, transpositions, masks, and softmax itself written as
exp(s) / sum(exp(s)). It gives None as soon as a step would change the function. Every node it consumes may
be read by consumed nodes only.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad_compiler.graph import Graph, Node
from fastgrad_compiler.passes.attention_factors import swaps
from fastgrad_compiler.passes.attention_scores import Masks, Product, Range, Walk, inward, is_key_axis, same


@dataclass(frozen=True, slots=True)
class Match:
    """An attention found in a graph, in terms of the graph's nodes; `transposed`: `value` and the root hold
    transposes.
    """

    far: Product
    local: Product | None
    near: int | None
    value: str
    transposed: bool
    masks: Masks
    range: Range
    consumed: frozenset[str]
    scores: str


def match(graph: Graph, root: Node) -> Match | None:
    """The attention whose result (or its transpose) is `root`."""
    for weights, value, flipped, late in _products(graph, root):
        walk = Walk(graph, flipped=flipped)
        scores = _normaliser(walk, root, late) if late else _weights(walk, weights)
        if late and scores is not None:
            walk.consumed |= {weights, root.inputs[0]}
            if graph[weights].inputs[0] != scores and not same(walk, graph[weights].inputs[0], scores):
                continue
        if scores is None:
            continue
        found = inward(walk, scores)
        if found is None or not _private(walk, root):
            continue
        far, local, near = found
        return Match(
            far, local, near, value, flipped, walk.masks, walk.range, frozenset(walk.consumed), scores
        )
    return None


def _products(graph: Graph, root: Node) -> list[tuple[str, str, bool, bool]]:
    """(weights, values, flipped, late) of each way to read the root; `late` divides by the row sum behind
    the product.
    """
    if root.op == "matmul":
        left, right = root.inputs
        return [(left, right, False, False), (right, left, True, False)]
    if root.op == "div" and graph[root.inputs[0]].op == "matmul":
        left, right = graph[root.inputs[0]].inputs
        if graph[left].op == "exp":
            return [(left, right, False, True)]
    return []


def _weights(walk: Walk, name: str) -> str | None:
    """From the weights to the scores."""
    node = walk.graph[name]
    if (node.op == "dropout" and node["p"] == 0) or node.op == "cast":
        walk.consumed.add(name)
        return _weights(walk, node.inputs[0])
    if node.op == "permute" and swaps(node):
        walk.consumed.add(name)
        walk.flipped = not walk.flipped
        return _weights(walk, node.inputs[0])
    if node.op == "softmax" and is_key_axis(walk, node["axis"], node):
        walk.consumed.add(name)
        return node.inputs[0]
    if node.op == "div" and walk.graph[node.inputs[0]].op == "exp":
        walk.consumed |= {name, node.inputs[0]}
        scores = _normaliser(walk, node, late=False)
        top = walk.graph[node.inputs[0]].inputs[0]
        return scores if scores is not None and (scores == top or same(walk, top, scores)) else None
    return None


def _normaliser(walk: Walk, node: Node, late: bool) -> str | None:
    """The scores s of a division by sum(exp(s)) over the keys."""
    total = walk.graph[node.inputs[1]]
    if total.op != "sum" or not total["keepdim"] or walk.graph[total.inputs[0]].op != "exp":
        return None
    axes = total["axes"]
    if not isinstance(axes, tuple) or len(axes) != 1 or not is_key_axis(walk, axes[0], total):
        return None
    if late and walk.flipped:
        return None
    walk.consumed |= {total.name, total.inputs[0]}
    return walk.graph[total.inputs[0]].inputs[0]


def _private(walk: Walk, root: Node) -> bool:
    """Whether nothing but the attention itself reads what it consumes."""
    known = walk.consumed | {root.name}
    return all(
        name not in walk.graph.outputs and all(user.name in known for user in walk.graph.users[name])
        for name in walk.consumed
    )
