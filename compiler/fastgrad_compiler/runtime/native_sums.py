"""Sums of keys in pieces of sequences, and what queries read from them, by native kernels, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_op import compute_dtype
from .native_attention import Operations


def sum_up(
    operations: Operations,
    k: Tensor,
    v: Tensor,
    there: Tensor | None,
    factor: Tensor | None,
    rank: int,
    work: torch.dtype,
) -> Tensor:
    """float64 [b, h, rank, dv + 1]: `step_sums.sums_of` of any number of keys, in the precision `work`."""
    found: Tensor = _SumUp.apply(operations, k, v, there, factor, rank, work)  # type: ignore[no-untyped-call]
    return found


def read(operations: Operations, q: Tensor, sums: Tensor, work: torch.dtype) -> Tensor:
    """[b, H, c, dv + 1] in the precision `work`: what queries [b, H, c, d] read from the sums."""
    found: Tensor = _Read.apply(operations, q, sums, work)  # type: ignore[no-untyped-call]
    return found


def _tokens(x: Tensor, work: torch.dtype) -> Tensor:
    """In the dtype that an operation for this precision takes, with a dense last dimension."""
    found = x if x.dtype == torch.bfloat16 and compute_dtype(x) == work else x.to(work)
    return found if found.stride(-1) == 1 else found.contiguous()


class _SumUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        k: Tensor,
        v: Tensor,
        there: Tensor | None,
        factor: Tensor | None,
        rank: int,
        work: torch.dtype,
    ) -> Tensor:
        shown = None if there is None else there.expand(k.shape[0], -1).contiguous()
        weights = None if factor is None else factor.double().expand(*k.shape[:3]).contiguous()
        ctx.operations, ctx.work = operations, work
        ctx.save_for_backward(k, v, shown, weights)
        assert operations.absorb is not None
        sums = torch.zeros((*k.shape[:2], rank, v.shape[-1] + 1), dtype=torch.float64)
        operations.absorb(_tokens(k, work), _tokens(v, work), weights, shown, sums, torch.get_num_threads())
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        k, v, shown, weights = ctx.saved_tensors
        dk, dv = (torch.zeros(x.shape, dtype=ctx.work) for x in (k, v))
        dfactor = None if weights is None else torch.zeros_like(weights)
        tokens = _tokens(k, ctx.work), _tokens(v, ctx.work)
        ctx.operations.absorb_backward(
            gradients[0].contiguous(), *tokens, weights, shown, dk, dv, dfactor, torch.get_num_threads()
        )
        return None, dk.to(k.dtype), dv.to(v.dtype), None, dfactor, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operations: Operations, q: Tensor, sums: Tensor, work: torch.dtype) -> Tensor:
        ctx.operations, ctx.work = operations, work
        sums = sums.contiguous()
        ctx.save_for_backward(q, sums)
        assert operations.read is not None
        found = torch.empty((*q.shape[:3], sums.shape[-1]), dtype=work)
        operations.read(_tokens(q, work), sums, found, torch.get_num_threads())
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, sums = ctx.saved_tensors
        dq, dsums = torch.zeros(q.shape, dtype=ctx.work), torch.zeros_like(sums)
        gradient = gradients[0].to(ctx.work).contiguous()
        ctx.operations.read_backward(gradient, _tokens(q, ctx.work), sums, dq, dsums, torch.get_num_threads())
        return None, dq.to(q.dtype), dsums, None
