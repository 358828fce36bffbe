"""FG312: rules of the budget keep its limits from being met; what would make it feasible, each remedy tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, inf, log10
from operator import mul

from fastgrad_compiler.ir.graph import BudgetRule
from fastgrad_compiler.ir.words import number
from fastgrad_dsl.calibration.calibrate import Attention, Calibration
from fastgrad_dsl.calibration.plan import least_errors, make_plan
from fastgrad_dsl.documents.calibration import Limits, Round
from fastgrad_dsl.documents.pairs import WHATS, of
from fastgrad_grammar.diagnostics import TfgError

SLACK = 1.1  # a limit that is proposed lies so much above what the plan needs
MOST = 1e6  # times a limit: beyond it no limit is proposed


def refusal(calibration: Calibration, limits: Limits, rounds: Sequence[Round]) -> TfgError:
    """The error: what the rules allow at best, and remedies with which a plan was found."""
    program, least = calibration.program, least_errors(calibration)
    kind = "by their certificates" if calibration.certified else "an estimate"
    parts = [
        f"the {what} is off by at least {number(least[what])} ({kind}), over {number(limit)}"
        for what in WHATS
        if (limit := of(limits, what)) is not None and least[what] > limit
    ]
    if not parts and rounds:
        output, gradient = number(rounds[-1].output), number(rounds[-1].gradient)
        parts = [f"measured: {output} of the output and {gradient} of the gradient, at the least"]
    found = "; ".join(parts) or "no choice is within both limits"
    ruled = [each for each in calibration.attentions if each.settings.asked is not None]
    scaled = _each(limits, _below, rounds[-1]) if rounds else limits
    span = program.budget.span if program.budget is not None else None
    rule = ruled[0].settings.asked if ruled else None
    return TfgError.of(
        "FG312",
        f"the budget of {program.name} cannot be met under its rules: {found}",
        *_remedies(calibration, scaled, limits),
        span=rule.span if rule is not None and rule.span is not None else span,
    )


def _each(limits: Limits, change: Callable[..., float], *others: Round) -> Limits:
    """The limits that there are, each changed by what it is and what stands in its place in `others`."""
    pairs = ((of(limits, what), [of(other, what) for other in others]) for what in WHATS)
    return Limits(*(None if limit is None else change(limit, *given) for limit, given in pairs))


def _below(limit: float, found: float) -> float:
    """A limit on estimates that is as far below as measured errors lay above."""
    return limit if found <= limit else limit * limit / found


def _remedies(calibration: Calibration, scaled: Limits, limits: Limits) -> Iterator[str]:
    attentions = calibration.attentions
    for pin in dict.fromkeys(each.settings.degree for each in attentions if each.settings.degree is not None):
        degree = _degree(calibration, scaled, pin)
        if degree is not None:
            yield f'a higher degree: at "{pin.pattern}" degree = {degree}'
    for rule in dict.fromkeys(each.settings.asked for each in attentions if each.settings.asked):
        freed = _changed(calibration, lambda each, r=rule: each.settings.asked == r, _free)  # type: ignore[misc]
        if make_plan(freed, scaled) is not None:
            yield f'without the rule `at "{rule.pattern}" {rule.kind} = {rule.value}` a plan is found'
    paths = _exact(calibration, scaled)
    if paths:
        yield "leave exact: " + ", ".join(f'at "{path}" exact' for path in paths)
    larger = _larger(calibration, limits, scaled)
    if larger is not None:
        given = [f"{w} <= {number(limit)}" for w in WHATS if (limit := of(larger, w)) is not None]
        yield f"a larger budget: {', '.join(given)}"


def _changed(
    calibration: Calibration, which: Callable[[Attention], bool], change: Callable[[Attention], Attention]
) -> Calibration:
    changed = tuple(change(each) if which(each) else each for each in calibration.attentions)
    return replace(calibration, attentions=changed)


def _free(each: Attention) -> Attention:
    return replace(each, settings=replace(each.settings, degree=None, near=None, family=None))


def _degree(calibration: Calibration, limits: Limits, pin: BudgetRule) -> int | None:
    """The least higher degree at which the pin leaves a plan."""
    served = [each for each in calibration.attentions if each.settings.degree == pin]
    for degree in sorted({c.polynomial.degree for each in served for c in each.candidates}):
        if degree > int(str(pin.value)):
            higher = replace(pin, value=degree)
            tried = _changed(
                calibration,
                lambda each: each.settings.degree == pin,
                lambda each, rule=higher: replace(each, settings=replace(each.settings, degree=rule)),  # type: ignore[misc]
            )
            if make_plan(tried, limits) is not None:
                return degree
    return None


def _exact(calibration: Calibration, limits: Limits) -> list[str]:
    """Attentions that, left exact, leave a plan for the rest: greedily, the largest errors first."""

    def least(each: Attention) -> float:
        gain = each.gains.output.value if each.gains.output else 1.0
        return gain * min((c.output for c in each.candidates), default=inf)

    ruled = [each for each in calibration.attentions if each.settings.asked and each.candidates]
    paths: list[str] = []
    tried = calibration
    for each in sorted(ruled, key=least, reverse=True):
        paths.append(each.entry.path)
        tried = _changed(
            tried,
            lambda other, e=each: other is e,  # type: ignore[misc]
            lambda other: replace(_free(other), candidates=(), obstacle="exact"),
        )
        if make_plan(tried, limits) is not None:
            return paths
    return []


def _larger(calibration: Calibration, limits: Limits, scaled: Limits) -> Limits | None:
    """The same limits times the least factor, with two digits, that leaves a plan."""
    factor = 1.0
    while factor < MOST:
        factor *= SLACK
        if make_plan(calibration, _each(scaled, partial(mul, factor))) is not None:
            return _each(_each(limits, partial(mul, factor * SLACK)), _up)
    return None


def _up(value: float) -> float:
    """Rounded up to two digits."""
    unit = 10.0 ** (ceil(log10(value)) - 2)
    return float(f"{ceil(value / unit) * unit:.2g}")
