"""Writing files whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastgrad_compiler.runtime.private_files import write_whole
from fastgrad_grammar.diagnostics import TfgError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write through a temporary file beside `path`, so that a crash leaves the old file or the new one.

    Folders that are missing are made; an existing file keeps its mode and, where we may give files away, its owner.
    Raises OSError, which names `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _regular_file(path)
        if old is None:
            write_whole(path, data, 0o666)
            return
        mode = old.st_mode & 0o777
        write_whole(path, data, mode)  # less the process's mask: nobody sees more meanwhile
        with suppress(PermissionError):
            os.chown(path, old.st_uid, old.st_gid)
        path.chmod(mode)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the body names `path`, and not a file that is only a means to it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def writing(path: Path, *, kept: str = "") -> Iterator[None]:
    """Makes an OSError of what is done inside the diagnostic FG421; `kept` says what there is to go on from."""
    try:
        yield
    except OSError as error:
        reason, help_ = error.strerror or str(error), (kept,) if kept else ()
        raise TfgError.of("FG421", f"cannot write {path}: {reason}", *help_) from None


def _regular_file(path: Path) -> os.stat_result | None:
    """What is known of the file at a path; None where there is none, or a link."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        return found if stat.S_ISREG(found.st_mode) else None
    return None
