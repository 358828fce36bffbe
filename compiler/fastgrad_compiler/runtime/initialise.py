"""Initial values of weights: each rule fills a tensor in place, from a generator where it draws numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn


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


def initialise(model: nn.Module, seed: int = 0) -> None:
    """Give every tensor of a generated model its initial value, in place.

    One generator, seeded once, serves what a module holds itself, in the order of its INIT, then its children. Values
    are drawn in float32 on the CPU, so that every dtype and device starts from the same ones.
    """
    _initialise(model, torch.Generator().manual_seed(seed), None)


def _initialise(module: nn.Module, generator: Generator, rule: tuple[str | float, ...] | None) -> None:
    """`rule` is what a list of tensors takes from the class that it is a member of."""
    rules = getattr(module, "INIT", {})
    constants = module._non_persistent_buffers_set
    buffers = {n: b for n, b in module.named_buffers(recurse=False) if n not in constants}
    own = dict(module.named_parameters(recurse=False)) | buffers
    for name in [*(label for label in rules if label in own), *(name for name in own if name not in rules)]:
        draw(own[name], rules.get(name, rule), generator)
    for name, child in module.named_children():
        _initialise(child, generator, rules.get(name, rule))


@torch.no_grad()
def draw(tensor: Tensor, rule: tuple[str | float, ...] | None, generator: Generator) -> None:
    """Fill a tensor by a rule (name, argument...) of INITIALISERS; TypeError where it has none."""
    if rule is None:
        raise TypeError(f"no initial value is known for a tensor of shape {list(tensor.shape)}")
    kind, *arguments = rule
    tensor.copy_(INITIALISERS[str(kind)](torch.empty(tensor.shape), *arguments, generator=generator))
