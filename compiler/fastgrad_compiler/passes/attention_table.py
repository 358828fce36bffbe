"""The attentions of a program by path: one entry for each place where one runs, however few graphs hold
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from fastgrad_compiler.dim import Dim
from fastgrad_compiler.features import rank
from fastgrad_compiler.flatten import Indices, iterations, path_of, runs
from fastgrad_compiler.graph import Graph, Node, Program

_ATTENTION = ("attention", "poly_attention")


@dataclass(frozen=True)
class AttentionEntry:
    """One attention of the model.

    `full_path` is its calls' labels and its own name; `path` is what users are shown, the calls' labels
    alone where the called graph holds no other attention. `d`, `dv` are the widths of queries and values,
    None where known at run time only; `queries` and `keys` the two lengths.
    """

    path: str
    full_path: str
    graph: str
    node: Node
    d: int | None
    dv: int | None
    queries: Dim
    keys: Dim

    @property
    def place(self) -> str:
        """`gpt.tfg:12:9`, empty for a program without a source."""
        return self.node.span.place if self.node.span else ""

    @property
    def rank(self) -> int | None:
        """Monomials of the polynomial's features; None for an exact attention."""
        degree = self.node.get("degree")
        return rank(self.d, degree) if isinstance(degree, int) and self.d is not None else None


def attention_table(program: Program) -> tuple[AttentionEntry, ...]:
    """Every attention that the model runs, in program order; after `plan` their nodes say what was decided."""
    holders = _Holders(program)
    return tuple(_entries(program, holders, program.main, (), ()))


class _Holders:
    """For each graph, the nodes that are attentions or lead to some."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[str, tuple[Node, ...]] = {}

    def nodes(self, name: str) -> tuple[Node, ...]:
        if name not in self._known:
            self._known[name] = tuple(node for node in self.program[name].nodes if self._leads(node))
        return self._known[name]

    def _leads(self, node: Node) -> bool:
        if node.op == "call":
            return bool(self.nodes(str(node["graph"])))
        if node.op == "repeat":
            return any(self.nodes(graph) for graph, _ in runs(node))
        return node.op in _ATTENTION


def _entries(
    program: Program, holders: _Holders, name: str, scope: tuple[str, ...], indices: Indices
) -> Iterator[AttentionEntry]:
    nodes = holders.nodes(name)
    alone = len(nodes) == 1 and bool(scope) and not indices
    for node in nodes:
        if node.op == "call":
            inner = (*scope, str(node["label"]), *map(str, indices))
            yield from _entries(program, holders, str(node["graph"]), inner, ())
        elif node.op == "repeat":
            for index, body in iterations(node):
                yield from _entries(program, holders, body, scope, (*indices, index))
        else:
            full = path_of(scope, node.name, indices)
            yield _entry(program[name], node, ".".join(scope) if alone else full, full)


def _entry(graph: Graph, node: Node, path: str, full: str) -> AttentionEntry:
    query, key, value = (graph[name].tensor.shape for name in node.inputs[:3])
    return AttentionEntry(
        path, full, graph.name, node, query[-1].constant, value[-1].constant, query[-2], key[-2]
    )


@dataclass(frozen=True)
class Lengths:
    """What the file declares of the run-time lengths."""

    program: Program

    @cached_property
    def _at_most(self) -> dict[str, int]:
        return {dim.name: dim.at_most for dim in self.program.dims if dim.at_most is not None}

    def longest(self, dim: Dim) -> int | None:
        """The largest value of a dim, None where the file sets no limit."""
        if not dim.names <= self._at_most.keys():
            return None
        bound = dim.substitute({name: self._at_most[name] for name in dim.names})
        return max(bound.constant, 1) if bound.constant is not None else None
