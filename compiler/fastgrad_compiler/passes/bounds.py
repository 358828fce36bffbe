"""Bounds of tensors, proved from the program: intervals of entries and norms of rows, with the chain of
reasons.

The analysis follows calls with the facts of each call site, and joins over the sites what it found of a
node; a carried value of a `repeat` is iterated to a fixpoint, and given up where it grows. Weights and
inputs are finite but unknown: whatever is proved here holds during training too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastgrad_compiler.dim import Dim
from fastgrad_compiler.graph import Graph, Node, Program, TensorType
from fastgrad_compiler.passes.bound_facts import Fact, join, tighten, unknown, widen
from fastgrad_compiler.passes.bound_proof import sentence
from fastgrad_compiler.passes.bound_rules import BOUND, DECLINED, MASK_AWARE
from fastgrad_compiler.passes.bound_step import Step

_CONTEXTS = 16  # ways to enter one graph that are told apart; further ones know nothing of their inputs
_ITERATIONS = 3  # of a carried value before it is widened


def prove_bounds(program: Program) -> Program:
    """The program with `bound` set on every node of which something is known.

    A bound holds wherever the node's graph is called. It speaks of visible entries behind a mask, and is
    `asserted` where it rests on `assume_bound`. Types must be there.
    """
    analysis = _Analysis(program)
    for root in filter(None, (program.main, program.objective)):
        analysis.enter(root, tuple(map(_untold, program[root].inputs)))
    return program.with_graphs(
        _annotated(graph, analysis.found.get(graph.name, {})) for graph in program.graphs
    )


def _annotated(graph: Graph, found: dict[str, Fact]) -> Graph:
    nodes = (
        replace(node, bound=found[node.name].bound) if node.name in found and found[node.name].known else node
        for node in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


def _untold(node: Node) -> Fact:
    return unknown(len(node.tensor.shape))


class _Analysis:
    """What is known so far; `found` joins the facts of each node over all contexts in which its graph was
    entered.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.found: dict[str, dict[str, Fact]] = {}
        self._results: dict[str, dict[tuple[Fact, ...], tuple[Fact, ...]]] = {}

    def enter(self, name: str, inputs: tuple[Fact, ...]) -> tuple[Fact, ...]:
        """The facts of a graph's results, given those of its inputs."""
        graph, contexts = self.program[name], self._results.setdefault(name, {})
        if inputs not in contexts and len(contexts) >= _CONTEXTS:
            inputs = tuple(map(_untold, graph.inputs))
        if inputs not in contexts:
            contexts[inputs] = self._run(graph, inputs)
        return contexts[inputs]

    def _run(self, graph: Graph, inputs: tuple[Fact, ...]) -> tuple[Fact, ...]:
        facts: dict[str, tuple[Fact, ...]] = {
            node.name: (fact,) for node, fact in zip(graph.inputs, inputs, strict=True)
        }
        found = self.found.setdefault(graph.name, {})
        for node in graph.nodes:
            if node.op != "input":
                facts[node.name] = self._facts(graph, node, facts)
            if isinstance(node.type, TensorType):
                (fact,) = facts[node.name]
                found[node.name] = join((found[node.name], fact)) if node.name in found else fact
        return tuple(facts[name][0] for name in graph.outputs)

    def _facts(self, graph: Graph, node: Node, facts: dict[str, tuple[Fact, ...]]) -> tuple[Fact, ...]:
        if node.op == "item":
            return (facts[node.inputs[0]][_index(node)],)
        inputs = tuple(facts[name][0] for name in node.inputs if facts[name])
        if node.op == "call":
            return self.enter(str(node["graph"]), inputs)
        if node.op == "repeat":
            return self._repeat(node, inputs)
        if node.op in DECLINED:
            return (unknown(len(node.type.shape)),) if isinstance(node.type, TensorType) else ()
        return (_fact(graph, node, inputs),)

    def _repeat(self, node: Node, inputs: tuple[Fact, ...]) -> tuple[Fact, ...]:
        """Facts that every iteration keeps: the initial ones, joined with what the bodies make of them,
        until stable.
        """
        count = int(str(node["carried"]))
        carried, invariants = inputs[:count], inputs[count:]
        for iteration in range(2 * _ITERATIONS):
            after = tuple(map(_joined, carried, self._bodies(node, carried, invariants)))
            if after == carried:
                return carried
            carried = tuple(map(widen, carried, after)) if iteration >= _ITERATIONS else after
        carried = tuple(unknown(len(fact.norms)) for fact in carried)
        self._bodies(node, carried, invariants)
        return carried

    def _bodies(
        self, node: Node, carried: tuple[Fact, ...], invariants: tuple[Fact, ...]
    ) -> tuple[Fact, ...]:
        """The join of the carried values behind every body, each entered with what the ones before it may
        leave.
        """
        for name in body_names(node):
            carried = tuple(map(_joined, carried, self.enter(name, carried + invariants)))
        return carried


def _joined(left: Fact, right: Fact) -> Fact:
    return join((left, right))


def body_names(node: Node) -> tuple[str, ...]:
    """The graphs that a `repeat` runs, in order."""
    bodies = node["bodies"]
    if not isinstance(bodies, tuple):
        raise TypeError(f"repeat {node.name}: bodies {bodies!r}")
    return tuple(str(body[0]) for body in bodies if isinstance(body, tuple))


def _index(node: Node) -> int:
    return int(str(node["index"]))


def _fact(graph: Graph, node: Node, inputs: tuple[Fact, ...]) -> Fact:
    """The fact of one ordinary node, with its premises' proofs and its own sentence."""
    if not _keeps_masks(node, inputs):
        return unknown(len(node.tensor.shape))
    shapes = tuple(graph[name].tensor.shape for name in node.inputs)
    bare = replace(BOUND[node.op](Step(node, inputs, shapes)), proof=())
    fact = tighten(bare, node.tensor.shape)
    if not fact.known:
        return unknown(len(node.tensor.shape))
    premises = _premises(node, fact, inputs, shapes)
    asserted = fact.asserted or any(premise.asserted for premise in premises)
    own = sentence(node, fact, inputs)
    lines = [line for premise in premises for line in premise.proof] + ([own] if own else [])
    return replace(fact, asserted=asserted, proof=tuple(dict.fromkeys(lines)))


def _keeps_masks(node: Node, inputs: tuple[Fact, ...]) -> bool:
    """Whether the interval rule is right about inputs that hold a mask's fill; a positive factor keeps a
    fill a fill.
    """
    if not any(fact.masked for fact in inputs) or node.op in MASK_AWARE:
        return True
    return (
        node.op in ("mul", "div")
        and all(fact.masked or fact.low > 0 for fact in inputs)
        and (node.op == "mul" or not inputs[1].masked)
    )


def _premises(
    node: Node, fact: Fact, inputs: tuple[Fact, ...], shapes: Sequence[tuple[Dim, ...]]
) -> tuple[Fact, ...]:
    """The inputs on which a fact rests: those without which the rule would have said less."""
    useful = []
    for place, premise in enumerate(inputs):
        if not premise.known or not (premise.proof or premise.asserted):
            continue
        ignorant = unknown(len(premise.norms))
        without = (*inputs[:place], ignorant, *inputs[place + 1 :])
        less = tighten(BOUND[node.op](Step(node, without, tuple(shapes))), node.tensor.shape)
        if replace(less, proof=(), asserted=fact.asserted) != replace(fact, masked=less.masked):
            useful.append(premise)
    return tuple(useful)
