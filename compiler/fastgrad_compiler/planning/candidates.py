"""The polynomials that may serve an attention: one enumeration, and one policy for what limits them.

The rank is at most MAX_RANK. eps is below 1: otherwise weights may vanish, and there is no certificate
(docs/mathematics.md, section 7). It is at most MOST_EPS where errors are estimated from data, as a rare logit
at the end of the range might decide them, and at most USEFUL where something is recommended and the budget
sets no limit. No weight is negative on the range, nor below it where the program does not prove the range.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastgrad_compiler.approximation.polynomial import (
    FAMILIES,
    MAX_DEGREE,
    Family,
    Polynomial,
    PrecisionError,
    fit,
)
from fastgrad_compiler.runtime.monomials import rank

MAX_RANK = 20_000  # a state of rank x (dv + 1) floats for each head: 5 MB at dv = 64
MOST_EPS = 0.5
USEFUL = 0.1


@dataclass(frozen=True)
class Policy:
    """What a polynomial for an attention of width `d` must keep to.

    proved: the program proves the range, so that no logit leaves it; max_eps: of eps, which is below 1 in any case.
    """

    d: int
    proved: bool
    max_rank: int = MAX_RANK
    max_eps: float = 1.0

    @property
    def highest_degree(self) -> int:
        """The highest degree whose rank is within the limit; 0 where there is none."""
        return highest_degree(self.d, self.max_rank)

    def is_positive(self, polynomial: Polynomial) -> bool:
        """Whether no weight can be negative: everywhere, or on a range that logits are proved not to leave."""
        return polynomial.positive and (self.proved or polynomial.positive_from is None)

    def admit(self, polynomial: Polynomial) -> bool:
        """Whether a polynomial keeps to all of them."""
        within = polynomial.degree <= self.highest_degree and polynomial.eps <= self.max_eps
        return within and polynomial.eps < 1 and self.is_positive(polynomial)


def highest_degree(d: int, max_rank: int = MAX_RANK) -> int:
    """The highest degree that a polynomial may have at width d; 0 where there is none."""
    return max((g for g in range(1, MAX_DEGREE + 1) if rank(d, g) <= max_rank), default=0)


def over_rank(d: int, degree: int, max_rank: int) -> str:
    """What is wrong with a degree above the highest one."""
    return f"degree {degree} at width {d} has rank {rank(d, degree):,}, over the limit of {max_rank:,}"


def widest(degree: int, largest: int, below: int) -> int | None:
    """The largest d less than `below` with a rank of at most `largest` at this degree; None where there is none."""
    return bisect_right(range(1, max(below, 1)), largest, key=lambda d: rank(d, degree)) or None


def fits(family: Family, bound: float, degrees: Iterable[int]) -> Iterator[Polynomial | PrecisionError]:
    """The polynomial of each degree, or why float64 cannot hold it."""
    for degree in degrees:
        try:
            yield fit(family, degree, bound)
        except PrecisionError as error:
            yield error


def polynomials(
    bound: float, policy: Policy, families: Iterable[Family] = FAMILIES, *, above: int = 0
) -> Iterator[Polynomial]:
    """All polynomials within the limits for logits in [-bound, bound], of degrees above one; least degrees first."""
    for family in families:
        for found in fits(family, bound, range(above + 1, policy.highest_degree + 1)):
            if isinstance(found, Polynomial) and policy.admit(found):
                yield found
