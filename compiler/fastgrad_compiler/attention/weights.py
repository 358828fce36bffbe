"""From the weights of an attention inward, to the scores that they are computed from, and how.

Weights are exp of the scores, or a polynomial of them that the model gives, over their row sum: `softmax(s)`,
`normalize_rows(w)`, and `w / sum(w)` with the division before or after the product with the values. A mask or a forget
gate may lie on weights that `normalize_rows` divides, and a near field may join exp nearby with a polynomial beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad_compiler.attention.factors import swaps
from fastgrad_compiler.attention.scores import (
    Walk,
    gated,
    is_key_axis,
    keeps_values,
    masked,
    misplaced,
    same,
)
from fastgrad_compiler.ir.graph import Attribute, Node
from fastgrad_compiler.ir.masks import FORGET, MASKS

_OF_SCORES = ("exp", "polynomial")


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of `scores`: exp, or the polynomial of these `coefficients`, beside exp of the `local` scores of pairs in
    neighbouring blocks of `near` tokens.
    """

    scores: str
    coefficients: tuple[Attribute, ...] = ()
    local: str | None = None
    near: int | None = None


def weights_of(walk: Walk, name: str) -> Weights | None:
    """From normalised weights to their scores."""
    node = walk.graph[name]
    if (node.op == "dropout" and node["p"] == 0) or (node.op == "cast" and keeps_values(walk.graph, node)):
        walk.consumed.add(name)
        return weights_of(walk, node.inputs[0])
    if node.op == "permute" and swaps(node):
        walk.consumed.add(name)
        walk.flipped = not walk.flipped
        return weights_of(walk, node.inputs[0])
    if node.op == "softmax" and is_key_axis(walk, node["axis"], node):
        walk.consumed.add(name)
        return Weights(node.inputs[0])
    if node.op == "normalize_rows" and not walk.flipped:
        walk.consumed.add(name)
        return _unnormalised(walk, node.inputs[0])
    if node.op == "div":
        walk.consumed.add(name)
        return divided(walk, node.inputs[0], node.inputs[1])
    return None


def divided(walk: Walk, weights: str, total: str) -> Weights | None:
    """From weights that are divided by their sum over the keys, now or after the product with the values."""
    top, row_sum = walk.graph[weights], walk.graph[total]
    if top.op not in _OF_SCORES or row_sum.op != "sum" or not row_sum["keepdim"]:
        return None
    axes = row_sum["axes"]
    if not isinstance(axes, tuple) or len(axes) != 1 or not is_key_axis(walk, axes[0], row_sum):
        return None
    walk.consumed |= {weights, total, row_sum.inputs[0]}
    return _of_scores(walk, top) if same(walk, weights, row_sum.inputs[0]) else None


def _unnormalised(walk: Walk, name: str) -> Weights | None:
    """From what `normalize_rows` divides: masks, then exp, a polynomial or both."""
    node = walk.graph[name]
    walk.consumed.add(name)
    if node.op in MASKS:
        inner = masked(walk, node)
        return _unnormalised(walk, inner) if inner is not None else None
    if node.op == "decay":
        inner = gated(walk, node)
        return _unnormalised(walk, inner) if inner is not None else None
    if node.op == FORGET:
        misplaced(walk, node)
        return None
    if node.op == "near_far":
        return _near_and_far(walk, node)
    return _of_scores(walk, node) if node.op in _OF_SCORES else None


def _near_and_far(walk: Walk, node: Node) -> Weights | None:
    local, far = (walk.graph[name] for name in node.inputs)
    block = node["block"]
    if (local.op, far.op) != _OF_SCORES or not isinstance(block, int):
        return None
    walk.consumed |= {local.name, far.name}
    weights = _of_scores(walk, far)
    return None if weights is None else Weights(weights.scores, weights.coefficients, local.inputs[0], block)


def _of_scores(walk: Walk, node: Node) -> Weights | None:
    """A polynomial depends on the level of a row, which exp over its sum does not, and it has no near field inside."""
    if node.op == "exp":
        return Weights(node.inputs[0])
    coefficients = node["coefficients"]
    if not isinstance(coefficients, tuple) or len(coefficients) < 2:
        return None
    walk.level_matters, walk.near_allowed = True, False
    return Weights(node.inputs[0], coefficients)
