"""Elementary functions: correctly rounded, with the special values and errors of `math`, and no hidden state."""

from __future__ import annotations

import decimal
import math
import random
from collections.abc import Callable
from fractions import Fraction
from math import inf, nan, nextafter

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgrad_compiler.approximation import elementary

FUNCTIONS: dict[str, tuple[float, float]] = {
    "exp": (-740.0, 709.0),
    "log": (1e-300, 1e300),
    "log10": (1e-300, 1e300),
    "log1p": (-0.99, 1e10),
    "tanh": (-25.0, 25.0),
    "erf": (-7.0, 7.0),
}
SPECIAL = (
    0.0,
    -0.0,
    inf,
    -inf,
    nan,
    1e-300,
    -1e-300,
    5e-324,
    -5e-324,
    1e-20,
    0.5,
    -0.5,
    1e300,
    -1e300,
    710.0,
    -1.0,
    -2.0,
)


def nearest(value: mpmath.mpf) -> float:
    """The float nearest to a number of many digits: mpmath's own conversion truncates subnormal numbers twice."""
    sign, mantissa, exponent, _ = value._mpf_
    exact = Fraction(int(mantissa)) * Fraction(2) ** exponent
    return float(-exact if sign else exact)


def points(low: float, high: float) -> list[float]:
    """Over the range, near 0, and of all sizes."""
    draw = random.Random(7)
    found = [draw.uniform(low, high) for _ in range(40)]
    found += [draw.choice((-1, 1)) * 10 ** draw.uniform(-25, 1) for _ in range(80)]
    return [x for x in found if low <= x <= high]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_correctly_rounded(name: str) -> None:
    function: Callable[[float], float] = getattr(elementary, name)
    with mpmath.workdps(120):
        for x in points(*FUNCTIONS[name]):
            assert function(x) == nearest(getattr(mpmath, name)(mpmath.mpf(x))), x


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("x", SPECIAL)
def test_special_values_and_errors_are_those_of_math(name: str, x: float) -> None:
    results = []
    for function in (getattr(math, name), getattr(elementary, name)):
        try:
            results.append(function(x))
        except (ValueError, OverflowError) as error:
            results.append(type(error))
    expected, found = results
    if isinstance(expected, float) and isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-15, abs=0, nan_ok=True)
        assert math.copysign(1.0, found) == math.copysign(1.0, expected)
    else:
        assert found == expected


@settings(max_examples=60)
@given(st.floats(1e-3, 1e3), st.integers(0, 20))
def test_whole_powers(base: float, exponent: int) -> None:
    assert elementary.power(base, exponent) == float(Fraction(base) ** exponent)
    assert elementary.power(-base, exponent) == float(Fraction(-base) ** exponent)


def test_other_powers() -> None:
    with mpmath.workdps(60):
        for base in (1e-9, 0.3, 1.0, 7.5, 1e12):
            for exponent in (0.06, 0.5, 1 / 24, 3.7):
                assert elementary.power(base, exponent) == nearest(mpmath.mpf(base) ** mpmath.mpf(exponent))
    assert elementary.power(0.0, 0) == 1.0
    assert elementary.power(inf, 2) == inf
    assert elementary.power(-inf, 3) == -inf
    with pytest.raises(OverflowError):
        elementary.power(1e200, 2)


def test_up() -> None:
    third = decimal.Decimal(1) / 3
    assert nextafter(elementary.up(third), 0.0) < third <= elementary.up(third)
    assert elementary.up(decimal.Decimal("0.25")) == 0.25
    assert elementary.up(decimal.Decimal("-1e-400")) == 0.0
    assert elementary.up(decimal.Decimal("1e-400")) == 5e-324
    assert elementary.up(decimal.Decimal("1e400")) == inf


def test_the_callers_decimal_settings_change_nothing() -> None:
    names = [*FUNCTIONS, "power"]
    arguments = {"power": (0.7, 0.3)}

    def everything() -> list[float]:
        return [getattr(elementary, name)(*arguments.get(name, (0.7,))) for name in names]

    expected = everything()
    strict = decimal.Context(prec=3, rounding=decimal.ROUND_UP, Emin=-1, Emax=1, traps=[decimal.Inexact])
    with decimal.localcontext(strict):
        assert everything() == expected


def test_a_sum_is_taken_from_left_to_right() -> None:
    assert elementary.added([1e16, 1.0, 1.0]) == 1e16
    assert elementary.added([]) == 0.0
    assert elementary.added([1e308, 1e308]) == inf
