"""Files that fail: one operation on the files below a folder raises an error, or is the last that a process does.

A killed process is imitated: from that operation on every other one is refused, so that no clean-up reaches the disk.
`real=True` ends the process instead, for tests that run it apart.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch


class Killed(BaseException):
    """Where the process would have ended."""


@dataclass
class Faults:
    """Counts operations below `folder`; the one with the number `at` fails with `error`, None is a kill."""

    folder: Path
    at: int = -1
    error: int | None = None
    real: bool = False
    seen: list[str] = field(default_factory=list)
    dead: bool = False

    def meets(self, operation: str, path: object) -> bool:
        """Count an operation; whether it is the one to fail."""
        if not isinstance(path, str | os.PathLike) or not Path(os.fspath(path)).is_relative_to(self.folder):
            return False
        if self.dead:
            raise Killed
        self.seen.append(f"{operation} {Path(os.fspath(path)).name}")
        return len(self.seen) - 1 == self.at

    def fail(self, path: object) -> None:
        """Do what the chosen operation does."""
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error), str(path))
        if self.real:
            os._exit(9)
        self.dead = True
        raise Killed


class _File:
    """A file whose writes are counted; half of the one that fails is written."""

    def __init__(self, file: Any, path: object, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def write(self, content: Any) -> int:
        if self._faults.meets("write", self._path):
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._faults.fail(self._path)
        return int(self._file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def _of_path(faults: Faults, name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    def run(path: Any, *arguments: Any, **options: Any) -> Any:
        if (name == "mkdir" or os.path.exists(path)) and faults.meets(name, path):
            faults.fail(path)
        return real(path, *arguments, **options)

    return run


@contextmanager
def failing(faults: Faults) -> Iterator[Faults]:
    """Operations on files go through `faults`: open, write, fsync (which waits for no disk), rename, unlink, mkdir."""
    opened: dict[int, object] = {}
    real_open, real_os_open, real_write = io.open, os.open, os.write

    def open_(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, int) and faults.meets("open", path):
            faults.fail(path)
        file = real_open(path, mode, *arguments, **options)
        of = opened.setdefault(path, None) if isinstance(path, int) else path
        opened[file.fileno()] = of
        return _File(file, of, faults) if set(mode) & set("wax+") else file

    def os_open(path: Any, *arguments: Any, **options: Any) -> int:
        if faults.meets("open", path):
            faults.fail(path)
        number = real_os_open(path, *arguments, **options)
        opened[number] = path
        return number

    def write(number: int, content: bytes) -> int:
        if faults.meets("write", opened.get(number)):
            real_write(number, content[: len(content) // 2])
            faults.fail(opened[number])
        return real_write(number, content)

    def fsync(number: int) -> None:
        if faults.meets("fsync", opened.get(number)):
            faults.fail(opened[number])

    replaced: dict[str, Any] = {"open": os_open, "write": write, "fsync": fsync}
    replaced |= {
        name: _of_path(faults, name) for name in ("replace", "rename", "unlink", "rmdir", "link", "mkdir")
    }
    with (
        patch.object(io, "open", open_),
        patch.object(builtins, "open", open_),
        patch.multiple(os, **replaced),
    ):
        yield faults
