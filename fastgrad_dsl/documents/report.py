"""report.json: what the plan, a measurement and a calibration say of a model, in one self-contained document."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from msgspec import Meta

from fastgrad_dsl.documents.base import Count, Document, Part, Size
from fastgrad_dsl.documents.calibration import Calibration, PaceKind, Positive, UsedCalibration
from fastgrad_dsl.documents.plan import Attention, Budget, Dim, StepMemory

Paths = Annotated[tuple[str, ...], Meta(min_length=1)]
Kind = Literal["bound", "estimate", "measured"]
State = Literal["exact", "unlimited", "kept", "missed", "likely", "unlikely", "open"]
Share = Annotated[float, Meta(ge=0, le=1)]
Exact = Literal["output", "dq", "dk", "dv", "gradient"]


class Errors(Document, frozen=True):
    """Relative L2 errors; None is what is not known."""

    bound: Part | None
    estimate: Part | None
    measured: Part | None

    def of(self, kind: Kind) -> float | None:
        """The one of a kind."""
        return cast("float | None", getattr(self, kind))


UNKNOWN, NOTHING = Errors(None, None, None), Errors(0.0, 0.0, 0.0)


class LocalErrors(Document, frozen=True):
    """Of one attention: its output, the gradients of its inputs, and the largest of the three."""

    output: Errors
    dq: Errors
    dk: Errors
    dv: Errors
    gradient: Errors

    def of(self, what: Exact) -> Errors:
        """Those of one tensor."""
        return cast("Errors", getattr(self, what))


class Head(Document, frozen=True):
    """A query head: R and the output's errors.

    `reach` is a bound of the batch's logits; `least`, `largest`, `centred` and `outside`, the share of logits beyond R,
    are measured by a calibration.
    """

    head: Count
    range: float | None
    reach: float | None
    least: float | None
    largest: float | None
    centred: float | None
    outside: float | None
    output: Errors


class Entropy(Document, frozen=True):
    """Of a row of weights, in `nats`, and e^entropy, the number of `keys` that it is with equal weights: means."""

    nats: Part
    keys: Part


class Spread(Document, frozen=True):
    """How an attention spreads its weight, measured on the batch: means over the rows that see a key, of all heads.

    `visible`: keys that a row sees. `planned` as the plan has it, `exact` in the exact model; None where a weight is
    negative or all of a row are 0.
    """

    visible: Part
    planned: Entropy | None
    exact: Entropy | None


class ReportedAttention(Attention, frozen=True):
    """What plan.json says of it, its errors, its files in `code`, and its places in the lists that attentions share.

    `largest_share`: a bound of the share of a row's weight that one key gets beyond a near field, where a query sees
    all keys at the longest lengths; None where nothing bounds it.
    """

    largest_share: Share | None
    spread: Spread | None
    errors: LocalErrors
    exact_zero: tuple[Exact, ...]
    per_head: tuple[Head, ...] | None
    code: tuple[str, ...]
    curve: int | None
    cost: int | None
    candidates: int | None
    derivation: int | None


class Versions(Document, frozen=True):
    """Of what made the report."""

    fastgrad: str | None
    torch: str | None
    python: str


class Reproduce(Document, frozen=True):
    """`commands`, None where Python alone can do it: a program given as text, batches or weights as tensors."""

    commands: tuple[str, ...] | None
    seed: int | None
    data: str | None
    weights: str | None
    calibration: UsedCalibration | None


class Batch(Document, frozen=True):
    """What was measured on."""

    batches: Literal[1]
    tokens: Count
    kind: str
    dims: dict[str, Count]
    seed: int | None
    weights: str


class Verdict(Document, frozen=True):
    """The headline in words."""

    state: State
    text: str


class Use(Document, frozen=True):
    """How much of one limit of the budget is used: value of limit, and by which kind of number."""

    limit: float | None
    value: Part | None
    kind: Literal["bound", "estimate", "measured", None]
    basis: str | None
    share: Part | None
    words: str


class ServedPace(Document, frozen=True):
    """What predicted times rest on (`cost.Pace`)."""

    target: str
    kind: PaceKind
    speed: float
    keys: Count


class SpeedUp(Document, frozen=True):
    """How many times as fast as exact attention."""

    forward: float
    backward: float
    total: float


class MachineOf(Document, frozen=True):
    """The machine of a calibration."""

    target: str
    machine: str
    threads: Count
    kind: PaceKind


class CalibratedTime(Document, frozen=True):
    """Seconds of all attentions, both passes, by the pace and at the length of a calibration."""

    n: int | None
    exact_seconds: float
    seconds: float
    speed_up: float
    pace: MachineOf


class Memory(Document, frozen=True):
    """Bytes in training on one sequence in float32; `scores` is what exact attention adds that keeps its scores."""

    exact: Count
    compiled: Count
    scores: Count


class Prediction(Document, frozen=True):
    """Of all attentions at the longest declared lengths; memory in bytes."""

    kind: Literal["estimate"]
    n: Count
    sizes: dict[str, Count]
    undeclared: tuple[str, ...]
    attentions: Count
    pace: ServedPace
    speed_up: SpeedUp
    calibrated: CalibratedTime | None
    memory: Memory


class Headline(Document, frozen=True):
    """The verdict, the use of the budget, and predicted time and memory."""

    verdict: Verdict
    output: Use
    gradient: Use
    prediction: Prediction | None


class Remark(Document, frozen=True):
    """What is said at a line of the spec, from 1."""

    line: Size
    text: str


class Spec(Document, frozen=True):
    """The text of the file, where it is known, and remarks on its attentions."""

    path: str
    lines: tuple[str, ...] | None
    remarks: tuple[Remark, ...]


class WholeErrors(Document, frozen=True):
    """Errors of the whole model, and its losses."""

    output: Errors
    gradient: Errors
    loss: float | None
    exact_loss: float | None


class Step(Document, frozen=True):
    """The part of an attention in the error."""

    path: str
    value: float
    start: float
    end: float


class Waterfall(Document, frozen=True):
    """Each attention's part, from `start` to `end`, beside the limit and the whole."""

    kind: Literal["estimate"]
    basis: str
    limit: float | None
    steps: tuple[Step, ...]
    total: float
    measured: float | None


