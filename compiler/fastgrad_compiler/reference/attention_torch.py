"""Dense definitions of masks, softmax, attention and polynomial attention, with all n x n scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.reference.torch_env import Env, integer, number, sequence
from fastgrad_compiler.runtime.documents import document_runs


def softmax(scores: Tensor, axis: int = -1) -> Tensor:
    """exp(s) / sum exp(s), zeros where all s are -inf."""
    top = scores.amax(axis, keepdim=True)
    weights = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
    total = weights.sum(axis, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def alibi(scores: Tensor) -> Tensor:
    """What `alibi` adds to scores [.., h, n, m]: [h, n, m]."""
    heads, n, m = scores.shape[-3:]
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64, device=scores.device) / heads)
    return (-slopes[:, None, None] * _distance(n, m, scores.device).abs()).to(scores.dtype)


def _distance(n: int, m: int, device: torch.device) -> Tensor:
    """i - j for each query i and key j."""
    return torch.arange(n, device=device)[:, None] - torch.arange(m, device=device)


def causal_mask(n: int, m: int, device: torch.device) -> Tensor:
    """True where j <= i."""
    return _distance(n, m, device) >= 0


def window_mask(n: int, m: int, width: int, device: torch.device) -> Tensor:
    """True where |i - j| < width."""
    return _distance(n, m, device).abs() < width


def near_mask(n: int, m: int, block: int, device: torch.device) -> Tensor:
    """True where |floor(i / block) - floor(j / block)| <= 1."""
    rows, columns = (torch.arange(size, device=device) // block for size in (n, m))
    return (rows[:, None] - columns).abs() <= 1


def padding_mask(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask [b, m] of keys as one of scores [b, .., n, m]."""
    return mask.reshape(mask.shape[0], *[1] * (scores.dim() - 2), mask.shape[1])


def documents_mask(ids: Tensor, scores: Tensor) -> Tensor:
    """True where query and key are of one run of equal ids: ids [b, n], scores [b, .., n, n]."""
    runs = document_runs(ids)
    same = runs[:, :, None] == runs[:, None, :]
    return same.reshape(ids.shape[0], *[1] * (scores.dim() - 3), *same.shape[1:])


@dataclass(frozen=True)
class _Attention:
    """The inputs of an attention node by role; shared heads of k and v are repeated."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra: Mapping[str, Tensor]
    scale: float
    near: int | None

    @staticmethod
    def of(node: Node, inputs: Sequence[Tensor]) -> _Attention:
        q, k, v, *rest = inputs
        extra = dict(zip(map(str, sequence(node["roles"])), rest, strict=True))
        k, v = _like(k, q), _like(v, q)
        if "near_k" in extra:
            extra["near_k"] = _like(extra["near_k"], extra["near_q"])
        near = node["near"]
        return _Attention(q, k, v, extra, number(node["scale"]), None if near is None else integer(near))

    def scores(self) -> Tensor:
        """scale q.k, [.., h, n, m]."""
        return self.scale * (self.q @ self.k.mT)

    def near_scores(self) -> Tensor:
        """The logits of near pairs: their own, or the same as the far ones'."""
        return self.extra["near_q"] @ self.extra["near_k"].mT if "near_q" in self.extra else self.scores()

    def near_pairs(self) -> Tensor:
        """True for near pairs, [n, m]."""
        n, m = self.q.shape[-2], self.k.shape[-2]
        if self.near is None:
            return torch.zeros(n, m, dtype=torch.bool, device=self.q.device)
        return near_mask(n, m, self.near, self.q.device)

    def visible(self, node: Node, scores: Tensor) -> Tensor:
        """True where the masks let a query see a key, broadcastable to the scores."""
        n, m = scores.shape[-2:]
        seen = torch.ones(n, m, dtype=torch.bool, device=scores.device)
        if node["causal"]:
            seen = seen & causal_mask(n, m, scores.device)
        width = node.get("window")
        if width is not None:
            seen = seen & window_mask(n, m, integer(width), scores.device)
        if "padding" in self.extra:
            seen = seen & padding_mask(self.extra["padding"], scores)
        if "documents" in self.extra:
            seen = seen & documents_mask(self.extra["documents"], scores)
        return seen


