"""The counts of a model's guards as tensors, to be kept in a checkpoint: a guard's next sample depends on them.

A generated package holds a copy of `runtime/guard.py` of its own, so that guards are known by what they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


def guard_counts(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the counts on the CPU of every guard that was called there, by its number in the model; float64."""
    guards = enumerate(_guards(model))
    return {str(number): each._counts[HOST].clone() for number, each in guards if HOST in each._counts}


def restore_guard_counts(model: nn.Module, counts: Mapping[str, Tensor]) -> None:
    """Put counts back into a model that has run once: a guard that has none in `counts` had not been called.

    Raises ValueError for counts of other guards.
    """
    guards = {str(number): each for number, each in enumerate(_guards(model))}
    present = guard_counts(model)
    for number, found in counts.items():
        like = present.get(number)
        if like is None or found.shape != like.shape or found.dtype != like.dtype:
            raise ValueError(f"the model has no guard {number} with {list(found.shape)} counts")
    for number, guard in guards.items():
        guard._counts.pop(HOST, None)
        if number in counts:
            guard._counts[HOST] = counts[number].clone()


def _guards(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for value in vars(module).values():
            yield from _held(value)


def _held(value: object) -> Iterator[Any]:
    if hasattr(value, "spec") and hasattr(value, "_counts"):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held(item)
