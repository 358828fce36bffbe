"""What a budget limits, the output and the gradient, and what has a value for each."""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

What = Literal["output", "gradient"]
WHATS: tuple[What, What] = ("output", "gradient")

_Value_co = TypeVar("_Value_co", covariant=True)


class Both(Protocol[_Value_co]):
    """What has a value for each of WHATS."""

    @property
    def output(self) -> _Value_co: ...

    @property
    def gradient(self) -> _Value_co: ...


def of(values: Both[_Value_co], what: What) -> _Value_co:
    """The value for the output or the gradient."""
    return values.output if what == "output" else values.gradient
