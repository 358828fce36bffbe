"""The attentions of a program by path: one entry for each place where one runs, however few graphs hold
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from fastgrad_compiler.attention.value import ATTENTION, Attention
from fastgrad_compiler.ir.calls import callees, graphs_with, iterations
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.flatten import ROOT, Place
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_grammar.source import Span

LIBRARY = "std/"  # how the paths of the standard library's sources begin


def is_own(node: Node) -> bool:
    """Whether a node is an attention whose weights are the model's own polynomial."""
    return node.op in ATTENTION and Attention.of(node).is_own


def is_guarded(node: Node) -> bool:
    """Whether a node is an attention whose logits a run checks."""
    return node.op == "poly_attention" and Attention.of(node).is_guarded


@dataclass(frozen=True)
class AttentionEntry:
    """One attention of the model.

    `full_path` is its calls' labels and its own name; `path` is what users are shown, the calls' labels
    alone where the called graph holds no other attention. `d`, `dv` are the widths of queries and values,
    None where known at run time only; `queries` and `keys` the two lengths; `heads` and `key_heads` 1 where known at
    run time only; `calls` are the places of the enclosing calls, outermost first, and `turns` the indices of the
    repeats that each stands in. `runs`: whether a result of the model needs it.
    """

    path: str
    full_path: str
    graph: str
    node: Node
    d: int | None
    dv: int | None
    queries: Dim
    keys: Dim
    heads: int = 1
    key_heads: int = 1
    calls: tuple[Span, ...] = field(default=(), compare=False, repr=False)
    turns: tuple[tuple[int, ...], ...] = field(default=(), compare=False, repr=False)
    runs: bool = True

    @cached_property
    def attention(self) -> Attention:
        """What the node says of it."""
        return Attention.of(self.node)

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return max(1, self.heads // self.key_heads)

    @property
    def span(self) -> Span | None:
        """Where the user wrote it: the attention itself, or the innermost call that is not in the library."""
        spans = [span for span in (self.node.span, *reversed(self.calls)) if span is not None]
        own = (span for span in spans if not span.source.path.startswith(LIBRARY))
        return next(own, spans[0] if spans else None)

    @property
    def place(self) -> str:
        """`gpt.tfg:12:9` of `span`, empty for a program without a source."""
        return self.span.place if self.span else ""

    @property
    def rank(self) -> int | None:
        """Monomials of the polynomial's features; None for an exact attention."""
        polynomial = self.attention.polynomial
        return rank(self.d, polynomial.degree) if polynomial is not None and self.d is not None else None


def attention_table(program: Program) -> tuple[AttentionEntry, ...]:
    """Every attention of the model, in program order; after `plan` their nodes say what was decided.

    Without polynomials of the model's own that no result needs: nothing is decided of them, and they never run.
    """
    entries = _entries(program, _holders(program), program[program.main])
    return tuple(entry for entry in entries if entry.runs or not entry.attention.is_own)


def stands_alone(program: Program, graph: str) -> bool:
    """Whether a graph that a call runs holds one attention, itself and no other: its path is that of the call."""
    nodes = _holders(program)[graph]
    return _is_called(program, graph) and len(nodes) == 1 and nodes[0].op in ATTENTION


def _is_called(program: Program, graph: str) -> bool:
    """Whether calls run a graph; others are the model's own, and bodies of repeats."""
    return any(node.op == "call" and node["graph"] == graph for each in program.graphs for node in each.nodes)


_Holders: TypeAlias = "Mapping[str, tuple[Node, ...]]"
"""For each graph, the nodes that are attentions or lead to some."""


def _holders(program: Program) -> _Holders:
    graphs = graphs_with(program, lambda node: node.op in ATTENTION)

    def leads(node: Node) -> bool:
        return node.op in ATTENTION or not graphs.isdisjoint(callees(node))

    return {graph.name: tuple(filter(leads, graph.nodes)) for graph in program.graphs}


def _entries(
    program: Program,
    holders: _Holders,
    graph: Graph,
    place: Place = ROOT,
    calls: tuple[tuple[Span, tuple[int, ...]], ...] = (),
    runs: bool = True,
) -> Iterator[AttentionEntry]:
    """Of a graph that runs at a place, inside the calls at these spans and turns."""
    nodes = holders[graph.name]
    alone = len(nodes) == 1 and bool(place.scope) and not place.indices
    for node in nodes:
        needed = runs and node.name in graph.alive
        if node.op == "call":
            inside = (*calls, (node.span, place.indices)) if node.span else calls
            called = program[str(node["graph"])]
            yield from _entries(program, holders, called, place.called(node), inside, needed)
        elif node.op == "repeat":
            for index, body in iterations(node):
                yield from _entries(program, holders, program[body], place.repeated(index), calls, needed)
        else:
            query, key, value = (graph[name].tensor.shape for name in node.inputs[:3])
            full = place.path(node.name)
            yield AttentionEntry(
                path=".".join(place.scope) if alone else full,
                full_path=full,
                graph=graph.name,
                node=node,
                d=query[-1].constant,
                dv=value[-1].constant,
                queries=query[-2],
                keys=key[-2],
                heads=query[-3].constant or 1,
                key_heads=key[-3].constant or 1,
                calls=tuple(span for span, _ in calls),
                turns=tuple(turns for _, turns in calls),
                runs=needed,
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
