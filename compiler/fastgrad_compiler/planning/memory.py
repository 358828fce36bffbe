"""The budget `memory`: which values of a model are made again in the backward pass, so that a step fits.

Each call of a block may drop its values and make them again, in all iterations of a repeat around it or in the first
ones; if that is not enough, the whole sequence runs in pieces (`planning/pieces.py`). The search keeps few options of
each graph, so a bound from below says how far from the fastest its plan is at most: each byte that has to go costs at
least what the cheapest call that holds it costs for each of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf

from fastgrad_compiler.ir.calls import callees, reachable, runs
from fastgrad_compiler.ir.graph import Graph, Node, Program, integer
from fastgrad_compiler.planning.activations import ALWAYS, Activations, Decisions, Held

ALIKE = 0.03  # options whose bytes differ by less than this share count as one
MOST_COUNTS = 32  # of numbers of iterations of one repeat that are tried
BACKWARD = 2.0  # flops of a backward pass for each of the forward pass


@dataclass(frozen=True)
class Option:
    """A way to run a step, and what it holds."""

    decisions: Decisions
    held: Held


class Search:
    """The ways to run a training step of a program at some sizes of its dims."""

    def __init__(self, program: Program, sizes: Mapping[str, int]) -> None:
        self.program, self.activations = program, Activations(program, sizes)
        self.root = program.training or program.main
        self._known: dict[str, list[Decisions]] = {}

    def held(self, decisions: Decisions) -> Held:
        """What a step holds: the model and its objective, where there is one."""
        of_model = self.activations.held(self.root, decisions)
        if self.program.training is not None:
            return of_model
        if self.program.objective is None:
            results = [self.program[self.root][name] for name in self.program[self.root].outputs]
            loss = Held(0.0, frozenset(), frozenset(), sum(self.activations.bytes(x.tensor) for x in results))
        else:
            loss = self.activations.held(self.program.objective, {})
        peak = max(of_model.peak, of_model.own + loss.peak)
        return Held(of_model.own + loss.own, of_model.inputs, of_model.outputs, peak, of_model.again)

    def options(self) -> list[Option]:
        """The ways of which none beats another, by flops that are done again, then bytes at the peak."""
        every = [Option(each, self.held(each)) for each in self._of(self.root)]
        kept: list[Option] = []
        for option in sorted(every, key=lambda each: (each.held.again, each.held.peak)):
            if not kept or option.held.peak < kept[-1].held.peak:
                kept.append(option)
        return kept

    @property
    def forward(self) -> float:
        """Flops of the forward pass of a step."""
        objective = self.program.objective if self.program.training is None else None
        return self.activations.flops(self.root) + (self.activations.flops(objective) if objective else 0.0)

    def time(self, again: float) -> float:
        """Of a step, over that of one that makes nothing again."""
        whole = (1.0 + BACKWARD) * self.forward
        return (whole + again) / whole if whole else 1.0

    def least_again(self, limit: float) -> float:
        """Flops that every plan of at most so many bytes makes again, by the model; inf where there is none."""
        need = self.held({}).own - limit
        total = 0.0
        for price, size in sorted(self._prices(self.root, inf, 1)):
            if need <= 0 or price == inf:
                break
            total += price * min(size, need)
            need -= size
        return inf if need > 0 else total

    # ------------------------------------------------------------ the search

    def _of(self, name: str) -> list[Decisions]:
        """Few of the decisions on all that a graph runs, those that are best by its own bytes."""
        if name not in self._known:
            graph = self.program[name]
            found: list[Decisions] = [{}]
            for choices in self._choices(graph):
                found = self._thinned(name, _merged(found, choices))
            self._known[name] = found
        return self._known[name]

    def _choices(self, graph: Graph) -> Iterator[list[Decisions]]:
        for node in graph.nodes:
            if node.name not in graph.alive or node.is_fused:
                continue
            if node.op == "call":
                again: list[Decisions] = [{(graph.name, node.name): ALWAYS}] if self._pays(node) else []
                yield [*self._of(str(node["graph"])), *again]
            elif node.op == "repeat":
                yield from self._of_repeat(node)

    def _of_repeat(self, node: Node) -> Iterator[list[Decisions]]:
        """By body: in the first iterations all its calls are made again, in the others as decided."""
        ends: dict[str, list[int]] = {}
        first = 0
        for body, times in runs(node):
            ends.setdefault(body, []).extend(range(first + 1, first + times + 1))
            first += times
        for body, every in ends.items():
            yield list(self._of_body(self.program[body], every))

    def _of_body(self, body: Graph, ends: Sequence[int]) -> Iterator[Decisions]:
        sites = [node for node in body.nodes if node.op == "call" and self._pays(node)]
        own = {(body.name, node.name) for node in sites}
        step = ceil(len(ends) / MOST_COUNTS)
        inner = frozenset(graph for node in sites for graph in self.activations.reach[str(node["graph"])])
        for decided in self._of(body.name):
            yield decided
            # what is made again within what is made again would run a third time
            if sites and not any(graph in inner or (graph, node) in own for graph, node in decided):
                for end in ends[step - 1 : -1 : step]:
                    yield {**decided, **{(body.name, node.name): end for node in sites}}
        if sites:
            yield {(body.name, node.name): ALWAYS for node in sites}

    def _pays(self, node: Node) -> bool:
        """Whether a call holds values that could be made again."""
        return (
            not node.is_fused
            and bool(self.activations.trained.intersection(callees(node)))
            and self.activations.held(str(node["graph"]), {}).own > 0
        )

    def _thinned(self, name: str, found: Iterable[Decisions]) -> list[Decisions]:
        """Those that no other is about as good as in all, and the one of the lowest peak."""
        every = [Option(each, self.activations.held(name, each)) for each in found]
        every.sort(key=lambda option: (option.held.again, option.held.own, option.held.peak))
        kept: list[Option] = []
        for option in every:
            if not any(_is_as_good(other.held, option.held) for other in kept):
                kept.append(option)
        lowest = min(every, key=lambda option: (option.held.peak, option.held.again))
        if all(option is not lowest for option in kept):
            kept.append(lowest)
        return [option.decisions for option in kept]

    # ------------------------------------------------------------ the bound

    def _prices(self, name: str, price: float, times: int) -> Iterator[tuple[float, float]]:
        """(flops for each byte, bytes): what calls within a graph could save, each byte at its lowest price."""
        graph = self.program[name]
        own = self.activations.held(name, {}).own
        for node in graph.nodes:
            if node.name not in graph.alive:
                continue
            for callee, count in runs(node):
                inner = self.activations.held(callee, {}).own
                own -= count * inner
                pays = node.op == "call" and self._pays(node)
                best = min(price, self.activations.flops(callee) / inner) if pays else price
                yield from self._prices(callee, best, times * count)
        yield price, times * max(own, 0.0)


def recomputed(program: Program) -> Decisions:
    """The decisions that the calls of a program carry, of graphs that a training step runs."""
    run = reachable(program.by_name, [program.training or program.main])
    marked = (
        ((graph.name, node.name), node["recompute"])
        for graph in run
        for node in graph.nodes
        if node.get("recompute") is not None
    )
    return {place: ALWAYS if times is True else integer(times) for place, times in marked}


def in_bytes(value: float) -> str:
    """Bytes for a reader, in the units in which a budget is written: `2.3 GB`."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} bytes"


def _is_as_good(one: Held, other: Held) -> bool:
    most = 1.0 + ALIKE
    return one.own <= most * other.own and one.peak <= most * other.peak and one.inputs <= other.inputs


def _merged(found: Iterable[Decisions], choices: Sequence[Decisions]) -> Iterator[Decisions]:
    """Each with each, except those that contradict each other about a call."""
    for decided in found:
        for choice in choices:
            if all(decided.get(place, times) == times for place, times in choice.items()):
                yield {**decided, **choice}
