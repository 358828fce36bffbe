"""files.json: the files that a compile wrote."""

from __future__ import annotations

from typing import Literal

from fastgrad_dsl.documents.base import Document, FilePath, Hash


class Files(Document, frozen=True):
    """The files that a compile wrote, by their path within the folder, each with the SHA-256 of its content."""

    format: Literal["fastgrad-files-2"]
    files: dict[FilePath, Hash]
