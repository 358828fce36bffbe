"""The headline: how much of the budget is used, in numbers and in words, and the budget's way through the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec.structs import replace

from fastgrad_compiler.approximation.elementary import added
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.pairs import WHATS, What, of
from fastgrad_dsl.documents.plan import Attention, CertificateTerms, Plan, is_approximated
from fastgrad_dsl.documents.report import (
    Batch,
    Errors,
    Headline,
    Prediction,
    ReportedAttention,
    State,
    Step,
    Use,
    Verdict,
    Waterfall,
    Waterfalls,
    WholeErrors,
)
from fastgrad_dsl.report.words import NO_ERROR, number, of_budget, sample, verified_on

EFFECTS = "how far the model moves when this attention alone is made exact"
CALIBRATED = "what the calibration expects of each attention"
CERTIFICATES = "the sum of the certificates, with every gain taken as 1"
OUTCOMES: dict[tuple[bool, bool], tuple[State, str]] = {
    (False, False): ("likely", "The plan is expected to keep the budget: {}."),
    (True, False): ("unlikely", "The plan is expected to miss the budget: {}."),
    (False, True): ("likely", "The sum of the worst cases is within the budget: {}. Nothing was measured."),
    (True, True): ("open", "Open: the sum of the worst cases exceeds the budget: {}. A measurement decides."),
}
"""By whether limits are exceeded, and whether by proved worst cases: the verdict."""


def headline(
    plan: Plan,
    whole: WholeErrors,
    batch: Batch | None,
    calibration: Calibration | None,
    prediction: Prediction | None,
) -> Headline:
    """The verdict, the use of the budget by output and gradient, and the prediction of time and memory.

    What was measured says on how many batches and tokens: it holds there, and nowhere else.
    """
    output, gradient = (_use(what, plan, whole, batch, calibration) for what in WHATS)
    return Headline(_verdict(plan, {"output": output, "gradient": gradient}), output, gradient, prediction)


def summary(plan: Plan, whole: WholeErrors, batch: Batch | None) -> tuple[str, ...]:
    """Errors of the whole against the budget, and the two losses; empty where nothing was measured."""
    lines = []
    for what in WHATS:
        errors, limit = of(whole, what), _limit(plan, what)
        if errors.measured is None or errors.estimate is None or batch is None:
            return ()
        kept = "kept" if limit is None or errors.measured <= limit else "EXCEEDED"
        verdict = (
            "" if limit is None else f"; budget {limit:g}: {kept} on {sample(batch.batches, batch.tokens)}"
        )
        lines.append(
            f"{what} error {errors.measured:.2e} (measured), {errors.estimate:.2e} (estimate){verdict}"
        )
    if whole.loss is not None and whole.exact_loss is not None:
        lines.append(
            f"loss {whole.loss:.5f} compiled, {whole.exact_loss:.5f} exact, same weights and batch (measured)"
        )
    return tuple(lines)


def waterfall(
    plan: Plan,
    attentions: Sequence[ReportedAttention],
    whole: WholeErrors,
    calibration: Calibration | None,
) -> Waterfalls:
    """For output and gradient: each attention's part, from `start` to `end`, beside the limit and the whole.

    The parts are estimates: effects on the batch, what a calibration expects, else certificates with gains taken as 1.
    """
    return Waterfalls(*(_waterfall(what, plan, attentions, whole, calibration) for what in WHATS))


def _limit(plan: Plan, what: What) -> float | None:
    return None if plan.budget is None else of(plan.budget, what)


def _use(
    what: What,
    plan: Plan,
    whole: WholeErrors,
    batch: Batch | None,
    calibration: Calibration | None,
) -> Use:
    """The error by the best that is known: measured here or by the calibration, estimated, added up from proofs."""
    limit, errors = _limit(plan, what), of(whole, what)
    value, kind, basis = _best(what, plan, errors, batch, calibration)
    share = value / limit if value is not None and limit else None
    use = Use(limit=limit, value=value, kind=kind, basis=basis, share=share, words="")
    return replace(use, words=_words(use))


Known = tuple[float | None, Literal["bound", "estimate", "measured", None], str | None]


def _best(
    what: What, plan: Plan, errors: Errors, batch: Batch | None, calibration: Calibration | None
) -> Known:
    if not any(map(is_approximated, plan.attentions)):
        return 0.0, "bound", "nothing is approximated"
    if batch and errors.measured is not None:
        return errors.measured, "measured", f"on {sample(batch.batches, batch.tokens)}"
    if calibration and calibration.verification:
        verified = calibration.verification
        return of(verified, what), "measured", f"by the calibration, on {verified_on(calibration, verified)}"
    if errors.estimate is not None:
        return errors.estimate, "estimate", "of the plan, from the calibration"
    total = _added_up(what, plan.attentions)
    return (None, None, None) if total is None else (total, "estimate", CERTIFICATES)


def _added_up(what: What, entries: Sequence[Attention]) -> float | None:
    found = [e.certificate for e in entries if is_approximated(e) and e.certificate]
    factors = [factor for each in found if (factor := _factor(each, what)) is not None]
    return added(factors) if found and len(factors) == len(found) else None


def _factor(found: CertificateTerms, what: What) -> float | None:
    """Of one certificate, with rounding; None where it is infinite."""
    terms = (
        (found.output_of_value_range, found.output_rounding_of_largest_value)
        if what == "output"
        else (found.score_gradient_of_omega, found.score_rounding_of_products)
    )
    known = [term for term in terms if term is not None]
    return added(known) if len(known) == len(terms) else None


def _verdict(plan: Plan, use: Mapping[str, Use]) -> Verdict:
    """`state`: exact, unlimited, kept, missed, likely, unlikely or open; and `text`."""
    if not any(map(is_approximated, plan.attentions)):
        own = any(entry.decision == "polynomial" for entry in plan.attentions)
        every = "every attention is exact" if plan.attentions else "no attentions"
        said = NO_ERROR if own else f"nothing is approximated: {every}"
        return Verdict("exact", f"{said[0].upper()}{said[1:]}.")
    limited = {what: each for what, each in use.items() if each.limit is not None}
    if not limited:
        return Verdict("unlimited", "The file sets no budget, so none can be missed.")
    unknown = [what for what, each in limited.items() if each.share is None]
    if unknown:
        return Verdict("open", f"Open: nothing is known yet of the error of the {' and '.join(unknown)}.")
    over = {what: each for what, each in limited.items() if (each.share or 0) > 1}
    shown = over or limited
    said = ", ".join(
        f"{what} {number(each.value)} of {each.limit:g} ({each.kind})" for what, each in shown.items()
    )
    if all(each.kind == "measured" for each in shown.values()):
        words = "is missed" if over else "is kept"
        basis = next(iter(shown.values())).basis
        return Verdict("missed" if over else "kept", f"The budget {words}, measured {basis}: {said}.")
    proved = any(each.basis == CERTIFICATES for each in shown.values())
    state, words = OUTCOMES[bool(over), proved]
    return Verdict(state, words.format(said))


def _waterfall(
    what: What,
    plan: Plan,
    attentions: Sequence[ReportedAttention],
    whole: WholeErrors,
    calibration: Calibration | None,
) -> Waterfall:
    approximated = [entry for entry in attentions if is_approximated(entry)]
    measured = of(whole, what).measured
    parts: list[tuple[str, float | None]]
    if measured is not None:
        basis, parts = EFFECTS, [(entry.path, of(entry.errors, what).estimate) for entry in approximated]
    elif calibration is not None:
        chosen = [(each.path, each.chosen) for each in calibration.attentions]
        basis, parts = CALIBRATED, [(path, of(each, what) or None) for path, each in chosen if each]
    else:
        certificates = [(entry.path, entry.certificate) for entry in approximated]
        basis = CERTIFICATES
        parts = [(path, _factor(found, what) if found else None) for path, found in certificates]
    steps, total = list[Step](), 0.0
    for path, part in parts:
        if part is not None:
            steps.append(Step(path=path, value=part, start=total, end=total + part))
            total += part
    return Waterfall(
        kind="estimate",
        basis=basis,
        limit=_limit(plan, what),
        steps=tuple(steps),
        total=total,
        measured=measured,
    )


def _words(each: Use) -> str:
    """One use of the budget in words: `12 % of the budget used: 0.012 of 0.1 (measured on ...)`."""
    if each.value is None:
        return "not known"
    said = f"({each.kind}, {each.basis})"
    if each.share is None:
        return f"{number(each.value)} {said}; no limit is set"
    used_up = f"{of_budget(each.share)}: {number(each.value)} of {each.limit:g}"
    return f"{used_up} {said}"
