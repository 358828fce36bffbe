"""Rounding of the attentions of a plan: what a plan states of it, and what a run of it may have."""

from __future__ import annotations

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.rounding import (
    LONGEST,
    WIDEST_NEAR,
    Rounding,
    Run,
    Sizes,
    rounding,
    runs,
)
from fastgrad_compiler.runtime.kernel_spec import KernelSpec
from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.documents import plan
from fastgrad_dsl.documents.base import finite, picked
from fastgrad_dsl.documents.plan import Approximated, Polynomial


def spec_of(entry: Polynomial) -> KernelSpec:
    """The kernel that serves an attention of a plan by a polynomial, as far as weights and rounding depend on it."""
    return KernelSpec(
        d=entry.d,
        dv=entry.dv,
        coefficients=entry.coefficients,
        causal=entry.causal,
        padding="padding" in entry.roles,
        near=entry.near,
        near_d=WIDEST_NEAR if "near_q" in entry.roles else None,
        scale=entry.scale,
        documents="documents" in entry.roles,
        forget="forget" in entry.roles,
        precision=entry.precision,
    )


def entry_rounding(entry: Approximated, target: str, sizes: Sizes, run: Run | None = None) -> Rounding:
    """What rounding adds to an approximated attention on the range of its plan."""
    found = run or Run()
    return rounding(spec_of(entry), sizes, entry.bound, entry.reach, BACKENDS[target], found)


def rounding_document(entry: Approximated, target: str, sizes: Sizes, declared: bool) -> plan.Rounding:
    """`rounding` of a plan's entry, for these lengths, `declared` by the file or not."""
    single = entry_rounding(entry, target, sizes)
    return plan.Rounding(
        n=sizes.queries,
        m=sizes.keys,
        declared=declared,
        reach=finite(entry.reach),
        holds_to=_holds_to(entry, target, sizes),
        weights=finite(single.weights),
        slopes=finite(single.slopes),
        runs=tuple(_run(entry, target, sizes, run) for run in runs(spec_of(entry), BACKENDS[target])),
    )


def _run(entry: Approximated, target: str, sizes: Sizes, run: Run) -> plan.RoundingRun:
    added = entry_rounding(entry, target, sizes, run)
    proved = certificate(entry.eps, entry.eps_prime, added)
    return picked(
        plan.RoundingRun,
        run,
        weights=finite(added.weights),
        slopes=finite(added.slopes),
        output=finite(proved.output_rounding),
        value_gradient=finite(proved.value_rounding),
        score_gradient=finite(proved.score_rounding),
    )


def _holds_to(entry: Approximated, target: str, sizes: Sizes) -> int | None:
    """By halving; 0 where there is no length at all."""

    def holds(length: int) -> bool:
        added = entry_rounding(entry, target, Sizes(length, length, sizes.groups))
        return bool(entry.eps + added.weights < 1)

    low, high = 0, LONGEST
    if holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
