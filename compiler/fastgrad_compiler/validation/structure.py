"""What a pass left of a graph, and what it claims: which nodes are as they were, and which values stand for which.

Where a node that stayed reads something else than before, or the graph returns something else, the pass claims that the
two are equal: those claims are what `validate.py` puts to the test. The names that a pass gives mean nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastgrad_compiler.ir.calls import iterations
from fastgrad_compiler.ir.graph import Graph, Node, Program

REMARKS = frozenset(
    (
        *("bound", "asserted", "proof", "source", "decision", "why", "family", "degree", "coefficients"),
        *("eps", "eps_prime", "break_even", "break_even_gpu", "positive_from", "reach", "precision"),
    )
)
"""Attributes of an `attention` that say how to compute it, and nothing of what it is."""


@dataclass(frozen=True)
class Claim:
    """The node `new` of the graph as it is now has the value that `old` had; `reader` is who relies on it."""

    old: str
    new: str
    reader: str


@dataclass(frozen=True)
class Correspondence:
    """How two graphs compare: nodes of the later one that stayed, what is claimed, graphs that must agree in turn."""

    stayed: frozenset[str]
    claims: tuple[Claim, ...]
    graphs: tuple[tuple[str, str], ...]


class SignatureChanged(Exception):
    """The two graphs take or give different numbers of values, or of other types."""


def correspond(before: Graph, after: Graph) -> Correspondence:
    """What the later graph kept of the earlier one. Raises SignatureChanged where one cannot stand for the other."""
    if _signature(before) != _signature(after):
        raise SignatureChanged(f"{_signature(before)} became {_signature(after)}")
    stayed: dict[str, Node] = {}
    claims: dict[tuple[str, str], Claim] = {}
    graphs: dict[tuple[str, str], None] = {}

    def moved(old: str, new: str) -> bool:
        return old != new or new not in stayed

    def claim(old: str, new: str, reader: str) -> None:
        if moved(old, new):
            claims.setdefault((old, new), Claim(old, new, reader))

    for node in after.nodes:
        known = before.by_name.get(node.name)
        if node.name not in after.alive or known is None or not _alike(known, node):
            continue
        if node.op == "attention" and any(map(moved, known.inputs, node.inputs)):
            continue  # its keys may have been shifted, which its result does not show
        stayed[node.name] = node
        graphs.update(dict.fromkeys(zip(_run(known), _run(node), strict=True)))
        for old, new in zip(known.inputs, node.inputs, strict=True):
            claim(old, new, node.name)
    for old, new in zip(before.outputs, after.outputs, strict=True):
        claim(old, new, "return")
    return Correspondence(frozenset(stayed), tuple(claims.values()), tuple(graphs))


def _signature(graph: Graph) -> tuple[tuple[str, ...], int]:
    return tuple(f"{node.name}: {node.type}" for node in graph.inputs), len(graph.outputs)


def _alike(old: Node, new: Node) -> bool:
    if old.op in ("weight", "buffer") and old.type != new.type:
        return False
    one, other = ((each.op, len(each.inputs), len(_run(each)), _meaning(each)) for each in (old, new))
    return one == other


def _meaning(node: Node) -> dict[str, object]:
    """The attributes without names of graphs, whose meaning is compared by itself, and remarks."""
    left_out = REMARKS if node.op == "attention" else {"graph", "bodies"}
    return {key: value for key, value in node.attributes if key not in left_out}


def _run(node: Node) -> tuple[str, ...]:
    """The graphs that a node runs, one for each time."""
    return tuple(graph for _, graph in iterations(node))


def pairs(before: Program, after: Program) -> Iterator[tuple[Graph, Graph, Correspondence]]:
    """The graphs whose values must agree if the model's and the objective's do, each pair once."""
    queue = list(zip(before.roots, after.roots, strict=False))
    known = set(queue)
    while queue:
        old, new = queue.pop(0)
        found = correspond(before[old], after[new])
        yield before[old], after[new], found
        queue.extend(pair for pair in found.graphs if pair not in known)
        known.update(found.graphs)
