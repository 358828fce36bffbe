"""What would make a budget feasible, or cheaper: for each attention other degrees, ranges, widths, near fields, exact.

Each piece of advice has its price: time beside exact attention at the longest declared length (an estimate, from the
cost model), and the certificates of output and gradient (bounds). A change of gain or width is one of the model, which
then is to be trained anew; a change of degree or near field is one of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fastgrad_compiler.approximation.certificates import certificate
from fastgrad_compiler.approximation.polynomial import Polynomial
from fastgrad_compiler.attention.table import AttentionEntry, Lengths
from fastgrad_compiler.ir.graph import Program
from fastgrad_compiler.planning.candidates import USEFUL, polynomials
from fastgrad_compiler.planning.cost import EXACT
from fastgrad_compiler.planning.decision import (
    Caps,
    Case,
    Evaluated,
    search,
    vanishing,
    with_bound,
)
from fastgrad_compiler.planning.plan import shared_cases
from fastgrad_compiler.planning.selectivity import averages
from fastgrad_compiler.planning.target_cost import cost_of
from fastgrad_compiler.runtime.monomials import rank

NEAR = 64  # block of a near field that is proposed
GAINS = (4.0, 2.0, 1.0, 0.5)  # proposed where nothing limits the logits
_LEAST_WIDTH = 2


@dataclass(frozen=True, slots=True)
class Advice:
    """One change and its price.

    Args:
        change: in words, as it is written in the file.
        kind: what it changes: "plan" or "model".
        degree, rank: of the polynomial; None for exact.
        bound: R of the logits; None for exact.
        eps: bound of the relative error of a weight, without rounding; 0 for exact.
        output, gradient: certificates with what rounding adds, as shares of the values' range and of omega
            (docs/mathematics.md, sections 7 and 10).
        time: beside exact attention of the model as it is, an estimate; 1 is as long.
        feasible: whether it meets the attention's share of the budget, or eps of at most USEFUL without limits.
    """

    change: str
    kind: str
    degree: int | None
    rank: int | None
    bound: float | None
    eps: float
    output: float
    gradient: float
    time: float
    feasible: bool


@dataclass(frozen=True, slots=True)
class Advised:
    """The advice for attentions that are alike: their entries, the length that times are for, the limits, and a warning
    where they cannot pick out one key (`selectivity.averages`).
    """

    entries: tuple[AttentionEntry, ...]
    length: int
    limits: str
    advice: tuple[Advice, ...]
    warning: str | None = None


def advise(program: Program, target: str = "auto") -> tuple[Advised, ...]:
    """Advice for every attention of a program after recognition, alike ones together.

    The budget is shared out as the plan without calibration does (`shared_cases`). Raises TfgError FG303.
    """
    alike: dict[Case, list[AttentionEntry]] = {}
    for entry, case in shared_cases(program, target=target):
        alike.setdefault(case, []).append(entry)
    lengths = Lengths(program)
    return tuple(
        Advised(
            tuple(group),
            max(case.shape.n, case.shape.m),
            str(_caps(case)),
            tuple(_advice(case)),
            averages(group[0], lengths),
        )
        for case, group in alike.items()
    )


def _caps(case: Case) -> Caps:
    return case.caps if case.caps.given else Caps(relative=USEFUL)


def _advice(case: Case) -> Iterator[Advice]:
    yield Advice("exact", "plan", None, None, None, 0.0, 0.0, 0.0, 1.0, True)
    if case.attention.unservable or case.d is None or case.dv is None:
        return
    known = case.attention.range
    if known.bound is None:
        for gain in GAINS:
            yield from _least(_with(case, gain), f"gain = {gain:g}", "model", case)
            yield from _least(
                _with(case, gain, near=NEAR), f"gain = {gain:g} beyond near = {NEAR}", "model", case
            )
        return
    bound = case.bound
    yield from _degrees(case)
    if case.near is None and case.same_length:
        yield from _least(_with(case, bound, near=NEAR), f"near = {NEAR}", "plan", case)
    word = "assume_bound" if known.asserted else "gain"
    for factor in (2.0, 0.5, 0.25):
        yield from _least(_with(case, factor * bound), f"{word} = {factor * bound:.3g}", "model", case)
    for width in (2 * case.d, case.d // 2, case.d // 4):
        if width >= _LEAST_WIDTH:
            yield from _least(replace(case, d=width), f"qk_dim = {width}", "model", case)


def _degrees(case: Case) -> Iterator[Advice]:
    """Every degree whose polynomial may serve at all."""
    for polynomial in polynomials(case.bound, case.policy, (case.chosen_family,)):
        yield _priced(case, _evaluated(case, polynomial), f"degree = {polynomial.degree}", "plan", case)


def _evaluated(case: Case, polynomial: Polynomial) -> Evaluated:
    """In float32 if the limits are met so, or met in float64 neither."""
    single, double = case.evaluated(polynomial)
    return single if _feasible(case, single) or not _feasible(case, double) else double


def _feasible(case: Case, evaluated: Evaluated) -> bool:
    polynomial, rounded = evaluated.polynomial, evaluated.rounding
    return not (_caps(case).missed(polynomial, rounded) or vanishing(polynomial, rounded))


def _least(changed: Case, change: str, kind: str, case: Case) -> Iterator[Advice]:
    """The least degree that meets the limits after a change; nothing where none does."""
    evaluated, _ = search(replace(changed, caps=_caps(case)))
    if evaluated is not None:
        yield _priced(changed, evaluated, f"{change}, degree = {evaluated.polynomial.degree}", kind, case)


def _with(case: Case, bound: float, near: int | None = None) -> Case:
    changed = with_bound(case, bound)
    if near is None:
        return changed
    return replace(changed, budget_near=near, settings=replace(case.settings, near=None))


def _priced(changed: Case, evaluated: Evaluated, text: str, kind: str, case: Case) -> Advice:
    polynomial = evaluated.polynomial
    proved = certificate(polynomial.eps, polynomial.eps_prime, evaluated.rounding)
    way = changed.way(evaluated)
    cost = cost_of(case.target, changed.shape, way)
    return Advice(
        text if evaluated.precision == "float32" else f"{text}, in float64",
        kind,
        polynomial.degree,
        rank(changed.d or 1, polynomial.degree),
        polynomial.bound,
        polynomial.eps,
        proved.whole_output,
        proved.whole_gradient,
        cost.seconds(changed.shape, way) / cost.seconds(case.shape, EXACT),
        _feasible(case, evaluated),
    )


def cheapest(advice: Sequence[Advice]) -> Advice | None:
    """The feasible change of the plan that takes least time."""
    return min((a for a in advice if a.feasible and a.kind == "plan"), key=lambda a: a.time, default=None)
