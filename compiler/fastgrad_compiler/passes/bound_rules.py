"""BOUND: for each operation, what its inputs' bounds say of its result.

A rule takes a `Step` and returns a Fact without proof; `bounds.py` adds the sentence and the premises.
Every rule is sound for real arithmetic; a rule that knows nothing returns `unknown`. `DECLINED` names the
operations that have no rule, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf, sqrt

from fastgrad_compiler.graph import Attribute
from fastgrad_compiler.passes.bound_arithmetic import ARITHMETIC
from fastgrad_compiler.passes.bound_facts import (
    Fact,
    interval,
    join,
    size,
    times,
    unknown,
)
from fastgrad_compiler.passes.bound_shapes import SHAPES
from fastgrad_compiler.passes.bound_step import Rule, Step


def _nothing(step: Step) -> Fact:
    return unknown(step.rank)


def _range(low: float, high: float) -> Rule:
    return lambda step: interval(low, high, step.rank)


# ---------------------------------------------------------------- constants


def _constant(step: Step) -> Fact:
    return interval(step.number("value"), step.number("value"), step.rank)


def _literal(step: Step) -> Fact:
    numbers = list(_numbers(step.node["values"]))
    return interval(min(numbers), max(numbers), step.rank)


def _numbers(values: Attribute) -> Iterator[float]:
    if isinstance(values, tuple):
        for value in values:
            yield from _numbers(value)
    elif isinstance(values, int | float):
        yield float(values)


def _arange(step: Step) -> Fact:
    return interval(0.0, max(size(step.shape[0]) - 1, 0.0), 1)


def _one_hot(step: Step) -> Fact:
    return Fact(0.0, 1.0, (*(inf,) * (step.rank - 1), 1.0))


# ---------------------------------------------------------------- reductions and normalisations


def _axes(step: Step) -> set[int]:
    axes, rank = step.node["axes"], len(step.shapes[0])
    if not isinstance(axes, tuple):
        raise TypeError(f"{step.node.op} {step.node.name}: axes {axes!r}")
    return {axis % rank for axis in axes if isinstance(axis, int)}


def _sum(step: Step) -> Fact:
    count = 1.0
    for axis in _axes(step):
        count *= size(step.shapes[0][axis])
    fact = step.facts[0]
    return interval(times(count, fact.low), times(count, fact.high), step.rank)


def _mean(step: Step) -> Fact:
    """A mean of vectors is no longer than the longest."""
    fact, reduced, keep = step.facts[0], _axes(step), bool(step.node["keepdim"])
    norms = [
        inf if axis in reduced else norm
        for axis, norm in enumerate(fact.norms)
        if keep or axis not in reduced
    ]
    return Fact(fact.low, fact.high, tuple(norms))


def _softmax(step: Step) -> Fact:
    norms = [inf] * step.rank
    norms[step.axis()] = 1.0
    return Fact(0.0, 1.0, tuple(norms))


def _normalize_rows(step: Step) -> Fact:
    """Shares of a sum of what is not negative."""
    if step.facts[0].low < 0:
        return unknown(step.rank)
    return Fact(0.0, 1.0, (*(inf,) * (step.rank - 1), 1.0))


def _rms_norm(step: Step) -> Fact:
    """Rows of norm sqrt(d), each entry times its weight."""
    row = times(sqrt(size(step.shape[-1])), step.facts[1].magnitude)
    return Fact(-row, row, (*(inf,) * (step.rank - 1), row))


def _layer_norm(step: Step) -> Fact:
    row = times(sqrt(size(step.shape[-1])), step.facts[1].magnitude) + step.facts[2].norms[-1]
    return Fact(-row, row, (*(inf,) * (step.rank - 1), row))


def _unit(step: Step) -> Fact:
    fact = step.facts[0]
    low, high = (0.0 if fact.low >= 0 else -1.0), (0.0 if fact.high <= 0 else 1.0)
    return Fact(low, high, (*(inf,) * (step.rank - 1), 1.0))


# ---------------------------------------------------------------- attention, position, other


def _mask(step: Step) -> Fact:
    return replace(step.facts[0], norms=(inf,) * step.rank, masked=True)


def _near_far(step: Step) -> Fact:
    return replace(join(step.facts), norms=(inf,) * step.rank)


def _assume_bound(step: Step) -> Fact:
    """The user's word, where it is taken (`bounds.py`)."""
    fact, limit = step.facts[0], step.number("bound")
    return replace(fact, low=max(fact.low, -limit), high=min(fact.high, limit))


