"""The pass `lowrank`: attention that the plan serves by a polynomial becomes `poly_attention`.

Its exact backward becomes `poly_attention_backward`; both are O(n r dv) (docs/mathematics.md, sections
3 and 4). Attention planned exact stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.passes.attention_backward import BLOCK


def rewrite_low_rank(program: Program) -> Program:
    """The program with every attention of decision "polynomial" rewritten, forward and backward.

    Graphs of exact backwards that nothing calls any more are dropped. Raises CompilerBug where the plan
    serves an attention with a window or alibi by a polynomial.
    """
    attentions = {graph.name: _polynomial(graph) for graph in program.graphs if graph.block == BLOCK}
    replaced = {name: node for name, node in attentions.items() if node is not None}
    kept = [graph for graph in program.graphs if graph.name not in replaced]
    return program.with_graphs(_rewrite(graph, replaced) for graph in kept)


def _polynomial(backward: Graph) -> Node | None:
    """The attention that this graph is the backward of, where a polynomial serves it."""
    return next((node for node in backward.nodes if _is_polynomial(node)), None)


def _is_polynomial(node: Node) -> bool:
    return node.op == "attention" and node.get("decision") == "polynomial"


def _rewrite(graph: Graph, replaced: Mapping[str, Node]) -> Graph:
    return replace(graph, nodes=tuple(_rewrite_node(node, replaced) for node in graph.nodes))


def _rewrite_node(node: Node, replaced: Mapping[str, Node]) -> Node:
    if _is_polynomial(node):
        return Attention.of(node).on(replace(node, op="poly_attention"))
    if node.op == "call" and node["graph"] in replaced:
        attention = Attention.of(replaced[str(node["graph"])])
        return attention.on(replace(node, op="poly_attention_backward"))
    return node
