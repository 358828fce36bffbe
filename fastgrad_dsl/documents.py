"""The JSON documents of a build folder, read in one way: whole, in the form of their schema, or a diagnostic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from fastgrad_compiler.text_parser import parse_dim
from fastgrad_dsl.files import check_regular
from fastgrad_grammar.diagnostics import Diagnostic, TfgError

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from jsonschema.protocols import Validator

PACKAGE = Path(__file__).parent
SCHEMAS = {
    "plan.json": PACKAGE / "schemas" / "plan.json",
    "calibration.json": PACKAGE / "schemas" / "calibration.json",
    "files.json": PACKAGE / "schemas" / "files.json",
    "report.json": PACKAGE / "report" / "schema.json",
}
"""The schema of each document, by the document's name."""

MAX_BYTES = 1 << 26
MAX_DEPTH = 64
LARGEST, SMALLEST = 1e100, 1e-200  # of what numbers may be, beside 0
LONGEST = 1 << 63
MAX_SHOWN = 60  # characters of a value in a diagnostic

Place = tuple[str | int, ...]
"""The keys and indices on the way to a value."""


@dataclass(frozen=True)
class _Fault:
    """What stands in the tree where the text has something that is no JSON, or that JSON leaves open."""

    said: str


def read_document(path: Path, kind: str) -> dict[str, Any]:
    """The document in a file, of the kind `plan.json`, `calibration.json`, `report.json` or `files.json`.

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
        raise TfgError([Diagnostic("FG001", f"cannot read {path}: {reason}")]) from None
    return parse_document(content, kind, str(path))


def parse_document(content: bytes, kind: str, shown: str) -> dict[str, Any]:
    """The document in bytes that were read from the file `shown`; TfgError FG430 for all that is wrong in it."""
    document = _tree(content, shown)
    for place, said in _faults(document):
        raise _refused(shown, place, said)
    wanted, found = form(kind), document.get("format") if isinstance(document, dict) else None
    if found != wanted:
        said = f"expected {_value(wanted)}, found {_value(found)}" if found else f"expected {_value(wanted)}"
        raise _refused(
            shown, ("format",), said, "another version of fastgrad wrote it: compile the spec again"
        )
    check_document(document, kind, shown)
    return dict(document)


def check_document(document: Any, kind: str, shown: str) -> None:
    """TfgError FG430 where a document is not of its form; it has no number that is not finite."""
    from jsonschema.exceptions import best_match

    error = best_match(validator(kind).iter_errors(document))
    if error is not None:
        raise _refused(shown, tuple(error.absolute_path), _said(error))
    rules = RULES.get(kind)
    for place, said in rules(document) if rules else ():
        raise _refused(shown, place, said)


def form(kind: str) -> str:
    """The format that documents of a kind name."""
    return str(_schemas()[kind]["properties"]["format"]["const"])


@cache
def validator(kind: str) -> Validator:
    """The validator of a kind of document, for which 1.0 is no integer."""
    from jsonschema import Draft202012Validator, FormatChecker
    from jsonschema.validators import extend
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    checker = FormatChecker(())
    for name, is_valid in FORMATS.items():
        checker.checks(name)(is_valid)
    strict = extend(
        Draft202012Validator,
        type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
            "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
        ),
    )
    resources = [(name, DRAFT202012.create_resource(schema)) for name, schema in _schemas().items()]
    made: Validator = strict(
        _schemas()[kind], registry=Registry().with_resources(resources), format_checker=checker
    )
    return made


@cache
def _schemas() -> dict[str, Any]:
    return {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in SCHEMAS.items()}


# ---------------------------------------------------------------- formats and rules


def _is_dim(value: object) -> bool:
    """Whether a text is what `str` gives of a dim."""
    try:
        return not isinstance(value, str) or (len(value) <= MAX_SHOWN and bool(parse_dim(value)))
    except (ValueError, ArithmeticError):
        return False


def _is_inside(value: object) -> bool:
    """Whether a text is the path of a file within a folder, written in the plain way."""
    path = PurePosixPath(str(value))
    plain = str(path) == value and not path.is_absolute() and "\0" not in str(value)
    return plain and not {".", ".."} & {*path.parts, value}


def _matches(pattern: str) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or re.fullmatch(pattern, value, re.ASCII) is not None


FORMATS: dict[str, Callable[[object], bool]] = {
    "dim": _is_dim,
    "name": _matches(r"[A-Za-z_]\w{0,99}"),
    "inside": _is_inside,
    "sha256": _matches("[0-9a-f]{64}"),
}
"""What `format` means in the schemas."""


def _plan_rules(plan: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """What a plan says twice, of dims that it does not have, or of lengths that nothing has."""
    from fastgrad_dsl.report.prediction import lengths_of, longest_sizes

    paths: set[str] = set()
    names = {dim["name"] for dim in plan["dims"]}
    for index, entry in enumerate(plan["attentions"]):
        place: Place = ("attentions", index)
        if entry["path"] in paths:
            yield (*place, "path"), f"{_value(entry['path'])} comes twice"
        paths.add(entry["path"])
        for key in ("queries", "keys"):
            unknown = sorted(parse_dim(entry[key]).names - names)
            if unknown:
                yield (*place, key), f"no dim {_value(unknown[0])} is declared"
        if max(lengths_of(entry, longest_sizes(plan)[0])) > LONGEST:
            yield place, f"sequences of more than {LONGEST} tokens"
        if entry["decision"] == "polynomial" and len(entry["coefficients"]) != entry["degree"] + 1:
            yield (*place, "coefficients"), f"expected {entry['degree'] + 1} for this degree"


RULES: dict[str, Callable[[Mapping[str, Any]], Iterator[tuple[Place, str]]]] = {"plan.json": _plan_rules}
"""What a schema cannot say, by kind: places and what is wrong there."""


# ---------------------------------------------------------------- the text


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
        said = f"no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
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
    return _Fault(f"the key {_value(next(name for name in names if names.count(name) > 1))} twice")


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
    return TfgError([Diagnostic("FG430", f"{shown}:{where} {said}", help=(help_,))])


def _step(key: str | int) -> str:
    """A key as JSON pointers write it."""
    return str(key)[:MAX_SHOWN].replace("~", "~0").replace("/", "~1")


def _value(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _said(error: ValidationError) -> str:
    """What is wrong with a value, without the whole of it."""
    wanted: Any = error.validator_value
    schema: Any = error.schema
    value: Any = error.instance
    if error.validator == "required":
        return f"the key {_value(next(key for key in wanted if key not in value))} is missing"
    if error.validator == "additionalProperties":
        known = schema.get("properties", {})
        return f"the key {_value(next((key for key in value if key not in known), '?'))} is unknown"
    words = WORDS.get(str(error.validator), "something else than")
    listed = wanted if isinstance(wanted, list) else [wanted]
    return f"expected {words.format(', '.join(map(_word, listed)))}, found {_value(value)}"


WORDS = {
    "type": "of type {}",
    "enum": "one of {}",
    "const": "{}",
    "format": "a {}",
    "minimum": "at least {}",
    "maximum": "at most {}",
    "exclusiveMinimum": "more than {}",
    "minItems": "at least {} items",
}
"""What a keyword of a schema asks for."""


def _word(value: object) -> str:
    return value if isinstance(value, str) else _value(value)
