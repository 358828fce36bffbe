"""Softmax attention as an operation, within a window or of all pairs: a pair that is seen weighs exp(scale q.k)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .exact_attention import exact_backward, exact_forward, exact_tangent
from .kernel_spec import KernelSpec
from .operation import Operation, register_attention
from .polynomial_attention import Backend
from .selection import selective, selective_tangent
from .sight import Sight


def register_window(name: str, spec: KernelSpec, *, native: Backend | None = None) -> Operation:
    """Register the operation `fastgrad::name` with its derivatives, once a process, and return it.

    It takes the inputs of `attention_op.Inputs`. native: serves it on a CPU.
    """
    assert spec.window is not None
    sight = Sight(spec.causal, spec.reach)
    passes = selective(partial(forward, spec, native), partial(backward, spec, native), sight, maximum=True)
    moved = selective_tangent(partial(tangent, spec), sight)
    return register_attention(name, "", *passes, moved, maximum=True)


def forward(spec: KernelSpec, native: Backend | None, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out [B, H, n, dv], denominator [B, H, n] in units of e^maximum, maximum [B, H, n]."""
    if native is not None and (outputs := native.forward(*inputs)) is not None:
        return outputs
    exactly = (*inputs, *_attributes(spec))
    out, logsumexp, _ = exact_forward(*exactly)
    return out, torch.ones_like(logsumexp), logsumexp


def backward(
    spec: KernelSpec, native: Backend | None, gradient: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The gradients of q, k, v and log_gate, and two without elements, from that of out [B, H, n, dv]."""
    if native is not None and (found := native.backward(gradient, *arguments)) is not None:
        return found
    *inputs, out, denominator, maximum = arguments
    exactly = (*inputs, out, _logsumexp(denominator, maximum), maximum, *_attributes(spec))
    return exact_backward(gradient, *exactly)


def tangent(
    spec: KernelSpec,
    tangents: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    saved: Sequence[Tensor],
) -> Tensor:
    """The tangent of out [B, H, n, dv], from those of q, k, v and log_gate."""
    out, denominator, maximum = saved
    return exact_tangent(tangents, inputs, out, _logsumexp(denominator, maximum), *_attributes(spec))


def _attributes(spec: KernelSpec) -> tuple[float, bool, int, int]:
    """scale, causal, near and window of exact attention."""
    return spec.scale, spec.causal, 0, spec.reach


def _logsumexp(denominator: Tensor, maximum: Tensor) -> Tensor:
    """Of the logits of a row; 0 for one that sees no key."""
    return torch.where(denominator == 0, 0.0, maximum + denominator.log())
