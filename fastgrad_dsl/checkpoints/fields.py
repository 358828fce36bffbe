"""What a family reads of config.json: a table of fields, each with the values that it may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from fastgrad_dsl.documents.form import shown
from fastgrad_grammar.diagnostics import TfgError

MOST = 1 << 24
"""Of any size in a config: no model has as many of anything that is counted there."""


class _Needed:
    """The default of a field without one."""


NEEDED = _Needed()


@dataclass(frozen=True)
class Field:
    """A field of config.json; `objection` says what is expected where a value does not fit, else None."""

    name: str
    default: object
    objection: Callable[[object], str | None]

    def read(self, config: Mapping[str, object]) -> object:
        """The value, or the default of Transformers' own config class. Raises TfgError FG602."""
        value = config.get(self.name, self.default)
        if value is NEEDED:
            raise refused(f"{self.name} is missing")
        expected = self.objection(value)
        if expected is not None:
            raise refused(f"{self.name} is {shown(value)}, expected {expected}")
        return value


def size(
    name: str, default: object = NEEDED, *, optional: bool = False, least: int = 1, most: int = MOST
) -> Field:
    """A whole number within limits; null too if it is `optional`."""

    def objection(value: object) -> str | None:
        if (optional and value is None) or (type(value) is int and least <= value <= most):
            return None
        return f"a whole number from {least} to {most}"

    return Field(name, default, objection)


def number(
    name: str, default: object = NEEDED, *, optional: bool = False, least: float = 1e-30, most: float = 1e12
) -> Field:
    """A number within limits, above 0 unless `least` says otherwise; null too if it is `optional`."""

    def objection(value: object) -> str | None:
        if optional and value is None:
            return None
        ok = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        return None if ok and math.isfinite(cast(float, value)) else f"a number from {least:g} to {most:g}"

    return Field(name, default, objection)


def flag(name: str, default: bool) -> Field:
    """True or false."""
    return one_of(name, default, True, False)


def one_of(name: str, default: object, *allowed: object) -> Field:
    """One of a few values. A single one is what the computation must be: any other would change it."""

    def objection(value: object) -> str | None:
        if any(type(each) is type(value) and each == value for each in allowed):
            return None
        words = ", ".join(map(shown, allowed))
        return f"one of {words}" if len(allowed) > 1 else words

    return Field(name, default, objection)


def anything(name: str, default: object = None) -> Field:
    """A field that the family examines itself."""
    return Field(name, default, lambda value: None)


@dataclass(frozen=True)
class Config:
    """The fields of a family, read.

    `others` are the data of the other JSON files, by name; `tensors` the names of the checkpoint's tensors, none if all
    that it may have count as there; `given` the names of the fields that are there, whose values are no defaults.
    """

    values: Mapping[str, object]
    architecture: str
    others: Mapping[str, object]
    tensors: frozenset[str] | None = None
    given: frozenset[str] = frozenset()

    def has(self, suffix: str) -> bool:
        """Whether the checkpoint has a tensor whose name ends like this: for parts that no field tells of."""
        return self.tensors is None or any(name.endswith(suffix) for name in self.tensors)

    def integer(self, name: str) -> int:
        """A size."""
        return cast(int, self.values[name])

    def real(self, name: str) -> float:
        """A number, as a float."""
        return float(cast(float, self.values[name]))

    def flag(self, name: str) -> bool:
        """Whether a field is true."""
        return self.values[name] is True

    def text(self, name: str) -> str:
        """A word."""
        return cast(str, self.values[name])

    def either(self, name: str, otherwise: int) -> int:
        """A size that may be null."""
        value = self.values[name]
        return otherwise if value is None else cast(int, value)


def read_fields(fields: Iterable[Field], config: Mapping[str, object]) -> dict[str, object]:
    """The values of all fields. Raises TfgError FG602 for the first that does not fit."""
    return {field.name: field.read(config) for field in fields}


def refused(said: str, *help_: str) -> TfgError:
    """FG602 for a config.json; `said` names the field."""
    return TfgError.of("FG602", f"config.json: {said}", *help_)
