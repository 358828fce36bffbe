"""How large the logits of an attention are: a bound from norms, a sample, and queries scaled to stay within a range.

    |s_ij| = |scale * q_i.k_j| <= |scale| * ||q_i|| * ||k_j||

Norms take O(n d) and are enough where they prove the range. The sample takes the logits of a few queries with all
keys, and of a few keys with all queries. Only pairs that the polynomial serves count: no near ones, and none that a
mask hides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .attention_op import compute_dtype, row_groups
from .documents import document_runs
from .sight import Ranges, Sight

LONGEST = 8  # queries, and keys, of the largest norms in their sequence and head that are looked at
SPREAD = 8  # queries, evenly spread, that are looked at besides
SAMPLED = LONGEST + SPREAD  # up to so many queries, or keys, all are looked at
TINY = 1e-300  # instead of a scale of 0, which puts every logit in range


@dataclass(frozen=True)
class Pairs:
    """The logits of a kernel: their scale, whether query i sees the keys up to i only, and the block size of the near
    field, 0 without one.
    """

    scale: float
    causal: bool
    near: int

    @property
    def sight(self) -> Sight:
        """Which keys a query sees."""
        return Sight(self.causal)


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

    def seen(self, pairs: Pairs) -> Ranges:
        """The interval of keys that each query sees."""
        return pairs.sight.ranges(self.q.shape[2], self.k.shape[2], self.runs, self.q.device)

    def by_key_head(self, x: Tensor) -> Tensor:
        """[b, H, ..] as [b, h, H / h, ..]."""
        grouped: Tensor = x.unflatten(1, (self.k.shape[1], -1))
        return grouped


def rows_of(q: Tensor, k: Tensor, mask: Tensor | None, documents: Tensor | None) -> Rows:
    """The norms of a call's queries and keys."""
    dtype = compute_dtype(q, k)
    q_norms, k_norms = (torch.linalg.vector_norm(x, dim=-1, dtype=dtype) for x in (q, k))
    if mask is not None:
        k_norms = torch.where(mask[:, None], k_norms, 0.0)  # a hidden key may hold anything, NaN too
    return Rows(q, k, q_norms, k_norms, mask, None if documents is None else document_runs(documents))


def norm_bound(rows: Rows, pairs: Pairs) -> Tensor:
    """[H]: |scale| max ||q|| max ||k||, which no logit of the call is beyond, by head."""
    return _products(rows, rows.q_norms.amax(-1), rows.k_norms.amax(-1)) * abs(pairs.scale)


def _products(rows: Rows, queries: Tensor, keys: Tensor) -> Tensor:
    """[H]: the largest over the batch of queries [b, H] times keys [b, h]."""
    largest: Tensor = (rows.by_key_head(queries) * keys.unsqueeze(-1)).amax(0).flatten()
    return largest


@dataclass(frozen=True)
class Sample:
    """The places of what is looked at in each sequence and head, and a bound of what is not.

    queries: int64 [b, h, G, at most SAMPLED], each with all keys; G query heads share a key head. keys: int64
    [b, h, 1, at most SAMPLED], each with all queries. unseen [H]: no |s| of another pair is larger.
    """

    queries: Tensor | None
    keys: Tensor | None
    unseen: Tensor


def choose_sample(rows: Rows, pairs: Pairs, turn: Tensor) -> Sample:
    """What to look at: everything where there are at most SAMPLED queries or SAMPLED keys.

    Else the LONGEST queries and the LONGEST keys by norm, and SPREAD queries at even distances, which begin at `turn`
    (int64, no dimensions): in ceil(n / SPREAD) turns after each other they take every query.
    """
    (batch, heads, n), (_, key_heads, m) = rows.q_norms.shape, rows.k_norms.shape
    groups, device = heads // key_heads, rows.q.device
    if n <= SAMPLED:
        every = torch.arange(n, device=device).expand(batch, key_heads, groups, -1)
        return Sample(every, None, rows.q_norms.new_zeros(heads))
    if m <= SAMPLED:
        every = torch.arange(m, device=device).expand(batch, key_heads, 1, -1)
        return Sample(None, every, rows.q_norms.new_zeros(heads))
    queries, keys = rows.q_norms.topk(LONGEST + 1), rows.k_norms.topk(LONGEST + 1)
    unseen = _products(rows, queries.values[..., -1], keys.values[..., -1]) * abs(pairs.scale)
    even = torch.arange(SPREAD, device=device) * n // SPREAD + turn % -(-n // SPREAD)
    of_queries = torch.cat((queries.indices[..., :-1], (even % n).expand(batch, heads, -1)), -1)
    return Sample(rows.by_key_head(of_queries), keys.indices[:, :, None, :-1], unseen)


def sampled_range(rows: Rows, pairs: Pairs, sample: Sample) -> Tensor:
    """[H]: the largest |s| of a sample, 0 without pairs that the polynomial serves."""
    (batch, key_heads, m), n = rows.k_norms.shape, rows.q.shape[2]
    q, keys = rows.by_key_head(rows.q), rows.seen(pairs)
    queries = keys.transposed()
    largest = rows.q_norms.new_zeros((batch, key_heads, q.shape[2]))
    of_queries, of_keys = (0 if x is None else x.shape[-1] for x in (sample.queries, sample.keys))
    row_bytes = 2 * rows.dtype.itemsize * q.shape[2] * (of_queries * m + of_keys * n)
    for group in row_groups(batch, key_heads, row_bytes):
        mask, seen = (
            None if rows.mask is None else rows.mask[group[0]],
            (keys.of(group[0]), queries.of(group[0])),
        )
        part = _Part(q[group].to(rows.dtype), rows.k[group].to(rows.dtype), mask, *seen, pairs.near)
        if sample.queries is not None:
            largest[group] = part.of_queries(sample.queries[group])
        if sample.keys is not None:
            largest[group] = torch.maximum(largest[group], part.of_keys(sample.keys[group]))
    return largest.amax(0).flatten() * abs(pairs.scale)


