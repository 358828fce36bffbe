"""The sums phi(k) [v, 1]^T that a polynomial keeps of keys, in float64: adding keys to them, and reading them."""

from __future__ import annotations

from functools import lru_cache
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_op import WORK_BYTES
from .monomials import blocks, rank, weights
from .polynomial_features import Features
from .step_tokens import Rule


def sums_shape(k: Tensor, v: Tensor, rule: Rule) -> tuple[int, int]:
    return rank(k.shape[-1], len(rule.coefficients) - 1), v.shape[-1] + 1


def _features(x: Tensor, degree: int) -> Tensor:
    """[rows, r, t]: the monomials of x [b, h, .., t, d]."""
    steps = blocks(x.shape[-1], degree)
    phi = x.new_empty((x.shape[0] * x.shape[1], rank(x.shape[-1], degree), x[0, 0, ..., 0].numel()))
    return Features(phi, x.shape[-1], steps).load(x)


@lru_cache(maxsize=256)
def _diagonal(d: int, rule: Rule, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[r, 1]: the weight of each monomial in p(scale * q.k)."""
    scaled = tuple(c * rule.scale**power for power, c in enumerate(rule.coefficients))
    return torch.tensor(weights(d, scaled), dtype=dtype, device=device).unsqueeze(-1)


def read(rows: Tensor, sums: Tensor, rule: Rule) -> Tensor:
    """float64 [b, h, G, c, dv + 1]: what queries [b, h, G, c, d] read from the sums [b, h, r, dv + 1]."""
    phi = _features(rows, len(rule.coefficients) - 1)
    weighted = phi * _diagonal(rows.shape[-1], rule, phi.dtype, phi.device)
    found = weighted.double().mT @ sums.flatten(0, 1)
    return found.view(*rows.shape[:-1], sums.shape[-1])


def absorb(
    sums: Tensor, k: Tensor, v: Tensor, there: Tensor | None, factor: Tensor | None, work: torch.dtype
) -> None:
    """Add the tokens that are there, bool [b or 1, t], to the sums, each times a factor [b, h, t]."""
    degree = _degree(k.shape[-1], sums.shape[-2])
    size = max(WORK_BYTES // (sums.shape[0] * sums.shape[1] * sums.shape[2] * work.itemsize), 1)
    for first in range(0, k.shape[2], size):
        part = slice(first, first + size)
        keys, values = k[:, :, part].to(work), F.pad(v[:, :, part].to(work), (0, 1), value=1.0)
        if factor is not None:
            values = values * factor[:, :, part, None].to(work)
        if there is not None:
            hidden = ~there[:, None, part, None]
            keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)
        sums.add_((_features(keys, degree) @ values.flatten(0, 1)).view(sums.shape))


@lru_cache(maxsize=256)
def _degree(d: int, features: int) -> int:
    return next(degree for degree in count(1) if rank(d, degree) == features)
