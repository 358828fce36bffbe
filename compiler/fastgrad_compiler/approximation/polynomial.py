"""Polynomials that stand in for exp on [-R, R], and their proved errors (docs/mathematics.md, section 1).

A polynomial p is judged by `eps`, the largest relative error |p(s) e^-s - 1|, and by `eps_prime`, the same of
p', which the backward pass uses. Three families:

    taylor     sum of s^j / j!
    minimax    least eps of its degree, by Remez exchange; its derivative is poor
    balanced   the integral of the minimax polynomial of one degree less, with the constant that makes eps
               least: eps_prime is the least of its degree, eps at most 3 times the minimax one

Coefficients are computed in decimal arithmetic with as many digits as that takes, and rounded to float64 once; errors
are proved of the rounded ones and rounded upward. So they are the same to the last bit on every machine. What float64
cannot hold are wide ranges: a weight e^-R must come out of terms that add up to e^R, and `fit` refuses where the
rounding of the coefficients alone would spoil eps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, getcontext, localcontext
from functools import cache
from math import factorial, inf, isfinite
from typing import Literal, NamedTuple, TypeAlias, get_args

from fastgrad_compiler.approximation import remez
from fastgrad_compiler.approximation.elementary import arithmetic, up
from fastgrad_compiler.approximation.rational import largest_root, sign_at
from fastgrad_compiler.approximation.turning_points import (
    Coefficients,
    Pieces,
    derivative,
    pieces,
    refined,
    rounding,
    turning,
    value,
)

Family: TypeAlias = Literal["taylor", "minimax", "balanced"]
FAMILIES: tuple[Family, ...] = get_args(Family)
MAX_DEGREE = 20

_WIDEST = 18.3  # beyond, e^-R is about one rounding error of e^R, or less
_NARROWEST = 1e-25  # below, float64 does not tell the families apart
_EXACT = 800  # digits that hold the difference of any float and 1
_SUBOPTIMAL = 1.1  # largest eps of rounded coefficients, as a multiple of the fit's own
_NEGLIGIBLE = 1e-9  # what rounding may add to eps in any case


class PrecisionError(ValueError):
    """float64 cannot hold a polynomial of this family and degree on a range this wide."""


class Errors(NamedTuple):
    """Upper bounds over [-bound, bound]: `eps` of |p(s) e^-s - 1|, `eps_prime` of |p'(s) e^-s - 1|."""

    eps: float
    eps_prime: float


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A polynomial p close to exp on [-bound, bound].

    Args:
        family: how it was chosen.
        degree: g, at least 0.
        bound: R, half the width of the range of logits, at least 0.
        coefficients: g + 1 of them, ascending, in the monomial basis of s.
        eps: upper bound of |p(s) e^-s - 1| over the range; may exceed 1 where the degree is too low for it.
        eps_prime: the same for p'.
        positive: p > 0 on the whole range, proved by an exact count of roots.
        positive_from: the largest real root up to bound, so that p > 0 from there up to bound (where the root
            lies below -bound, which `positive` says); None where p > 0 for every s up to bound, however low.
            Proved as well.
    """

    family: Family
    degree: int
    bound: float
    coefficients: tuple[float, ...]
    eps: float
    eps_prime: float
    positive: bool
    positive_from: float | None


@cache
def fit(family: Family, degree: int, bound: float) -> Polynomial:
    """The polynomial of a family for logits in [-bound, bound].

    At bound 0 every family is the Taylor polynomial, the limit of the others as the range shrinks: p(0) =
    p'(0) = 1, so value and gradient are exact (the gradient from degree 1 on).

    Raises:
        ValueError: unknown family; degree outside 0..MAX_DEGREE; bound negative or not finite.
        PrecisionError: float64 cannot represent it: bounds over 18.3, and high degrees from about 12 on.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown polynomial family {family!r}; choose one of {', '.join(FAMILIES)}")
    if not 0 <= degree <= MAX_DEGREE:
        raise ValueError(f"degree must lie in 0..{MAX_DEGREE}, not {degree}")
    if not (isfinite(bound) and bound >= 0):
        raise ValueError(f"the bound of the logits must be finite and not negative, not {bound}")
    if bound > _WIDEST:
        raise _precision(family, degree, bound)
    bound = float(bound)
    coefficients, level, near = _fitted(family, degree, bound)
    eps, eps_prime = _errors(coefficients, bound, near)
    if eps > _SUBOPTIMAL * level + _NEGLIGIBLE:
        raise _precision(family, degree, bound)
    return Polynomial(family, degree, bound, coefficients, eps, eps_prime, *positivity(coefficients, bound))


