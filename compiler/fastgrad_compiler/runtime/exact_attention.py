"""Exact softmax attention in blocks of queries: the reference of every polynomial kernel, at any length.

    a_ij = exp(s_ij), s = scale * q.k          everywhere, or
    a_ij = exp(t_ij) near, exp(s_ij) far       with a near field: t = near_q.near_k, near: |i//w - j//w| <= 1

(docs/mathematics.md, section 5.) O(n * rows) memory, never n x n. Where PyTorch has a fused kernel for the case, its
forward and backward are called directly, because autograd is off inside a custom operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_op import (
    WORK_BYTES,
    call_attention,
    check_inputs,
    compute_dtype,
    register_attention,
    row_groups,
)

BUFFERS = 5  # live [rows, keys] tensors of a block, in the backward pass
LEAST_ROWS = 16


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None = None,
    near_k: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    near: int | None = None,
) -> Tensor:
    """Softmax attention whose near logits may be others than its far ones; differentiable once.

    q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv], H a multiple of Hk; near_q [.., H, n, near_d], near_k
    [.., Hk, m, near_d], already scaled; mask bool [.., m], True for a real token; scale: 1 / sqrt(d) by default; near:
    block size w. Returns [.., H, n, dv] in the dtype of v; 0 for a query that sees no key. ValueError on wrong shapes.
    """
    check_inputs(q, k, v, near_q, near_k, mask, causal)
    if near_q is not None and near is None:
        raise ValueError("near_q and near_k need a block size `near`")
    if near is not None and near < 1:
        raise ValueError(f"near is a block size of at least 1, not {near}")
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return call_attention(OPERATION, q, k, v, near_q, near_k, mask, factor, causal, near or 0)


def exact_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, n, dv], logsumexp [B, H, n] and an empty tensor."""
    dtype = compute_dtype(q, k, v)
    none = q.new_empty((0,), dtype=dtype)
    if _fused(q, mask, near_q):
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_padded(q, k, v), 0.0, causal, scale=scale
        )
        return out[..., : v.shape[-1]].to(v.dtype).contiguous(), logsumexp.to(dtype).contiguous(), none
    out = v.new_empty((*q.shape[:-1], v.shape[-1]))
    logsumexp = q.new_empty(q.shape[:-1], dtype=dtype)
    heads = k.shape[1]
    grouped_out, grouped_sum = out.unflatten(1, (heads, -1)), logsumexp.unflatten(1, (heads, -1))
    for block in _blocks(q, k, v, near_q, near_k, mask, causal):
        logits, _ = block.logits(scale, near)
        total = torch.logsumexp(logits, -1)
        total.masked_fill_(total == -math.inf, 0.0)
        weights = logits.sub_(total.unsqueeze(-1)).exp_()
        grouped_sum[block.index] = total
        grouped_out[block.index] = torch.matmul(weights, block.v).to(v.dtype)
    return out, logsumexp, none


