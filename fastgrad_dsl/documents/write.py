"""The text of a document."""

from __future__ import annotations

from typing import Any

import msgspec

from fastgrad_dsl.documents.base import Document
from fastgrad_grammar.quote import json_text


def plain(document: Document | None) -> Any:
    """A document or a part of one as the data of the JSON."""
    return msgspec.to_builtins(document)


def to_json(document: Document) -> str:
    """The text of the file; deterministic. ValueError for a number that is not finite."""
    return json_text(plain(document), 2) + "\n"
