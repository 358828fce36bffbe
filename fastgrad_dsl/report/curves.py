"""The polynomial beside exp: p(s)/exp(s) - 1 on the range of the logits, and the same of p'."""

from __future__ import annotations

from collections.abc import Sequence

from fastgrad_compiler.approximation.elementary import exp
from fastgrad_dsl.documents.plan import Approximated, Attention
from fastgrad_dsl.documents.report import Curve

POINTS = 201  # odd, so that s = 0 is one


def curve_key(entry: Attention) -> object:
    """What the curve of an attention depends on."""
    return entry.coefficients, entry.bound, entry.family


def curve(entry: Attention) -> Curve | None:
    """The curve of an attention; None where nothing stands in for exp on a range."""
    if not isinstance(entry, Approximated) or not entry.bound:
        return None
    bound, coefficients = entry.bound, entry.coefficients
    slopes = [power * c for power, c in enumerate(coefficients)][1:]
    points = [bound * (2 * i / (POINTS - 1) - 1) for i in range(POINTS)]
    return Curve(
        attentions=(),
        range=bound,
        degree=entry.degree,
        family=entry.family,
        eps=entry.eps,
        eps_prime=entry.eps_prime,
        positive_from=entry.positive_from,
        s=tuple(_digits(s) for s in points),
        p=tuple(_digits(_value(coefficients, s) * exp(-s) - 1) for s in points),
        p_prime=tuple(_digits(_value(slopes, s) * exp(-s) - 1) for s in points),
    )


def _value(coefficients: Sequence[float], s: float) -> float:
    total = 0.0
    for coefficient in reversed(coefficients):
        total = total * s + coefficient
    return total


def _digits(value: float) -> float:
    """Six digits: a curve is drawn."""
    return float(f"{value:.6g}")
