"""Attention kernels of the torch target: a specification, its emitted source, and the loaded function.

A kernel is what docs/mathematics.md describes in sections 2 to 5, written out for one (d, dv, polynomial, mask,
near field): constants and block table unrolled, absent cases left out. The text is a Jinja template's, so that
what is emitted can be read before it is emitted; buffers, checks and the exact fallback are files of `runtime`.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fastgrad_compiler.approximation.elementary import power
from fastgrad_compiler.approximation.features import blocks, rank
from fastgrad_compiler.codegen.templates import render
from fastgrad_compiler.runtime.content_name import content_name
from fastgrad_compiler.targets import PYTORCH, Backends

if TYPE_CHECKING:
    from torch import Tensor

RUNTIME = Path(__file__).parent.parent / "runtime"
RUNTIME_FILES: tuple[Path, ...] = tuple(
    RUNTIME / name
    for name in (
        "attention_op.py",
        "content_name.py",
        "documents.py",
        "exact_attention.py",
        "guard.py",
        "guard_key.py",
        "logit_range.py",
        "operation.py",
        "polynomial_features.py",
        "precision.py",
        "selection.py",
        "tangent.py",
    )
)
CPP_RUNTIME_FILES: tuple[Path, ...] = tuple(
    RUNTIME / name for name in ("native.py", "native_attention.py", "private_files.py")
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
UNROLLED_BLOCKS = 160  # a longer table is emitted as the loop that makes it
NAME_PLACEHOLDER = "attention_" + "0" * 12
CPP, TRITON = ".cpp", "_triton.py"  # what the name of a backend's file has after the kernel's
ENDINGS = (".py", CPP, TRITON)  # of all files that a kernel may have


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What an attention kernel depends on.

    Args:
        d: width of q and k.
        dv: width of v.
        coefficients: of the polynomial p(s), s = scale * q.k, by ascending power; its degree is at least 1.
        causal: query i sees the keys up to i.
        padding: a key padding mask is an input.
        near: block size w; pairs whose blocks of w tokens are the same or touch weigh exp(t) instead of p(s).
        window: softmax of the pairs with |i - j| < window instead, exactly; then there is no polynomial.
        precision: of the arithmetic at least, "float32" or "float64"; inputs and results keep their dtype.
        near_d: width of separate queries and keys for t, already scaled; None: t = scale * q.k.
        scale: of the logits.
        chunk: tokens handled at a time; None: chosen here. The function does not depend on it.
        documents: ids of packed documents are an input; a query sees only keys of its own document.

    Raises:
        ValueError: a width, a block or a chunk below 1, no coefficient beyond the constant, near_d without near.
    """

    d: int
    dv: int
    coefficients: tuple[float, ...]
    causal: bool = False
    padding: bool = False
    near: int | None = None
    near_d: int | None = None
    scale: float = 1.0
    chunk: int | None = None
    documents: bool = False
    window: int | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        sizes = {
            "d": self.d,
            "dv": self.dv,
            "near": self.near,
            "near_d": self.near_d,
            "chunk": self.chunk,
            "window": self.window,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"an attention kernel needs {name} >= 1, not {size}")
        if self.window is not None and (self.coefficients or self.near is not None):
            raise ValueError("an attention kernel with a window has neither a polynomial nor a near field")
        if self.window is None and len(self.coefficients) < 2:
            raise ValueError("an attention kernel needs a polynomial of degree 1 at least")
        if self.precision not in ("float32", "float64"):
            raise ValueError(f"the arithmetic of a kernel is float32 or float64, not {self.precision}")
        if self.near_d is not None and self.near is None:
            raise ValueError("near_d is the width of a near field's queries and keys: give `near` too")

    @property
    def degree(self) -> int:
        """Degree of the polynomial."""
        return len(self.coefficients) - 1


