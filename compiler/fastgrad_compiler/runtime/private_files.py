"""Folders and files that only this user may change: the cache, and what lasts as long as a process.

Code is loaded from them, so a folder is used only if its owner is this user or root, nobody else may write it, and
nobody else may put another in its place: the same holds of each folder above it, where a sticky bit will do. What is
locked belongs to a live process; anything else of ours that is temporary was left by a killed one, and is removed.

Read from the environment: FASTGRAD_CACHE.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_PREFIX = "fastgrad-process-"
_APPLE = sys.platform == "darwin"
_WRITE = stat.S_IWGRP | stat.S_IWOTH


class CacheWarning(RuntimeWarning):
    """The user's cache is not safe to use; what it would hold is made anew in each process."""


# ---------------------------------------------------------------- whom a file belongs to


def why_unsafe(folder: str | os.PathLike[str]) -> str | None:
    """Why others may change what a folder holds, None if they may not. Raises OSError where it is missing."""
    if not hasattr(os, "geteuid"):
        return None
    real = Path(os.path.realpath(folder))
    for path in (real, *real.parents):
        status = path.stat()
        if not _is_owner_trusted(status):
            return f"{path} belongs to another user"
        sticky = path != real and status.st_mode & stat.S_ISVTX
        if not sticky and _others_may_write(path, status):
            return f"others may write to {path}"
    return None


def read_own(path: str | os.PathLike[str]) -> bytes | None:
    """The content of a regular file, no link, that only this user or root may change; None for any other."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return None
        if hasattr(os, "geteuid") and not (_is_owner_trusted(status) and not _others_may_write(path, status)):
            return None
        return stream.read()


def _is_owner_trusted(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.geteuid())


def _others_may_write(path: str | os.PathLike[str], status: os.stat_result) -> bool:
    bits = status.st_mode & _WRITE
    if bits == stat.S_IWGRP:
        return _has_list(path) or not _is_private_group(status.st_gid)
    return bool(bits)


def _has_list(path: str | os.PathLike[str]) -> bool:
    """Whether a list of access rights names more than owner and group."""
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except (AttributeError, OSError):
        return False


def _is_private_group(gid: int) -> bool:
    """Whether a group is that of this user alone: it has the user's name and no other member."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


# ---------------------------------------------------------------- the folders


def cache_folder() -> Path | None:
    """FASTGRAD_CACHE, else `fastgrad` in the user's cache folder; made, for this user alone, if need be.

    None where there cannot be one, and, with one warning in the process, where others may change it.
    """
    try:
        folder = _wanted_folder()
        for path in (*reversed(folder.parents), folder):
            if not path.exists():
                path.mkdir(mode=0o700, exist_ok=True)
        reason = why_unsafe(folder)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    if reason is None:
        return Path(os.path.realpath(folder))
    message = (
        f"the cache {folder} is not used, for others may change what is loaded from it: {reason}. Remove the "
        "folder, or name another one by FASTGRAD_CACHE"
    )
    warn_once("cache_warning", message, CacheWarning)
    return None


def _wanted_folder() -> Path:
    if chosen := os.environ.get("FASTGRAD_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastgrad"
    if _APPLE:
        return Path.home() / "Library" / "Caches" / "fastgrad"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgrad"


@functools.cache
def private_folder() -> Path:
    """A folder of this process, removed when it ends, or by a later process if it is killed.

    Raises OSError where there cannot be one that others cannot change.
    """
    remove_dead_folders()
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        if (reason := why_unsafe(folder)) is not None:
            folder.rmdir()
            raise PermissionError(13, f"others may change what is loaded from it: {reason}")
        descriptor = _open(folder)  # open, and locked, until the process ends
        if descriptor is None or (lock(descriptor) is not False and folder.exists()):
            atexit.register(_remove, folder, os.getpid())
            return folder
        os.close(descriptor)  # another process took it for a dead one's


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a process that was forked from it
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def remove_dead_folders() -> None:
    """Remove the private folders of killed processes, and end the compilers that still run in them."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _held(path) as dead:
            if dead and path.stat().st_uid == os.geteuid():
                _end_compilers(path)
                shutil.rmtree(path, ignore_errors=True)


def _end_compilers(folder: Path) -> None:
    """Kill what was started with a dead process's folder for its temporary files."""
    mark = f"TMPDIR={folder}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(int(entry.name))
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


# ---------------------------------------------------------------- files that are written whole


def write_whole(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write through a temporary file beside `path`, so that a crash leaves the old file or the new one.

    `mode` is that of a new file, less the process's mask. Raises OSError where that fails; nothing is left then.
    """
    prefix = f".{path.name[:100]}."
    remove_dead_files(path.parent, prefix)
    descriptor, aside = _temporary(path.parent, prefix, mode)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
            if fcntl is None:
                stream.close()  # Windows renames no open file
            os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    sync_folder(path.parent)


def _temporary(folder: Path, prefix: str, mode: int) -> tuple[int, Path]:
    """A new file, locked as long as it is open."""
    while True:
        aside = folder / f"{prefix}{secrets.token_hex(4)}.tmp"
        try:
            descriptor = os.open(
                aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode
            )
        except FileExistsError:
            continue
        if lock(descriptor) is not False and os.path.exists(aside):
            return descriptor, aside
        os.close(descriptor)  # another process took it for a dead one's
        aside.unlink(missing_ok=True)


def remove_dead_files(folder: Path, prefix: str) -> None:
    """Remove the temporary files of killed processes whose names are `prefix`, eight digits and .tmp.

    With the prefix "." those of every file.
    """
    ours = re.compile(rf"{re.escape(prefix)}{'.*' if prefix == '.' else ''}[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(OSError):
        for path in [Path(entry.path) for entry in os.scandir(folder) if ours.fullmatch(entry.name)]:
            with contextlib.suppress(OSError), _held(path) as dead:
                if dead and stat.S_ISREG(path.lstat().st_mode):
                    path.unlink()


def sync_folder(folder: Path) -> None:
    """Make what was renamed in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------- what lives


@contextlib.contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether what lies at `path`, which is locked meanwhile, is no live process's; False where there are no locks."""
    descriptor = _open(path)
    if descriptor is None:
        yield False
        return
    try:
        yield lock(descriptor) is True and path.exists()
    finally:
        os.close(descriptor)


def _open(path: str | os.PathLike[str]) -> int | None:
    """A file or folder to lock, no link; None where there are no locks."""
    return None if fcntl is None else os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def lock(descriptor: int) -> bool | None:
    """Take the lock of an open file: False where another has it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def warn_once(key: str, message: str, category: type[Warning]) -> None:
    """One warning of a kind in a process, whichever copy of this file is the first to need it."""
    import torch

    shared = vars(torch.ops.fastgrad)
    if key not in shared:
        shared[key] = message
        warnings.warn(message, category, stacklevel=3)
