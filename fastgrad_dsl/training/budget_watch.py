"""The budget while a model trains: measured errors, ranges of logits against the plan's, and a new plan in time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastgrad_compiler.runtime.guard import share_of_range
from fastgrad_dsl.documents.pairs import WHATS, of
from fastgrad_dsl.documents.plan import Budget, approximated_of
from fastgrad_dsl.models.batches import tokens_of
from fastgrad_dsl.models.certify import certify
from fastgrad_dsl.models.measure import whole_errors
from fastgrad_dsl.report.words import sample
from fastgrad_dsl.training.ranks import Ranks
from fastgrad_grammar.diagnostics import TfgError

if TYPE_CHECKING:
    from fastgrad_dsl.api.compiled import Compiled

CLOSE = 0.9  # of a limit or a range: beyond it the budget is about to break, and a new plan is made

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class BudgetState:
    """How much of the budget a model uses at some step.

    Args:
        output, gradient: measured relative errors on one held-out batch; None in a run on several processes, of which
            none has the whole of a model and of a sequence.
        tokens: of that batch.
        range: the largest share of its R that the logits of a guarded attention took, or that their proved bound takes;
            None where no attention rests on a range that can be left.
        where: the path of that attention.
        violations: calls in which a guard found a logit beyond its range, since the last state.
    """

    output: float | None
    gradient: float | None
    tokens: int
    range: float | None
    where: str | None
    violations: int

    def share(self, limits: Budget | None) -> float:
        """The largest share of a limit, or of a range, that is used."""
        shares = [self.range or 0.0]
        for what in WHATS:
            limit = of(limits, what) if limits else None
            used: float | None = of(self, what)
            if limit is not None and used is not None:
                shares.append(used / limit)
        return max(shares)

    def line(self, limits: Budget | None) -> str:
        """One line for people: every number says what it is."""
        parts = []
        for what in WHATS if self.output is not None else ():
            limit = of(limits, what) if limits else None
            parts.append(
                f"{what} error {of(self, what):.2g}" + (f" of {limit:g}" if limit is not None else "")
            )
        text = f"{', '.join(parts)} (measured on {sample(1, self.tokens)}, held out)"
        if self.output is None:
            text = "errors are not measured on several processes"
        if self.range is not None:
            text += f"; logits at {100 * self.range:.0f} % of R in {self.where}"
        if self.violations:
            text += f"; {self.violations} calls beyond their range"
        return text


@dataclass
class BudgetWatch:
    """Looks at a training model on a schedule, and plans anew where its budget is about to break.

    `again(compiled, model)` calibrates and plans at the present weights; `held_out` is a batch of inputs and targets;
    `tell` gets what people should know. On several `ranks` all have the same state, and nothing is planned anew.
    """

    compiled: Compiled
    held_out: Batch
    again: Callable[[Compiled, nn.Module], Compiled]
    tell: Callable[[str], None]
    ranks: Ranks = field(default_factory=Ranks)
    states: list[BudgetState] = field(default_factory=list)

    def look(self, model: nn.Module) -> tuple[BudgetState, nn.Module]:
        """The state, and the model to go on with: the same, or a new plan's with the very same weights."""
        limits = self.compiled.plan_document.budget
        state = self._state(model)
        self.states.append(state)
        self.tell(state.line(limits))
        share = state.share(limits)
        if not isfinite(share):
            self.tell("errors are not finite, so that no plan can be made at these weights")
            return state, model
        if share < CLOSE and not state.violations:
            return state, model
        if self.ranks.count > 1:
            self.tell("the budget is about to break: go on in one process, which makes a new plan")
            return state, model
        try:
            self.compiled = self.again(self.compiled, model)
        except TfgError as error:
            self.tell(f"the budget is about to break, and no plan keeps it: {error.diagnostics[0].message}")
            return state, model
        ratio = self.compiled.calibration.planned.speed_up if self.compiled.calibration else 1.0
        self.tell(
            f"the budget was about to break: planned anew, attention {ratio:.1f} times as fast as exact (estimate)"
        )
        return state, self.compiled.adopt(model).train(model.training)

    def _state(self, model: nn.Module) -> BudgetState:
        output: float | None
        gradient: float | None
        approximated = approximated_of(self.compiled.plan_document)
        statuses = merged(self.ranks.objects(list(_counted(model))))
        if self.ranks.count > 1:
            output = gradient = None
        else:
            output = gradient = 0.0
        if self.ranks.count == 1 and any(approximated):
            inputs, targets = self.held_out[:1], self.held_out[1:]
            output, gradient = whole_errors(model, inputs, targets, self.compiled.loss, approximated)
            _counted(model)
        shares = {
            status["path"]: share_of_range(status["largest"], _largest(status["bound"]))
            for status in statuses
            if status["calls"]  # none where sequences are below the break-even length, and attention is exact
        }
        for path, share in self._proved(model).items():
            shares[path] = max(share, shares.get(path, 0.0))
        where = max(shares, key=lambda path: shares[path], default=None)
        return BudgetState(
            output,
            gradient,
            tokens_of(self.compiled.plan_document, self.held_out),
            None if where is None else shares[where],
            where,
            sum(status["violations"] for status in statuses),
        )

    def _proved(self, model: nn.Module) -> dict[str, float]:
        """The share of the planned R that is proved of the present weights, where the plan rests on such a proof."""
        rests = {e.path for e in self.compiled.plan_document.attentions if e.range_source == "weights"}
        rests = rests if self.ranks.count == 1 else set()  # the weights are in parts
        certificates = certify(self.compiled.program, model, self.compiled.target) if rests else ()
        return {
            each.path: each.range.bound / each.planned
            for each in certificates
            if each.path in rests and each.planned and isfinite(each.range.bound)
        }


def _counted(model: nn.Module) -> Sequence[Mapping[str, Any]]:
    """What the guards counted, who count anew; calls that a policy made exact stay so."""
    found: Sequence[Mapping[str, Any]] = model.budget_status(reset=True, keep_verdict=True)  # type: ignore[operator]
    return found


def _largest(bound: float | Sequence[float]) -> float:
    return bound if isinstance(bound, float | int) else max(bound)


def merged(of_ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What the guards of all ranks counted together, by attention."""
    return [
        {
            **each[0],
            "calls": sum(status["calls"] for status in each),
            "violations": sum(status["violations"] for status in each),
            "largest": max((status["largest"] for status in each), key=lambda value: (value != value, value)),
        }
        for each in zip(*of_ranks, strict=True)
    ]
