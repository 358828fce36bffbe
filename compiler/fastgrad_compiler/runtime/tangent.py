"""The tangent of polynomial attention: what torch.func.jvp and torch.autograd.forward_ad ask of a kernel.

With weights a_ij and O_i = N_i / D_i, N_i = sum of a_ij v_j, D_i = sum of a_ij:

    dO_i = (dN_i - O_i dD_i) / D_i
    d(phi(q)^T W Z) = dphi(q)^T W Z + phi(q)^T W dZ,  Z = sum of phi(k) [v, 1]

With forget gates a weight e^x = e^(G_i - G_j) has the tangent e^x dx; Z and dZ are sums of terms times e^(G_p - G_j), p
the last key of the sum (docs/mathematics.md, section 12).

One sweep over the sequence, as the forward pass makes it, with a state for Z and one for dZ, and a second sweep where
there are far keys on both sides: O(n) time and memory, in PyTorch's operations on every target and device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .attention_op import compute_dtype, is_short, plan_tiles, row_groups
from .decay import Decays, log_decay, log_decay_tangent
from .documents import document_runs, of_document, same_document
from .exact_attention import exact_tangent
from .guard import guarded_tangent
from .kernel_spec import KernelSpec, folded_coefficients
from .monomials import blocks, weights
from .polynomial_features import derivative, far_decay, horner, inverse
from .selection import selective_tangent
from .sight import Sight

TILE = 64  # queries at a time, and keys; the result does not depend on it
Pair = tuple[Tensor, Tensor]  # a value and its tangent
Window = tuple[slice, tuple[int, int]]  # a tile of queries, and the keys that it meets one by one


def polynomial_tangent(spec: KernelSpec) -> Any:
    """The tangent of a kernel's operation, by `register_attention`'s arguments."""

    def run(
        tangents: Sequence[Any], inputs: Sequence[Any], saved: Sequence[Tensor], exact_below: int
    ) -> Tensor:
        out, denominator, maximum = saved
        short = is_short(inputs, exact_below)
        if short and not spec.own:
            return exact_tangent(
                tangents, inputs, out, denominator, spec.scale, spec.causal, spec.near or 0, 0
            )
        return _tangent(spec, tangents, inputs, out, denominator, maximum, short)

    sight = Sight(spec.causal, degree=spec.degree)
    return guarded_tangent(selective_tangent(run, sight), spec.scale, spec.causal, spec.near or 0)


def _tangent(
    spec: KernelSpec,
    tangents: Sequence[Tensor],
    inputs: Sequence[Any],
    out: Tensor,
    denominator: Tensor,
    maximum: Tensor,
    dense: bool,
) -> Tensor:
    """The tangent of out [B, H, n, dv], from those of the floating inputs; dense: all pairs are met one by one."""
    q, k, v, near_q, near_k, log_gate, mask, documents = inputs
    dtype = torch.float64 if spec.precision == "float64" else compute_dtype(q, k, v)
    heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    rank, width = 0 if dense else spec.rank, v.shape[-1] + 1
    window = (k.shape[2] if dense else TILE + 3 * (spec.near or 0)) * (2 if spec.forget else 1)
    tile, row_bytes = plan_tiles(
        TILE, groups, 2 * window, 6 * rank + 6 * width, 6 * rank * width, dtype.itemsize
    )
    runs = None if documents is None else document_runs(documents)
    gates = None
    if log_gate is not None:
        masks = log_gate, mask, documents
        gates = log_decay(*masks), log_decay_tangent(tangents[5], *masks)

    def by_key_head(x: Tensor) -> Tensor:
        grouped: Tensor = x.unflatten(1, (heads, -1))
        return grouped

    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    for rows in row_groups(k.shape[0], heads, row_bytes):
        near = None
        if near_q is not None and near_k is not None:
            near = (
                (by_key_head(near_q)[rows].to(dtype), by_key_head(tangents[3])[rows].to(dtype)),
                (near_k[rows].to(dtype), tangents[4][rows].to(dtype)),
            )
        total = _Rows(
            spec,
            tile,
            dense,
            (by_key_head(q)[rows].to(dtype), by_key_head(tangents[0])[rows].to(dtype)),
            (k[rows].to(dtype), tangents[1][rows].to(dtype)),
            (v[rows].to(dtype), tangents[2][rows].to(dtype)),
            near,
            by_key_head(maximum)[rows].to(dtype) if spec.near else None,
            None if mask is None else mask[rows[0]],
            None if runs is None else runs[rows[0]],
            None if gates is None else _Gates(Decays(gates[0][rows], dtype), gates[1][rows]),
        ).total()
        share = inverse(by_key_head(denominator)[rows].to(dtype)).unsqueeze(-1)
        moved = (total[..., :-1] - by_key_head(out)[rows] * total[..., -1:]) * share
        by_key_head(result)[rows] = moved.to(out.dtype)
    return result


@dataclass(frozen=True)
class _Gates:
    """The decays of some rows, and the tangents [b, h, n] of their sums.

    Each function gives factors e^x and their rates dx, so that the tangent of a factor is e^x dx; of pairs it gives x.
    """

    decays: Decays
    moved: Tensor

    def between(self, first: int, last: int) -> Pair:
        """[b, h, 1, 1] each: from one token to a later one."""
        rates = self.moved[:, :, last] - self.moved[:, :, first]
        return self.decays.between(first, last)[:, :, None, None], self._like(rates)[:, :, None, None]

    def until(self, token: int, keys: slice) -> Pair:
        """[b, h, t, 1] each: from keys to a token after them."""
        rates = self.moved[:, :, token, None] - self.moved[:, :, keys]
        return self.decays.until(token, keys).unsqueeze(-1), self._like(rates).unsqueeze(-1)

    def since(self, token: int, queries: slice) -> Pair:
        """[b, h, 1, t, 1] each: from a token to the queries after it."""
        rates = self.moved[:, :, queries] - self.moved[:, :, token, None]
        return self.decays.since(token, queries)[:, :, None, :, None], self._like(rates)[:, :, None, :, None]

    def pairs(self, queries: slice, keys: slice) -> Pair:
        """[b, h, 1, t, keys] each: G_i - G_j and its tangent."""
        rates = self.moved[:, :, queries, None] - self.moved[:, :, None, keys]
        return self.decays.log_pairs(queries, keys).unsqueeze(2), self._like(rates).unsqueeze(2)

    def _like(self, rates: Tensor) -> Tensor:
        return rates.to(self.decays.dtype)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a call: queries [b, h, G, n, ..], keys and values [b, h, m, ..], maximum [b, h, G, n], the rest
    [b, tokens].
    """

    spec: KernelSpec
    tile: int
    dense: bool  # each window is all that a query may see
    q: Pair
    k: Pair
    v: Pair
    near: tuple[Pair, Pair] | None  # queries and keys of near logits
    maximum: Tensor | None
    mask: Tensor | None
    runs: Tensor | None
    gates: _Gates | None
    state: list[Tensor] = field(default_factory=list)  # W Z and W dZ, [b, h, rank, dv + 1]

    @property
    def n(self) -> int:
        """Queries."""
        return self.q[0].shape[3]

    @property
    def m(self) -> int:
        """Keys."""
        return self.k[0].shape[2]

    def total(self) -> Tensor:
        """[b, h, G, n, dv + 1]: the tangents of N and D, in units of e^maximum."""
        q, v = self.q[0], self.v[0]
        total = q.new_zeros((*q.shape[:-1], v.shape[-1] + 1))
        windows = list(self._windows())
        if not self.dense:
            self._add_earlier(total, windows)
        if self.spec.two_sided and not self.dense:
            self._add_later(total, windows)
        if self.maximum is not None:
            total *= far_decay(self.maximum).unsqueeze(-1)
        for queries, (low, high) in windows:
            if low < high:
                total[:, :, :, queries] += self._met(queries, slice(low, high))
        return total

    def _add_earlier(self, total: Tensor, windows: list[Window]) -> None:
        """What the keys before each window add."""
        self._restart()
        start = 0
        for queries, (low, _) in windows:
            if start < low:
                self._absorb(start, low, old=start - 1, own=low - 1)
                start = low
            if low:
                total[:, :, :, queries] += self._read(queries, low - 1)

    def _add_later(self, total: Tensor, windows: list[Window]) -> None:
        """What the keys after each window add."""
        self._restart()
        stop = self.m
        for queries, (_, high) in reversed(windows):
            if high < stop:
                self._absorb(high, stop, old=stop, own=high)
                stop = high
            if high < self.m:
                total[:, :, :, queries] += self._read(queries, high)

    def _windows(self) -> Iterator[Window]:
        """Tiles of queries, and the keys [low, high) that each meets one by one; the rest reach it by a state."""
        near, n, m = self.spec.near, self.n, self.m
        for first in range(0, n, self.tile):
            last = min(first + self.tile, n)
            low, high = first, last
            if self.dense:
                low, high = 0, m
            elif near:
                low, high = (first // near - 1) * near, ((last - 1) // near + 2) * near
            elif self.spec.total:
                low = high = m
            if self.spec.causal:
                high = last
            yield slice(first, last), (min(m, max(0, low)), min(m, high))

    # ------------------------------------------------------------ states

    def _restart(self) -> None:
        k, v = self.k[0], self.v[0]
        shape = (*k.shape[:2], self.spec.rank, v.shape[-1] + 1)
        self.state[:] = [k.new_zeros(shape), k.new_zeros(shape)]

    def _absorb(self, first: int, last: int, old: int, own: int) -> None:
        """Add the keys [first, last); of documents only that of token `own` stays, where `old` was the one before."""
        state, moved = self.state
        factors = state.new_tensor(weights(self.spec.d, folded_coefficients(self.spec)))[:, None]
        if self.runs is not None:
            left = self.runs[:, own] != self.runs[:, min(max(old, 0), self.m - 1)]
            for x in self.state:
                x.masked_fill_(left[:, None, None, None], 0.0)
        if self.gates is not None:
            decay, slope = self.gates.between(max(old, 0), own)
            moved.add_(state * slope).mul_(decay)
            state.mul_(decay)
        for start in range(first, last, self.tile):
            part = slice(start, min(start + self.tile, last))
            shown = None if self.mask is None else self.mask[:, part]
            if self.runs is not None:
                of_own = of_document(self.runs, part.start, part.stop, own)
                shown = of_own if shown is None else shown & of_own
            phi, dphi = self._features(*(x[:, :, part] for x in self.k))
            values, dvalues = self._values(part, shown)
            if self.gates is not None:
                decay, slope = self.gates.until(own, part)
                values, dvalues = values * decay, (dvalues + values * slope) * decay
            state += factors * (phi @ values)
            moved += factors * (dphi @ values + phi @ dvalues)

    def _read(self, queries: slice, token: int) -> Tensor:
        """[b, h, G, t, dv + 1]: what the state adds to the tangents of N and D; for the document of `token` alone."""
        phi, dphi = self._features(*(x[:, :, :, queries].flatten(2, 3) for x in self.q))
        groups = self.q[0].shape[2]
        sums = dphi.mT @ self.state[0] + phi.mT @ self.state[1]
        found: Tensor = sums.unflatten(2, (groups, -1))
        if self.gates is not None:
            decay, slope = self.gates.since(token, queries)
            plain = (phi.mT @ self.state[0]).unflatten(2, (groups, -1))
            found = (found + plain * slope) * decay
        if self.runs is not None:
            own = of_document(self.runs, queries.start, queries.stop, token)
            found = found.masked_fill(~own[:, None, None, :, None], 0.0)
        return found

    def _features(self, x: Tensor, dx: Tensor) -> Pair:
        """phi and its tangent, [b, h, rank, t], of x and dx [b, h, t, d]."""
        d = x.shape[-1]
        phi, dphi = (x.new_empty((*x.shape[:2], self.spec.rank, x.shape[2])) for _ in range(2))
        phi[:, :, 0], dphi[:, :, 0] = 1.0, 0.0
        phi[:, :, 1 : 1 + d], dphi[:, :, 1 : 1 + d] = x.mT, dx.mT
        for block in blocks(d, self.spec.degree):
            target = slice(*block.target)
            factor, dfactor = (f[:, :, 1 + block.index, None] for f in (phi, dphi))
            source, dsource = (f[:, :, slice(*block.source)] for f in (phi, dphi))
            torch.mul(factor, source, out=phi[:, :, target])
            torch.mul(dfactor, source, out=dphi[:, :, target]).addcmul_(factor, dsource)
        return phi, dphi

    def _values(self, keys: slice, shown: Tensor | None) -> Pair:
        """[v, 1] and its tangent [dv, 0], [b, h, t, dv + 1]; zeros where not `shown`, bool [b, t]."""
        pair = [
            torch.nn.functional.pad(x[:, :, keys], (0, 1), value=one)
            for x, one in zip(self.v, (1.0, 0.0), strict=True)
        ]
        if shown is not None:
            pair = [x.masked_fill(~shown[:, None, :, None], 0.0) for x in pair]
        return pair[0], pair[1]

    # ------------------------------------------------------------ pairs

    def _met(self, queries: slice, keys: slice) -> Tensor:
        """[b, h, G, t, dv + 1]: what the keys that are met one by one add to the tangents of N and D."""
        shown = None if self.mask is None else self.mask[:, keys]
        values, dvalues = self._values(keys, shown)
        scores, slopes = self._products(self.q, self.k, queries, keys)
        coefficients = folded_coefficients(self.spec)
        weights = horner(coefficients, scores, out=torch.empty_like(scores))
        dweights = horner(derivative(coefficients), scores, out=torch.empty_like(scores)) * slopes
        if self.gates is not None:
            logs, rates = self.gates.pairs(queries, keys)
            decay = logs.exp()
            weights, dweights = weights * decay, (dweights + weights * rates) * decay
        if self.spec.near is not None and self.maximum is not None:
            largest = self.maximum[:, :, :, queries, None]
            if self.near is not None:
                local, dlocal = self._products(*self.near, queries, keys)
            else:
                local, dlocal = scores * self.spec.scale, slopes * self.spec.scale
            if self.gates is not None:
                local, dlocal = local + logs, dlocal + rates
            near, decay = self._near(queries, keys, self.spec.near), far_decay(largest)
            exponentials = (local - largest).masked_fill(~near, 0.0).exp()
            weights = torch.where(near, exponentials, weights * decay)
            dweights = torch.where(near, exponentials * dlocal, dweights * decay)
        hidden = self._hidden(queries, keys, shown)
        if hidden is not None:
            weights, dweights = (x.masked_fill(hidden, 0.0) for x in (weights, dweights))
        return dweights @ values[:, :, None] + weights @ dvalues[:, :, None]

    def _products(self, q: Pair, k: Pair, queries: slice, keys: slice) -> Pair:
        """q.k and its tangent, [b, h, G, t, keys]."""
        (x, dx), (y, dy) = ([a[:, :, :, queries] for a in q], [a[:, :, None, keys] for a in k])
        return x @ y.mT, dx @ y.mT + x @ dy.mT

    def _near(self, queries: slice, keys: slice, block: int) -> Tensor:
        """bool [t, keys]: blocks that are one or touch."""
        own, other = (
            torch.arange(x.start, x.stop, device=self.q[0].device).div(block, rounding_mode="floor")
            for x in (queries, keys)
        )
        return (own[:, None] - other).abs() <= 1

    def _hidden(self, queries: slice, keys: slice, shown: Tensor | None) -> Tensor | None:
        """bool, [b, h, G, t, keys] or broadcast to it: pairs that a query does not see; None without such."""
        found = []
        if self.spec.causal:
            own, other = (torch.arange(x.start, x.stop, device=self.q[0].device) for x in (queries, keys))
            found.append(other > own[:, None])
        if self.runs is not None:
            found.append(~same_document(self.runs, queries, keys))
        if shown is not None:
            found.append(~shown[:, None, None, None])
        return reduce(torch.logical_or, found) if found else None
