"""Arithmetic of float64 that is rounded up: what a bound is computed from may be rounded, the bound holds all the same.

Each function gives the exact result where float64 has it, and the next larger number otherwise; what is rounded down
is the negative of a negative, never -0. Sums, products, quotients and roots are the same on every machine, as IEEE 754
has them.
"""

from __future__ import annotations

from math import inf, isinf, isnan, nextafter, sqrt
from sys import float_info

_LARGEST = float_info.max


def add_up(x: float, y: float) -> float:
    """At least x + y; infinity less infinity is infinity."""
    total = x + y
    if isnan(total):
        return inf
    if isinf(total):
        return _overflowed(total, x, y)
    part = total - x
    error = (x - (total - part)) + (y - part)  # Knuth's exact error of a sum
    return total if error <= 0 else nextafter(total, inf)


def add_down(x: float, y: float) -> float:
    """At most x + y; infinity less infinity is -infinity."""
    return 0.0 - add_up(-x, -y)


def times_up(x: float, y: float) -> float:
    """At least x y, where 0 wins over infinity."""
    if x == 0 or y == 0:
        return 0.0
    result = x * y
    if isinf(result):
        return _overflowed(result, x, y)
    (a, b), (c, d), (e, f) = (value.as_integer_ratio() for value in (x, y, result))
    return nextafter(result, inf) if a * c * f > e * b * d else result


def times_down(x: float, y: float) -> float:
    """At most x y, where 0 wins over infinity."""
    return 0.0 - times_up(-x, y)


def over_up(x: float, y: float) -> float:
    """At least x / y for y other than 0, where a finite x over infinity is 0 and infinity over it infinity."""
    if isinf(y):
        return inf if isinf(x) else 0.0
    result = x / y
    if isinf(result):
        return _overflowed(result, x)
    (a, b), (c, d), (e, f) = (value.as_integer_ratio() for value in (x, y, result))
    above = a * d * f > e * c * b if c > 0 else a * d * f < e * c * b
    return nextafter(result, inf) if above else result


def over_down(x: float, y: float) -> float:
    """At most x / y for y other than 0, where a finite x over infinity is 0 and infinity over it -infinity."""
    return 0.0 - over_up(-x, y)


def root_up(x: float) -> float:
    """At least the root of x >= 0."""
    result = sqrt(x)
    return nextafter(result, inf) if times_down(result, result) < x else result


def root_down(x: float) -> float:
    """At most the root of x >= 0."""
    result = sqrt(x)
    return nextafter(result, 0.0) if times_up(result, result) > x else result


def root_sum_up(*norms: float) -> float:
    """At least the norm of parts with these norms."""
    total = 0.0
    for norm in norms:
        total = add_up(total, times_up(norm, norm))
    return root_up(total)


def _overflowed(result: float, *operands: float) -> float:
    """An infinite result: of infinite operands, or of finite ones, where the true result is finite."""
    return result if result > 0 or any(map(isinf, operands)) else -_LARGEST
