"""What a user names to be written: tried before anything is measured, and rewritten without a loss."""

from __future__ import annotations

import os
import stat
import tempfile
from errno import EISDIR, ENOTDIR, EROFS
from pathlib import Path

from fastgrad_dsl.storage.files import is_stream, naming, write_atomically, writing
from fastgrad_grammar.diagnostics import TfgError

TRIED = bytes(1 << 14)
"""A disk that has no room for as little has none for any output."""


def rewrite(path: Path, content: str) -> None:
    """Replace a user's own file: following its symbolic links, with its mode; in place if it has other hard links.

    Raises OSError, which names `path`; PermissionError for a file that is marked as read-only.
    """
    with naming(path):
        found = path.stat()
        if not os.access(path, os.W_OK) or not found.st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(EROFS, "it is marked as read-only")
        if found.st_nlink > 1:
            path.write_text(content, encoding="utf-8", newline="")
        else:
            write_atomically(path.resolve(), content)


def try_file(path: Path | None) -> None:
    """Find out whether a file can be written, and leave everything as it is. Raises TfgError FG421."""
    if path is None:
        return
    with writing(path):
        if path.is_dir():
            raise OSError(EISDIR, os.strerror(EISDIR))
        if not is_stream(path):
            _try_folder(path.parent)


def try_files(**outputs: Path | None) -> None:
    """`try_file` for each output of a command, by the name of its option.

    Raises TfgError FG421, and FG416 where two of them are one file; a device or a pipe may take both.
    """
    there: dict[str, str] = {}
    for name, path in outputs.items():
        try_file(path)
        if path is None or is_stream(path):
            continue
        other = there.setdefault(os.path.realpath(path), name)
        if other != name:
            raise TfgError.of("FG416", f"--{other} and --{name} are one file: {path}", "write them to two")


def try_folder(path: Path) -> None:
    """Find out whether a folder, which need not exist, can be written to. Raises TfgError FG421."""
    with writing(path):
        _try_folder(path)


def _try_folder(path: Path) -> None:
    """The folder, or the nearest above it that is there, takes a file, which is gone at once."""
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise OSError(ENOTDIR, os.strerror(ENOTDIR))
    with tempfile.TemporaryFile(dir=path) as stream:
        stream.write(TRIED)
        stream.flush()
