"""Which polynomial may serve logits within a range, and whether it pays at a length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import expm1

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import Family, Polynomial
from fastgrad_compiler.approximation.rounding import UNITS, Run, Sizes, rounding
from fastgrad_compiler.planning.candidates import Policy, fits
from fastgrad_compiler.planning.cost import Shape, Way
from fastgrad_compiler.planning.target_cost import target_break_even
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.targets import BACKENDS

STEPS = 4
"""Ranges of calls are rounded up to powers of 2^(1 / STEPS), so that few kernels serve many calls."""
SMALLEST, LARGEST = 2.0**-6, 16.0
"""The ranges among these steps. Beyond the last one no polynomial that pays meets a limit."""


@dataclass(frozen=True)
class Case:
    """What the choice of a polynomial depends on, apart from the range of logits.

    n: number of queries and keys, rounded up to a power of 2; groups: query heads of a key head; run: device and dtype;
    centred: whether something is taken from the keys, which rounds them.
    """

    n: int
    d: int
    dv: int
    groups: int
    scale: float
    causal: bool
    padding: bool
    documents: bool
    near: int | None
    target: str
    run: Run
    centred: bool = False

    def kernel(self, polynomial: Polynomial) -> KernelSpec:
        """The kernel of a polynomial."""
        return KernelSpec(
            d=self.d,
            dv=self.dv,
            coefficients=polynomial.coefficients,
            causal=self.causal,
            padding=self.padding,
            near=self.near,
            scale=self.scale,
            documents=self.documents,
        )

    def break_even(self, degree: int) -> int:
        """Tokens from which on a polynomial of a degree takes no longer than exact attention, by the model of costs."""
        shape = Shape(n=self.n, m=self.n, d=self.d, dv=self.dv, causal=self.causal, documents=self.documents)
        return target_break_even(self.target, shape, Way(degree, self.near), on_gpu=self.run.device == "gpu")


@dataclass(frozen=True)
class Limits:
    """Of the certificates of output and score gradient; None is none."""

    output: float | None
    gradient: float | None


def step_above(bound: float) -> float | None:
    """The least range of the steps that is no less than a bound; None beyond the last."""
    step = SMALLEST
    while step < bound:
        if step >= LARGEST:
            return None
        step *= 2 ** (1 / STEPS)
    return step


@lru_cache(maxsize=4096)
def polynomial_of(family: Family, degree: int, bound: float, d: int) -> Polynomial | None:
    """A polynomial that is positive on its range and can be afforded; None where there is none."""
    (found,) = fits(family, bound, (degree,))
    affordable = degree <= Policy(d, proved=True).highest_degree
    return found if isinstance(found, Polynomial) and affordable and found.positive else None


@lru_cache(maxsize=4096)
def least(family: Family, bound: float, limits: Limits, case: Case) -> Polynomial | None:
    """The polynomial of the least degree whose certificates on [-bound, bound] keep the limits; None: there is none."""
    for degree in range(1, Policy(case.d, proved=True).highest_degree + 1):
        found = polynomial_of(family, degree, bound, case.d)
        if found is not None and keeps(found, limits, case):
            return found
    return None


def keeps(polynomial: Polynomial, limits: Limits, case: Case) -> bool:
    """Whether the certificates of a polynomial keep the limits, rounding included.

    A difference of keys and a centre is off by a factor of at most 1 + u in each entry, and a logit by R u then.
    """
    bound = polynomial.bound
    shift = expm1(bound * UNITS[case.run.dtype]) if case.centred else 0.0
    sizes, backends = Sizes(case.n, case.n, case.groups), BACKENDS[case.target]
    added = rounding(case.kernel(polynomial), sizes, bound, bound, backends, case.run)
    added = replace(added, weights=added.weights + 2 * shift, slopes=added.slopes + 2 * shift)
    proved = certificate(polynomial.eps, polynomial.eps_prime, added)
    pairs = ((proved.whole_output, limits.output), (proved.whole_gradient, limits.gradient))
    return all(limit is None or value <= limit for value, limit in pairs)
