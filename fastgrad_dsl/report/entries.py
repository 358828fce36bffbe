"""What the report reads out of a plan's entry of one attention."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]


def head_numbers(entry: Entry) -> tuple[int, ...]:
    """The numbers of an attention's query heads; of one that serves a group of another's heads, those there."""
    count: int = entry["query_heads"]
    found = re.search(r"_heads_(\d{1,6}(?:(?:_to)?_\d{1,6})*)$", entry["path"])
    runs = re.findall(r"(\d+)(?:_to_(\d+))?", found[1]) if found else ()
    ends = [(int(first), int(last or first) + 1) for first, last in runs]
    if sum(max(0, end - first) for first, end in ends) != count:
        return tuple(range(count))
    return tuple(head for first, end in ends for head in range(first, end))


def calibration_of(entry: Entry, calibration: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What a calibration says of an attention, or of the one whose heads it serves a group of."""
    for found in (calibration or {}).get("attentions", ()):
        whole = found.get("full_path", found["path"])
        if entry["path"] == found["path"] or entry["path"].startswith(f"{whole}_heads_"):
            return dict(found)
    return None


def head_ranges(entry: Entry) -> dict[int, float | None]:
    """R of each head: of its group where a plan has groups, else that of the attention."""
    ranges = dict.fromkeys(head_numbers(entry), entry["bound"])
    for group in entry.get("heads") or ():
        ranges.update(dict.fromkeys(group["heads"], group.get("bound", entry["bound"])))
    return ranges


def shared(
    entries: Sequence[Entry], key: Callable[[Entry], object], make: Callable[[Entry], dict[str, Any] | None]
) -> tuple[list[dict[str, Any]], list[int | None]]:
    """What equal attentions have in common, each made once: the list, and for each attention its place there.

    Each holds the paths of its `attentions`. Where `make` gives None, the place is None.
    """
    places: dict[object, int | None] = {}
    made: list[dict[str, Any]] = []
    for entry in entries:
        name = key(entry)
        if name not in places:
            document = make(entry)
            places[name] = None if document is None else len(made)
            if document is not None:
                made.append({"attentions": [], **document})
        place = places[name]
        if place is not None:
            made[place]["attentions"].append(entry["path"])
    return made, [places[key(entry)] for entry in entries]
