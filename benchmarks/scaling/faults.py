"""Training that loses a rank now and then, event by event: the best interval between checkpoints, and what is lost.

Any failure of a rank ends all of them (docs/training.md): they begin again from the last checkpoint that is whole. A
checkpoint stops training while it is copied, and becomes whole when it is written, during which training goes on, as
with `torch.distributed.checkpoint.async_save`; the next one waits until then.

Formulas to compare with: Young 1974, sqrt(2 C M), and Daly 2006, both for a checkpoint that stops training for C and
failures of a mean time M between them. `lost_by_formula` is Daly's exact expectation for those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FAILURES = 20_000  # of a simulated run
INTERVALS = np.geomspace(1 / 8, 8, 49)  # over Young's, that are tried


@dataclass(frozen=True)
class Run:
    """Seconds: mean time between failures of any rank; a checkpoint's copy and writing; from a failure to training."""

    between: float
    copy: float
    write: float
    restart: float

    @property
    def young(self) -> float:
        """sqrt(2 C M), where C is all that a checkpoint costs at once: the copy, or the writing where it is blocked."""
        return math.sqrt(2 * self.copy * self.between)

    @property
    def daly(self) -> float:
        """Daly's estimate of higher order: sqrt(2 C M) (1 + x / 3 + x² / 9) - C, x² = C / 2 M; M for C over 2 M."""
        if self.copy >= 2 * self.between:
            return self.between
        x = math.sqrt(self.copy / (2 * self.between))
        return self.young * (1 + x / 3 + x * x / 9) - self.copy

    def lost_by_formula(self, interval: float) -> float:
        """The share of time lost with failures of a Poisson process, if checkpoints stop training: Daly 2006, (13)."""
        longer = math.expm1((interval + self.copy) / self.between)
        return 1 - interval / (self.between * math.exp(self.restart / self.between) * longer)


def lost(run: Run, interval: float, failures: int = FAILURES, seed: int = 0, shape: float = 1.0) -> float:
    """The simulated share of time that is not progress, with `interval` seconds of training between checkpoints.

    shape: of Weibull's distribution of the time between failures; 1 is a Poisson process, below 1 failures come in
    groups. A failure while all begin again begins that anew.
    """
    interval = max(interval, run.write)  # the next one waits
    drawn = np.random.default_rng(seed).weibull(shape, failures) * run.between / math.gamma(1 + 1 / shape)
    cycle = interval + run.copy  # checkpoints are whole at even distances, the first when it is written
    whole = np.floor((drawn - run.restart - run.write) / cycle).clip(min=0)
    return float(1 - interval * whole.sum() / drawn.sum())


def best_interval(
    run: Run, shape: float = 1.0, intervals: Sequence[float] | None = None
) -> tuple[float, float]:
    """Of the intervals tried the one that loses least, and the share that it loses; all with the same failures."""
    tried = (INTERVALS * run.young).tolist() if intervals is None else intervals
    found = [(lost(run, each, shape=shape), each) for each in tried]
    share, interval = min(found)
    return interval, share