@dataclass(frozen=True)
class _Part:
    """Some rows of a call: q [b, h, G, n, d], k [b, h, m, d], mask [b, m]; the keys that queries see, the queries that
    see keys, and the block size of the near field.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    keys: Ranges
    queries: Ranges
    near: int

    def of_queries(self, places: Tensor) -> Tensor:
        """[b, h, G]: the largest |q.k| of the queries at `places` [b, h, G, S] with all keys."""
        logits = torch.matmul(_at(self.q, places).flatten(2, 3), self.k.mT).unflatten(2, places.shape[2:])
        padding = None if self.mask is None else ~self.mask[:, None, None, None]
        return _peak(logits, self.keys.hidden_from(places), padding, self._near(places, self.k.shape[2]))

    def of_keys(self, places: Tensor) -> Tensor:
        """[b, h, G]: the largest |q.k| of the keys at `places` [b, h, 1, S] with all queries of their group."""
        logits = torch.matmul(_at(self.k.unsqueeze(2), places), self.q.mT)
        padding = None if self.mask is None else ~_of_tokens(self.mask, places).unsqueeze(-1)
        return _peak(logits, self.queries.hidden_from(places), padding, self._near(places, self.q.shape[3]))

    def _near(self, places: Tensor, count: int) -> Tensor | None:
        """bool [b, h, .., S, tokens]: near pairs of `count` tokens, whichever of the two the query is."""
        if not self.near:
            return None
        tokens = torch.arange(count, device=places.device)
        first = (places.div(self.near, rounding_mode="floor") - 1).unsqueeze(-1) * self.near
        return (tokens >= first) & (tokens < first + 3 * self.near)


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """[b, h, g, S, d]: the rows [b, h, g, n, d] at places [b, h, g, S]."""
    return rows.gather(3, places.unsqueeze(-1).expand(*places.shape, rows.shape[-1]))


def _of_tokens(values: Tensor, places: Tensor) -> Tensor:
    """The values [b, n] of tokens at places [b, ..]."""
    return values.gather(1, places.flatten(1)).view(places.shape)


def _peak(logits: Tensor, *hidden: Tensor | None) -> Tensor:
    """[b, h, G]: the largest size of logits [b, h, G, S, tokens] that are hidden by nothing; 0 without one."""
    given = [each for each in hidden if each is not None]
    if given:
        logits.masked_fill_(reduce(torch.logical_or, given), 0.0)
    logits = logits.flatten(-2)
    return torch.maximum(logits.amax(-1), -logits.amin(-1))


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

    def push(self, dq: Tensor | None, dk: Tensor | None) -> Tensor:
        """The tangent of q' from those of q and k, None for zeros: dq' = f dq, and q' times the tangent of log f."""
        rows = self.rows
        q, k = rows.q.to(rows.dtype), rows.k.to(rows.dtype)
        turned = torch.zeros_like(q) if dq is None else dq.to(rows.dtype)
        rate = torch.linalg.vecdot(turned, q) / rows.q_norms.square()
        if dk is not None:
            growth = torch.linalg.vecdot(dk.to(rows.dtype), k) / rows.k_norms.square()
            growth = growth.gather(-1, self.index).repeat_interleave(q.shape[1] // k.shape[1], 1)
            rate = rate + growth
        rate = torch.where(self.factor < 1.0, rate, 0.0)
        pushed = (turned - q * rate.unsqueeze(-1)) * self.factor.unsqueeze(-1)
        return pushed.to(rows.q.dtype)

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
        by_key = torch.where(by_key == 0.0, 0.0, by_key / rows.k_norms.square()).unsqueeze(-1)
        dk = dk.to(rows.dtype)
        of_k = torch.where(by_key == 0.0, dk, dk - k * by_key)  # a key that nothing sees may hold anything
        return of_q.to(rows.q.dtype), of_k.to(rows.k.dtype)


def clamp(rows: Rows, pairs: Pairs, bound: Tensor) -> Clamp:
    """The clamp of a call to |s| <= bound, [H] or [1]."""
    index = _largest_key(rows, pairs)
    keys = rows.k_norms.gather(-1, index).repeat_interleave(rows.q.shape[1] // rows.k.shape[1], 1)
    limit = bound[:, None] * ((1.0 - torch.finfo(rows.q.dtype).eps) / max(abs(pairs.scale), TINY))
    reach = keys * rows.q_norms
    return Clamp(rows, torch.where(reach <= limit, 1.0, limit / reach), index)


def _largest_key(rows: Rows, pairs: Pairs) -> Tensor:
    """int64 [b, h, n or 1]: where the key of the largest norm is among those that each query may see.

    What a query sees begins where its document does.
    """
    norms = rows.k_norms
    if rows.runs is None and pairs.sight == Sight():
        return norms.argmax(-1, keepdim=True)
    if rows.runs is not None:  # above all documents before
        norms = rows.runs[:, None] * norms.shape[-1] + norms.argsort(dim=-1, stable=True).argsort(dim=-1)
    last = rows.seen(pairs).behind[:, None] - 1
    return norms.cummax(-1).indices.gather(-1, last.expand(*norms.shape[:2], -1))
