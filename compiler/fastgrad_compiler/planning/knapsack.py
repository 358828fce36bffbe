"""The planner's optimisation: one option for each attention, least time, sums of errors within two limits.

A multiple-choice knapsack with two capacities, solved by branch and bound (HiGHS, through scipy) with a proved gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

GAP = 1e-3  # relative, between the time found and a proved lower bound, at which the search may stop
SECONDS = 4.0  # after which the best choice so far is taken, with the gap that is proved by then


@dataclass(frozen=True, slots=True)
class Option:
    """A way to serve one attention: seconds, and what it adds to the errors of the model's output and gradient."""

    seconds: float
    output: float
    gradient: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The option taken of each item, by its place, and how far its time can at most be from the least, relatively."""

    places: tuple[int, ...]
    gap: float


def choose(items: Sequence[Sequence[Option]], output: float | None, gradient: float | None) -> Choice | None:
    """The cheapest options, one of each item, whose errors add up to at most `output` and `gradient` (None: no limit).

    None where no choice is within the limits. The sums of the choice are within them exactly, without a tolerance.
    """
    if not items:
        return Choice((), 0.0)
    kept = [
        [place for place in _efficient(options) if _within([options], [place], output, gradient)]
        for options in items
    ]
    if any(not places for places in kept):
        return None
    limits = [limit for limit in (output, gradient) if limit is not None]
    cheapest = tuple(
        min((options[place].seconds, place) for place in places)[1]
        for places, options in zip(kept, items, strict=True)
    )
    if not limits or _within(items, cheapest, output, gradient):
        return Choice(cheapest, 0.0)
    found = _solve(items, kept, output, gradient)
    return found if found is None or _within(items, found.places, output, gradient) else None


def _efficient(options: Sequence[Option]) -> list[int]:
    """Places of options that no other one beats in everything; of equal ones the first."""
    order = sorted(
        (place for place, o in enumerate(options) if isfinite(o.output) and isfinite(o.gradient)),
        key=lambda place: (options[place].seconds, options[place].output, options[place].gradient, place),
    )
    kept: list[int] = []
    for place in order:
        option = options[place]
        if not any(
            options[k].output <= option.output and options[k].gradient <= option.gradient for k in kept
        ):
            kept.append(place)
    return kept


def _within(
    items: Sequence[Sequence[Option]], places: Sequence[int], output: float | None, gradient: float | None
) -> bool:
    taken = [options[place] for options, place in zip(items, places, strict=True)]
    return (output is None or sum(o.output for o in taken) <= output) and (
        gradient is None or sum(o.gradient for o in taken) <= gradient
    )


def _solve(
    items: Sequence[Sequence[Option]],
    kept: Sequence[Sequence[int]],
    output: float | None,
    gradient: float | None,
) -> Choice | None:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [
        (item, place, options[place])
        for item, (options, places) in enumerate(zip(items, kept, strict=True))
        for place in places
    ]
    columns = np.arange(len(flat))
    one_each = csr_array(
        (np.ones(len(flat)), (np.array([item for item, _, _ in flat]), columns)), (len(items), len(flat))
    )
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    for limit, errors in (
        (output, [o.output for _, _, o in flat]),
        (gradient, [o.gradient for _, _, o in flat]),
    ):
        if limit:  # a hair below 1, so that the solver's own tolerance stays within the limit
            row = np.array(errors)[None, :] / limit
            constraints.append(LinearConstraint(row, -np.inf, 1.0 - 2e-6))
    seconds = np.array([o.seconds for _, _, o in flat])
    scale = float(seconds.max()) or 1.0
    result = milp(
        seconds / scale,
        constraints=constraints,
        bounds=Bounds(0.0, 1.0),
        integrality=np.ones(len(flat), dtype=np.int64),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        return None
    taken: dict[int, tuple[float, int]] = {}
    for value, (item, place, _) in zip(result.x, flat, strict=True):
        taken[item] = max(taken.get(item, (-1.0, 0)), (float(value), place))
    gap = float(result.mip_gap) if result.mip_gap is not None else 0.0
    return Choice(tuple(place for _, (_, place) in sorted(taken.items())), gap)
