"""The pass `lowrank`: attention that the plan serves by a polynomial becomes `poly_attention`.

Its exact backward becomes `poly_attention_backward`; both are O(n r dv) (docs/mathematics.md, sections
3 and 4). Attention planned exact stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.graph import Node, Program
from fastgrad_compiler.passes.attention_backward import BLOCK


def rewrite_low_rank(program: Program) -> Program:
    """The program with every attention of decision "polynomial" rewritten, forward and backward.

    Graphs of exact backwards that nothing calls any more are dropped. Raises CompilerBug where the plan
    serves an attention with a window or alibi by a polynomial.
    """
    backward = [graph for graph in program.graphs if graph.block == BLOCK]
    replaced = {graph.name: node for graph in backward for node in graph.nodes if _is_polynomial(node)}
    return program.with_graphs(
        replace(graph, nodes=tuple(_rewritten(node, replaced) for node in graph.nodes))
        for graph in program.graphs
        if graph.name not in replaced
    )


def _is_polynomial(node: Node) -> bool:
    return node.op == "attention" and node.get("decision") == "polynomial"


def _rewritten(node: Node, replaced: Mapping[str, Node]) -> Node:
    if _is_polynomial(node):
        return Attention.of(node).on(replace(node, op="poly_attention"))
    if node.op == "call" and node["graph"] in replaced:
        attention = Attention.of(replaced[str(node["graph"])])
        return attention.on(replace(node, op="poly_attention_backward"))
    return node
