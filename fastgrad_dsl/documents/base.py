"""What the types of all documents are made of: frozen structures, and ranges and forms of their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Annotated, Any, Literal, TypeVar, cast

from msgspec import Meta, Struct, to_builtins
from msgspec.structs import asdict

Place = tuple[str | int, ...]
"""The keys and indices on the way to a value."""

Count = Annotated[int, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1)]
Part = Annotated[float, Meta(ge=0)]
"""Seconds, or a relative error."""

Name = Annotated[str, Meta(extra_json_schema={"format": "name"})]
DimText = Annotated[str, Meta(extra_json_schema={"format": "dim"})]
FilePath = Annotated[str, Meta(extra_json_schema={"format": "inside"})]
Hash = Annotated[str, Meta(extra_json_schema={"format": "sha256"})]
"""Texts of a form, which form.FORMATS tells."""

Family = Literal["taylor", "minimax", "balanced"]
Source = Literal["program", "weights", "data", "asserted"]
Target = Literal["torch", "cpp", "triton", "auto"]
Trust = Literal["certified", "calibrated"]


SHOWN: dict[type, Callable[[Any], str]] = {}
"""What draws documents for a notebook, by their type; filled in by the modules that can."""


class Document(Struct, frozen=True, forbid_unknown_fields=True):
    """A document or a part of one: its fields are the keys of the JSON, in their order; None is null.

    For users it can be read by key too, as the data of the JSON: `report["whole"]["output"]["measured"]`.
    """

    def __getitem__(self, key: str) -> Any:
        if key not in self.__struct_fields__:
            raise KeyError(key)
        return json.loads(json.dumps(to_builtins(getattr(self, key))))

    def _repr_html_(self) -> str | None:
        """What a notebook shows; None, for the text, where nothing draws this type."""
        return next((draw(self) for kind, draw in SHOWN.items() if isinstance(self, kind)), None)

    def narrowest(self) -> type[Document]:
        """The class of the same fields, fewer of them None, that the values ask for."""
        return type(self)

    def faults(self) -> Iterator[tuple[Place, str]]:
        """What no type can say, such as values that contradict each other: places and what is wrong there."""
        return iter(())


def finite(value: Any) -> Any:
    """Plain data with None for each number that is not finite: strict JSON has none of them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value


_Document = TypeVar("_Document", bound=Document)


def narrowed(document: _Document) -> _Document:
    """The same document as an object of its narrowest class."""
    made: _Document = cast("type[_Document]", document.narrowest())(**asdict(document))
    return made


def picked(kind: type[_Document], source: object, /, **others: object) -> _Document:
    """A document of the attributes of `source` that are named as its fields, and of `others`."""
    names = (name for name in kind.__struct_fields__ if name not in others)
    return kind(**{name: getattr(source, name) for name in names}, **others)
