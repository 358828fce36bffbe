"""The tensors of a step's kernel: where each is in the model or its state, in the order of their addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

OF_CACHE = -1
"""Times the numbers of one token: of a cache of all tokens, with as much room as a state has."""


class Kept(NamedTuple):
    """A tensor; numbers below 0: a cache.

    While a graph is written, `{}` in its path is where the iterations of loops around would stand.
    """

    path: str
    numbers: int


class Loop(NamedTuple):
    """Those of the body of a loop, for each iteration, which is `{}` in their paths; `*` while a graph is written."""

    iterations: range
    tensors: Tensors


Tensors: TypeAlias = tuple[Kept | Loop, ...]


def count(tensors: Tensors) -> int:
    """How many there are."""
    return sum(
        1 if isinstance(each, Kept) else len(each.iterations) * count(each.tensors) for each in tensors
    )


def called(tensors: Tensors, label: str) -> Tensors:
    """Those of a graph that is called under a label."""
    return _renamed(tensors, lambda path: f"{label}{{}}.{path.replace('{}', '')}")


def repeated(tensors: Tensors, iterations: range) -> Tensors:
    """Those of the body of a loop: the iteration stands after the first label."""
    return (Loop(iterations, _renamed(tensors, lambda path: path.replace("{}", "{}.*"))),)


def whole(tensors: Tensors) -> Tensors:
    """Those of the model."""
    return _renamed(tensors, lambda path: path.replace("{}", "").replace("*", "{}"))


def _renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return tuple(
        Kept(change(each.path), each.numbers)
        if isinstance(each, Kept)
        else Loop(each.iterations, _renamed(each.tensors, change))
        for each in tensors
    )
