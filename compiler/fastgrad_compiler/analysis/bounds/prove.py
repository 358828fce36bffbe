"""Bounds of tensors, proved from the program: intervals of entries and norms of rows, with the chain of
reasons.

The analysis follows calls with the facts of each call site, and joins over the sites what it found of a
node; a carried value of a `repeat` is iterated to a fixpoint, and given up where it grows. Weights and
inputs are finite but unknown: whatever is proved here holds during training too.

The program is read without the user's word, and once more with it where `assume_bound` stands in it: what the second
reading adds is asserted, what the first one gives is proved, by whatever operations an assertion came.

A softmax attention may be served by a polynomial. Of its result only what both have in common is used: rows are means
of values, with weights of at least 0 that add up to 1, or 0 where a query sees no key. The plan takes no polynomial
whose weights may turn negative (`plan_decision.py`), so that bounds hold of what runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from fastgrad_compiler.analysis.bounds.facts import Fact, join, tighten, unknown, widen
from fastgrad_compiler.analysis.bounds.proof import ASSUMED, sentence
from fastgrad_compiler.analysis.bounds.rules import BOUND, DECLINED
from fastgrad_compiler.analysis.bounds.step import Step
from fastgrad_compiler.attention.pattern import match
from fastgrad_compiler.ir.calls import runs
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Bound, Graph, Node, Program, TensorType, integer

_CONTEXTS = 16  # ways to enter one graph that are told apart; further ones know nothing of their inputs
_ITERATIONS = 3  # of a carried value before it is widened


_Means: TypeAlias = "Mapping[tuple[str, str], tuple[str, bool]]"
"""Attentions, as (graph, node): the node of their values, and whether both hold transposes."""

_Axis = TypeVar("_Axis")

_ASSERTED = "it rests on what assume_bound says in the file, not on proof"


def prove_bounds(program: Program) -> Program:
    """The program with `bound` set on every node of which something is known.

    A bound holds wherever the node's graph is called. It speaks of visible entries after a mask, and is
    `asserted` where it rests on `assume_bound`; a budget with `trust = certified` lets nothing rest on that. Types must
    be there.
    """
    means: dict[tuple[str, str], tuple[str, bool]] = {}
    while True:
        proved = _with_bounds(program, means)
        found = _means(proved)
        if found.keys() <= means.keys():
            return proved
        means |= found


def _means(program: Program) -> dict[tuple[str, str], tuple[str, bool]]:
    """The attentions that are recognised with these bounds and that a polynomial may serve."""
    found = {}
    for graph in program.graphs:
        for node in graph.nodes:
            attention = match(graph, node) if node.op in ("matmul", "div") else None
            if attention is not None and not attention.coefficients:
                found[graph.name, node.name] = attention.value, attention.transposed
    return found


def _with_bounds(program: Program, means: _Means) -> Program:
    told = program.trust != "certified" and any(
        node.op == "assume_bound" for graph in program.graphs for node in graph.nodes
    )
    readings = [_read(program, means, word) for word in ((False, True) if told else (False,))]
    return program.with_graphs(
        _annotated(graph, *(reading.get(graph.name, {}) for reading in readings)) for graph in program.graphs
    )


def _read(program: Program, means: _Means, told: bool) -> dict[str, dict[str, Fact]]:
    """The facts of each node of each graph; `told`: with the user's word."""
    analysis = _Analysis(program, means, told)
    for root in program.roots:
        analysis.enter(root, tuple(map(_untold, program[root].inputs)))
    return analysis.found


def _annotated(graph: Graph, proved: Mapping[str, Fact], told: Mapping[str, Fact] | None = None) -> Graph:
    def annotated(node: Node) -> Node:
        fact = proved.get(node.name)
        if fact is None:
            return node
        word = fact if told is None else told.get(node.name, fact)
        return replace(node, bound=_bound(fact, word)) if fact.known or word.known else node

    return replace(graph, nodes=tuple(map(annotated, graph.nodes)))


def _bound(proved: Fact, told: Fact) -> Bound:
    """What both say together; it is asserted unless the proof alone says as much."""
    bound, word = proved.bound, told.bound
    narrowest = Bound(max(bound.low, word.low), min(bound.high, word.high), min(bound.norm, word.norm))
    if narrowest == replace(bound, proof=()):
        return bound
    named = any(ASSUMED in line for line in word.proof)
    return replace(narrowest, asserted=True, proof=word.proof if named else (*word.proof, _ASSERTED))


def _untold(node: Node) -> Fact:
    return unknown(len(node.tensor.shape))


