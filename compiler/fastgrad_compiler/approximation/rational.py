"""Polynomials with float coefficients in exact rational arithmetic: values, signs, and counts of real roots.

Floats are rationals, so that what is said here is proved and needs no tolerance. Coefficients are ascending,
in the monomial basis. Pure Python; a count takes about 0.5 ms at degree 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import gcd, inf, isinf, lcm, ldexp
from sys import float_info
from typing import TypeVar

_Number = TypeVar("_Number", int, float)


def values(coefficients: Sequence[float], points: Sequence[float]) -> list[float]:
    """The polynomial at finite points, each correctly rounded."""
    numerators, scale = _integers(coefficients)
    found = []
    for point in points:
        value, power = _horner(numerators, point)
        found.append(value / (scale * power))
    return found


def sign_at(coefficients: Sequence[float], point: float) -> int:
    """Sign, -1, 0 or 1, of the polynomial at a point."""
    return _sign(_integers(coefficients)[0], point)


def count_real_roots(coefficients: Sequence[float], low: float = -inf, high: float = inf) -> int:
    """Number of distinct real roots in (low, high].

    Args:
        coefficients: ascending, in the monomial basis; finite.
        low, high: ends of the interval, `low < high`; either may be infinite. Neither may be a root.

    Raises:
        ValueError: the zero polynomial, which has no count.
    """
    chain = _chain(trimmed(_integers(coefficients)[0]))
    return _variations(chain, low) - _variations(chain, high)


def largest_root(coefficients: Sequence[float], high: float) -> float | None:
    """The largest real root up to and with `high`, rounded upward to a float; None where there is none.

    Args:
        coefficients: ascending, in the monomial basis; finite, not all 0.
        high: finite.
    """
    chain = _squarefree_chain(trimmed(_integers(coefficients)[0]))
    low, high = min(-_size_of_roots(chain[0]), high), float(high)
    below, above, sign = _variations(chain, low), _variations(chain, high), _sign(chain[0], high)
    if _variations(chain, -inf) == above:
        return None
    while low < (middle := low / 2 + high / 2) < high:
        here = _sign(chain[0], middle)
        single = below - above == 1  # the sign tells on which side it lies
        passed = (above if here in (0, sign) else below) if single else _variations(chain, middle)
        if passed != above:
            low, below = middle, passed
        elif here == 0:
            return middle
        else:
            high, sign = middle, here
    return high


def _integers(coefficients: Sequence[float]) -> tuple[list[int], int]:
    """Integer numerators over one common denominator."""
    exact = [Fraction(coefficient) for coefficient in coefficients]
    scale = lcm(*(value.denominator for value in exact))
    return [int(value * scale) for value in exact], scale


def trimmed(coefficients: Sequence[_Number]) -> list[_Number]:
    """Without zeros after the last power; empty where all of them are zero."""
    length = len(coefficients)
    while length and coefficients[length - 1] == 0:
        length -= 1
    return list(coefficients[:length])


def _chain(first: list[int]) -> list[list[int]]:
    """p, p', and negated remainders, each up to a positive factor."""
    if not first:
        raise ValueError("the zero polynomial has no isolated roots")
    chain = [first]
    following = [power * value for power, value in enumerate(first)][1:]
    while following:
        chain.append(_primitive(following))
        following = [-value for value in _divided(chain[-2], chain[-1])[1]]
    return chain


def _squarefree_chain(polynomial: list[int]) -> list[list[int]]:
    """The chain of a polynomial with the same roots, each once."""
    chain = _chain(polynomial)
    common = chain[-1]
    return _chain(_primitive(_divided(polynomial, common)[0])) if len(common) > 1 else chain


def _size_of_roots(polynomial: list[int]) -> float:
    """A power of two above all roots in size, by Cauchy's bound; at most the largest float."""
    ratio = max(map(abs, polynomial)) // abs(polynomial[-1]) + 2
    return ldexp(1.0, ratio.bit_length()) if ratio.bit_length() < 1024 else float_info.max


def _divided(dividend: list[int], divisor: list[int]) -> tuple[list[int], list[int]]:
    """Quotient and remainder times the same positive number; the remainder without leading zeros."""
    rest, quotient = list(dividend), [0] * max(len(dividend) - len(divisor) + 1, 0)
    lead = divisor[-1]
    while len(rest) >= len(divisor):
        factor, shift = rest[-1], len(rest) - len(divisor)
        if lead < 0:
            factor = -factor
        rest = [value * abs(lead) for value in rest]
        quotient = [value * abs(lead) for value in quotient]
        quotient[shift] += factor
        for place, value in enumerate(divisor):
            rest[shift + place] -= factor * value
        rest = trimmed(rest)
    return quotient, rest


def _primitive(polynomial: list[int]) -> list[int]:
    content = gcd(*polynomial)
    return [value // content for value in polynomial]


def _variations(chain: list[list[int]], point: float) -> int:
    signs = [sign for polynomial in chain if (sign := _sign(polynomial, point))]
    return sum(left != right for left, right in pairwise(signs))


def _sign(polynomial: list[int], point: float) -> int:
    """Of its limit, where the point is infinite; such a polynomial has no leading zeros."""
    if isinf(point):
        odd = len(polynomial) % 2 == 0
        value = -polynomial[-1] if odd and point < 0 else polynomial[-1]
    else:
        value = _horner(polynomial, point)[0]
    return (value > 0) - (value < 0)


def _horner(polynomial: list[int], point: float) -> tuple[int, int]:
    """Numerator and positive denominator of the value at a finite point."""
    numerator, denominator = float(point).as_integer_ratio()
    value, power = polynomial[-1], 1
    for coefficient in polynomial[-2::-1]:
        power *= denominator
        value = value * numerator + coefficient * power
    return value, power
