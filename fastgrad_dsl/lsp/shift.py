"""Where the places of an earlier text are in a later one that differs from it in one stretch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Shift:
    """From an earlier text to a later one: what is before the stretch that differs stays, what is after it moves."""

    old: str
    new: str

    @cached_property
    def _same(self) -> tuple[int, int]:
        """How many characters at the start, and how many at the end, are the same."""
        if self.old == self.new:
            return len(self.old), 0
        most = min(len(self.old), len(self.new))
        before = _largest(most, lambda size: self.old[:size] == self.new[:size])
        after = _largest(
            most - before, lambda size: self.old[len(self.old) - size :] == self.new[len(self.new) - size :]
        )
        return before, after

    def to_old(self, offset: int) -> int:
        """The place in the earlier text of one in the later text; the start of the stretch for one inside of it."""
        return self._moved(offset, len(self.new), len(self.old))

    def to_new(self, offset: int) -> int:
        """The reverse."""
        return self._moved(offset, len(self.old), len(self.new))

    def span_to_old(self, start: int, end: int) -> tuple[int, int] | None:
        """The same characters in the earlier text, None where they were not all there in one piece."""
        before, after = self._same
        if end <= before:
            return start, end
        if start >= len(self.new) - after:
            by = len(self.old) - len(self.new)
            return start + by, end + by
        return None

    def _moved(self, offset: int, length: int, other: int) -> int:
        before, after = self._same
        if offset <= before:
            return offset
        return offset + other - length if offset >= length - after else before


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest size up to `most` for which a test holds that holds for all smaller ones."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low
