"""C++ kernels: built once for a machine with the system compiler, kept in the user's cache, loaded into the process.

An entry of the cache is one library, `NAME_VARIANT-KEY-CHECKSUM.so`. KEY hashes all that the machine code depends on:
the text, the flags, the compiler and what it takes `native` to be, the release of PyTorch. CHECKSUM is of the library
itself, so that one that was damaged is never loaded. That a library was built here is not shown by its name, which
anyone could give it, but by the folder and the file: nobody else may write either (`private_files`). A library is made
elsewhere and renamed into the cache, under a lock that ends with its process. Where the cache cannot be used, it lasts
as long as the process.

Read from the environment: CXX, FASTGRAD_NATIVE (0: no native kernels), FASTGRAD_QUIET (1: builds are not announced).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .content_name import read_beside
from .private_files import (
    cache_folder,
    private_folder,
    read_own,
    remove_dead_files,
    remove_dead_folders,
    write_whole,
)

try:
    import fcntl
except ImportError:  # not on Windows: processes may then build the same kernel twice
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
VARIANTS = ("float32", "float64", "bfloat16")
COMPILERS = ("g++", "c++", "clang++")  # g++ first: its OpenMP run-time library is the one that PyTorch brings
INSTALL = "install g++ (Debian and Ubuntu: apt install g++; macOS: xcode-select --install)"
BUILD_SECONDS = 600

_ARM = platform.machine().lower() in ("arm64", "aarch64")
_APPLE = sys.platform == "darwin"
FLAGS = ("-O3", "-std=c++17", "-fPIC")
OPTIONAL_FLAGS = (  # left out one by one where a compiler does not take them
    "-mcpu=native" if _ARM else "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
)
OPENMP_FLAGS = ("-Xclang", "-fopenmp") if _APPLE else ("-fopenmp",)


class NativeError(Exception):
    """A kernel cannot be built or loaded; the message says why and what to do."""


def enabled() -> bool:
    """Whether the user allows native kernels."""
    return os.environ.get("FASTGRAD_NATIVE", "1") != "0"


def load(name: str, text: str, variant: str, operation: str = "backward") -> None:
    """Build the kernel if the cache has none, and register its operations, fastgrad::NAME_VARIANT_.., of which one is
    `operation`.

    Raises NativeError where that cannot be done.
    """
    path = build(name, text, variant)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error.__cause__ or error)
        raise NativeError(f"the library {path} cannot be loaded: {reason}") from error
    if not hasattr(torch.ops.fastgrad, f"{name}_{variant}_{operation}"):
        raise NativeError(f"the library {path} has not the operations of {name}")


class Library(Generic[T]):
    """The operations of a kernel, NAME.cpp beside the module of `spec`: built and loaded when they are first asked for.

    operations: a NamedTuple, whose fields are how the names of operations end; one that the library lacks is None.
    warn: is told why the library cannot be had. together: it is built when another of the same model is, at the same
    time.
    """

    def __init__(
        self,
        name: str,
        spec: ModuleSpec | None,
        operations: type[T],
        warn: Callable[[str], None],
        *,
        together: bool = True,
    ) -> None:
        self.name, self._spec, self._warn = name, spec, warn
        if together:
            with _lock:
                _together[self] = None
        self._kind: Any = operations
        self._found: dict[torch.dtype, T | None] = {}
        self._lock = threading.Lock()

    def of(self, dtype: torch.dtype) -> T | None:
        """The operations for tensors of a dtype; None where there are none, or they cannot be had."""
        if dtype not in self._found:
            with self._lock:
                if dtype not in self._found:
                    self._found[dtype] = self._loaded(str(dtype).removeprefix("torch."))
        return self._found[dtype]

    def _loaded(self, variant: str) -> T | None:
        if variant not in VARIANTS:
            return None
        registered = torch.ops.fastgrad
        names = [f"{self.name}_{variant}_{which}" for which in self._kind._fields]
        if not hasattr(registered, names[0]):
            try:
                self._build_together(variant)
                load(self.name, self._text(), variant, self._kind._fields[0])
            except NativeError as error:
                self._warn(str(error))
                return None
        found = (getattr(registered, name, None) for name in names)
        made: T = self._kind._make(None if each is None else each.default for each in found)
        return made

    def _build_together(self, variant: str) -> None:
        """Build this library and the others of its model, once, on as many processors as there are; what fails is told
        of when it is asked for."""
        package = self._spec.parent if self._spec and self in _together else None
        with _lock:
            if not package or (package, variant) in _begun:
                return
            _begun.add((package, variant))
            model = [each for each in _together if each._spec and each._spec.parent == package]
        if len(model) > 1 and cache_folder() is not None:
            with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
                for each in model:
                    workers.submit(each._build, variant)

    def _build(self, variant: str) -> Path:
        return build(self.name, self._text(), variant)

    def _text(self) -> str:
        """NAME.cpp, from where the module came."""
        try:
            return read_beside(self._spec, f"{self.name}.cpp").decode()
        except OSError as error:
            message = f"{error.filename or error} is missing: compile the model again"
            raise NativeError(message) from error


_together: weakref.WeakKeyDictionary[Library[Any], None] = weakref.WeakKeyDictionary()  # in order
_begun: set[tuple[str, str]] = set()  # packages and variants
_lock = threading.Lock()


def build(name: str, text: str, variant: str, announce: Callable[[str], None] | None = None) -> Path:
    """The library of a kernel, from the cache or compiled now.

    `announce` is called with the name and the variant before a compilation; by default a line goes to stderr. Raises
    NativeError where there is no compiler or it fails.
    """
    remove_dead_folders()
    compiler = find_compiler()
    entry = f"{name}_{variant}-{_key(compiler, text, variant)}"
    folder = cache_folder()
    if folder is None:
        return _compile(compiler, text, name, variant, announce, _private_folder() / f"{entry}.so")
    if (known := _find(folder, entry)) is not None:
        return known
    with _locked(folder / f"{entry}.lock"):
        if (known := _find(folder, entry)) is not None:
            return known
        made = _compile(compiler, text, name, variant, announce, _private_folder() / f"{entry}.so")
        return _publish(made, folder, entry)


# ---------------------------------------------------------------- the compiler


@dataclass(frozen=True)
class Compiler:
    """A command, and what it says of itself: its release, and what its flags mean on this machine."""

    command: tuple[str, ...]
    identity: str


def find_compiler() -> Compiler:
    """$CXX if it is set, else the first of COMPILERS that is there; NativeError if none is."""
    wanted = os.environ.get("CXX", "").strip()
    if wanted:
        command = shlex.split(wanted)
        if shutil.which(command[0]) is None:
            raise NativeError(f"the compiler that CXX names, {command[0]}, is not there")
        return _identified(tuple(command))
    for candidate in COMPILERS:
        if (path := shutil.which(candidate)) is not None:
            return _identified((path,))
    raise NativeError(f"there is no C++ compiler: {INSTALL}")


@functools.cache
def _identified(command: tuple[str, ...]) -> Compiler:
    """The compiler's release and its expansion of `native`, from a dry run."""
    dry = (*command, *FLAGS, *OPTIONAL_FLAGS, "-###", "-S", "-x", "c++", os.devnull, "-o", "-")
    result = _run(dry)
    said = result.stderr + result.stdout
    native = "" if re.search(r"-target-cpu|-march=(?!native)", said) else _cpu()
    return Compiler(command, said + native)


