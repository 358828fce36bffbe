"""The pairs of polynomial attention that are met one by one: weights of a tile of queries and the keys of its window.

Without a near field a pair weighs p(s), s = q.k. With one it weighs exp(t - m) where it is near and e^-m p(s) where it
is far, m being the row's maximum (docs/mathematics.md, section 5). With forget gates G_i - G_j is added to t, and p(s)
is times its exponential (section 12). Scores and weights are (rows, width, keys).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention_op import Floats
from .documents import same_document
from .polynomial_features import (
    Features,
    add_rows,
    derivative,
    far_decay,
    horner,
    load_tokens,
    load_values,
    near_and_far,
    row_maximum,
    store_tokens,
)
from .polynomial_rows import Rows, Tile


class Window:
    """A tile of queries and the keys that it meets: `values` [v, 1], and of what the kernel asks for

    * `scores` q.k, where a pair may weigh p(s) or where t = SCALE s;
    * `local`, t, -inf where a pair is not near or hidden, with a near field;
    * `hidden`, bool, which pairs of the last keys weigh no p(s), as many as it has columns; None where all weigh it;
    * `decay` [b, h, 1, t, keys], e^(G_i - G_j) where a pair may weigh p(s), None without forget gates.
    """

    scores: Tensor
    local: Tensor
    hidden: Tensor | None
    decay: Tensor | None = None

    def __init__(self, rows: Rows, tile: Tile, features: Features) -> None:
        spec, work, inputs = rows.spec, rows.work, rows.inputs
        self.rows, self.tile, self.features = rows, tile, features
        # a pair of a window may be far
        self.mixed = spec.near is not None and (rows.dense or spec.near % rows.size != 0)
        mask = None if inputs.mask is None else inputs.mask[:, tile.low : tile.high]
        self.values = load_values(work, inputs.v[tile.keys], mask)
        if spec.near_d is None or self.mixed:
            self.keys = load_tokens(work, "keys", inputs.k[tile.keys])
            self.scores = self.take("scores")
            torch.bmm(features.x.mT, self.keys.mT, out=self.scores)
        logs = None
        if rows.decays is not None:
            logs = rows.decays.log_pairs(tile.queries, tile.of_keys).unsqueeze(2)
        if spec.near is None:
            self._hide()
        else:
            self._load_local(logs)
        if logs is not None and (spec.near is None or self.mixed):
            self.decay = logs.exp_()

    def take(self, name: str) -> Tensor:
        """A buffer (rows, width, keys)."""
        return self.rows.work.take(name, self.rows.count, self.tile.width, self.tile.high - self.tile.low)

    def by_head(self, pairs: Tensor) -> Tensor:
        """(rows, width, keys) as [b, h, G, t, keys]."""
        rows, tile = self.rows, self.tile
        return pairs.view(*rows.heads, rows.groups, tile.last - tile.first, tile.high - tile.low)

    def _future(self) -> Tensor:
        """bool [t, t]: the last t keys of a causal window are its queries, which see no later ones."""
        size = self.tile.last - self.tile.first
        return self.rows.future[:size, :size]

    def _visible(self) -> Tensor | None:
        """bool [b, 1, 1, t, keys]: pairs of one document; None without documents."""
        if self.rows.runs is None:
            return None
        return same_document(self.rows.runs, self.tile.queries, self.tile.of_keys)

    def _hide(self) -> None:
        visible, causal = self._visible(), self.rows.spec.causal
        if visible is None:
            self.hidden = self._future() if causal else None
            return
        self.hidden = ~visible
        if causal:
            self.hidden[..., self.tile.first - self.tile.low :].logical_or_(self._future())

    def _load_local(self, logs: Tensor | None) -> None:
        spec, work, inputs, tile = self.rows.spec, self.rows.work, self.rows.inputs, self.tile
        self.local = self.take("local")
        if inputs.near_q is None or inputs.near_k is None:
            torch.mul(self.scores, spec.scale, out=self.local)
        else:
            self.near_queries = load_tokens(work, "near_queries", inputs.near_q[tile.here])
            self.near_keys = load_tokens(work, "near_keys", inputs.near_k[tile.keys])
            torch.bmm(self.near_queries, self.near_keys.mT, out=self.local)
        tiled, visible = self.by_head(self.local), self._visible()
        if logs is not None:
            tiled.add_(logs)
        if self.mixed:
            assert spec.near is not None
            queries, keys = range(tile.first, tile.last), range(tile.low, tile.high)
            is_near, is_far = near_and_far(queries, keys, spec.near, spec.causal, work.device)
            tiled.masked_fill_(~is_near, -math.inf)
            self.hidden = ~(is_far if visible is None else is_far & visible)
        if visible is not None:
            tiled.masked_fill_(~visible, -math.inf)
        if spec.causal:
            tiled[..., tile.first - tile.low :].masked_fill_(self._future(), -math.inf)
        if inputs.mask is not None:
            shown = inputs.mask[:, None, tile.low : tile.high]
            of_batch = (shown.shape[0], self.rows.heads[1] * tile.width, shown.shape[-1])
            self.local.view(of_batch).masked_fill_(~shown, -math.inf)


def pair_weights(window: Window, name: str = "attention_weights") -> Tensor:
    """p(s) times the decay, and 0 where a pair is hidden, in the buffer of that name."""
    return _select(window, horner(window.rows.coefficients, window.scores, out=window.take(name)))


def _select(window: Window, pairs: Tensor) -> Tensor:
    """(rows, width, keys) of p(s) times the decay in place, 0 where a pair is hidden."""
    tiled = window.by_head(pairs)
    if window.decay is not None:
        tiled.mul_(window.decay)
    if window.hidden is not None:
        tiled[..., -window.hidden.shape[-1] :].masked_fill_(window.hidden, 0.0)
    return pairs


def near_weights(window: Window, total: Tensor) -> tuple[Tensor, Tensor]:
    """exp(t - m) and m, (rows, width, 1); `total` [N, D] of the far keys comes to be in units of e^m.

    What is far in the window is added to it first.
    """
    if window.mixed:
        total.baddbmm_(pair_weights(window, "far_weights"), window.values)
    largest = window.rows.work.take("largest", window.rows.count, window.tile.width, 1)
    row_maximum(window.local, total[..., -1:], out=largest)
    weights = window.local.sub_(largest).exp_()
    total.mul_(far_decay(largest))
    return weights, largest


def load_maximum(rows: Rows, tile: Tile, maximum: Tensor) -> Tensor:
    """m of a tile's queries, (rows, width, 1), from [b, h, G, n]."""
    largest = rows.work.take("largest", rows.count, tile.width, 1)
    saved = maximum[tile.here]
    largest.view(saved.shape).copy_(saved)
    return largest


