"""Sign changes and the errors that rest on them, for polynomials made to be hard: multiple, close and missing roots."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_compiler.approximation.elementary import arithmetic
from fastgrad_compiler.approximation.polynomial import errors
from fastgrad_compiler.approximation.turning_points import Pieces, all_roots, derivative, pieces

Rational = list[Fraction]
ROOTS = st.lists(st.integers(-8, 8).map(lambda root: Fraction(root, 8)), min_size=1, max_size=7)
EMPTY = st.lists(st.tuples(st.integers(-8, 8), st.sampled_from([1, 10**6, 10**16])), max_size=2)


def product(roots: list[Fraction], pairs: list[tuple[int, int]]) -> Rational:
    """Ascending coefficients of prod (s - root) * prod ((s - a / 8)^2 + 1 / b)."""
    factors = [[-root, Fraction(1)] for root in roots]
    factors += [[Fraction(a * a, 64) + Fraction(1, b), Fraction(-2 * a, 8), Fraction(1)] for a, b in pairs]
    result = [Fraction(1)]
    for factor in factors:
        longer = [Fraction(0)] * (len(result) + len(factor) - 1)
        for i, x in enumerate(result):
            for j, y in enumerate(factor):
                longer[i + j] += x * y
        result = longer
    return result


def at(polynomial: Rational, point: Fraction) -> Fraction:
    return sum((c * point**power for power, c in enumerate(polynomial)), Fraction(0))


def cut(polynomial: Rational, bound: int, near: tuple[float, ...] = ()) -> Pieces:
    with localcontext(arithmetic(60)):
        exact = [Decimal(c.numerator) / c.denominator for c in polynomial]
        return pieces(exact, Decimal(-bound), Decimal(bound), list(map(Decimal, near)))


def holds(polynomial: Rational, found: Pieces) -> None:
    """On each piece the polynomial is at least -slack, or at most slack: seen in exact arithmetic."""
    slack = Fraction(found.slack)
    for low, high in pairwise(map(Fraction, found.cuts)):
        values = [at(polynomial, low + (high - low) * i / 12) for i in range(13)]
        assert min(values) >= -slack or max(values) <= slack


@settings(max_examples=40)
@given(ROOTS, EMPTY)
def test_pieces(roots: list[Fraction], pairs: list[tuple[int, int]]) -> None:
    polynomial = product(roots, pairs)
    found = cut(polynomial, 2)
    assert found.slack < Decimal("1e-45")
    holds(polynomial, found)
    odd = {root for root in roots if roots.count(root) % 2}
    # A root of multiplicity 11 is as uncertain as the 11th root of the slack.
    assert all(any(abs(Fraction(c) - root) < Fraction(1, 1000) for c in found.cuts) for root in odd)


@settings(max_examples=40)
@given(st.sets(st.integers(-8, 8), min_size=1, max_size=7), st.floats(-0.3, 0.3))
def test_guesses_change_nothing_but_the_time(numerators: set[int], off: float) -> None:
    """Good ones, bad ones and too few: the roots are the same, and the slack is a bound."""
    roots = sorted(Fraction(numerator, 8) for numerator in numerators)
    polynomial = product(roots, [])
    for near in ([float(root) + off / 8 for root in roots], [off] * len(roots), [off]):
        found = cut(polynomial, 2, tuple(near))
        assert [float(c) for c in found.cuts[1:-1]] == pytest.approx(
            list(map(float, roots)), rel=0, abs=1e-20
        )
        assert found.slack < Decimal("1e-20")
        holds(polynomial, found)


def test_guesses_that_miss_a_root_are_seen() -> None:
    with localcontext(arithmetic(60)):
        square = [Decimal(c) for c in (-1, 0, 1)]
        ends = Decimal(-2), Decimal(2)
        assert all_roots(square, *ends, [Decimal("-0.9"), Decimal("0.9")]) is not None
        assert all_roots(square, *ends, [Decimal("0.8"), Decimal("0.9")]) is None
        assert all_roots(square, *ends, [Decimal("0.9")]) is None
        assert all_roots(square, Decimal(0), Decimal(2), [Decimal("-0.9"), Decimal("0.9")]) is None
        assert derivative([Decimal(5)]) == [0]


@settings(max_examples=60)
@given(ROOTS, EMPTY, st.sampled_from([0.5, 1.0, 3.0, 12.0]))
def test_errors_hold_where_their_extrema_are_hard_to_find(
    roots: list[Fraction], pairs: list[tuple[int, int]], bound: float
) -> None:
    """p' - p is given, with multiple and almost real roots: p is minus the sum of its derivatives."""
    turning, total = product(roots, pairs), [Fraction(0)]
    while turning:
        total = [
            x + y for x, y in zip(total + [Fraction(0)] * (len(turning) - len(total)), turning, strict=False)
        ] + total[len(turning) :]
        turning = [power * c for power, c in enumerate(turning)][1:]
    coefficients = [-float(c) for c in total]
    claimed = errors(coefficients, bound)
    with localcontext(arithmetic(60)):
        exact = [Decimal(c) for c in coefficients]
        slope = [power * c for power, c in enumerate(exact)][1:] or [Decimal(0)]
        grid = {Decimal(bound) * i / 40 for i in range(-40, 41)} | {Decimal(float(root)) for root in roots}
        inside = [s for s in grid if abs(s) <= Decimal(bound)]
        for polynomial, bound_ in zip((exact, slope), claimed, strict=True):
            sampled = max(
                abs(sum(c * s**power for power, c in enumerate(polynomial)) * (-s).exp() - 1)
                for s in inside
                if s
            )
            assert sampled <= Decimal(bound_) * (1 + Decimal("1e-50"))


@pytest.mark.parametrize("bound", [0.3, 650.0])
def test_a_bound_is_not_far_above_what_is_attained(bound: float) -> None:
    """Of p = 1 + s + s^2 / 2, whose error is largest at the lower end."""
    with localcontext(arithmetic(60)):
        low = Decimal(-bound)
        attained = abs((1 + low + low * low / 2) * (-low).exp() - 1)
        claimed = Decimal(errors((1.0, 1.0, 0.5), bound).eps)
        assert attained <= claimed <= attained * (1 + Decimal("3e-16"))
