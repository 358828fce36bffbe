"""Tile sizes, warps and stages of Triton kernels: a table, chosen by compiling ahead of time.

`python -m benchmarks.configurations` makes it: of some candidates it keeps the largest tiles that fit in shared memory
and spill no register, and of those the one with the highest occupancy. Its rows are for classes of kernels, whose
hardest member was compiled. Kernels with forget gates have rows of their own in the fused schedule, and in the parallel
one where those of kernels without gates spill.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

from fastgrad_compiler.runtime.kernel_spec import KernelSpec

TABLE = Path(__file__).with_name("configurations.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
TYPES = ("float32", "float16", "bfloat16")
KERNELS = ("state_kernel", "forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
FUSED_KERNELS = tuple(
    f"fused_{name}" for name in ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
)
D_CLASSES, DV_CLASSES, FUSED_DV_CLASSES = (16, 64), (64, 128), (32, 64)
DEGREE_CLASSES = {"float32": (4,), "bfloat16": (2, 4)}
ROW_OF = {"float16": "float32"}  # whose kernels have the same operands, and fewer products
RELATIVES = {
    "sm_100": ("sm_90", "sm_80"),
    "sm_90": ("sm_80",),
    "gfx942": ("sm_80",),
}  # whose rows serve if need be
FALLBACK = (32, 16, 16, 2, 1)

Configuration = tuple[int, int, int, int, int]
"""ROWS, KEYS, FEATURES, warps, stages."""


def configurations(spec: KernelSpec, fused: bool = False) -> dict[str, dict[str, dict[str, Configuration]]]:
    """By architecture, type of the inputs and kernel; `fused` adds the kernels of that schedule where they fit."""
    return {a: {t: _kernels(a, t, spec, fused) for t in TYPES} for a in ARCHITECTURES}


def _kernels(architecture: str, dtype: str, spec: KernelSpec, fused: bool) -> dict[str, Configuration]:
    found = {name: find(architecture, dtype, name, spec) or FALLBACK for name in KERNELS}
    walking = {name: find(architecture, dtype, name, spec) for name in FUSED_KERNELS} if fused else {}
    if all(walking.values()):
        found |= {name: row for name, row in walking.items() if row is not None}
    return found


def find(architecture: str, dtype: str, kernel: str, spec: KernelSpec) -> Configuration | None:
    """The row of the table for a kernel, or of a relative; None where no candidate was good."""
    places = (architecture, *RELATIVES.get(architecture, ()))
    classes = [spec]
    if spec.forget and not kernel.startswith("fused"):
        classes.append(replace(spec, forget=False))
    rows = (_table().get(key(place, dtype, kernel, of_class)) for place in places for of_class in classes)
    row = next(filter(None, rows), None)
    return None if row is None else (row[0], row[1], row[2], row[3], row[4])


def key(architecture: str, dtype: str, kernel: str, spec: KernelSpec) -> str:
    """The name of a class of kernels in the table."""
    d = _at_least(spec.d, D_CLASSES)
    dv = _at_least(spec.dv, FUSED_DV_CLASSES if kernel.startswith("fused") else DV_CLASSES)
    dtype = ROW_OF.get(dtype, dtype)
    degree = _at_least(spec.degree, DEGREE_CLASSES[dtype])
    near = " near" if spec.near is not None and not kernel.startswith(("state", "fused")) else ""
    forget = " forget" if spec.forget else ""
    return f"{architecture} {dtype} {kernel} d={d} dv={dv} degree={degree}{near}{forget}"


def _at_least(size: int, classes: tuple[int, ...]) -> int:
    return next((c for c in classes if size <= c), classes[-1])


@cache
def _table() -> dict[str, list[int]]:
    table: dict[str, list[int]] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    return table
