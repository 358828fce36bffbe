"""What the report reads out of a plan's entry of one attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from msgspec.structs import replace

from fastgrad_dsl.documents.calibration import CalibratedAttention, Calibration
from fastgrad_dsl.documents.plan import Attention
from fastgrad_dsl.documents.report import Shared

_Shared = TypeVar("_Shared", bound=Shared)


def head_numbers(path: str, count: int) -> tuple[int, ...]:
    """The numbers of an attention's `count` heads of queries; of one that serves a group of another's, those there."""
    found = re.search(r"_heads_(\d{1,6}(?:(?:_to)?_\d{1,6})*)$", path)
    runs = re.findall(r"(\d+)(?:_to_(\d+))?", found[1]) if found else ()
    ends = [(int(first), int(last or first) + 1) for first, last in runs]
    if sum(max(0, end - first) for first, end in ends) != count:
        return tuple(range(count))
    return tuple(head for first, end in ends for head in range(first, end))


def calibration_of(entry: Attention, calibration: Calibration | None) -> CalibratedAttention | None:
    """What a calibration says of an attention, or of the one whose heads it serves a group of."""
    for found in calibration.attentions if calibration else ():
        if entry.path == found.path or entry.path.startswith(f"{found.full_path}_heads_"):
            return found
    return None


def shared(
    entries: Sequence[Attention],
    key: Callable[[Attention], object],
    make: Callable[[Attention], _Shared | None],
) -> tuple[tuple[_Shared, ...], list[int | None]]:
    """What equal attentions have in common, each made once: the list, and for each attention its place there.

    Each holds the paths of its `attentions`. Where `make` gives None, the place is None.
    """
    places: dict[object, int | None] = {}
    made: list[_Shared] = []
    paths: list[tuple[str, ...]] = []
    for entry in entries:
        name = key(entry)
        if name not in places:
            document = make(entry)
            places[name] = None if document is None else len(made)
            if document is not None:
                made.append(document)
                paths.append(())
        place = places[name]
        if place is not None:
            paths[place] += (entry.path,)
    whole = tuple(replace(each, attentions=found) for each, found in zip(made, paths, strict=True))
    return whole, [places[key(entry)] for entry in entries]
