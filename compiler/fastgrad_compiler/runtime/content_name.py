"""Names that hash what they stand for: an operation of a process is shared by those copies alone that do the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from importlib.machinery import ModuleSpec


def content_name(stem: str, contents: Iterable[bytes]) -> str:
    """`stem`, `_` and twelve hexadecimal digits of a hash of files; the ends of their lines do not count."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(hashlib.sha256(content.replace(b"\r\n", b"\n")).digest())
    return f"{stem}_{digest.hexdigest()[:12]}"


def read_beside(spec: ModuleSpec | None, file: str) -> bytes:
    """A file beside the module of `spec`, in a folder, an archive or memory; OSError where there is none."""
    loader, origin = getattr(spec, "loader", None), getattr(spec, "origin", None) or ""
    path = os.path.join(os.path.dirname(origin), file)
    if not hasattr(loader, "get_data"):
        raise FileNotFoundError(path)
    data: bytes = loader.get_data(path)  # type: ignore[union-attr]
    return data
