"""Dense n x n attention straight from its definition, for comparison: no chunk, no feature, no state.

It shares nothing with the kernels. Gradients are those of torch autograd; run it in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: Sequence[float],
    *,
    scale: float = 1.0,
    causal: bool = False,
    near: int | None = None,
    near_q: Tensor | None = None,
    near_k: Tensor | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    log_gate: Tensor | None = None,
) -> Tensor:
    """Weights p(s), s = scale * q.k; exp(t) where near; times e^(the sum of the gates of the tokens j + 1 .. i).

    q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv], mask [.., m], documents [.., n], log_gate [.., Hk, n]; near_q
    and near_k give t, already scaled.
    """
    scores = scale * q @ _heads(k, q).mT
    weights = sum(c * scores**power for power, c in enumerate(coefficients))
    assert isinstance(weights, Tensor)
    hidden = _hidden(scores, causal, window, mask, documents)
    return _attend(weights, scores, hidden, q, v, near, near_q, near_k, log_gate)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    near: int | None = None,
    near_q: Tensor | None = None,
    near_k: Tensor | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    window: int | None = None,
    log_gate: Tensor | None = None,
) -> Tensor:
    """The same with weights exp(s)."""
    scores = scale * q @ _heads(k, q).mT
    hidden = _hidden(scores, causal, window, mask, documents)
    return _attend(torch.exp(scores), scores, hidden, q, v, near, near_q, near_k, log_gate)


def _hidden(
    scores: Tensor, causal: bool, window: int | None, mask: Tensor | None, documents: Tensor | None
) -> Tensor:
    return hidden_pairs(scores.shape[-2], scores.shape[-1], causal, window, mask, documents)


def hidden_pairs(
    n: int, m: int, causal: bool, window: int | None, mask: Tensor | None, documents: Tensor | None
) -> Tensor:
    """True where one of n queries does not see one of m keys, broadcastable to the scores [.., H, n, m]."""
    distance = torch.arange(n)[:, None] - torch.arange(m)[None, :]
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    if mask is not None:
        hidden = hidden | ~mask[..., None, None, :]
    if documents is not None:
        hidden = hidden | _boundary_between(documents).unsqueeze(-3)
    return hidden


def _boundary_between(documents: Tensor) -> Tensor:
    """True where the ids change anywhere between tokens i and j: [.., n, n], row by row."""
    changed = (documents[..., 1:] != documents[..., :-1]).long()
    here = torch.zeros_like(documents[..., :1])
    rows = [
        torch.cat([changed[..., :i].flip(-1).cumsum(-1).flip(-1), here, changed[..., i:].cumsum(-1)], -1)
        for i in range(documents.shape[-1])
    ]
    return torch.stack(rows, -2) > 0


def _attend(
    weights: Tensor,
    scores: Tensor,
    hidden: Tensor,
    q: Tensor,
    v: Tensor,
    near: int | None,
    near_q: Tensor | None,
    near_k: Tensor | None,
    log_gate: Tensor | None,
) -> Tensor:
    i = torch.arange(weights.shape[-2])[:, None]
    j = torch.arange(weights.shape[-1])[None, :]
    if near is not None:
        local = scores if near_q is None or near_k is None else near_q @ _heads(near_k, q).mT
        weights = torch.where((i // near - j // near).abs() <= 1, torch.exp(local), weights)
    if log_gate is not None:
        weights = weights * _decays(_heads(log_gate.unsqueeze(-1), q).squeeze(-1), hidden)
    weights = torch.where(hidden, 0.0, weights)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, (weights / torch.where(total == 0, 1.0, total)) @ _heads(v, q))


def _decays(log_gate: Tensor, hidden: Tensor) -> Tensor:
    """e^(sum of log_gate [.., n] over the tokens j + 1 .. i), row by row, over the row's greatest, which has no effect.

    A row whose keys are all forgotten is thus what it tends to.
    """
    n = log_gate.shape[-1]
    row, rows, earlier = torch.zeros_like(log_gate), [], torch.arange(n)
    for i in range(n):
        row = torch.where(earlier < i, row + log_gate[..., i : i + 1].clamp(min=-1000.0), 0.0)
        rows.append(row)
    sums = torch.stack(rows, -2).masked_fill(hidden, -torch.inf)
    greatest = sums.detach().amax(-1, keepdim=True)
    return torch.exp(sums - torch.where(greatest == -torch.inf, 0.0, greatest))


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """Grouped-query heads: query head h uses key head h // (H / Hk)."""
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3)