class _Analysis:
    """What is known so far; `found` joins the facts of each node over all contexts in which its graph was
    entered.
    """

    def __init__(self, program: Program, means: _Means, told: bool) -> None:
        self.program = program
        self.means = means
        self.told = told
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
            return (facts[node.inputs[0]][integer(node["index"])],)
        inputs = tuple(facts[name][0] for name in node.inputs if facts[name])
        if node.op == "call":
            return self.enter(str(node["graph"]), inputs)
        if node.op == "repeat":
            return self._repeat(node, inputs)
        if node.op in DECLINED:
            return (unknown(len(node.type.shape)),) if isinstance(node.type, TensorType) else ()
        if node.op == "assume_bound" and not self.told:
            return inputs
        if (graph.name, node.name) in self.means:
            return (self._mean(graph, node, facts),)
        return (_fact(graph, node, inputs),)

    def _mean(self, graph: Graph, node: Node, facts: dict[str, tuple[Fact, ...]]) -> Fact:
        """Of an attention: the rule of the node that will stand there."""
        value, transposed = self.means[graph.name, node.name]
        (fact,), type_ = facts[value], graph[value].tensor
        if not transposed:
            return _ruled(replace(node, op="attention"), (fact,) * 3, (type_.shape,) * 3)
        rows = replace(node, op="attention", type=replace(node.tensor, shape=_swapped(node.tensor.shape)))
        values = replace(fact, norms=_swapped(fact.norms))
        mean = _ruled(rows, (values,) * 3, (_swapped(type_.shape),) * 3)
        return replace(mean, norms=_swapped(mean.norms))

    def _repeat(self, node: Node, inputs: tuple[Fact, ...]) -> tuple[Fact, ...]:
        """Facts that every iteration keeps: the initial ones, joined with what the bodies make of them,
        until stable.
        """
        count = integer(node["carried"])
        carried, invariants = inputs[:count], inputs[count:]
        for iteration in range(2 * _ITERATIONS):
            after = tuple(map(_joined, carried, self._bodies(node, carried, invariants)))
            if after == carried:
                return carried
            carried = tuple(map(widen, carried, after)) if iteration >= _ITERATIONS else after
        carried = tuple(unknown(len(fact.norms), fact.masked) for fact in carried)
        self._bodies(node, carried, invariants)
        return carried

    def _bodies(
        self, node: Node, carried: tuple[Fact, ...], invariants: tuple[Fact, ...]
    ) -> tuple[Fact, ...]:
        """The join of the carried values after every body, each entered with what the ones before it may
        leave.
        """
        for name, _ in runs(node):
            carried = tuple(map(_joined, carried, self.enter(name, carried + invariants)))
        return carried


def _joined(left: Fact, right: Fact) -> Fact:
    return join((left, right))


def _swapped(axes: tuple[_Axis, ...]) -> tuple[_Axis, ...]:
    """The last two exchanged."""
    return (*axes[:-2], axes[-1], axes[-2])


def _fact(graph: Graph, node: Node, inputs: tuple[Fact, ...]) -> Fact:
    """The fact of one ordinary node, with its premises' proofs and its own sentence."""
    return _ruled(node, inputs, tuple(graph[name].tensor.shape for name in node.inputs))


def _ruled(node: Node, inputs: tuple[Fact, ...], shapes: Sequence[tuple[Dim, ...]]) -> Fact:
    fact = _bare(node, inputs, shapes)
    if not fact.known:
        return fact
    own = sentence(node, fact, inputs)
    lines = [line for premise in _premises(node, fact, inputs, shapes) for line in premise.proof]
    return replace(fact, proof=tuple(dict.fromkeys([*lines, *filter(None, [own])])))


def _bare(node: Node, inputs: tuple[Fact, ...], shapes: Sequence[tuple[Dim, ...]]) -> Fact:
    """What the rule says, without proof."""
    shape = node.tensor.shape
    fact = tighten(replace(BOUND[node.op](Step(node, inputs, tuple(shapes))), proof=()), shape)
    return fact if fact.known else unknown(len(shape), fact.masked)


def _premises(
    node: Node, fact: Fact, inputs: tuple[Fact, ...], shapes: Sequence[tuple[Dim, ...]]
) -> tuple[Fact, ...]:
    """The inputs whose proofs are told: those without which the rule would have said less; all of them where it
    would say less without the others together.
    """
    proved = [place for place, premise in enumerate(inputs) if premise.proof]

    def less(without: Sequence[int]) -> bool:
        left = (unknown(len(each.norms)) if i in without else each for i, each in enumerate(inputs))
        return replace(_bare(node, tuple(left), shapes), masked=fact.masked) != fact

    useful = [place for place in proved if less([place])]
    others = [place for place in proved if place not in useful]
    return tuple(inputs[place] for place in (proved if len(others) > 1 and less(others) else useful))
