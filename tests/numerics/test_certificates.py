"""The proved bounds of one attention against random and adversarial inputs, on dense float64 attention.

A violation would be a ratio of error to bound above 1. Random inputs, gradient ascent on that ratio, and the
two-point rows for which the bound of the weights is sharp all have to stay below it, and the last come close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgrad_compiler.approximation import certificates
from fastgrad_compiler.approximation.polynomial import Family, Polynomial, fit
from fastgrad_compiler.approximation.rational import values
from tests.grids import wide

ROUNDING = 1e-9  # relative slack for float64 sums; every other part of the bounds is proved

Weighting = Callable[[Tensor], Tensor]


def evaluate(polynomial: Polynomial) -> Weighting:
    def weigh(scores: Tensor) -> Tensor:
        total = torch.zeros_like(scores)
        for coefficient in reversed(polynomial.coefficients):
            total = total * scores + coefficient
        return total

    return weigh


@dataclass(frozen=True)
class Attention:
    """Weights, output, and gradients of sum(output * upstream), to the scores and the values."""

    weights: Tensor
    output: Tensor
    d_scores: Tensor
    d_values: Tensor


def attend(
    weigh: Weighting,
    scores: Tensor,
    value: Tensor,
    upstream: Tensor,
    seen: Tensor,
    near: Tensor | None = None,
) -> Attention:
    """Dense attention and its exact gradient; pairs in `near` are weighted by exp, whatever `weigh` is.

    The gradient is written out, so that gradient ascent can differentiate through it.
    """
    with torch.enable_grad():
        leaf = scores if scores.requires_grad else scores.detach().requires_grad_()
        raw = weigh(leaf) if near is None else torch.where(near, leaf.exp(), weigh(leaf))
        (slope,) = torch.autograd.grad(raw.sum(), leaf, create_graph=True)
    raw, slope = raw * seen, slope * seen
    denominator = raw.sum(dim=-1, keepdim=True)
    weights = raw / denominator
    output = weights @ value
    pulled = upstream @ value.T
    mean = (weights * pulled).sum(dim=-1, keepdim=True)
    return Attention(weights, output, slope / denominator * (pulled - mean), weights.T @ upstream)


def spread(x: Tensor, seen: Tensor) -> Tensor:
    """max - min over the last dimension, of what is seen."""
    top = x.masked_fill(~seen, -torch.inf).amax(dim=-1)
    return top - x.masked_fill(~seen, torch.inf).amin(dim=-1)


def ratios(
    exact: Attention, rough: Attention, value: Tensor, upstream: Tensor, seen: Tensor, polynomial: Polynomial
) -> dict[str, Tensor]:
    """The largest error over its bound, for each certificate."""
    eps, eps_prime = polynomial.eps, polynomial.eps_prime
    value_range = spread(value.T[None, :, :].expand(seen.shape[0], -1, -1), seen[:, None, :])
    omega = spread(upstream @ value.T, seen)
    bounds = {
        "weights": torch.tensor(certificates.eta(eps), dtype=torch.float64),
        "output": value_range * (certificates.eta(eps) / 2),
        "values": upstream.norm(dim=-1).sum() * certificates.eta(eps),
        "scores": omega * certificates.score_factor(eps, eps_prime),
    }
    found = {
        "weights": (rough.weights - exact.weights).abs().sum(dim=-1),
        "output": (rough.output - exact.output).abs(),
        "values": (rough.d_values - exact.d_values).norm(dim=-1).sum(),
        "scores": (rough.d_scores - exact.d_scores).abs().sum(dim=-1),
    }
    return {name: (found[name] / (bounds[name] + 1e-12)).max() for name in bounds}


def both_ways(
    polynomial: Polynomial,
    scores: Tensor,
    value: Tensor,
    upstream: Tensor,
    seen: Tensor,
    near: Tensor | None = None,
    levels: float | Tensor = 0.0,
) -> dict[str, Tensor]:
    """`levels` are what the scores of each row have in common, which the exact way alone has to see."""
    exact = attend(torch.exp, scores + levels, value, upstream, seen, near)
    rough = attend(evaluate(polynomial), scores, value, upstream, seen, near)
    return ratios(exact, rough, value, upstream, seen, polynomial)


def assert_kept(found: dict[str, Tensor]) -> None:
    for name, ratio in found.items():
        assert ratio.item() <= 1 + ROUNDING, name


POLYNOMIALS = st.sampled_from(
    [
        fit("balanced", 2, 0.5),
        fit("balanced", 2, 1.0),
        fit("balanced", 3, 1.0),
        fit("balanced", 4, 2.0),
        fit("balanced", 4, 4.0),
        fit("minimax", 2, 1.0),
        fit("minimax", 6, 3.0),
        fit("taylor", 2, 1.0),
        fit("taylor", 5, 2.0),
    ]
)


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    polynomial=POLYNOMIALS,
    n=st.integers(1, 12),
    dv=st.integers(1, 5),
    causal=st.booleans(),
    extreme=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_violation_on_random_inputs(
    polynomial: Polynomial, n: int, dv: int, causal: bool, extreme: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, n, generator=generator, dtype=torch.float64) * 2 - 1
    scores = polynomial.bound * (scores.sign() if extreme else scores)
    value = torch.randn(n, dv, generator=generator, dtype=torch.float64)
    upstream = torch.randn(n, dv, generator=generator, dtype=torch.float64)
    seen = torch.ones(n, n, dtype=torch.bool)
    assert_kept(both_ways(polynomial, scores, value, upstream, seen.tril() if causal else seen))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(polynomial=POLYNOMIALS, causal=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_query_and_key_gradients(polynomial: Polynomial, causal: bool, seed: int) -> None:
    n, d, dv = 10, 3, 4
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(3, n, d, generator=generator, dtype=torch.float64)
    query = draw[0] / draw[0].norm(dim=-1, keepdim=True) * polynomial.bound
    key = draw[1] / draw[1].norm(dim=-1, keepdim=True)
    value, upstream = torch.randn(2, n, dv, generator=generator, dtype=torch.float64)
    seen = torch.ones(n, n, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    exact = attend(torch.exp, query @ key.T, value, upstream, seen)
    rough = attend(evaluate(polynomial), query @ key.T, value, upstream, seen)
    omega = spread(upstream @ value.T, seen)
    eps, eps_prime = polynomial.eps, polynomial.eps_prime
    largest = float(key.norm(dim=-1).max())
    query_error = ((rough.d_scores - exact.d_scores) @ key).norm(dim=-1)
    assert (query_error <= omega * (certificates.score_factor(eps, eps_prime) * largest) + ROUNDING).all()
    key_error = ((rough.d_scores - exact.d_scores).T @ query).norm(dim=-1).sum()
    weighted = (omega * query.norm(dim=-1)).sum()
    assert key_error <= weighted * certificates.score_factor(eps, eps_prime) + ROUNDING


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 3])
def test_near_pairs_are_exact_and_free(causal: bool, block: int) -> None:
    """Bounds hold with error 0 on the near pairs, whose logits may be far outside the range."""
    polynomial = fit("balanced", 2, 1.0)
    n = 14
    index = torch.arange(n) // block
    near = (index[:, None] - index[None, :]).abs() <= 1
    seen = torch.ones(n, n, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        far = torch.rand(n, n, generator=generator, dtype=torch.float64) * 2 - 1
        local = 6 * torch.randn(n, n, generator=generator, dtype=torch.float64)
        value, upstream = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
        assert_kept(both_ways(polynomial, torch.where(near, local, far), value, upstream, seen, near))


ATTACKED: list[tuple[Family, int, float]] = [("balanced", 2, 1.0), ("balanced", 4, 3.0), ("minimax", 2, 1.0)]
N = 8  # tokens under attack


def attacks(targets: list[str]) -> list[Any]:
    """Polynomials, rows and targets; any two values of any two of them occur together in `make test`."""
    rows = ["full", "causal", "at levels of their own"]
    every = product(enumerate(ATTACKED), enumerate(rows), enumerate(targets))
    grid = [((*fitted, row, target), (i + j + k) % 3 == 0) for (i, fitted), (j, row), (k, target) in every]
    return wide((each for each, _ in grid), few=[each for each, is_chosen in grid if is_chosen])


def visible(rows: str) -> Tensor:
    seen = torch.ones(N, N, dtype=torch.bool)
    return seen.tril() if rows == "causal" else seen


def attack(measure: Callable[[], dict[str, Tensor]], free: list[Tensor], target: str) -> tuple[float, float]:
    """Gradient ascent on one ratio of error to bound: the first and the largest. No ratio may exceed 1 on the way."""
    ascent = torch.optim.Adam(free, lr=0.1, maximize=True)
    reached = []
    for _ in range(120):
        found = measure()
        assert_kept(found)
        reached.append(found[target].item())
        ascent.zero_grad()
        found[target].backward()
        ascent.step()
    return reached[0], max(reached)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "degree", "bound", "rows", "target"), attacks(["weights", "output", "values", "scores"])
)
def test_no_violation_under_gradient_ascent(
    family: Family, degree: int, bound: float, rows: str, target: str
) -> None:
    polynomial = fit(family, degree, bound)
    generator = torch.Generator().manual_seed(5)
    free, value, upstream, levels = (
        torch.randn(N, width, generator=generator, dtype=torch.float64) for width in (N, 2, 2, 1)
    )
    levels = 4 * levels if rows == "at levels of their own" else 0 * levels
    attacked = [x.requires_grad_() for x in (free, value, upstream)]

    def measure() -> dict[str, Tensor]:
        scores = bound * free.tanh()
        return both_ways(polynomial, scores, value, upstream, visible(rows), levels=levels)

    start, best = attack(measure, attacked, target)
    assert best > start  # else the ascent does not attack what it should


def query_and_key_ratios(
    polynomial: Polynomial,
    query: Tensor,
    key: Tensor,
    centre: Tensor,
    value: Tensor,
    upstream: Tensor,
    seen: Tensor,
) -> dict[str, Tensor]:
    """Errors of dQ by row and of dK summed, each over its bound; the polynomial sees keys less `centre`."""
    exact = attend(torch.exp, query @ key.T, value, upstream, seen)
    rough = attend(evaluate(polynomial), query @ (key - centre).T, value, upstream, seen)
    omega, eps, eps_prime = spread(upstream @ value.T, seen), polynomial.eps, polynomial.eps_prime
    lengths = (key - centre).norm(dim=-1).expand(seen.shape).masked_fill(~seen, 0.0).amax(-1)
    query_error = (rough.d_scores @ (key - centre) - exact.d_scores @ key).norm(dim=-1)
    key_error = ((rough.d_scores - exact.d_scores).T @ query).norm(dim=-1).sum()
    query_bound = omega * certificates.score_factor(eps, eps_prime) * lengths
    key_bound = (omega * query.norm(dim=-1)).sum() * certificates.score_factor(eps, eps_prime)
    return {"queries": (query_error / (query_bound + 1e-12)).max(), "keys": key_error / (key_bound + 1e-12)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("family", "degree", "bound", "rows", "target"), attacks(["queries", "keys"]))
def test_no_violation_of_query_and_key_gradients_under_gradient_ascent(
    family: Family, degree: int, bound: float, rows: str, target: str
) -> None:
    """Rows have levels of their own where the keys are centred: q.c, however large."""
    polynomial = fit(family, degree, bound)
    generator = torch.Generator().manual_seed(6)
    free_query, free_key, value, upstream = (
        torch.randn(N, 2, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(4)
    )
    centre = torch.full((2,), 5.0 if rows == "at levels of their own" else 0.0, dtype=torch.float64)

    def measure() -> dict[str, Tensor]:
        query = bound * torch.nn.functional.normalize(free_query, dim=-1)
        key = torch.nn.functional.normalize(free_key, dim=-1) + centre
        return query_and_key_ratios(polynomial, query, key, centre, value, upstream, visible(rows))

    start, best = attack(measure, [free_query, free_key, value, upstream], target)
    assert best > start


def two_point_row(polynomial: Polynomial, keys: int) -> tuple[Tensor, Tensor]:
    """Scores of a query whose weights are off by +eps and -eps in the worst proportion; which are over."""
    grid = np.linspace(-polynomial.bound, polynomial.bound, 20001)
    error = np.array(values(polynomial.coefficients, grid.tolist())) * np.exp(-grid) - 1
    over, under = float(grid[error.argmax()]), float(grid[error.argmin()])
    eps = polynomial.eps
    # The share x of the weight that is over: x (1 - x) / (1 - eps + 2 eps x) is largest.
    share = (np.sqrt(1 - eps**2) - (1 - eps)) / (2 * eps)
    count = share * np.exp(-over) / (share * np.exp(-over) + (1 - share) * np.exp(-under))
    is_over = torch.arange(keys) < round(count * keys)
    return torch.where(is_over, over, under).double()[None, :], is_over


@pytest.mark.parametrize(
    ("family", "degree", "bound"),
    [("balanced", 2, 1.0), ("balanced", 4, 3.0), ("minimax", 2, 2.0), ("minimax", 6, 3.0)],
)
def test_bounds_of_weights_output_and_value_gradient_are_sharp(
    family: Family, degree: int, bound: float
) -> None:
    polynomial = fit(family, degree, bound)
    scores, is_over = two_point_row(polynomial, 4000)
    value = torch.where(is_over, 1.0, -1.0).double()[:, None]
    found = both_ways(polynomial, scores, value, torch.ones(1, 1).double(), torch.ones_like(scores).bool())
    assert_kept(found)
    for name in ("weights", "output", "values"):
        assert found[name].item() > 0.99


def test_logits_outside_the_range_void_the_certificate() -> None:
    polynomial = fit("balanced", 2, 1.0)
    scores, is_over = two_point_row(polynomial, 100)
    value = torch.where(is_over, 1.0, -1.0).double()[:, None]
    found = both_ways(
        polynomial, 2 * scores, value, torch.ones(1, 1).double(), torch.ones_like(scores).bool()
    )
    assert found["weights"].item() > 1.5


def test_typical_errors_are_smaller() -> None:
    """Unit random q and k, d = 16, degree-2 Taylor, R = 1: the measured errors of docs/mathematics.md."""
    polynomial = fit("taylor", 2, 1.0)
    generator = torch.Generator().manual_seed(0)
    n, d, dv = 512, 16, 64
    query, key = torch.nn.functional.normalize(
        torch.randn(2, n, d, generator=generator, dtype=torch.float64), dim=-1
    )
    value, upstream = torch.randn(2, n, dv, generator=generator, dtype=torch.float64)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    exact = attend(torch.exp, query @ key.T, value, upstream, seen)
    rough = attend(evaluate(polynomial), query @ key.T, value, upstream, seen)
    output = (rough.output - exact.output).norm() / exact.output.norm()
    gradient = ((rough.d_scores - exact.d_scores) @ key).norm() / (exact.d_scores @ key).norm()
    assert output.item() == pytest.approx(8e-3, rel=0.5)
    assert gradient.item() == pytest.approx(5e-2, rel=0.5)


@pytest.mark.parametrize(
    ("family", "degree", "error"), [("balanced", 4, 0.18), ("balanced", 6, 0.11), ("minimax", 6, 0.064)]
)
def test_gaussian_scores_are_costly(family: Family, degree: int, error: float) -> None:
    """Independent scores of standard deviation 1, fitted to their largest: the errors of docs/mathematics.md."""
    generator = torch.Generator().manual_seed(1)
    n = 512
    scores = torch.randn(n, n, generator=generator, dtype=torch.float64)
    value, upstream = torch.randn(2, n, 64, generator=generator, dtype=torch.float64)
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    polynomial = fit(family, degree, scores.abs().max().item())
    exact = attend(torch.exp, scores, value, upstream, seen)
    rough = attend(evaluate(polynomial), scores, value, upstream, seen)
    found = (rough.output - exact.output).norm() / exact.output.norm()
    assert found.item() == pytest.approx(error, rel=0.15)


def test_worst_cases_without_data() -> None:
    polynomial = fit("balanced", 2, 1.0)
    found = certificates.certificate(polynomial.eps, polynomial.eps_prime)
    eps, eps_prime = polynomial.eps, polynomial.eps_prime
    eta = 2 * eps / (1 + (1 - eps**2) ** 0.5)
    assert found.weights == found.value_gradient == pytest.approx(eta, rel=1e-14)
    assert found.output == pytest.approx(eta / 2, rel=1e-14)
    expected = (eps + eps_prime) / (1 - eps) + eta / 2 * (1 + eps_prime) / (1 - eps)
    assert found.score_gradient == pytest.approx(expected, rel=1e-14)
    assert certificates.certificate(0.0, 0.0) == certificates.Certificate(0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("eps", [1.0, 1.5])
def test_no_certificate_from_eps_one_on(eps: float) -> None:
    found = certificates.certificate(eps, 0.1)
    assert found == certificates.Certificate(*[float("inf")] * 7)


def test_negative_errors_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be negative"):
        certificates.eta(-0.1)
    with pytest.raises(ValueError, match="cannot be negative"):
        certificates.score_factor(0.1, -0.1)
