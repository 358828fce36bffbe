"""Polynomials that a model gives as the weights of its attention: which can be weights, and why others cannot.

Weights are divided by their sum, so a polynomial must be positive for every score, however large: no bound of the
scores is asked for. That is an even degree without a real root, counted exactly; or even powers alone, none with a
negative coefficient, which are 0 at the score 0 at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from math import isfinite
from typing import NamedTuple

from fastgrad_compiler.approximation.elementary import DIGITS, arithmetic
from fastgrad_compiler.approximation.polynomial import MAX_DEGREE
from fastgrad_compiler.approximation.rational import count_real_roots
from fastgrad_compiler.approximation.turning_points import derivative, pieces, value


class Objection(NamedTuple):
    """What is wrong with a polynomial, and what to do about it (None: nothing is known)."""

    message: str
    help: str | None


def objection(coefficients: Sequence[float]) -> Objection | None:
    """Why the trimmed polynomial cannot give weights; None if it can.

    Args:
        coefficients: ascending, finite, without a zero after the last power.
    """
    degree = len(coefficients) - 1
    if degree < 1:
        kind = "is 0 everywhere" if degree < 0 else "gives every key the same weight"
        return Objection(
            f"a polynomial without a power of the score {kind}", "write (1.0, 1.0, 0.5), for instance"
        )
    if degree > MAX_DEGREE:
        return Objection(f"a polynomial of degree {degree} is over the limit of {MAX_DEGREE}", None)
    if not any(coefficients[1::2]) and min(coefficients) >= 0:
        return None
    if degree % 2:
        side = "far below" if coefficients[-1] > 0 else "far above"
        return Objection(
            f"a polynomial of odd degree {degree} is negative for scores {side} 0",
            "take an even degree without a real root, such as (1.0, 1.0, 0.5), or even powers alone",
        )
    if coefficients[-1] < 0:
        text = f"its last coefficient is {coefficients[-1]:g}: weights of large scores are negative"
        return Objection(text, "the coefficient of the last power must be above 0")
    if count_real_roots(coefficients) == 0:
        return None
    return _not_positive(coefficients)


def _not_positive(coefficients: Sequence[float]) -> Objection:
    """Where an even polynomial with a positive last coefficient is least, and the constant that lifts it."""
    with localcontext(arithmetic(DIGITS)):
        exact = list(map(Decimal, coefficients))
        slope = derivative(exact)
        # Twice Cauchy's bound of the slope's roots: its sign at the ends is that of the last term.
        reach = 2 + 2 * max(abs(each / slope[-1]) for each in slope)
        score = min(pieces(slope, -reach, reach).cuts[1:-1], key=lambda point: value(exact, point))
        least, place, furthest = (float(each) for each in (value(exact, score), score, reach))
    if not isfinite(least) or not isfinite(furthest):
        return Objection("the polynomial is not positive for every score", None)
    return Objection(
        f"the polynomial is not positive: it is {least:.3g} for a score of {place:.3g}",
        f"a constant term above {coefficients[0] - least:.3g} lifts it above 0 everywhere",
    )
