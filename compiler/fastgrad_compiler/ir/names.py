"""Names that are not in use yet."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def unique(stem: str, taken: Collection[str]) -> str:
    """`stem`, or the first of `stem_2`, `stem_3` ... that is not taken."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


class UniqueNames:
    """Names in use; a wanted name that is taken gets `_2`, `_3` ..."""

    def __init__(self, used: Iterable[str] = ()) -> None:
        self._used = set(used)
        self._count: dict[str, int] = {}  # the last number given, so that many of one stem cost no search

    def __contains__(self, name: str) -> bool:
        return name in self._used

    def add(self, name: str) -> None:
        """Mark a name as used."""
        self._used.add(name)

    def free(self, name: str) -> None:
        """Give a name back."""
        self._used.discard(name)

    def take(self, wanted: str, avoid: frozenset[str] = frozenset()) -> str:
        """`wanted`, or the first `wanted_2`, `wanted_3` ... that is neither used nor to avoid."""
        name, number = wanted, self._count.get(wanted, 1)
        while name in self._used or name in avoid:
            number += 1
            name = f"{wanted}_{number}"
        self._count[wanted] = number
        self._used.add(name)
        return name

    def copy(self) -> UniqueNames:
        """The same names, to go on from."""
        other = UniqueNames(self._used)
        other._count = dict(self._count)
        return other

    def merge(self, other: UniqueNames) -> None:
        """Take over the names of another."""
        self._used |= other._used
