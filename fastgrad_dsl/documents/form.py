"""Plain data as the types of documents say: built into objects, or refused with the place that does not fit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import PurePosixPath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from msgspec import Meta, UnsetType

from fastgrad_compiler.ir.text_parser import parse_dim
from fastgrad_dsl.documents.base import Document, Place

MAX_SHOWN = 60  # characters of a value in a diagnostic
NAMES = {
    NoneType: "null", bool: "boolean", int: "integer", float: "number", str: "string", tuple: "array", dict: "object",
}  # fmt: skip
"""What JSON calls the types of values."""
LIMITS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("ge", lambda value, limit: value >= limit, "at least {}"),
    ("le", lambda value, limit: value <= limit, "at most {}"),
    ("gt", lambda value, limit: value > limit, "more than {}"),
    ("min_length", lambda value, limit: len(value) >= limit, "at least {} items"),
)
"""Of msgspec.Meta: its name, when it holds and what it asks for."""


class Misfit(ValueError):
    """A value is not of its type: its place, and what is wrong there."""

    def __init__(self, place: Place, said: str) -> None:
        super().__init__(f"/{'/'.join(map(str, place))}: {said}")
        self.place, self.said = place, said


def built(kind: Any, value: Any, place: Place = ()) -> Any:
    """Plain data as an object of a type; numbers stay as they are, and 1.0 is not an integer. Raises Misfit."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if any(get_origin(each) is Literal for each in kinds):
        wanted = (value for each in kinds for value in (get_args(each) or (None,)))
        return _one_of(tuple(wanted), value, place)
    for each in kinds:
        bare, metas = _bare(each)
        if _is(bare, value):
            made = _filled(bare, value, place)
            for meta in metas:
                _check(meta, value, place)
            return made
    words = ", ".join(NAMES[_json_type(_bare(each)[0])] for each in kinds if each is not UnsetType)
    raise Misfit(place, f"expected of type {words}, found {shown(value)}")


def shown(value: object) -> str:
    """A value in a diagnostic."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _bare(kind: Any) -> tuple[Any, tuple[Meta, ...]]:
    """A type without what it is annotated with, and that."""
    return (kind.__origin__, kind.__metadata__) if get_origin(kind) is Annotated else (kind, ())


def _json_type(bare: Any) -> type:
    if isinstance(bare, type) and issubclass(bare, Document):
        return dict
    found: type = get_origin(bare) or bare
    return found


def _is(bare: Any, value: object) -> bool:
    if bare is UnsetType:
        return False
    wanted = {tuple: list, float: (int, float)}.get(_json_type(bare), _json_type(bare))
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))  # type: ignore[arg-type]


def _filled(bare: Any, value: Any, place: Place) -> Any:
    kind, items = _json_type(bare), get_args(bare)
    if kind is tuple:
        return tuple(built(items[0], each, (*place, index)) for index, each in enumerate(value))
    if kind is dict and items:
        keys, values = items
        return {built(keys, key, place): built(values, each, (*place, key)) for key, each in value.items()}
    return _document(bare, value, place) if kind is dict else value


@cache
def fields(kind: type[Document]) -> dict[str, Any]:
    """The types of the fields of a document."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in kind.__struct_fields__}


def format_of(kind: type[Document]) -> Any:
    """The format that documents of a kind name."""
    (name,) = get_args(fields(kind)["format"])
    return name


def _document(kind: type[Document], value: dict[str, Any], place: Place) -> Document:
    hints = fields(kind)
    needed = (name for name, hint in hints.items() if UnsetType not in get_args(hint))
    for names, known, said in ((needed, value, "missing"), (value, hints, "unknown")):
        wrong = next((name for name in names if name not in known), None)
        if wrong is not None:
            raise Misfit(place, f"the key {shown(wrong)} is {said}")
    made = kind(**{name: built(hints[name], value[name], (*place, name)) for name in hints if name in value})
    narrow = made.narrowest()
    return made if narrow is kind else _document(narrow, value, place)


def _one_of(wanted: tuple[object, ...], value: object, place: Place) -> object:
    if any(type(each) is type(value) and each == value for each in wanted):
        return value
    words = ", ".join(each if isinstance(each, str) else shown(each) for each in wanted)
    raise Misfit(place, f"expected {'one of ' if len(wanted) > 1 else ''}{words}, found {shown(value)}")


def _check(meta: Meta, value: Any, place: Place) -> None:
    for name, holds, words in LIMITS:
        limit = getattr(meta, name)
        if limit is not None and not holds(value, limit):
            raise Misfit(place, f"expected {words.format(shown(limit))}, found {shown(value)}")
    form = (meta.extra_json_schema or {}).get("format")
    if form is not None and not FORMATS[form](value):
        raise Misfit(place, f"expected a {form}, found {shown(value)}")


# ---------------------------------------------------------------- formats


def _is_dim(text: str) -> bool:
    """Whether a text is what `str` gives of a dim."""
    try:
        return len(text) <= MAX_SHOWN and bool(parse_dim(text))
    except (ValueError, ArithmeticError):
        return False


def _is_inside(text: str) -> bool:
    """Whether a text is the path of a file within a folder, written in the plain way."""
    path = PurePosixPath(text)
    plain = str(path) == text and not path.is_absolute() and "\0" not in text
    return plain and not {".", ".."} & {*path.parts, text}


def _matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text, re.ASCII) is not None


FORMATS: dict[str, Callable[[str], bool]] = {
    "dim": _is_dim,
    "name": _matches(r"[A-Za-z_]\w{0,99}"),
    "inside": _is_inside,
    "sha256": _matches("[0-9a-f]{64}"),
}
"""What `format` means in the schemas."""
