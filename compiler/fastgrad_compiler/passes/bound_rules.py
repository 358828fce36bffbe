"""BOUND: for each operation, what its inputs' bounds say of its result.

A rule takes a `Step` and returns a Fact without proof; `bounds.py` adds the sentence and the premises.
Every rule is sound for real arithmetic; a rule that knows nothing returns `unknown`. `DECLINED` names the
operations that have no rule, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import erf, exp, inf, log, log1p, sqrt, tanh
from typing import TypeAlias

from fastgrad_compiler.dim import Dim
from fastgrad_compiler.graph import Node
from fastgrad_compiler.passes.bound_facts import (
    Fact,
    interval,
    join,
    product,
    size,
    spread,
    times,
    unknown,
)

_LARGEST_EXPONENT = 700.0
_GELU_LEAST = -0.1701  # the minimum is -0.16997, of the tanh form -0.17004
_SILU_LEAST = -0.2785  # the minimum is -0.27846, at -1.2785


@dataclass(frozen=True, slots=True)
class Step:
    """One node with the facts and shapes of its inputs."""

    node: Node
    facts: tuple[Fact, ...]
    shapes: tuple[tuple[Dim, ...], ...]

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the result."""
        return self.node.tensor.shape

    @property
    def rank(self) -> int:
        """The rank of the result."""
        return len(self.shape)

    def number(self, key: str) -> float:
        """A numeric attribute."""
        value = self.node[key]
        if not isinstance(value, int | float):
            raise TypeError(f"{self.node.op} {self.node.name}: attribute {key} is {value!r}")
        return float(value)

    def axis(self, key: str = "axis", rank: int | None = None) -> int:
        """An axis attribute as a negative index."""
        value = int(self.number(key))
        return value - (self.rank if rank is None else rank) if value >= 0 else value


Rule: TypeAlias = Callable[[Step], Fact]


def _nothing(step: Step) -> Fact:
    return unknown(step.rank)


def _range(low: float, high: float) -> Rule:
    return lambda step: interval(low, high, step.rank)


def _same(step: Step) -> Fact:
    return step.facts[0]


# ---------------------------------------------------------------- constants


def _constant(step: Step) -> Fact:
    return interval(step.number("value"), step.number("value"), step.rank)


def _arange(step: Step) -> Fact:
    return interval(0.0, max(size(step.shape[0]) - 1, 0.0), 1)


def _one_hot(step: Step) -> Fact:
    return Fact(0.0, 1.0, (*(inf,) * (step.rank - 1), 1.0))


# ---------------------------------------------------------------- shape


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
    return times(sqrt(size(joined)), norm) if joined is not None else inf


def _permute(step: Step) -> Fact:
    axes = step.node["axes"]
    if not isinstance(axes, tuple):
        raise TypeError(f"permute {step.node.name}: axes {axes!r}")
    fact = step.facts[0]
    return replace(fact, norms=tuple(fact.norms[axis] for axis in axes if isinstance(axis, int)))


def _split_heads(step: Step) -> Fact:
    fact = step.facts[0]
    *leading, tokens, row = fact.norms
    return replace(fact, norms=(*leading, row, tokens, row))


def _merge_heads(step: Step) -> Fact:
    fact = step.facts[0]
    *leading, heads, tokens, row = fact.norms
    count, width = size(step.shapes[0][-3]), size(step.shapes[0][-1])
    merged = min(times(sqrt(count), row), times(sqrt(width), heads))
    return replace(fact, norms=(*leading, tokens, merged))


def _repeat_heads(step: Step) -> Fact:
    fact = step.facts[0]
    *leading, heads, tokens, row = fact.norms
    return replace(fact, norms=(*leading, times(sqrt(step.number("times")), heads), tokens, row))


def _concat(step: Step) -> Fact:
    joined = join(step.facts)
    norms = list(joined.norms)
    norms[step.axis()] = _root_sum(*(fact.norms[step.axis()] for fact in step.facts))
    return replace(joined, norms=tuple(norms))


def _stack(step: Step) -> Fact:
    joined = join(step.facts)
    norms = list(joined.norms)
    norms.insert(step.rank + step.axis(), inf)
    return replace(joined, norms=tuple(norms))


