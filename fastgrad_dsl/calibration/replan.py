"""Calibrate a compiled model, plan it anew, and verify the plan on held-out batches until it keeps its budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import exp, isfinite, log
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastgrad_compiler.ir.graph import Budget
from fastgrad_compiler.runtime.attention_op import compute_dtype
from fastgrad_compiler.runtime.guard import LOGGER
from fastgrad_dsl.calibration.calibrate import Calibration, Tell, calibrate, within
from fastgrad_dsl.calibration.capture import Subject
from fastgrad_dsl.calibration.document import calibration_document
from fastgrad_dsl.calibration.pace import MachinePace, default_pace, machine_pace
from fastgrad_dsl.calibration.plan import Plan, decisions, make_plan
from fastgrad_dsl.calibration.refusal import refusal
from fastgrad_dsl.documents.base import picked
from fastgrad_dsl.documents.calibration import Limits, Round, UsedCalibration, Verification
from fastgrad_dsl.documents.plan import approximated_of
from fastgrad_dsl.models.batches import dims_of, model_inputs, random_batch, target_inputs, tokens_of
from fastgrad_dsl.models.measure import whole_errors
from fastgrad_dsl.models.sizes import batch_sizes

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled

ROUNDS = 6  # of planning within tighter limits, before what is not pinned becomes exact
HEADROOM = 0.75  # of a limit that the held-out batches may take: others that nobody has seen will differ
TIGHTER = 0.9  # beyond what the measured excess asks for
SPREADS = 2.0  # standard deviations between batches that are allowed for
RANDOM_BATCHES = 3  # the last of them held out
Batch = Sequence[Tensor]


@dataclass(frozen=True)
class Request:
    """What to calibrate with.

    model: None is one with the initial weights of `seed`; batches: None are random ones of the sizes `dims`. A batch is
    the model's inputs, then what its objective takes beyond the results; the last third of several is held out.
    measured_pace: the micro-benchmark of this machine instead of round figures; pace: what it gave earlier. scores: the
    largest relative error of the gradients of queries and keys of a polynomial, None is any.
    """

    model: nn.Module | None = None
    batches: Sequence[Batch] | None = None
    data: str = "given batches"
    weights: str = "the given weights"
    dims: Mapping[str, int] | None = None
    seed: int = 0
    measured_pace: bool = True
    pace: MachinePace | None = None
    scores: float | None = None


def replan(compiled: Compiled, request: Request, tell: Tell = lambda what: None) -> Compiled:
    """The model compiled again, with the plan that its calibration allows.

    Raises TfgError FG312 where rules of the budget keep its limits from being met, and what the plan pass refuses.
    """
    model = request.model if request.model is not None else compiled.module(seed=request.seed)
    if request.model is None:
        request = replace(request, weights=f"initial weights, seed {request.seed}")
    used, held_out, described = _batches(compiled, request)
    dtype = compute_dtype(*model.parameters())
    used, held_out = ([_cast(batch, dtype) for batch in batches] for batches in (used, held_out))
    tell("the pace of this machine")
    measured = machine_pace if request.measured_pace else default_pace
    pace = request.pace or measured(compiled.target)
    weights = {name: _cast((weight,), dtype)[0] for name, weight in model.state_dict().items()}
    subject = Subject(compiled.recognised, weights, compiled.loss)
    dims = dims_of(compiled.plan_document, used[0])
    what = UsedCalibration(described, request.weights, len(used), dims, request.seed)
    calibration = calibrate(subject, used, what, pace, tell)
    if request.scores is not None:
        calibration = within(calibration, request.scores)
    return _Verified(compiled, model, calibration, used, held_out, tell).plan()


@contextmanager
def silenced() -> Iterator[None]:
    """Without the warnings of guards."""
    before, LOGGER.disabled = LOGGER.disabled, True
    try:
        yield
    finally:
        LOGGER.disabled = before


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Batch:
    """Floats in the dtype to calibrate in: differences of half precision say nothing."""
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in tensors)


def _batches(compiled: Compiled, request: Request) -> tuple[list[Batch], list[Batch], str]:
    """Batches to calibrate on, to verify on, and what they are."""
    if request.batches is None:
        tensors = [*model_inputs(compiled.program), *target_inputs(compiled.program)]
        sizes = batch_sizes(compiled.plan_document, request.dims or {})
        made = [random_batch(tensors, sizes, request.seed + place) for place in range(RANDOM_BATCHES)]
        return list(made[:-1]), list(made[-1:]), "random inputs"
    given = list(request.batches)
    if not given:
        raise ValueError("calibration needs one batch at least")
    if len(given) == 1:
        return given, given, f"{request.data}, one batch: the plan is verified on the same"
    out = max(1, len(given) // 3)
    return given[:-out], given[-out:], request.data


@dataclass(frozen=True)
class _Verified:
    """Plans until what is measured on the held-out batches keeps the budget."""

    compiled: Compiled
    model: nn.Module
    calibration: Calibration
    used: Sequence[Batch]
    held_out: Sequence[Batch]
    tell: Callable[[str], None]

    def plan(self) -> Compiled:
        budget = self.calibration.program.budget or Budget()
        limits, rounds = Limits(budget.output, budget.gradient), list[Round]()
        for place in range(ROUNDS + 1):
            plan = make_plan(self.calibration, limits)
            if plan is None:
                break
            self.tell(f"verifying plan {place + 1}")
            planned = self.compiled.with_decisions(decisions(plan, self.calibration))
            output, gradient, violations = self._errors(planned)
            rounds.append(Round(output.largest, gradient.largest, violations))
            excess = output.share(budget.output), gradient.share(budget.gradient)
            if max(excess) <= 1:
                return self._documented(planned, plan, rounds)
            limits = Limits(
                _tightened(limits.output, excess[0], plan.planned.output),
                _tightened(limits.gradient, excess[1], plan.planned.gradient),
            )
        plan = make_plan(self.calibration, Limits(0.0, 0.0))
        if plan is not None:
            planned = self.compiled.with_decisions(decisions(plan, self.calibration))
            return self._documented(planned, plan, rounds)
        raise refusal(self.calibration, Limits(budget.output, budget.gradient), rounds)

    def _errors(self, planned: Compiled) -> tuple[_Measured, _Measured, int]:
        """Of output and gradient on all batches, and calls beyond their range.

        By PyTorch kernels: their numerics are those of every target.
        """
        portable = replace(planned, target="torch")
        model = portable.module(seed=0, dtype=compute_dtype(*self.model.parameters()))
        model.load_state_dict(self.model.state_dict())
        approximated = approximated_of(portable.plan_document)
        if not any(approximated):
            return _Measured((0.0,), 1), _Measured((0.0,), 1), 0
        count = len(portable.plan_document.inputs)
        with silenced():  # what guards find is counted below
            pairs = [(batch[:count], batch[count:]) for batch in _distinct(self.used, self.held_out)]
            errors = [
                whole_errors(model, inputs, targets, portable.loss if targets else None, approximated)
                for inputs, targets in pairs
            ]
        violations = sum(each["violations"] for each in model.budget_status())  # type: ignore[operator]
        output, gradient = zip(*errors, strict=True)
        return _Measured(output, len(self.held_out)), _Measured(gradient, len(self.held_out)), violations

    def _documented(self, planned: Compiled, plan: Plan, rounds: Sequence[Round]) -> Compiled:
        last = rounds[-1] if plan.planned.output or plan.planned.gradient else Round(0.0, 0.0, 0)
        tokens = sum(tokens_of(self.compiled.plan_document, batch) for batch in self.held_out)
        verification = picked(
            Verification, last, batches=len(self.held_out), tokens=tokens, rounds=tuple(rounds)
        )
        document = calibration_document(self.calibration, plan, verification)
        return replace(planned, calibration=document)


@dataclass(frozen=True)
class _Measured:
    """Errors of a plan on batches, the last `held_out` of which calibration has not seen."""

    errors: tuple[float, ...]
    held_out: int

    @property
    def largest(self) -> float:
        """Of the held-out batches."""
        return max(self.errors[-self.held_out :])

    @property
    def expected(self) -> float:
        """What few batches exceed: SPREADS standard deviations above the mean, of the errors' logarithms."""
        positive = [log(error) for error in self.errors if error > 0]
        if len(positive) < 2 or not all(map(isfinite, positive)):
            return max(self.errors)
        return exp(fmean(positive) + SPREADS * stdev(positive))

    def share(self, limit: float | None) -> float:
        """Of a limit; at most 1 where the plan keeps it, with HEADROOM for batches that nobody has seen."""
        return 0.0 if limit is None else max(self.largest / HEADROOM, self.expected) / limit


def _distinct(used: Sequence[Batch], held_out: Sequence[Batch]) -> list[Batch]:
    """All batches, once each; the held-out ones last."""
    return [*(batch for batch in used if not any(batch is other for other in held_out)), *held_out]


def _tightened(limit: float | None, share: float, planned: float) -> float | None:
    """Below what was planned by what is too much; unchanged where the limit is kept."""
    return limit if limit is None or share <= 1 else min(limit, planned) * TIGHTER / share
