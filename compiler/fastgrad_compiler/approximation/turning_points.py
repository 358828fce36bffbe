"""Where a polynomial changes its sign on an interval, in decimal arithmetic, with a bound of all that is neglected.

Everything here runs in the caller's decimal context. Coefficients are ascending, in the monomial basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, getcontext
from itertools import pairwise
from typing import NamedTuple, TypeAlias

Coefficients: TypeAlias = Sequence[Decimal]

_STEPS = 200  # of one search, which bisects where Newton's method does not converge
_POLISHING = 8  # steps of Newton's method from a guess


class Pieces(NamedTuple):
    """An interval cut where a polynomial changes its sign.

    Args:
        cuts: ascending, with both ends of the interval.
        slack: between neighbouring cuts the polynomial is at least -slack, or it is at most slack.
    """

    cuts: tuple[Decimal, ...]
    slack: Decimal


def pieces(polynomial: Coefficients, low: Decimal, high: Decimal, near: Coefficients = ()) -> Pieces:
    """The pieces of a polynomial on [low, high], from those of its derivative, and so on down to the constant one.

    Args:
        polynomial: at least one coefficient, of degree at most 40.
        low, high: ends, `low < high`.
        near: guesses at all its roots, ascending, which make it quick where they are good.
    """
    if len(polynomial) < 2:
        return Pieces((low, high), Decimal(0))
    quick = _proved(polynomial, low, high, near) if near else None
    return quick or refined(polynomial, pieces(derivative(polynomial), low, high))


def refined(polynomial: Coefficients, below: Pieces) -> Pieces:
    """The pieces of a polynomial from those of its derivative.

    On those it is monotone, so it changes its sign there where its values at the ends say so, and once. The slack sums
    up what that neglects: the derivative's own times the width, the value that is left at each root, and rounding. It
    is a bound whatever the search for a root did.
    """
    low, high = below.cuts[0], below.cuts[-1]
    rounded = rounding(polynomial, max(abs(low), abs(high)))
    values = [value(polynomial, cut) for cut in below.cuts]
    cuts, left = [low], Decimal(0)
    for (a, at_a), (b, at_b) in pairwise(zip(below.cuts, values, strict=True)):
        if at_a == 0 and a != low:
            cuts.append(a)
        elif at_a * at_b < 0:
            root = _root(polynomial, a, b, at_b > 0, rounded)
            cuts.append(root)
            left = max(left, abs(value(polynomial, root)))
    return Pieces((*cuts, high), left + 2 * rounded + (high - low) * below.slack)


def all_roots(
    polynomial: Coefficients, low: Decimal, high: Decimal, near: Coefficients
) -> tuple[Decimal, ...] | None:
    """All roots, in order, of a polynomial that has as many on (low, high) as its degree.

    Found by Newton's method from guesses; None where those miss some. That there are no others is seen from the signs
    between them.
    """
    if len(near) != len(polynomial) - 1:
        return None
    roots = tuple(_polished(polynomial, point, high - low) for point in near)
    if not all(left < right for left, right in pairwise((low, *roots, high))):
        return None
    between = (low, *((left + right) / 2 for left, right in pairwise(roots)), high)
    values = [value(polynomial, point) for point in between]
    return roots if all(left * right < 0 for left, right in pairwise(values)) else None


def turning(polynomial: Coefficients) -> list[Decimal]:
    """p' - p, which changes its sign at the extrema of p e^-s."""
    slope = [*derivative(polynomial), Decimal(0)]
    return [x - y for x, y in zip(slope[: len(polynomial)], polynomial, strict=True)]


def derivative(polynomial: Coefficients) -> list[Decimal]:
    """Coefficients of the derivative; one, 0, for a constant."""
    return [power * each for power, each in enumerate(polynomial)][1:] or [Decimal(0)]


def value(polynomial: Coefficients, point: Decimal) -> Decimal:
    """The polynomial at a point, by Horner's rule."""
    result = polynomial[-1]
    for coefficient in polynomial[-2::-1]:
        result = result * point + coefficient
    return result


def rounding(polynomial: Coefficients, size: Decimal) -> Decimal:
    """Bound of the rounding of `value` at points of at most this size, and of the coefficients before it.

    Each term is rounded 2 g times at most by Horner's rule, its coefficient g + 2 times before: less than 500 half
    units of the last digit for g up to 40.
    """
    terms = value([abs(coefficient) for coefficient in polynomial], size)
    return terms.scaleb(3 - getcontext().prec)


def _proved(polynomial: Coefficients, low: Decimal, high: Decimal, near: Coefficients) -> Pieces | None:
    """The pieces where `all_roots` finds them; the slack is what the slope makes of how far each may be off."""
    roots = all_roots(polynomial, low, high, near)
    if roots is None:
        return None
    size = max(abs(low), abs(high))
    reach, rounded = (high - low).scaleb(3 - getcontext().prec // 2), rounding(polynomial, size)
    around = [(value(polynomial, root - reach), value(polynomial, root + reach)) for root in roots]
    if not all(left * right < 0 and min(abs(left), abs(right)) > rounded for left, right in around):
        return None
    steepest = value([abs(each) for each in derivative(polynomial)], size)
    return Pieces((low, *roots, high), 2 * reach * steepest)


def _value_and_slope(polynomial: Coefficients, point: Decimal) -> tuple[Decimal, Decimal]:
    result, slope = polynomial[-1], Decimal(0)
    for coefficient in polynomial[-2::-1]:
        slope = slope * point + result
        result = result * point + coefficient
    return result, slope


def _polished(polynomial: Coefficients, point: Decimal, width: Decimal) -> Decimal:
    """A root near a point; some point where Newton's method does not settle. Its error is the last step squared."""
    settled = width.scaleb(-getcontext().prec // 4)
    for _ in range(_POLISHING):
        here, slope = _value_and_slope(polynomial, point)
        if not slope:
            break
        step = here / slope
        point -= step
        if abs(step) <= settled or abs(step) > width:
            break
    return point


def _root(polynomial: Coefficients, low: Decimal, high: Decimal, rising: bool, enough: Decimal) -> Decimal:
    """Where a monotone polynomial changes its sign: by Newton's method while its steps halve, else by bisection."""
    point, step = (low + high) / 2, high - low
    for _ in range(_STEPS):
        here, slope = _value_and_slope(polynomial, point)
        if abs(here) <= enough:
            break
        low, high = (low, point) if (here > 0) == rising else (point, high)
        before, step = step, -here / slope if slope else high - low
        if 2 * abs(step) > abs(before) or not low < point + step < high:
            step = (low + high) / 2 - point
        point += step
    return point
