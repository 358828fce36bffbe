"""Elementary functions whose results are the same everywhere: computed in decimal arithmetic, rounded once to float64.

`math` takes exp, log, pow and their like from the C library, whose variants for processors with and without fused
multiply-add differ in last bits. So whatever reaches a file of a compile comes from here; + - * / and sqrt are rounded
correctly by IEEE 754 itself. A call takes 10 to 30 us; errors and special values are those of `math`.

Python's `decimal` rounds exp, ln and log10 correctly by its specification. With DIGITS digits before the one rounding,
exp and log are the floats nearest to the true values: those of float64 need at most 49 digits (V. Lefevre, J.-M.
Muller, "Worst cases for correct rounding of the elementary functions in double precision", 2001).
"""

from __future__ import annotations

from collections.abc import Iterable
from decimal import (
    MAX_EMAX,
    MIN_EMIN,
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    localcontext,
)
from math import copysign, inf, isfinite, isnan, nextafter

DIGITS = 60

_LARGEST = 710.0  # e^710 is beyond the largest float
_LEAST = -746.0  # e^-746 is less than half the least float
_TINY = 1e-20  # below it, two terms of a series in x are exact to DIGITS digits after the first
_PI = Decimal(
    "3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211707"
)


def arithmetic(digits: int) -> Context:
    """Decimal arithmetic of so many digits, rounded to nearest, that no setting of the calling program changes."""
    return Context(
        prec=digits,
        rounding=ROUND_HALF_EVEN,
        Emin=MIN_EMIN,
        Emax=MAX_EMAX,
        capitals=1,
        clamp=0,
        flags=[],
        traps=[InvalidOperation, DivisionByZero, Overflow],
    )


def up(value: Decimal) -> float:
    """The least float that is not below a value; infinity beyond the largest."""
    nearest = float(value)
    return nearest if Decimal(nearest) >= value else nextafter(nearest, inf)


def exp(x: float) -> float:
    """e^x. Raises OverflowError where that is beyond the largest float."""
    if isfinite(x) and x > _LEAST:
        return _checked(arithmetic(DIGITS).exp(Decimal(x)) if x < _LARGEST else Decimal(inf))
    return 0.0 if x < 0 else x


def log(x: float) -> float:
    """The natural logarithm. Raises ValueError unless x > 0."""
    _positive(x)
    return float(arithmetic(DIGITS).ln(Decimal(x))) if isfinite(x) else x


def log10(x: float) -> float:
    """The decimal logarithm, whole for powers of ten. Raises ValueError unless x > 0."""
    _positive(x)
    return float(arithmetic(DIGITS).log10(Decimal(x))) if isfinite(x) else x


def log1p(x: float) -> float:
    """log(1 + x), accurate near 0. Raises ValueError unless x > -1."""
    _positive(x + 1 if x < -0.5 else 1.0)
    if not isfinite(x) or x == 0:
        return x
    with localcontext(arithmetic(2 * DIGITS)):
        exact = Decimal(x)
        return float((1 + exact).ln() if abs(x) > _TINY else exact - exact * exact / 2)


def tanh(x: float) -> float:
    """The hyperbolic tangent."""
    if isnan(x) or abs(x) < _TINY:
        return x  # x - x^3 / 3 is nearest to x
    if abs(x) > 20:
        return copysign(1.0, x)  # 1 - 2 e^-40 is nearest to 1
    with localcontext(arithmetic(2 * DIGITS)):
        shrunk = (-2 * abs(Decimal(x))).exp()
        return copysign(float((1 - shrunk) / (1 + shrunk)), x)


def erf(x: float) -> float:
    """The error function, 2 / sqrt(pi) e^(-x^2) sum of 2^n x^(2n+1) / (1 3 ... (2n+1)), whose terms have one sign."""
    if isnan(x) or x == 0:
        return x
    if abs(x) >= 6:
        return copysign(1.0, x)  # 1 - erf(6) is 2e-17, less than half the spacing of floats below 1
    with localcontext(arithmetic(DIGITS)) as context:
        exact = Decimal(x)
        square = exact * exact
        term = total = exact
        odd = 1
        while abs(term) > abs(total).scaleb(-context.prec):
            odd += 2
            term = term * 2 * square / odd
            total += term
        return float(2 * total * (-square).exp() / _PI.sqrt())


def power(base: float, exponent: float) -> float:
    """base^exponent for a base of at least 0, or a whole exponent of at least 0.

    Raises OverflowError where the result is beyond the largest float of finite arguments.
    """
    if exponent == 0:
        return 1.0
    result = arithmetic(DIGITS).power(Decimal(base), Decimal(exponent))
    return _checked(result) if isfinite(base) else float(result)


def added(values: Iterable[float]) -> float:
    """The sum from left to right, each step rounded; `sum` compensates for rounding from Python 3.12 on."""
    result = 0.0
    for value in values:
        result += value
    return result


def _positive(x: float) -> None:
    if x <= 0:
        raise ValueError("math domain error")


def _checked(value: Decimal) -> float:
    result = float(value)
    if not isfinite(result):
        raise OverflowError("math range error")
    return result
