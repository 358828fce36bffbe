"""FG312: rules of the budget keep its limits from being met; what would make it feasible, each remedy tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil, inf, log10

from fastgrad_compiler.ir.graph import BudgetRule, Program
from fastgrad_compiler.ir.words import number
from fastgrad_dsl.calibration.calibrate import Attention, Calibration
from fastgrad_dsl.calibration.plan import Limits, least_errors, make_plan
from fastgrad_dsl.documents.calibration import Round
from fastgrad_grammar.diagnostics import TfgError

SLACK = 1.1  # a limit that is proposed lies so much above what the plan needs
MOST = 1e6  # times a limit: beyond it no limit is proposed


def refusal(calibration: Calibration, program: Program, limits: Limits, rounds: Sequence[Round]) -> TfgError:
    """The error: what the rules allow at best, and remedies with which a plan was found."""
    output, gradient = least_errors(calibration, program)
    kind = "by their certificates" if calibration.certified else "an estimate"
    parts = [
        f"the {what} is off by at least {number(least)} ({kind}), over {number(limit)}"
        for what, least, limit in (("output", output, limits.output), ("gradient", gradient, limits.gradient))
        if limit is not None and least > limit
    ]
    if not parts and rounds:
        last = rounds[-1]
        output, gradient = last.output, last.gradient
        parts = [
            f"measured: {number(output)} of the output and {number(gradient)} of the gradient, at the least"
        ]
    found = "; ".join(parts) or "no choice is within both limits"
    ruled = [each for each in calibration.attentions if each.settings.asked is not None]
    scaled = limits if not rounds else _below(limits, rounds[-1])
    span = program.budget.span if program.budget is not None else None
    rule = ruled[0].settings.asked if ruled else None
    return TfgError.of(
        "FG312",
        f"the budget of {program.name} cannot be met under its rules: {found}",
        *_remedies(calibration, program, scaled, limits),
        span=rule.span if rule is not None and rule.span is not None else span,
    )


def _below(limits: Limits, measured: Round) -> Limits:
    """Limits on estimates that are as far below as measured errors lay above."""

    def scaled(limit: float | None, found: float) -> float | None:
        return limit if limit is None or found <= limit else limit * limit / found

    return Limits(scaled(limits.output, measured.output), scaled(limits.gradient, measured.gradient))


def _remedies(calibration: Calibration, program: Program, scaled: Limits, limits: Limits) -> Iterator[str]:
    pins = dict.fromkeys(
        each.settings.degree for each in calibration.attentions if each.settings.degree is not None
    )
    for pin in pins:
        degree = _degree(calibration, program, scaled, pin)
        if degree is not None:
            yield f'a higher degree: at "{pin.pattern}" degree = {degree}'
    rules = dict.fromkeys(each.settings.asked for each in calibration.attentions if each.settings.asked)
    for rule in rules:
        freed = _changed(calibration, lambda each, r=rule: each.settings.asked == r, _free)  # type: ignore[misc]
        if make_plan(freed, program, scaled) is not None:
            yield f'without the rule `at "{rule.pattern}" {rule.kind} = {rule.value}` a plan is found'
    paths = _exact(calibration, program, scaled)
    if paths:
        yield "leave exact: " + ", ".join(f'at "{path}" exact' for path in paths)
    larger = _larger(calibration, program, limits, scaled)
    if larger is not None:
        pairs = (("output", larger.output), ("gradient", larger.gradient))
        given = [f"{name} <= {number(limit)}" for name, limit in pairs if limit is not None]
        yield f"a larger budget: {', '.join(given)}"


def _changed(
    calibration: Calibration, which: Callable[[Attention], bool], change: Callable[[Attention], Attention]
) -> Calibration:
    changed = tuple(change(each) if which(each) else each for each in calibration.attentions)
    return replace(calibration, attentions=changed)


def _free(each: Attention) -> Attention:
    return replace(each, settings=replace(each.settings, degree=None, near=None, family=None))


def _pinned_to(degree: int) -> Callable[[Attention], Attention]:
    def change(each: Attention) -> Attention:
        assert each.settings.degree is not None
        return replace(
            each, settings=replace(each.settings, degree=replace(each.settings.degree, value=degree))
        )

    return change


def _degree(calibration: Calibration, program: Program, limits: Limits, pin: BudgetRule) -> int | None:
    """The least higher degree at which the pin leaves a plan."""
    served = [each for each in calibration.attentions if each.settings.degree == pin]
    known = {c.polynomial.degree for each in served for c in each.candidates}
    for degree in sorted(known):
        if degree > int(str(pin.value)):
            tried = _changed(calibration, lambda each: each.settings.degree == pin, _pinned_to(degree))
            if make_plan(tried, program, limits) is not None:
                return degree
    return None


def _exact(calibration: Calibration, program: Program, limits: Limits) -> list[str]:
    """Attentions that, left exact, leave a plan for the rest: greedily, the largest errors first."""

    def least(each: Attention) -> float:
        gain = each.output_gain.value if each.output_gain else 1.0
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
        if make_plan(tried, program, limits) is not None:
            return paths
    return []


def _larger(calibration: Calibration, program: Program, limits: Limits, scaled: Limits) -> Limits | None:
    """The same limits times the least factor, with two digits, that leaves a plan."""
    factor = 1.0
    while factor < MOST:
        factor *= SLACK
        if make_plan(calibration, program, _times(scaled, factor)) is not None:
            larger = _times(limits, factor * SLACK)
            return Limits(
                *(None if limit is None else _up(limit) for limit in (larger.output, larger.gradient))
            )
    return None


def _times(limits: Limits, factor: float) -> Limits:
    return Limits(*(None if limit is None else limit * factor for limit in (limits.output, limits.gradient)))


def _up(value: float) -> float:
    """Rounded up to two digits."""
    unit = 10.0 ** (ceil(log10(value)) - 2)
    return float(f"{ceil(value / unit) * unit:.2g}")
