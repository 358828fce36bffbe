"""What PyTorch's softmax attention may make of tokens that are not finite or huge, and what it should.

A hidden key has the weight 0 there: 0 * NaN is NaN, and inf from a product that overflows, less the inf of a mask, is
too. So tokens that are not finite are left out, and rows that see one are NaN. Rows that see a number beyond LARGE, or
hold one, are computed with selections pair by pair, and the others without it, in PyTorch's kernel: which row is which
depends on nothing hidden, nor do the bits of either. A row of NaN gives NaN to each gradient that it reaches, unless
its own is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGE = 2.0**32  # products of numbers up to it do not overflow in float32, nor do sums of such products
CHUNK = 256  # queries at a time
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pairs:
    """Which of n queries sees which of m keys, as PyTorch is told; groups: query heads to a key head."""

    mask: Tensor | None  # bool, or a bias that is -inf where hidden; broadcast to [.., h, n, m]
    causal: bool
    groups: int
    n: int
    m: int

    @cached_property
    def visible(self) -> Tensor:
        """bool, broadcast to [.., h, n, m]; not for a causal call."""
        mask = self.mask
        if mask is None:
            return torch.ones(1, 1, dtype=torch.bool)
        return mask if mask.dtype == torch.bool else mask != -math.inf

    def chunk(self, first: int, last: int) -> Tensor:
        """The queries [first, last) of `visible`."""
        if self.causal:
            return torch.ones(last - first, self.m, dtype=torch.bool).tril(first)
        return self.visible if self.visible.shape[-2] == 1 else self.visible[..., first:last, :]

    def rows(self, keys: Tensor) -> Tensor:
        """bool [.., h, n]: queries that see one of the flagged keys, bool [.., h / groups, m]."""
        keys = keys.repeat_interleave(self.groups, -2)
        if self.causal:
            return keys.cumsum(-1) > 0
        found = (self.visible & keys.unsqueeze(-2)).any(-1)
        return found.expand(*found.shape[:-1], self.n)

    def keys(self, rows: Tensor) -> Tensor:
        """bool [.., h / groups, m]: keys that one of the flagged queries sees, bool [.., h, n]."""
        if self.causal:
            found = rows.flip(-1).cumsum(-1).flip(-1) > 0
        else:
            rows = rows.any(-1, keepdim=True) if self.visible.shape[-2] == 1 else rows
            found = (self.visible & rows.unsqueeze(-1)).any(-2)
        groups: Tensor = found.expand(*found.shape[:-1], self.m).unflatten(-2, (-1, self.groups))
        return groups.any(-2)


class Marks:
    """The gradients of a call, of which those are NaN that a row of NaN reaches, or an upstream gradient of NaN."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self._spoilt: Tensor | None = None
        self._broken: Tensor | None = None

    def enter(self, x: Tensor, *, of_keys: bool = True) -> Tensor:
        """An input as the call takes it."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        x = x.view_as(x)
        x.register_hook(self._of_keys if of_keys else self._of_queries)
        return x

    def leave(self, out: Tensor, spoilt: Tensor | None) -> Tensor:
        """The result of the call, NaN in its spoilt rows, bool [.., h, n]."""
        if spoilt is not None:
            out = out.masked_fill(spoilt.unsqueeze(-1), math.nan)
        if not out.requires_grad:
            return out
        self._spoilt = spoilt
        out.register_hook(self._of_result)
        return out.view_as(out)  # whose gradient, if it is asked for, stays as it is

    def _of_result(self, gradient: Tensor) -> Tensor | None:
        self._broken = None
        if self._spoilt is None and not is_mapped() and is_finite(gradient):
            return None
        broken = ~gradient.isfinite().all(-1)
        if self._spoilt is not None:
            broken = broken | self._spoilt & (gradient != 0).any(-1)
        self._broken = broken
        return gradient.masked_fill(broken.unsqueeze(-1), 0.0)

    def _of_queries(self, gradient: Tensor) -> Tensor | None:
        return None if self._broken is None else gradient.masked_fill(self._broken.unsqueeze(-1), math.nan)

    def _of_keys(self, gradient: Tensor) -> Tensor | None:
        if self._broken is None:
            return None
        return gradient.masked_fill(self.pairs.keys(self._broken).unsqueeze(-1), math.nan)


def select(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float
) -> tuple[Tensor, Tensor]:
    """attend(q, k, v) without what is hidden, and which rows, bool [.., h, n], are to be NaN; shapes as for `Pairs`."""
    seeing = pairs.rows(torch.ones_like(k[..., 0], dtype=torch.bool))
    bad_keys, bad_queries = ~(_finite(k) & _finite(v)), ~_finite(q)
    large_keys, large_queries = _large(k) | _large(v), _large(q)
    spoilt = (pairs.rows(bad_keys) | bad_queries) & seeing
    large = (pairs.rows(large_keys) | large_queries) & seeing & ~spoilt
    out = attend(
        _without(q, bad_queries | large_queries), *(_without(x, bad_keys | large_keys) for x in (k, v))
    )
    large = large | ~_finite(out) & seeing & ~spoilt
    if not large.any():
        return out, spoilt
    k, v = _without(k, bad_keys), _without(v, bad_keys)
    with torch.no_grad():
        first = _by_pairs(_without(q, ~large), k, v, large, pairs, scale)
    overflowed = large & ~_finite(first)
    chosen = large & ~overflowed
    exact = _by_pairs(_without(q, ~chosen), k, v, chosen, pairs, scale)
    return torch.where(large.unsqueeze(-1), exact, out), spoilt | overflowed


def _by_pairs(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, pairs: Pairs, scale: float) -> Tensor:
    """Softmax attention of some rows, bool [.., h, n], and what comes of it in others, by chunks of CHUNK queries."""

    def attend(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        last = first + q.shape[-2]
        work = torch.float64 if q.dtype == torch.float64 else torch.float32
        keys, values = (x.to(work).repeat_interleave(pairs.groups, -3) for x in (k, v))
        hidden = ~pairs.chunk(first, last)
        scores = torch.matmul(q.to(work), keys.mT) * scale
        bias = pairs.mask
        if bias is not None and bias.dtype != torch.bool:
            scores = scores + (bias if bias.shape[-2] == 1 else bias[..., first:last, :]).to(work)
        scores = scores.masked_fill(hidden, -math.inf)
        empty = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty | hidden, 0.0)
        return torch.matmul(weights, values).to(v.dtype)

    parts = []
    for first in range(0, pairs.n, CHUNK):
        part = q[..., first : first + CHUNK, :]
        if rows[..., first : first + CHUNK].any():
            parts.append(checkpoint(attend, part, k, v, first, use_reentrant=False))
        else:
            parts.append(part.new_zeros((*part.shape[:-1], v.shape[-1])))
    return torch.cat(parts, -2)


def is_mapped() -> bool:
    """Whether torch.vmap is at work, under which a number cannot be read."""
    functorch = torch._C._functorch
    return any(
        level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ()
    )


def is_finite(x: Tensor) -> bool:
    """True only if all numbers are finite; a sum of large ones may overflow."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return math.isfinite(x.detach().sum(dtype=work).item())


def is_small(x: Tensor) -> bool:
    """Whether all numbers are finite, and none is beyond LARGE."""
    return not x.numel() or bool(torch.linalg.vector_norm(x.detach(), math.inf) <= LARGE)


def _finite(x: Tensor) -> Tensor:
    """bool [.., t]: tokens of x [.., t, width] whose numbers are all finite."""
    return x.detach().isfinite().all(-1)


def _large(x: Tensor) -> Tensor:
    """bool [.., t]: tokens with a number beyond LARGE."""
    return (x.detach().abs() > LARGE).any(-1)


def _without(x: Tensor, tokens: Tensor) -> Tensor:
    return x.masked_fill(tokens.unsqueeze(-1), 0.0)
