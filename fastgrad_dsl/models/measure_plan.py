"""Errors of a model that was compiled with a plan, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastgrad_compiler.targets import BACKENDS
from fastgrad_dsl.documents.plan import Approximated, Plan, Polynomial
from fastgrad_dsl.models.attention_rounding import spec_of
from fastgrad_dsl.models.measure import ModelErrors, Served, measure_errors


def measure_plan(
    plan: Plan,
    model: nn.Module,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    objective: Callable[..., Tensor] | None,
    tell: Callable[[str], None] = lambda what: None,
) -> ModelErrors:
    """Measured errors of a model that was compiled with this plan."""
    served = [
        Served(
            entry.path,
            entry.eps or 0.0,
            entry.eps_prime or 0.0,
            entry.scale,
            own=not isinstance(entry, Approximated),
            bound=entry.bound or 0.0,
            spec=spec_of(entry),
            backends=BACKENDS[plan.target],
        )
        for entry in plan.attentions
        if isinstance(entry, Polynomial)
    ]
    return measure_errors(model, inputs, targets, objective if targets else None, served, progress=tell)
