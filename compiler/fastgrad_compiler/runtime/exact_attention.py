"""Exact softmax attention in blocks of queries: the reference of every polynomial kernel, at any length.

    a_ij = exp(s_ij), s = scale * q.k          everywhere, or
    a_ij = exp(t_ij) near, exp(s_ij) far       with a near field: t = near_q.near_k, near: |i//w - j//w| <= 1

and with forget gates times e^(G_i - G_j) (docs/mathematics.md, sections 5 and 12). O(n * rows) memory, never n x n. A
block of queries visits only the keys that it may see: with a window of w O(n w) work, with documents O(n * longest).
Where PyTorch has a fused kernel for the case, its forward and backward are called directly, because autograd is off
inside a custom operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_op import (
    INPUTS,
    Floats,
    Inputs,
    call_attention,
    check_inputs,
    compute_dtype,
)
from .content_name import content_name, read_beside
from .decay import gate_gradient, log_decay_tangent
from .exact_blocks import Block, Seen, blocks
from .operation import register_attention
from .selection import select_backward, select_forward, select_tangent
from .sight import Sight


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None = None,
    near_k: Tensor | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    *,
    log_gate: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    near: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Softmax attention whose near logits may be others than its far ones; differentiable once.

    q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv], H a multiple of Hk; near_q [.., H, n, near_d], near_k
    [.., Hk, m, near_d], already scaled; mask bool [.., m], True for a real token; documents: integers [.., n], of which
    a token sees its own run of equal ones; scale: 1 / sqrt(d) by default; near: block size w; window: |i - j| < window
    for all pairs; log_gate [.., Hk, n], at most 0, needs `causal`: the weight of a pair is times e^(its sum over the
    tokens after the key, up to the query). Returns [.., H, n, dv] in the dtype of v; 0 for a query that sees no key.
    ValueError on wrong shapes.
    """
    inputs = Inputs(q, k, v, near_q, near_k, log_gate, mask, documents)
    check_inputs(inputs, causal)
    if near_q is not None and near is None:
        raise ValueError("near_q and near_k need a block size `near`")
    if near is not None and near < 1:
        raise ValueError(f"near is a block size of at least 1, not {near}")
    if window is not None and window < 1:
        raise ValueError(f"window is a width of at least 1, not {window}")
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    attributes = (factor, causal, near or 0, window or 0)
    return call_attention(OPERATION, inputs, *attributes)


