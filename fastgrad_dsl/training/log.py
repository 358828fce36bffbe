"""The log of a training run: one JSON object for each step and for each validation, each step once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastgrad_dsl.documents.base import finite
from fastgrad_dsl.training.budget_watch import BudgetState


@dataclass(frozen=True)
class Event:
    """One line of the log: a step's loss and rate, or a validation loss; losses in nats per token.

    waiting: with several processes the share of a step's passes in which they wait for each other, the mean of all.
    """

    step: int
    seconds: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    waiting: float | None = None
    budget: BudgetState | None = None

    def line(self) -> str:
        """The event as one line of JSON, in which a number that is not finite is null."""
        found = {key: finite(value) for key, value in asdict(self).items() if value is not None}
        return json.dumps(found, allow_nan=False) + "\n"


def kept_lines(log: Path, step: int, validated: int) -> str:
    """The lines of an earlier run up to the checkpoint that it is resumed from; one cut off by a crash is dropped."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return ""
    return "".join(line for line in lines if line.endswith("\n") and _is_kept(line, step, validated))


def _is_kept(line: str, step: int, validated: int) -> bool:
    try:
        event = json.loads(line)
        of = int(event["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
    return of <= (validated if "validation_loss" in event else step)
