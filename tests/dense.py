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
) -> Tensor:
    """Weights p(s), s = scale * q.k; exp(t) where near.

    q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv], mask [.., m]; near_q and near_k give t, already scaled.
    """
    scores = scale * q @ _heads(k, q).mT
    weights = sum(c * scores**power for power, c in enumerate(coefficients))
    assert isinstance(weights, Tensor)
    return _attend(weights, scores, q, v, causal, near, near_q, near_k, mask)


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
) -> Tensor:
    """The same with weights exp(s)."""
    scores = scale * q @ _heads(k, q).mT
    return _attend(torch.exp(scores), scores, q, v, causal, near, near_q, near_k, mask)


def _attend(
    weights: Tensor,
    scores: Tensor,
    q: Tensor,
    v: Tensor,
    causal: bool,
    near: int | None,
    near_q: Tensor | None,
    near_k: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    i = torch.arange(weights.shape[-2])[:, None]
    j = torch.arange(weights.shape[-1])[None, :]
    if near is not None:
        local = scores if near_q is None or near_k is None else near_q @ _heads(near_k, q).mT
        weights = torch.where((i // near - j // near).abs() <= 1, torch.exp(local), weights)
    visible = (i >= j) if causal else torch.ones_like(weights[..., :, :], dtype=torch.bool)
    if mask is not None:
        visible = visible & mask[..., None, None, :]
    weights = torch.where(visible, weights, 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, 0.0, (weights / torch.where(total == 0, 1.0, total)) @ _heads(v, q))


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """Grouped-query heads: query head h uses key head h // (H / Hk)."""
    return x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3)
