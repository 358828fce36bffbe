"""What a rule of `operations_torch.py` gets beside tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, integer, sequence


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
