"""The exact backward of an `attention` node, spelled out in a graph of its own.

With A the row-stochastic weights, O = A V and the cotangent dO:

    dV = A^T dO     dA = dO V^T     dS = A * (dA - rowsum(dO * O))     dQ = scale dS K     dK = scale dS^T Q

where S are the scores before the mask (docs/mathematics.md, section 4, with p = exp). Near pairs have their
own scores, Q' K'^T, so dS splits between the two. A log gate is a part of the scores of all pairs across it, whose dS
add up in its cotangent. Query heads that share a key head add up in dK, dV and that of the gates. The graph's
`attention` node, which gives O, says what the whole is the backward of: `lowrank` reads its decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.builder import Builder, Value
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Graph, Node, Type
from fastgrad_compiler.ir.masks import FORGET, MASKS
from fastgrad_compiler.passes.vjp_rules import of_gate, split_near_far, sum_groups

BLOCK = "attention.backward"  # what such a graph has for its block

COTANGENT = "_d_output"


def attention_backward(
    name: str, attention: Node, types: Sequence[Type | None], multiples: Mapping[str, int]
) -> Graph:
    """The graph `name`: inputs of `attention` and the cotangent of its result to those of its float inputs.

    `types` are the types of the inputs; they are named q, k, v and as the node's roles.
    """
    build = Builder(multiples=multiples)
    build.span = attention.span
    value = Attention.of(attention)
    x = {role: build.emit("input", name=role, type=type) for role, type in value.by_role(types).items()}
    g = build.emit("input", name=COTANGENT, type=attention.type)

    weights = _scores(value, x).op("softmax", axis=-1)
    output = build.emit("attention", tuple(x.values()), dict(attention.attributes), type=attention.type)
    d_weights = g @ _like_heads(x["v"], g).T
    d_scores = weights * (d_weights - (g * output).sum(keepdim=True))

    far, results = d_scores, {"v": _shared(weights.T @ g, x["v"])}
    if "near_q" in x:
        near, far = split_near_far(d_scores, value.near)
        results |= _product_backward(near, x, "near_q", "near_k")
    results |= _product_backward(far * value.scale, x, "q", "k")
    if FORGET in x:
        results[FORGET] = _flat(_shared(_rows(of_gate(d_scores, _gates(x))), _rows(x[FORGET])))
    outputs = tuple(results[role].name for role in x if role in results)
    return Graph(name, tuple(build.nodes), outputs, BLOCK, attention.span)


def _like_heads(shared: Value, q: Value) -> Value:
    """Keys or values [b, hk, m, d], each head repeated for the query heads [b, h, n, d] that read it."""
    if shared.shape[-3] == q.shape[-3]:
        return shared
    times = q.shape[-3].divide(shared.shape[-3])
    if times is None or times.constant is None:
        raise TypeError(f"{q.shape[-3]} query heads share {shared.shape[-3]} heads")
    return shared.op("repeat_heads", times=times.constant)


def _shared(g: Value, shared: Value) -> Value:
    """The cotangent of `shared` from that of `_like_heads(shared, q)`."""
    return sum_groups(g, shared.shape[-3])


def _scores(attention: Attention, x: Mapping[str, Value]) -> Value:
    """The masked scores [b, h, n, m]."""
    mask = attention.mask
    scores = x["q"] @ _like_heads(x["k"], x["q"]).T * attention.scale
    if attention.own_near:
        near = x["near_q"] @ _like_heads(x["near_k"], x["near_q"]).T
        scores = near.op("near_far", scores, block=attention.near)
    if attention.alibi:
        scores = scores.op("alibi")
    if FORGET in x:
        scores = scores.op(FORGET, _gates(x))
    if mask.causal:
        scores = scores.op("causal")
    if mask.window is not None:
        scores = scores.op("window", width=mask.window)
    for name in mask.operands:
        if name in MASKS:
            scores = scores.op(name, x[name])
    return scores


def _gates(x: Mapping[str, Value]) -> Value:
    """The log gates [b, hk, n] of each query head, [b, h, n]."""
    return _flat(_like_heads(_rows(x[FORGET]), x["q"]))


def _rows(gates: Value) -> Value:
    """[b, h, n] as [b, h, n, 1], as keys are."""
    return gates.reshape((*gates.shape, Dim.of(1)))


def _flat(rows: Value) -> Value:
    return rows.reshape(rows.shape[:-1])


def _product_backward(d_scores: Value, x: Mapping[str, Value], q: str, k: str) -> dict[str, Value]:
    """The cotangents of q and k from that of `q @ k.T`."""
    d_q, d_k = d_scores @ _like_heads(x[k], x[q]), d_scores.T @ x[q]
    return {q: d_q, k: _shared(d_k, x[k])}
