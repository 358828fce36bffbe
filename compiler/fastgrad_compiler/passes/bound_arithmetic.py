"""Bound rules of arithmetic, entry by entry, and of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf, sqrt

from fastgrad_compiler.elementary import erf, exp, log, log1p, power, tanh
from fastgrad_compiler.graph import Node
from fastgrad_compiler.passes.bound_facts import (
    Fact,
    interval,
    product,
    size,
    spread,
    times,
    unknown,
)
from fastgrad_compiler.passes.bound_step import Rule, Step, root_sum

_LARGEST_EXPONENT = 700.0
_GELU_LEAST = -0.1701  # the minimum is -0.16997, of the tanh form -0.17004
_SILU_LEAST = -0.2785  # the minimum is -0.27846, at -1.2785


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
    return _pairwise(step, min(left.low, right.low), min(left.high, right.high), root_sum)


def _maximum(step: Step) -> Fact:
    left, right = step.facts
    return _pairwise(step, max(left.low, right.low), max(left.high, right.high), root_sum)


def _where(step: Step) -> Fact:
    _, left, right = step.facts
    return _pairwise(step, min(left.low, right.low), max(left.high, right.high), root_sum)


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


def _polynomial(step: Step) -> Fact:
    """Interval arithmetic of the terms c_j x^j; even powers are not negative."""
    coefficients, fact = step.node["coefficients"], step.facts[0]
    low = high = 0.0
    for degree, c in enumerate(coefficients if isinstance(coefficients, tuple) else ()):
        least, most = _power(fact, degree)
        ends = times(float(str(c)), least), times(float(str(c)), most)
        low, high = low + min(ends), high + max(ends)
    return interval(low, high, step.rank)


def _power(fact: Fact, degree: int) -> tuple[float, float]:
    """The interval of x^degree."""
    try:
        ends = power(fact.low, degree), power(fact.high, degree)
    except OverflowError:
        return (-inf if degree % 2 else 0.0), inf
    even_around_zero = degree % 2 == 0 and degree > 0 and fact.low < 0 < fact.high
    return (0.0 if even_around_zero else min(ends)), max(ends)


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


ARITHMETIC: dict[str, Rule] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "minimum": _minimum,
    "maximum": _maximum,
    "neg": _neg,
    "exp": _exp,
    "polynomial": _polynomial,
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
    "clamp": _clamp,
    "where": _where,
    "matmul": _matmul,
}
