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

    A device or a pipe is written as it is. Folders that are missing are made; an existing file keeps its mode and,
    where we may give files away, its owner.
    Raises OSError, which names `path`.
    """
    data = content.encode() if isinstance(content, str) else content
    with naming(path):
        if is_stream(path):
            _write_stream(path, data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        old = _regular_file(path)
        if old is None:
            write_whole(path, data, 0o666)
            return
        mode = old.st_mode & 0o777
        write_whole(path, data, mode)  # less the process's mask: nobody sees more meanwhile
        with suppress(OSError):  # the file is whole and there, whoever owns it
            os.chown(path, old.st_uid, old.st_gid)
            path.chmod(mode)


def is_stream(path: Path) -> bool:
    """Whether a path is there and is a device, a pipe or a socket, or names an open file (/dev/stdout, /dev/fd/1)."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    named = path.is_symlink() and path.is_absolute() and path.parts[1] in ("dev", "proc")
    return named or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _write_stream(path: Path, data: bytes) -> None:
    number = os.open(
        path, os.O_WRONLY | os.O_NONBLOCK
    )  # a pipe that nobody reads is an error, not waited for
    os.set_blocking(number, True)
    with os.fdopen(number, "wb") as stream:
        stream.write(data)


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
