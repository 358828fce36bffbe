"""Polynomials that stand in for exp on [-R, R], and their proved errors (docs/mathematics.md, section 1).

A polynomial p is judged by `eps`, the largest relative error |p(s) e^-s - 1|, and by `eps_prime`, the same of
p', which the backward pass uses. Three families:

    taylor     sum of s^j / j!
    minimax    least eps of its degree, by Remez exchange; its derivative is poor
    balanced   the integral of the minimax polynomial of one degree less, with the constant that makes eps
               least: eps_prime is the least of its degree, eps at most 3 times the minimax one

Every fit is computed as a small correction to the Taylor polynomial, in Chebyshev polynomials of s / R: all
quantities are then relative to the Taylor remainder, so that nothing is lost for small R or high degrees.
What float64 cannot hold are wide ranges: a weight e^-R must come out of terms that add up to e^R, and `fit`
refuses where the rounding of the coefficients alone would spoil eps.

numpy is imported by the functions that need it, to keep `import fastgrad_compiler.polynomial` cheap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import exp, factorial, inf, isfinite, log
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

from fastgrad_compiler.rational import count_real_roots, sign_at, values

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy import float64
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[float64]

Family: TypeAlias = Literal["taylor", "minimax", "balanced"]
FAMILIES: tuple[Family, ...] = get_args(Family)
MAX_DEGREE = 20

_UNIT = 2.0**-53
_WIDEST = 53 * log(2) / 2  # beyond, e^-R is less than one rounding error of e^R
_UNDERFLOW = 1e-200  # below, the Taylor remainder on the range is nothing, whatever the family
_EXCHANGES = 60
_LEVELLED = 1e-9  # relative spread of the error's extrema at which an exchange has converged
_SPREAD = 1e-2  # largest spread accepted where rounding stops an exchange before that
_SUBOPTIMAL = 1.1  # largest eps of rounded coefficients, as a multiple of the exchange's own
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
    correct = _CORRECTIONS[family] if bound ** (degree + 1) > _UNDERFLOW else _taylor
    correction, level = correct(degree, bound)
    coefficients = tuple(
        1.0 / factorial(j) + coefficient for j, coefficient in enumerate(_unscaled(correction, bound))
    )
    eps, eps_prime = errors(coefficients, bound)
    if eps > _SUBOPTIMAL * level + _NEGLIGIBLE:
        raise _precision(family, degree, bound)
    return Polynomial(family, degree, bound, coefficients, eps, eps_prime, *positivity(coefficients, bound))


def least_degree(
    family: Family, bound: float, eps_max: float, *, max_degree: int = MAX_DEGREE
) -> Polynomial | None:
    """The polynomial of least degree, from 1 on, with eps <= eps_max and p > 0 proved on the range.

    An odd degree is as good as an even one where positivity on the range is proved; `positive_from` says how
    far below it still holds. None where no degree does it, be it for the budget or for float64.
    """
    for degree in range(1, min(max_degree, MAX_DEGREE) + 1):
        try:
            candidate = fit(family, degree, bound)
        except PrecisionError:
            continue
        if candidate.eps <= eps_max and candidate.positive:
            return candidate
    return None


def errors(coefficients: Sequence[float], bound: float) -> Errors:
    """eps and eps' of any polynomial on [-bound, bound].

    The extrema of p e^-s - 1 lie at the roots of p' - p, which are computed, and at the ends; so also for p'.
    There p is evaluated exactly, and the rounding of what follows, a few units of 2^-53, is added.

    Args:
        coefficients: ascending, in the monomial basis.
        bound: R, in 0..700.
    """
    derivative = tuple(j * value for j, value in enumerate(coefficients))[1:] or (0.0,)
    return Errors(_relative_error(tuple(coefficients), bound), _relative_error(derivative, bound))


def positivity(coefficients: Sequence[float], bound: float) -> tuple[bool, float | None]:
    """Whether p > 0 on [-bound, bound], and the largest real root up to bound (None: there is none).

    Proved by Sturm's theorem in exact arithmetic; only the place of the root is a float.
    """
    ends = sign_at(coefficients, bound) > 0 and sign_at(coefficients, -bound) > 0
    positive = ends and (bound == 0 or count_real_roots(coefficients, -bound, bound) == 0)
    below = count_real_roots(coefficients, -inf, bound)
    if below == 0:
        return positive, None
    import numpy as np

    roots = np.roots(coefficients[::-1])
    real = sorted(roots[roots.real <= bound], key=lambda root: abs(root.imag))[:below]
    return positive, max((float(root.real) for root in real), default=bound)


def _precision(family: str, degree: int, bound: float) -> PrecisionError:
    return PrecisionError(
        f"float64 cannot hold the {family} polynomial of degree {degree} on [-{bound:g}, {bound:g}]: "
        f"weights down to e^-{bound:g} would be differences of terms up to e^{bound:g}"
    )


# --- errors --------------------------------------------------------------------------


def _relative_error(coefficients: tuple[float, ...], bound: float) -> float:
    """Upper bound of |p(s) e^-s - 1| over [-bound, bound]."""
    if bound == 0:
        return abs(coefficients[0] - 1.0)
    import numpy as np

    degree = len(coefficients) - 1
    correction = (np.asarray(coefficients) - _inverse_factorials(degree)) * bound ** np.arange(degree + 1)
    points: list[float] = (bound * _extrema(correction, degree, bound)).tolist()
    at_points = zip(points, values(coefficients, points), strict=True)
    worst = max(abs(value * exp(-point) - 1.0) for point, value in at_points)
    return worst + 6 * _UNIT * (1.0 + worst)


def _extrema(correction: Array, degree: int, bound: float) -> Array:
    """Where p e^-s - 1 can be extremal, in t = s / bound, ascending from -1 to 1.

    p is the Taylor polynomial plus `correction` (ascending, in powers of t); the Taylor part of p' - p is
    minus its last term. Real parts of complex roots are returned as well: one more point at which the error
    is evaluated can only be right.
    """
    import numpy as np

    if degree == 0:
        return np.array([-1.0, 1.0])
    slope = np.append(correction[1:] * np.arange(1, degree + 1), 0.0) / bound
    residual = slope - correction
    residual[-1] -= bound**degree / factorial(degree)
    residual = _to_chebyshev(degree) @ residual
    largest = np.abs(residual).max()
    chebyshev = np.polynomial.chebyshev.chebtrim(residual / (largest or 1.0), tol=_UNDERFLOW)
    roots = np.polynomial.chebyshev.chebroots(chebyshev)
    inside = roots.real[np.abs(roots.real) < 1.0]
    return np.concatenate(([-1.0], np.sort(inside), [1.0]))


def taylor_remainder(points: Array, degree: int) -> Array:
    """1 - T(s) e^-s for the Taylor polynomial T of exp, to full relative accuracy where that is small.

    Near 0 it is e^-s times the sum of the terms that T leaves out, whose ratio is at most 1/2 there.
    """
    import numpy as np

    near = np.abs(points) < (degree + 2) / 2
    result = np.empty_like(points)
    inner, outer = points[near], points[~near]
    tail = np.cumprod(np.append(1.0, 1.0 / np.arange(degree + 2, degree + 60)))
    series = (inner[:, None] ** np.arange(tail.size)) @ tail
    result[near] = inner ** (degree + 1) / factorial(degree + 1) * np.exp(-inner) * series
    result[~near] = 1.0 - np.polyval(_inverse_factorials(degree)[::-1], outer) * np.exp(-outer)
    return result


# --- families ------------------------------------------------------------------------


class _Fit(NamedTuple):
    """A correction to the Taylor polynomial, ascending in powers of t = s / bound, and its unrounded eps."""

    correction: Array
    level: float


def _taylor(degree: int, bound: float) -> _Fit:
    import numpy as np

    return _Fit(np.zeros(degree + 1), inf)


def _balanced(degree: int, bound: float) -> _Fit:
    """Integrate the minimax correction of degree g - 1, then level the two extreme errors by the constant."""
    import numpy as np

    if degree == 0:
        return _minimax(degree, bound)
    inner = _minimax(degree - 1, bound).correction
    correction = np.append(0.0, inner * bound / np.arange(1, degree + 1))
    powers = np.arange(degree + 1)
    spread = inf
    for _ in range(_EXCHANGES):
        points = _extrema(correction, degree, bound)
        weight = np.exp(-bound * points)
        error = (points[:, None] ** powers @ correction) * weight - taylor_remainder(bound * points, degree)
        high, low = int(np.argmax(error)), int(np.argmin(error))
        previous, spread = spread, abs(error[high] + error[low]) / (error[high] - error[low])
        if spread <= _LEVELLED or (spread >= previous and spread <= _SPREAD):
            return _Fit(correction, float(max(error[high], -error[low])))
        correction[0] -= (error[high] + error[low]) / (weight[high] + weight[low])
    raise _precision("balanced", degree, bound)


def _minimax(degree: int, bound: float) -> _Fit:
    """Remez exchange on the relative error.

    p' - p has `degree` roots, so the alternating set of degree + 2 points is both ends and all of them: each
    exchange replaces the whole set, and converges quadratically.
    """
    import numpy as np

    signs = (-1.0) ** np.arange(degree + 2)
    points = np.cos(np.pi * np.arange(degree + 1, -1, -1) / (degree + 1))
    best, spread = _taylor(degree, bound), inf
    for _ in range(_EXCHANGES):
        weight = np.exp(-bound * points)
        system = np.column_stack(
            (np.polynomial.chebyshev.chebvander(points, degree) * weight[:, None], signs)
        )
        chebyshev = np.linalg.solve(system, taylor_remainder(bound * points, degree))[:-1]
        correction = _from_chebyshev(degree) @ chebyshev
        points = _extrema(correction, degree, bound)
        if points.size != degree + 2 or not np.all(np.diff(points) > 0):
            break
        error = np.polynomial.chebyshev.chebval(points, chebyshev) * np.exp(-bound * points)
        error = np.abs(error - taylor_remainder(bound * points, degree))
        previous, spread = spread, float((error.max() - error.min()) / error.max())
        if spread < previous:
            best = _Fit(correction, float(error.max()))
        if spread <= _LEVELLED or (spread >= previous and previous <= _SPREAD):
            return best
    raise _precision("minimax", degree, bound)


_CORRECTIONS: dict[Family, Callable[[int, float], _Fit]] = {
    "taylor": _taylor,
    "minimax": _minimax,
    "balanced": _balanced,
}


# --- bases ---------------------------------------------------------------------------


def _unscaled(correction: Array, bound: float) -> list[float]:
    """From powers of t = s / bound to powers of s; a correction of zero stays zero at bound 0."""
    return [float(value) / bound**j if value else 0.0 for j, value in enumerate(correction)]


@cache
def _inverse_factorials(degree: int) -> Array:
    import numpy as np

    return np.array([1.0 / factorial(j) for j in range(degree + 1)])


@cache
def _from_chebyshev(degree: int) -> Array:
    """Matrix from Chebyshev to monomial coefficients; integers, exact in float64 up to MAX_DEGREE."""
    import numpy as np

    matrix = np.zeros((degree + 1, degree + 1))
    for j in range(degree + 1):
        column = np.polynomial.chebyshev.cheb2poly([0.0] * j + [1.0])
        matrix[: column.size, j] = column
    return matrix


@cache
def _to_chebyshev(degree: int) -> Array:
    """Matrix from monomial to Chebyshev coefficients; dyadic, exact in float64 up to MAX_DEGREE."""
    import numpy as np

    matrix = np.zeros((degree + 1, degree + 1))
    for j in range(degree + 1):
        column = np.polynomial.chebyshev.poly2cheb([0.0] * j + [1.0])
        matrix[: column.size, j] = column
    return matrix
