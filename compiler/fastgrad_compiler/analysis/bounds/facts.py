"""What the bound analysis knows of a tensor: an interval of its entries and Euclidean norms along each
axis.

Arithmetic is on reals, and what is computed of them here is rounded outwards (`bound_rounding.py`). A fact holds of
every entry, and of every vector, that is not NaN; an entry may be infinite where its side of the interval is. So 0
times an unknown entry is 0. The rounding of the run itself is left out: float arithmetic can leave a proved range by a
few units of its own roundoff, where a polynomial is still within as many units of its proved error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite

from fastgrad_compiler.analysis.bounds.outward import add_down, add_up, root_up, times_down, times_up
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Bound


@dataclass(frozen=True, slots=True)
class Fact:
    """Entries in [low, high]; along axis a, Euclidean norm at most `norms[a]` (one for each axis; inf is
    nothing known).

    `masked`: entries may also be -inf, what a mask hides; `low`, `high` and `norms` then speak of the others, the
    visible ones. `proof` takes no part in equality.
    """

    low: float
    high: float
    norms: tuple[float, ...]
    masked: bool = False
    proof: tuple[str, ...] = field(default=(), compare=False)

    @property
    def magnitude(self) -> float:
        """The largest absolute value of a visible entry."""
        return max(abs(self.low), abs(self.high))

    @property
    def least_magnitude(self) -> float:
        """The smallest absolute value that a visible entry may have."""
        return 0.0 if self.low <= 0 <= self.high else min(abs(self.low), abs(self.high))

    @property
    def known(self) -> bool:
        """Whether anything at all is known."""
        return isfinite(self.low) or isfinite(self.high) or any(isfinite(norm) for norm in self.norms)

    @property
    def bound(self) -> Bound:
        """The same as a node keeps it; a row that a mask may hide in part has no norm."""
        norm = inf if self.masked else self.norms[-1] if self.norms else self.magnitude
        return Bound(self.low, self.high, norm, proof=self.proof)


def unknown(rank: int, masked: bool = False) -> Fact:
    """Nothing is known of a tensor of this rank; masked: a mask may hide entries of it."""
    return Fact(-inf, inf, (inf,) * rank, masked)


def interval(low: float, high: float, rank: int) -> Fact:
    """Entries in [low, high], and nothing more."""
    return Fact(low, high, (inf,) * rank)


def size(dim: Dim) -> float:
    """A constant dim as a float, infinity where it is known at run time only."""
    return inf if dim.constant is None else float(dim.constant)


def total(fact: Fact, dims: Iterable[Dim]) -> tuple[float, float]:
    """The interval of a sum of as many entries as `dims` have together."""
    least, most = 1.0, 1.0
    for dim in dims:
        least, most = times_down(least, max(float(dim.least or 0), 0.0)), times_up(most, size(dim))
    low = times_down(most if fact.low < 0 else least, fact.low)
    return low, times_up(most if fact.high > 0 else least, fact.high)


def root_size(dim: Dim) -> float:
    """At least the norm of a vector of as many ones; infinity where the number is known at run time only."""
    return root_up(size(dim))


def tighten(fact: Fact, shape: Sequence[Dim]) -> Fact:
    """Norms from entries (at most sqrt(size) times the largest) and entries from norms (each is at most any
    norm).
    """
    if fact.masked:
        return fact
    norms = tuple(
        min(norm, times_up(root_size(dim), fact.magnitude))
        for norm, dim in zip(fact.norms, shape, strict=True)
    )
    least = min(norms, default=inf)
    return replace(fact, low=max(fact.low, -least), high=min(fact.high, least), norms=norms)


def product(left: Fact, right: Fact) -> tuple[float, float]:
    """The interval of x * y."""
    corners = [(x, y) for x in (left.low, left.high) for y in (right.low, right.high)]
    return min(times_down(x, y) for x, y in corners), max(times_up(x, y) for x, y in corners)


def added(left: Fact, right: Fact) -> tuple[float, float]:
    """The interval of x + y."""
    return add_down(left.low, right.low), add_up(left.high, right.high)


def spread(fact: Fact, source: Sequence[Dim], target: Sequence[Dim]) -> tuple[float, ...]:
    """Norms along the axes of `target`, to which a tensor of shape `source` is broadcast."""
    missing = len(target) - len(source)
    norms = []
    for axis, dim in enumerate(target):
        kept = axis >= missing and source[axis - missing] == dim
        norms.append(fact.norms[axis - missing] if kept else times_up(root_size(dim), fact.magnitude))
    return tuple(norms)


def join(facts: Iterable[Fact]) -> Fact:
    """What holds of each of them; the proof is that of the widest."""
    several = list(facts)
    widest = max(several, key=lambda fact: (fact.magnitude, max(fact.norms, default=0.0)))
    return Fact(
        min(fact.low for fact in several),
        max(fact.high for fact in several),
        tuple(map(max, zip(*(fact.norms for fact in several), strict=True))),
        masked=any(fact.masked for fact in several),
        proof=widest.proof if widest.known else (),
    )


def widen(before: Fact, after: Fact) -> Fact:
    """`after`, with everything that is wider than in `before` given up: a chain of these is short."""
    return replace(
        after,
        low=after.low if after.low >= before.low else -inf,
        high=after.high if after.high <= before.high else inf,
        norms=tuple(new if new <= old else inf for old, new in zip(before.norms, after.norms, strict=True)),
    )
