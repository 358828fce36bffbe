"""Times of forward and backward passes: interleaved in one process, medians; slopes and extrapolations of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fastgrad_dsl.bench.contenders import Attention, Inputs

SLOW_SHARE = 1 / 3  # a first pass that takes this share of the time given is itself the measurement


@dataclass(frozen=True)
class Timing:
    """Medians of `repeats` passes, seconds; `total` is the median of their sums."""

    forward: float
    backward: float
    total: float
    repeats: int

    def entry(self) -> dict[str, float]:
        """As an entry of the JSON has it."""
        seconds = {"forward_s": self.forward, "backward_s": self.backward, "total_s": self.total}
        return {**seconds, "repeats": self.repeats}


def time_together(
    contenders: Mapping[str, Attention], inputs: Inputs, repeats: int, seconds: float
) -> dict[str, Timing]:
    """Time each of them on the same inputs, in turns.

    The first pass of each warms up, unless it takes more than a third of `seconds`: then it counts. After it each
    gets up to `repeats` passes, fewer where they would take more than `seconds`, and one at least in all.
    """
    taken: dict[str, list[tuple[float, float]]] = {}
    left: dict[str, int] = {}
    for name, attention in contenders.items():
        first = one_pass(attention, inputs)
        slow = sum(first) > SLOW_SHARE * seconds
        taken[name] = [first] if slow else []
        affordable = int(seconds / max(sum(first), 1e-9))
        left[name] = min(repeats, affordable) - (1 if slow else 0)
    for turn in range(max(left.values(), default=0)):
        for name, attention in contenders.items():
            if turn < left[name]:
                taken[name].append(one_pass(attention, inputs))
    return {name: medians(times) for name, times in taken.items()}


def one_pass(attention: Attention, inputs: Inputs) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    start = time.perf_counter()
    out = attention(inputs.q, inputs.k, inputs.v)
    middle = time.perf_counter()
    torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.cotangent)
    return middle - start, time.perf_counter() - middle


def medians(times: Sequence[tuple[float, float]]) -> Timing:
    """Of seconds of forward and backward passes."""
    return Timing(
        forward=statistics.median(forward for forward, _ in times),
        backward=statistics.median(backward for _, backward in times),
        total=statistics.median(forward + backward for forward, backward in times),
        repeats=len(times),
    )


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Least-squares slope of log y on log x; None for fewer than two different x. Raises ValueError below 0."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    if len(set(xs)) < 2:
        return None
    return statistics.linear_regression(xs, ys).slope


def quadratic(timing: Timing, n: int, longer: int) -> Timing:
    """What n^2 makes of a time at length n, at a longer length: an extrapolation (repeats 0), no measurement."""
    factor = (longer / n) ** 2
    return Timing(factor * timing.forward, factor * timing.backward, factor * timing.total, 0)
