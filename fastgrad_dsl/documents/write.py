"""The text of a document, and the schema that its type is."""

from __future__ import annotations

from typing import Any

import msgspec

from fastgrad_dsl.documents.base import Document
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.documents.plan import Approximated, Plan, Polynomial
from fastgrad_grammar.quote import json_text


def plain(document: Document | None) -> Any:
    """A document or a part of one as the data of the JSON."""
    return msgspec.to_builtins(document)


def to_json(document: Document) -> str:
    """The text of the file; deterministic. ValueError for a number that is not finite."""
    return json_text(plain(document), 2) + "\n"


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