def _cpu() -> str:
    """What tells processors apart where the compiler does not say what it made of `native`."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        )
    return platform.processor()


def _run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a compiler, with `folder` for its temporary files, by which it is found if this process is killed."""
    environment = {**os.environ, "LC_ALL": "C", **({"TMPDIR": str(folder)} if folder else {})}
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=BUILD_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeError(f"the compiler {command[0]} cannot be run: {error}") from error


def _compile(
    compiler: Compiler,
    text: str,
    name: str,
    variant: str,
    announce: Callable[[str], None] | None,
    library: Path,
) -> Path:
    """Compile and link `text` to `library`, whose folder is this process's own."""
    (announce or _announce)(f"{name} ({variant})")
    source, object_file = library.with_suffix(".cpp"), library.with_suffix(".o")
    try:
        source.write_text(text, encoding="utf-8")
        include = f"-I{Path(torch.__file__).parent / 'include'}"
        names = [f"-DFASTGRAD_KERNEL={name}_{variant}", f"-DFASTGRAD_VARIANT={VARIANTS.index(variant)}"]
        job = [*OPENMP_FLAGS, include, *names, "-c", str(source), "-o", str(object_file)]
        result = _run([*compiler.command, *FLAGS, *OPTIONAL_FLAGS, *job], library.parent)
        if result.returncode:
            taken = [flag for flag in OPTIONAL_FLAGS if _takes(compiler, flag)]
            if len(taken) < len(OPTIONAL_FLAGS):
                result = _run([*compiler.command, *FLAGS, *taken, *job], library.parent)
        _check(compiler, result)
        link = [*compiler.command, "-shared", str(object_file), "-o", str(library), *_libraries()]
        _check(compiler, _run(link, library.parent))
    except OSError as error:
        raise NativeError(
            f"a kernel cannot be built in {library.parent}: {error.strerror or error}"
        ) from error
    finally:
        for path in (source, object_file):
            with contextlib.suppress(OSError):
                path.unlink()
    return library


