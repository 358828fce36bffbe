"""Packed monomials, `p(q . k) = phi(q)^T W phi(k)` (docs/mathematics.md, section 2): their order and their weights.

phi holds the `rank(d, degree)` monomials of degree at most `degree` in d variables, without weights. Level j,
the monomials of degree j, is ordered by first (smallest) index, so those of level j-1 whose indices are all
at least i are a contiguous suffix of that level, and level j is d slice products. Everything that walks this
layout, in the compiler and in the kernels, walks `blocks`.

Pure Python: planning needs neither numpy nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import comb


@dataclass(frozen=True, slots=True)
class Block:
    """One slice product: `phi[target] = x[index] * phi[source]`.

    Args:
        level: degree of the monomials in `target`, at least 2.
        index: which of the d variables multiplies `source`, and so the smallest index of every monomial in
            `target`.
        source: rows `[start, stop)` of level - 1; a suffix of that level.
        target: rows `[start, stop)` of level; as long as `source`.
    """

    level: int
    index: int
    source: tuple[int, int]
    target: tuple[int, int]

    @property
    def size(self) -> int:
        """Rows of `source`, and of `target`."""
        return self.source[1] - self.source[0]


def rank(d: int, degree: int) -> int:
    """Number r of monomials of degree at most `degree` in d variables: C(d + degree, degree)."""
    _check(d, degree)
    return comb(d + degree, degree)


@cache
def levels(d: int, degree: int) -> tuple[tuple[int, int], ...]:
    """Rows `[start, stop)` of each level 0..degree: row 0 is the constant 1, rows 1..d are x."""
    _check(d, degree)
    ends = [comb(d + j, j) for j in range(degree + 1)]
    return tuple(zip([0, *ends], ends, strict=False))


@cache
def blocks(d: int, degree: int) -> tuple[Block, ...]:
    """The slice products that make levels 2..degree, in an order in which every source precedes its target.

    Together the targets are rows 1 + d to rank(d, degree), each once. There are d * (degree - 1) of them.
    """
    found: list[Block] = []
    for level, (start, _) in enumerate(levels(d, degree)):
        if level < 2:
            continue
        row = start
        for index in range(d):
            # As many as monomials of degree level-1 in the d-index variables from `index` on.
            size = comb(d - index + level - 2, level - 1)
            found.append(Block(level, index, (start - size, start), (row, row + size)))
            row += size
    return tuple(found)


@cache
def multinomial(d: int, degree: int) -> tuple[float, ...]:
    """Weight of each row in `(x . y)^|a|`: `|a|! / (a_0! ... a_(d-1)!)`, a being its exponents."""
    counts = [1] * rank(d, degree)
    leading = [1] * len(counts)  # exponent of a row's smallest index
    own = {(1, i): 1 + i for i in range(d)}  # where the rows with smallest index i begin in a level
    for block in blocks(d, degree):
        own[block.level, block.index] = block.target[0]
        same = own.get(
            (block.level - 1, block.index + 1), block.source[1]
        )  # source rows before it start with `index`
        for source, target in zip(range(*block.source), range(*block.target), strict=True):
            leading[target] = leading[source] + 1 if source < same else 1
            counts[target] = counts[source] * block.level // leading[target]
    return tuple(map(float, counts))


@cache
def weights(d: int, coefficients: tuple[float, ...]) -> tuple[float, ...]:
    """The diagonal of W, `c_|a| * multinomial(a)` for each row a; the degree is `len(coefficients) - 1`.

    Args:
        d: head dimension of queries and keys.
        coefficients: of the polynomial, ascending, in the monomial basis; of any sign.
    """
    degree = len(coefficients) - 1
    of_row = multinomial(d, degree)
    return tuple(
        coefficient * of_row[row]
        for coefficient, (start, stop) in zip(coefficients, levels(d, degree), strict=True)
        for row in range(start, stop)
    )


def _check(d: int, degree: int) -> None:
    if d < 1 or degree < 0:
        raise ValueError(f"features need d >= 1 and degree >= 0, not d={d} and degree={degree}")
