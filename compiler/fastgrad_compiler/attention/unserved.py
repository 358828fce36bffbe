"""Forget gates that are no attention's: they are computed as they are written, on all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastgrad_compiler.attention.pattern import refused_gates
from fastgrad_compiler.ir.calls import reachable
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.ir.masks import GATED

_OTHER = "what reads it is no attention"


@dataclass(frozen=True, slots=True)
class Unserved:
    """The operation of a forget gate, and why no attention has it."""

    node: Node
    why: str


def unserved_gates(program: Program) -> tuple[Unserved, ...]:
    """The forget gates that the recognition of attention left, one entry for each place in the file.

    Bounds must be there: at any stage from `attention` on.
    """
    graphs = reachable(program.by_name, program.roots)
    return tuple(dict.fromkeys(found for graph in graphs for found in _left(graph)))


def _left(graph: Graph) -> Iterator[Unserved]:
    gates = [node for node in graph.nodes if node.op in GATED]
    if not gates:
        return
    roots = [node for node in graph.nodes if node.op in ("matmul", "div")]
    reasons: Mapping[str, str] = {
        name: why for root in roots for name, why in refused_gates(graph, root).items()
    }
    for node in gates:
        yield Unserved(node, reasons.get(node.name) or _OTHER)
