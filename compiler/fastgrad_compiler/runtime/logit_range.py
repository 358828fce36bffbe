"""How large the logits of an attention are: a bound from norms, a sample, and queries scaled to stay within a range.

    |s_ij| = |scale * q_i.k_j| <= |scale| * ||q_i|| * ||k_j||

Norms take O(n d) and are enough where they prove the range. The sample takes the logits of a few queries with all keys
that they meet by the polynomial: those that a mask hides, or that are near, do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_op import compute_dtype, row_groups
from .documents import document_ranges, document_runs

SAMPLED = 16  # queries: half of them those with the largest norms, half evenly spread
TINY = 1e-300  # instead of a scale of 0, which puts every logit in range


@dataclass(frozen=True)
class Pairs:
    """The logits of a kernel: their scale, whether query i sees the keys up to i only, and the block size of the near
    field, 0 without one.
    """

    scale: float
    causal: bool
    near: int


@dataclass(frozen=True)
class Rows:
    """Queries and keys of a call with their norms; a key that the padding mask hides has norm 0.

    q [b, H, n, d], k [b, h, m, d]; q_norms [b, H, n], k_norms [b, h, m] in the precision of the scores; runs [b, n]:
    the document of each token.
    """

    q: Tensor
    k: Tensor
    q_norms: Tensor
    k_norms: Tensor
    mask: Tensor | None
    runs: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the norms."""
        return self.q_norms.dtype

    def by_key_head(self, x: Tensor) -> Tensor:
        """[b, H, ..] as [b, h, H / h, ..]."""
        grouped: Tensor = x.unflatten(1, (self.k.shape[1], -1))
        return grouped


def rows_of(q: Tensor, k: Tensor, mask: Tensor | None, documents: Tensor | None) -> Rows:
    """The norms of a call's queries and keys."""
    dtype = compute_dtype(q, k)
    q_norms, k_norms = (torch.linalg.vector_norm(x, dim=-1, dtype=dtype) for x in (q, k))
    if mask is not None:
        k_norms = k_norms * mask[:, None]
    return Rows(q, k, q_norms, k_norms, mask, None if documents is None else document_runs(documents))


def norm_bound(rows: Rows, pairs: Pairs) -> Tensor:
    """[H]: no logit of the call is larger than these, by head."""
    queries, keys = rows.by_key_head(rows.q_norms.amax(-1)), rows.k_norms.amax(-1)
    largest: Tensor = (queries * keys.unsqueeze(-1)).amax(0).flatten()
    return largest * abs(pairs.scale)


