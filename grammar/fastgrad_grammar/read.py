"""Reading `.tfg` files: every way in which that can fail is a diagnostic."""

from __future__ import annotations

import os
from pathlib import Path

from fastgrad_grammar.diagnostics import Diagnostic, TfgError, nearest
from fastgrad_grammar.source import Source

MAX_BYTES = 1 << 18
"""Files above this size are refused: a hand-written model is a few kilobytes."""


def read_source(path: str | os.PathLike[str]) -> Source:
    """Read a UTF-8 `.tfg` file; a byte order mark is dropped and CRLF line ends become LF.

    Raises TfgError: FG001 (missing, a folder, no permission), FG002 (not UTF-8), FG003 (above `MAX_BYTES`).
    """
    shown = os.fspath(path)
    try:
        with Path(shown).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise TfgError([_unreadable(shown, error)]) from None
    if len(data) > MAX_BYTES:
        raise TfgError([too_large(shown)])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TfgError([_not_utf8(shown, data, error)]) from None
    return Source(shown, text.replace("\r\n", "\n").replace("\r", "\n"))


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
    elif isinstance(error, IsADirectoryError):
        reason = "it is a folder"
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
