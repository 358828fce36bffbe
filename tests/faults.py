"""Faults of the file system, one at a time: each call of each operation fails, or ends the process before or after.

`each_fault(kind, prepare, run)` runs `run` in a forked process again and again, with the fault at its first, second,
third ... operation, until it ends without having met it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastgrad_dsl as fg

KINDS = ("error", "full disk", "killed before", "killed after", "killed within")
OPERATIONS = (
    "chmod", "chown", "fsync", "link", "listdir", "lstat", "mkdir", "open", "readlink", "rename", "replace", "rmdir",
    "scandir", "stat", "symlink", "unlink", "write",
)  # fmt: skip
WRITING = ("fsync", "link", "mkdir", "symlink", "write")  # what needs space
KILLED = 137


@dataclass(frozen=True)
class Outcome:
    """How a process ended that met a fault: killed, with what it printed, or with its result."""

    status: int
    said: str
    operation: str

    @property
    def killed(self) -> bool:
        return self.status == KILLED


def each_fault(
    kind: str, prepare: Callable[[], object], run: Callable[[], str], stride: int = 1
) -> Iterator[Outcome]:
    """The outcome of each fault, or of one in `stride`; `prepare` makes the state before each."""
    for number in range(1, 2000, stride):
        prepare()
        outcome = _forked(kind, number, run)
        if outcome is None:
            assert number > 3, "hardly anything was met"
            return
        yield outcome
    raise AssertionError("it never ends")


def _forked(kind: str, number: int, run: Callable[[], str]) -> Outcome | None:
    """Run with the fault at one operation; None where there are fewer."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(kind, number, run, writing)
    os.close(writing)
    with open(reading, "rb") as stream:
        said = stream.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    operation, _, rest = said.partition("\n")
    return None if not operation else Outcome(status, rest, operation)


def _child(kind: str, number: int, run: Callable[[], str], writing: int) -> None:
    write, leave = os.write, os._exit
    fault = _Fault(kind, number, lambda operation: write(writing, f"{operation}\n".encode()))
    fault.install()
    try:
        said, status = run(), 0
    except fg.TfgError as error:
        said, status = str(error), 2
    except BaseException:
        said, status = traceback.format_exc(), 1
    if fault.met:
        write(writing, said.encode())
    leave(status)


class _Fault:
    """Counts operations, and is the fault at one of them."""

    def __init__(self, kind: str, number: int, tell: Callable[[str], object]) -> None:
        self.kind, self.left, self.tell = kind, number, tell
        self.met = False

    def install(self) -> None:
        for name in WRITING if self.kind == "full disk" else OPERATIONS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.met = True
                self.tell(name)
            if self.left == 0 or (self.left < 0 and self.kind == "full disk"):
                if self.kind in ("error", "full disk"):
                    raise OSError(errno.ENOSPC, "No space left on device")
                if self.kind == "killed after" or (self.kind == "killed within" and name != "write"):
                    with contextlib.suppress(OSError):
                        function(*arguments, **options)
                elif self.kind == "killed within":
                    function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                os._exit(KILLED)
            return function(*arguments, **options)

        return call


def fresh(source: Path, target: Path) -> None:
    """Make `target` a copy of `source`, and nothing be beside it."""
    shutil.rmtree(target.parent, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