def _like(shared: Tensor, q: Tensor) -> Tensor:
    """Keys or values of shared heads, each head once for every query head that reads it."""
    if shared.dim() < 3 or q.dim() < 3:
        return shared
    return shared.repeat_interleave(q.shape[-3] // shared.shape[-3], -3)


def _unlike(gradient: Tensor, shared: Tensor) -> Tensor:
    """The cotangent of `shared` from that of `_like(shared, q)`."""
    if shared.dim() >= 3 and gradient.shape[-3] != shared.shape[-3]:
        gradient = gradient.unflatten(-3, (shared.shape[-3], -1)).sum(-3)
    return gradient.sum_to_size(shared.shape)


def attention(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    """softmax over the visible keys of near or far logits, times v: [.., h, n, dv]."""
    a = _Attention.of(node, inputs)
    scores = a.scores()
    if a.near is not None:
        scores = torch.where(a.near_pairs(), a.near_scores(), scores)
    if node["alibi"]:
        scores = scores + alibi(scores)
    return softmax(scores.masked_fill(~a.visible(node, scores), -math.inf)) @ a.v


def polynomial(coefficients: Sequence[float], s: Tensor) -> Tensor:
    """sum of c_j s^j."""
    result = torch.zeros_like(s)
    for coefficient in reversed(coefficients):
        result = result * s + coefficient
    return result


def _coefficients(node: Node) -> list[float]:
    return [number(value) for value in sequence(node["coefficients"])]


def _weights(node: Node, a: _Attention) -> tuple[Tensor, Tensor]:
    """a~ of docs/mathematics.md, sections 3 and 5, and e^-m_i, which the far part carries."""
    s = a.scores()
    seen, near = a.visible(node, s), a.near_pairs()
    t = a.near_scores().masked_fill(~(near & seen), -math.inf)
    top = t.amax(-1, keepdim=True).clamp(min=0.0)
    damping = (-top).exp()
    far = torch.where(seen & ~near, damping * polynomial(_coefficients(node), s), torch.zeros_like(s))
    return (t - top).exp() + far, damping


def _normaliser(weights: Tensor) -> Tensor:
    """D, and 1 for a query that sees no key."""
    total = weights.sum(-1, keepdim=True)
    return total.masked_fill((weights == 0).all(-1, keepdim=True), 1.0)


def poly_attention(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    """a~ v / D of docs/mathematics.md, sections 3 and 5: [.., h, n, dv]."""
    a = _Attention.of(node, inputs)
    weights, _ = _weights(node, a)
    return weights @ a.v / _normaliser(weights)


def poly_attention_backward(node: Node, inputs: list[Tensor], env: Env) -> tuple[Tensor, ...]:
    """Cotangents of the float inputs, docs/mathematics.md 4 and 5: m_i cancels, it has no gradient."""
    *given, cotangent = inputs
    a = _Attention.of(node, given)
    weights, damping = _weights(node, a)
    total = _normaliser(weights)
    u = cotangent / total
    delta = (cotangent * (weights @ a.v / total)).sum(-1, keepdim=True) / total
    d_weights = u @ a.v.mT - delta

    s = a.scores()
    near, seen = a.near_pairs(), a.visible(node, s)
    slope = [j * c for j, c in enumerate(_coefficients(node))][1:]
    d_near = torch.where(near, d_weights * weights, torch.zeros_like(s))
    d_far = torch.where(seen & ~near, d_weights * damping * polynomial(slope, s), torch.zeros_like(s))
    d_scores = a.scale * (d_far if "near_q" in a.extra else d_far + d_near)

    results = [d_scores @ a.k, d_scores.mT @ a.q, weights.mT @ u]
    if "near_q" in a.extra:
        results += [d_near @ a.extra["near_k"], d_near.mT @ a.extra["near_q"]]
    floats = [x for x in given if x.is_floating_point()]
    return tuple(_unlike(g, x) for g, x in zip(results, floats, strict=True))