def _select(step: Step) -> Fact:
    fact = step.facts[0]
    norms = list(fact.norms)
    del norms[step.axis(rank=len(norms))]
    return replace(fact, norms=tuple(norms))


def _pad(step: Step) -> Fact:
    fact = step.facts[0]
    return replace(fact, low=min(fact.low, 0.0), high=max(fact.high, 0.0))


def _entries(step: Step) -> Fact:
    return replace(step.facts[0], norms=(inf,) * step.rank)


def _broadcast(step: Step) -> Fact:
    return replace(step.facts[0], norms=spread(step.facts[0], step.shapes[0], step.shape))


def _embedding(step: Step) -> Fact:
    table = step.facts[0]
    return replace(table, norms=(*(inf,) * (step.rank - 1), table.norms[-1]))


# ---------------------------------------------------------------- arithmetic


def _root_sum(*norms: float) -> float:
    return sqrt(sum(norm * norm for norm in norms))


def _spread_all(step: Step) -> list[tuple[float, ...]]:
    return [spread(fact, shape, step.shape) for fact, shape in zip(step.facts, step.shapes, strict=True)]


def _pairwise(step: Step, low: float, high: float, combine: Callable[[float, float], float]) -> Fact:
    left, right = _spread_all(step)[-2:]
    return Fact(low, high, tuple(map(combine, left, right)))


def _add(step: Step) -> Fact:
    left, right = step.facts
    return _pairwise(step, left.low + right.low, left.high + right.high, lambda x, y: x + y)


def _sub(step: Step) -> Fact:
    left, right = step.facts
    return _pairwise(step, left.low - right.high, left.high - right.low, lambda x, y: x + y)


def _mul(step: Step) -> Fact:
    left, right = step.facts
    low, high = product(left, right)
    if step.node.inputs[0] == step.node.inputs[1]:
        low = max(low, 0.0)
    most_left, most_right = left.magnitude, right.magnitude
    return _pairwise(step, low, high, lambda x, y: min(times(x, most_right), times(y, most_left)))


def _div(step: Step) -> Fact:
    left, right = step.facts
    if right.low <= 0 <= right.high:
        return unknown(step.rank)
    inverse = replace(right, low=1 / right.high, high=1 / right.low)
    low, high = product(left, inverse)
    norms = tuple(times(norm, inverse.magnitude) for norm in _spread_all(step)[0])
    return Fact(low, high, norms)


def _minimum(step: Step) -> Fact:
    left, right = step.facts
    return _pairwise(step, min(left.low, right.low), min(left.high, right.high), _root_sum)


def _maximum(step: Step) -> Fact:
    left, right = step.facts
    return _pairwise(step, max(left.low, right.low), max(left.high, right.high), _root_sum)


def _where(step: Step) -> Fact:
    _, left, right = step.facts
    return _pairwise(step, min(left.low, right.low), max(left.high, right.high), _root_sum)


def _neg(step: Step) -> Fact:
    fact = step.facts[0]
    return replace(fact, low=-fact.high, high=-fact.low)


def _abs(step: Step) -> Fact:
    fact = step.facts[0]
    least = 0.0 if fact.low <= 0 <= fact.high else min(abs(fact.low), abs(fact.high))
    return replace(fact, low=least, high=fact.magnitude)


def _increasing(function: Callable[[float], float], shrinking: float | None = None) -> Rule:
    """A rule of an increasing function; `shrinking` c promises |f(x)| <= c |x|, which carries norms over."""

    def rule(step: Step) -> Fact:
        fact = step.facts[0]
        scale = inf if shrinking is None else shrinking
        norms = tuple(inf if scale == inf else times(scale, norm) for norm in fact.norms)
        return Fact(function(fact.low), function(fact.high), norms)

    return rule


def _shrinking(least: float) -> Rule:
    """gelu and silu: |f(x)| <= |x|, f(x) <= max(x, 0), and f is never below `least`."""

    def rule(step: Step) -> Fact:
        fact = step.facts[0]
        low = 0.0 if fact.low >= 0 else max(least, fact.low)
        return replace(fact, low=low, high=max(fact.high, 0.0))

    return rule


