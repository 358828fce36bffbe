"""Initial values of weights: each rule fills a tensor in place, from a generator where it draws numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor


@torch.no_grad()
def normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Normal values."""
    return tensor.normal_(mean, std, generator=generator)


@torch.no_grad()
def trunc_normal_(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Generator | None = None
) -> Tensor:
    """Normal values within two standard deviations of the mean."""
    low, high = mean - 2 * std, mean + 2 * std
    return torch.nn.init.trunc_normal_(tensor, mean, std, low, high, generator=generator)


@torch.no_grad()
def xavier_(tensor: Tensor, gain: float = 1.0, *, generator: Generator | None = None) -> Tensor:
    """Uniform within gain * sqrt(6 / (in + out)), for a weight [.., in, out]; a vector counts as [1, out]."""
    fans = [1, 1, *tensor.shape][-2:]
    limit = gain * math.sqrt(6 / sum(fans))
    return tensor.uniform_(-limit, limit, generator=generator)


@torch.no_grad()
def zeros_(tensor: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Zeros."""
    return tensor.zero_()


@torch.no_grad()
def ones_(tensor: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Ones."""
    return tensor.fill_(1)


@torch.no_grad()
def constant_(tensor: Tensor, value: float, *, generator: Generator | None = None) -> Tensor:
    """One value everywhere."""
    return tensor.fill_(value)


INITIALISERS: dict[str, Callable[..., Tensor]] = {
    "normal": normal_,
    "trunc_normal": trunc_normal_,
    "xavier": xavier_,
    "zeros": zeros_,
    "ones": ones_,
    "constant": constant_,
}
"""The rules by the first member of a weight's `init`; the other members are the positional arguments."""
