"""Bound rules of arithmetic, entry by entry, and of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from math import inf, isinf, nextafter, trunc
from typing import TypeAlias

from fastgrad_compiler.analysis.bounds.facts import (
    Fact,
    added,
    interval,
    product,
    spread,
    total,
    unknown,
)
from fastgrad_compiler.analysis.bounds.outward import (
    add_down,
    add_up,
    over_down,
    over_up,
    root_down,
    root_sum_up,
    root_up,
    times_down,
    times_up,
)
from fastgrad_compiler.analysis.bounds.step import Rule, Step
from fastgrad_compiler.approximation.elementary import erf, exp, log, log1p, tanh
from fastgrad_compiler.ir.graph import number, sequence
from fastgrad_compiler.ir.ops import limits

_LARGEST_EXPONENT = 700.0
_GELU_LEAST = -0.1701  # the minimum is -0.16997, at -0.7518
_SILU_LEAST = -0.2785  # the minimum is -0.27846, at -1.2785
_ERF_SLOPE = 1.1284  # 2 / sqrt(pi) = 1.128379, at 0
_ROUNDING = 4  # steps of float64 within which the functions below, and those of `math`, are right
_LARGEST_INT = 2.0**63  # one more than it; ints are below, and at least its negative
_COARSE = 2.0**-6  # by which an entry may be off before it is truncated: 4 roundings of bfloat16

Combine: TypeAlias = Callable[[float, float], float]


def _spread_all(step: Step) -> list[tuple[float, ...]]:
    return [spread(fact, shape, step.shape) for fact, shape in zip(step.facts, step.shapes, strict=True)]


def _pairwise(step: Step, low: float, high: float, combine: Combine) -> Fact:
    left, right = _spread_all(step)[-2:]
    return Fact(low, high, tuple(map(combine, left, right)))


def _negated(fact: Fact) -> Fact:
    return replace(fact, low=-fact.high, high=-fact.low)


def _sub(step: Step) -> Fact:
    left, right = step.facts
    return _pairwise(step, *added(left, _negated(right)), add_up)


def _mul(step: Step) -> Fact:
    left, right = step.facts
    if left.masked or right.masked:
        return _scaled_mask(step, *product(left, right))
    low, high = product(left, right)
    if step.node.inputs[0] == step.node.inputs[1]:
        low = max(low, 0.0)
    most_left, most_right = left.magnitude, right.magnitude
    return _pairwise(step, low, high, lambda x, y: min(times_up(x, most_right), times_up(y, most_left)))


def _scaled_mask(step: Step, low: float, high: float) -> Fact:
    """Times or over a factor above 0, what is hidden stays hidden."""
    factor = next((fact for fact in step.facts if not fact.masked), None)
    if factor is None or factor.low <= 0:
        return unknown(step.rank)
    return Fact(low, high, (inf,) * step.rank, masked=True)


def _div(step: Step) -> Fact:
    left, right = step.facts
    if right.low <= 0 <= right.high or right.masked:
        return unknown(step.rank)
    low, high = product(left, Fact(over_down(1.0, right.high), over_up(1.0, right.low), ()))
    if left.masked:
        return _scaled_mask(step, low, high)
    most = over_up(1.0, right.least_magnitude)
    return Fact(low, high, tuple(times_up(norm, most) for norm in _spread_all(step)[0]))


def _either(lowest: Combine, highest: Combine) -> Rule:
    """Each entry is one of the last two inputs'."""

    def rule(step: Step) -> Fact:
        left, right = step.facts[-2:]
        return _pairwise(step, lowest(left.low, right.low), highest(left.high, right.high), root_sum_up)

    return rule


# ---------------------------------------------------------------- functions


def _below(value: float) -> float:
    """Less than what a function truly gives where `value` was computed."""
    for _ in range(_ROUNDING):
        value = nextafter(value, -inf)
    return value


def _increasing(
    function: Callable[[float], float], least: float, most: float, slope: float | None = None
) -> Rule:
    """A rule of an increasing function with values in [least, most], exact at 0 and at infinity where it has them.

    `slope` c promises |f(x)| <= c |x|, which carries norms over.
    """

    def rule(step: Step) -> Fact:
        fact = step.fact
        low, high = function(fact.low), function(fact.high)
        if not (isinf(fact.low) or (fact.low == 0 and low == 0)):
            low = max(_below(low), least)
        if not (isinf(fact.high) or (fact.high == 0 and high == 0)):
            high = min(-_below(-high), most)
        norms = (inf,) * step.rank if slope is None else tuple(times_up(slope, n) for n in fact.norms)
        return Fact(low, high, norms)

    return rule


def _shrinking(least: float) -> Rule:
    """gelu and silu: |f(x)| <= |x|, f(x) <= max(x, 0), and f is never below `least`."""

    def rule(step: Step) -> Fact:
        fact = step.fact
        low = 0.0 if fact.low >= 0 else max(least, fact.low)
        return replace(fact, low=low, high=max(fact.high, 0.0))

    return rule


