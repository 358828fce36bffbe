"""What a rule of `operations_torch.py` gets beside tensors, and attributes as the types that rules want."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node


@dataclass(frozen=True)
class Env:
    """What a run knows beside tensors: the sizes of the run-time dims, the float dtype, the device."""

    dims: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    def size(self, value: Attribute) -> int:
        """An attribute that is an int or a Dim, as a number."""
        if isinstance(value, Dim):
            return value.evaluate(self.dims)
        return integer(value)

    def shape(self, value: Attribute) -> tuple[int, ...]:
        """An attribute that is a tuple of ints and Dims, as numbers."""
        return tuple(map(self.size, sequence(value)))


Rule: TypeAlias = Callable[[Node, list[Tensor], Env], "Tensor | tuple[Tensor, ...]"]


def integer(value: Attribute) -> int:
    """The attribute as an int; TypeError where it is none."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value


def number(value: Attribute) -> float:
    """The attribute as a float; TypeError if it is not a number."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def sequence(value: Attribute) -> tuple[Attribute, ...]:
    """The attribute as a tuple; TypeError where it is none."""
    if not isinstance(value, tuple):
        raise TypeError(f"{value!r} is not a tuple")
    return value
