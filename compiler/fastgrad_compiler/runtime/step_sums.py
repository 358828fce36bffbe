"""The sums phi(k) [v, 1]^T that a polynomial keeps of keys, in float64: adding keys to them, and reading them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_op import WORK_BYTES
from .monomials import blocks, levels, multinomial, rank
from .step_tokens import Rule


def sums_shape(k: Tensor, v: Tensor, rule: Rule) -> tuple[int, int]:
    return rank(k.shape[-1], len(rule.coefficients) - 1), v.shape[-1] + 1


@dataclass(frozen=True)
class Table:
    """How monomials of a degree are made: those of each level from those before, x[variable] * phi[source].

    degree_of: int64 [r], the degree of each; count: float64 [r], its multinomial coefficient.
    """

    variables: tuple[Tensor, ...]
    sources: tuple[Tensor, ...]
    degree_of: Tensor
    count: Tensor


_TABLES: dict[tuple[int, int, torch.device], Table] = {}


def _table(d: int, degree: int, device: torch.device) -> Table:
    """Made once; a graph that is compiled finds it, since the first call of a state is not."""
    key = (d, degree, device)
    if key in _TABLES:
        return _TABLES[key]
    variables: list[list[int]] = [[] for _ in range(degree - 1)]
    sources: list[list[int]] = [[] for _ in range(degree - 1)]
    for block in blocks(d, degree):
        variables[block.level - 2] += [block.index] * block.size
        sources[block.level - 2] += range(*block.source)
    degree_of = [level for level, (start, stop) in enumerate(levels(d, degree)) for _ in range(start, stop)]
    by_level = [tuple(torch.tensor(row, device=device) for row in table) for table in (variables, sources)]
    count = torch.tensor(multinomial(d, degree), dtype=torch.float64, device=device)
    found = Table(by_level[0], by_level[1], torch.tensor(degree_of, device=device), count)
    if not torch.compiler.is_compiling():
        _TABLES[key] = found
    return found


def _features(x: Tensor, degree: int) -> Tensor:
    """[.., t, r]: the monomials of x [.., t, d]."""
    table, phi = _table(x.shape[-1], degree, x.device), torch.cat((torch.ones_like(x[..., :1]), x), -1)
    for variable, source in zip(table.variables, table.sources, strict=True):
        phi = torch.cat((phi, x.index_select(-1, variable) * phi.index_select(-1, source)), -1)
    return phi


def _diagonal(d: int, rule: Rule, device: torch.device) -> Tensor:
    """float64 [r]: the weight of each monomial in p(scale * q.k)."""
    table = _table(d, len(rule.coefficients) - 1, device)
    scaled = [c * rule.scale**power for power, c in enumerate(rule.coefficients)]
    by_degree = torch.tensor(scaled, dtype=torch.float64, device=device)
    return by_degree.index_select(0, table.degree_of) * table.count


def read(rows: Tensor, sums: Tensor, rule: Rule) -> Tensor:
    """float64 [b, h, G, c, dv + 1]: what queries [b, h, G, c, d] read from the sums [b, h, r, dv + 1]."""
    phi = _features(rows, len(rule.coefficients) - 1).double()
    return (phi * _diagonal(rows.shape[-1], rule, phi.device)) @ sums.unsqueeze(2)


def absorb(
    sums: Tensor, k: Tensor, v: Tensor, there: Tensor | None, factor: Tensor | None, work: torch.dtype
) -> None:
    """Add the tokens that are there, bool [b or 1, t], to the sums, each times a factor [b, h, t]."""
    degree = _degree(k.shape[-1], sums.shape[-2])
    size = max(WORK_BYTES // (sums.shape[0] * sums.shape[1] * sums.shape[2] * work.itemsize), 1)
    for first in range(0, k.shape[2], size):
        part = slice(first, first + size)
        shown = None if there is None else there[:, part]
        sums.add_(
            sums_of(
                k[:, :, part],
                v[:, :, part],
                shown,
                None if factor is None else factor[:, :, part],
                degree,
                work,
            )
        )


def sums_of(
    k: Tensor, v: Tensor, there: Tensor | None, factor: Tensor | None, degree: int, work: torch.dtype
) -> Tensor:
    """[b, h, r, dv + 1]: what tokens add to the sums, of all features at once; see `absorb`."""
    keys, values = k.to(work), F.pad(v.to(work), (0, 1), value=1.0)
    if factor is not None:
        values = values * factor.unsqueeze(-1).to(work)
    if there is not None:
        hidden = ~there[:, None, :, None]
        keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)
    return _features(keys, degree).mT @ values


def _degree(d: int, features: int) -> int:
    degree = 1
    while rank(d, degree) < features:
        degree += 1
    return degree