def exact_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    log_gate: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    scale: float,
    causal: bool,
    near: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, n, dv], logsumexp [B, H, n] and an empty tensor; near and window are 0 where there is none."""
    dtype = compute_dtype(q, k, v)
    none = q.new_empty((0,), dtype=dtype)
    if (scale > 0 or not causal) and _fused(q, (near_q, log_gate, mask, documents), window):
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_padded(q, k, v), 0.0, causal, scale=scale
        )
        out, logsumexp = out[..., : v.shape[-1]].to(v.dtype).contiguous(), logsumexp.to(dtype).contiguous()
        _restore(out, logsumexp, Floats(q, k, v), Seen.of(Inputs(q, k, v), scale, causal, 0, 0))
        return out, logsumexp, none
    out = v.new_empty((*q.shape[:-1], v.shape[-1]))
    logsumexp = q.new_empty(q.shape[:-1], dtype=dtype)
    inputs = Inputs(q, k, v, near_q, near_k, log_gate, mask, documents)
    _fill(out, logsumexp, inputs.floats, Seen.of(inputs, scale, causal, near, window))
    return out, logsumexp, none


def _fill(out: Tensor, logsumexp: Tensor, inputs: Floats, seen: Seen) -> None:
    """Both results of all rows, block by block."""
    heads = inputs[1].shape[1]
    grouped_out, grouped_sum = out.unflatten(1, (heads, -1)), logsumexp.unflatten(1, (heads, -1))
    for block in blocks(inputs, seen):
        logits, _ = block.logits()
        total = torch.logsumexp(logits, -1)
        total.masked_fill_(total == -math.inf, 0.0)
        weights = logits.sub_(total.unsqueeze(-1)).exp_()
        grouped_sum[block.index] = total
        grouped_out[block.index] = torch.matmul(weights, block.v).to(out.dtype)


def _restore(out: Tensor, logsumexp: Tensor, inputs: Floats, seen: Seen) -> None:
    """Rows of NaN as blocks give them: the fused kernel takes up to 15 logits of NaN for hidden keys, and gives 0.

    Its logsumexp is 0 then. In bfloat16 it gives 0 also where logits are infinite.
    """
    lost = (logsumexp == 0) | ~logsumexp.isfinite()
    if not (lost.any() and (lost := lost & ~(out != 0).any(-1)).any()):
        return
    n = int(lost.any(0).any(0).nonzero().max()) + 1
    q, k, v = (inputs[0][:, :, :n], *(x[:, :, : n if seen.sight.causal else None] for x in inputs[1:3]))
    again, total = torch.empty_like(out[:, :, :n]), torch.empty_like(logsumexp[:, :, :n])
    again_seen = Seen.of(Inputs(q, k, v), seen.scale, seen.sight.causal, 0, 0)
    _fill(again, total, Floats(q, k, v), again_seen)
    lost = lost[:, :, :n]
    out[:, :, :n] = torch.where(lost.unsqueeze(-1), again, out[:, :, :n])
    logsumexp[:, :, :n] = torch.where(lost, total, logsumexp[:, :, :n])


def exact_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    log_gate: Tensor | None,
    mask: Tensor | None,
    documents: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    maximum: Tensor,
    scale: float,
    causal: bool,
    near: int,
    window: int,
) -> tuple[Tensor, ...]:
    """Gradients of the floating inputs; without elements for an input that is not there."""
    if (scale > 0 or not causal) and _fused(q, (near_q, log_gate, mask, documents), window):
        return _fused_backward(gradient, q, k, v, out, logsumexp, scale, causal)
    dtype = compute_dtype(q, k, v)
    heads = k.shape[1]
    given = Inputs(q, k, v, near_q, near_k, log_gate, mask, documents)
    inputs = given.floats
    dq, dk, dv, dnear_q, dnear_k = (
        gradient.new_empty((0,)) if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device)
        for x in inputs[:5]
    )
    across = None if log_gate is None else torch.zeros(log_gate.shape, dtype=torch.float64, device=q.device)
    grouped_dq = dq.unflatten(1, (heads, -1))
    gradient, out = gradient.unflatten(1, (heads, -1)), out.unflatten(1, (heads, -1))
    logsumexp = logsumexp.unflatten(1, (heads, -1))
    seen = Seen.of(given, scale, causal, near, window)
    for block in blocks(inputs, seen):
        logits, neighbours = block.logits()
        weights = logits.sub_(logsumexp[block.index].unsqueeze(-1)).exp_()
        upstream = gradient[block.index].to(dtype)
        delta = (upstream * out[block.index]).sum(-1, keepdim=True)
        dlogits = torch.matmul(upstream, block.v.mT).sub_(delta).mul_(weights)
        low = block.band.keys[0]
        keys = (*block.rows, slice(*block.band.keys))
        dv[keys] += torch.matmul(weights.mT, upstream).sum(2)
        if across is not None:
            across[(*block.rows, slice(low + 1, block.band.keys[1]))] += block.sums_across(dlogits)
        if neighbours is not None and block.near_q is not None and block.near_k is not None:
            columns, is_near = neighbours
            local = dlogits[..., columns]
            dnear = local * is_near
            local.masked_fill_(is_near, 0.0)
            near_keys = (*block.rows, slice(low + columns.start, low + columns.stop))
            dnear_q.unflatten(1, (heads, -1))[block.index] = torch.matmul(
                dnear, block.near_k[..., columns, :]
            )
            dnear_k[near_keys] += torch.matmul(dnear.mT, block.near_q).sum(2)
        dlogits.mul_(scale)
        grouped_dq[block.index] = torch.matmul(dlogits, block.k)
        dk[keys] += torch.matmul(dlogits.mT, block.q).sum(2)
    gradients = zip((dq, dk, dv, dnear_q, dnear_k), inputs, strict=False)
    found = (g if x is None else g.to(x.dtype) for g, x in gradients)
    if across is None or log_gate is None:
        return *found, gradient.new_empty((0,))
    return *found, gate_gradient(across, log_gate, mask, documents)


def exact_tangent(
    tangents: Sequence[Any],
    inputs: Sequence[Any],
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
    near: int,
    window: int,
) -> Tensor:
    """The tangent of out, from those of the floating inputs (None where there is no such input)."""
    given = Inputs(*inputs)
    heads = given.k.shape[1]
    grouped_out, logsumexp = out.unflatten(1, (heads, -1)), logsumexp.unflatten(1, (heads, -1))
    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    grouped = result.unflatten(1, (heads, -1))
    seen = Seen.of(given, scale, causal, near, window)
    moved_inputs = Floats(*tangents)
    gates = None
    if given.log_gate is not None and moved_inputs.log_gate is not None:
        gates = log_decay_tangent(moved_inputs.log_gate, given.log_gate, given.mask, given.documents)
    for block in blocks(given.floats, seen):
        moved = Block(moved_inputs, seen, block.rows, block.band)
        logits, neighbours = block.logits()
        weights = logits.sub_(logsumexp[block.index].unsqueeze(-1)).exp_()
        slopes = (torch.matmul(moved.q, block.k.mT) + torch.matmul(block.q, moved.k.mT)).mul_(scale)
        if neighbours is not None:
            columns, is_near = neighbours
            target = slopes[..., columns]
            target.copy_(torch.where(is_near, block.near_slopes(moved, columns), target))
        if gates is not None:
            own, other = (gates[(*block.rows, slice(*x))] for x in (block.band.queries, block.band.keys))
            slopes.add_((own.unsqueeze(-1) - other.unsqueeze(-2)).unsqueeze(2).to(slopes.dtype))
        slopes.mul_(weights)
        total = torch.matmul(slopes, block.v) + torch.matmul(weights, moved.v)
        total -= slopes.sum(-1, keepdim=True) * grouped_out[block.index]
        grouped[block.index] = total.to(result.dtype)
    return result


def _fused(q: Tensor, others: Sequence[Tensor | None], window: int) -> bool:
    """Whether PyTorch's fused kernel serves a call; it has no answer to a causal one whose scale is not above 0."""
    return q.device.type == "cpu" and all(x is None for x in others) and not window


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernel wants one dtype, one head count and one width; zeros change neither logits nor values.

    It also reads rows as if their numbers were neighbours in memory.
    """
    dtype = v.dtype if q.dtype == k.dtype == v.dtype else compute_dtype(q, k, v)
    width = max(q.shape[-1], v.shape[-1])
    groups = q.shape[1] // k.shape[1]

    def padded(x: Tensor, times: int) -> Tensor:
        x = _wide(x, dtype, width)
        return x.repeat_interleave(times, 1) if times > 1 else x

    return padded(q, 1), padded(k, groups), padded(v, groups)


def _wide(x: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """x with zeros up to a width, each row's numbers next to each other."""
    x = torch.nn.functional.pad(x.to(dtype), (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _fused_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    queries, keys, values = _padded(q, k, v)
    upstream, result = (_wide(x, values.dtype, values.shape[-1]) for x in (gradient, out))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        upstream, queries, keys, values, result, logsumexp, 0.0, causal, scale=scale
    )
    heads = k.shape[1]
    dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    none = q.new_empty((0,))
    shaped = (
        x[..., : like.shape[-1]].to(like.dtype).contiguous()
        for x, like in zip((dq, dk, dv), (q, k, v), strict=True)
    )
    return *shaped, none, none.clone(), none.clone()


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, attributes = inputs[:INPUTS], inputs[INPUTS:]
    return select_forward(exact_forward, given, attributes, _sight(*attributes), maximum=False)


def _backward(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    given, saved, attributes = inputs[:INPUTS], inputs[INPUTS:-4], inputs[-4:]
    return select_backward(exact_backward, gradient, given, saved, attributes, _sight(*attributes))


def _tangent(
    tangents: Sequence[Any], inputs: Sequence[Any], saved: Sequence[Tensor], *attributes: Any
) -> Tensor:
    out, logsumexp = saved[:2]
    return exact_tangent(tangents, inputs, out, logsumexp, *attributes)


def _moved(*arguments: Any) -> Tensor:
    attributes = arguments[-4:]
    return select_tangent(_tangent, arguments, _sight(*attributes))


def _sight(scale: float, causal: bool, near: int, window: int) -> Sight:
    return Sight(causal, window)


FILES = (
    "attention_op.py",
    "content_name.py",
    "decay.py",
    "documents.py",
    "exact_attention.py",
    "exact_blocks.py",
    "operation.py",
    "parted.py",
    "selection.py",
    "sight.py",
)  # what decides how the operation behaves: this file and those that it imports, and so on
OPERATION = register_attention(
    content_name("exact_attention", (read_beside(__spec__, file) for file in FILES)),
    ", float scale, bool causal, int near, int window",
    _forward,
    _backward,
    _moved,
    maximum=False,
)
