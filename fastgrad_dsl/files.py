"""Writing files whole or not at all."""

from __future__ import annotations

from pathlib import Path

from fastgrad_compiler.runtime.private_files import write_whole


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write through a temporary file beside `path`, so that a crash leaves the old file or the new one.

    Folders that are missing are made. Raises OSError where that or the writing fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.encode() if isinstance(content, str) else content, 0o666)
