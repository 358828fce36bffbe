"""Dense definitions of masks, softmax, attention and polynomial attention, with all n x n scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrad_compiler.attention.value import Attention, Mask
from fastgrad_compiler.ir.graph import Node
from fastgrad_compiler.ir.masks import FORGET, LEAST_LOG_GATE
from fastgrad_compiler.reference.torch_env import Env
from fastgrad_compiler.runtime.sight import Sight


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


def forgotten(log_gate: Tensor, rows: Tensor) -> Tensor:
    """The sum of the log gates after key j up to query i: [.., n] gives [.., rows, n] of the queries `rows`."""
    total = log_gate.double().clamp(min=LEAST_LOG_GATE).cumsum(-1)
    place = torch.arange(log_gate.shape[-1], device=log_gate.device)
    sums = total[..., rows].unsqueeze(-1) - total.unsqueeze(-2)
    return sums.masked_fill(place >= rows[:, None], 0.0).to(log_gate.dtype)


def near_mask(rows: Tensor, m: int, block: int) -> Tensor:
    """True where |floor(i / block) - floor(j / block)| <= 1, for queries i of `rows` and keys j of m."""
    columns = torch.arange(m, device=rows.device)
    return (rows[:, None] // block - columns // block).abs() <= 1


def visible_pairs(
    mask: Mask, operands: Mapping[str, Tensor], n: int, m: int, rows: Tensor, rank: int = 4
) -> Tensor:
    """True where a mask lets queries `rows` of n see key j of m: bool, broadcast to scores [b, .., rows, m].

    operands: what the mask reads, by role; rank: of the scores.
    """
    ranges = Sight(mask.causal, mask.window or 0).ranges(n, m, operands.get("documents"), rows.device)
    seen = ~ranges.hidden_from(rows.expand(ranges.first.shape[0], -1))
    if mask.padding:
        seen = seen & operands["padding"][:, None]
    return seen.reshape(*seen.shape[:1], *[1] * (rank - 3), *seen.shape[1:]) if rank > 2 else seen[0]


def near_pairs(attention: Attention, rows: Tensor, m: int) -> Tensor:
    """True for near pairs of the queries `rows`, [rows, m]."""
    if attention.near is None:
        return torch.zeros(len(rows), m, dtype=torch.bool, device=rows.device)
    return near_mask(rows, m, attention.near)


@dataclass(frozen=True)
class _Scores:
    """An attention on tensors: its logits, those of near pairs, which pairs are near and which are seen.

    gates: what a forget gate adds to the logits of either.
    """

    attention: Attention
    given: Mapping[str, Tensor]  # by role; what query heads share once for each of them
    far: Tensor
    local: Tensor
    near: Tensor
    seen: Tensor
    gates: Tensor

    @staticmethod
    def of(node: Node, inputs: Sequence[Tensor]) -> _Scores:
        attention = Attention.of(node)
        given = attention.by_role(list(inputs))
        groups = given["q"].shape[-3] // given["k"].shape[-3]
        given |= {role: given[role].repeat_interleave(groups, 1) for role in _SHARED if role in given}
        far = attention.scale * (given["q"] @ given["k"].mT)
        local = given["near_q"] @ given["near_k"].mT if attention.own_near else far
        n, m = far.shape[-2:]
        rows = torch.arange(n, device=far.device)
        seen = visible_pairs(attention.mask, given, n, m, rows)
        gates = forgotten(given[FORGET], rows) if FORGET in given else far.new_zeros(())
        return _Scores(attention, given, far, local, near_pairs(attention, rows, m), seen, gates)


_SHARED = ("k", "v", "near_k", FORGET)


def _unlike(gradient: Tensor, shared: Tensor) -> Tensor:
    """The cotangent of what query heads share, [b, hk, ..], from that of each head's, [b, h, ..]."""
    grouped: Tensor = gradient.unflatten(1, (shared.shape[1], -1))
    return grouped.sum(2)


