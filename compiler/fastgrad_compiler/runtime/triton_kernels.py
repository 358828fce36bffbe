"""Whether Triton kernels can be had for a call, and the module that holds them.

Triton compiles a function from the file that it stands in. So kernels that came from memory or an archive are
written to the user's cache, under a name that hashes their text: whole or not at all, and never into the way of
another process.

Read from the environment: FASTGRAD_TRITON (0: no Triton kernels), TRITON_INTERPRET (1: Triton's interpreter runs
them, on a CPU).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .content_name import read_beside
from .private_files import (
    cache_folder,
    private_folder,
    read_own,
    warn_once,
    write_whole,
)

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
LEAST_CAPABILITY = 8
BUILD_FAILURES = ("PassManager", "C compiler", "active drivers")  # in a RuntimeError of Triton's


class TritonWarning(RuntimeWarning):
    """GPU kernels were wanted and cannot be had; results are the same, and slower."""


def enabled() -> bool:
    """Whether the user allows Triton kernels."""
    return os.environ.get("FASTGRAD_TRITON") != "0"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(*tensors: Tensor) -> str | None:
    """Why Triton does not serve these tensors, of one device: None if it does."""
    device = tensors[0].device
    if device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return "they need a GPU"
    if any(x.dtype not in DTYPES for x in tensors):
        return "they are for float32, float16 and bfloat16, not for float64"
    if not _installed():
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < LEAST_CAPABILITY:
            return (
                f"they need a GPU of compute capability {LEAST_CAPABILITY}.0 or higher, not {major}.{minor}"
            )
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def warn(reason: str) -> None:
    """One warning a process, whichever kernel and whichever copy of this file is the first to need it."""
    message = f"attention runs without Triton kernels, and slower: {reason}"
    warn_once("triton_warning", message, TritonWarning)


def cannot_build(error: Exception) -> bool:
    """Whether an error says that kernels cannot be built for this machine, rather than that a call went wrong."""
    if isinstance(error, ImportError | OSError | subprocess.SubprocessError):
        return True
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return True
    if isinstance(error, CompilationError | OutOfResources | PTXASError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in BUILD_FAILURES)


def import_kernels(name: str, spec: ModuleSpec | None) -> ModuleType:
    """The module `name` of kernels beside that of `spec`. OSError where it is missing or cannot be written."""
    full = f"{spec.name.rpartition('.')[0] if spec is not None else __package__}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    path = _file(name, spec)
    found = importlib.util.spec_from_file_location(full, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[full] = module
    try:
        text = compile(path.read_bytes(), path, "exec", dont_inherit=True)
        exec(text, vars(module))  # and no bytecode that lies beside it
    except BaseException:
        del sys.modules[full]
        raise
    return module


def _file(name: str, spec: ModuleSpec | None) -> Path:
    """The file of a module, where it lies or where it was written."""
    origin = getattr(spec, "origin", None) or ""
    path = Path(origin).parent / f"{name}.py"
    if os.path.isfile(origin) and path.is_file():
        return path
    try:
        text = read_beside(spec, path.name)
    except OSError as error:
        raise FileNotFoundError(f"{path} is missing: compile the model again") from error
    return _written(name, text)


def _written(name: str, text: bytes) -> Path:
    """A file that holds `text`: of the cache, or of this process where the cache cannot be used."""
    file = f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.py"
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            return _publish(folder / file, text)
    return _publish(private_folder() / file, text)


def _publish(path: Path, text: bytes) -> Path:
    if not path.exists() or read_own(path) != text:
        write_whole(path, text)
    return path
