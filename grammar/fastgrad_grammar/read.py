"""Reading `.tfg` files: every way in which that can fail is a diagnostic."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest
from fastgrad_grammar.source import Source

MAX_BYTES = 1 << 18
"""Files above this size are refused: a hand-written model is a few kilobytes."""


_KINDS = {
    stat.S_IFDIR: "it is a folder",
    stat.S_IFIFO: "it is a pipe, not a regular file",
    stat.S_IFSOCK: "it is a socket, not a regular file",
    stat.S_IFCHR: "it is a device, not a regular file",
    stat.S_IFBLK: "it is a device, not a regular file",
}


def read_source(
    path: str | os.PathLike[str],
    *,
    include: Iterable[str | os.PathLike[str]] = (),
    place: str | None = None,
) -> Source:
    """Read a UTF-8 `.tfg` file; a byte order mark is dropped and CRLF line ends become LF.

    `include` names folders, besides the file's own, from which it may `use` files. `place` is where the file lies,
    without links, if that is not `path`. Raises TfgError: FG001 (missing, no permission, no regular file), FG002 (not
    UTF-8), FG003 (above `MAX_BYTES`), FG416 (`include` names something other than a folder).
    """
    shown, folders = os.fspath(path), included(include)
    try:
        data = _read(place or shown)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise TfgError([_unreadable(shown, error)]) from None
    if len(data) > MAX_BYTES:
        raise TfgError([too_large(shown)])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TfgError([_not_utf8(shown, data, error)]) from None
    return Source(shown, text.replace("\r\n", "\n").replace("\r", "\n"), folders)


def included(folders: Iterable[str | os.PathLike[str]]) -> tuple[str, ...]:
    """The names of folders that are there; TfgError FG416 for any other."""
    names = tuple(os.fspath(folder) for folder in folders)
    for name in names:
        if not os.path.isdir(name):
            raise TfgError([Diagnostic("FG416", f"--include {name}: there is no such folder")])
    return names


def check_regular(path: str | os.PathLike[str]) -> None:
    """OSError where something other than a regular file is to be read: pipes wait for a writer, devices may not end."""
    _check_kind(os.stat(path).st_mode)


def _read(path: str) -> bytes:
    """Up to `MAX_BYTES` + 1 bytes of a regular file; nothing else is opened."""
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        _check_kind(os.fstat(descriptor).st_mode)
        return file.read(MAX_BYTES + 1)


def _check_kind(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise _NoFileError(_KINDS.get(stat.S_IFMT(mode), "it is not a regular file"))


class _NoFileError(OSError):
    """Something else than a regular file; the message says what."""


def too_large(path: str) -> Diagnostic:
    """FG003 for a text above `MAX_BYTES`."""
    return Diagnostic(
        "FG003",
        f"{path} is larger than {MAX_BYTES >> 10} KiB",
        help=("a .tfg file is a short text; put parts of it in other files and read them with `use`",),
    )


def _unreadable(path: str, error: OSError | ValueError) -> Diagnostic:
    reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
    help_lines: tuple[str, ...] = ()
    if isinstance(error, FileNotFoundError):
        reason = "no such file"
        near = _nearest_file(Path(path))
        help_lines = (f"did you mean {near}?",) if near else ()
    elif os.path.isdir(path):
        inside = sorted(Path(path).glob("*.tfg"))
        help_lines = (f"name a file, such as {inside[0]}",) if inside else ("name a .tfg file",)
    return Diagnostic("FG001", f"cannot read {path}: {reason}", help=help_lines)


def _nearest_file(path: Path) -> Path | None:
    """The file beside `path` whose name is most like its own."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return None
    if f"{path.name}.tfg" in names:
        return path.with_name(f"{path.name}.tfg")
    tfg = [name for name in names if name.endswith(".tfg")]
    near = nearest(path.name, tfg) or nearest(path.name, names)
    return path.with_name(near) if near else None


def _not_utf8(path: str, data: bytes, error: UnicodeDecodeError) -> Diagnostic:
    line = data.count(b"\n", 0, error.start) + 1
    return Diagnostic(
        "FG002",
        f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start} (line {line})",
        help=("save the file as UTF-8",),
    )
