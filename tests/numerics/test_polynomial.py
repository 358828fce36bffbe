"""The three families: errors, optimality against an independent solver, positivity, and float64's limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from decimal import ROUND_UP, Context, Decimal, Inexact, localcontext
from functools import reduce
from math import factorial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from fastgrad_compiler.approximation import polynomial, remez
from fastgrad_compiler.approximation.polynomial import (
    FAMILIES,
    MAX_DEGREE,
    Family,
    Polynomial,
    PrecisionError,
    errors,
    fit,
)
from fastgrad_compiler.approximation.rational import values

# bound, degree, then eps and eps' of taylor, minimax, balanced: the table of docs/mathematics.md, section 1.
TABLE = [
    (0.5, 2, 3.0e-2, 1.8e-1, 5.1e-3, 1.1e-1, 1.4e-2, 6.2e-2),
    (0.5, 4, 4.0e-4, 3.9e-3, 1.6e-5, 9.3e-4, 3.9e-5, 3.2e-4),
    (1.0, 2, 3.6e-1, 1.0e0, 4.0e-2, 5.2e-1, 8.7e-2, 2.3e-1),
    (1.0, 3, 9.4e-2, 3.6e-1, 5.0e-3, 1.1e-1, 1.3e-2, 4.0e-2),
    (1.0, 4, 1.9e-2, 9.4e-2, 5.0e-4, 1.7e-2, 1.1e-3, 5.0e-3),
    (1.0, 6, 4.8e-4, 3.3e-3, 3.1e-6, 1.8e-4, 6.7e-6, 4.2e-5),
    (2.0, 4, 1.5e0, 3.5e0, 1.4e-2, 3.1e-1, 3.4e-2, 7.1e-2),
    (2.0, 6, 1.5e-1, 5.1e-1, 3.6e-4, 1.3e-2, 8.0e-4, 2.5e-3),
    (3.0, 6, 6.3e0, 1.4e1, 5.3e-3, 1.6e-1, 1.1e-2, 2.4e-2),
    (4.0, 8, 2.8e1, 6.1e1, 2.0e-3, 7.6e-2, 4.2e-3, 8.5e-3),
]
TINIEST = Decimal("1e-50")  # what rounding in decimal arithmetic may add to eps


def sampled_errors(
    coefficients: tuple[float, ...], bound: float, count: int = 401
) -> tuple[Decimal, Decimal]:
    """Largest |p e^-s - 1| and |p' e^-s - 1| on a grid that is denser at its ends, to 80 digits."""
    grid = [-bound, *(bound * np.cos(np.linspace(np.pi, 0.0, count)[1:-1])).tolist(), bound]
    with localcontext(Context(prec=80)):
        points, exact = list(map(Decimal, grid)), list(map(Decimal, coefficients))
        slope = [power * c for power, c in enumerate(exact)][1:] or [Decimal(0)]
        shrunk = [(-s).exp() for s in points]
        value, other = (
            max(
                abs(reduce(lambda p, c: p * s + c, each[::-1]) * e - 1)
                for s, e in zip(points, shrunk, strict=True)
            )
            for each in (exact, slope)
        )
        return value, other


def fitted(family: Family, degree: int, bound: float) -> Polynomial:
    """The fit, or no example for hypothesis where float64 cannot hold it."""
    try:
        return fit(family, degree, bound)
    except PrecisionError:
        assume(False)
        raise


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"R={row[0]}-g={row[1]}")
def test_table(row: tuple[float, ...]) -> None:
    bound, degree = row[0], int(row[1])
    for family, published in zip(FAMILIES, (row[2:4], row[4:6], row[6:8]), strict=True):
        found = fit(family, degree, bound)
        assert (found.eps, found.eps_prime) == pytest.approx(published, rel=0.05), family


