"""calibration.json: what a calibration measured and what the planner made of it (docs/calibration.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fastgrad_dsl.documents.base import Count, Document, Family, Part, Size, Source, Trust

PaceKind = Literal["measured", "default"]
Positive = Annotated[float, Meta(gt=0)]


class Pace(Document, frozen=True):
    """How fast a machine is; `speed` and `keys` are those of `cost.Pace`."""

    speed: Positive
    keys: Count
    target: str
    machine: str
    threads: Count
    kind: PaceKind


class Histogram(Document, frozen=True):
    """How many logits of a head lie between the edges."""

    edges: tuple[float, ...]
    counts: tuple[Part, ...]


class HeadLogits(Document, frozen=True):
    """Logits of a head; `centred`: the largest with centred keys."""

    head: Count
    least: float
    largest: float
    centred: float | None
    histogram: Histogram


class Gain(Document, frozen=True):
    """S of e_model <= sum S e_attention: an estimate, and a 95 % interval."""

    value: float
    low: float
    high: float


class Gains(Document, frozen=True):
    """Those of an attention."""

    output: Gain | None
    gradient: Gain | None


class Candidate(Document, frozen=True):
    """A way to serve an attention: seconds, forward and backward, and its part in the model's errors."""

    name: str
    family: Family | None
    degree: Count | None
    near: Size | None
    centred: bool
    bound: Part | None
    source: Source | None
    seconds: Positive
    output: Part
    gradient: Part
    proved: bool
    chosen: bool


class CalibratedAttention(Document, frozen=True):
    """What a calibration says of an attention."""

    path: str
    full_path: str
    obstacle: str | None
    heads: tuple[HeadLogits, ...]
    gains: Gains
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The candidate of the plan."""
        return next((candidate for candidate in self.candidates if candidate.chosen), None)


class Limits(Document, frozen=True):
    """Those of a budget, or what is left of them after a verification."""

    output: float | None
    gradient: float | None


class Planned(Document, frozen=True):
    """Sums of the plan at the planned `length`, and how far its seconds can be from the least, proved."""

    length: Count
    seconds: Part
    exact_seconds: Part
    output: Part
    gradient: Part
    gap: float

    @property
    def speed_up(self) -> float:
        """How many times as fast as exact attention."""
        return self.exact_seconds / self.seconds if self.seconds else 1.0


class Round(Document, frozen=True):
    """Errors of a plan that were measured on batches, and how many calls had logits beyond their R."""

    output: Part
    gradient: Part
    violations: Count


class Verification(Document, frozen=True):
    """The same of the plan that was taken, on so many batches and tokens, and of every plan that was tried."""

    batches: Count
    tokens: Count
    output: Part
    gradient: Part
    violations: Count
    rounds: tuple[Round, ...]


class UsedCalibration(Document, frozen=True):
    """What a calibration is made again with."""

    data: str
    weights: str
    batches: Count
    dims: dict[str, Count]
    seed: int | None


class Calibration(Document, frozen=True):
    """What a calibration measured and what the planner made of it. See docs/calibration.md."""

    format: Literal["fastgrad-calibration-2"]
    data: str
    weights: str
    batches: Count
    dims: dict[str, Count]
    seed: int | None
    trust: Trust
    pace: Pace
    attentions: tuple[CalibratedAttention, ...]
    planned: Planned
    verification: Verification | None
