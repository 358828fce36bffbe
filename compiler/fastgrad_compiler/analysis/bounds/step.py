"""What a bound rule sees of a node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fastgrad_compiler.analysis.bounds.facts import Fact
from fastgrad_compiler.ir.dim import Dim
from fastgrad_compiler.ir.graph import Node, integer, number


@dataclass(frozen=True, slots=True)
class Step:
    """One node with the facts and shapes of its inputs."""

    node: Node
    facts: tuple[Fact, ...]
    shapes: tuple[tuple[Dim, ...], ...]

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape of the result."""
        return self.node.tensor.shape

    @property
    def rank(self) -> int:
        """The rank of the result."""
        return len(self.shape)

    @property
    def fact(self) -> Fact:
        """That of the first input."""
        return self.facts[0]

    def number(self, key: str) -> float:
        """A numeric attribute."""
        return number(self.node[key])

    def axis(self, key: str = "axis", rank: int | None = None) -> int:
        """An axis attribute as a negative index."""
        value = integer(self.node[key])
        return value - (self.rank if rank is None else rank) if value >= 0 else value


Rule: TypeAlias = Callable[[Step], Fact]
