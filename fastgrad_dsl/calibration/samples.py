"""Sampled rows of one attention, dense and in float64: its logits, and what polynomials in their place would cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_compiler.ir.masks import FORGET
from fastgrad_compiler.reference.attention_torch import (
    forgotten,
    near_mask,
    near_pairs,
    polynomial,
    visible_pairs,
)
from fastgrad_dsl.calibration.capture import Call

ENTRIES = 2**19  # of a matrix of scores: rows are sampled so that it has about as many
SCORES = 2  # the first gradients are those of the queries and keys that a polynomial takes


@dataclass(frozen=True)
class LocalErrors:
    """Sums of squares for each query head [H], of what a polynomial changes and of the exact values.

    `output`, `gradient`: squared differences; `output_size`, `gradient_size`: of the exact ones. Gradients are those of
    q, k, v (and of the near pairs' own queries and keys) as one vector, of the sampled rows. `scores`, `scores_size`:
    the same of the queries and keys that the polynomial itself takes, which near pairs with logits of their own do not.
    """

    output: Tensor
    output_size: Tensor
    gradient: Tensor
    gradient_size: Tensor
    scores: Tensor
    scores_size: Tensor

    def output_error(self, heads: Sequence[int]) -> float:
        """Relative L2 error of the output of some heads together."""
        return _share(self.output, self.output_size, heads)

    def gradient_error(self, heads: Sequence[int]) -> float:
        """Relative L2 error of the gradients of some heads together."""
        return _share(self.gradient, self.gradient_size, heads)

    def scores_error(self, heads: Sequence[int]) -> float:
        """Relative L2 error of the gradients of the polynomial's queries and keys, of some heads together."""
        return _share(self.scores, self.scores_size, heads)

    def __add__(self, other: LocalErrors) -> LocalErrors:
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return LocalErrors(*(one + two for one, two in pairs))


@dataclass(frozen=True)
class Sample:
    """Some queries of one attention against all keys. b: batch and leading dims, H: query heads, m: rows, n: keys.

    q [b, H, m, d] with the scale of the logits, k [b, H, n, d], v [b, H, n, dv], upstream [b, H, m, dv]; near_q,
    near_k the same of near pairs with logits of their own; visible and near (of the model's own near field) [b or 1, 1,
    m, n]; gates: what a forget gate adds to logits, near or far, [b, H, m, n] or a 0. Keys and values that a mask hides
    are 0: whatever padding holds decides nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    upstream: Tensor
    near_q: Tensor | None
    near_k: Tensor | None
    visible: Tensor
    near: Tensor
    gates: Tensor
    rows: Tensor

    def near_pairs(self, block: int | None) -> Tensor:
        """Pairs of the near field, the model's own or one of a block size."""
        if block is None or self.near_q is not None:
            return self.near
        return near_mask(self.rows, self.k.shape[-2], block)

    def logits(self, centre: Tensor | None = None) -> Tensor:
        """Of all pairs as a polynomial would serve them, [b, H, m, n]; `centre` [H, 1, d] is taken from the keys."""
        return self.q @ (self.k if centre is None else self.k - centre).mT

    def far(self, block: int | None) -> Tensor:
        """The visible pairs that a polynomial serves."""
        return self.visible & ~self.near_pairs(block)


def sample(call: Call, limit: int = ENTRIES, stretch: float = 1.0) -> Sample:
    """Evenly spaced queries, the last among them, so that scores have about `limit` entries; logits `stretch` times."""
    q, k = call.inputs[0], call.inputs[1]
    entries = max(1, q.shape[:-2].numel() * k.shape[-2])
    count = max(1, min(q.shape[-2], limit // entries))
    spaced = torch.linspace(q.shape[-2] - 1, 0, count, dtype=torch.float64).round().long().flip(0)
    return sample_rows(call, spaced, stretch)


def sample_rows(call: Call, rows: Tensor, stretch: float = 1.0) -> Sample:
    """The queries at `rows` (int64 [m]); logits that a polynomial serves are `stretch` times those of the call."""
    attention, given, gates = call.attention, call.by_role, torch.zeros((), dtype=torch.float64)
    q, k = given["q"], given["k"]
    rows = rows.to(q.device)
    hidden = torch.zeros(1, 1, k.shape[2], 1, dtype=torch.bool, device=q.device)
    if "padding" in given:
        hidden = ~given["padding"][:, None, :, None]
    groups = q.shape[1] // k.shape[1]

    if FORGET in given:
        gates = forgotten(given[FORGET].double().repeat_interleave(groups, 1), rows)

    def repeated(x: Tensor) -> Tensor:
        return x.double().masked_fill(hidden, 0.0).repeat_interleave(groups, 1)

    return Sample(
        q=q[:, :, rows].double() * (stretch * attention.scale),
        k=repeated(k),
        v=repeated(given["v"]),
        upstream=call.upstream[:, :, rows].double(),
        near_q=given["near_q"][:, :, rows].double() if attention.own_near else None,
        near_k=repeated(given["near_k"]) if attention.own_near else None,
        visible=visible_pairs(attention.mask, given, q.shape[2], k.shape[2], rows),
        near=near_pairs(attention, rows, k.shape[2]),
        gates=gates.to(q.device),
        rows=rows,
    )


@dataclass(frozen=True)
class Exact:
    """The exact weights, output and score gradients of a sample."""

    logits: Tensor
    output: Tensor
    of_weights: Tensor
    gradients: tuple[Tensor, ...]
    value_gradient: Tensor


def exact_rows(rows: Sample) -> Exact:
    """Softmax of the sampled rows, and its gradients given their upstream."""
    far = rows.logits()
    logits = far if rows.near_q is None else torch.where(rows.near, _near_logits(rows), far)
    weights = torch.softmax((logits + rows.gates).masked_fill(~rows.visible, -math.inf), -1).nan_to_num(0.0)
    of_weights = rows.upstream @ rows.v.mT
    scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
    return Exact(
        far, weights @ rows.v, of_weights, _gradients(rows, rows.k, scores), weights.mT @ rows.upstream
    )


def polynomial_errors(
    rows: Sample,
    exact: Exact,
    coefficients: Sequence[float],
    *,
    near: int | None,
    centre: Tensor | None = None,
) -> LocalErrors:
    """What a polynomial in place of exp does to the sampled rows, pairs of the near field left as they are."""
    pairs = rows.near_pairs(near)
    scores = exact.logits if centre is None else rows.logits(centre)
    local = (scores if rows.near_q is None else _near_logits(rows)) + rows.gates
    nearby = pairs & rows.visible
    top = local.masked_fill(~nearby, -math.inf).amax(-1, keepdim=True).clamp(min=0.0)
    damping = (rows.gates - top).exp()
    slope = [power * c for power, c in enumerate(coefficients)][1:] or [0.0]
    far = rows.visible & ~pairs
    close = torch.where(nearby, (local - top).exp(), 0.0)
    weights = close + torch.where(far, damping * polynomial(coefficients, scores), 0.0)
    total = weights.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    share = weights / total
    mean = (share * exact.of_weights).sum(-1, keepdim=True)
    slopes = (close + torch.where(far, damping * polynomial(slope, scores), 0.0)) / total
    keys = rows.k if centre is None else rows.k - centre
    gradients = _gradients(rows, keys, slopes * (exact.of_weights - mean), pairs)
    return _compare(exact, share @ rows.v, gradients, share.mT @ rows.upstream)


def _near_logits(rows: Sample) -> Tensor:
    assert rows.near_q is not None
    assert rows.near_k is not None
    return rows.near_q @ rows.near_k.mT


def _gradients(rows: Sample, keys: Tensor, scores: Tensor, pairs: Tensor | None = None) -> tuple[Tensor, ...]:
    """Of q and k (of the scaled q: one factor for both ways), and of the near ones where they are others."""
    if rows.near_q is None or rows.near_k is None:
        return scores @ keys, scores.mT @ rows.q
    close = torch.where(rows.near if pairs is None else pairs, scores, 0.0)
    far = scores - close
    return far @ keys, far.mT @ rows.q, close @ rows.near_k, close.mT @ rows.near_q


def _compare(
    exact: Exact, output: Tensor, gradients: Sequence[Tensor], value_gradient: Tensor
) -> LocalErrors:
    pairs = [*zip(gradients, exact.gradients, strict=True), (value_gradient, exact.value_gradient)]
    differences = torch.stack([_squares(found - wanted) for found, wanted in pairs])
    sizes = torch.stack([_squares(wanted) for _, wanted in pairs])
    return LocalErrors(
        _squares(output - exact.output),
        _squares(exact.output),
        differences.sum(0),
        sizes.sum(0),
        differences[:SCORES].sum(0),
        sizes[:SCORES].sum(0),
    )


def _share(squares: Tensor, sizes: Tensor, heads: Sequence[int]) -> float:
    chosen = torch.tensor(heads)
    size = sizes[chosen].sum().item()
    return math.sqrt(squares[chosen].sum().item() / size) if size else 0.0


def _squares(tensor: Tensor) -> Tensor:
    """Sums of squares for each head."""
    return tensor.square().sum((0, 2, 3))