def _announce(what: str) -> None:
    if os.environ.get("FASTGRAD_QUIET", "0") == "0":
        # in one call, since others build at the same time: `print` writes the end of a line by itself
        sys.stderr.write(f"fastgrad: building {what}, once for this machine\n")
        sys.stderr.flush()


def _check(compiler: Compiler, result: subprocess.CompletedProcess[str]) -> None:
    if result.returncode == 0:
        return
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    first = next(
        (line for line in lines if "error" in line.lower()), lines[-1] if lines else "it says nothing"
    )
    raise NativeError(f"{' '.join(compiler.command)} failed with status {result.returncode}: {first}")


def _takes(compiler: Compiler, flag: str) -> bool:
    command = [*compiler.command, "-Werror", flag, "-fsyntax-only", "-x", "c++", os.devnull]
    return _run(command).returncode == 0


def _libraries() -> list[str]:
    """What a kernel is linked with: PyTorch, and the very OpenMP library that PyTorch runs on.

    A second one would keep threads of its own, and the two would fight over the processors.
    """
    folder = Path(torch.__file__).parent / "lib"
    pattern = "libomp*.dylib" if _APPLE else "libgomp*.so*"
    found = sorted([*folder.glob(pattern), *folder.parents[1].glob(f"torch.libs/{pattern}")])
    openmp = str(found[0]) if found else OPENMP_FLAGS[-1]
    return [f"-L{folder}", "-ltorch_cpu", openmp]


# ---------------------------------------------------------------- the cache


def _key(compiler: Compiler, text: str, variant: str) -> str:
    openmp = Path(_libraries()[-1]).name
    parts = (
        text,
        variant,
        *FLAGS,
        *OPTIONAL_FLAGS,
        *OPENMP_FLAGS,
        openmp,
        compiler.identity,
        torch.__version__,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _find(folder: Path, entry: str) -> Path | None:
    """A library of the cache; one that is damaged, or that others may have made or changed, is removed."""
    for path in sorted(folder.glob(f"{entry}-*.so")):
        with contextlib.suppress(OSError):
            data = read_own(path)
            if data is not None and path.stem.rpartition("-")[2] == _checksum(data):
                return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _publish(made: Path, folder: Path, entry: str) -> Path:
    """Move a library into the cache, whole or not at all; where that fails it is used where it is."""
    try:
        data = made.read_bytes()
        final = folder / f"{entry}-{_checksum(data)}.so"
        remove_dead_files(folder, ".")
        write_whole(final, data)
    except OSError:
        return made
    with contextlib.suppress(OSError):
        made.unlink()
    return final


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an entry; go on without it where there are no locks, or its holder takes far too long."""
    try:
        stream = path.open("ab")
    except OSError:
        yield
        return
    with stream:
        _wait(stream.fileno())
        yield


def _wait(descriptor: int) -> None:
    if fcntl is None:
        return
    end = time.monotonic() + BUILD_SECONDS
    while time.monotonic() < end:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # a file system without locks
            return


def _private_folder() -> Path:
    """A folder of this process, removed when it ends."""
    try:
        return private_folder()
    except OSError as error:
        raise NativeError(f"there is no folder for temporary files: {error.strerror or error}") from error
