"""What the bound analysis knows of a tensor: an interval of its entries and Euclidean norms along each
axis.

Arithmetic is on reals: entries are finite numbers, however large, so that 0 times an unknown entry is 0.
Rounding is left out on purpose: float arithmetic can leave a proved range by a few units of its own
roundoff, where a polynomial is still within as many units of its proved error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import inf, isfinite, sqrt

from fastgrad_compiler.dim import Dim
from fastgrad_compiler.graph import Bound


@dataclass(frozen=True, slots=True)
class Fact:
    """Entries in [low, high]; along axis a, Euclidean norm at most `norms[a]` (one for each axis; inf is
    nothing known).

    `masked`: entries may also be a mask's fill; `low`, `high` and `norms` then speak of the others, the
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
    def known(self) -> bool:
        """Whether anything at all is known."""
        return isfinite(self.low) or isfinite(self.high) or any(isfinite(norm) for norm in self.norms)

    @property
    def bound(self) -> Bound:
        """The same as a node keeps it."""
        norm = self.norms[-1] if self.norms else self.magnitude
        return Bound(self.low, self.high, norm, proof=self.proof)


def unknown(rank: int) -> Fact:
    """Nothing is known of a tensor of this rank."""
    return Fact(-inf, inf, (inf,) * rank)


def interval(low: float, high: float, rank: int) -> Fact:
    """Entries in [low, high], and nothing more."""
    return Fact(low, high, (inf,) * rank)


def size(dim: Dim) -> float:
    """A constant dim as a float, infinity where it is known at run time only."""
    return inf if dim.constant is None else float(dim.constant)


def tighten(fact: Fact, shape: Sequence[Dim]) -> Fact:
    """Norms from entries (at most sqrt(size) times the largest) and entries from norms (each is at most any
    norm).
    """
    if fact.masked:
        return fact
    norms = tuple(
        min(norm, times(sqrt(size(dim)), fact.magnitude)) for norm, dim in zip(fact.norms, shape, strict=True)
    )
    least = min(norms, default=inf)
    return replace(fact, low=max(fact.low, -least), high=min(fact.high, least), norms=norms)


def times(left: float, right: float) -> float:
    """A product in which 0 wins over infinity."""
    return 0.0 if left == 0 or right == 0 else left * right


def product(left: Fact, right: Fact) -> tuple[float, float]:
    """The interval of x * y."""
    corners = [times(x, y) for x in (left.low, left.high) for y in (right.low, right.high)]
    return min(corners), max(corners)


def spread(fact: Fact, source: Sequence[Dim], target: Sequence[Dim]) -> tuple[float, ...]:
    """Norms along the axes of `target`, to which a tensor of shape `source` is broadcast."""
    missing = len(target) - len(source)
    norms = []
    for axis, dim in enumerate(target):
        kept = axis >= missing and source[axis - missing] == dim
        norms.append(fact.norms[axis - missing] if kept else times(sqrt(size(dim)), fact.magnitude))
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