def _sigmoid_of(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -_LARGEST_EXPONENT else 0.0


def _softplus_of(x: float) -> float:
    return x + log1p(exp(-x)) if x > 0 else log1p(exp(x))


def _log_sigmoid_of(x: float) -> float:
    return min(x, 0.0) - log1p(exp(-abs(x)))


def _exp(step: Step) -> Fact:
    """What a mask hides becomes 0."""
    fact = step.fact
    low = 0.0 if fact.masked else max(_below(exp(min(fact.low, _LARGEST_EXPONENT))), 0.0)
    high = inf if fact.high > _LARGEST_EXPONENT else -_below(-exp(fact.high))
    return interval(low, high, step.rank)


def _polynomial(step: Step) -> Fact:
    """Interval arithmetic of the terms c_j x^j; even powers are not negative. -inf has the value 0."""
    fact, low, high = step.fact, 0.0, 0.0
    for power, c in enumerate(map(number, sequence(step.node["coefficients"]))):
        least, most = _power(fact, power)
        low = add_down(low, min(times_down(c, least), times_down(c, most)))
        high = add_up(high, max(times_up(c, least), times_up(c, most)))
    if fact.low == -inf:
        low, high = min(low, 0.0), max(high, 0.0)
    return interval(low, high, step.rank)


def _power(fact: Fact, power: int) -> tuple[float, float]:
    """The interval of x^power."""
    if power % 2:
        low = -_size(times_up, -fact.low, power) if fact.low < 0 else _size(times_down, fact.low, power)
        high = _size(times_up, fact.high, power) if fact.high > 0 else -_size(times_down, -fact.high, power)
        return low, high
    return _size(times_down, fact.least_magnitude, power), _size(times_up, fact.magnitude, power)


def _size(times: Combine, x: float, power: int) -> float:
    """x^power for x >= 0, rounded as `times` rounds."""
    return reduce(times, [x] * power, 1.0)


def _log(step: Step) -> Fact:
    fact = step.fact
    if fact.high <= 0:
        return unknown(step.rank)
    low = -inf if fact.low <= 0 else 0.0 if fact.low == 1 else _below(log(fact.low))
    return interval(low, 0.0 if fact.high == 1 else -_below(-log(fact.high)), step.rank)


def _sqrt(step: Step) -> Fact:
    return interval(root_down(max(step.fact.low, 0.0)), root_up(max(step.fact.high, 0.0)), step.rank)


def _rsqrt(step: Step) -> Fact:
    """Of -0, which no interval tells from 0, it is -infinity."""
    fact = step.fact
    if fact.low <= 0:
        return unknown(step.rank)
    return interval(over_down(1.0, root_up(fact.high)), over_up(1.0, root_down(fact.low)), step.rank)


def _clamp(step: Step) -> Fact:
    """What a mask hides becomes the lower limit."""
    fact, (low, high) = step.fact, limits(step.node)
    norms = fact.norms if low <= 0 <= high else (inf,) * step.rank
    least, most = min(max(fact.low, low), high), min(max(fact.high, low), high)
    if fact.masked and low == -inf:
        return replace(fact, low=least, high=most)
    return interval(low, most, step.rank) if fact.masked else Fact(least, most, norms)


def _cast(step: Step) -> Fact:
    fact, dtype = step.fact, step.node["dtype"]
    if dtype == "bool":
        return interval(0.0, 1.0, step.rank)
    if dtype == "float":
        return fact
    if fact.masked:
        return unknown(step.rank)
    norms = tuple(times_up(norm, 1 + _COARSE) for norm in fact.norms)
    return Fact(0.0 - _truncated(-fact.low), _truncated(fact.high), norms)


def _truncated(high: float) -> float:
    """The most that int gives of entries up to `high`: the whole number towards 0, or the one above where rounding may
    lead there. NaN becomes 0, so that it is never less; nothing leaves 64 bits.
    """
    most = add_up(high, times_up(abs(high), _COARSE))
    return max(float(trunc(min(most, _LARGEST_INT))), 0.0) if most > 0 else 0.0


def _matmul(step: Step) -> Fact:
    """Cauchy-Schwarz on rows of the left and columns of the right factor, or the sum of as many products."""
    left, right = step.facts
    if len(left.norms) < 2 or len(right.norms) < 2:
        return unknown(step.rank)
    most = times_up(left.norms[-1], right.norms[-2])
    low, high = total(interval(*product(left, right), 0), step.shapes[0][-1:])
    return interval(max(-most, low), min(most, high), step.rank)


ARITHMETIC: dict[str, Rule] = {
    "add": lambda step: _pairwise(step, *added(*step.facts), add_up),
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "minimum": _either(min, min),
    "maximum": _either(max, max),
    "neg": lambda step: _negated(step.fact),
    "exp": _exp,
    "polynomial": _polynomial,
    "log": _log,
    "sqrt": _sqrt,
    "rsqrt": _rsqrt,
    "tanh": _increasing(tanh, -1.0, 1.0, slope=1.0),
    "sigmoid": _increasing(_sigmoid_of, 0.0, 1.0),
    "relu": lambda step: replace(step.fact, low=max(step.fact.low, 0.0), high=max(step.fact.high, 0.0)),
    "gelu": _shrinking(_GELU_LEAST),
    "silu": _shrinking(_SILU_LEAST),
    "log_sigmoid": _increasing(_log_sigmoid_of, -inf, 0.0),
    "softplus": _increasing(_softplus_of, 0.0, inf),
    "abs": lambda step: replace(step.fact, low=step.fact.least_magnitude, high=step.fact.magnitude),
    "erf": _increasing(erf, -1.0, 1.0, slope=_ERF_SLOPE),
    "cast": _cast,
    "clamp": _clamp,
    "where": _either(min, max),
    "matmul": _matmul,
}