def choose_chunk(spec: KernelSpec) -> int:
    """Tokens at a time: enough to hide the interpreter behind the products, few enough for cache and triangle.

    In a near field a chunk divides the block size w where a divisor of useful size exists: then a window is near
    throughout, and nothing in it needs the polynomial.
    """
    if spec.chunk is not None:
        return spec.chunk
    r = rank(spec.d, spec.degree)
    chunk = 128 if r <= 512 else 256
    if spec.near is None:
        return chunk if spec.causal or spec.documents else 256
    divisors = [size for size in range(SMALLEST_NEAR_CHUNK, chunk + 1) if spec.near % size == 0]
    return max(divisors, default=max(1, chunk // spec.near) * spec.near if spec.near < chunk else chunk)


SMALLEST_NEAR_CHUNK = 32


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
    """What the backends of a kernel are made from, by what a file's name has behind the kernel's."""
    from fastgrad_compiler.codegen.cpp import emit_cpp
    from fastgrad_compiler.codegen.triton import emit_triton, has_triton

    texts = {CPP: emit_cpp(spec)} if backends.cpp else {}
    return {**texts, TRITON: emit_triton(spec)} if backends.triton and has_triton(spec) else texts


@cache
def load_kernel(spec: KernelSpec, backends: Backends = PYTORCH) -> Callable[..., Tensor]:
    """The `attention` function of the emitted module, which is executed once a process.

    attention(q, k, v, near_q=None, near_k=None, mask=None, documents=None, *, exact_below=0, guard=""):
    q [.., H, n, d], k [.., Hk, m, d], v [.., Hk, m, dv] -> [.., H, n, dv], in the dtype of v; guard: the key of one
    that watches the logits. ValueError on wrong shapes.
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
    context = {
        "name": name,
        "cpp": backends.cpp,
        "triton": triton,
        "unserved": backends.triton and not (triton or backends.cpp),
        **_common(spec),
    }
    if spec.window is not None:
        return render("attention_window.py.j2", context)
    return render("attention.py.j2", {**context, **_context(spec)})


def _common(spec: KernelSpec) -> dict[str, object]:
    """What all templates ask for."""
    degree = "" if spec.window is not None else f", degree {spec.degree}"
    return {
        "title": kernel_title(spec),
        "specification": f"d = {spec.d}, dv = {spec.dv}{degree}",
        "d": spec.d,
        "dv": spec.dv,
        "scale": float(spec.scale),
        "causal": spec.causal,
        "padding": spec.padding,
        "documents": spec.documents,
        "window": spec.window,
        "precise": spec.precision == "float64",
    }


def _context(spec: KernelSpec) -> dict[str, object]:
    """What the template asks for; flags name the cases of docs/mathematics.md, sections 3 to 5."""
    tile = choose_chunk(spec)
    dense = spec.causal or spec.near is not None or spec.documents
    suffix = not spec.causal and (spec.near is not None or spec.documents)
    mixed = spec.near is not None and spec.near % tile != 0
    folded = folded_coefficients(spec)
    table = blocks(spec.d, spec.degree)
    return {
        "local": "near_q.near_k" if spec.near_d else "SCALE q.k",
        "degree": spec.degree,
        "rank": rank(spec.d, spec.degree),
        "coefficients": list(map(float, folded)),
        "near": spec.near,
        "near_d": spec.near_d,
        "separate": spec.near_d is not None,
        "tile": tile,
        "dense": dense,
        "mixed": mixed,
        "suffix": suffix,
        "lead": "b, h, groups" if spec.documents else "rows, groups",
        "state_upstream": "document_upstream" if spec.documents else "",
        "needs_inf": spec.near is not None and (mixed or spec.causal or spec.padding or spec.documents),
        "polynomial_scores": dense and (mixed or spec.near is None),
        "states": 5 if suffix else 3,  # with the product that is added to one
        "met_keys": _window_expression(spec),
        "unrolled": len(table) <= UNROLLED_BLOCKS,
        "blocks": [(b.level, b.index, *b.source, *b.target) for b in table],
        "horner": _horner(folded),
        "horner_slope": _horner(tuple(power * c for power, c in enumerate(folded))[1:]),
    }


def folded_coefficients(spec: KernelSpec) -> tuple[float, ...]:
    """Coefficients by powers of q.k: those of p with the scale of the logits folded in."""
    return tuple(c * power(spec.scale, degree) for degree, c in enumerate(spec.coefficients))


def kernel_title(spec: KernelSpec) -> str:
    """One line that says what a kernel computes."""
    parts = [f"Polynomial attention, degree {spec.degree}"]
    if spec.window is not None:
        parts = [f"Softmax attention within {spec.window} tokens"]
    if spec.causal:
        parts.append("causal")
    if spec.padding:
        parts.append("with a padding mask")
    if spec.documents:
        parts.append("packed")
    if spec.near is not None:
        parts.append(f"exact in blocks of {spec.near} tokens")
    if spec.precision == "float64":
        parts.append("computed in float64")
    return ", ".join(parts)


def _window_expression(spec: KernelSpec) -> str:
    if spec.near is not None:
        return "TILE + 2 * NEAR" if spec.causal else "TILE + 3 * NEAR"
    return "TILE" if spec.causal or spec.documents else "0"


def _horner(coefficients: tuple[float, ...]) -> str:
    """In-place statements that evaluate the polynomial of `scores` into `out`."""
    if len(coefficients) == 1:
        return f"out.fill_({float(coefficients[0])!r})"
    *rest, last = map(float, coefficients)
    chain = f"torch.mul(scores, {last!r}, out=out)"
    lines = []
    for position, coefficient in enumerate(reversed(rest)):
        chain += f".add_({coefficient!r})"
        if position < len(rest) - 1:
            lines.append(chain)
            chain = "out.mul_(scores)"
    lines.append(chain)
    return "\n    ".join(lines)
