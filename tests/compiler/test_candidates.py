"""Which polynomials may serve: all within the limits of rank, eps and sign, and no others."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from fastgrad_compiler.approximation.polynomial import FAMILIES, MAX_DEGREE, Polynomial, PrecisionError, fit
from fastgrad_compiler.planning.candidates import MAX_RANK, Policy, fits, highest_degree, polynomials
from fastgrad_compiler.runtime.monomials import rank


@pytest.mark.parametrize("d", [1, 4, 16, 199, 200, 20_000])
def test_the_highest_degree_is_the_last_within_the_rank(d: int) -> None:
    found = highest_degree(d)
    assert found == 0 or rank(d, found) <= MAX_RANK
    assert found == MAX_DEGREE or rank(d, found + 1) > MAX_RANK
    assert Policy(d, True, max_rank=rank(d, 1)).highest_degree >= 1
    assert Policy(d, True, max_rank=rank(d, 1) - 1).highest_degree == 0


@pytest.mark.parametrize("proved", [True, False])
@pytest.mark.parametrize("bound", [0.5, 2.0, 6.0])
def test_all_polynomials_within_the_limits(bound: float, proved: bool) -> None:
    limits = Policy(8, proved, max_rank=rank(8, 6), max_eps=0.5)
    expected = [
        polynomial
        for family, degree in product(FAMILIES, range(1, 7))
        if (polynomial := fit(family, degree, bound)).positive
        and polynomial.eps <= 0.5
        and (proved or polynomial.positive_from is None)
    ]
    assert list(polynomials(bound, limits)) == expected
    assert expected
    above = [each for each in expected if each.family == "minimax" and each.degree > 2]
    assert list(polynomials(bound, limits, ("minimax",), above=2)) == above


def test_eps_is_below_1_without_a_limit() -> None:
    limits = Policy(1, True)
    found = list(polynomials(6.0, limits))
    assert max(each.eps for each in found) < 1 < max(fit(f, 2, 6.0).eps for f in FAMILIES)
    assert not list(polynomials(6.0, replace(limits, max_eps=0.0)))


def test_what_float64_cannot_hold_says_so() -> None:
    (error,) = fits("balanced", 25.0, (4,))
    assert isinstance(error, PrecisionError)
    (found,) = fits("balanced", 1.0, (4,))
    assert isinstance(found, Polynomial)
    assert not list(polynomials(25.0, Policy(1, True)))
