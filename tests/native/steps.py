"""Steps of models by the C++ kernel of a whole step, and by PyTorch's operations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def counted(module: Any, turns: Iterator[bool] | None = None, native: str = "1") -> Iterator[list[bool]]:
    """Whether the kernel served each step; turns: those in which it is asked, all by default."""
    served: list[bool] = []

    def kernel(*given: Any) -> Any:
        asked = turns is None or next(turns)
        with mock.patch.dict(os.environ, FASTGRAD_NATIVE=native):
            found = type_kernel(*given) if asked else None
        served.append(found is not None)
        return found

    type_kernel = type(module).KERNEL
    with mock.patch.object(type(module), "KERNEL", staticmethod(kernel)):
        yield served


def steps(module: Any, given: list[Tensor], split: list[int], state: Any = None) -> tuple[list[Tensor], Any]:
    """The results of calls on so many tokens each, and the state after them."""
    state = module.start(given[0].shape[0]) if state is None else state
    first, found = int(state.position), []
    for count in split:
        *results, state = module.step(*(x[:, first : first + count] for x in given), state)
        found.append(results)
        first += count
    return [torch.cat(parts, 1) for parts in zip(*found, strict=True)], state


def differ(found: list[Tensor], wanted: list[Tensor]) -> float:
    errors = [
        float((a.double() - b.double()).abs().max() / (1 + b.double().abs().max()))
        for a, b in zip(found, wanted, strict=True)
        if b.numel() > 0
    ]
    return max(errors, default=0.0)
