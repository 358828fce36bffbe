"""Positions of tokens, and the angles of rotary embeddings at them."""

from __future__ import annotations

import math
from collections.abc import Sequence

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


def of_angles(device: torch.device) -> torch.dtype:
    """What angles are computed in: in float32 that of place 65,536 is off by 1e-4, and of 1,000,000 by 1e-2."""
    return torch.float32 if device.type == "mps" else torch.float64


def turns(
    x: Tensor, base: float, past: Tensor | int, stretch: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, d/2] of the angles position * base^(-2i/d) of tokens x [.., n, d] after `past` others.

    stretch: what the angles of each pair are divided by, one number for all pairs or one for each.
    """
    n, d = x.shape[-2:]
    precision = of_angles(x.device)
    rates = (torch.arange(0, d, 2, device=x.device, dtype=precision) * (-math.log(base) / d)).exp()
    if stretch is not None:
        rates = rates / torch.tensor(stretch, device=x.device, dtype=precision)
    angles = places(n, past, x.device, precision) * rates
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """The pairs (i, i + d/2) of x [.., n, d] turned by the angles of `turns`, or back."""
    if inverse:
        sin = -sin
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
