"""Blocks of exact attention: queries that follow each other, and the keys that one of them may see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention_op import WORK_BYTES, Floats, Inputs, compute_dtype, row_groups
from .decay import Decays, log_decay
from .sight import CPU, Band, Ranges, Sight

BUFFERS = 5  # live [rows, keys] tensors of a block, in the backward pass
GATE_BUFFERS = (1, 3)  # and with forget gates, for each query head and for all that share a key head
LEAST_ROWS = 16
BANDED_ROWS = 64  # queries of a block whose keys are limited to a band: as many as the band is wide, or these


@dataclass(frozen=True)
class Seen:
    """Scale of the logits, block size of the near field, and which keys a query sees: those of `ranges` that the mask
    does not hide. host: the same ranges where they can be read without waiting for a device, if they depend on no data.
    """

    scale: float
    near: int
    sight: Sight
    ranges: Ranges
    host: Ranges
    mask: Tensor | None
    documents: bool
    sums: Tensor | None  # `log_decay`, of forget gates

    @staticmethod
    def of(inputs: Inputs, scale: float, causal: bool, near: int, window: int) -> Seen:
        """Of a call, by its attributes."""
        q, k, *_, log_gate, mask, documents = inputs
        sight, n, m = Sight(causal, window), q.shape[2], k.shape[2]
        ranges = sight.ranges(n, m, documents, q.device)
        host = ranges if documents is not None else sight.ranges(n, m, None, CPU)
        sums = None if log_gate is None else log_decay(log_gate, mask, documents)
        return Seen(scale, near, sight, ranges, host, mask, documents is not None, sums)

    @property
    def reach(self) -> int | None:
        """How far the keys of a query reach on one side, at most: a window, or the longest document; None for any."""
        reaches = [self.sight.window] if self.sight.window else []
        if self.documents:
            reaches.append(int((self.ranges.behind - self.ranges.first).max()))
        return min(reaches, default=None)


class Block:
    """Queries [first, last) of some rows, and the keys [low, high) that they may see.

    q [b, h, G, t, d], k, v [b, h, 1, high - low, ..].
    """

    def __init__(
        self,
        inputs: Floats,
        seen: Seen,
        rows: tuple[slice, slice],
        band: Band,
    ) -> None:
        q, k, v, near_q, near_k, _ = inputs
        self.rows, self.band, self.seen = rows, band, seen
        self.index = (*rows, slice(None), slice(*band.queries))
        dtype = compute_dtype(q, k, v)
        heads = k.shape[1]

        def of_queries(x: Tensor) -> Tensor:
            grouped: Tensor = x.unflatten(1, (heads, -1))
            return grouped[self.index].to(dtype)

        def of_keys(x: Tensor) -> Tensor:
            return x[rows][:, :, None, slice(*band.keys)].to(dtype)

        self.q, self.k, self.v = of_queries(q), of_keys(k), of_keys(v)
        self.near_q = None if near_q is None else of_queries(near_q)
        self.near_k = None if near_k is None else of_keys(near_k)
        self.decays = None if seen.sums is None else Decays(seen.sums[rows], dtype)

    def logits(self) -> tuple[Tensor, tuple[slice, Tensor] | None]:
        """[b, h, G, t, keys], -inf where hidden; and the columns among them that may be near, with their mask."""
        logits = torch.matmul(self.q, self.k.mT).mul_(self.seen.scale)
        neighbours = None
        if self.seen.near and self.near_q is not None and self.near_k is not None:
            columns, is_near = neighbours = self._neighbours(self.seen.near)
            local = torch.matmul(self.near_q, self.near_k[..., columns, :].mT)
            target = logits[..., columns]
            target.copy_(torch.where(is_near, local, target))
        if self.decays is not None:
            logits.add_(self.decays.log_pairs(slice(*self.band.queries), slice(*self.band.keys)).unsqueeze(2))
        self._hide(logits)
        return logits, neighbours

    def sums_across(self, dlogits: Tensor) -> Tensor:
        """[b, h, keys - 1]: the gradient of the gate of each key but the first: the sum of the logits' gradients over
        queries from it on with keys before it.
        """
        before = dlogits.cumsum(-1).tril_(self.band.queries[0] - self.band.keys[0] - 1)
        return before[..., :-1].sum((2, 3), dtype=torch.float64)

    def near_slopes(self, moved: Block, columns: slice) -> Tensor:
        """The tangent of the near logits, from a block of tangents."""
        queries, keys, moved_queries, moved_keys = self.near_q, self.near_k, moved.near_q, moved.near_k
        if queries is None or keys is None or moved_queries is None or moved_keys is None:
            raise ValueError("a near field has queries and keys of its own, and so have its tangents")
        keys, moved_keys = keys[..., columns, :], moved_keys[..., columns, :]
        return torch.matmul(moved_queries, keys.mT) + torch.matmul(queries, moved_keys.mT)

    def _neighbours(self, near: int) -> tuple[slice, Tensor]:
        (first, last), (low, high) = self.band.queries, self.band.keys
        start = min(high, max(low, (first // near - 1) * near))
        stop = max(start, min(high, ((last - 1) // near + 2) * near))
        own, others = (
            torch.arange(*ends, device=self.q.device).div(near, rounding_mode="floor")
            for ends in ((first, last), (start, stop))
        )
        return slice(start - low, stop - low), (own[:, None] - others).abs() <= 1

    def _hide(self, logits: Tensor) -> None:
        """-inf where a key is hidden; the keys that all queries of the band see are left out."""
        (low, high), (inner, outer), ranges = (
            self.band.keys,
            self.band.whole,
            self.seen.ranges.of(self.rows[0]),
        )
        for keys in ((low, inner), (outer, high)):
            if keys[0] < keys[1]:
                hidden = ranges.hidden(self.band.queries, keys)[:, None, None]
                logits[..., keys[0] - low : keys[1] - low].masked_fill_(hidden, -math.inf)
        if self.seen.mask is not None:
            logits.masked_fill_(~self.seen.mask[self.rows[0], None, None, None, low:high], -math.inf)


def blocks(inputs: Floats, seen: Seen) -> Iterator[Block]:
    """Blocks that cover all rows and queries, as large as WORK_BYTES and the band of visible keys allow."""
    q, k, v = inputs[:3]
    (batch, heads, m), n = k.shape[:3], q.shape[2]
    size, keys, reach = n, m, seen.reach
    if reach is not None:
        size = max(BANDED_ROWS, reach)
        keys = min(m, size + 2 * reach)
    groups = q.shape[1] // heads
    of_each, of_all = (0, 0) if seen.sums is None else GATE_BUFFERS
    buffers = (BUFFERS + of_each) * groups + of_all
    query_bytes = buffers * compute_dtype(q, k, v).itemsize * keys
    size = min(n, size, max(LEAST_ROWS, WORK_BYTES // query_bytes))
    for rows in row_groups(batch, heads, query_bytes * size):
        for band in seen.host.of(rows[0]).bands(size):
            yield Block(inputs, seen, rows, band)
