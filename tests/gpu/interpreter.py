"""Triton's interpreter, made faithful and strict, and a record of what it runs.

`install()` has to run before the first launch, in a process where TRITON_INTERPRET=1 was set before triton was
imported (tests/conftest.py sets it). From then on every launch in the process

* computes as the compiled kernel does (tests/gpu/arithmetic.py), and
* raises a `Defect` for what a GPU does not define (tests/gpu/sanitizer.py);

and `launches()` tells which kernels ran:

    install()
    with launches() as ran:
        kernel[(4,)](x, y, n)
    assert ran == [Launch("kernel", (4, 1, 1))]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tests.gpu import arithmetic, sanitizer
from tests.gpu.sanitizer import Atomic, Defect, OutOfBounds, Race

__all__ = ["Atomic", "Defect", "Launch", "OutOfBounds", "Race", "install", "launches"]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    """Programs in each of three dimensions."""


_records: list[list[Launch]] = []
_patched: set[str] = set()
"""Modules of the language that the launch in progress has replaced the functions of."""
_installed = False


def install() -> None:
    """Make the interpreter of this process faithful and strict, for good; again does nothing.

    Raises:
        RuntimeError: this process compiles kernels, or its version of triton is one whose interpreter is not known.
    """
    global _installed
    if _installed:
        return
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 must be set before triton is imported")
    if not triton.__version__.startswith("3.7."):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} is not known here, only that of 3.7"
        )
    arithmetic.install()
    sanitizer.install()
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _known_types(interpreter._get_np_dtype)
    _installed = True


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """A list that each launch within the `with` statement is added to when it ends."""
    record: list[Launch] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def _launch(original: Any) -> Any:
    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        sanitizer.reset(_names(self.arg_names, arguments, options))
        _patched.clear()
        try:
            with np.errstate(all="ignore"):  # a lane that is masked off may well overflow
                original(self, *arguments, **options)
        except InterpreterError as error:
            raise _cause(error) from error
        done = Launch(self.fn.__name__, tuple(interpreter.interpreter_builder.grid_dim))
        for record in _records:
            record.append(done)

    return launch


def _known_types(original: Any) -> Any:
    """The interpreter makes a table of all types whenever it looks one up."""
    known = cache(original)

    def look_up(given: Any) -> Any:
        element = given.scalar
        return original(element) if element.is_ptr() else known(element)

    return look_up


def _patch_once(original: Any) -> Any:
    """Each call of a device function replaces the same functions of the language again: once a launch is enough."""

    def patch(function: Any) -> Any:
        modules = _languages(function)
        if modules <= _patched:
            return interpreter._LangPatchScope()
        _patched.update(modules)
        return original(function)

    return patch


@cache
def _languages(function: Any) -> frozenset[str]:
    """Which modules of the language a function sees."""
    seen = function.__globals__.values()
    return frozenset(module.__name__ for module in (tl, tl.core) if any(value is module for value in seen))


def _names(
    parameters: list[str], arguments: tuple[Any, ...], options: dict[str, Any]
) -> dict[tuple[Any, ...], str]:
    """Names of the tensor arguments of a launch."""
    named = dict(zip(parameters, arguments, strict=False)) | options
    return {sanitizer.identity(value): name for name, value in named.items() if isinstance(value, Tensor)}


def _cause(error: BaseException) -> BaseException:
    """The defect that the interpreter, and each function that the kernel calls, has wrapped into another error."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, Defect):
        found = found.__cause__
    return found or error
