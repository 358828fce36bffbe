"""The plan: each attention of the model stays exact or becomes a polynomial, as the budget allows; every
decision has a reason.

The budget's `output` and `gradient` are shared out equally: of L approximated attentions each may be off by
1/L of them, by its certificate, with the gain from an attention to the model's output taken as 1. That is
an estimate; the report measures the whole. A rule that cannot be obeyed is refused (FG3xx). Without a
budget nothing is approximated. Attentions whose weights are a polynomial of the model's own need none and take no
share: they were decided when the model was written, and the plan only says below which length they run on all pairs.

A decision is an attribute of the node. Where one graph's attentions are decided differently at different
places, the graph is cloned; equal decisions share one graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from fastgrad_compiler.approximation.polynomial import Family
from fastgrad_compiler.attention.table import AttentionEntry, Lengths, attention_table
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.calls import graphs_with, in_runs, iterations
from fastgrad_compiler.ir.flatten import ROOT, Place
from fastgrad_compiler.ir.graph import Budget, Graph, Node, Program
from fastgrad_compiler.ir.names import UniqueNames
from fastgrad_compiler.ir.words import number
from fastgrad_compiler.planning.apply import applied, decided
from fastgrad_compiler.planning.candidates import MAX_RANK
from fastgrad_compiler.planning.decision import Caps, Case, Decision, Outcome, Refusal, decide, with_gpu
from fastgrad_compiler.planning.own import refuse_own, with_own_lengths
from fastgrad_compiler.planning.refusal import diagnose
from fastgrad_compiler.planning.settings import Settings, check_budget, settings_of
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

__all__ = ["AttentionEntry", "attention_table", "plan_attention", "shared_cases"]


Assignment: TypeAlias = Mapping[str, Sequence[Decision]]  # by full path, one decision for each group of heads

_OUTSIDE = Decision("it is not a part of the model that the budget is for")
_UNREAD = Decision("nothing reads its result, so that it does not run")


def plan_attention(
    program: Program,
    *,
    family: Family = "balanced",
    max_rank: int = MAX_RANK,
    target: str = "auto",
    assignment: Assignment | None = None,
) -> Program:
    """The program with `decision` and `why` on every attention, and the polynomial where it is one.

    `family` serves where no rule names another; no polynomial has a higher rank than `max_rank`. `target` decides how
    fast a polynomial is beside exact attention, and so from which length on it serves. `assignment`, by full path, is
    what calibration chose; attentions that it does not name are decided here, by certificates alone.

    Raises:
        TfgError: FG301-FG311, for rules that are wrong in themselves or cannot be obeyed.
    """
    table = attention_table(program)
    settings, wrong = _settings(program, table)
    assigned = assignment or {}
    others = [entry for entry in table if not entry.attention.is_own]
    unread = {entry.full_path: (_UNREAD,) for entry in others if not entry.runs}
    entries = [entry for entry in others if entry.full_path not in {*assigned, *unread}]
    found = _decide_all(program, entries, settings, family, max_rank, target)
    wrong += _refusals(entries, found)
    wrong += refuse_own([entry for entry in table if entry.attention.is_own], settings, max_rank)
    if wrong:
        raise TfgError(wrong)
    decisions: dict[str, Sequence[Decision]] = dict(assigned)
    decisions |= {path: (outcome,) for path, (outcome, _) in found.items() if isinstance(outcome, Decision)}
    for entry in table:
        if several := decisions.get(entry.full_path):
            case = _case_of(program, entry, settings[entry.full_path], sharing=1, target=target)
            decisions[entry.full_path] = tuple(with_gpu(each, case) for each in several)
    program = with_own_lengths(program, target)
    return _Specialiser(program, {**decisions, **unread}).program_of_decisions()


def shared_cases(program: Program, *, target: str = "auto") -> tuple[tuple[AttentionEntry, Case], ...]:
    """Each attention that runs and a budget could change, with its share of the budget.

    The share of one that the plan without calibration approximates is the plan's. One that stays exact takes none
    there; it gets that of a plan which approximates all.

    Raises:
        TfgError: FG303, for values of the budget that are wrong in themselves.
    """
    table = attention_table(program)
    settings, _ = _settings(program, table)
    entries = [entry for entry in table if entry.runs and not entry.attention.is_own]
    found = _decide_all(program, entries, settings, "balanced", MAX_RANK, target)

    def shared(entry: AttentionEntry) -> Case:
        outcome, case = found[entry.full_path]
        if _is_approximated(outcome):
            return case
        return _case_of(program, entry, case.settings, sharing=len(entries), target=target)

    return tuple((entry, shared(entry)) for entry in entries)


def _settings(
    program: Program, table: Sequence[AttentionEntry]
) -> tuple[dict[str, Settings], list[Diagnostic]]:
    """The rules in force by full path, and what is wrong with rules; TfgError FG303 for values."""
    budget = program.budget or Budget()
    wrong = check_budget(budget, [(entry.path, entry.full_path) for entry in table])
    if any(diagnostic.code == "FG303" for diagnostic in wrong):
        raise TfgError(wrong)
    return {entry.full_path: settings_of(entry.full_path, budget.rules) for entry in table}, wrong


_Decided: TypeAlias = dict[str, tuple[Outcome, Case]]


def _decide_all(
    program: Program,
    entries: Sequence[AttentionEntry],
    settings: Mapping[str, Settings],
    family: Family,
    max_rank: int,
    target: str,
) -> _Decided:
    """By full path, with shares that fit the number of them: fewer approximated attentions, larger shares."""

    def decided(sharing: int) -> _Decided:
        found: _Decided = {}
        known: dict[tuple[str, str, Settings], tuple[Outcome, Case]] = {}
        for entry in entries:
            key = (entry.graph, entry.node.name, settings[entry.full_path])
            if key not in known:
                case = _case_of(
                    program, entry, key[2], sharing=sharing, target=target, family=family, max_rank=max_rank
                )
                known[key] = decide(case), case
            found[entry.full_path] = known[key]
        return found

    sharing = max(len(entries), 1)
    found = decided(sharing)
    while 0 < (served := _approximated(found)) < sharing:
        larger = decided(served)
        if _approximated(larger) > served:
            break
        sharing, found = served, larger
    note = _note(program.budget or Budget(), sharing)
    return {path: (_with_note(outcome, note), case) for path, (outcome, case) in found.items()}


def _approximated(found: _Decided) -> int:
    return sum(_is_approximated(outcome) for outcome, _ in found.values())


def _is_approximated(outcome: Outcome) -> bool:
    return isinstance(outcome, Decision) and outcome.polynomial is not None


def _case_of(
    program: Program,
    entry: AttentionEntry,
    settings: Settings,
    *,
    sharing: int,
    target: str,
    family: Family = "balanced",
    max_rank: int = MAX_RANK,
) -> Case:
    """All that the decision of one attention depends on, with the budget shared equally by `sharing`."""
    lengths, budget = Lengths(program), program.budget or Budget()
    caps = Caps(
        relative=float(str(settings.relative.value)) if settings.relative else None,
        output=None if budget.output is None else budget.output / sharing,
        gradient=None if budget.gradient is None else budget.gradient / sharing,
    )
    return Case(
        entry.node,
        settings,
        caps,
        family,
        max_rank,
        entry.d,
        entry.dv,
        (lengths.longest(entry.queries), lengths.longest(entry.keys)),
        entry.queries == entry.keys,
        budget.near,
        target,
        program.trust == "certified",
        entry.groups,
    )


def _note(budget: Budget, sharing: int) -> str:
    """How the budget was shared out among polynomials, and what that leaves open."""
    limits = (("output", budget.output), ("gradient", budget.gradient))
    told = " and ".join(f"{name} <= {number(limit)}" for name, limit in limits if limit is not None)
    shared = f"{told} shared equally by {sharing}, layer gains taken as 1"
    return f"; {shared}: the report measures the whole" if told else ""


def _with_note(outcome: Outcome, note: str) -> Outcome:
    if isinstance(outcome, Decision) and outcome.polynomial:
        return replace(outcome, why=outcome.why + note)
    return outcome


def _refusals(entries: Iterable[AttentionEntry], found: _Decided) -> list[Diagnostic]:
    """One diagnostic for each distinct refusal, with the paths that it concerns."""
    grouped: dict[tuple[Refusal, Settings], list[AttentionEntry]] = {}
    for entry in entries:
        outcome, case = found[entry.full_path]
        if isinstance(outcome, Refusal):
            grouped.setdefault((outcome, case.settings), []).append(entry)
    return [diagnose(refusal, found[group[0].full_path][1], group) for (refusal, _), group in grouped.items()]


# ---------------------------------------------------------------- decisions on nodes


class _Specialiser:
    """Copies of graphs for each way in which their attentions are decided; the first way keeps the graph's
    name.
    """

    def __init__(self, program: Program, decisions: Mapping[str, Sequence[Decision]]) -> None:
        self.program = program
        self.decisions = decisions
        self._names = UniqueNames(program.by_name)
        self._variants: dict[str, dict[tuple[Node, ...], str]] = {}
        self._touched = graphs_with(program, lambda node: node.op == "attention")

    def program_of_decisions(self) -> Program:
        """The program whose nodes hold the decisions; variants stand after the graph they were made from."""
        self.variant(self.program.main, ROOT)
        graphs: list[Graph] = []
        for graph in self.program.graphs:
            variants = self._variants.get(graph.name, {graph.nodes: graph.name})
            graphs += (
                replace(graph, name=name, nodes=tuple(map(_outside, nodes)))
                for nodes, name in variants.items()
            )
        return self.program.with_graphs(graphs)

    def variant(self, name: str, place: Place) -> str:
        """The graph to run for `name` at a place."""
        if name not in self._touched:
            return name
        graph = self.program[name]
        nodes = tuple(each for node in graph.nodes for each in self._nodes(graph, node, place))
        variants = self._variants.setdefault(name, {})
        if nodes not in variants:
            variants[nodes] = self._names.take(name) if variants else name
        return variants[nodes]

    def _nodes(self, graph: Graph, node: Node, place: Place) -> tuple[Node, ...]:
        if node.op == "attention":
            return applied(graph, node, self.decisions[place.path(node.name)], self.program.multiples)
        if node.op == "call":
            return (node.with_attributes(graph=self.variant(str(node["graph"]), place.called(node))),)
        if node.op == "repeat":
            names = [self.variant(body, place.repeated(index)) for index, body in iterations(node)]
            return (node.with_attributes(bodies=in_runs(names)) if names else node,)
        return (node,)


def _outside(node: Node) -> Node:
    undecided = node.op == "attention" and Attention.of(node).verdict is None
    return decided(node, _OUTSIDE) if undecided else node
