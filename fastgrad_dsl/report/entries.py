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
    groups: dict[object, list[Attention]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    made = {name: document for name, same in groups.items() if (document := make(same[0])) is not None}
    places = {name: place for place, name in enumerate(made)}
    paths = {name: tuple(entry.path for entry in groups[name]) for name in made}
    whole = tuple(replace(document, attentions=paths[name]) for name, document in made.items())
    return whole, [places.get(key(entry)) for entry in entries]
