"""Some rows of a polynomial attention: tiles of queries, and the states that far keys and queries are summed up in.

A state is a sum of phi(x) y^T: of keys, Z = sum of phi(k) [v, 1], and of queries, Y = sum of phi(q) [u, -delta]. Where
sequences are packed documents it holds one document at a time: each step says which one by a token of it. With forget
gates its terms are times e^(G_token - G_j), of keys, or e^(G_i - G_token), of queries: each step says that token too,
which is after the keys and before the queries of the sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_op import Floats, Inputs
from .decay import Decays
from .documents import keep_document, of_document, select_columns, select_tokens
from .kernel_spec import KernelSpec, folded_coefficients
from .polynomial_features import (
    Features,
    Workspace,
    add_product,
    add_rows,
    load_values,
    scale_tokens,
)


class Tile(NamedTuple):
    """Queries [first, last), and the keys [low, high) that they meet one by one; the rest reach them by a state."""

    first: int
    last: int
    low: int
    high: int
    width: int  # queries of all heads of a group

    @property
    def queries(self) -> slice:
        """Its queries."""
        return slice(self.first, self.last)

    @property
    def of_keys(self) -> slice:
        """The keys that they meet one by one."""
        return slice(self.low, self.high)

    @property
    def here(self) -> tuple[slice, ...]:
        """Index of its queries in [b, h, G, n, ..]."""
        return (slice(None), slice(None), slice(None), self.queries)

    @property
    def keys(self) -> tuple[slice, ...]:
        """Index of its keys in [b, h, m, ..]."""
        return (slice(None), slice(None), self.of_keys)


class Sum:
    """A sum of phi(x) y^T over tokens, and W times it, (rows, rank, dv + 1) both; of one document at a time."""

    def __init__(self, work: Workspace, name: str, shape: tuple[int, int, int]) -> None:
        self.total = work.zeros(name, *shape)
        self.weighted = work.zeros(f"weighted {name}", *shape)

    def clear(self) -> None:
        """Start again."""
        self.total.zero_()
        self.weighted.zero_()

    def weigh(self, weights: Tensor) -> None:
        """After an addition: W times the sum; weights (rank, 1)."""
        torch.mul(self.total, weights, out=self.weighted)


class Rows:
    """Some rows of a call, q [b, h, G, n, d], k, v [b, h, m, ..], mask [b, m], and its work buffers.

    size: queries in a tile. weights (rank, 1): the diagonal of W. runs [b, n]: `document_runs`, None without documents.
    decays: of forget gates, None without. dense: a tile meets all keys that it sees one by one, and no state is used.
    """

    def __init__(
        self,
        spec: KernelSpec,
        work: Workspace,
        size: int,
        weights: Tensor,
        inputs: Inputs,
        runs: Tensor | None,
        decays: Decays | None = None,
        dense: bool = False,
    ) -> None:
        self.spec, self.work, self.size, self.weights = spec, work, size, weights
        self.dense = dense
        self.two_sided, self.total = spec.two_sided and not dense, spec.total and not dense
        self.inputs, self.runs, self.decays = inputs, runs, decays
        b, h, self.groups, self.n, _ = inputs.q.shape
        self.heads, self.m = (b, h), inputs.k.shape[2]
        self.count = b * h
        self.coefficients = folded_coefficients(spec)
        later = size if spec.causal else 0
        self.future = torch.ones(later, later, dtype=torch.bool, device=work.device).triu_(1)
        self.tiles = [self._tile(first, min(first + size, self.n)) for first in range(0, self.n, size)]

    def _tile(self, first: int, last: int) -> Tile:
        near, causal = self.spec.near, self.spec.causal
        low, high, width = first, last, self.groups * (last - first)
        if self.dense:
            low, high = 0, last if causal else self.m
        elif self.total:
            low = high = self.m
        elif near is not None:
            low = max(0, (first // near - 1) * near)
            high = last if causal else min(self.m, ((last - 1) // near + 2) * near)
            low = low if causal else min(self.m, low)
        return Tile(first, last, low, high, width)

    def sum(self, name: str) -> Sum:
        """A sum with the buffers of that name, zero."""
        return Sum(self.work, name, (self.count, self.work.rank, self.inputs.v.shape[-1] + 1))

    def queries(self, tile: Tile) -> Features:
        """The features of a tile's queries."""
        features = self.work.features(self.count, tile.width)
        features.load(self.inputs.q[:, :, :, tile.first : tile.last])
        return features

    def take_total(self, tile: Tile) -> Tensor:
        """The buffer of N and D of a tile, (rows, width, dv + 1)."""
        return self.work.take("total", self.count, tile.width, self.inputs.v.shape[-1] + 1)

    def _within(self, token: int) -> int:
        return min(max(token, 0), self.n - 1)

    # ------------------------------------------------------------ the keys of a state

    def _shown(self, first: int, last: int, token: int) -> Tensor | None:
        """bool [b, last - first]: keys that count for the document of `token`; None for all."""
        mask = self.inputs.mask
        if self.runs is None:
            return None if mask is None else mask[:, first:last]
        own = of_document(self.runs, first, last, token)
        return own if mask is None else own & mask[:, first:last]

    def absorb(self, state: Sum, start: int, stop: int, token: int, old: int) -> None:
        """Z += phi(K) [V, 1] over the keys [start, stop) of the document of `token`; before, the sum was `old`'s."""
        if start >= stop:
            return
        self._move(state, self._within(old), token)
        for first in range(start, stop, self.size):
            last = min(first + self.size, stop)
            phi = self.work.features(self.count, last - first).load(self.inputs.k[:, :, first:last])
            values = load_values(self.work, self.inputs.v[:, :, first:last], self._shown(first, last, token))
            if self.decays is not None:
                scale_tokens(values, self.decays.until(token, slice(first, last)))
            add_product(self.work, state.total, phi, values)
        state.weigh(self.weights)

    def key_gradients(self, state: Sum, gradients: Floats, start: int, stop: int, token: int) -> None:
        """dV += (Y^T W phi(K))[:dv], dK += J_phi(K)^T (W Y [V, 1]): keys [start, stop) of `token`'s document.

        Of gates, dG -= [V, 1] . Y^T W phi(K).
        """
        if start >= stop:
            return
        state.weigh(self.weights)
        k, v = self.inputs.k, self.inputs.v
        for first in range(start, stop, self.size):
            last = min(first + self.size, stop)
            features = self.work.features(self.count, last - first)
            cotangent = self.work.cotangent(self.count, last - first)
            features.load(k[:, :, first:last])
            shown = self._shown(first, last, token)
            values = load_values(self.work, v[:, :, first:last], shown)
            decay = (
                None if self.decays is None else self.decays.until(self._within(token), slice(first, last))
            )
            if decay is not None:
                scale_tokens(values, decay)
            torch.bmm(state.weighted, values.mT, out=cotangent.upstream)
            of_values, of_keys = torch.bmm(features.tokens, state.weighted), cotangent.pull()
            if self.runs is not None and shown is not None:
                select_tokens(of_values, shown, out=of_values)
                select_columns(of_keys, shown)
            if decay is not None and gradients.log_gate is not None:
                by_key = torch.linalg.vecdot(values, of_values).view(decay.shape)
                gradients.log_gate[:, :, first:last].sub_(by_key)
                scale_tokens(of_values, decay)
            add_rows(of_values, gradients.v[:, :, first:last])
            gradients.k[:, :, first:last].add_(of_keys.mT.view(*self.heads, last - first, k.shape[-1]))

    # ------------------------------------------------------------ the queries of a state

    def _move(self, state: Sum, old: int, new: int) -> None:
        """A sum that was of token `old` comes to be one of `new`."""
        if self.runs is not None:
            keep_document(state.total, self.runs, old, new)
        if self.decays is not None:
            state.total.mul_(self.decays.between(old, new).view(-1, 1, 1))

    def _of_document(self, tile: Tile, token: int) -> Tensor | None:
        """bool [b, t]: queries of a tile that are of the document of `token`; None without documents."""
        if self.runs is None:
            return None
        return of_document(self.runs, tile.first, tile.last, self._within(token))

    def _selected(self, upstream: Tensor, own: Tensor | None) -> Tensor:
        """upstream (rows, width, dv + 1), and 0 where `own` is False, which leaves `upstream` as it is."""
        if own is None:
            return upstream
        return select_tokens(upstream, own, out=self.work.take("document_upstream", *upstream.shape))

    def read(self, state: Sum, features: Features, tile: Tile, token: int, out: Tensor) -> Tensor:
        """phi(Q)^T W Z into `out`, (rows, width, dv + 1), for the queries of the document of `token`."""
        torch.bmm(features.tokens, state.weighted, out=out)
        self._forget(out, tile, token)
        own = self._of_document(tile, token)
        return out if own is None else select_tokens(out, own, out=out)

    def pull(
        self, state: Sum, tile: Tile, upstream: Tensor, token: int, sums: Tensor | None = None
    ) -> Tensor:
        """J_phi^T (W Z u~), (rows, d, width): the gradient that queries of `token`'s document owe to far keys.

        sums: dG of gates, [b, h, n], += phi^T W Z u~.
        """
        cotangent = self.work.cotangent(self.count, tile.width)
        own = self._of_document(tile, token)
        upstream = self._decayed(self._selected(upstream, own), tile, token)
        torch.bmm(state.weighted, upstream.mT, out=cotangent.upstream)
        if sums is not None:
            phi = self.work.features(self.count, tile.width).phi
            product = torch.mul(phi, cotangent.upstream, out=self.work.take("row_product", *phi.shape))
            of_rows = product.sum(1).view(*self.heads, self.groups, -1)
            sums[:, :, tile.queries].add_(of_rows.sum(2))
        gradient = cotangent.pull()
        return gradient if own is None else select_columns(gradient, own)

    def add_queries(
        self, state: Sum, features: Features, tile: Tile, upstream: Tensor, token: int, old: int
    ) -> None:
        """Y += phi(Q)^T u~ over the queries of the document of `token`; before, the sum was that of `old`."""
        self._move(state, self._within(old), self._within(token))
        selected = self._selected(upstream, self._of_document(tile, token))
        add_product(self.work, state.total, features.phi, self._decayed(selected, tile, token))

    def _forget(self, tokens: Tensor, tile: Tile, token: int) -> None:
        """(rows, width, ..) of a tile's queries *= the decay since `token`."""
        if self.decays is not None:
            scale_tokens(tokens, self.decays.since(self._within(token), tile.queries))

    def _decayed(self, upstream: Tensor, tile: Tile, token: int) -> Tensor:
        """upstream (rows, width, dv + 1) times the decay since `token`, which leaves `upstream` as it is."""
        if self.decays is None:
            return upstream
        copy = self.work.take("decayed_upstream", *upstream.shape).copy_(upstream)
        self._forget(copy, tile, token)
        return copy
