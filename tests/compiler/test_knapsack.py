"""The optimisation behind plans: optimal, within its limits, and None where nothing is."""

from __future__ import annotations

import random
from itertools import product

import pytest

from fastgrad_compiler.planning import knapsack
from fastgrad_compiler.planning.knapsack import GAP, Option, choose

EXACT = Option(2.0, 0.0, 0.0)


def _options(rng: random.Random, count: int) -> list[Option]:
    return [Option(rng.random(), 0.3 * rng.random(), 0.3 * rng.random()) for _ in range(count)]


def _best(items: list[list[Option]], output: float, gradient: float) -> float | None:
    """By trying everything."""
    found = (
        sum(option.seconds for option in choice)
        for choice in product(*items)
        if sum(o.output for o in choice) <= output and sum(o.gradient for o in choice) <= gradient
    )
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_optimal_among_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    items = [[*_options(rng, rng.randint(1, 4)), EXACT] for _ in range(4)]
    output, gradient = 0.4 * rng.random(), 0.4 * rng.random()
    found = choose(items, output, gradient)
    assert found is not None
    taken = [options[place] for options, place in zip(items, found.places, strict=True)]
    assert sum(o.output for o in taken) <= output
    assert sum(o.gradient for o in taken) <= gradient
    best = _best(items, output, gradient)
    assert best is not None
    assert sum(o.seconds for o in taken) <= best * (1 + 2 * GAP)
    assert found.gap <= GAP


def test_none_where_nothing_fits() -> None:
    assert choose([[Option(1.0, 0.2, 0.0)], [Option(1.0, 0.2, 0.0)]], 0.3, None) is None
    assert choose([[]], 1.0, 1.0) is None
    assert choose([[Option(1.0, float("inf"), 0.0)]], 1.0, None) is None


def test_without_limits_the_fastest_is_taken() -> None:
    found = choose([[Option(1.0, 9.0, 9.0), EXACT], [EXACT, Option(0.5, 9.0, 9.0)]], None, None)
    assert found is not None
    assert found.places == (0, 1)
    assert choose([], 0.1, 0.1) is not None


def test_a_zero_budget_leaves_what_is_exact() -> None:
    found = choose([[Option(1.0, 1e-12, 0.0), EXACT]], 0.0, 0.0)
    assert found is not None
    assert found.places == (1,)


@pytest.mark.medium
def test_many_heads_are_planned_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 layers of 16 heads, each with 40 options: a proved gap, however slow the machine."""
    monkeypatch.setattr(knapsack, "SECONDS", 300.0)
    rng = random.Random(0)
    items = [
        [Option(1.5**k * rng.uniform(0.9, 1.1), 10 ** -(k / 3), 10 ** -(k / 4)) for k in range(40)]
        for _ in range(24 * 16)
    ]
    found = choose(items, 24 * 16 * 0.01, 24 * 16 * 0.05)
    assert found is not None
    assert found.gap <= GAP
