"""The plan of a training run: made on its text, kept in its checkpoint, put back when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastgrad_compiler.attention.table import attention_table
from fastgrad_compiler.planning.decision import Decision
from fastgrad_dsl.api.compiled import Compiled
from fastgrad_dsl.calibration.pace import MachinePace, machine_pace
from fastgrad_dsl.calibration.record import plan_record, with_recorded_plan
from fastgrad_dsl.calibration.replan import Request, replan
from fastgrad_dsl.models.text_data import TextData
from fastgrad_dsl.training.checkpoint import Checkpoint, RunPlan
from fastgrad_dsl.training.loop import Options
from fastgrad_dsl.training.stopping import Stop
from fastgrad_grammar.diagnostics import TfgError

CALIBRATION_BATCHES = 2
SCORES = 0.15  # error of the gradients of queries and keys that training bears (docs/training.md)


@dataclass
class TextPlanner:
    """Plans a model on the text that it learns, at its present weights.

    `progress` shows what is being done. The generator of its batches, `places`, and the measured `pace` of the machine
    are a part of a run's state: with them a resumed run makes the same plans. `scores` limits the error of the
    gradients of queries and keys.
    """

    data: TextData
    options: Options
    stop: Stop
    progress: Callable[[str], AbstractContextManager[Callable[[str], None]]]
    pace: MachinePace | None = None
    scores: float | None = SCORES
    places: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.places = torch.Generator().manual_seed(self.options.seed)

    @property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """The batch on which a budget is looked at."""
        return next(self.data.validation_batches(self.options.tokens, self.options.batch, 1))

    def __call__(self, compiled: Compiled, model: nn.Module) -> Compiled:
        """The model with a new plan. TfgError as `replan`; StopAsked where the run is to stop."""
        tokens, batch = self.options.tokens, self.options.batch
        used = [self.data.batch(tokens, batch, self.places) for _ in range(CALIBRATION_BATCHES)]
        with self.progress("calibrating:") as show:

            def tell(what: str) -> None:
                self.stop.check()
                show(what)

            tell("the pace of this machine")
            self.pace = self.pace or machine_pace(compiled.target)
            batches = [*used, self.held_out]
            request = Request(
                model, batches, "the text", "the present weights", pace=self.pace, scores=self.scores
            )
            return replan(compiled, request, tell)


def without_polynomials(compiled: Compiled) -> Compiled:
    """The same model with every attention exact, but those whose weights are a polynomial of the model's own."""
    chosen = {
        entry.full_path: (Decision("it is trained as exact attention"),)
        for entry in attention_table(compiled.recognised)
        if not entry.attention.is_own
    }
    return replace(compiled.with_decisions(chosen), assignment=None)  # the compiler's own, on resuming too


def plan_of(compiled: Compiled, pace: MachinePace | None) -> RunPlan:
    """What a checkpoint keeps of a plan."""
    decisions = None if compiled.assignment is None else plan_record(compiled.assignment)
    return RunPlan(decisions, compiled.calibration, pace)


def resumed_plan(compiled: Compiled, checkpoint: Checkpoint) -> Compiled:
    """The model with the plan of a checkpoint. TfgError FG413 where that is not one of this model."""
    try:
        return planned_as(compiled, checkpoint.progress.plan)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        message = f"cannot read the checkpoint {checkpoint.path}: its plan is not one of this model: {error}"
        raise TfgError.of("FG413", message) from None


def planned_as(compiled: Compiled, plan: RunPlan | None) -> Compiled:
    """The model with a plan that was kept. Raises ValueError and others where it is not one of this model."""
    if plan is None or plan.decisions is None:
        return compiled
    planned = with_recorded_plan(compiled, plan.decisions, plan.calibration)
    _ = planned.files  # which show the calibration
    return planned