def errors(coefficients: Sequence[float], bound: float) -> Errors:
    """eps and eps' of any polynomial on [-bound, bound]: proved, and rounded upward to float64.

    The extrema of p e^-s - 1 lie at the ends and where p' - p changes its sign; those of p' where its derivative does.

    Args:
        coefficients: ascending, in the monomial basis; finite.
        bound: R, in 0..700.
    """
    return _errors(coefficients, bound, ())


def positivity(coefficients: Sequence[float], bound: float) -> tuple[bool, float | None]:
    """Whether p > 0 on [-bound, bound], and the largest real root up to bound, rounded upward (None: there is none).

    Proved by Sturm's theorem in exact arithmetic.
    """
    root = largest_root(coefficients, bound)
    beyond = root is None or root < -bound or (root == -bound and sign_at(coefficients, -bound) > 0)
    return beyond and sign_at(coefficients, bound) > 0, root


def _precision(family: str, degree: int, bound: float) -> PrecisionError:
    return PrecisionError(
        f"float64 cannot hold the {family} polynomial of degree {degree} on [-{bound:g}, {bound:g}]: "
        f"weights down to e^-{bound:g} would be differences of terms up to e^{bound:g}"
    )


class _Fitted(NamedTuple):
    """Rounded coefficients, and of those before rounding eps (infinity of a Taylor polynomial) and `between`."""

    coefficients: tuple[float, ...]
    level: float
    near: Coefficients


def _fitted(family: Family, degree: int, bound: float) -> _Fitted:
    if family == "taylor" or bound < _NARROWEST:
        return _Fitted(tuple(1.0 / factorial(power) for power in range(degree + 1)), inf, ())
    find = remez.balanced if family == "balanced" and degree else remez.minimax
    found = find(degree, bound)
    return _Fitted(tuple(map(float, found.coefficients)), float(found.level), found.between)


def _errors(coefficients: Sequence[float], bound: float, near: Coefficients) -> Errors:
    """`near` has guesses at the extrema of the error of p' between the ends, or nothing."""
    if bound == 0:
        with localcontext(arithmetic(_EXACT)):
            value_at_zero, slope_at_zero = (*map(Decimal, coefficients[:2]), Decimal(0))[:2]
            return Errors(up(abs(value_at_zero - 1)), up(abs(slope_at_zero - 1)))
    radius = Decimal(bound)
    with localcontext(arithmetic(20)):
        lost = min(2 * radius.exp().adjusted(), 40) + len(coefficients)
    with localcontext(arithmetic(45 + lost)):
        polynomial = [Decimal(coefficient) for coefficient in coefficients]
        numerator = turning(polynomial)
        of_slope = pieces(derivative(numerator), -radius, radius, near)
        of_value = refined(numerator, of_slope)
        return Errors(_largest(polynomial, of_value), _largest(derivative(polynomial), of_slope))


def _largest(polynomial: Coefficients, extrema: Pieces) -> float:
    """Upper bound of |p(s) e^-s - 1| between the ends of the pieces of p' - p.

    On each it is monotone except for their slack, which e^-s magnifies. The last term is for the rounding of exp and of
    the few operations here.
    """
    radius = extrema.cuts[-1]
    worst = max(abs(value(polynomial, cut) * (-cut).exp() - 1) for cut in extrema.cuts)
    neglected = (2 * radius * extrema.slack + rounding(polynomial, radius)) * radius.exp()
    return up(worst + neglected + (worst + 1).scaleb(2 - getcontext().prec))
