"""Exact values and root counts: against polynomials built from known roots."""

from __future__ import annotations

from fractions import Fraction
from math import inf, nextafter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_compiler.approximation.rational import count_real_roots, largest_root, sign_at, values


def expand(roots: list[int], quadratics: list[tuple[int, int]], lead: int) -> list[float]:
    """Ascending coefficients of lead * prod (s - root) * prod ((s - a)^2 + b): integers, exact as floats."""
    polynomial = np.array([lead], dtype=object)
    for root in roots:
        polynomial = np.convolve(polynomial, np.array([-root, 1], dtype=object))
    for centre, height in quadratics:
        factor = np.array([centre * centre + height, -2 * centre, 1], dtype=object)
        polynomial = np.convolve(polynomial, factor)
    return [float(value) for value in polynomial]


ROOTS = st.lists(st.integers(-6, 6), max_size=5)
QUADRATICS = st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), max_size=3)
LEAD = st.sampled_from([-3, -1, 1, 2])


@settings(deadline=None, derandomize=True)
@given(ROOTS, QUADRATICS, LEAD)
def test_counts_distinct_roots(roots: list[int], quadratics: list[tuple[int, int]], lead: int) -> None:
    coefficients = expand(roots, quadratics, lead)
    assert count_real_roots(coefficients) == len(set(roots))
    inside = {root for root in roots if -2.5 < root <= 3.5}
    assert count_real_roots(coefficients, -2.5, 3.5) == len(inside)
    assert count_real_roots(coefficients, -inf, 0.5) == len({root for root in roots if root < 0.5})


@settings(deadline=None, derandomize=True)
@given(ROOTS, QUADRATICS, LEAD, st.integers(-7, 7))
def test_sign(roots: list[int], quadratics: list[tuple[int, int]], lead: int, point: int) -> None:
    expected = int(np.sign(lead)) * int(np.prod([np.sign(point - root) for root in roots]))
    assert sign_at(expand(roots, quadratics, lead), float(point)) == expected


def test_tells_a_double_root_from_a_near_miss() -> None:
    assert count_real_roots([1.0, -2.0, 1.0]) == 1
    assert count_real_roots([1.0 + 2.0**-52, -2.0, 1.0]) == 0
    assert count_real_roots([1.0 - 2.0**-53, -2.0, 1.0]) == 2


def test_leading_zeros_and_constants() -> None:
    assert count_real_roots([2.0, 1.0, 0.0, 0.0]) == 1
    assert count_real_roots([5.0]) == 0
    with pytest.raises(ValueError, match="zero polynomial"):
        count_real_roots([0.0, 0.0])


def test_values_are_correctly_rounded() -> None:
    # (s - 1)^7 near 1, where Horner in float64 has no digit right.
    coefficients = [-1.0, 7.0, -21.0, 35.0, -35.0, 21.0, -7.0, 1.0]
    points = [1.0 + 2.0**-12, 1.0 - 2.0**-20, -3.7, 1e-9]
    assert values(coefficients, points) == [float((Fraction(point) - 1) ** 7) for point in points]


@settings(deadline=None, derandomize=True)
@given(ROOTS, QUADRATICS, LEAD, st.integers(-7, 7))
def test_the_largest_root(roots: list[int], quadratics: list[tuple[int, int]], lead: int, high: int) -> None:
    """Roots may be multiple, and `high` may be one."""
    expected = max((root for root in roots if root <= high), default=None)
    assert largest_root(expand(roots, quadratics, lead), high) == expected


@pytest.mark.parametrize("constant", [2.0, 3.0, 1e-300, 1e300, 5e-324])
def test_the_largest_root_is_rounded_upward(constant: float) -> None:
    """Of s^2 = c: no float below it is as large as the root."""
    for high, sign in ((1e200, 1), (0.0, -1)):
        root = largest_root([-constant, 0.0, 1.0], high)
        assert root is not None
        below = nextafter(root, -inf)
        squares = [Fraction(x) ** 2 for x in (below, root)]
        exact = Fraction(constant)
        assert squares[0] < exact <= squares[1] if sign > 0 else squares[1] <= exact < squares[0]
