"""Masks, softmax, attention and polynomial attention by their definitions, in numpy: see `oracle.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastgrad_compiler.ir.graph import Node

Array: TypeAlias = "NDArray[Any]"


def softmax(scores: Array, axis: int = -1) -> Array:
    """exp(s) / sum exp(s) along an axis; zeros where every s is -inf."""
    top = scores.max(axis=axis, keepdims=True, initial=-math.inf)
    weights: Array = scores - np.where(top == -math.inf, 0.0, top)
    np.exp(weights, out=weights)  # in place: this is most of the time of a run
    total = weights.sum(axis=axis, keepdims=True)
    weights /= np.where(total == 0.0, 1.0, total)
    return weights


def over_sum(weights: Array, axis: int = -1) -> Array:
    """Weights over their sum along an axis; where all of them are 0 they stay 0."""
    nothing = (weights == 0).all(axis=axis, keepdims=True)
    return np.asarray(weights / np.where(nothing, 1.0, weights.sum(axis=axis, keepdims=True)))


def horner(coefficients: list[float], s: Array) -> Array:
    """sum of c_j s^j."""
    result = np.zeros_like(s)
    for coefficient in reversed(coefficients):
        result = result * s + coefficient
    return result


# ---------------------------------------------------------------- which pairs see each other


def distance(n: int, m: int) -> Array:
    """i - j of query i and key j, [n, m]."""
    return np.asarray(np.arange(n)[:, None] - np.arange(m)[None, :])


def causal(n: int, m: int) -> Array:
    """True where the key is not later than the query, [n, m]."""
    return np.asarray(distance(n, m) >= 0)


def window(n: int, m: int, width: int) -> Array:
    """True where |i - j| < width, [n, m]."""
    return np.asarray(np.abs(distance(n, m)) < width)


def near(n: int, m: int, block: int) -> Array:
    """True where query and key are in the same or in neighbouring blocks, [n, m]."""
    blocks = np.arange(n)[:, None] // block - np.arange(m)[None, :] // block
    return np.asarray(np.abs(blocks) <= 1)


def padding(mask: Array, rank: int) -> Array:
    """The mask of keys bool[b, m] for scores [b, .., n, m] of a rank, [b, 1, .., 1, m]."""
    batch, keys = mask.shape
    return mask.reshape(batch, *[1] * (rank - 2), keys)


def runs(ids: Array) -> Array:
    """How often the id changes up to each token: int[b, n] of int[b, n]."""
    change = np.zeros(ids.shape, np.int64)
    change[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return np.asarray(change.cumsum(axis=1))


def documents(ids: Array, rank: int) -> Array:
    """True where no id from query to key differs from its neighbour: int[b, n] gives [b, 1, .., n, n]."""
    batch, length = ids.shape
    run = runs(ids)
    same = run[:, :, None] == run[:, None, :]
    return np.asarray(same).reshape(batch, *[1] * (rank - 3), length, length)


def prefix(lengths: Array, rank: int, n: int) -> Array:
    """True where the key is not later than the query, or before the length of int[b]: [b, 1, .., n, n]."""
    early = np.arange(n) < lengths.reshape(-1, *[1] * (rank - 1))
    return np.asarray(causal(n, n) | early)


def alibi(scores: Array) -> Array:
    """What `alibi` adds to scores [.., h, n, m], [h, n, m]: -2^(-8 (i + 1) / h) |query - key| for head i."""
    heads, n, m = scores.shape[-3:]
    slopes = 2.0 ** (-8.0 * (np.arange(heads) + 1) / heads)
    return np.asarray(-slopes[:, None, None] * np.abs(distance(n, m)))


def forgotten(log_gate: Array) -> Array:
    """The sum of the log gates after key j up to query i, [.., n] gives [.., n, n]; one below -1000 counts as -1000."""
    total = np.cumsum(np.maximum(log_gate, -1000.0), axis=-1)
    n = log_gate.shape[-1]
    return np.where(distance(n, n) > 0, total[..., :, None] - total[..., None, :], 0.0)


def forget(scores: Array, log_gate: Array) -> Array:
    """Scores [.., n, n] plus what is forgotten; hidden pairs stay hidden."""
    return np.where(scores == -math.inf, scores, scores + forgotten(log_gate))


def decay(weights: Array, log_gate: Array) -> Array:
    """Weights [.., n, n] times the exponential of what is forgotten; hidden pairs stay hidden."""
    hidden = weights == -math.inf
    return np.where(hidden, weights, np.where(hidden, 0.0, weights) * np.exp(forgotten(log_gate)))


# ---------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Pairs:
    """The logits and masks of an attention node: `near_scores` are those of near pairs, `is_near` is [n, m].

    `gates` is what a forget gate adds to the logits of either.
    """

    scores: Array
    near_scores: Array
    is_near: Array
    seen: Array
    value: Array
    gates: Array


def _pairs(node: Node, inputs: list[Array]) -> _Pairs:
    q, k, v, *rest = inputs
    extra = dict(zip(_names(node), rest, strict=True))
    scores = float(str(node["scale"])) * _product(q, k)
    n, m = scores.shape[-2:]
    block = node["near"]
    is_near = near(n, m, block) if isinstance(block, int) else np.zeros((n, m), np.bool_)
    own = _product(extra["near_q"], extra["near_k"]) if "near_q" in extra else scores
    gates = np.zeros(())
    if "forget" in extra:
        gates = forgotten(np.repeat(extra["forget"], q.shape[-3] // k.shape[-3], axis=-2))
    return _Pairs(scores, own, is_near, _seen(node, extra, scores), _per_head(v, q), gates)


def _names(node: Node) -> list[str]:
    roles = node["roles"]
    return [str(role) for role in roles] if isinstance(roles, tuple) else []


def _product(q: Array, k: Array) -> Array:
    """q.k for all pairs."""
    return np.asarray(q @ np.swapaxes(_per_head(k, q), -1, -2))


def _per_head(shared: Array, q: Array) -> Array:
    """Keys or values [.., hk, m, d] for query heads [.., h, n, d]: each of them serves h / hk heads in a row."""
    if shared.ndim < 3 or q.ndim < 3 or shared.shape[-3] == q.shape[-3]:
        return shared
    return np.repeat(shared, q.shape[-3] // shared.shape[-3], axis=-3)


def _seen(node: Node, extra: Mapping[str, Array], scores: Array) -> Array:
    """True where no mask hides the key from the query."""
    n, m = scores.shape[-2:]
    seen = np.ones((n, m), np.bool_)
    if node["causal"]:
        seen = seen & causal(n, m)
    if isinstance(width := node.get("window"), int):
        seen = seen & window(n, m, width)
    if "padding" in extra:
        seen = seen & padding(extra["padding"], scores.ndim)
    if "documents" in extra:
        seen = seen & documents(extra["documents"], scores.ndim)
    return seen


def attention(node: Node, inputs: list[Array]) -> Array:
    """softmax over the keys that a query sees, of near or far logits, times the values: [.., h, n, dv]."""
    pairs = _pairs(node, inputs)
    scores = pairs.scores
    if pairs.near_scores is not scores:
        scores = np.where(pairs.is_near, pairs.near_scores, scores)
    if node["alibi"]:
        scores = scores + alibi(scores)
    visible = pairs.seen & (scores != -math.inf)
    return softmax(np.where(visible, scores + pairs.gates, -math.inf)) @ pairs.value


def poly_attention(node: Node, inputs: list[Array]) -> Array:
    """The same with weights exp(s) of near and p(s) of far pairs, times the exponential of gates, over their sum.

    Both are divided by exp of the row's largest near logit, where that is above 0, and of its largest gate: factors
    that cancel.
    """
    pairs = _pairs(node, inputs)
    gates = np.where(pairs.seen, pairs.gates, -math.inf)
    most = gates.max(axis=-1, keepdims=True, initial=-math.inf)
    gates = gates - np.where(most == -math.inf, 0.0, most)
    exponents = np.where(pairs.is_near & pairs.seen, pairs.near_scores + gates, -math.inf)
    top = np.maximum(exponents.max(axis=-1, keepdims=True, initial=-math.inf), 0.0)
    given = node["coefficients"]
    coefficients = [float(str(c)) for c in given] if isinstance(given, tuple) else []
    far = np.where(pairs.is_near, 0.0, horner(coefficients, pairs.scores) * np.exp(gates - top))
    weights = np.where(pairs.is_near, np.exp(exponents - top), far)
    return over_sum(np.where(pairs.seen, weights, 0.0)) @ pairs.value
