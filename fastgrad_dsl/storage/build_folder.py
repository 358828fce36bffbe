"""Writing a build: a new folder is made beside the old one and takes its place as a whole, with the user's own files.

Beside a folder NAME stand, while it is written, `.NAME.INODE.new`, the next build, and `.NAME.INODE.old`, the one that
was, where the system cannot exchange two folders at once. INODE is that of the folder when it got the name: a `.new`
of another inode has been exchanged. All is done under the lock of the folder above, so that what is found there under
it was left by a killed process: the next one finishes or undoes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from fastgrad_compiler.runtime.private_files import lock, sync_folder
from fastgrad_dsl.storage.build_manifest import MANIFEST, check_folder, manifest_text, read_manifest
from fastgrad_grammar.diagnostics import TfgError

LOCK_SECONDS = 60
_BYTECODE = "__pycache__"
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux
_HERE = -100  # AT_FDCWD
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def write_build(folder: Path, files: Mapping[str, str], *, force: bool = False) -> None:
    """Make `folder` hold `files`, by name, and the user's own files that it held.

    Raises TfgError: FG421 where that cannot be done, and FG428 where something that no compile wrote would be lost and
    `force` is not set. What was there is unchanged then.
    """
    real = Path(os.path.realpath(folder))
    try:
        _check_place(real)
        real.parent.mkdir(parents=True, exist_ok=True)
        with _locked(real.parent) as alone:
            if alone:
                _finish(real)
            check_folder(folder, files, force)
            _put(_built(real, files), real)
    except OSError as error:
        help_ = ("what was there is unchanged",)
        raise TfgError.of("FG421", f"cannot write to {folder}: {error.strerror or error}", *help_) from None


def recover(folder: Path) -> None:
    """Put back a build whose replacement was cut short, and remove what killed processes left."""
    real = Path(os.path.realpath(folder))
    with contextlib.suppress(OSError), _locked(real.parent) as alone:
        if alone:
            _finish(real)


def _check_place(real: Path) -> None:
    if not real.name:
        raise OSError(errno.EBUSY, "it is the root of the file system")
    with contextlib.suppress(FileNotFoundError):
        if Path.cwd().is_relative_to(real):
            reason = "it is replaced as a whole, and is, or holds, the current folder; run the command from outside"
            raise OSError(errno.EBUSY, reason)
    if real.is_mount():
        raise OSError(errno.EBUSY, "it is a mount point, which cannot be replaced; name a folder in it")
    if real.is_dir() and not os.access(real, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "permission denied")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder; False where there are no locks."""
    if os.name != "posix":
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while (locked := lock(descriptor)) is False:
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, "another process holds the lock of the folder above")
            time.sleep(0.02)
        yield locked is not None
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- the next folder


def _built(real: Path, files: Mapping[str, str]) -> Path:
    """The next build, complete, beside the folder."""
    first = real.with_name(f".{real.name}.{secrets.token_hex(4)}.tmp")
    os.mkdir(first)
    try:
        new = first.with_name(f".{real.name}.{first.stat().st_ino}.new")
        os.rename(first, new)
    except BaseException:
        first.rmdir()
        raise
    try:
        for name, text in (
            (MANIFEST, manifest_text(files)),
            *files.items(),
        ):  # first what says which are ours
            _write(new / name, text.encode())
        if real.exists():
            _Carrier(real, new, files).carry()
            _copy_rights(real, new)
        for path, _, _ in os.walk(new):
            sync_folder(Path(path))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return new


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_rights(old: Path, new: Path) -> None:
    status = old.stat()
    if (status.st_uid, status.st_gid) != (new.stat().st_uid, new.stat().st_gid):
        with contextlib.suppress(OSError):
            os.chown(new, status.st_uid, status.st_gid)
    os.chmod(new, stat.S_IMODE(status.st_mode))