def _safe_exp(x: float) -> float:
    return inf if x > _LARGEST_EXPONENT else exp(x)


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -_LARGEST_EXPONENT else 0.0


def _softplus(x: float) -> float:
    return x + log1p(exp(-x)) if x > 0 else log1p(exp(x))


def _exp(step: Step) -> Fact:
    fact = step.facts[0]
    low = 0.0 if fact.masked else exp(min(fact.low, _LARGEST_EXPONENT))
    return interval(low, _safe_exp(fact.high), step.rank)


def _log(step: Step) -> Fact:
    fact = step.facts[0]
    if fact.high <= 0:
        return unknown(step.rank)
    return interval(log(fact.low) if fact.low > 0 else -inf, log(fact.high), step.rank)


def _rsqrt(step: Step) -> Fact:
    fact = step.facts[0]
    return interval(
        1 / sqrt(fact.high) if fact.high > 0 else 0.0, 1 / sqrt(fact.low) if fact.low > 0 else inf, step.rank
    )


def _clamp(step: Step) -> Fact:
    fact, (low, high) = step.facts[0], limits(step.node)
    if fact.masked:
        return interval(low, min(max(fact.high, low), high), step.rank)
    norms = fact.norms if low <= 0 <= high else (inf,) * step.rank
    return Fact(min(max(fact.low, low), high), min(max(fact.high, low), high), norms)


def limits(node: Node) -> tuple[float, float]:
    """The limits of a clamp; one that is left out is infinite."""
    low, high = node["low"], node["high"]
    return (
        float(low) if isinstance(low, int | float) else -inf,
        float(high) if isinstance(high, int | float) else inf,
    )


def _matmul(step: Step) -> Fact:
    """Cauchy-Schwarz on rows of the left and columns of the right factor, or the sum of as many products."""
    left, right = step.facts
    if len(left.norms) < 2 or len(right.norms) < 2:
        return unknown(step.rank)
    most = times(left.norms[-1], right.norms[-2])
    terms, (low, high) = size(step.shapes[0][-1]), product(left, right)
    return interval(max(-most, times(terms, low)), min(most, times(terms, high)), step.rank)


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
    fact, limit = step.facts[0], step.number("bound")
    asserted = fact.asserted or fact.magnitude > limit
    return replace(fact, low=max(fact.low, -limit), high=min(fact.high, limit), asserted=asserted)


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
    **dict.fromkeys(("weight", "buffer"), _nothing),  # they train, or come from a file
    "constant": _constant,
    "fill": _constant,
    "reshape": _reshape,
    "permute": _permute,
    "split_heads": _split_heads,
    "merge_heads": _merge_heads,
    "repeat_heads": _repeat_heads,
    "concat": _concat,
    "stack": _stack,
    "slice": _same,
    "select": _select,
    "pad": _pad,
    "patches": _entries,
    "broadcast_to": _broadcast,
    "embedding": _embedding,
    "arange": _arange,
    "one_hot": _one_hot,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "minimum": _minimum,
    "maximum": _maximum,
    "neg": _neg,
    "exp": _exp,
    "log": _log,
    "sqrt": _increasing(lambda x: sqrt(max(x, 0.0))),
    "rsqrt": _rsqrt,
    "tanh": _increasing(tanh, shrinking=1.0),
    "sigmoid": _increasing(_sigmoid),
    "relu": _increasing(lambda x: max(x, 0.0), shrinking=1.0),
    "gelu": _shrinking(_GELU_LEAST),
    "silu": _shrinking(_SILU_LEAST),
    "softplus": _increasing(_softplus),
    "abs": _abs,
    "erf": _increasing(erf, shrinking=1.1284),  # the slope at 0 is 2 / sqrt(pi)
    **dict.fromkeys(("logical_not", "less", "less_equal", "equal"), _range(0.0, 1.0)),
    "cast": _same,
    "clamp": _clamp,
    "where": _where,
    "matmul": _matmul,
    "sum": _sum,
    "mean": _mean,
    "amax": lambda step: interval(step.facts[0].low, step.facts[0].high, step.rank),
    "softmax": _softmax,
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
    "poly_attention": "it stands only after the rewrite, where no bound is asked for",
}