# ---------------------------------------------------------------- gradients


def pair_gradients(window: Window, upstream: Tensor, query_gradient: Tensor, gradients: Floats) -> None:
    """Without a near field: add what the pairs of a window give, to `query_gradient` (rows, d, width), dK and dV.

    upstream (rows, width, dv + 1): u~.
    """
    weights, keys = pair_weights(window), window.tile.keys
    add_rows(torch.bmm(weights.mT, upstream), gradients.v[keys])
    weight_gradient = torch.bmm(upstream, window.values.mT, out=window.take("weight_gradient"))
    if (sums := gradients.log_gate) is not None:
        _add_gates(window, weights.mul_(weight_gradient), sums)
    slope = horner(derivative(window.rows.coefficients), window.scores, out=weights)
    _pull_scores(window, _select(window, slope.mul_(weight_gradient)), query_gradient, gradients)


def near_gradients(
    window: Window,
    upstream: Tensor,
    far: Tensor,
    largest: Tensor,
    query_gradient: Tensor,
    gradients: Floats,
) -> None:
    """The same with a near field, and dnear_q and dnear_k; far: u~ e^-m; largest (rows, width, 1): m."""
    spec, tile = window.rows.spec, window.tile
    near = window.local.sub_(largest).exp_()
    add_rows(torch.bmm(near.mT, upstream), gradients.v[tile.keys])
    weight_gradient = window.take("weight_gradient")
    torch.bmm(upstream, window.values.mT, out=weight_gradient)
    near.mul_(weight_gradient)  # now the gradient of t
    if (sums := gradients.log_gate) is not None:
        _add_gates(window, near, sums)
    score_gradient = None
    if window.mixed:
        score_gradient = _far_gradient(window, far, weight_gradient, far_decay(largest), gradients)
    if gradients.near_q is not None and gradients.near_k is not None:
        store_tokens(torch.bmm(window.near_keys.mT, near.mT), gradients.near_q[tile.here])
        add_rows(torch.bmm(near.mT, window.near_queries), gradients.near_k[tile.keys])
    elif score_gradient is None:
        score_gradient = near.mul_(spec.scale)
    else:
        score_gradient.add_(near, alpha=spec.scale)
    if score_gradient is not None:
        _pull_scores(window, score_gradient, query_gradient, gradients)


def _far_gradient(
    window: Window, far: Tensor, weight_gradient: Tensor, decay: Tensor, gradients: Floats
) -> Tensor:
    """The gradient of q.k from far pairs; adds what they give dV."""
    weights = pair_weights(window, "far_weights")
    add_rows(torch.bmm(weights.mT, far), gradients.v[window.tile.keys])
    if (sums := gradients.log_gate) is not None:
        _add_gates(window, weights.mul_(weight_gradient).mul_(decay), sums)
    slope = horner(derivative(window.rows.coefficients), window.scores, out=weights)
    return _select(window, slope.mul_(weight_gradient).mul_(decay))


def _add_gates(window: Window, products: Tensor, sums: Tensor) -> None:
    """dG [b, h, n] += what the pairs of a window give; products (rows, width, keys): weights times their gradients."""
    tiled = window.by_head(products)
    sums[:, :, window.tile.queries].add_(tiled.sum((2, 4)))
    sums[:, :, window.tile.of_keys].sub_(tiled.sum((2, 3)))


def _pull_scores(window: Window, score_gradient: Tensor, query_gradient: Tensor, gradients: Floats) -> None:
    """Add what the gradient of q.k (rows, width, keys) gives to `query_gradient` and dK."""
    query_gradient.baddbmm_(window.keys.mT, score_gradient.mT)
    add_rows(torch.bmm(score_gradient.mT, window.features.x.mT), gradients.k[window.tile.keys])
