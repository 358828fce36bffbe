"""Bound rules of operations that move entries without changing them."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from fastgrad_compiler.analysis.bounds.facts import (
    Fact,
    join,
    root_size,
    spread,
)
from fastgrad_compiler.analysis.bounds.outward import root_sum_up, root_up, times_up
from fastgrad_compiler.analysis.bounds.step import Rule, Step
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import integer, sequence


def _reshape(step: Step) -> Fact:
    """Row-major order is kept: equal trailing dims keep their axes, the last axis may be cut or joined
    evenly.
    """
    (fact,), (source,), target = step.facts, step.shapes, step.shape
    norms = [inf] * len(target)
    for back in range(1, min(len(source), len(target)) + 1):
        if source[-back] != target[-back]:
            if back == 1:
                norms[-1] = _regrouped(fact.norms[-1], source[-1], target[-1])
            break
        norms[-back] = fact.norms[-back]
    return replace(fact, norms=tuple(norms))


def _regrouped(norm: float, old: Dim, new: Dim) -> float:
    """A row cut into shorter ones, or whole rows joined."""
    if new.terms and old.divide(new) is not None and new.constant:
        return norm
    joined = new.divide(old) if old.constant else None
    return times_up(root_size(joined), norm) if joined is not None else inf


def _permute(step: Step) -> Fact:
    return replace(
        step.fact, norms=tuple(step.fact.norms[integer(axis)] for axis in sequence(step.node["axes"]))
    )


def _split_heads(step: Step) -> Fact:
    fact = step.fact
    *leading, tokens, row = fact.norms
    return replace(fact, norms=(*leading, row, tokens, row))


def _merge_heads(step: Step) -> Fact:
    fact = step.fact
    *leading, heads, tokens, row = fact.norms
    count, width = root_size(step.shapes[0][-3]), root_size(step.shapes[0][-1])
    merged = min(times_up(count, row), times_up(width, heads))
    return replace(fact, norms=(*leading, tokens, merged))


def _repeat_heads(step: Step) -> Fact:
    fact = step.fact
    *leading, heads, tokens, row = fact.norms
    return replace(fact, norms=(*leading, times_up(root_up(step.number("times")), heads), tokens, row))


def _concat(step: Step) -> Fact:
    joined = join(step.facts)
    norms = list(joined.norms)
    norms[step.axis()] = root_sum_up(*(fact.norms[step.axis()] for fact in step.facts))
    return replace(joined, norms=tuple(norms))


def _stack(step: Step) -> Fact:
    joined = join(step.facts)
    norms = list(joined.norms)
    norms.insert(step.rank + step.axis(), inf)
    return replace(joined, norms=tuple(norms))


def _select(step: Step) -> Fact:
    fact = step.fact
    norms = list(fact.norms)
    del norms[step.axis(rank=len(norms))]
    return replace(fact, norms=tuple(norms))


SHAPES: dict[str, Rule] = {
    "reshape": _reshape,
    "permute": _permute,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "repeat_heads": _repeat_heads,
    "concat": _concat,
    "stack": _stack,
    "slice": lambda step: step.fact,
    "select": _select,
    "pad": lambda step: replace(step.fact, low=min(step.fact.low, 0.0), high=max(step.fact.high, 0.0)),
    "patches": lambda step: replace(step.fact, norms=(inf,) * step.rank),
    "broadcast_to": lambda step: replace(step.fact, norms=spread(step.fact, step.shapes[0], step.shape)),
    "embedding": lambda step: replace(step.fact, norms=(*(inf,) * (step.rank - 1), step.fact.norms[-1])),
}
