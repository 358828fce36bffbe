"""Bound, estimate and measured error of each attention, each head and the whole model. None is what is not known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastgrad_dsl.documents.base import finite
from fastgrad_dsl.documents.calibration import CalibratedAttention, Calibration, Histogram
from fastgrad_dsl.documents.pairs import WHATS, of
from fastgrad_dsl.documents.plan import Attention, Plan, is_approximated
from fastgrad_dsl.documents.report import NOTHING, UNKNOWN, Errors, Exact, Head, LocalErrors, WholeErrors
from fastgrad_dsl.report.entries import head_numbers

if TYPE_CHECKING:
    from fastgrad_dsl.models.measure import AttentionErrors, Local, ModelErrors

LOCAL: tuple[Exact, ...] = ("output", "dq", "dk", "dv")


def found_errors(entry: Attention, errors: ModelErrors | None) -> AttentionErrors | None:
    """What was measured of an attention."""
    return next((a for a in errors.attentions if a.path == entry.path), None) if errors else None


def attention_errors(
    entry: Attention, found: AttentionErrors | None, calibration: CalibratedAttention | None
) -> LocalErrors:
    """Of output, dq, dk and dv, and `gradient`, the largest of the three.

    bound: proved for the batch. measured: this attention alone, on the batch. estimate: how far the model's output, and
    all weights' gradients, move when it alone is made exact; or what a calibration, of the whole attention, expects.
    """
    if not is_approximated(entry):
        return LocalErrors(*[NOTHING] * 5)
    if found is None:
        chosen = calibration.chosen if calibration else None
        output, gradient = (Errors(None, of(chosen, w) if chosen else None, None) for w in WHATS)
        return LocalErrors(output, UNKNOWN, UNKNOWN, UNKNOWN, gradient)
    known = "gradient" not in exact_zero(found)
    return LocalErrors(
        output=_three(found.local["output"], found.output_effect),
        dq=_three(found.local["dq"], None),
        dk=_three(found.local["dk"], None),
        dv=_three(found.local["dv"], None),
        gradient=Errors(
            finite(found.gradient.bound if known else None),
            finite(found.gradient_effect),
            finite(found.gradient.measured if known else None),
        ),
    )


def exact_zero(found: AttentionErrors | None) -> tuple[Exact, ...]:
    """Which of output, dq, dk, dv and all gradients are 0 in exact attention: no error is relative to them."""
    if found is None:
        return ()
    zero = tuple(what for what in LOCAL if found.local[what].exact_is_zero)
    return (*zero, "gradient") if {"dq", "dk", "dv"} <= set(zero) else zero


def heads_of(
    entry: Attention, found: AttentionErrors | None, calibration: CalibratedAttention | None
) -> tuple[Head, ...] | None:
    """One row for each query head; None where no head is known apart."""
    heads = head_numbers(entry.path, entry.query_heads)
    measured = dict(zip(heads, found.heads, strict=True)) if found and len(found.heads) == len(heads) else {}
    seen = {head.head: head for head in calibration.heads} if calibration else {}
    if not measured and not seen:
        return None
    rows = []
    for head in heads:
        own, logits = measured.get(head), seen.get(head)
        rows.append(
            Head(
                head=head,
                range=entry.bound,
                reach=own.reach if own else None,
                **{name: getattr(logits, name, None) for name in ("least", "largest", "centred")},
                outside=_outside(logits.histogram, entry.bound) if logits else None,
                output=_three(own.output, None) if own else UNKNOWN,
            )
        )
    return tuple(rows)


def whole_errors(plan: Plan, errors: ModelErrors | None, calibration: Calibration | None) -> WholeErrors:
    """The whole model; no useful bound is proved through layers that approximate."""
    exact = not any(map(is_approximated, plan.attentions))
    bound = 0.0 if exact else None
    if errors is not None:
        return WholeErrors(
            Errors(bound, errors.output_estimate, errors.output),
            Errors(bound, errors.gradient_estimate, errors.gradient),
            errors.loss,
            errors.exact_loss,
        )
    planned = calibration.planned if calibration else None
    output, gradient = (
        Errors(bound, bound if exact or planned is None else of(planned, what), bound) for what in WHATS
    )
    return WholeErrors(output, gradient, None, None)


def _three(local: Local, estimate: float | None) -> Errors:
    if local.exact_is_zero:
        return Errors(None, estimate, None)
    return Errors(finite(local.bound), finite(estimate), finite(local.measured))


def _outside(histogram: Histogram, limit: float | None) -> float | None:
    """The share of logits in bins that lie beyond R."""
    if limit is None:
        return None
    edges, counts = histogram.edges, histogram.counts
    beyond = sum(
        c for c, low, high in zip(counts, edges, edges[1:], strict=False) if high <= -limit or low >= limit
    )
    return beyond / sum(counts) if sum(counts) else 0.0