class Waterfalls(Document, frozen=True):
    """Those of both errors."""

    output: Waterfall
    gradient: Waterfall


class Shared(Document, frozen=True):
    """What equal attentions have in common: their paths."""

    attentions: Paths


class Curve(Shared, frozen=True):
    """The relative errors of p and p' at points s of [-R, R].

    `eps` and `eps_prime` are their proved bounds, `positive_from` the logit below which p is not positive.
    """

    range: float
    degree: Count
    family: str
    eps: float
    eps_prime: float
    positive_from: float | None
    s: tuple[float, ...]
    p: tuple[float, ...]
    p_prime: tuple[float, ...]


class Times(Document, frozen=True):
    """At each length."""

    forward: tuple[float, ...]
    total: tuple[float, ...]

    def of(self, what: Literal["forward", "total"]) -> tuple[float, ...]:
        """Of one pass or both."""
        return self.forward if what == "forward" else self.total


class Cost(Shared, frozen=True):
    """Time against the length, with as many keys as queries; 1 is exact attention, both passes, at the longest length.

    `speed_up`: how many times as fast as exact attention it runs at the longest lengths of queries and keys.
    """

    longest: Count
    speed_up: Positive
    lengths: tuple[Count, ...]
    exact: Times
    polynomial: Times | None
    break_even: int | None


class Point(Document, frozen=True):
    """A candidate."""

    name: str
    family: str | None
    degree: int | None
    near: int | None
    centred: bool
    range: float | None
    time: float
    output: float | None
    gradient: float | None
    proved: bool
    chosen: bool


class Candidates(Shared, frozen=True):
    """What an attention could have been, with the kinds of its errors and times and what they are."""

    error_kind: Literal["bound", "estimate"]
    errors: str
    time_kind: Literal["estimate"]
    time_unit: str
    points: tuple[Point, ...]


class Derivation(Shared, frozen=True):
    """Lines in the order of the steps."""

    lines: tuple[str, ...]


class Warned(Document, frozen=True):
    """A warning and the paths of the attentions concerned."""

    kind: Literal[
        "budget", "range", "data", "asserted", "vacuous", "unbounded", "weights", "length", "calibration"
    ]
    text: str
    attentions: tuple[str, ...]


class Report(Document, frozen=True):
    """The error-budget report of a compiled model. See docs/report.md."""

    format: Literal["fastgrad-report-6"]
    model: str
    source: str
    target: str
    params: dict[str, str]
    dims: tuple[Dim, ...]
    budget: Budget | None
    memory: StepMemory | None
    versions: Versions
    reproduce: Reproduce
    batch: Batch | None
    headline: Headline
    summary: tuple[str, ...]
    spec: Spec
    whole: WholeErrors
    attentions: tuple[ReportedAttention, ...]
    waterfall: Waterfalls
    curves: tuple[Curve, ...]
    costs: tuple[Cost, ...]
    candidates: tuple[Candidates, ...]
    derivations: tuple[Derivation, ...]
    code: dict[str, str]
    weight_gradients: dict[str, Part | None] | None
    calibration: Calibration | None
    notes: tuple[str, ...]
    warnings: tuple[Warned, ...]
