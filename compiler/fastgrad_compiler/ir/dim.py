"""Symbolic dimensions: polynomials in named run-time dims, in one normal form.

`4 * n`, `n + m`, `b * n` and, where `n` is declared a multiple of 64, `n / 64` are dims. Coefficients are fractions,
so that `64 * (n / 64)` is `n` again; equality of dims is equality of the normal form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, prod

Monomial = tuple[str, ...]  # sorted names, repeated for powers; () is the constant


@dataclass(frozen=True)
class Dim:
    """A sum of `coefficient * product of names`, terms sorted by monomial and without zeros."""

    terms: tuple[tuple[Monomial, Fraction], ...]

    @staticmethod
    def of(value: int | str | Dim) -> Dim:
        """A dim from an int, a name or a dim."""
        if isinstance(value, Dim):
            return value
        if isinstance(value, str):
            return Dim((((value,), Fraction(1)),))
        return Dim((((), Fraction(value)),) if value else ())

    @staticmethod
    def _sum(terms: Iterable[tuple[Monomial, Fraction]]) -> Dim:
        total: dict[Monomial, Fraction] = {}
        for monomial, coefficient in terms:
            total[monomial] = total.get(monomial, Fraction(0)) + coefficient
        return Dim(tuple(sorted((m, c) for m, c in total.items() if c)))

    def __add__(self, other: int | Dim) -> Dim:
        return Dim._sum(self.terms + Dim.of(other).terms)

    def __sub__(self, other: int | Dim) -> Dim:
        return self + Dim.of(other) * -1

    def __mul__(self, other: int | Dim) -> Dim:
        return Dim._sum(
            (tuple(sorted(m1 + m2)), c1 * c2) for m1, c1 in self.terms for m2, c2 in Dim.of(other).terms
        )

    __radd__ = __add__
    __rmul__ = __mul__

    def divide(self, other: int | Dim, multiples: Mapping[str, int] | None = None) -> Dim | None:
        """`self / other` where it is exact for every value of the dims, else None.

        `other` is a constant or one monomial; `multiples` maps dim names to what they are declared to be multiples of.
        """
        divisor = Dim.of(other)
        if len(divisor.terms) != 1:
            return Dim.of(1) if divisor.terms and divisor == self else None
        ((names, factor),) = divisor.terms
        quotient = []
        for monomial, coefficient in self.terms:
            rest = list(monomial)
            for name in names:
                if name not in rest:
                    return None
                rest.remove(name)
            quotient.append((tuple(rest), coefficient / factor))
        result = Dim(tuple(sorted(quotient)))
        return result if result.is_integral(multiples or {}) else None

    def is_integral(self, multiples: Mapping[str, int]) -> bool:
        """Whether every value of the dims makes this an integer, given what they are multiples of."""
        return all(
            (coefficient * prod(multiples.get(name, 1) for name in monomial)).denominator == 1
            for monomial, coefficient in self.terms
        )

    @cached_property
    def constant(self) -> int | None:
        """The value, where no name occurs."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return int(self.terms[0][1])
        return None

    @cached_property
    def least(self) -> int | None:
        """The least value where every name is at least 1, as sizes are; None where terms with names are subtracted."""
        if any(coefficient < 0 for monomial, coefficient in self.terms if monomial):
            return None
        return ceil(sum(coefficient for _, coefficient in self.terms))

    @property
    def names(self) -> frozenset[str]:
        """The run-time dims that occur."""
        return frozenset(name for monomial, _ in self.terms for name in monomial)

    def substitute(self, values: Mapping[str, int | Dim]) -> Dim:
        """Every name of `values` replaced."""
        result = Dim(())
        for monomial, coefficient in self.terms:
            factors = (Dim.of(values.get(name, name)) for name in monomial)
            result += prod(factors, start=Dim((((), coefficient),)))
        return result

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The integer at these values; ValueError where a name is missing or the result is not whole."""
        known = self.names <= values.keys()
        found = sum(factor * prod(values[name] for name in names) for names, factor in self.terms if known)
        if not known or found.denominator != 1:
            raise ValueError(f"dim {self} has no whole value at {dict(values)}")
        return int(found)

    def __str__(self) -> str:
        """`4*n + m`, `n/64`, `b*n`, `256`."""
        return _format(self, "/", "*")

    @property
    def python(self) -> str:
        """A Python expression over variables named like the dims, exact by integer division."""
        return _format(self, " // ", " * ")


def _format(dim: Dim, division: str, times: str) -> str:
    if not dim.terms:
        return "0"
    parts = []
    for monomial, coefficient in sorted(dim.terms, key=lambda t: (t[0] == (), t[0])):
        factors = list(monomial)
        if coefficient.numerator != 1 or not factors:
            factors.insert(0, str(coefficient.numerator))
        text = times.join(factors)
        parts.append(text if coefficient.denominator == 1 else f"{text}{division}{coefficient.denominator}")
    return " + ".join(parts).replace("+ -", "- ")
