"""Decisions as nodes: attributes on an attention, keys that are centred, heads that are served apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastgrad_compiler.attention.value import Attention, Range, Verdict
from fastgrad_compiler.ir.builder import Builder, Value
from fastgrad_compiler.ir.graph import Graph, Node
from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.planning.decision import Decision

# of the operands that have heads
_HEADS_OF = {"q": "q", "near_q": "q", "k": "k", "near_k": "k", "v": "k", FORGET: "k"}


def decided(node: Node, decision: Decision) -> Node:
    """The attention with a decision's attributes."""
    attention, polynomial, found = Attention.of(node), decision.polynomial, decision.range
    verdict = "exact" if polynomial is None else "polynomial"
    even = decision.break_even, decision.break_even_gpu
    attention = replace(attention, verdict=Verdict(verdict, decision.why, *even))
    if polynomial is not None:
        near = attention.near if decision.near is None else decision.near
        attention = attention.served(polynomial, near, decision.precision)
        if found is not None:
            asserted = found.source == "asserted"
            known = Range(polynomial.bound, asserted, found.reasons, found.source, found.reach)
            attention = replace(attention, range=known)
    return attention.on(node)


def applied(
    graph: Graph, node: Node, decisions: Sequence[Decision], multiples: Mapping[str, int]
) -> tuple[Node, ...]:
    """The nodes that stand in an attention's place, the last under its name.

    Several decisions are for groups of heads: each group gets an attention of its own, and their results are put
    together again. Heads are taken as runs of neighbours, so that a run is one slice.
    """
    if len(decisions) == 1 and not _is_centred(decisions[0]):
        return (decided(node, decisions[0]),)
    builder = Builder(graph.nodes, multiples)
    builder.span = node.span
    operands = [Value(builder, graph[name]) for name in node.inputs]
    parts = [_group(builder, node, operands, decision, len(decisions) > 1) for decision in decisions]
    if len(parts) > 1:
        _in_order(builder, parts, [head for decision in decisions for head in decision.heads or ()])
    *added, last = builder.nodes[len(graph.nodes) :]
    return (*added, replace(last, name=node.name))


def _is_centred(decision: Decision) -> bool:
    return decision.own_mean or (decision.range is not None and decision.range.centre is not None)


def _group(builder: Builder, node: Node, operands: Sequence[Value], decision: Decision, apart: bool) -> Value:
    """The attention of one decision, on the heads that it is for."""
    by_role = Attention.of(node).by_role(operands)
    name = f"{node.name}_attention"
    groups = _groups(by_role["q"], by_role["k"])
    if apart and decision.heads is not None:
        keys = tuple(dict.fromkeys(head // groups for head in decision.heads))
        for role in by_role.keys() & _HEADS_OF:
            by_role[role] = _taken(by_role[role], decision.heads if _HEADS_OF[role] == "q" else keys)
        name = f"{node.name}_heads_{'_'.join(_run_text(run) for run in _runs(decision.heads))}"
    k = by_role["k"]
    if decision.own_mean:
        k = k - k.op("mean", axes=(-2,), keepdim=True)
    elif decision.range is not None and decision.range.centre is not None:
        values = tuple((row,) for row in decision.range.centre)
        label = builder.fresh(f"{name}_centre")
        k = k - builder.emit("literal", (), {"label": label, "values": values}, name=label)
    inputs = list((by_role | {"k": k}).values())
    return builder.emit("attention", inputs, dict(decided(node, decision).attributes), name=name)


def _groups(q: Value, k: Value) -> int:
    """Query heads for each key head."""
    query, key = q.shape[-3].constant, k.shape[-3].constant
    assert query is not None
    assert key is not None
    return query // key


def _runs(heads: Sequence[int]) -> list[tuple[int, int]]:
    """(first, after the last) of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return runs


def _run_text(run: tuple[int, int]) -> str:
    return str(run[0]) if run[1] - run[0] == 1 else f"{run[0]}_to_{run[1] - 1}"


def _taken(value: Value, heads: Sequence[int]) -> Value:
    """Some heads of an operand [b, h, ..]."""
    axis = 1 - len(value.shape)
    if value.shape[axis].constant == len(heads):
        return value
    slices = [value.op("slice", axis=axis, start=start, stop=stop) for start, stop in _runs(heads)]
    return slices[0] if len(slices) == 1 else value.builder.emit("concat", slices, {"axis": axis})


def _in_order(builder: Builder, parts: Sequence[Value], heads: Sequence[int]) -> None:
    """The results put together, head by head in the order of the attention."""
    whole = builder.emit("concat", parts, {"axis": -3})
    places = [heads.index(head) for head in range(len(heads))]
    if places != sorted(places):
        slices = [whole.op("slice", axis=-3, start=start, stop=stop) for start, stop in _runs(places)]
        builder.emit("concat", slices, {"axis": -3})