def exact_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    maximum: Tensor,
    scale: float,
    causal: bool,
    near: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, near_q, near_k; without elements for an input that is not there."""
    if _fused(q, mask, near_q):
        return _fused_backward(gradient, q, k, v, out, logsumexp, scale, causal)
    dtype = compute_dtype(q, k, v)
    heads = k.shape[1]
    inputs = (q, k, v, near_q, near_k)
    dq, dk, dv, dnear_q, dnear_k = (
        gradient.new_empty((0,)) if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device)
        for x in inputs
    )
    grouped_dq = dq.unflatten(1, (heads, -1))
    gradient, out = gradient.unflatten(1, (heads, -1)), out.unflatten(1, (heads, -1))
    logsumexp = logsumexp.unflatten(1, (heads, -1))
    for block in _blocks(q, k, v, near_q, near_k, mask, causal):
        logits, window = block.logits(scale, near)
        weights = logits.sub_(logsumexp[block.index].unsqueeze(-1)).exp_()
        upstream = gradient[block.index].to(dtype)
        delta = (upstream * out[block.index]).sum(-1, keepdim=True)
        dlogits = torch.matmul(upstream, block.v.mT).sub_(delta).mul_(weights)
        keys = (*block.rows, slice(0, block.v.shape[-2]))
        dv[keys] += torch.matmul(weights.mT, upstream).sum(2)
        if window is not None and block.near_q is not None and block.near_k is not None:
            low, high, is_near = window
            local = dlogits[..., low:high]
            dnear = local * is_near
            local.masked_fill_(is_near, 0.0)
            near_keys = (*block.rows, slice(low, high))
            dnear_q.unflatten(1, (heads, -1))[block.index] = torch.matmul(
                dnear, block.near_k[..., low:high, :]
            )
            dnear_k[near_keys] += torch.matmul(dnear.mT, block.near_q).sum(2)
        dlogits.mul_(scale)
        grouped_dq[block.index] = torch.matmul(dlogits, block.k)
        dk[keys] += torch.matmul(dlogits.mT, block.q).sum(2)
    gradients = zip((dq, dk, dv, dnear_q, dnear_k), inputs, strict=True)
    first, second, third, fourth, fifth = (g if x is None else g.to(x.dtype) for g, x in gradients)
    return first, second, third, fourth, fifth


class _Block:
    """Queries [first, last) of some rows, and all keys they may see; q [b, h, G, t, d], k, v [b, h, 1, m, ..]."""

    def __init__(
        self,
        inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        mask: Tensor | None,
        rows: tuple[slice, slice],
        queries: tuple[int, int],
        causal: bool,
    ) -> None:
        q, k, v, near_q, near_k = inputs
        self.first, self.last = queries
        self.rows, self.causal = rows, causal
        self.index = (*rows, slice(None), slice(*queries))
        self.keys = self.last if causal else k.shape[2]
        dtype = compute_dtype(q, k, v)
        heads = k.shape[1]

        def of_queries(x: Tensor) -> Tensor:
            grouped: Tensor = x.unflatten(1, (heads, -1))
            return grouped[self.index].to(dtype)

        def of_keys(x: Tensor) -> Tensor:
            return x[rows][:, :, None, : self.keys].to(dtype)

        self.q, self.k, self.v = of_queries(q), of_keys(k), of_keys(v)
        self.near_q = None if near_q is None else of_queries(near_q)
        self.near_k = None if near_k is None else of_keys(near_k)
        self.mask = None if mask is None else mask[rows[0]][:, None, None, None, : self.keys]

    def logits(self, scale: float, near: int) -> tuple[Tensor, tuple[int, int, Tensor] | None]:
        """[b, h, G, t, keys], -inf where hidden; and the window of keys [low, high) that may be near, with its mask."""
        logits = torch.matmul(self.q, self.k.mT).mul_(scale)
        window = None
        if near and self.near_q is not None and self.near_k is not None:
            low = min(self.keys, max(0, (self.first // near - 1) * near))
            high = min(self.keys, ((self.last - 1) // near + 2) * near)
            device = logits.device
            blocks = torch.arange(self.first, self.last, device=device).div(near, rounding_mode="floor")
            others = torch.arange(low, high, device=device).div(near, rounding_mode="floor")
            is_near = (blocks[:, None] - others).abs() <= 1
            local = torch.matmul(self.near_q, self.near_k[..., low:high, :].mT)
            target = logits[..., low:high]
            target.copy_(torch.where(is_near, local, target))
            window = (low, high, is_near)
        if self.causal:
            own = logits[..., self.first :]
            hidden = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).triu_(1)
            own.masked_fill_(hidden, -math.inf)
        if self.mask is not None:
            logits.masked_fill_(~self.mask, -math.inf)
        return logits, window


def _blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    near_q: Tensor | None,
    near_k: Tensor | None,
    mask: Tensor | None,
    causal: bool,
) -> Iterator[_Block]:
    """Blocks that cover all rows and queries, as large as WORK_BYTES allows."""
    (batch, heads, m), n = k.shape[:3], q.shape[2]
    query_bytes = BUFFERS * compute_dtype(q, k, v).itemsize * (q.shape[1] // heads) * m
    size = min(n, max(LEAST_ROWS, WORK_BYTES // query_bytes))
    for rows in row_groups(batch, heads, query_bytes * size):
        for first in range(0, n, size):
            yield _Block((q, k, v, near_q, near_k), mask, rows, (first, min(first + size, n)), causal)


def _fused(q: Tensor, mask: Tensor | None, near_q: Tensor | None) -> bool:
    return q.device.type == "cpu" and mask is None and near_q is None


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fused kernel wants one dtype, one head count and one width; zeros change neither logits nor values."""
    dtype = v.dtype if q.dtype == k.dtype == v.dtype else compute_dtype(q, k, v)
    width = max(q.shape[-1], v.shape[-1])
    groups = q.shape[1] // k.shape[1]

    def padded(x: Tensor, times: int) -> Tensor:
        x = torch.nn.functional.pad(x.to(dtype), (0, width - x.shape[-1]))
        return x.repeat_interleave(times, 1) if times > 1 else x

    return padded(q, 1), padded(k, groups), padded(v, groups)


def _fused_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    queries, keys, values = _padded(q, k, v)
    extra = values.shape[-1] - v.shape[-1]
    upstream, result = (torch.nn.functional.pad(x.to(values.dtype), (0, extra)) for x in (gradient, out))
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
    first, second, third = shaped
    return first, second, third, none, none.clone()


OPERATION = register_attention(
    "exact_attention", ", float scale, bool causal, int near", exact_forward, exact_backward, maximum=False
)
