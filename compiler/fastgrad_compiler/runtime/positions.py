"""Positions of tokens, and the angles of rotary embeddings at them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def places(count: int, past: Tensor | int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[count, 1]: past, past + 1 ..."""
    if isinstance(past, int):
        return torch.arange(past, past + count, device=device, dtype=dtype).unsqueeze(-1)
    return (torch.arange(count, device=device) + past.to(device)).to(dtype).unsqueeze(-1)


def precision_of(like: Tensor) -> torch.dtype:
    """What positions are computed in: bfloat16 cannot tell 256 from 257."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def turns(x: Tensor, base: float, past: Tensor | int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, d/2] of the angles position * base^(-2i/d) of tokens x [.., n, d] after `past` others."""
    n, d = x.shape[-2:]
    precision = precision_of(x)
    rates = torch.arange(0, d, 2, device=x.device, dtype=precision) * (-math.log(base) / d)
    angles = places(n, past, x.device, precision) * rates.exp()
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """The pairs (i, i + d/2) of x [.., n, d] turned by the angles of `turns`, or back."""
    if inverse:
        sin = -sin
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
