"""C++ attention kernels: the text that the `cpp` target compiles for one kernel shape.

The same specification, operator and numerics as the torch kernel of `codegen.kernel`; only the standard library,
OpenMP and torch's stable ABI. Vectors are the compiler's, so that one text serves AVX2, AVX-512 and NEON.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastgrad_compiler.approximation.kernel_tiles import token_chunks
from fastgrad_compiler.codegen.templates import render
from fastgrad_compiler.codegen.titles import kernel_title
from fastgrad_compiler.runtime.kernel_spec import KernelSpec, folded_coefficients
from fastgrad_grammar.quote import cpp_comment

# Of each machine: its vector registers, and how many vectors wide a register tile is.
MACHINES = {"avx512": (32, 2), "avx2": (16, 2), "other": (32, 2)}
HEADERS = (
    "types",
    "tile",
    "features",
    "problem",
    "decay",
    "pairs",
    "chunk",
    "pair_gradients",
    "far",
    "sweeps",
    "forward",
    "backward",
    "step",
    "register",
)


@cache
def emit_cpp(spec: KernelSpec) -> str:
    """The C++ source of a kernel, complete and deterministic: its constants, then HEADERS, which branch on them."""
    return render("cpp/attention.cpp.j2", _context(spec)) + headers()


@cache
def headers() -> str:
    """The part of a kernel that is the same for all."""
    return "\n".join((Path(__file__).parent / f"{name}.h").read_text(encoding="utf-8") for name in HEADERS)


def _context(spec: KernelSpec) -> dict[str, object]:
    block, pieces, tile = token_chunks(spec)
    polynomial = spec.window is None
    # Within a window the features are 1 and x, and no state is made of them.
    coefficients = folded_coefficients(spec) if polynomial else (0.0, 0.0)
    r = spec.rank if polynomial else 1 + spec.d
    return {
        "title": cpp_comment(kernel_title(spec)),
        "specification": f"d = {spec.d}, dv = {spec.dv}" + (f", degree {spec.degree}" if polynomial else ""),
        "spec": spec,
        "degree": len(coefficients) - 1,
        "rank": r,
        "coefficients": list(map(repr, map(float, coefficients))),
        "scale": float(spec.scale),
        "block": block,
        "pieces": pieces,
        "tile": tile,
        "tiles": {name: _tiles(r, *machine) for name, machine in MACHINES.items()},
    }


def _tiles(r: int, registers: int, columns: int) -> dict[str, int]:
    """Rows of register tiles: for features as many as waste fewest rows, for tokens a power of two."""
    most = (registers - columns - 1) // columns
    least = min(4, most)
    features = min(
        range(least, most + 1), key=lambda rows: (-(-r // rows) * rows * (1 + 0.02 * (most - rows)), -rows)
    )
    return {"columns": columns, "features": features, "tokens": 8 if most >= 8 else 4}
