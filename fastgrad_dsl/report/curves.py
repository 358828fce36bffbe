"""The polynomial beside exp: p(s)/exp(s) - 1 on the range of the logits, and the same of p'."""

from __future__ import annotations

from typing import Any

from fastgrad_compiler.approximation.elementary import exp
from fastgrad_dsl.documents.plan import is_approximated
from fastgrad_dsl.report.entries import Entry

POINTS = 201  # odd, so that s = 0 is one


def curve_key(entry: Entry) -> object:
    """What the curve of an attention depends on."""
    return (tuple(entry["coefficients"] or ()), entry["bound"], entry["family"])


def curve(entry: Entry) -> dict[str, Any] | None:
    """The relative errors of p and p' at points of [-R, R]; None where nothing stands in for exp on a range.

    `eps` and `eps_prime` are their proved bounds, `positive_from` the logit below which p is not positive.
    """
    bound, coefficients = entry["bound"], entry["coefficients"]
    if not is_approximated(entry) or not bound:
        return None
    slopes = [power * c for power, c in enumerate(coefficients)][1:]
    points = [bound * (2 * i / (POINTS - 1) - 1) for i in range(POINTS)]
    return {
        "range": bound,
        "degree": entry["degree"],
        "family": entry["family"],
        "eps": entry["eps"],
        "eps_prime": entry["eps_prime"],
        "positive_from": entry["positive_from"],
        "s": [_digits(s) for s in points],
        "p": [_digits(_value(coefficients, s) * exp(-s) - 1) for s in points],
        "p_prime": [_digits(_value(slopes, s) * exp(-s) - 1) for s in points],
    }


def _value(coefficients: list[float], s: float) -> float:
    total = 0.0
    for coefficient in reversed(coefficients):
        total = total * s + coefficient
    return total


def _digits(value: float) -> float:
    """Six digits: a curve is drawn."""
    return float(f"{value:.6g}")
