"""Which graphs the nodes of a program run, how often, and which graphs that reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import TypeAlias

from fastgrad_compiler.ir.graph import Graph, Node, Program

Runs: TypeAlias = tuple[tuple[str, int], ...]
RUNNING = frozenset({"call", "repeat", "repeat_backward"})
"""The operations that run graphs."""


def runs(node: Node) -> Runs:
    """The (graph, times) that a node runs, in order: a call one graph once, a repeat its `bodies`, others none.

    ValueError where `bodies` is malformed.
    """
    if node.op == "call":
        return ((str(node["graph"]), 1),)
    bodies = node.get("bodies", ())
    found: list[tuple[str, int]] = []
    for run in bodies if isinstance(bodies, tuple) else (bodies,):
        if not (isinstance(run, tuple) and len(run) == 2):
            raise ValueError(f"{node.op} {node.name} has bodies {bodies!r}")
        found.append((str(run[0]), int(str(run[1]))))
    return tuple(found)


def in_runs(graphs: Iterable[str]) -> Runs:
    """The graphs of the iterations of a repeat as its `bodies`: equal neighbours are one run."""
    return tuple((graph, len(list(same))) for graph, same in groupby(graphs))


def iterations(node: Node) -> Iterator[tuple[int, str]]:
    """(index, graph) of each time that a node runs one, in order."""
    return enumerate(graph for graph, times in runs(node) for _ in range(times))


def backward_of(repeat: Node) -> dict[str, str]:
    """The backward graph of each body graph of a `repeat_backward`; of another node, none."""
    names = repeat.get("backward", ())
    backward = names if isinstance(names, tuple) else (names,)
    return {body: str(name) for (body, _), name in zip(runs(repeat), backward, strict=bool(backward))}


def callees(node: Node) -> tuple[str, ...]:
    """The graphs that a node runs, each once, in order; the backward ones after the others."""
    if node.op not in RUNNING:
        return ()
    return tuple(dict.fromkeys((*(graph for graph, _ in runs(node)), *backward_of(node).values())))


def reachable(graphs: Mapping[str, Graph], roots: Iterable[str]) -> tuple[Graph, ...]:
    """The graphs that `roots` run, themselves included, callees first; KeyError where one is not there."""
    found: dict[str, Graph] = {}
    entered: set[str] = set()

    def visit(name: str) -> None:
        if name in entered:
            return
        entered.add(name)
        for node in graphs[name].nodes:
            for callee in callees(node):
                visit(callee)
        found[name] = graphs[name]

    for root in roots:
        visit(root)
    return tuple(found.values())


def graphs_with(program: Program, wanted: Callable[[Node], bool]) -> frozenset[str]:
    """The graphs that hold such a node, or run one that does."""
    found: set[str] = set()
    for graph in reachable(program.by_name, program.by_name):
        if any(wanted(node) or not found.isdisjoint(callees(node)) for node in graph.nodes):
            found.add(graph.name)
    return frozenset(found)
