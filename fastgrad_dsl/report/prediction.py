"""Estimates of time and memory from the cost model, at the longest declared lengths and against the length.

A time is flops divided by what the target's kernels do of them beside exact attention
(`fastgrad_compiler.planning.cost.Pace`), so that it is relative: in units of one flop of exact attention at great
lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fastgrad_compiler.approximation.elementary import power
from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.planning.cost import EXACT, PACE, Pace, Shape, Way, state_bytes
from fastgrad_dsl.documents.base import picked
from fastgrad_dsl.documents.calibration import Calibration, PaceKind
from fastgrad_dsl.documents.plan import Attention, Plan, is_approximated, lengths_of, longest_sizes
from fastgrad_dsl.documents.report import (
    CalibratedTime,
    Cost,
    MachineOf,
    Memory,
    Prediction,
    ServedPace,
    SpeedUp,
    Times,
)

SHORTEST, POINTS = 64, 25  # of the curves of cost against the length
NUMBER = 4  # bytes of a float32


def pace_of(plan: Plan, calibration: Calibration | None) -> tuple[Pace, PaceKind]:
    """The pace of the plan's target, and whether it was measured on this machine or is the default."""
    if calibration is None:
        return PACE[plan.target], "default"
    measured = replace(PACE[plan.target], speed=float(calibration.pace.speed), keys=calibration.pace.keys)
    return measured, calibration.pace.kind


def shape_of(entry: Attention, n: int, m: int) -> Shape:
    """One head of an attention, whose widths are known, at a length."""
    d, dv = widths(entry)
    window = entry.window if entry.decision == "exact" else None  # whatever a file says
    masks = {"causal": entry.causal, **{name: name in entry.roles for name in ("documents", FORGET)}}
    return Shape(n=n, m=m, d=d, dv=dv, window=window, **masks)


def way_at(entry: Attention, tokens: int) -> Way:
    """How an attention is served at a length, the greater of its two.

    Below its break-even one that stands in for exp is exact, and the model's own polynomial is computed on all pairs.
    """
    polynomial = polynomial_way(entry)
    if tokens >= (entry.break_even or 0) or entry.decision == "exact":
        return polynomial
    return EXACT if is_approximated(entry) else replace(polynomial, dense=True)


def polynomial_way(entry: Attention) -> Way:
    """The states of the polynomial that serves an attention; exact without one."""
    return Way(entry.degree, entry.near, entry.precision or "float32")


def predict(plan: Plan, pace: Pace, kind: PaceKind, calibration: Calibration | None) -> Prediction | None:
    """`prediction` of the headline: speed-up and memory of all attentions together; None where there are none."""
    sizes, undeclared = longest_sizes(plan)
    counted = [entry for entry in plan.attentions if _is_counted(entry)]
    if not counted:
        return None
    forward = backward = own_forward = own_backward = 0.0
    exact_bytes = own_bytes = scores = 0
    for entry in counted:
        n, m = lengths_of(entry, sizes)
        shape = shape_of(entry, n, m)
        exact = pace.time(shape, EXACT)
        way = way_at(entry, max(n, m))
        own = pace.time(shape, way)
        forward += entry.query_heads * exact.forward
        backward += entry.query_heads * exact.backward
        own_forward += entry.query_heads * own.forward
        own_backward += entry.query_heads * own.backward
        memory = _memory(entry, n, m, way.degree is not None and not way.dense)
        exact_bytes += memory.exact
        own_bytes += memory.compiled
        scores += memory.scores
    return Prediction(
        kind="estimate",
        n=max(max(lengths_of(entry, sizes)) for entry in counted),
        sizes=sizes,
        undeclared=tuple(undeclared),
        attentions=len(counted),
        pace=ServedPace(plan.target, kind, pace.speed, pace.keys),
        speed_up=SpeedUp(
            forward=forward / own_forward,
            backward=backward / own_backward,
            total=(forward + backward) / (own_forward + own_backward),
        ),
        calibrated=_calibrated(calibration),
        memory=Memory(exact=exact_bytes, compiled=own_bytes, scores=scores),
    )


def cost_key(entry: Attention) -> object:
    """What the cost of an attention depends on."""
    plan = (entry.decision, entry.family, entry.degree, entry.near, entry.break_even, entry.precision)
    shape = (entry.d, entry.dv, entry.queries, entry.keys)
    return plan, shape, entry.causal, entry.window, "documents" in entry.roles


def cost_curve(entry: Attention, sizes: Mapping[str, int], pace: Pace) -> Cost | None:
    """Time of an attention against the length; None where its widths are known at run time only."""
    if not _is_counted(entry):
        return None
    served, approximated = polynomial_way(entry), is_approximated(entry)
    n, m = lengths_of(entry, sizes)
    longest, shape = max(n, m), shape_of(entry, n, m)
    own = way_at(entry, longest)
    last = max(longest, 2 * (entry.break_even or 0), 2 * SHORTEST)
    lengths = sorted({round(SHORTEST * power(last / SHORTEST, i / (POINTS - 1))) for i in range(POINTS)})
    unit = pace.seconds(shape_of(entry, longest, longest), EXACT)

    def curve(way: Callable[[int], Way]) -> Times:
        times = [pace.time(shape_of(entry, n, n), way(n)) for n in lengths]
        return Times(
            forward=tuple(_digits(time.forward / unit) for time in times),
            total=tuple(_digits(time.total / unit) for time in times),
        )

    return Cost(
        attentions=(),
        longest=longest,
        speed_up=pace.seconds(shape, EXACT) / pace.seconds(shape, own),
        lengths=tuple(lengths),
        exact=curve(lambda n: EXACT),
        polynomial=curve(lambda n: served if approximated else way_at(entry, n)) if served.degree else None,
        break_even=entry.break_even if approximated else None,
    )


def _calibrated(calibration: Calibration | None) -> CalibratedTime | None:
    if calibration is None or not calibration.planned.seconds:
        return None
    planned, pace = calibration.planned, calibration.pace
    return picked(CalibratedTime, planned, n=planned.length, pace=picked(MachineOf, pace))


def _is_counted(entry: Attention) -> bool:
    return entry.d is not None and entry.dv is not None


def widths(entry: Attention) -> tuple[int, int]:
    """d and dv, which are known."""
    assert entry.d is not None
    assert entry.dv is not None
    return entry.d, entry.dv


def _memory(entry: Attention, n: int, m: int, with_states: bool) -> Memory:
    """Bytes of one sequence in float32: q, k, v, the output and their gradients, and what each way adds.

    Fused exact attention adds one normaliser per row, a polynomial the states of both passes; `scores` is what exact
    attention that keeps its score matrix adds.
    """
    heads, (d, dv) = entry.query_heads, widths(entry)
    tensors = 2 * NUMBER * (d + dv) * (heads * n + entry.key_heads * m)
    exact = tensors + NUMBER * heads * n
    states = 2 * heads * state_bytes(d=d, dv=dv, degree=entry.degree or 0) if with_states else 0
    return Memory(
        exact=exact, compiled=tensors + states if with_states else exact, scores=NUMBER * heads * n * m
    )


def _digits(value: float) -> float:
    """Five digits: a curve is drawn."""
    return float(f"{value:.5g}")