@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=15, derandomize=True)
@given(degree=st.integers(0, MAX_DEGREE), bound=st.floats(1e-3, 14.0))
def test_errors_are_upper_bounds_and_attained(family: Family, degree: int, bound: float) -> None:
    found = fitted(family, degree, bound)
    for claimed, sampled in zip(
        errors(found.coefficients, bound), sampled_errors(found.coefficients, bound), strict=True
    ):
        assert sampled <= claimed, "the bound is one without any tolerance"
        assert sampled >= Decimal("0.95") * Decimal(claimed) - TINIEST
    assert (found.eps, found.eps_prime) == pytest.approx(
        errors(found.coefficients, bound), rel=1e-15, abs=1e-25
    )


def test_errors_of_any_polynomial() -> None:
    # p = 2 + s on [-1, 1]: p e^-s - 1 has slope -(1 + s) e^-s, so its ends are e - 1 and 3 / e - 1.
    assert errors((2.0, 1.0), 1.0).eps == pytest.approx(np.e - 1, rel=1e-12)
    # p' = 1: e - 1 at the left end.
    assert errors((2.0, 1.0), 1.0).eps_prime == pytest.approx(np.e - 1, rel=1e-12)
    # p = 3 - s^2: p e^-s is largest at s = -1, inside, where it is 2 e.
    assert errors((3.0, 0.0, -1.0), 1.5).eps == pytest.approx(2 * np.e - 1, rel=1e-12)
    assert errors((1.0, 0.5), 0.0) == (0.0, 0.5)


