"""The sweeps of polynomial attention along a sequence, in PyTorch's operations (docs/mathematics.md, sections 3 to 5).

Queries are handled a tile at a time. A tile meets the keys of its window one by one (`polynomial_pairs`) and the
others by a state (`polynomial_rows`), which moves along with it. The backward pass is the same with more states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_op import Floats
from .polynomial_features import (
    Features,
    add_tokens,
    far_decay,
    load_cotangent,
    store_output,
    store_tokens,
)
from .polynomial_pairs import (
    Window,
    load_maximum,
    near_gradients,
    near_weights,
    pair_gradients,
    pair_weights,
)
from .polynomial_rows import Rows, Sum, Tile


class Saved(NamedTuple):
    """Results of the forward pass, [b, h, G, n, dv] and twice [b, h, G, n]; maximum: of a near field."""

    out: Tensor
    denominator: Tensor
    maximum: Tensor


# ---------------------------------------------------------------- forward


def forward_rows(rows: Rows, saved: Saved) -> None:
    """Write out, the denominator and, with a near field, the maximum of some rows."""
    spec = rows.spec
    state = rows.sum("state")
    later = _later_keys(rows, state, saved) if rows.two_sided else None
    place = 0
    for tile in rows.tiles:
        rows.absorb(state, place, tile.low, token=tile.low - 1, old=place - 1)
        place = tile.low
        features = rows.queries(tile)
        total = rows.take_total(tile)
        if spec.causal and spec.near is None and not (spec.documents or spec.forget):
            window = Window(rows, tile, features)
            torch.bmm(pair_weights(window), window.values, out=total)
            total.baddbmm_(features.tokens, state.weighted)
        else:
            rows.read(state, features, tile, tile.low - 1, out=total)
            if later is not None:
                _add_later(rows, tile, total, later, saved.denominator)
            _add_window(rows, tile, features, total, saved.maximum)
        store_output(total, saved.out[tile.here], saved.denominator[tile.here])


def _later_keys(rows: Rows, state: Sum, saved: Saved) -> Tensor:
    """N of the far keys after each window, [b, h, G, n, dv], by a scan from the end; D waits in the denominator."""
    out, dv = saved.out, saved.out.shape[-1]
    partial = out if out.dtype == rows.work.dtype else torch.empty_like(out, dtype=rows.work.dtype)
    place = rows.m
    for tile in reversed(rows.tiles):
        rows.absorb(state, tile.high, place, token=tile.high, old=place)
        place = tile.high
        total = rows.read(state, rows.queries(tile), tile, tile.high, out=rows.take_total(tile))
        total = total.view(*rows.heads, rows.groups, tile.last - tile.first, dv + 1)
        partial[tile.here].copy_(total[..., :dv])
        saved.denominator[tile.here].copy_(total[..., dv])
    state.clear()
    return partial


def _add_later(rows: Rows, tile: Tile, total: Tensor, later: Tensor, denominator: Tensor) -> None:
    dv = later.shape[-1]
    far = total.view(*rows.heads, rows.groups, tile.last - tile.first, dv + 1)
    far[..., :dv].add_(later[tile.here])
    far[..., dv].add_(denominator[tile.here])


def _add_window(rows: Rows, tile: Tile, features: Features, total: Tensor, maximum: Tensor) -> None:
    """[N, D] of a tile += its window's; of a near field in units of e^maximum, which is written."""
    if rows.total:
        return
    window = Window(rows, tile, features)
    if rows.spec.near is None:
        total.baddbmm_(pair_weights(window), window.values)
        return
    weights, largest = near_weights(window, total)
    total.baddbmm_(weights, window.values)
    here = maximum[tile.here]
    here.copy_(largest.view(here.shape))


# ---------------------------------------------------------------- backward


def backward_rows(rows: Rows, gradient: Tensor, saved: Saved, gradients: Floats) -> None:
    """Add to the gradients of some rows, in two sweeps: from the left for the queries, from the right for the keys.

    gradient [b, h, G, n, dv]: of out. Of gates the gradient is that of `Decays.sums`.
    """
    state = rows.sum("state")
    other = rows.sum("other state") if rows.two_sided else None
    _from_the_left(rows, gradient, saved, gradients, state, other)
    if rows.dense:
        return
    state.clear()
    if other is not None:
        other.clear()
    _from_the_right(rows, gradient, saved, gradients, state, other)


def _cotangent(rows: Rows, tile: Tile, gradient: Tensor, saved: Saved) -> Tensor:
    return load_cotangent(rows.work, gradient[tile.here], saved.out[tile.here], saved.denominator[tile.here])


def _from_the_left(
    rows: Rows, gradient: Tensor, saved: Saved, gradients: Floats, keys: Sum, queries: Sum | None
) -> None:
    """dQ of the keys before each window and of those in it; dK, dV of the windows, and of the far queries before."""
    place, reached = 0, rows.tiles[0].high
    for tile in rows.tiles:
        rows.absorb(keys, place, tile.low, token=tile.low - 1, old=place - 1)
        place = tile.low
        if queries is not None:
            rows.key_gradients(queries, gradients, reached, tile.high, token=tile.first - 1)
            reached = tile.high
        features = rows.queries(tile)
        upstream = _cotangent(rows, tile, gradient, saved)
        far, largest = upstream, None
        if rows.spec.near is not None:
            largest = load_maximum(rows, tile, saved.maximum)
            far = rows.work.take("far_upstream", *upstream.shape)
            torch.mul(upstream, far_decay(largest), out=far)
        query_gradient = rows.pull(keys, tile, far, tile.low - 1, gradients.log_gate)
        if queries is not None:
            rows.add_queries(queries, features, tile, far, token=tile.last - 1, old=tile.first - 1)
        if largest is not None:
            window = Window(rows, tile, features)
            near_gradients(window, upstream, far, largest, query_gradient, gradients)
        elif not rows.total:
            pair_gradients(Window(rows, tile, features), upstream, query_gradient, gradients)
        store_tokens(query_gradient, gradients.q[tile.here])
    if queries is not None:
        rows.key_gradients(queries, gradients, reached, rows.m, token=rows.n - 1)


def _from_the_right(
    rows: Rows, gradient: Tensor, saved: Saved, gradients: Floats, queries: Sum, keys: Sum | None
) -> None:
    """dK and dV of the queries to come; dQ of the far keys after each window."""
    stop, reached = rows.tiles[-1].low, rows.m
    for tile in reversed(rows.tiles):
        rows.key_gradients(queries, gradients, tile.low, stop, token=tile.last)
        stop = tile.low
        if keys is not None:
            rows.absorb(keys, tile.high, reached, token=tile.high, old=reached)
            reached = tile.high
        features = rows.queries(tile)
        upstream = _cotangent(rows, tile, gradient, saved)
        if rows.spec.near is not None:
            upstream.mul_(far_decay(load_maximum(rows, tile, saved.maximum)))
        rows.add_queries(queries, features, tile, upstream, token=tile.first, old=tile.last)
        if keys is not None:
            add_tokens(rows.pull(keys, tile, upstream, tile.high), gradients.q[tile.here])
    rows.key_gradients(queries, gradients, 0, stop, token=0)
