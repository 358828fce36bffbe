"""What the attention of a Transformers model may be off by, and what each of its heads is served by."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal, TypeAlias, get_args

from fastgrad_compiler.approximation.polynomial import FAMILIES, MAX_DEGREE, Family
from fastgrad_compiler.targets import check_target

Beyond: TypeAlias = Literal["exact", "warn", "clamp", "raise"]
Check: TypeAlias = Literal["norms", "sample"]


def _check_polynomial(degree: int | None, family: str, bound: float) -> None:
    if degree is not None and not 1 <= degree <= MAX_DEGREE:
        raise ValueError(f"the degree of a polynomial is 1 to {MAX_DEGREE}, not {degree}")
    if family not in FAMILIES:
        raise ValueError(f"unknown polynomial family {family!r}; choose one of {', '.join(FAMILIES)}")
    if not (isfinite(bound) and bound >= 0):
        raise ValueError(f"the bound of the logits is finite and at least 0, not {bound}")


@dataclass(frozen=True)
class Form:
    """What serves a key head and its query heads: a polynomial that is fitted on |s| <= bound; degree None: exact.

    reach: the head is exact in calls with logits beyond it; None: beyond `bound`. More than `bound` where the error was
    measured, since few logits are that large: then no certificate holds. centre: what is taken from the head's keys,
    which softmax does not see; None: see `Settings.centre`.
    """

    degree: int | None
    family: Family = "balanced"
    bound: float = 0.0
    reach: float | None = None
    centre: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_polynomial(self.degree, self.family, self.bound)
        if self.reach is not None and not self.bound <= self.reach < inf:
            raise ValueError(
                f"what logits may reach is finite and at least the bound of the fit: not {self.reach}"
            )

    @property
    def limit(self) -> float:
        """The sizes of logits up to which it serves."""
        return self.bound if self.reach is None else self.reach


EXACT = Form(None)


@dataclass(frozen=True)
class Settings:
    """How attention is served.

    Args:
        output: limit of the certificate of an attention's output (docs/mathematics.md, section 7), rounding included.
        gradient: the same of the gradients of its scores; None: no limit.
        bound: R, of the sizes of logits; None: in each call what the norms of its queries and keys prove.
        degree: of the polynomial; None: the least one that keeps `output` and `gradient`.
        family: of the polynomial.
        near: block size of a near field in which attention is exact; None: without one.
        beyond: what happens where logits are not known to be within R. exact: exact attention, of just those heads; or
            what a guard of the same name does (docs/guards.md): warn, clamp, raise, which need `bound`.
        check: how that is known, with `exact`. norms: by the norms of queries and keys, which is a proof. sample: by a
            sample of logits where norms are not enough, which may miss one.
        centre: whether the mean of the keys is taken from them where every query sees the same keys, so that logits
            are smaller; softmax does not see it.
        exact_below: tokens below which attention is exact; None: where exact attention is faster, by the compiler's
            model of costs.
        target: of the kernels: torch, cpp, triton or auto.
        heads: what serves each key head, as `calibrate` finds it, in place of `bound`, `degree` and `family`.

    Raises:
        ValueError: a value that cannot be meant. TfgError FG420: a target that is not available.
    """

    output: float = 0.01
    gradient: float | None = None
    bound: float | None = None
    degree: int | None = None
    family: Family = "balanced"
    near: int | None = None
    beyond: Beyond = "exact"
    check: Check = "norms"
    centre: bool = True
    exact_below: int | None = None
    target: str = "auto"
    heads: tuple[Form, ...] | None = None

    def __post_init__(self) -> None:
        check_target(self.target)
        if not 0 < self.output < inf or (self.gradient is not None and not 0 < self.gradient < inf):
            raise ValueError("the limits of output and gradient are numbers above 0")
        _check_polynomial(self.degree, self.family, self.bound or 0.0)
        if self.near is not None and self.near < 1:
            raise ValueError(f"a near field has blocks of at least one token, not {self.near}")
        if self.exact_below is not None and self.exact_below < 0:
            raise ValueError(f"a length is at least 0, not {self.exact_below}")
        if self.beyond not in get_args(Beyond):
            raise ValueError(f"beyond is one of {', '.join(get_args(Beyond))}, not {self.beyond!r}")
        if self.check not in get_args(Check):
            raise ValueError(f"check is one of {', '.join(get_args(Check))}, not {self.check!r}")
        if self.bound is None and (self.degree is not None or self.beyond != "exact") and self.heads is None:
            raise ValueError("a degree, and what a guard does beyond a range, need a bound of the logits")
        if self.beyond != "exact" and self.heads is not None:
            raise ValueError("heads that are served apart are exact beyond their range")

    def form(self, head: int) -> Form | None:
        """What serves a key head; None where it follows from each call."""
        if self.heads is not None:
            return self.heads[head]
        return (
            None if self.bound is None or self.degree is None else Form(self.degree, self.family, self.bound)
        )
