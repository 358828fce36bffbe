"""The published schemas of documents, for a library that knows nothing of ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.protocols import Validator
from jsonschema.validators import extend

import fastgrad_dsl
from fastgrad_dsl.documents.form import FORMATS

SCHEMAS = Path(fastgrad_dsl.__file__).parent / "documents" / "schemas"


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
