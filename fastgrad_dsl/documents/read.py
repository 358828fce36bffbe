"""The JSON documents of a build folder, read in one way: whole, in the form of their schema, or a diagnostic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastgrad_dsl.documents.base import Document, Place
from fastgrad_dsl.documents.form import MAX_SHOWN, Misfit, built, format_of
from fastgrad_dsl.documents.form import shown as value
from fastgrad_grammar.diagnostics import TfgError
from fastgrad_grammar.read import check_regular

_Document = TypeVar("_Document", bound=Document)

MAX_BYTES = 1 << 26
MAX_DEPTH = 64
LARGEST, SMALLEST = 1e100, 1e-200  # of what numbers may be, beside 0


@dataclass(frozen=True)
class _Fault:
    """What stands in the tree where the text has something that is not JSON, or that JSON leaves open."""

    said: str


def read_document(path: Path, kind: type[_Document]) -> _Document:
    """The document in a file: a Plan, a Calibration, a Report or Files.

    Raises TfgError FG430, with the place inside, for all that is wrong in it; FG001 where it cannot be read.
    """
    try:
        if not path.exists():
            raise FileNotFoundError("no such file")
        check_regular(path)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TfgError.of("FG001", f"cannot read {path}: {reason}") from None
    return parse_document(content, kind, str(path))


def parse_document(content: bytes, kind: type[_Document], shown: str) -> _Document:
    """The document in bytes that were read from the file `shown`; TfgError FG430 for all that is wrong in it."""
    tree = parse_json(content, shown)
    wanted, found = format_of(kind), tree.get("format") if isinstance(tree, dict) else None
    if found != wanted:
        said = f"expected {value(wanted)}, found {value(found)}" if found else f"expected {value(wanted)}"
        raise _refused(
            shown, ("format",), said, "another version of fastgrad wrote it: compile the spec again"
        )
    try:
        document: _Document = built(kind, tree)
    except Misfit as error:
        raise _refused(shown, error.place, error.said) from None
    for place, said in document.faults():
        raise _refused(shown, place, said)
    return document


# ---------------------------------------------------------------- the text


def parse_json(content: bytes, shown: str) -> Any:
    """The data of strict JSON, of limited size and depth; TfgError FG430, with the place, for what is wrong in it."""
    tree = _tree(content, shown)
    for place, said in _faults(tree):
        raise _refused(shown, place, said)
    return tree


def _tree(content: bytes, shown: str) -> Any:
    if len(content) > MAX_BYTES:
        raise _refused(shown, None, f"larger than {MAX_BYTES >> 20} MiB")
    try:
        return json.loads(
            content.decode("utf-8"),
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_Fault,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise _refused(
            shown, None, f"not UTF-8 text: byte 0x{content[error.start]:02x} at {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        said = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise _refused(shown, None, said) from None
    except RecursionError:
        raise _refused(shown, None, _TOO_DEEP) from None


def _integer(text: str) -> int | _Fault:
    value = int(text) if len(text) <= 20 else 1 << 63
    return value if abs(value) < 1 << 63 else _Fault("an integer of more than 64 bits")


def _float(text: str) -> float | _Fault:
    value = float(text)
    if value and not SMALLEST <= abs(value) <= LARGEST:
        return _Fault(f"a number that is not between {SMALLEST:g} and {LARGEST:g}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Fault:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    return _Fault(f"the key {value(next(name for name in names if names.count(name) > 1))} twice")


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def _faults(tree: Any) -> Iterator[tuple[Place, str]]:
    """The faults of the text, and values that are nested too deep."""
    waiting: list[tuple[Place, Any]] = [((), tree)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, _Fault):
            yield place, f"found {value.said}"
        elif len(place) > MAX_DEPTH:
            yield place[:8], _TOO_DEEP
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*place, key), item) for key, item in items]


# ---------------------------------------------------------------- what is said


def _refused(shown: str, place: Place | None, said: str, help_: str = "write the folder again") -> TfgError:
    where = "" if not place else f" /{'/'.join(map(_step, place))}:"
    return TfgError.of("FG430", f"{shown}:{where} {said}", help_)


def _step(key: str | int) -> str:
    """A key as JSON pointers write it."""
    return str(key)[:MAX_SHOWN].replace("~", "~0").replace("/", "~1")
