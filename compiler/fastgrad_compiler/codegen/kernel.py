"""Attention kernels of the torch target: a specification, its emitted source, and the loaded function.

What is emitted is a specification's constants and the operation that they register; the algorithm of
docs/mathematics.md, sections 2 to 5, is in files of `runtime` that read the specification.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fastgrad_compiler.approximation.kernel_tiles import has_triton
from fastgrad_compiler.codegen.cpp import emit_cpp
from fastgrad_compiler.codegen.kernel_module import write_module
from fastgrad_compiler.codegen.triton import emit_triton
from fastgrad_compiler.runtime.content_name import content_name
from fastgrad_compiler.runtime.kernel_spec import KernelSpec as KernelSpec
from fastgrad_compiler.targets import PYTORCH, Backends

if TYPE_CHECKING:
    from torch import Tensor

RUNTIME = Path(__file__).parent.parent / "runtime"
RUNTIME_FILES: tuple[Path, ...] = tuple(
    RUNTIME / name
    for name in (
        "attention_op.py",
        "content_name.py",
        "decay.py",
        "documents.py",
        "exact_attention.py",
        "exact_blocks.py",
        "guard.py",
        "guard_key.py",
        "kernel_call.py",
        "kernel_spec.py",
        "logit_range.py",
        "monomials.py",
        "operation.py",
        "parted.py",
        "polynomial_attention.py",
        "polynomial_features.py",
        "polynomial_pairs.py",
        "polynomial_rows.py",
        "polynomial_sweeps.py",
        "precision.py",
        "selection.py",
        "sight.py",
        "tangent.py",
        "window_attention.py",
    )
)
CPP_RUNTIME_FILES: tuple[Path, ...] = tuple(
    RUNTIME / name for name in ("native.py", "native_attention.py", "private_files.py", "softmax_pairs.py")
)
TRITON_RUNTIME_FILES: tuple[Path, ...] = tuple(
    RUNTIME / name
    for name in (
        "private_files.py",
        "triton_attention.py",
        "triton_kernels.py",
        "triton_schedule.py",
        "triton_tables.py",
        "triton_tuned.py",
    )
)
RUNTIME_PACKAGE = "fastgrad_compiler.runtime"
NAME_PLACEHOLDER = "attention_" + "0" * 12
CPP, TRITON = ".cpp", "_triton.py"  # what the name of a backend's file has after the kernel's
ENDINGS = (".py", CPP, TRITON)  # of all files that a kernel may have


@cache
def emit_kernel(spec: KernelSpec, backends: Backends = PYTORCH) -> str:
    """The source of a kernel's module: deterministic, `ruff format` leaves it unchanged.

    It imports torch, RUNTIME_FILES and what its backends need, of `runtime_files`.
    """
    return _render(spec, NAME_PLACEHOLDER, backends).replace(NAME_PLACEHOLDER, kernel_name(spec, backends))


def kernel_files(spec: KernelSpec, backends: Backends) -> dict[str, str]:
    """The sources of a kernel by file name: its module, and what serves it on a CPU and on a GPU."""
    name = kernel_name(spec, backends)
    others = {f"{name}{ending}": text for ending, text in _backend_texts(spec, backends).items()}
    return {f"{name}.py": emit_kernel(spec, backends), **others}


def runtime_files(specs: Iterable[KernelSpec], backends: Backends) -> tuple[Path, ...]:
    """The files of `runtime` that the kernels need beside RUNTIME_FILES."""
    endings = {ending for spec in specs for ending in _backend_texts(spec, backends)}
    files = {CPP: CPP_RUNTIME_FILES, TRITON: TRITON_RUNTIME_FILES}
    return tuple(path for ending in sorted(endings) for path in files[ending])


@cache
def kernel_name(spec: KernelSpec, backends: Backends = PYTORCH) -> str:
    """`attention_` and twelve hexadecimal digits of a hash of its sources: file, module and operation.

    Those are the kernel's own and the files of `runtime` beside it: one process may hold builds of two releases.
    """
    own = [_render(spec, NAME_PLACEHOLDER, backends), *_backend_texts(spec, backends).values()]
    shared = dict.fromkeys((*RUNTIME_FILES, *runtime_files([spec], backends)))
    return content_name("attention", [*(text.encode() for text in own), *map(_content, shared)])


@cache
def _content(path: Path) -> bytes:
    return path.read_bytes()


@cache
def _backend_texts(spec: KernelSpec, backends: Backends) -> dict[str, str]:
    """What the backends of a kernel are made from, by what a file's name has after the kernel's."""
    texts = {CPP: emit_cpp(spec)} if backends.cpp else {}
    return {**texts, TRITON: emit_triton(spec)} if backends.triton and has_triton(spec) else texts


@cache
def load_kernel(spec: KernelSpec, backends: Backends = PYTORCH) -> Callable[..., Tensor]:
    """The `attention` function of the emitted module, which is executed once a process.

    attention(q, k, v, near_q=None, near_k=None, mask=None, documents=None, *, log_gate=None, exact_below=0,
              guard=""):
    q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv] -> [.., H, n, dv], in the dtype of v; log_gate
    [.., Hk, n]; guard: the key of one that watches the logits. ValueError on wrong shapes.
    Its backends serve it where they can be built.
    """
    name = f"{RUNTIME_PACKAGE}.{kernel_name(spec, backends)}"
    module = sys.modules.get(name) or _execute(name, kernel_files(spec, backends))
    function: Callable[..., Tensor] = module.attention
    return function


class _Texts:
    """The loader of a module from memory: gives the texts that belong to it."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def get_data(self, path: str) -> bytes:
        """A text by its name; OSError where there is none."""
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path].encode()


def _execute(name: str, files: dict[str, str]) -> ModuleType:
    """A module of the run-time package from text, whose lines tracebacks, inspect and torch.compile can find."""
    filename, text = f"<{name}>", files[f"{name.rpartition('.')[2]}.py"]
    module = ModuleType(name)
    module.__package__, module.__file__ = RUNTIME_PACKAGE, filename
    module.__spec__ = ModuleSpec(name, _Texts(files), origin=filename)  # type: ignore[arg-type]
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    sys.modules[name] = module
    exec(compile(text, filename, "exec"), module.__dict__)
    return module


@cache
def _render(spec: KernelSpec, name: str, backends: Backends) -> str:
    triton = TRITON in _backend_texts(spec, backends)
    return write_module(
        spec, name, backends.cpp, triton, unserved=backends.triton and not (triton or backends.cpp)
    )
