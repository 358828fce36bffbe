"""Writing files whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, EISDIR
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write through a temporary file beside `path`, so that a crash leaves the old file or the new one.

    Folders that are missing are made; an existing file keeps its mode and, where we may give files away, its owner.
    Raises OSError, which names `path`.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
                _dress_like(stream.fileno(), path)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """OSError where something else than a regular file is to be read: pipes wait for a writer, devices may not end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError(EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(EINVAL, "it is a device or a pipe, not a regular file", str(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the body names `path`, and not a file that is only a means to it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _dress_like(number: int, path: Path) -> None:
    """Give an open file the mode and the owner of the regular file at `path`, where there is one."""
    try:
        old = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(old.st_mode):
        with suppress(PermissionError):
            os.fchown(number, old.st_uid, old.st_gid)
        os.fchmod(number, old.st_mode & 0o777)
