"""C++ attention kernels: the text that the `cpp` target compiles for one kernel shape.

The same specification, operator and numerics as the torch kernel of `codegen.kernel`; only the standard library,
OpenMP and torch's stable ABI. Vectors are the compiler's, so that one text serves AVX2, AVX-512 and NEON.
"""

from __future__ import annotations

from functools import cache

from fastgrad_compiler.approximation.features import rank
from fastgrad_compiler.codegen.kernel import kernel_title
from fastgrad_compiler.codegen.templates import render
from fastgrad_compiler.runtime.kernel_spec import KernelSpec, folded_coefficients
from fastgrad_grammar.quote import cpp_comment

CHUNK = 64  # tokens at a time: scores, features and values of a chunk stay in the caches next to a core
LEAST_BLOCK = 16  # a near field of smaller blocks is handled several blocks at a time
# Of each machine: its vector registers, and how many vectors wide a register tile is.
MACHINES = {"avx512": (32, 2), "avx2": (16, 2), "other": (32, 2)}


@cache
def emit_cpp(spec: KernelSpec) -> str:
    """The C++ source of a kernel, complete and deterministic."""
    return render("cpp/attention.cpp.j2", _context(spec))


def _context(spec: KernelSpec) -> dict[str, object]:
    window = spec.window
    banded = window is not None
    exponential = banded or spec.near is not None
    total = not (banded or spec.causal or spec.near is not None or spec.documents)
    block, pieces, tile = token_chunks(spec)
    r = 1 if banded else rank(spec.d, spec.degree)
    mixed = spec.near is not None and spec.near < tile
    return {
        "title": cpp_comment(kernel_title(spec)),
        "specification": f"d = {spec.d}, dv = {spec.dv}" + ("" if banded else f", degree {spec.degree}"),
        "local": "near_q.near_k" if spec.near_d else "SCALE q.k",
        "d": spec.d,
        "dv": spec.dv,
        "degree": 0 if banded else spec.degree,
        "rank": r,
        "coefficients": [] if banded else list(map(repr, map(float, folded_coefficients(spec)))),
        "scale": float(spec.scale),
        "causal": spec.causal,
        "padding": spec.padding,
        "documents": spec.documents,
        "near": spec.near,
        "near_d": spec.near_d,
        "separate": spec.near_d is not None,
        "window": window,
        "banded": banded,
        "exponential": exponential,
        "total": total,
        "two_sided": not (banded or spec.causal or total),
        "dense": not total,
        "fused": spec.causal
        and not exponential,  # pairs of a chunk meet its gradients in the sweep that writes them
        "mixed": mixed,
        "polynomial_scores": not total and (mixed or not exponential),
        "halo": None if not exponential else 2 * spec.near if spec.near else (window or 1) - 1 or None,
        "block": block,
        "pieces": pieces,
        "tile": tile,
        "tiles": {name: _tiles(r, *machine) for name, machine in MACHINES.items()},
    }


def token_chunks(spec: KernelSpec) -> tuple[int, int, int]:
    """Tokens in a block, chunks in a block, most tokens in a chunk; chunks never cross a near field's blocks."""
    chunk = spec.chunk or CHUNK
    if spec.near is None:
        return chunk, 1, chunk
    if spec.near < LEAST_BLOCK:
        block = max(1, chunk // spec.near) * spec.near
        return block, 1, block
    pieces = -(-spec.near // chunk)
    return spec.near, pieces, -(-spec.near // pieces)


def _tiles(r: int, registers: int, columns: int) -> dict[str, int]:
    """Rows of register tiles: for features as many as waste fewest rows, for tokens a power of two."""
    most = (registers - columns - 1) // columns
    least = min(4, most)
    features = min(
        range(least, most + 1), key=lambda rows: (-(-r // rows) * rows * (1 + 0.02 * (most - rows)), -rows)
    )
    return {"columns": columns, "features": features, "tokens": 8 if most >= 8 else 4}
