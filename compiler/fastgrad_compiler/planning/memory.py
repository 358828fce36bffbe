"""The budget `memory`: which values of a model are made again in the backward pass, so that a step fits.

Each call of a block may drop its values and make them again, in all iterations of a repeat around it or in the first
ones; if that is not enough, the whole sequence runs in pieces. Of what fits, the plan takes what makes the fewest flops
again. Options that another one beats in what they hold, in their peak and in flops are dropped on the way, no others: by
the model of `analysis/activations.py` none is cheaper.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from fastgrad_compiler.analysis.activations import ALWAYS, Activations, Decisions, Held
from fastgrad_compiler.ir.calls import callees, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program


@dataclass(frozen=True)
class Option:
    """A way to run a graph, and what it holds."""

    decisions: Decisions
    held: Held


def options(program: Program, sizes: Mapping[str, int]) -> list[Option]:
    """The ways to run a model of which none beats another, those that make the least again first."""
    return _Search(program, sizes).of(program.main)


class _Search:
    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.program, self.activations = program, Activations(program, sizes)
        self._known: dict[str, list[Option]] = {}

    def of(self, name: str) -> list[Option]:
        """Of a graph that a call runs."""
        if name not in self._known:
            graph = self.program[name]
            self._known[name] = self._efficient(name, self._combined(graph))
        return self._known[name]

    def _combined(self, graph: Graph) -> Iterator[Decisions]:
        """The decisions on all that a graph runs, those that agree where two of its nodes run one graph."""
        nodes = [node for node in graph.nodes if node.name in graph.alive and runs(node)]
        for chosen in product(*(list(self._of_node(graph, node)) for node in nodes)):
            found: dict[tuple[str, str], int] = {}
            if all(found.setdefault(place, times) == times for each in chosen for place, times in each.items()):
                yield found

    def _of_node(self, graph: Graph, node: Node) -> Iterator[Decisions]:
        if node.op == "call":
            for option in self.of(str(node["graph"])):
                yield option.decisions
            if self._pays(node):
                yield {(graph.name, node.name): ALWAYS}
        else:
            first, bodies = 0, []
            for body, times in runs(node):
                bodies.append(list(self._of_body(self.program[body], first, times)))
                first += times
            for chosen in product(*bodies):
                yield {place: times for each in chosen for place, times in each.items()}

    def _of_body(self, body: Graph, first: int, times: int) -> Iterator[Decisions]:
        """Of the body of a repeat: in its first iterations all calls are made again, in the others as decided."""
        sites = [node for node in body.nodes if node.op == "call" and self._pays(node)]
        for option in self._efficient(body.name, self._combined(body)):
            yield option.decisions
            if any((body.name, node.name) in option.decisions for node in sites):
                continue
            for count in range(1, times + 1):
                again = {(body.name, node.name): ALWAYS if count == times else first + count for node in sites}
                if count < times:
                    again = {**option.decisions, **again}
                if sites:
                    yield again

    def _pays(self, node: Node) -> bool:
        """Whether a call holds values that could be made again."""
        return bool(self.activations.trained.intersection(callees(node))) and (
            self.activations.held(str(node["graph"]), {}).own > 0
        )

    def _efficient(self, name: str, found: Iterator[Decisions]) -> list[Option]:
        """The options that none other beats in all; of equal ones the first."""
        every = [Option(each, self.activations.held(name, each)) for each in found]
        every.sort(key=lambda option: (option.held.again, option.held.own, option.held.peak))
        kept: list[Option] = []
        for option in every:
            mine = option.held
            if not any(
                other.held.own <= mine.own and other.held.peak <= mine.peak and other.held.inputs <= mine.inputs
                for other in kept
            ):
                kept.append(option)
        return kept
