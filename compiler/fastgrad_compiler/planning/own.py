"""Attentions whose weights are a polynomial of the model's own.

Nothing is to be decided but from which length on states take less time than all pairs. Some cannot be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fastgrad_compiler.attention.table import AttentionEntry, is_own
from fastgrad_compiler.attention.value import Attention
from fastgrad_compiler.ir.graph import BudgetRule, Graph, Node, Program
from fastgrad_compiler.planning.candidates import highest_degree, over_rank
from fastgrad_compiler.planning.cost import Way, shape_of
from fastgrad_compiler.planning.refusal import named, narrower, places
from fastgrad_compiler.planning.settings import Settings
from fastgrad_compiler.planning.target_cost import dense_break_even
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_grammar.diagnostics import Diagnostic


def refuse_own(
    entries: Iterable[AttentionEntry], settings: Mapping[str, Settings], max_rank: int
) -> list[Diagnostic]:
    """FG311 for rules that would change such an attention, FG307 where its rank is over the limit.

    One diagnostic for each rule, or for each place in the file, with the paths that it concerns.
    """
    asked: dict[BudgetRule, list[AttentionEntry]] = {}
    large: dict[tuple[str, str], list[AttentionEntry]] = {}
    for entry in entries:
        rule = settings[entry.full_path].asked
        if rule is not None:
            asked.setdefault(rule, []).append(entry)
        if entry.rank is not None and entry.rank > max_rank:
            large.setdefault((entry.graph, entry.node.name), []).append(entry)
    found = [_fixed(rule, group) for rule, group in asked.items()]
    return found + [_too_large(group, max_rank) for group in large.values()]


def with_own_lengths(program: Program, target: str) -> Program:
    """The program in which such attentions have the lengths below which they are computed on all pairs."""
    return program.with_graphs(
        replace(
            graph,
            nodes=tuple(_with_lengths(graph, node, target) if is_own(node) else node for node in graph.nodes),
        )
        for graph in program.graphs
    )


def _with_lengths(graph: Graph, node: Node, target: str) -> Node:
    """A width that is known at run time only gives no length."""
    attention = Attention.of(node)
    shapes = attention.by_role([graph[name].tensor.shape for name in node.inputs])
    d, dv = (shapes[role][-1].constant for role in ("q", "v"))
    polynomial, verdict = attention.polynomial, attention.verdict
    if d is None or dv is None or polynomial is None or verdict is None:
        return node
    shape, way = shape_of(attention, 1, 1, d, dv), Way(polynomial.degree, attention.near)
    even, on_gpu = (dense_break_even(target, shape, way, on_gpu=gpu) for gpu in (False, True))
    dense = f"; on all pairs below {_lengths(even, on_gpu)}, where that is faster (estimate)"
    why = verdict.why + (dense if even or on_gpu else "")
    found = replace(verdict, why=why, break_even=even, break_even_gpu=on_gpu)
    return replace(attention, verdict=found).on(node)


def _lengths(even: int, on_gpu: int) -> str:
    """Two lengths, not both 0, in words."""
    if not even:
        return f"{on_gpu:,} tokens on a GPU"
    if even == on_gpu:
        return f"{even:,} tokens"
    return f"{even:,} tokens ({on_gpu:,} on a GPU)" if on_gpu else f"{even:,} tokens, but not on a GPU"


def _fixed(rule: BudgetRule, group: Sequence[AttentionEntry]) -> Diagnostic:
    first = group[0]
    return Diagnostic(
        "FG311",
        f"{named(group)}: its weights are a polynomial of the model's own, which no budget changes",
        rule.span if rule.span is not None else first.node.span,
        f"`{rule.kind}` is for what a polynomial approximates",
        notes=tuple(places(first)),
        help=(
            "it needs no rule: its error is 0",
            f'if the pattern is also for others, put after it: at "{first.path}" exact',
        ),
    )


def _too_large(group: Sequence[AttentionEntry], max_rank: int) -> Diagnostic:
    first = group[0]
    polynomial = first.attention.polynomial
    assert polynomial is not None
    d, degree = first.d or 1, polynomial.degree
    text = over_rank(d, degree, max_rank)
    help_ = narrower(degree, max_rank, d)
    lower = min(degree - 1, highest_degree(d, max_rank)) // 2 * 2
    if lower:
        help_.append(f"a polynomial of degree {lower} has rank {rank(d, lower):,}")
    return Diagnostic(
        "FG307",
        f"{named(group)}: {text}",
        first.node.span,
        notes=tuple(places(first)[1:]),
        help=tuple(help_),
    )