def _rotary(step: Step) -> Fact:
    """Pairs of a row are rotated: rows keep their norm; along other axes two entries mix, at most sqrt(2)
    of either.
    """
    fact = step.facts[0]
    most = min(fact.norms[-1], sqrt(2) * fact.magnitude)
    others = tuple(sqrt(2) * norm for norm in fact.norms[:-1])
    return Fact(-most, most, (*others, fact.norms[-1]))


def _alibi(step: Step) -> Fact:
    fact = step.facts[0]
    return Fact(-inf, fact.high, (inf,) * step.rank, masked=fact.masked)


def _dropout(step: Step) -> Fact:
    fact, p = step.facts[0], step.number("p")
    if p == 0:
        return fact
    scale = 1 / (1 - p) if p < 1 else 0.0
    norms = tuple(times(scale, norm) for norm in fact.norms)
    return Fact(min(times(scale, fact.low), 0.0), max(times(scale, fact.high), 0.0), norms)


def _attention(step: Step) -> Fact:
    """Rows of the result are convex combinations of values, or zero where a query sees no key."""
    value = step.facts[2]
    norms = (*(inf,) * (step.rank - 1), value.norms[-1])
    return Fact(min(value.low, 0.0), max(value.high, 0.0), norms)


BOUND: dict[str, Rule] = {
    **SHAPES,
    **ARITHMETIC,
    **dict.fromkeys(("weight", "buffer"), _nothing),  # they train, or come from a file
    "constant": _constant,
    "fill": _constant,
    "literal": _literal,
    "arange": _arange,
    "one_hot": _one_hot,
    **dict.fromkeys(("logical_not", "less", "less_equal", "equal"), _range(0.0, 1.0)),
    "sum": _sum,
    "mean": _mean,
    "amax": lambda step: interval(step.facts[0].low, step.facts[0].high, step.rank),
    "softmax": _softmax,
    "normalize_rows": _normalize_rows,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "unit": _unit,
    **dict.fromkeys(("causal", "window", "padding", "documents"), _mask),
    "near_far": _near_far,
    "assume_bound": _assume_bound,
    "rotary": _rotary,
    "sinusoid": _range(-1.0, 1.0),
    "alibi": _alibi,
    "dropout": _dropout,
    **dict.fromkeys(("cross_entropy", "mse"), _range(0.0, inf)),
    "attention": _attention,
}

# What a mask's fill can pass through without turning into an entry that the interval denies.
MASK_AWARE = frozenset(
    [
        "causal",
        "window",
        "padding",
        "documents",
        "near_far",
        "assume_bound",
        "alibi",
        "softmax",
        "exp",
        "clamp",
        "cast",
        "reshape",
        "permute",
        "slice",
        "logical_not",
        "less",
        "less_equal",
        "equal",
    ]
)

DECLINED: dict[str, str] = {
    "input": "its facts come from the call sites",
    "call": "the analysis enters the graph that it names",
    "repeat": "the analysis enters its bodies",
    "item": "the analysis keeps a fact for each result of a node",
    **dict.fromkeys(
        ["sum_to", "embedding_gradient", "poly_attention_backward", "repeat_backward", "weight_gradient"],
        "it stands only in gradient graphs, where no bound is asked for",
    ),
    "poly_attention": "it stands only after the recognition of attention, where no bound is asked for",
}
