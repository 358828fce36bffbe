"""The published schemas of documents, made from their types, and read for a library that knows nothing of ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.protocols import Validator
from jsonschema.validators import extend

import fastgrad_dsl
from fastgrad_dsl.documents.base import Document
from fastgrad_dsl.documents.calibration import Calibration
from fastgrad_dsl.documents.files import Files
from fastgrad_dsl.documents.form import FORMATS, format_of
from fastgrad_dsl.documents.plan import Approximated, Plan, Polynomial
from fastgrad_dsl.documents.report import Report
from fastgrad_grammar.quote import json_text

SCHEMAS = Path(fastgrad_dsl.__file__).parent / "documents" / "schemas"
KINDS: dict[str, type[Document]] = {
    "plan.json": Plan,
    "calibration.json": Calibration,
    "report.json": Report,
    "files.json": Files,
}
"""The type of each document, by its name."""


@cache
def validator(name: str) -> Validator:
    """The validator of a document by its name, for which 1.0 is no integer."""
    checker = FormatChecker(())
    for form, is_valid in FORMATS.items():
        checker.checks(form)(lambda value, is_valid=is_valid: not isinstance(value, str) or is_valid(value))
    strict = extend(
        Draft202012Validator,
        type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
    )
    schema = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    made: Validator = strict(schema, format_checker=checker)
    return made


def _is_integer(_: object, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def schema_text(kind: type[Document]) -> str:
    """The JSON Schema of a kind of document, as it is published in documents/schemas."""
    narrower = (Polynomial, Approximated) if kind is Plan else ()
    _, definitions = msgspec.json.schema_components((kind, *narrower))
    own = {
        "title": format_of(kind),
        **{key: value for key, value in definitions.pop(kind.__name__).items() if key != "title"},
    }
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **own, "$defs": definitions}
    return _lines(schema) + "\n"


def _lines(schema: Any, key: str = "", margin: str = "") -> str:
    """The text of a schema, with a line for each property."""
    opened = {"properties", "$defs"}
    if not isinstance(schema, dict) or not (key in opened or opened & schema.keys()):
        return json_text(schema)
    inner = f"{margin}  "
    lines = (f"{inner}{json_text(name)}: {_lines(each, name, inner)}" for name, each in schema.items())
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"
