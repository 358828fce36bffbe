"""Attention whose arithmetic is float64 where that of its inputs would round too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_op import FLOATS, INPUTS, compute_dtype

Pass = Callable[..., Any]


def in_float64(forward: Pass, backward: Pass) -> tuple[Pass, Pass]:
    """The two passes of a kernel, their arithmetic in float64 from `exact_below` tokens on; the dtypes of results stay.

    Saved denominators and maxima are float32. A maximum that is rounded is made good in the denominator, which is in
    units of e^maximum.
    """

    def run_forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, exact_below = inputs
        if not _wanted(given, exact_below):
            return forward(*inputs)  # type: ignore[no-any-return]
        out, denominator, maximum = forward(*_precise(given), exact_below)
        saved = compute_dtype(*given[:3])
        rounded = maximum.to(saved)
        if maximum.numel():
            denominator = denominator * (maximum - rounded.double()).exp()
        return out.to(given[2].dtype), denominator.to(saved), rounded

    def run_backward(gradient: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *given, exact_below = inputs
        if not _wanted(given, exact_below):
            return backward(gradient, *inputs)  # type: ignore[no-any-return]
        tensors, saved = given[:INPUTS], given[INPUTS:]
        found = backward(gradient.double(), *_precise(tensors), *(x.double() for x in saved), exact_below)
        kept = [gradient if x is None else x for x in tensors[:FLOATS]]
        return tuple(g.to(x.dtype) for g, x in zip(found, kept, strict=True))

    return run_forward, run_backward


def _wanted(given: Sequence[Any], exact_below: int) -> bool:
    q, k, v = given[:3]
    long = max(q.shape[2], k.shape[2]) >= exact_below
    return long and compute_dtype(q, k, v) != torch.float64


def _precise(tensors: Sequence[Any]) -> list[Any]:
    """The floating inputs in float64; mask and ids of documents as they are."""
    return [x.double() if index < FLOATS and isinstance(x, Tensor) else x for index, x in enumerate(tensors)]
