"""What a rule of `weight_rules.py` sees of a node and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastgrad_compiler.analysis.weights.rows import Rows, ball
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Attribute, Node, integer


@dataclass(frozen=True, slots=True)
class Step:
    """What a rule sees: the node, its inputs, and what is known of them (None: nothing)."""

    node: Node
    inputs: tuple[Node, ...]
    rows: tuple[Rows | None, ...]

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Of the result."""
        return self.node.tensor.shape

    @property
    def rank(self) -> int:
        """Of the result."""
        return len(self.shape)

    @property
    def width(self) -> int | None:
        """Of a row of the result, None where it is known at run time only."""
        return self.shape[-1].constant if self.shape else None

    def size(self, key: str) -> int | None:
        """A dim among the attributes, None where it is known at run time only."""
        value: Attribute = self.node[key]
        return value.constant if isinstance(value, Dim) else integer(value)

    def axis(self, rank: int | None = None) -> int:
        """The attribute `axis`, counted from the front."""
        return integer(self.node["axis"]) % (rank or self.rank)

    def ball(self, radius: Tensor | float, *because: Rows, source: str = "") -> Rows | None:
        """Rows of norm at most `radius`, a number or [..], and at most what the program proves."""
        if self.width is None:
            return None
        if not isinstance(radius, Tensor):
            radius = torch.tensor(radius, dtype=torch.float64)
        radius = radius.reshape((*[1] * (self.rank - 1 - radius.dim()), *radius.shape))
        bound = self.node.bound
        if bound is not None and not bound.asserted:
            radius = radius.clamp(max=bound.norm)
        return ball(radius, self.width, (source,) if source else ()).because(*because)


Rule: TypeAlias = Callable[[Step], "Rows | None"]


def broadcast(step: Step) -> tuple[Rows | None, ...]:
    """The inputs' rows, as many and as wide as the result's."""
    width = step.width
    if width is None:
        return (None,) * len(step.rows)
    return tuple(rows and rows.shaped(step.rank, width) for rows in step.rows)


def known(rule: Callable[..., Rows | None], *places: int) -> Rule:
    """A rule that gets the rows of the inputs at these places; nothing is known of its result without them."""

    def found(step: Step) -> Rows | None:
        return _applied(rule, step, tuple(step.rows[place] for place in places))

    return found


def known_pair(rule: Callable[..., Rows | None]) -> Rule:
    """A rule that gets the rows of the last two inputs, as many and as wide as the result's."""
    return lambda step: _applied(rule, step, broadcast(step)[-2:])


def _applied(rule: Callable[..., Rows | None], step: Step, rows: tuple[Rows | None, ...]) -> Rows | None:
    return None if any(each is None for each in rows) else rule(step, *rows)
