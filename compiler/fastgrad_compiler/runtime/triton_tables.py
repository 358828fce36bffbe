"""The monomials of a Triton kernel's features, in tiles, and their weights.

A feature is a product of `degree` factors, each a component of x or 1. What a kernel asks of the order: within a tile
of TILE features, the p-th factor of all features comes from one block of BLOCK components, or is 1. So the
monomials of highest degree go by the blocks that their factors lie in, and those of lower degree fill the gaps.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import TYPE_CHECKING

from .triton_schedule import BLOCK

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 64
ONE = -1  # the index of a factor that is 1

Monomial = tuple[int, ...]


@functools.cache
def monomials(d: int, degree: int) -> tuple[tuple[Monomial, ...], tuple[Monomial, ...]]:
    """The features, each its components with ONE for a factor of 1, and by tile the first component of each block.

    A gap is a feature of weight 0, whose factors are all ONE.
    """
    groups: dict[Monomial, list[Monomial]] = {}
    for monomial in combinations_with_replacement(range(d), degree):
        groups.setdefault(tuple(index // BLOCK for index in monomial), []).append(monomial)
    for level in range(degree):
        for monomial in combinations_with_replacement(range(d), level):
            _place(groups, monomial)
    features: list[Monomial] = []
    origins: list[Monomial] = []
    for blocks, members in groups.items():
        filled = [*members, *[(ONE,) * degree] * (-len(members) % TILE)]
        features.extend(filled)
        origins.extend([tuple(block * BLOCK for block in blocks)] * (len(filled) // TILE))
    return tuple(features), tuple(origins)


def _place(groups: dict[Monomial, list[Monomial]], monomial: Monomial) -> None:
    """Put a monomial of lower degree into the group of its blocks that has the largest gap."""
    needed = Counter(index // BLOCK for index in monomial)
    fitting = [blocks for blocks in groups if needed <= Counter(blocks)]
    blocks = max(fitting, key=lambda blocks: -len(groups[blocks]) % TILE)
    rest = list(monomial)
    factors = []
    for block in blocks:
        found = next((index for index in rest if index // BLOCK == block), None)
        if found is not None:
            rest.remove(found)
        factors.append(ONE if found is None else found)
    groups[blocks].append(tuple(factors))


def padded_rank(d: int, degree: int) -> int:
    """Features with gaps, a multiple of TILE."""
    return len(monomials(d, degree)[0])


def weights(d: int, coefficients: Sequence[float]) -> list[float]:
    """The diagonal of W: c_|a| * |a|! / prod(a_i!) for the monomial a of each feature; 0 for a gap."""
    degree = len(coefficients) - 1
    result = []
    seen: set[Monomial] = set()
    for feature in monomials(d, degree)[0]:
        monomial = tuple(sorted(index for index in feature if index != ONE))
        size = len(monomial)
        ways = factorial(size) // prod(map(factorial, Counter(monomial).values()))
        result.append(0.0 if monomial in seen else coefficients[size] * ways)
        seen.add(monomial)
    return result


@functools.cache
def feature_tables(
    d: int, coefficients: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """index [degree, rank] int32, component within its block or ONE; origin [degree, tiles] int32; weight [rank].

    Made once for a device and kept.
    """
    import torch

    features, origins = monomials(d, len(coefficients) - 1)
    inside = [[index if index == ONE else index % BLOCK for index in feature] for feature in features]
    index = torch.tensor(inside, dtype=torch.int32).T.contiguous()
    origin = torch.tensor(origins, dtype=torch.int32).T.contiguous()
    weight = torch.tensor(weights(d, coefficients), dtype=torch.float32)
    return index.to(device), origin.to(device), weight.to(device)
