"""Features of packed monomials (docs/mathematics.md, section 2), the reference for tests, and widths that fit a rank.

Their order is that of `runtime/monomials.py`, which the kernels walk too.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from fastgrad_compiler.runtime.monomials import Block, blocks, levels, multinomial, rank, weights

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

__all__ = [
    "Block",
    "blocks",
    "exponents",
    "features",
    "features_vjp",
    "levels",
    "multinomial",
    "rank",
    "weights",
    "widest",
]


def widest(degree: int, largest: int, below: int) -> int | None:
    """The largest d less than `below` with a rank of at most `largest` at this degree; None where there is none."""
    return bisect_right(range(1, max(below, 1)), largest, key=lambda d: rank(d, degree)) or None


def features(x: NDArray[float64], degree: int) -> NDArray[float64]:
    """phi, feature-major: x of shape (d, tokens) gives (rank(d, degree), tokens)."""
    import numpy as np

    d, tokens = x.shape
    phi = np.empty((rank(d, degree), tokens), dtype=x.dtype)
    phi[0] = 1.0
    if degree:
        phi[1 : 1 + d] = x
    for block in blocks(d, degree):
        phi[slice(*block.target)] = x[block.index] * phi[slice(*block.source)]
    return phi


def features_vjp(x: NDArray[float64], cotangent: NDArray[float64], degree: int) -> NDArray[float64]:
    """Pull a cotangent of phi, (rank, tokens), back to x, (d, tokens): the blocks walked backwards.

    It costs two multiply-adds per row, where the Khatri-Rao form of arXiv 2408.13233 costs about `degree` times
    more.
    """
    import numpy as np

    d = x.shape[0]
    phi = features(x, degree)
    upstream = cotangent.copy()
    dx = np.zeros_like(x)
    for block in reversed(blocks(d, degree)):
        above = upstream[slice(*block.target)]
        dx[block.index] += (above * phi[slice(*block.source)]).sum(axis=0)
        upstream[slice(*block.source)] += x[block.index] * above
    return dx + upstream[1 : 1 + d] if degree else dx


def exponents(d: int, degree: int) -> tuple[tuple[int, ...], ...]:
    """Variable indices of each row's monomial, ascending: `()` for row 0, `(0, 0, 3)` for x_0^2 x_3."""
    rows: list[tuple[int, ...]] = [(), *((i,) for i in range(d) if degree)]
    for block in blocks(d, degree):
        rows.extend((block.index, *rows[source]) for source in range(*block.source))
    return tuple(rows)
