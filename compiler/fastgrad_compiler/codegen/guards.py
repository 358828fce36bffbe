"""The guards of a generated class: one for each attention whose range of logits a run checks."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from fastgrad_compiler.attention.table import is_guarded, stands_alone
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.codegen.names import base, variable
from fastgrad_compiler.codegen.writer import Expr, call, literal, tuple_text
from fastgrad_compiler.ir.calls import callees
from fastgrad_compiler.ir.graph import Graph, Node, Program
from fastgrad_compiler.ir.names import unique

Guards = dict[
    tuple[str, str], str
]  # the attribute that holds the guard of a node, by names of graph and node
GUARD, NAME, STATUS = "Guard", "name_guards", "budget_status"  # of runtime/guard.py


def guards_of(program: Program, graph: Graph, taken: Collection[str]) -> Guards:
    """The guards of a class, of the bodies of its repeats too; `taken` are the labels of its other members."""
    found: Guards = {}
    for owner, node in _guarded(program, graph):
        stem = f"{variable(base(node.name, owner.by_name))}_guard"
        found[owner.name, node.name] = unique(stem, [*taken, *found.values()])
    return found


def _guarded(program: Program, graph: Graph) -> Iterator[tuple[Graph, Node]]:
    for node in graph.nodes:
        if node.op == "repeat":
            for body in callees(node):
                yield from _guarded(program, program[body])
        elif is_guarded(node):
            yield graph, node


def guard_value(program: Program, graph: Graph, node: Node) -> Expr:
    """The expression that makes the guard of an attention."""
    label = None if stands_alone(program, graph.name) else literal(node.name)
    known = Attention.of(node).range
    bounds = [str(literal(bound)) for bound in known.heads]
    return call(
        GUARD,
        *(() if label is None else (label,)),
        bound=tuple_text(bounds) if isinstance(known.bound, tuple) else bounds[0],
        source=literal(known.origin or "asserted"),
        policy=literal(program.on_violation),
    )
