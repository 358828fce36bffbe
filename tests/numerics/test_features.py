"""The packed features: layout and weights, against enumeration and powers of dot products."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import comb, factorial, prod

import numpy as np
import pytest
from numpy.typing import NDArray

from fastgrad_compiler.runtime.monomials import blocks, levels, multinomial, rank, weights

SHAPES = [(1, 0), (1, 1), (1, 7), (2, 3), (3, 0), (3, 1), (3, 4), (5, 2), (6, 6), (16, 2), (16, 3), (4, 8)]


def features(x: NDArray[np.float64], degree: int) -> NDArray[np.float64]:
    """phi, feature-major: x of shape (d, tokens) gives (rank(d, degree), tokens)."""
    d, tokens = x.shape
    phi = np.empty((rank(d, degree), tokens), dtype=x.dtype)
    phi[0] = 1.0
    if degree:
        phi[1 : 1 + d] = x
    for block in blocks(d, degree):
        phi[slice(*block.target)] = x[block.index] * phi[slice(*block.source)]
    return phi


def exponents(d: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Variable indices of each row's monomial, ascending: `()` for row 0, `(0, 0, 3)` for x_0^2 x_3."""
    rows: list[tuple[int, ...]] = [(), *((i,) for i in range(d) if degree)]
    for block in blocks(d, degree):
        rows.extend((block.index, *rows[source]) for source in range(*block.source))
    return tuple(rows)


@pytest.mark.parametrize(
    ("d", "ranks"),
    [
        (4, [5, 15, 35, 70, 126, 210]),
        (8, [9, 45, 165, 495, 1287, 3003]),
        (16, [17, 153, 969, 4845, 20349, 74613]),
        (32, [33, 561, 6545, 58905]),
        (64, [65, 2145, 47905, 814385]),
    ],
)
def test_rank_table(d: int, ranks: list[int]) -> None:
    assert [rank(d, degree) for degree in range(1, len(ranks) + 1)] == ranks


@pytest.mark.parametrize(("d", "degree"), SHAPES)
def test_rows_are_all_monomials_in_order_of_first_index(d: int, degree: int) -> None:
    """Row order is lexicographic within a level: by first index, then by the same rule one level down."""
    rows = [row for j in range(degree + 1) for row in combinations_with_replacement(range(d), j)]
    assert exponents(d, degree) == tuple(rows)
    assert len(rows) == rank(d, degree)


@pytest.mark.parametrize(("d", "degree"), SHAPES)
def test_blocks_tile_the_levels_and_sources_are_suffixes(d: int, degree: int) -> None:
    spans = levels(d, degree)
    assert [stop - start for start, stop in spans] == [comb(d + j - 1, j) for j in range(degree + 1)]
    row = spans[min(degree, 1)][1]
    assert len(blocks(d, degree)) == d * max(degree - 1, 0)
    for block in blocks(d, degree):
        assert block.target[0] == row
        row = block.target[1]
        assert block.target[1] - block.target[0] == block.source[1] - block.source[0] > 0
        assert block.source[1] == spans[block.level - 1][1]
        assert block.source[0] >= spans[block.level - 1][0]
        below = exponents(d, degree)[slice(*block.source)]
        assert all(min(monomial) >= block.index for monomial in below)
    assert row == rank(d, degree)


@pytest.mark.parametrize(("d", "degree"), SHAPES)
def test_multinomial_weights(d: int, degree: int) -> None:
    expected = [
        factorial(len(row)) / prod(factorial(row.count(i)) for i in set(row)) for row in exponents(d, degree)
    ]
    assert list(multinomial(d, degree)) == expected


@pytest.mark.parametrize(("d", "degree"), SHAPES)
def test_weighted_features_give_the_polynomial_of_the_dot_product(d: int, degree: int) -> None:
    random = np.random.default_rng(7 * d + degree)
    coefficients = tuple(random.normal(size=degree + 1).tolist())  # of both signs
    queries, keys = random.normal(size=(2, d, 9)) / np.sqrt(d)
    low_rank = features(queries, degree).T @ (
        np.array(weights(d, coefficients))[:, None] * features(keys, degree)
    )
    dense = np.polynomial.polynomial.polyval(queries.T @ keys, coefficients)
    np.testing.assert_allclose(low_rank, dense, rtol=1e-12, atol=1e-12)


def test_large_layouts_are_cached() -> None:
    assert len(weights(16, (1.0,) * 6)) == rank(16, 5) == 20349
    assert blocks(16, 5) is blocks(16, 5)
    assert weights(16, (1.0,) * 6) is weights(16, (1.0,) * 6)


@pytest.mark.parametrize(("d", "degree"), [(0, 2), (3, -1)])
def test_sizes_that_make_no_sense(d: int, degree: int) -> None:
    for function in (rank, levels, blocks, multinomial):
        with pytest.raises(ValueError, match=f"d={d} and degree={degree}"):
            function(d, degree)
