"""What a reader of the report must know before trusting a number: warnings; and notes on how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from fastgrad_compiler.attention.value import OWN
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.plan import Budget, Plan, is_approximated
from fastgrad_dsl.documents.report import Batch, Errors, Exact, Headline, ReportedAttention, Warned
from fastgrad_dsl.report.errors import LOCAL
from fastgrad_dsl.report.words import VACUOUS, folded

if TYPE_CHECKING:
    from fastgrad_dsl.models.measure import ModelErrors

Attentions = Sequence[ReportedAttention]
TRUSTED: dict[Literal["data", "asserted"], str] = {
    "data": "R is measured on data, with a margin",
    "asserted": "R rests on assume_bound, asserted by the file",
}
OWN_IS_EXACT = (
    "weights that are the model's own polynomial replace nothing: their error is 0, without a bound of the"
    " logits"
)
UNPROVED = (
    "no useful bound is proved through several layers: of the whole model's errors there are estimates and "
    "measurements only"
)


def warnings(
    headline: Headline,
    attentions: Attentions,
    budget: Budget | None,
    batch: Batch | None,
    calibration: Calibration | None,
) -> tuple[Warned, ...]:
    """The warnings of a report, the gravest first."""
    return (
        *_budget(headline, calibration is not None),
        *_broken(attentions),
        *_ranges(attentions, budget),
        *_vacuous(attentions),
        *_unbounded(attentions, calibration is not None),
        *_batch(batch, attentions),
        *_calibration(calibration),
    )


def notes(plan: Plan, errors: ModelErrors | None, undeclared: Sequence[str]) -> tuple[str, ...]:
    """Remarks on what the numbers are."""
    entries = plan.attentions
    found = []
    if any(entry.family == OWN for entry in entries):
        found.append(OWN_IS_EXACT)
    if any(map(is_approximated, entries)):
        found.append(UNPROVED)
    if undeclared:
        dims = " or ".join(undeclared)
        found.append(f"the file declares no longest {dims}: time and memory are predicted at 65,536")
    zero = [e.path for e in errors.attentions if e.local["dq"].exact_is_zero] if errors is not None else []
    if zero:
        said = "the exact dq and dk are 0 on this batch, so that no error is relative to them"
        found.append(f"{folded(zero)}: {said}")
    if errors is not None and errors.loss is None:
        found.append(
            "the file has no objective: gradients are those of a fixed random projection of the output"
        )
    return tuple(found)


def _budget(headline: Headline, calibrated: bool) -> Iterator[Warned]:
    if headline.verdict.state in ("missed", "unlikely"):
        again = "calibrate again, on more data and with the weights that are used"
        first = "plan by what is measured (`fastgrad compile --calibrate DATA`), or plan for smaller limits"
        yield Warned("budget", f"to meet the budget, {again if calibrated else first}", ())


def _broken(attentions: Attentions) -> Iterator[Warned]:
    broken = [entry.path for entry in attentions if any(map(_is_broken, map(entry.errors.of, LOCAL)))]
    if broken:
        text = f"{folded(broken)}: an error is above its bound, so logits left the range of the plan"
        yield Warned("range", text, tuple(broken))


def _is_broken(errors: Errors) -> bool:
    return errors.measured is not None and errors.bound is not None and errors.measured > errors.bound


def _ranges(attentions: Attentions, budget: Budget | None) -> Iterator[Warned]:
    policy = budget.on_violation if budget else "warn"
    for source, text in TRUSTED.items():
        served = [e for e in attentions if e.range_source == source and e.decision == "polynomial"]
        for guarded in (True, False):
            paths = [e.path for e in served if e.guarded == guarded]
            guard = f"a guard watches it, on_violation = {policy}" if guarded else "nothing watches it"
            if paths:
                said = f"{folded(paths)}: {text}; logits beyond it have unbounded error; {guard}"
                yield Warned(source, said, tuple(paths))


def _vacuous(attentions: Attentions) -> Iterator[Warned]:
    groups: dict[tuple[Exact, ...], list[str]] = {}
    for entry in attentions:
        bounds = {what: entry.errors.of(what).bound for what in LOCAL}
        names = tuple(what for what, bound in bounds.items() if bound is not None and bound >= VACUOUS)
        if names:
            groups.setdefault(names, []).append(entry.path)
    for names, paths in groups.items():
        text = f"{folded(paths)}: the bound of {', '.join(names)} is vacuous (100 % or more): trust what was measured"
        yield Warned("vacuous", text, tuple(paths))


def _unbounded(attentions: Attentions, calibrated: bool) -> Iterator[Warned]:
    exact = [e for e in attentions if e.decision == "exact" and e.bound is None]
    paths = [e.path for e in exact if not (e.window or e.alibi or calibrated)]
    if paths:
        yield Warned("unbounded", f"{folded(paths)}: exact, because nothing bounds the logits", tuple(paths))


def _batch(batch: Batch | None, attentions: Attentions) -> Iterator[Warned]:
    if batch is None:
        return
    if batch.weights.startswith("initial weights"):
        yield Warned("weights", f"measured with {batch.weights}: trained weights have other logits", ())
    if batch.kind.startswith("random"):
        yield Warned("data", "measured on random inputs: real data have other logits", ())
    lengths = [e.break_even for e in attentions if is_approximated(e) and e.break_even is not None]
    shortest = min(lengths, default=0)
    longest = max(batch.dims.values(), default=0)
    if longest < shortest:
        text = f"below {shortest} tokens every attention runs exactly: measure a longer batch (--dim)"
        yield Warned("length", text, ())


def _calibration(calibration: Calibration | None) -> Iterator[Warned]:
    if calibration is None:
        return
    if calibration.weights.startswith("initial weights"):
        said = f"calibrated with {calibration.weights}: calibrate again after training"
        yield Warned("calibration", said, ())
    if calibration.data.startswith("random"):
        yield Warned("calibration", "calibrated on random inputs: estimates hold for those", ())
