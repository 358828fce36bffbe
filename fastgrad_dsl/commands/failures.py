"""The one layer for what goes wrong in a command: a diagnostic and status 2, or a bug, its traceback and status 1."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EBADF
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO, cast

from fastgrad_grammar.diagnostics import Diagnostic, TfgError
from fastgrad_grammar.render import render

BUG, WRONG_INPUT = 1, 2
INTERRUPTED = 130  # as a shell says of a process that SIGINT ended
NO_READER = 141  # and of one that SIGPIPE ended: `fastgrad stages FILE | head` is nobody's error

STDOUT = "the standard output"

OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "Storage size calculation overflowed",
    "not enough memory",
)
"""What PyTorch's RuntimeErrors say where an allocation failed; its own class for it is of GPUs only."""

REPORT = "fastgrad: this is a bug in fastgrad, not in your files. Please report it with the lines above and the spec"


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command and give its exit status; whatever goes wrong is told on stderr.

    0 or what the command gives; 2 for what `diagnostics` knows, 130 after Ctrl-C, 141 where nobody reads what is
    printed, 1 for a bug.
    """
    printed = sys.stdout
    try:
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
        sys.stdout = cast(TextIO, _Printed(printed))
        status = command() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        status = _told(error)
    finally:
        sys.stdout = printed
    _settle(printed)
    return status


def diagnostics(error: BaseException) -> tuple[Diagnostic, ...]:
    """The diagnostics of an exception that is not a bug: of the user's input, the system or the memory; else none."""
    if isinstance(error, TfgError):
        return error.diagnostics
    if isinstance(error, OSError):
        return (_of_system(error),)
    if isinstance(error, RecursionError):
        help_ = ("nest it less; where nothing in it is nested deeply, please report this as a bug",)
        return (Diagnostic("FG106", "what was given is nested too deeply to be read", help=help_),)
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)
    ):
        reason = next((line for line in text.splitlines() if line), "an allocation failed")
        help_ = ("take a smaller batch, a shorter length or a smaller model",)
        return (Diagnostic("FG426", f"not enough memory: {reason}", help=help_),)
    return ()


def reason_of(error: OSError) -> str:
    """What the system said, in its words."""
    return error.strerror or str(error) or type(error).__name__


def _of_system(error: OSError) -> Diagnostic:
    if error.filename is not None:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return Diagnostic("FG425", f"{path}: {reason_of(error)}")
    return Diagnostic("FG425", f"the system refused: {reason_of(error)}")


def _told(error: Exception) -> int:
    """Report an exception on stderr, after what was printed before, and give the exit status."""
    if isinstance(error, _NoReader):
        return NO_READER
    found = diagnostics(error)
    with suppress(OSError, _NoReader):
        print(end="", flush=True)  # nothing, where there is no standard output
    with suppress(OSError):  # nobody can be told
        if found:
            sys.stderr.write(render(found, colour=sys.stderr.isatty()))
        else:
            traceback.print_exception(error)
            sys.stderr.write(f"{REPORT} ({', '.join(_versions())}).\n")
        sys.stderr.flush()
    return WRONG_INPUT if found else BUG


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}"]
    for name in ("fastgrad-dsl", "torch"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return found


class _NoReader(Exception):
    """Nobody reads the standard output any more. No OSError: those of files that commands write are others."""


class _Printed:
    """The standard output, whose errors say that they are its own; what it cannot encode is escaped."""

    def __init__(self, stream: TextIO | None) -> None:
        # A file that is opened later would take the place of a stream that is closed, and be printed to.
        if stream is None:
            raise OSError(EBADF, os.strerror(EBADF), STDOUT)
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a text stream does."""
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        """As a stream does."""
        with self._named():
            self._stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError as error:
            raise _NoReader from error
        except OSError as error:
            error.filename = STDOUT
            raise


def _settle(stream: TextIO | None) -> None:
    """Where a stream cannot be written, let what it still holds go nowhere: Python would complain of it at the end."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
