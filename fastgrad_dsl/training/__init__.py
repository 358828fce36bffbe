"""Training: a loop that loses nothing, and byte-level language models on a text.

`train`, `Options` and `learning_rate` are those of `loop`, imported when they are first used: logging a budget needs
no optimiser.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgrad_dsl.training.loop import Options, learning_rate, train

__all__ = ["Options", "learning_rate", "train"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("fastgrad_dsl.training.loop"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