def linear_program(degree: int, bound: float) -> float:
    """Least eps by another way: minimise the largest |p e^-s - 1| over 2,000 Chebyshev points."""
    grid = bound * np.cos(np.linspace(0.0, np.pi, 2000))
    basis = np.polynomial.chebyshev.chebvander(grid / bound, degree) * np.exp(-grid)[:, None]
    ones = np.ones((grid.size, 1))
    solution = linprog(
        np.append(np.zeros(degree + 1), 1.0),
        A_ub=np.block([[basis, -ones], [-basis, -ones]]),
        b_ub=np.concatenate([np.ones(grid.size), -np.ones(grid.size)]),
        bounds=[(None, None)] * (degree + 1) + [(0.0, None)],
        method="highs",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert solution.success
    assert solution.fun is not None
    return float(solution.fun)


@pytest.mark.parametrize(
    ("degree", "bound"), [(0, 1.0), (1, 0.5), (2, 1.0), (3, 2.0), (4, 3.0), (6, 4.0), (8, 5.0)]
)
def test_minimax_agrees_with_a_linear_program(degree: int, bound: float) -> None:
    # 2,000 points miss the extrema by about (pi / 2000)^2 of their height; the solver is good to about 1e-9.
    assert fit("minimax", degree, bound).eps == pytest.approx(
        linear_program(degree, bound), rel=1e-4, abs=1e-8
    )


@pytest.mark.parametrize(("degree", "bound"), [(1, 1.0), (2, 1e-3), (2, 1.0), (5, 3.0), (8, 6.0), (12, 9.0)])
def test_minimax_error_alternates(degree: int, bound: float) -> None:
    """Chebyshev's condition: degree + 2 extrema of equal height and alternating sign are optimal."""
    found = fit("minimax", degree, bound)
    grid = bound * np.cos(np.linspace(np.pi, 0.0, 4001))
    error = np.array(values(found.coefficients, grid.tolist())) * np.exp(-grid) - 1.0
    runs = np.split(error, np.flatnonzero(np.diff(np.sign(error))) + 1)
    heights = [float(np.abs(run).max()) for run in runs]
    assert len(heights) == degree + 2
    assert heights == pytest.approx([found.eps] * (degree + 2), rel=1e-3)


@pytest.mark.medium
@settings(deadline=None, max_examples=60, derandomize=True)
@given(degree=st.integers(1, MAX_DEGREE), bound=st.floats(1e-3, 14.0))
def test_balanced_is_optimal_in_its_derivative_and_near_it_in_value(degree: int, bound: float) -> None:
    balanced, best = fitted("balanced", degree, bound), fitted("minimax", degree, bound)
    lower = fitted("minimax", degree - 1, bound)
    assert balanced.eps_prime == pytest.approx(lower.eps, rel=2e-2, abs=1e-9)
    assert best.eps * 0.9 - 1e-9 <= balanced.eps <= 3.0 * best.eps + 1e-9
    assert balanced.eps_prime <= best.eps_prime * 1.02 + 1e-9


def test_minimax_pays_with_its_derivative() -> None:
    fits = [fit("minimax", degree, bound) for degree in range(2, 9) for bound in (0.5, 1.0, 2.0, 3.0, 4.0)]
    ratios = [found.eps_prime / found.eps for found in fits]
    assert 8 < min(ratios) < 9
    assert 170 < max(ratios) < 180


@pytest.mark.parametrize(("degree", "bound"), [(2, 1.0), (4, 2.0), (5, 3.0)])
@pytest.mark.parametrize("shift", [-1e-3, 1e-3])
def test_balanced_constant_is_the_best(degree: int, bound: float, shift: float) -> None:
    found = fit("balanced", degree, bound)
    moved = (found.coefficients[0] * (1 + shift), *found.coefficients[1:])
    assert errors(moved, bound).eps > found.eps


@settings(deadline=None, max_examples=60, derandomize=True)
@given(family=st.sampled_from(FAMILIES), degree=st.integers(0, 12), bound=st.floats(1e-3, 8.0))
def test_positivity_by_dense_sampling(family: Family, degree: int, bound: float) -> None:
    found = fitted(family, degree, bound)
    inside = values(found.coefficients, np.linspace(-bound, bound, 1001).tolist())
    assert (min(inside) > 0) == found.positive
    low = found.positive_from
    if low is None:
        wide = np.concatenate([-np.geomspace(1e-3, 1e6, 1500), np.linspace(-3 * bound, bound, 500)])
        assert min(values(found.coefficients, wide.tolist())) > 0
        return
    above = values(found.coefficients, np.linspace(low + 1e-6 * (bound - low), bound, 1001).tolist())
    assert min(above) > 0
    assert values(found.coefficients, [low - 1e-6 * (bound - low)])[0] < 0


@settings(deadline=None, max_examples=60, derandomize=True)
@given(family=st.sampled_from(["minimax", "balanced"]), half=st.integers(0, 6), bound=st.floats(1e-3, 10.0))
def test_even_degrees_of_fitted_families_are_positive_everywhere(
    family: Family, half: int, bound: float
) -> None:
    even = fitted(family, 2 * half, bound)
    assert even.positive
    assert even.positive_from is None
    odd = fitted(family, 2 * half + 1, bound)
    assert odd.positive
    assert odd.positive_from is not None
    assert odd.positive_from < -bound


def test_positivity_is_lost_where_a_taylor_polynomial_of_odd_degree_says() -> None:
    found = fit("taylor", 3, 2.0)
    assert not found.positive
    assert found.positive_from == pytest.approx(-1.5960716379833215, rel=1e-12)
    assert fit("taylor", 3, 1.5).positive


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("degree", [0, 1, 2, 5, 20])
def test_bound_zero_is_the_taylor_limit(family: Family, degree: int) -> None:
    found = fit(family, degree, 0.0)
    assert found.coefficients == tuple(1.0 / factorial(j) for j in range(degree + 1))
    assert found.eps == 0.0
    assert found.eps_prime == (0.0 if degree else 1.0)
    assert found.positive
    nearly = fit(family, degree, 1e-5)
    assert nearly.coefficients == pytest.approx(found.coefficients, rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bound", [1e-300, 1e-30, 1e-9, 1e-3, 0.1])
def test_tiny_ranges_keep_the_high_coefficients(family: Family, bound: float) -> None:
    """A fit in plain monomials would leave noise of 1e-16 / bound^j there."""
    found = fit(family, MAX_DEGREE, bound)
    assert found.coefficients == pytest.approx(
        fit("taylor", MAX_DEGREE, bound).coefficients, rel=2 * bound + 1e-12
    )


def test_small_ranges_approach_the_known_limit() -> None:
    """As R shrinks, the minimax error tends to that of s^(g+1) / (g+1)!, which is R^(g+1) / ((g+1)! 2^g)."""
    for degree in (1, 2, 3):
        limit = 1e-2 ** (degree + 1) / (factorial(degree + 1) * 2**degree)
        assert fit("minimax", degree, 1e-2).eps == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_too_wide_for_float64_are_refused(family: Family) -> None:
    with pytest.raises(PrecisionError, match=r"float64 cannot hold .* degree 20 on \[-30, 30\]"):
        fit(family, 20, 30.0)
    assert isinstance(PrecisionError("x"), ValueError)


def test_wide_ranges_are_out_of_reach() -> None:
    assert min(fit("minimax", degree, 15.0).eps for degree in range(1, 13)) > 0.87


@pytest.mark.parametrize("bound", [6.0, 8.0, 10.0, 12.0])
def test_high_degrees_stay_near_optimal_on_wide_ranges(bound: float) -> None:
    found = fit("minimax", MAX_DEGREE, bound)
    assert found.eps < fit("minimax", MAX_DEGREE - 2, bound).eps
    assert fit("balanced", MAX_DEGREE, bound).eps <= 3.0 * found.eps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit("cubic", 2, 1.0),
            "unknown polynomial family 'cubic'; choose one of taylor, minimax, balanced",
        ),
        (lambda: fit("taylor", -1, 1.0), "degree must lie in 0..20, not -1"),
        (lambda: fit("taylor", 21, 1.0), "degree must lie in 0..20, not 21"),
        (lambda: fit("taylor", 2, -0.5), "finite and not negative, not -0.5"),
        (lambda: fit("taylor", 2, float("nan")), "finite and not negative, not nan"),
        (lambda: fit("taylor", 2, float("inf")), "finite and not negative, not inf"),
    ],
)
def test_bad_arguments(call: Callable[[], Polynomial], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("bound", [1e-6, 0.3, 8.0, 18.3])
def test_every_degree_is_fitted_or_refused(bound: float) -> None:
    """And what is not is near the optimum: the exchange itself fails nowhere."""
    refused = []
    for degree in range(MAX_DEGREE + 1):
        for family in FAMILIES[1:]:
            try:
                found = fit(family, degree, bound)
            except PrecisionError:
                refused.append((family, degree))
                continue
            assert found.eps < 1
            assert found.positive
    assert not refused or (bound > 18 and min(degree for _, degree in refused) >= 18)


def test_the_callers_decimal_settings_change_nothing() -> None:
    def fresh() -> list[Polynomial]:
        remez.minimax.cache_clear()
        remez.balanced.cache_clear()
        return [fit.__wrapped__(family, degree, 2.3) for family in FAMILIES for degree in (0, 1, 4, 7)]

    expected = fresh()
    strict = Context(prec=3, rounding=ROUND_UP, Emin=-1, Emax=1, traps=[Inexact])
    with localcontext(strict):
        assert fresh() == expected


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize(("degree", "bound"), [(3, 1.0), (6, 0.02), (9, 5.0)])
def test_coefficients_are_rounded_once(
    monkeypatch: pytest.MonkeyPatch, family: Family, degree: int, bound: float
) -> None:
    """With 40 digits more, and an exchange that goes on to 1e-45, they are the same floats."""
    expected = fit(family, degree, bound).coefficients
    digits = remez._digits
    monkeypatch.setattr(remez, "_digits", lambda degree, bound: digits(degree, bound) + 40)
    monkeypatch.setattr(remez, "_LEVELLED", Decimal("1e-45"))
    remez.minimax.cache_clear()
    remez.balanced.cache_clear()
    assert fit.__wrapped__(family, degree, bound).coefficients == expected


def test_import_needs_neither_numpy_nor_torch() -> None:
    root = Path(polynomial.__file__).parents[1]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r});"
        "from fastgrad_compiler.approximation import certificates, polynomial;"
        "from fastgrad_compiler.planning import cost;"
        "print([name for name in ('numpy', 'torch', 'scipy') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
