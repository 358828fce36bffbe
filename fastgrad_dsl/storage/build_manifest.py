"""What of a folder a compile wrote: files.json names each file with the hash of its content.

A name is trusted only as far as a file agrees with it: a regular one, inside the folder, reached without a link, with
the very content that was written. Everything else in the folder is the user's.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from fastgrad_dsl.documents.files import Files
from fastgrad_dsl.documents.form import format_of
from fastgrad_dsl.documents.read import parse_document
from fastgrad_dsl.documents.write import to_json
from fastgrad_grammar.diagnostics import TfgError

MANIFEST = "files.json"
_MOST_BYTES = 1 << 20
_SHOWN = 5


def manifest_text(files: Mapping[str, str]) -> str:
    """files.json for files, by name within the folder."""
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(files.items())}
    return to_json(Files(format=format_of(Files), files=hashes))


def read_manifest(folder: Path) -> dict[str, str] | None:
    """Names and hashes of a folder's files.json; None where there is none, or it is not of its schema.

    Raises OSError where it is there and cannot be read.
    """
    try:
        with open(_open_inside(folder, MANIFEST), "rb") as stream:
            content = stream.read(_MOST_BYTES)
        return parse_document(content, Files, str(folder / MANIFEST)).files
    except (FileNotFoundError, _NotOursError, TfgError):
        return None


def check_folder(folder: Path, names: Iterable[str] = (), force: bool = False) -> None:
    """Whether a build of files `names` may take the place of what is in a folder.

    Raises TfgError: FG421 (no folder), FG428 (something that a compile did not write would be lost), the latter not
    with `force`.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise TfgError.of("FG421", f"cannot write to {folder}: it is a file")
    if not any(folder.iterdir()):
        return
    for name in names:
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            raise TfgError.of("FG421", f"cannot write to {folder}: {name} is a folder there")
    if not force:
        _check_ours(folder, names)


def _check_ours(folder: Path, names: Iterable[str]) -> None:
    known = read_manifest(folder)
    if known is None:
        found = "has files" if not os.path.lexists(folder / MANIFEST) else f"has a {MANIFEST} that is none"
        raise TfgError.of(
            "FG428",
            f"{folder} is not replaced: it {found} of a build by this fastgrad",
            "name another folder, or add --force: what the build does not write is kept there",
        )
    changed = [name for name, value in known.items() if not _agrees(folder, name, value)]
    strange = sorted(set(_in_the_way(folder, names)) - set(known))
    for these, what in (
        (changed, "was changed since fastgrad wrote it"),
        (strange, "is not of the build there"),
    ):
        if these:
            shown = ", ".join(these[:_SHOWN]) + (
                f" and {len(these) - _SHOWN} more" if len(these) > _SHOWN else ""
            )
            raise TfgError.of(
                "FG428",
                f"{folder} is not replaced: {shown} {what}",
                "keep a copy elsewhere and add --force to replace it, or name another folder",
            )


def _in_the_way(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """What stands where the files of a build, and the folders that they are in, would."""
    for name in names:
        if os.path.lexists(folder / name):
            yield name
        for parent in PurePosixPath(name).parents:
            path = folder / parent
            if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()) and path != folder:
                yield str(parent)


def _agrees(folder: Path, name: str, value: str) -> bool:
    """Whether a file is as it was written, or was removed."""
    try:
        with open(_open_inside(folder, name), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == value
    except FileNotFoundError:
        return True
    except _NotOursError:
        return False


class _NotOursError(Exception):
    """A name does not lead to a regular file of the folder."""


def _open_inside(folder: Path, name: str) -> int:
    """A descriptor of a regular file of the folder, to which no link leads. Raises OSError and _NotOursError."""
    path = folder
    for part in PurePosixPath(name).parts[:-1]:
        path /= part
        if path.is_symlink():
            raise _NotOursError
    if not stat.S_ISREG(os.lstat(folder / name).st_mode):
        raise _NotOursError
    return os.open(folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