def sampled_range(rows: Rows, pairs: Pairs) -> Tensor:
    """[H]: the largest |s| of the sampled queries with the keys that they meet by the polynomial, 0 without such."""
    (batch, heads), (key_heads, m) = rows.q.shape[:2], rows.k.shape[1:3]
    places = _sampled(rows.q_norms)
    queries = rows.by_key_head(rows.q.index_select(2, places)).to(rows.dtype).flatten(2, 3)
    hidden = _hidden(places, m, pairs)
    largest = rows.q_norms.new_zeros((batch, key_heads, heads // key_heads))
    row_bytes = 2 * rows.dtype.itemsize * queries.shape[2] * m
    for group in row_groups(batch, key_heads, row_bytes):
        logits = torch.matmul(queries[group], rows.k[group].to(rows.dtype).mT).unflatten(2, (-1, len(places)))
        if hidden is not None:
            logits.masked_fill_(hidden, 0.0)
        if rows.runs is not None:
            runs = rows.runs[group[0]]
            logits.masked_fill_((runs[:, places, None] != runs[:, None])[:, None, None], 0.0)
        if rows.mask is not None:
            logits.masked_fill_(~rows.mask[group[0], None, None, None], 0.0)
        logits = logits.flatten(-2)
        largest[group] = torch.maximum(logits.amax(-1), -logits.amin(-1))
    return largest.amax(0).flatten() * abs(pairs.scale)


def _sampled(norms: Tensor) -> Tensor:
    """The places of the sampled queries, the same in all rows and heads: [at most SAMPLED]."""
    n = norms.shape[2]
    if n <= SAMPLED:
        return torch.arange(n, device=norms.device)
    half = SAMPLED // 2
    spread = torch.arange(half, device=norms.device) * n // half + n // SAMPLED
    return torch.cat((norms.amax((0, 1)).topk(half).indices, spread))


def _hidden(places: Tensor, m: int, pairs: Pairs) -> Tensor | None:
    """bool [places, m]: pairs that the polynomial does not serve, by their places alone; None where there are none."""
    keys = torch.arange(m, device=places.device)
    hidden = keys > places[:, None] if pairs.causal else None
    if pairs.near:
        blocks = places.div(pairs.near, rounding_mode="floor")[:, None]
        close = (blocks - keys.div(pairs.near, rounding_mode="floor")).abs() <= 1
        hidden = close if hidden is None else hidden | close
    return hidden


@dataclass(frozen=True)
class Clamp:
    """Queries scaled so that no logit is beyond R: q'_i = f_i q_i, f_i = min(1, R / (|scale| K_i ||q_i||)).

    K_i is the largest norm of a key that query i may see (masked, later and other documents' keys have no say), and
    `index` [b, h, n or 1] where that key is; `factor` [b, H, n]. R is taken one rounding of the dtype smaller.
    """

    rows: Rows
    factor: Tensor
    index: Tensor

    def queries(self) -> Tensor:
        """q' in the dtype of q."""
        return (self.rows.q.to(self.rows.dtype) * self.factor.unsqueeze(-1)).to(self.rows.q.dtype)

    def pull(self, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of q and k from those of q' and of k as the kernel sees them.

        Where f_i < 1, q'_i depends on the direction of q_i alone and is divided by K_i, a norm of a key.
        """
        rows = self.rows
        q, k, upstream = (x.to(rows.dtype) for x in (rows.q, rows.k, dq))
        inner = torch.linalg.vecdot(upstream, q) * self.factor  # dq'.q', which both gradients take out
        inner = torch.where(self.factor < 1.0, inner, 0.0)
        along = torch.where(self.factor < 1.0, inner / rows.q_norms.square(), 0.0)
        of_q = upstream * self.factor.unsqueeze(-1) - q * along.unsqueeze(-1)
        lost = rows.by_key_head(inner).sum(2)
        lost = lost.sum(-1, keepdim=True) if self.index.shape[-1] == 1 else lost
        by_key = torch.zeros_like(rows.k_norms).scatter_add_(-1, self.index, lost)
        by_key = torch.where(by_key == 0.0, 0.0, by_key / rows.k_norms.square())
        of_k = dk.to(rows.dtype) - k * by_key.unsqueeze(-1)
        return of_q.to(dq.dtype), of_k.to(dk.dtype)


def clamp(rows: Rows, pairs: Pairs, bound: Tensor) -> Clamp:
    """The clamp of a call to |s| <= bound, [H] or [1]."""
    index = _largest_key(rows, pairs.causal)
    keys = rows.k_norms.gather(-1, index).repeat_interleave(rows.q.shape[1] // rows.k.shape[1], 1)
    limit = bound[:, None] * ((1.0 - torch.finfo(rows.q.dtype).eps) / max(abs(pairs.scale), TINY))
    return Clamp(rows, (limit / (keys * rows.q_norms)).clamp_(max=1.0), index)


def _largest_key(rows: Rows, causal: bool) -> Tensor:
    """int64 [b, h, n or 1]: where the key of the largest norm is among those that each query may see."""
    norms = rows.k_norms
    if rows.runs is None:
        return norms.cummax(-1).indices if causal else norms.argmax(-1, keepdim=True)
    lifted = norms.double()
    lifted = lifted + rows.runs[:, None] * (lifted.amax() + 1.0)  # above all documents before
    index = lifted.cummax(-1).indices
    if not causal:
        last = document_ranges(rows.runs)[1] - 1
        index = index.gather(-1, last[:, None].expand_as(index))
    return index
