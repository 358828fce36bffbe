"""Several files that are written together: each beside its place, and all renamed at the end or none."""

from __future__ import annotations

import contextlib
import filecmp
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from fastgrad_compiler.runtime.private_files import sync_folder
from fastgrad_dsl.storage.files import is_stream, naming, writing
from fastgrad_grammar.diagnostics import TfgError

Writer = Callable[[Path], None]
"""Writes a new file at the path that it is given."""


def text_writer(text: str) -> Writer:
    """A writer of UTF-8 text, with the line ends that it has."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8", newline="")

    return write


def write_together(writers: Mapping[Path, Writer], *, force: bool = False) -> None:
    """Write files under temporary names, and rename them when all are complete.

    Raises TfgError FG604 if a file exists, has other content and `force` is not set, and FG421 if one cannot be
    written. Everything is then as it was. A link that is in the way counts as other content and is never followed.
    """
    aside: dict[Path, Path] = {}
    try:
        for path, write in writers.items():
            with writing(path), naming(path):
                _written(path, write, aside)
        if not force:
            for path, new in aside.items():
                _check_same(path, new)
        for path, new in aside.items():
            with writing(path), naming(path):
                os.replace(new, path)
        for folder in {path.parent for path in aside}:
            sync_folder(folder)
    finally:
        for new in aside.values():
            with contextlib.suppress(OSError):
                new.unlink()


def check_absent(paths: Mapping[Path, object], *, force: bool) -> None:
    """Refuse early what can be refused without content: folders and links in the way. Raises FG421 and FG604."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            raise TfgError.of("FG421", f"cannot write {path}: it is a folder")
        if path.is_symlink() and not force:
            raise _in_the_way(path, "it is a link")


def _written(path: Path, write: Writer, aside: dict[Path, Path]) -> None:
    if is_stream(path):
        raise TfgError.of("FG421", f"cannot write {path}: it is a device or a pipe")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    aside[path] = new
    mode = new.stat().st_mode
    write(new)
    new.chmod(mode & 0o777)  # a library that writes files of its own may have another idea
    with open(new, "rb") as stream:
        os.fsync(stream.fileno())


def _check_same(path: Path, new: Path) -> None:
    if path.is_symlink():
        raise _in_the_way(path, "it is a link")
    if path.exists() and not (path.is_file() and filecmp.cmp(path, new, shallow=False)):
        raise _in_the_way(path, "it has other content")


def _in_the_way(path: Path, why: str) -> TfgError:
    return TfgError.of(
        "FG604", f"{path} is not replaced: {why}", "name another place, or add --force to replace it"
    )
