"""Bound, estimate and measured error of each attention, each head and the whole model. None is what is not known."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.report.entries import Entry, head_ranges

if TYPE_CHECKING:
    from fastgrad_dsl.api.measure import AttentionErrors, Local, ModelErrors

LOCAL = ("output", "dq", "dk", "dv")
KINDS = ("bound", "estimate", "measured")
Errors = dict[str, dict[str, float | None]]


def found_errors(entry: Entry, errors: ModelErrors | None) -> AttentionErrors | None:
    """What was measured of an attention."""
    return next((a for a in errors.attentions if a.path == entry["path"]), None) if errors else None


def attention_errors(
    entry: Entry, found: AttentionErrors | None, calibration: Mapping[str, Any] | None
) -> Errors:
    """Of output, dq, dk and dv, and `gradient`, the largest of the three.

    bound: proved for the batch. measured: this attention alone, on the batch. estimate: how far the model's output, and
    all weights' gradients, move when it alone is made exact; or what a calibration, of the whole attention, expects.
    """
    if not is_approximated(entry):
        return {what: dict.fromkeys(KINDS, 0.0) for what in (*LOCAL, "gradient")}
    if found is None:
        unknown: Errors = {what: dict.fromkeys(KINDS, None) for what in (*LOCAL, "gradient")}
        for what, value in calibrated_estimates(calibration).items():
            unknown[what]["estimate"] = value
        return unknown
    three = {what: _three(found.local[what], None) for what in LOCAL}
    three["output"] = _three(found.local["output"], found.output_effect)
    gradient: dict[str, float | None] = {
        "bound": found.gradient_bound,
        "estimate": found.gradient_effect,
        "measured": found.gradient,
    }
    if "gradient" in exact_zero(found):
        gradient |= {"bound": None, "measured": None}
    return {**three, "gradient": finite(gradient)}


def exact_zero(found: AttentionErrors | None) -> list[str]:
    """Which of output, dq, dk, dv and all gradients are 0 in exact attention: no error is relative to them."""
    if found is None:
        return []
    zero = [what for what in LOCAL if found.local[what].exact_is_zero]
    return [*zero, "gradient"] if {"dq", "dk", "dv"} <= set(zero) else zero


def calibrated_estimates(calibration: Mapping[str, Any] | None) -> dict[str, float]:
    """The part in the model's errors of the candidate that a calibration chose; empty where there is none."""
    chosen = next((c for c in (calibration or {}).get("candidates", ()) if c["chosen"]), None)
    return {} if chosen is None else {what: chosen[what] for what in ("output", "gradient")}


def heads_of(
    entry: Entry, found: AttentionErrors | None, calibration: Mapping[str, Any] | None
) -> list[dict[str, Any]] | None:
    """One row for each query head: R, the logits that were seen, the output's error; None where no head is known apart.

    `reach` is a bound of the batch's logits; `least`, `largest`, `centred` and `outside`, the share of logits beyond R,
    are measured by a calibration.
    """
    ranges = head_ranges(entry)
    measured = (
        dict(zip(ranges, found.heads, strict=True)) if found and len(found.heads) == len(ranges) else {}
    )
    seen = {head["head"]: head for head in (calibration or {}).get("heads", ())}
    if not measured and not seen and not entry.get("heads"):
        return None
    rows = []
    for head, limit in ranges.items():
        own, logits = measured.get(head), seen.get(head, {})
        rows.append(
            {
                "head": head,
                "range": limit,
                "reach": own.reach if own else None,
                **{key: logits.get(key) for key in ("least", "largest", "centred")},
                "outside": _outside(logits.get("histogram"), limit),
                "output": _three(own.output, None) if own else dict.fromkeys(KINDS, None),
            }
        )
    return rows


def whole_errors(
    plan: Mapping[str, Any], errors: ModelErrors | None, calibration: Mapping[str, Any] | None
) -> Any:
    """The whole model; no useful bound is proved through layers that approximate."""
    exact = not any(map(is_approximated, plan["attentions"]))
    bound = 0.0 if exact else None
    if errors is not None:
        return {
            "output": {"bound": bound, "estimate": errors.output_estimate, "measured": errors.output},
            "gradient": {"bound": bound, "estimate": errors.gradient_estimate, "measured": errors.gradient},
            "loss": errors.loss,
            "exact_loss": errors.exact_loss,
        }
    planned = (calibration or {}).get("planned") or {}
    whole = {
        what: {"bound": bound, "estimate": bound if exact else planned.get(what), "measured": bound}
        for what in ("output", "gradient")
    }
    return {**whole, "loss": None, "exact_loss": None}


def _three(local: Local, estimate: float | None) -> dict[str, float | None]:
    if local.exact_is_zero:
        return {"bound": None, "estimate": estimate, "measured": None}
    return finite({"bound": local.bound, "estimate": estimate, "measured": local.measured})


def finite(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Numbers, and None for what is not finite: an error beside an exact value of 0."""
    return {name: value if value is not None and isfinite(value) else None for name, value in values.items()}


def _outside(histogram: Mapping[str, Any] | None, limit: float | None) -> float | None:
    """The share of logits in bins that lie beyond R."""
    if histogram is None or limit is None:
        return None
    edges, counts = histogram["edges"], histogram["counts"]
    beyond = sum(
        c for c, low, high in zip(counts, edges, edges[1:], strict=False) if high <= -limit or low >= limit
    )
    return beyond / sum(counts) if sum(counts) else 0.0
