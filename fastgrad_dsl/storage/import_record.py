"""Where the record of an import lies: beside the spec that it made, and in the builds of that spec."""

from __future__ import annotations

from pathlib import Path

from fastgrad_dsl.documents.origin import Origin
from fastgrad_dsl.documents.read import read_document
from fastgrad_dsl.documents.write import to_json

RECORD = "origin.json"
"""In a build; beside MODEL.tfg it is MODEL.origin.json."""


def beside(spec: Path) -> Path:
    """The path of the record of a spec."""
    return spec.with_suffix(f".{RECORD}")


def record_for_build(spec: str) -> dict[str, str]:
    """What a build of a spec holds of its import, by name: nothing for a spec that was not imported.

    Raises TfgError FG430 for a record that is damaged.
    """
    if not spec.endswith(".tfg") or not beside(Path(spec)).is_file():
        return {}
    return {RECORD: to_json(read_document(beside(Path(spec)), Origin))}
