"""The minimax and the balanced polynomial for exp in decimal arithmetic (docs/mathematics.md, section 1).

The digits are chosen so that some 20 are left after all cancellation. An exchange converges quadratically and stops
where the polynomial is off by less than 1e-20 of its error: far below the float64 to which coefficients are rounded
afterwards.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache
from itertools import pairwise
from math import factorial
from typing import NamedTuple

from fastgrad_compiler.approximation.elementary import arithmetic
from fastgrad_compiler.approximation.turning_points import (
    Coefficients,
    Pieces,
    all_roots,
    pieces,
    refined,
    turning,
    value,
)

_EXCHANGES = 40
_LEVELLED = Decimal("1e-20")  # relative spread of the error's extrema at which an exchange has converged
_BISECTIONS = 12  # of a first guess


class Fit(NamedTuple):
    """A polynomial, ascending, and the largest |p(s) e^-s - 1| on the range, before any rounding to float64.

    `points` are the extrema of the error, ascending, both ends among them, and `growth` is e^s there. Between those of
    p'' - p', about at `between`, they lie one by one.
    """

    coefficients: Coefficients
    level: Decimal
    points: tuple[Decimal, ...]
    growth: Coefficients
    between: Coefficients


@cache
def minimax(degree: int, bound: float) -> Fit:
    """The polynomial of least relative error on [-bound, bound], by Remez exchange.

    p' - p has `degree` roots, so the alternating set of degree + 2 points is both ends and all of them: each exchange
    replaces the whole set.

    Args:
        degree: at least 0.
        bound: above 0; digits and time grow as it gets small (at degree 20, 10 ms at 1e-3).
    """
    with localcontext(arithmetic(_digits(degree, bound))):
        radius = Decimal(bound)
        points = tuple(_start(degree, radius))
        growth = [point.exp() for point in points]
        for _ in range(_EXCHANGES):
            coefficients = _interpolated(points, growth)
            points = _extrema(coefficients, points[1:-1], radius)
            if len(points) != degree + 2:
                break
            growth = [point.exp() for point in points]
            errors = _errors(coefficients, points, growth)
            heights = [abs(error) for error in errors]
            level = max(heights)
            if level - min(heights) <= _LEVELLED * level:
                between = tuple((left + right) / 2 for left, right in pairwise(points[1:-1]))
                return Fit(coefficients, level, points, growth, between)
    raise ArithmeticError(f"the exchange of degree {degree} on [-{bound}, {bound}] does not converge")


@cache
def balanced(degree: int, bound: float) -> Fit:
    """The integral of the minimax polynomial of one degree less, with the constant that levels its two extreme errors.

    Args:
        degree: at least 1.
        bound: as for `minimax`.
    """
    inner = minimax(degree - 1, bound)
    with localcontext(arithmetic(_digits(degree, bound))):
        coefficients = [Decimal(0), *(each / power for power, each in enumerate(inner.coefficients, 1))]
        errors = _errors(coefficients, inner.points, inner.growth)
        shrunk = sum((1 / each for each in inner.growth), Decimal(0))
        coefficients[0] = -sum(errors, Decimal(0)) / shrunk  # close: their mean is 0
        below = Pieces(inner.points, Decimal(0))
        for _ in range(_EXCHANGES):
            points = refined(turning(coefficients), below).cuts
            growth = [point.exp() for point in points]
            errors = _errors(coefficients, points, growth)
            high, low = max(errors), min(errors)
            if abs(high + low) <= _LEVELLED * (high - low):
                return Fit(coefficients, max(high, -low), points, growth, inner.points[1:-1])
            weights = 1 / growth[errors.index(high)] + 1 / growth[errors.index(low)]
            coefficients[0] -= (high + low) / weights
    raise ArithmeticError(f"the constant of degree {degree} on [-{bound}, {bound}] does not converge")


def _digits(degree: int, bound: float) -> int:
    """20 more than are lost: the error is of the size of the first term left out, and values go up to e^R."""
    with localcontext(arithmetic(20)):
        term = Decimal(bound) ** (degree + 1) / (factorial(degree + 1) << degree)
        return 40 + max(0, -term.adjusted()) + Decimal(bound).exp().adjusted() + degree // 2


def _start(degree: int, radius: Decimal) -> list[Decimal]:
    """A first guess at the extrema of the error, ascending from -radius to radius.

    In s = R cos(pi u) they lie about where (g + 1) pi u - R sin(pi u) (g + 1) / (g + 2) is a multiple of pi: the weight
    and the terms left out turn the phase of the Chebyshev polynomial. Sines are those of Bhaskara, within 0.002.
    """
    turns, most = degree + 1, float(radius) / 3.14159
    points = [-radius]
    for place in range(degree, 0, -1):
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            phase = turns * (middle - most * _cosine(middle - 0.5) / (turns + 1))
            low, high = (middle, high) if phase < place else (low, middle)
        points.append(radius * Decimal(_cosine(low) if low < 0.5 else -_cosine(1 - low)))
    return [*points, radius]


def _cosine(turn: float) -> float:
    """About cos(pi turn) for |turn| <= 1/2."""
    return (1 - 4 * turn * turn) / (1 + turn * turn)


def _interpolated(points: Coefficients, growth: Coefficients) -> list[Decimal]:
    """The polynomial whose relative error at degree + 2 points alternates between two values, E and -E.

    p takes the values e^s (1 - E) and e^s (1 + E) in turn. Its divided difference of order degree + 1 is 0, which gives
    E; the others are its coefficients in Newton's form.
    """
    plain = _differences(points, growth)
    turned = _differences(points, [each if i % 2 else -each for i, each in enumerate(growth)])
    error = -plain[-1] / turned[-1]
    newton = [x + error * y for x, y in zip(plain[:-1], turned[:-1], strict=True)]
    coefficients = [newton[-1]]
    for point, each in zip(points[-3::-1], newton[-2::-1], strict=True):
        shifted = [-point * c for c in coefficients] + [Decimal(0)]
        coefficients = [x + y for x, y in zip(shifted, [Decimal(0), *coefficients], strict=True)]
        coefficients[0] += each
    return coefficients


def _differences(points: Coefficients, values: Coefficients) -> list[Decimal]:
    """Divided differences over the first point, the first two, and so on."""
    found, column = [values[0]], values
    for order in range(1, len(points)):
        column = [
            (after - before) / (points[place + order] - points[place])
            for place, (before, after) in enumerate(pairwise(column))
        ]
        found.append(column[0])
    return found


def _extrema(coefficients: Coefficients, near: Coefficients, radius: Decimal) -> tuple[Decimal, ...]:
    """The ends, and what p' - p has of roots between: from guesses, where they lead to all."""
    slope = turning(coefficients)
    roots = all_roots(slope, -radius, radius, near)
    return pieces(slope, -radius, radius).cuts if roots is None else (-radius, *roots, radius)


def _errors(coefficients: Coefficients, points: Coefficients, growth: Coefficients) -> list[Decimal]:
    """p e^-s - 1 at points, given e^s there."""
    return [(value(coefficients, point) - each) / each for point, each in zip(points, growth, strict=True)]