def _of_gate(gradient: Tensor, log_gate: Tensor) -> Tensor:
    """The cotangent of log gates [b, h, n] from that of what they add to the logits: gate t is in pairs j < t <= i."""
    past = gradient.tril()
    own = past.sum(-1) - past.sum(-2)
    running = own.flip(-1).cumsum(-1).flip(-1)
    return running.masked_fill(log_gate < LEAST_LOG_GATE, 0.0)


def attention(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    """softmax over the visible keys of near or far logits, times v: [b, h, n, dv]."""
    a = _Scores.of(node, inputs)
    scores = torch.where(a.near, a.local, a.far)
    if a.attention.alibi:
        scores = scores + alibi(scores)
    hidden = ~a.seen | (scores == -math.inf)
    return softmax((scores + a.gates).masked_fill(hidden, -math.inf)) @ a.given["v"]


def polynomial(coefficients: Sequence[float], s: Tensor) -> Tensor:
    """sum of c_j s^j."""
    result = torch.zeros_like(s)
    for coefficient in reversed(coefficients):
        result = result * s + coefficient
    return result


def _coefficients(a: _Scores) -> tuple[float, ...]:
    return a.attention.polynomial.coefficients if a.attention.polynomial else ()


def _weights(a: _Scores) -> tuple[Tensor, Tensor]:
    """a~ of docs/mathematics.md, sections 3 and 5, and e^(gates - m_i), which the far part carries.

    Gates are those of a row less the most of them, so that they lead no row to 0: a factor of a row cancels.
    """
    gates = a.gates.masked_fill(~a.seen, -math.inf)
    most = gates.amax(-1, keepdim=True).detach()
    gates = gates - most.masked_fill(most == -math.inf, 0.0)
    t = (a.local + gates).masked_fill(~(a.near & a.seen), -math.inf)
    top = t.amax(-1, keepdim=True).clamp(min=0.0)
    damping = (gates - top).exp()
    far = torch.where(a.seen & ~a.near, damping * polynomial(_coefficients(a), a.far), 0.0)
    return (t - top).exp() + far, damping


def _normaliser(weights: Tensor) -> Tensor:
    """D, and 1 for a query that sees no key."""
    total = weights.sum(-1, keepdim=True)
    return total.masked_fill((weights == 0).all(-1, keepdim=True), 1.0)


def poly_attention(node: Node, inputs: list[Tensor], env: Env) -> Tensor:
    """a~ v / D of docs/mathematics.md, sections 3 and 5: [b, h, n, dv]."""
    a = _Scores.of(node, inputs)
    weights, _ = _weights(a)
    return weights @ a.given["v"] / _normaliser(weights)


def poly_attention_backward(node: Node, inputs: list[Tensor], env: Env) -> tuple[Tensor, ...]:
    """Cotangents of the float inputs, docs/mathematics.md 4 and 5: m_i cancels, it has no gradient."""
    *given, cotangent = inputs
    a = _Scores.of(node, given)
    q, k, v = (a.given[role] for role in ("q", "k", "v"))
    weights, damping = _weights(a)
    total = _normaliser(weights)
    u = cotangent / total
    delta = (cotangent * (weights @ v / total)).sum(-1, keepdim=True) / total
    d_weights = u @ v.mT - delta

    slope = [j * c for j, c in enumerate(_coefficients(a))][1:]
    d_near = torch.where(a.near, d_weights * weights, 0.0)
    d_far = torch.where(a.seen & ~a.near, d_weights * damping * polynomial(slope, a.far), 0.0)
    own = a.attention.own_near
    d_scores = a.attention.scale * (d_far if own else d_far + d_near)

    results = [d_scores @ k, d_scores.mT @ q, weights.mT @ u]
    if own:
        results += [d_near @ a.given["near_k"], d_near.mT @ a.given["near_q"]]
    if FORGET in a.given:
        results.append(_of_gate(d_weights * weights, a.given[FORGET]))
    floats = [x for x in given if x.is_floating_point()]
    return tuple(_unlike(g, x) for g, x in zip(results, floats, strict=True))