class _Carrier:
    """Gives the next build the user's files, by hard links: what is open stays open, and nothing is copied."""

    def __init__(self, old: Path, new: Path, files: Mapping[str, str]) -> None:
        self.old, self.new = old, new
        self.device = old.stat().st_dev
        ours = {MANIFEST, *files, *(read_manifest(old) or {})}
        self.folders = {str(parent) for name in ours for parent in PurePosixPath(name).parents}
        self.ours = ours

    def carry(self, within: str = "") -> None:
        """Carry what is in one folder, and below it."""
        for entry in os.scandir(self.old / within):
            name = f"{within}{entry.name}"
            if not entry.is_dir(follow_symlinks=False):
                if name not in self.ours and name not in self.folders:
                    _link(self.old / name, self.new / name)
            elif entry.name != _BYTECODE:
                self._folder(name)

    def _folder(self, name: str) -> None:
        old, new = self.old / name, self.new / name
        if old.stat().st_dev != self.device:
            raise OSError(errno.EBUSY, f"{name} in it is a mount point")
        new.mkdir(exist_ok=True)
        self.carry(f"{name}/")
        _copy_rights(old, new)
        if name in self.folders:
            with contextlib.suppress(OSError):  # it has something
                new.rmdir()


def _link(old: Path, new: Path) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, NotImplementedError):
        if old.is_symlink():
            os.symlink(os.readlink(old), new)
        elif old.is_file():
            shutil.copy2(old, new)
            with open(new, "rb") as stream:
                os.fsync(stream.fileno())
        else:
            raise


# ---------------------------------------------------------------- taking the place


def _put(new: Path, real: Path) -> None:
    """Put the next build in the place of the folder."""
    try:
        old = _swap(new, real)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    sync_folder(real.parent)
    if old is not None:
        _retire(old, real)


def _swap(new: Path, real: Path) -> Path | None:
    """Where the folder's former content is now; None if it had none."""
    try:
        if exchange(new, real):
            return new
        old = real.with_name(f".{real.name}.{real.stat().st_ino}.old")
        os.rename(real, old)
    except FileNotFoundError:
        os.rename(new, real)
        return None
    try:
        os.rename(new, real)
    except BaseException:
        os.rename(old, real)
        raise
    return old


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders at once; False where the system cannot."""
    if sys.platform != "linux":
        return False
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number))


def _finish(real: Path) -> None:
    """Finish or undo what killed processes left beside the folder, whose lock is held."""
    for path in sorted(real.parent.glob(f".{glob.escape(real.name)}.*")):
        kind, token = path.suffix, path.stem.rpartition(".")[2]
        if path.name != f".{real.name}.{token}{kind}" or path.is_symlink() or not path.is_dir():
            continue
        if kind == ".tmp" and len(token) == 8:
            with contextlib.suppress(OSError):  # not empty: none of ours
                path.rmdir()
        elif kind == ".new" and token == str(path.stat().st_ino):
            shutil.rmtree(path, ignore_errors=True)
        elif kind == ".old" and token.isdecimal() and not os.path.lexists(real):
            os.rename(path, real)
        elif kind in (".new", ".old") and token.isdecimal():
            _retire(path, real)


def _retire(old: Path, real: Path) -> None:
    """Remove the former content of the folder, except for what the user put there since it was carried over.

    What cannot be removed now is removed by the next compile.
    """
    with contextlib.suppress(OSError):
        ours = {MANIFEST, *(read_manifest(old) or {}), *(read_manifest(real) or {})}
        for where, folders, files in os.walk(old, topdown=False):
            os.chmod(where, 0o700)
            links = [name for name in folders if os.path.islink(os.path.join(where, name))]
            for path in (Path(where, name) for name in (*files, *links)):
                name = path.relative_to(old)
                if str(name) in ours or _BYTECODE in name.parts or not _is_later(path, real / name):
                    path.unlink()
                else:
                    (real / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(path, real / name)
            os.rmdir(where)


def _is_later(path: Path, carried: Path) -> bool:
    """Whether a file was made, or made anew, after it was carried over."""
    if not os.path.lexists(carried):
        return True
    first, second = path.lstat(), carried.lstat()
    return not os.path.samestat(first, second) and first.st_mtime_ns > second.st_mtime_ns
