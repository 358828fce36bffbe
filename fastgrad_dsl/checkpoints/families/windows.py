"""Which layers attend to a sliding window, as an expression of the language in the number i of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastgrad_dsl.checkpoints.fields import Field, refused
from fastgrad_dsl.documents.form import shown

FULL, SLIDING = "full_attention", "sliding_attention"
PERIODS = range(2, 17)


@dataclass(frozen=True)
class Windows:
    """`width` of the window, none if no layer has one; `choice` of a layer's width, none if all have it."""

    width: int | None = None
    choice: str | None = None


def windows_of(types: Sequence[object], width: int | None) -> Windows:
    """The windows of layers of given types. Raises TfgError FG602 for types or an order that the spec cannot say."""
    unknown = next((each for each in types if each not in (FULL, SLIDING)), None)
    if unknown is not None:
        raise refused(f"layer_types has {shown(unknown)}, expected {FULL} or {SLIDING}")
    full = [each == FULL for each in types]
    if all(full):
        return Windows()
    if width is None:
        raise refused(f"sliding_window is null, and layer_types has {SLIDING}")
    if not any(full):
        return Windows(width)
    first = full.index(False)
    if not any(full[first:]):
        return Windows(width, f"none if i < {first} else sliding")
    for period in PERIODS:
        if full == [(layer + 1) % period == 0 for layer in range(len(full))]:
            return Windows(width, f"none if (i + 1) % {period} == 0 else sliding")
    raise refused(
        "layer_types alternates in an order that is not read: the first ones, or every k-th, are full"
    )


def only_full() -> Field:
    """layer_types of a family whose layers have no windows."""

    def objection(value: object) -> str | None:
        fits = value is None or (isinstance(value, list) and all(each == FULL for each in value))
        return None if fits else f"null, or {FULL} alone"

    return Field("layer_types", None, objection)


def layer_types(given: object, count: int, otherwise: Sequence[str]) -> Sequence[object]:
    """layer_types as config.json has it, or what its absence means. Raises TfgError FG602 for another length."""
    if given is None:
        return otherwise
    if not isinstance(given, list) or len(given) != count:
        raise refused(f"layer_types is {shown(given)}, expected a list of {count}")
    return given
